"""Peak memory of a training step, estimated part by part from the model's and the batches' shapes.

The estimate is of what `mx.get_peak_memory` reports. A step of offline training has two moments
that can be the peak; on-policy runs add the last two:

*Vocabulary head*: everything that the backward pass needs, plus one chunk of logits.
*Backward pass of a block*: the same, plus the temporaries of that block; with checkpointing, also
the arrays of the recomputed block.
*Sampling*: keys and values of the completions decoded together, and their logits.
*Log-probs of the roles*: the forward pass of one block on all completions of a microbatch.

What a block holds for its backward pass follows from what mlx-lm's blocks compute (see
`_held_by_block`). The temporaries (`WORK_*`) were measured on mlx's CPU backend without run-ahead;
those of attention on a GPU are the arrays that mlx's source and `models/gpu_attention.py` allocate.
The memory for running ahead, which `system/memory_limit.py` limits, is a separate part.
`scripts/verify_plan.py` compares the estimates with real steps on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mlx_align.data.buckets import AnyShape, BatchLimit, PackedShape
from mlx_align.models.attention import causal_fraction
from mlx_align.models.forward import CHUNK_ELEMENTS, MIN_CHUNK_ROWS
from mlx_align.models.gated_delta import CHUNK
from mlx_align.models.generation import ROWS_AT_ONCE, TOKENS_AT_ONCE
from mlx_align.models.gpu_attention import BLOCK_SCORES, LONGEST_PROMPT_RATIO
from mlx_align.models.patches import ATTENTION_TILE
from mlx_align.planning.model_shape import Linear, LinearAttention, ModelShape
from mlx_align.system.memory_limit import headroom_bytes

# Adapters are float32, also on 16-bit models, unless they are cast where they compute.
ADAPTER_BYTES = 4

PARTS = (
    "weights",
    "adapters and optimizer",
    "reward models",
    "activations",
    "attention",
    "vocabulary head",
    "running ahead",
)

# The moment at which completions are decoded.
SAMPLING = "sampling"

# Temporaries of a block's backward pass: elements per token and unit of MLP width, per token and
# unit of hidden width, and per attention score. Fitted to 28 steps in float32 and bf16 at widths
# 512 and 1,024, with and without checkpointing. Their dtype is the one in which adapters compute.
WORK_MLP, WORK_WIDE, WORK_SCORES = 1.6, 2.0, 0.8
# A chunk of logits exists twice: in the model's dtype, and its exponential in float32.
LOGIT_BYTES = 4
# mlx's attention gradient on Metal holds this many tiles of scores in the activations' dtype, and
# sums in float32. A block in `gpu_attention.py` exists this many times in float32: scores,
# probabilities, their two gradients, and one in the making.
KERNEL_TILES, BLOCK_ARRAYS, SUM_BYTES = 3, 5, 4
# Linear attention, in elements per token and unit of the width of keys or values: held in the
# model's dtype and in float32, and the temporaries of its gradient. States are counted per row.
# Fitted to 20 steps of Qwen3.5's blocks in float32 and bf16, with heads of 32, 64 and 128.
LINEAR_KEYS, LINEAR_NARROW, LINEAR_WIDE, LINEAR_GATES = 8, 3, 5, 3
WORK_KEYS, WORK_VALUES, WORK_STATES = (3, 5), 1.5, 2.7
# mlx-lm's caches grow in steps of this many tokens.
CACHE_STEP = 256


# How attention is computed: with all scores kept (on a CPU), by mlx's kernel, or in blocks too
# where a layer has a window, sinks, a soft cap, or heads that mlx has no kernel for.
Attention = Literal["scores", "kernel", "blocks"]


@dataclass(frozen=True)
class Sampling:
    """The sampling of an on-policy run.

    Attributes:
        prompts: Prompts of a rollout batch.
        held_out: Held-out prompts, answered once each in an evaluation.
        group_size: Completions per prompt.
        prompt: Length of the longest prompt, tokens.
        completion: Length of the longest completion, tokens.
        min_group_size: Smallest group size that the algorithm can learn from.
    """

    prompts: int
    held_out: int
    group_size: int
    prompt: int
    completion: int
    min_group_size: int = 1

    @property
    def rows(self) -> int:
        """Completions decoded together."""
        return min(ROWS_AT_ONCE, max(self.prompts * self.group_size, self.held_out))


@dataclass(frozen=True)
class Workload:
    """The computation of a run, as far as memory depends on it.

    Attributes:
        shapes: Shapes of the microbatches.
        limit: Limit that decided how many prompts a shape holds.
        rows: Completions per prompt that run together; 2 for pairs.
        accumulation: Microbatches per update.
        fine_tune_type: lora, dora or full.
        rank: Rank of the adapters.
        num_layers: Number of blocks trained, counted from the last; -1 for all.
        keys: Names of the adapted layers within a block; None for all linear layers.
        dropout: Whether the adapters use dropout.
        grad_checkpoint: Whether blocks are recomputed in the backward pass.
        shared: Whether completions share the keys and values of their prompt.
        adapter_bytes: Bytes per adapter parameter where it computes; 2 if cast to 16 bits.
        vocabulary: Whether completions pass the vocabulary head; a reward model's do not.
        sampling: How the run samples; None for offline training.
        critic: Whether a critic of the policy's size is trained.
        reward_model_bytes: Bytes taken by reward models.
        attention: How attention is computed.
    """

    shapes: tuple[AnyShape, ...]
    limit: BatchLimit = field(default_factory=BatchLimit)
    rows: int = 2
    accumulation: int = 8
    fine_tune_type: str = "lora"
    rank: int = 16
    num_layers: int = -1
    keys: tuple[str, ...] | None = None
    dropout: bool = False
    grad_checkpoint: bool = True
    shared: bool = True
    adapter_bytes: int = ADAPTER_BYTES
    vocabulary: bool = True
    sampling: Sampling | None = None
    critic: bool = False
    reward_model_bytes: int = 0
    attention: Attention = "scores"


@dataclass(frozen=True)
class MemoryPlan:
    """Estimated bytes at the peak.

    Attributes:
        parts: Bytes by part, in the order of `PARTS`; their sum is the peak.
        moment: The moment of a step at which the peak is reached.
        shape: The batch shape that reaches it.
        trained_parameters: Number of trained parameters.
    """

    parts: Mapping[str, int]
    moment: str
    shape: AnyShape
    trained_parameters: int

    @property
    def peak_bytes(self) -> int:
        """Sum of all parts."""
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> int:
        """The peak without run-ahead: the minimum that a step needs."""
        return self.peak_bytes - self.parts["running ahead"]


def plan_memory(model: ModelShape, workload: Workload) -> MemoryPlan:
    """Estimate the peak of the run's most expensive batch shape."""
    plans = [_plan_shape(model, workload, shape) for shape in workload.shapes]
    return max(plans, key=lambda plan: plan.peak_bytes)


def trained_parameters(model: ModelShape, workload: Workload) -> int:
    """Number of trained parameters."""
    layers = _trained_linears(model.linears, model, workload)
    if workload.fine_tune_type == "full":
        return sum(linear.inputs * linear.outputs * linear.experts for linear in layers)
    extra = 1 if workload.fine_tune_type == "dora" else 0  # a magnitude per output
    return sum(
        linear.experts * (workload.rank * (linear.inputs + linear.outputs) + extra * linear.outputs)
        for linear in layers
    )


def _trained_linears(
    linears: Sequence[Linear], model: ModelShape, workload: Workload
) -> list[Linear]:
    first = 0 if workload.num_layers < 0 else model.blocks - workload.num_layers
    keys = None if workload.fine_tune_type == "full" else workload.keys
    return [
        linear
        for linear in linears
        if linear.block >= first and (keys is None or linear.name in keys)
    ]


@dataclass(frozen=True)
class _Pass:
    """One forward pass through the blocks: of the prompts, or of completions on their keys.

    Attributes:
        tokens: Token positions, all rows together.
        rows: Number of rows.
        keys: Keys of the prompt that a row attends to in addition to its own, tokens.
        packed: Whether a row holds several sequences.
    """

    tokens: int
    rows: int
    keys: int = 0
    packed: bool = False

    @property
    def scores(self) -> float:
        """Attention scores computed per head, all rows together."""
        own = self.tokens * (self.tokens // self.rows)
        if self.keys == 0:
            return own * causal_fraction(self.tokens // self.rows)
        return own + self.tokens * self.keys

    @property
    def aligned_tokens(self) -> int:
        """Tokens of the rows that mlx's kernel gets: completions behind a copy of their prompt.

        0 if it gets none, because blocks compute less.
        """
        if self.packed or self.keys > LONGEST_PROMPT_RATIO * (self.tokens // self.rows):
            return 0
        return self.tokens + self.rows * self.keys


def _passes(workload: Workload, shape: AnyShape) -> list[_Pass]:
    if isinstance(shape, PackedShape):
        # Scores for the keys of other groups are computed too, then masked.
        return [
            _Pass(shape.prompt, 1, packed=True),
            _Pass(shape.completion, 1, shape.prompt, packed=True),
        ]
    prompts, rows = shape.groups, shape.groups * workload.rows
    if not workload.shared:
        return [_Pass(rows * (shape.prompt + shape.completion), rows)]
    # A policy never reads a completion's last token; a reward model is read at it.
    width = shape.completion - workload.vocabulary
    return [
        _Pass(prompts * shape.prompt, prompts),
        _Pass(rows * width, rows, shape.prompt),
    ]


@dataclass(frozen=True)
class _Bytes:
    """Bytes held at one moment, without weights and trained parameters."""

    activations: float = 0.0
    attention: float = 0.0
    head: float = 0.0

    def __add__(self, other: _Bytes) -> _Bytes:
        return _Bytes(
            self.activations + other.activations,
            self.attention + other.attention,
            self.head + other.head,
        )

    def __mul__(self, times: float) -> _Bytes:
        return _Bytes(self.activations * times, self.attention * times, self.head * times)

    @property
    def total(self) -> float:
        return self.activations + self.attention + self.head


def _plan_shape(model: ModelShape, workload: Workload, shape: AnyShape) -> MemoryPlan:
    passes = _passes(workload, shape)
    attention, linear = _trained_blocks(model, workload)
    block = sum((_held_by_block(model, workload, one) for one in passes), _Bytes())
    temporary = _temporaries(model, workload, passes)
    held = (_held_checkpointed(model, passes) if workload.grad_checkpoint else block) * attention
    if (delta := model.linear_attention) is not None and linear:
        one, work = _linear_block(model, delta, workload, passes)
        kept = _linear_checkpointed(model, delta, passes) if workload.grad_checkpoint else one
        held += kept * linear
        # The block that needs most while its gradient is computed.
        if not attention or (one + work).total > (block + temporary).total:
            block, temporary = one, work
    held += _dense_copies(model, workload)
    rows = 1 if isinstance(shape, PackedShape) else shape.groups * workload.rows
    head_tokens = rows * shape.completion if workload.vocabulary else 0
    # Per completion token: the gradient with respect to its hidden state, kept until the loss.
    gradient = _Bytes(head=head_tokens * model.hidden * model.activation_bytes)
    if workload.grad_checkpoint:
        temporary += block
    parameters = trained_parameters(model, workload)
    copies = _weight_copies(workload)
    updating = _copies_bytes(model, workload, parameters, copies + (workload.accumulation > 1))
    moments = {
        # The gradient in chunks, and concatenated.
        "vocabulary head": (updating, held + gradient * 2 + _chunk(model, head_tokens)),
        "backward pass of a block": (updating, held + gradient + temporary),
    }
    fixed = model.weights_bytes + workload.reward_model_bytes
    # The memory limit is set from the update's peak plus headroom; scoring may use that headroom
    # too. Sampling has no limit, and takes about as much.
    ahead = fixed + max(int(trained + most.total) for trained, most in moments.values())
    if workload.sampling is not None:
        trained = _copies_bytes(model, workload, parameters, copies)
        moments[SAMPLING] = trained, _sampling(model, workload, workload.sampling)
        ahead = max(ahead, fixed + int(trained + moments[SAMPLING][1].total))
        moments["log-probs of the roles"] = trained, _scoring(model, workload, shape)
    moment, (trained, most) = max(moments.items(), key=lambda item: item[1][0] + item[1][1].total)
    parts = {
        "weights": model.weights_bytes,
        "adapters and optimizer": trained,
        "reward models": workload.reward_model_bytes,
        "activations": int(most.activations),
        "attention": int(most.attention),
        "vocabulary head": int(most.head),
    }
    parts["running ahead"] = max(0, ahead + headroom_bytes(ahead) - sum(parts.values()))
    return MemoryPlan(parts=parts, moment=moment, shape=shape, trained_parameters=parameters)


def _trained_blocks(model: ModelShape, workload: Workload) -> tuple[int, int]:
    """How many of the trained blocks have attention, and how many linear attention."""
    first = 0 if workload.num_layers < 0 else max(0, model.blocks - workload.num_layers)
    trained = range(first, model.blocks)
    count = sum(block in model.linear_blocks for block in trained)
    return len(trained) - count, count


def _weight_copies(workload: Workload) -> int:
    """Copies of the trained weights during a run: reference, policy, and Adam's two moments.

    A critic adds three: its initial weights are shared with another role.
    """
    return 4 + 3 * workload.critic


def _copies_bytes(model: ModelShape, workload: Workload, parameters: int, copies: int) -> int:
    """Bytes of `copies` copies of the trained weights; accumulated gradients count as one."""
    if workload.fine_tune_type == "full":
        if model.activation_bytes == ADAPTER_BYTES:
            # The initial weights are the model's own.
            return (copies - 1) * parameters * ADAPTER_BYTES
        # Float32 masters, and the 16 bits that an update computes with.
        return parameters * (copies * ADAPTER_BYTES + model.activation_bytes)
    cast = workload.adapter_bytes if workload.adapter_bytes < ADAPTER_BYTES else 0
    return parameters * (copies * ADAPTER_BYTES + cast)


def _sampling(model: ModelShape, workload: Workload, sampling: Sampling) -> _Bytes:
    """Bytes held while completions are decoded and a prompt runs at the same time.

    Caches are rounded up to `CACHE_STEP` tokens. Logits exist in the model's dtype, normalised
    twice (this step's and the next one's), and in float32 for the log-probs.
    """
    size = model.activation_bytes
    width = sampling.prompt + -(-sampling.completion // CACHE_STEP) * CACHE_STEP
    cache = sampling.rows * width * 2 * model.kv_width * model.blocks * size
    logits = sampling.rows * model.vocabulary * (3 * size + 2 * LOGIT_BYTES)
    prompt = _temporaries(model, workload, [_Pass(min(sampling.prompt, TOKENS_AT_ONCE), 1)])
    return _Bytes(prompt.activations, cache + prompt.attention, logits)


def _scoring(model: ModelShape, workload: Workload, shape: AnyShape) -> _Bytes:
    """Forward pass of a block, and a chunk of logits, for all completions of a microbatch."""
    assert workload.sampling is not None
    whole = replace(workload, rows=workload.sampling.group_size)
    head_tokens = shape.groups * whole.rows * shape.completion
    # Entropies need one more array per chunk; with several chunks, the next one's logits may be
    # in memory already.
    rows = _chunk_rows(model)
    entropies = min(head_tokens, rows) * model.vocabulary * LOGIT_BYTES * (1 + (head_tokens > rows))
    temporary = _temporaries(model, whole, _passes(whole, shape)) + _chunk(model, head_tokens)
    return temporary + _Bytes(head=entropies)


def _held_by_block(model: ModelShape, workload: Workload, one: _Pass) -> _Bytes:
    """Bytes that the backward pass of one block needs, without checkpointing.

    Per token, with hidden width D and MLP width F: the input, the normalised input, queries,
    attention output, and the residual before and after the second norm (6 D, but queries and
    attention output may have another width); gate, up, sigmoid and product (4 F). Inputs of
    adapters are held in float32: in addition to the model's copy if that is narrower (three of
    width D), or instead of it (the product). Then the low-rank activations of each adapter, keys
    and values, and attention probabilities.
    """
    size = model.activation_bytes
    per_token = _held_per_token(model, workload, _attention_block(model))
    per_token += 2 * model.query_width * size
    per_token += _adapter_copy(model, workload) * model.query_width
    attention = 2.0 * model.kv_width * one.tokens * size
    if workload.attention == "scores":
        attention += model.heads * one.scores * size
    else:
        # The logarithm of each query's normaliser and, behind a copy of the prompt, queries, keys,
        # values and output.
        attention += model.heads * max(one.tokens, one.aligned_tokens) * SUM_BYTES
        if one.keys:
            attention += one.aligned_tokens * 2 * (model.query_width + model.kv_width) * size
    return _Bytes(activations=one.tokens * per_token, attention=attention)


def _adapter_copy(model: ModelShape, workload: Workload) -> int:
    """Bytes per element of an adapter's input, which is held if the model's own is narrower."""
    adapters = workload.fine_tune_type != "full"
    narrow = model.activation_bytes < workload.adapter_bytes
    return workload.adapter_bytes if adapters and narrow else 0


def _attention_block(model: ModelShape) -> int:
    """The number of the last block with attention."""
    return max(set(range(model.blocks)) - model.linear_blocks, default=0)


def _held_per_token(model: ModelShape, workload: Workload, block: int) -> float:
    """Bytes per token that the backward pass of a block needs, without its attention's."""
    size = model.activation_bytes
    wide, experts = model.hidden, model.active_experts
    per_token: float = (4 * wide + 3 * model.intermediate) * size
    per_token += 2 * wide * _adapter_copy(model, workload)
    # Of routed experts: their inputs, sorted by expert, and their outputs, before and after they
    # are sorted by token.
    per_token += experts * wide * (3 * size + _adapter_copy(model, workload))
    if workload.fine_tune_type == "full":
        return per_token + model.intermediate * size
    per_token += model.intermediate * workload.adapter_bytes
    in_block = [linear for linear in model.linears if linear.block == block]
    per_token += len(in_block) * workload.rank * workload.adapter_bytes
    if workload.fine_tune_type == "dora":
        # Outputs before the magnitude is applied, for the magnitude's gradient.
        per_token += sum(linear.outputs for linear in in_block) * size
    if workload.dropout:
        # Each adapter keeps its own dropped-out inputs and their mask.
        per_token += sum(linear.inputs for linear in in_block) * (size + 1)
    return per_token


def _linear_block(
    model: ModelShape, delta: LinearAttention, workload: Workload, passes: Sequence[_Pass]
) -> tuple[_Bytes, _Bytes]:
    """What the gradient of a block with linear attention needs: bytes held, and temporaries.

    Held per token: the convolution's output, its sigmoid and their product for queries, keys and
    values; queries and keys before and after they are normalised; outputs, gates and their products
    in float32; and a state per chunk of tokens (`models/gated_delta.py`). While the gradient of
    the rule is computed, the MLP's arrays are free again.
    """
    size = model.activation_bytes
    tokens, rows = sum(one.tokens for one in passes), max(one.rows for one in passes)
    values: float = LINEAR_NARROW * size + LINEAR_WIDE * SUM_BYTES + _adapter_copy(model, workload)
    mixer: float = LINEAR_KEYS * delta.key_width * size + delta.value_width * values
    mixer += delta.state / CHUNK * SUM_BYTES
    if delta.gate_per_key:
        mixer += LINEAR_GATES * delta.key_width * SUM_BYTES
    rest = _held_per_token(model, workload, min(delta.blocks))
    work: float = delta.key_width * (WORK_KEYS[0] * size + WORK_KEYS[1] * SUM_BYTES)
    work += WORK_VALUES * delta.value_width * SUM_BYTES
    mlp = rest - 2 * model.hidden * size
    in_rule = tokens * (work - mlp) + WORK_STATES * rows * delta.state * SUM_BYTES
    in_mlp = _temporaries(model, workload, passes).activations
    return _Bytes(activations=tokens * (rest + mixer)), _Bytes(activations=max(in_mlp, in_rule))


def _linear_checkpointed(
    model: ModelShape, delta: LinearAttention, passes: Sequence[_Pass]
) -> _Bytes:
    """Bytes held by a checkpointed block: its inputs, and the states after shared prompts."""
    states = sum(one.rows for one in passes[:-1]) * delta.state * SUM_BYTES
    return _Bytes(_held_checkpointed(model, passes).activations, states)


def _held_checkpointed(model: ModelShape, passes: Sequence[_Pass]) -> _Bytes:
    """Bytes held by a checkpointed block: its inputs, and keys and values of shared prompts."""
    size = model.activation_bytes
    inputs = sum(one.tokens for one in passes) * model.hidden * size
    shared = sum(one.tokens for one in passes[:-1])
    return _Bytes(inputs, 2 * model.kv_width * shared * size)


def _dense_copies(model: ModelShape, workload: Workload) -> _Bytes:
    """Bytes that DoRA on a quantised model holds for all adapted layers, checkpointed or not.

    DoRA needs the norm of the adapted weight, and so the dequantised weight and its sum with the
    adapter in float32. The compiler recognises that the backward pass computes both again, and
    keeps them (measured: 6.05 bytes per weight with 2, 4 and 6 blocks).
    """
    if workload.fine_tune_type != "dora" or not model.quantised:
        return _Bytes()
    adapted = _trained_linears(model.linears, model, workload)
    weights = sum(linear.inputs * linear.outputs * linear.experts for linear in adapted)
    return _Bytes(activations=weights * (model.activation_bytes + workload.adapter_bytes))


def _temporaries(model: ModelShape, workload: Workload, passes: Sequence[_Pass]) -> _Bytes:
    """Temporaries of a block's backward pass."""
    size = model.activation_bytes
    if workload.fine_tune_type != "full":
        size = max(size, workload.adapter_bytes)
    tokens = sum(one.tokens for one in passes)
    scores = sum(one.scores for one in passes) * model.heads
    attention = WORK_SCORES * scores * size
    if workload.attention != "scores":
        attention = max(_gpu_temporaries(model, workload, one) for one in passes)
    return _Bytes(
        activations=tokens * (WORK_MLP * model.intermediate + WORK_WIDE * model.hidden) * size,
        attention=attention,
    )


def _gpu_temporaries(model: ModelShape, workload: Workload, one: _Pass) -> float:
    """Bytes that the gradient of attention holds on a GPU: sums in float32, and scores."""
    size, length = model.activation_bytes, one.tokens // one.rows + one.keys
    tokens = max(one.tokens, one.aligned_tokens)
    # Gradients of queries, keys and values are summed in float32, then copied; the output's comes
    # in.
    sums = tokens * (model.query_width + 2 * model.kv_width) * (SUM_BYTES + size)
    sums += tokens * model.query_width * size
    kernel = KERNEL_TILES * one.rows * model.heads * min(length, ATTENTION_TILE) ** 2 * size
    blocks = BLOCK_ARRAYS * min(model.heads * one.scores, BLOCK_SCORES) * SUM_BYTES
    if workload.attention == "blocks":
        return sums + max(kernel, blocks)
    return sums + (kernel if one.aligned_tokens else blocks)


def _chunk(model: ModelShape, head_tokens: int) -> _Bytes:
    """One chunk of logits and its exponential."""
    rows = min(head_tokens, _chunk_rows(model))
    return _Bytes(head=rows * model.vocabulary * (model.activation_bytes + LOGIT_BYTES))


def _chunk_rows(model: ModelShape) -> int:
    return max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // model.vocabulary)
