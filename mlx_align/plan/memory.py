"""Peak memory of a training step, from the model's shape and the batch's, by part.

What is counted is what `mx.get_peak_memory` counts. A step has two moments that can be the peak,
and a run that is trained on its own samples a third and a fourth:

*The vocabulary head*: everything the backward pass will need is held, and one chunk of logits.
*The backward pass of a block*: the same, and what is being worked on in that block; with
checkpointing also what the block holds once it is recomputed, prompts and completions together.
*Sampling*: keys and values of the completions that are decoded together, and their logits.
*The roles' log-probs*: one block at work on all completions of a microbatch, without gradient.

What a block holds for its backward pass follows from what mlx-lm's blocks compute: see
`_held_by_block`. What is being worked on (`WORK_*`) was measured on mlx's CPU backend, with nothing
planned ahead. How far mlx may run ahead is bounded by `train/run_ahead.py`, and is a part of its
own. `scripts/verify_plan.py` compares all with real steps, on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mlx_align.data.shapes import AnyShape, PackedShape
from mlx_align.models.attention import causal_share
from mlx_align.models.generation import TOKENS_AT_ONCE
from mlx_align.models.logps import CHUNK_ELEMENTS, MIN_CHUNK_ROWS
from mlx_align.plan.headers import Linear, ModelShape
from mlx_align.plan.workload import ADAPTER_BYTES, Sampling, Workload

PARTS = (
    "weights",
    "adapters and optimizer",
    "reward models",
    "activations",
    "attention",
    "vocabulary head",
    "running ahead",
)

# What the moment is called in which completions are decoded.
SAMPLING = "sampling"

# What is being worked on at once in a block beyond what is held: numbers per token of the MLP's
# width and of the hidden width, and per attention score. Fitted to 28 steps in float32 and bf16 of
# widths 512 and 1,024, with and without checkpointing; they are as wide as the adapters compute.
WORK_MLP, WORK_WIDE, WORK_SCORES = 1.6, 2.0, 0.8
# Logits of a chunk are there twice: as the model gives them and, float32, their exponential.
LOGIT_BYTES = 4
# What steps may take beyond what is needed: a share of that, and always so much. Two pairs of
# 256 + 2×128 tokens, 34M parameters, 2 cores: at 4% a step took as long as without a limit (1.14
# and 1.15 s).
ROOM = 0.05
LEAST_ROOM_BYTES = 1 << 24
# Tokens that mlx-lm's caches grow by.
CACHE_STEP = 256


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the peak.

    Attributes:
        parts: By the names of `PARTS`; they add up to the peak.
        moment: When the peak is reached.
        shape: The batch shape that reaches it.
        trained_parameters: Elements of the adapters, or of the blocks trained whole.
    """

    parts: Mapping[str, int]
    moment: str
    shape: AnyShape
    trained_parameters: int

    @property
    def peak_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> int:
        """What a step cannot do without."""
        return self.peak_bytes - self.parts["running ahead"]


def plan_memory(model: ModelShape, work: Workload) -> MemoryPlan:
    """The peak of the costliest of the run's shapes."""
    plans = [_plan_shape(model, work, shape) for shape in work.shapes]
    return max(plans, key=lambda plan: plan.peak_bytes)


def room_bytes(needed: int) -> int:
    """What a run whose steps need so many bytes may take beside them, to plan ahead."""
    return max(LEAST_ROOM_BYTES, int(ROOM * needed))


def trained_parameters(model: ModelShape, work: Workload) -> int:
    """Elements of the tree that is trained."""
    layers = _trained(model.linears, model, work)
    if work.fine_tune_type == "full":
        return sum(linear.inputs * linear.outputs * linear.experts for linear in layers)
    extra = 1 if work.fine_tune_type == "dora" else 0  # a magnitude per output
    return sum(
        linear.experts * (work.rank * (linear.inputs + linear.outputs) + extra * linear.outputs)
        for linear in layers
    )


def _trained(linears: Sequence[Linear], model: ModelShape, work: Workload) -> list[Linear]:
    first = 0 if work.num_layers < 0 else model.blocks - work.num_layers
    keys = None if work.fine_tune_type == "full" else work.keys
    return [
        linear
        for linear in linears
        if linear.block >= first and (keys is None or linear.name in keys)
    ]


@dataclass(frozen=True)
class _Pass:
    """One of the two ways through the blocks: the prompts, or the completions on top of them.

    Attributes:
        tokens: Positions that run, of all rows.
        rows: Rows.
        keys: Keys that a row attends to beside its own: its prompt's, tokens.
    """

    tokens: int
    rows: int
    keys: int = 0

    @property
    def scores(self) -> float:
        """Attention scores of one head, of all rows, that are made."""
        own = self.tokens * (self.tokens // self.rows)
        if self.keys == 0:
            return own * causal_share(self.tokens // self.rows)
        return own + self.tokens * self.keys


def _passes(work: Workload, shape: AnyShape) -> list[_Pass]:
    if isinstance(shape, PackedShape):
        # Scores of other groups' keys are made too, and hidden.
        return [
            _Pass(shape.prompt, 1),
            _Pass(shape.completion, 1, shape.prompt),
        ]
    prompts, rows = shape.groups, shape.groups * work.rows
    if not work.shared:
        return [_Pass(rows * (shape.prompt + shape.completion), rows)]
    # The last token of a completion is predicted, never read; but a reward is read at it.
    width = shape.completion - work.vocabulary
    return [
        _Pass(prompts * shape.prompt, prompts),
        _Pass(rows * width, rows, shape.prompt),
    ]


@dataclass(frozen=True)
class _Bytes:
    """Bytes of a moment beside weights and what is trained."""

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


def _plan_shape(model: ModelShape, work: Workload, shape: AnyShape) -> MemoryPlan:
    passes = _passes(work, shape)
    blocks = model.blocks if work.num_layers < 0 else min(work.num_layers, model.blocks)
    block = sum((_held_by_block(model, work, one) for one in passes), _Bytes())
    held = _held_checkpointed(model, passes) if work.grad_checkpoint else block
    held = held * blocks + _dense_copies(model, work)
    rows = 1 if isinstance(shape, PackedShape) else shape.groups * work.rows
    scored = rows * shape.completion if work.vocabulary else 0
    # Per completion token: the gradient by its hidden state, which waits for the loss.
    gradient = _Bytes(head=scored * model.hidden * model.activation_bytes)
    worked = _worked_on(model, work, passes) + (block if work.grad_checkpoint else _Bytes())
    parameters = trained_parameters(model, work)
    trees = _trees(work)
    updating = _tree_bytes(model, work, parameters, trees + (work.accumulation > 1))
    moments = {
        # Chunks of the gradient, and all of them joined.
        "vocabulary head": (updating, held + gradient * 2 + _chunk(model, scored)),
        "backward pass of a block": (updating, held + gradient + worked),
    }
    fixed = model.weights_bytes + work.further_bytes
    # Gradients are what is given room to run ahead; all else of a run may then use it too.
    update = fixed + max(int(trained + most.total) for trained, most in moments.values())
    if work.sampling is not None:
        trained = _tree_bytes(model, work, parameters, trees)
        moments[SAMPLING] = trained, _sampling(model, work, work.sampling)
        moments["log-probs of the roles"] = trained, _scoring(model, work, shape)
    moment, (trained, most) = max(moments.items(), key=lambda item: item[1][0] + item[1][1].total)
    parts = {
        "weights": model.weights_bytes,
        "adapters and optimizer": trained,
        "reward models": work.further_bytes,
        "activations": int(most.activations),
        "attention": int(most.attention),
        "vocabulary head": int(most.head),
    }
    parts["running ahead"] = max(0, update + room_bytes(update) - sum(parts.values()))
    return MemoryPlan(parts=parts, moment=moment, shape=shape, trained_parameters=parameters)


def _trees(work: Workload) -> int:
    """Trees that are held all the time: where the policy started, where it is, and Adam's two.

    A critic has three of its own: it starts from arrays that others hold.
    """
    return 4 + 3 * work.critic


def _tree_bytes(model: ModelShape, work: Workload, parameters: int, trees: int) -> int:
    """So many trees; a sum of gradients is one, held where an update has several microbatches."""
    if work.fine_tune_type == "full":
        # The tree it starts from is the weights themselves.
        return (trees - 1) * parameters * model.activation_bytes
    cast = work.adapter_bytes if work.adapter_bytes < ADAPTER_BYTES else 0
    return parameters * (trees * ADAPTER_BYTES + cast)


def _sampling(model: ModelShape, work: Workload, said: Sampling) -> _Bytes:
    """What is held while completions are decoded, and while a prompt is run beside them.

    mlx-lm makes room in its caches for so many tokens at a time; logits are there as the model
    gives them, normalised twice (this step's and the next), and in float32 for the log-probs.
    """
    size = model.activation_bytes
    width = said.prompt + -(-said.completion // CACHE_STEP) * CACHE_STEP
    cache = said.rows * width * 2 * model.kv_width * model.blocks * size
    logits = said.rows * model.vocabulary * (3 * size + 2 * LOGIT_BYTES)
    prompt = _worked_on(model, work, [_Pass(min(said.prompt, TOKENS_AT_ONCE), 1)])
    return _Bytes(prompt.activations, cache + prompt.attention, logits)


def _scoring(model: ModelShape, work: Workload, shape: AnyShape) -> _Bytes:
    """A block's forward pass, and a chunk of logits, of all completions of a microbatch."""
    assert work.sampling is not None
    whole = replace(work, rows=work.sampling.group_size)
    scored = shape.groups * whole.rows * shape.completion
    # Entropies need another array of a chunk; of several chunks the next one's logits may be there.
    rows = _chunk_rows(model)
    entropies = min(scored, rows) * model.vocabulary * LOGIT_BYTES * (1 + (scored > rows))
    worked = _worked_on(model, whole, _passes(whole, shape)) + _chunk(model, scored)
    return worked + _Bytes(head=entropies)


def _held_by_block(model: ModelShape, work: Workload, one: _Pass) -> _Bytes:
    """What the backward pass of one block needs, without checkpointing.

    Per token: its input, the input after the norm, queries, what attention gives, the sum before
    the second norm and after it (6 D; queries and what attention gives have their own width); gate,
    up, their sigmoid and product (4 F). Inputs of adapters are held in float32: beside the
    model's own where that is narrower (three of width D), instead of it for the product. The low
    rank of each adapter. Keys and values; attention probabilities.
    """
    size = model.activation_bytes
    adapters = work.fine_tune_type != "full"
    wide, queries = model.hidden, model.query_width
    per_token = (4 * wide + 2 * queries + 3 * model.intermediate) * size
    if adapters:
        per_token += model.intermediate * work.adapter_bytes
        if size < work.adapter_bytes:
            per_token += (2 * wide + queries) * work.adapter_bytes
        in_block = [linear for linear in model.linears if linear.block == model.blocks - 1]
        per_token += len(in_block) * work.rank * work.adapter_bytes
        if work.fine_tune_type == "dora":
            # Outputs before their magnitude, for its gradient.
            per_token += sum(linear.outputs for linear in in_block) * size
        if work.dropout:
            # Each adapter has dropped inputs of its own, and which they were.
            per_token += sum(linear.inputs for linear in in_block) * (size + 1)
    else:
        per_token += model.intermediate * size
    return _Bytes(
        activations=one.tokens * per_token,
        attention=(2 * model.kv_width * one.tokens + model.heads * one.scores) * size,
    )


def _held_checkpointed(model: ModelShape, passes: Sequence[_Pass]) -> _Bytes:
    """What a checkpointed block holds: its inputs, and the keys and values of shared prompts."""
    size = model.activation_bytes
    inputs = sum(one.tokens for one in passes) * model.hidden * size
    shared = sum(one.tokens for one in passes[:-1])
    return _Bytes(inputs, 2 * model.kv_width * shared * size)


def _dense_copies(model: ModelShape, work: Workload) -> _Bytes:
    """What DoRA on a quantised model holds of every adapted layer at once, checkpointed or not.

    Its dequantised weight and that with the adapter in it, in float32, whose norm it needs: the
    compiler sees that the backward pass makes the same ones again, and keeps them (measured: 6.05
    bytes a weight, for each of 2, 4 and 6 blocks).
    """
    if work.fine_tune_type != "dora" or not model.quantised:
        return _Bytes()
    adapted = _trained(model.linears, model, work)
    weights = sum(linear.inputs * linear.outputs * linear.experts for linear in adapted)
    return _Bytes(activations=weights * (model.activation_bytes + work.adapter_bytes))


def _worked_on(model: ModelShape, work: Workload, passes: Sequence[_Pass]) -> _Bytes:
    """What a block's backward pass has in work beyond what is held."""
    size = model.activation_bytes
    if work.fine_tune_type != "full":
        size = max(size, work.adapter_bytes)
    tokens = sum(one.tokens for one in passes)
    scores = sum(one.scores for one in passes) * model.heads
    return _Bytes(
        activations=tokens * (WORK_MLP * model.intermediate + WORK_WIDE * model.hidden) * size,
        attention=WORK_SCORES * scores * size,
    )


def _chunk(model: ModelShape, scored: int) -> _Bytes:
    """One chunk of logits, and what is made of it."""
    rows = min(scored, _chunk_rows(model))
    return _Bytes(head=rows * model.vocabulary * (model.activation_bytes + LOGIT_BYTES))


def _chunk_rows(model: ModelShape) -> int:
    return max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // model.vocabulary)
