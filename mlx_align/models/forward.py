"""The forward pass: hidden states of completions, and log-probs of their tokens.

**Hidden states.** Each prompt runs once and all its completions attend to its keys and values. The
hidden state t of a completion is the one that *predicts* its token t (the prompt's last state
predicts token 0), so losses don't shift by one and prompt positions don't need the vocabulary head.
Families that can't share a prompt get the same hidden states from full rows.

**Log-probs.** Logits are computed for a chunk of hidden states at a time and never kept. With a
frozen head the gradient of a token's log-prob with respect to its hidden state,
∂logit_target/∂h − Σ_v softmax_v·∂logit_v/∂h, does not depend on the loss. It is computed in the
forward pass, kept as (N, C, D), and multiplied by the cotangent in the backward pass: one pass over
the vocabulary instead of two. The gradient of the entropy works the same way. Log-softmax is
always float32: in bf16, a token's log-prob would be off by up to 0.1 nats.

Shape letters: B prompts, N completions, P prompt positions, C completion positions, T tokens of a
packed row, D hidden size, V vocabulary; n rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import mlx.core as mx
from mlx.utils import tree_map

from mlx_align.errors import ModelError
from mlx_align.models.attention import blockwise_causal_attention, shared_prompt_attention
from mlx_align.models.backbone import Backbone
from mlx_align.models.checkpointing import checkpointed
from mlx_align.models.device import on_gpu
from mlx_align.models.gpu_attention import gpu_attention, packed_gpu_attention
from mlx_align.models.patches import apply_gpu_patches, apply_patches, exp, logsumexp
from mlx_align.models.prefix_cache import (
    FOREIGN_KEYS,
    CompletionKV,
    PackedKV,
    packed_completion_caches,
    packed_prompt_caches,
    prompt_caches,
)
from mlx_align.models.weights import use_adapter
from mlx_align.types import GroupBatch, Packing

# Logits computed at a time, in elements: 8 MB of float32, and up to four times that with the
# exponential and the gradient. With two pairs of 256 + 2×128 tokens, 34M parameters, a vocabulary
# of 32,000 and float32, the peak was 0.489 GB against 0.594 GB with chunks eight times as large,
# for about 6% more time; with checkpointing 0.264 GB against 0.381 GB.
CHUNK_ELEMENTS = 1 << 21
# Fewest rows in a chunk: with fewer, the weights of a large vocabulary are read for too little
# work. At width 896 and a vocabulary of 152,000 a step peaks 191 MB (float) and 229 MB (4-bit)
# higher than at 8,000; with 64 rows about 400 MB higher.
MIN_CHUNK_ROWS = 32

# Entropies count p·log p as 0 below e^−100, as float32 does: −∞·0 would be NaN.
MIN_LOG_RATIO = -100.0

# Computed with the log-probs in one pass over the vocabulary: log Σ_v p_v², or the entropy
# with or without its gradient.
Extra = Literal["none", "log_squares", "entropy", "entropy_value"]

_custom_function: Any = mx.custom_function  # the stubs lose the signature of what it wraps


# Token log-probs of a batch


def token_logprobs(
    backbone: Backbone, batch: GroupBatch, *, shared: bool = True, grad_checkpoint: bool = False
) -> mx.array:
    """Log-probs of the completions' tokens.

    Args:
        backbone: The model, with the adapter weights it holds now.
        batch: B prompts and N completions.
        shared: Run each prompt once for all its completions. Otherwise every completion runs in a
            separate row with its prompt. Packed batches always share.
        grad_checkpoint: Keep only each block's inputs and recompute it in the backward pass.

    Returns:
        (N, C) float32, nats; 0 where the mask is false.
    """
    hidden, targets = _predicting_states(backbone, batch, shared, grad_checkpoint)
    return _by_completion(batch, _head(backbone, hidden, targets)[0])


def token_logprobs_and_square_sums(
    backbone: Backbone, batch: GroupBatch, *, shared: bool = True, grad_checkpoint: bool = False
) -> tuple[mx.array, mx.array]:
    """Log-probs as `token_logprobs`, and log Σ_v p_v² of the distribution at every token.

    Returns:
        Two (N, C) float32 arrays, nats, from one pass over the vocabulary; 0 where the mask is
        false. The second has no gradient.
    """
    hidden, targets = _predicting_states(backbone, batch, shared, grad_checkpoint)
    logps, squares = _head(backbone, hidden, targets, "log_squares")
    return _by_completion(batch, logps), mx.stop_gradient(_by_completion(batch, squares))


def token_logprobs_and_entropies(
    backbone: Backbone,
    batch: GroupBatch,
    *,
    shared: bool = True,
    grad_checkpoint: bool = False,
    entropy_gradient: bool = True,
) -> tuple[mx.array, mx.array]:
    """Log-probs as `token_logprobs`, and the entropy −Σ_v p_v·log p_v at every token.

    Args:
        backbone: As in `token_logprobs`; its temperature applies to both results.
        batch: As in `token_logprobs`.
        shared: As in `token_logprobs`.
        grad_checkpoint: As in `token_logprobs`.
        entropy_gradient: Whether the entropy has a gradient. Without one, a second (N, C, D) array
            and a product with the vocabulary's weights are saved.

    Returns:
        Two (N, C) float32 arrays, nats, from one pass over the vocabulary; 0 where the mask is
        false.
    """
    hidden, targets = _predicting_states(backbone, batch, shared, grad_checkpoint)
    extra: Extra = "entropy" if entropy_gradient else "entropy_value"
    logps, entropies = _head(backbone, hidden, targets, extra)
    if not entropy_gradient:
        entropies = mx.stop_gradient(entropies)
    return _by_completion(batch, logps), _by_completion(batch, entropies)


def target_logprobs(backbone: Backbone, hidden: mx.array, targets: mx.array) -> mx.array:
    """Log-probs (…,) float32, nats, of `targets` (…,) as predicted by `hidden` (…, D)."""
    return _head(backbone, hidden, targets)[0]


def _predicting_states(
    backbone: Backbone, batch: GroupBatch, shared: bool, grad_checkpoint: bool
) -> tuple[mx.array, mx.array]:
    """Hidden states (…, D) and the tokens (…,) they predict; … is (N, C), or (T,) if packed."""
    packing = batch.packing
    if packing is None:
        hidden = completion_hidden_states(
            backbone, batch, shared=shared, grad_checkpoint=grad_checkpoint
        )
        return hidden, batch.completion_tokens
    rows = packed_hidden_states(backbone, batch, grad_checkpoint=grad_checkpoint)
    return _packed_predicting_states(batch, packing, *rows), packing.tokens


def _packed_predicting_states(
    batch: GroupBatch, packing: Packing, prompts: mx.array, completions: mx.array
) -> mx.array:
    """The state (T, D) before each completion token, from both rows' (1, P, D) and (1, T, D)."""
    each = packing.place.shape[0] // batch.prompt_lengths.shape[0]
    last = mx.cumsum(batch.prompt_lengths) - 1
    before = mx.arange(packing.step.shape[0]) + prompts.shape[1] - 1
    of_prompt = last[mx.maximum(packing.completion, 0) // each]
    both = mx.concatenate([prompts[0], completions[0]])
    return both[mx.where(packing.step == 0, of_prompt, before)]


def _by_completion(batch: GroupBatch, values: mx.array) -> mx.array:
    """Values of the tokens of `_predicting_states` as (N, C); 0 where the mask is false."""
    if batch.packing is not None:
        values = values[batch.packing.place]
    return mx.where(batch.completion_mask, values, 0)


# Hidden states


def completion_hidden_states(
    backbone: Backbone, batch: GroupBatch, *, shared: bool = True, grad_checkpoint: bool = False
) -> mx.array:
    """Hidden states (N, C, D) that predict the completions' tokens.

    Arguments are those of `token_logprobs`.

    Raises:
        ModelError: `shared`, and the family can't share a prompt.
    """
    assert batch.packing is None
    run = _shared_rows if shared else _full_rows
    patches = partial(_patches, backbone)
    with patches(), checkpointed(backbone.model, patches) if grad_checkpoint else nullcontext():
        return run(backbone, batch)


def packed_hidden_states(
    backbone: Backbone, batch: GroupBatch, *, grad_checkpoint: bool = False
) -> tuple[mx.array, mx.array]:
    """Hidden states of a packed batch's two rows, (1, P, D) and (1, T, D), after each token.

    Raises:
        ModelError: The family can't be packed.
    """
    assert batch.packing is not None
    patches = partial(_packed_patches, backbone)
    with patches(), checkpointed(backbone.model, patches) if grad_checkpoint else nullcontext():
        caches = packed_prompt_caches(backbone.model, batch)
        prompts = backbone.hidden(batch.prompt_tokens, cache=caches)
        on_top = packed_completion_caches(batch, batch.packing, caches)
        return prompts, backbone.hidden(batch.packing.tokens[None], cache=on_top)


@contextmanager
def _patches(backbone: Backbone) -> Iterator[None]:
    if on_gpu():
        attention = partial(gpu_attention, fused=backbone.fused)
        patched = apply_gpu_patches(backbone.model, attention)
    else:
        patched = apply_patches(backbone.model, _attention)
    try:
        with patched:
            yield
    finally:
        CompletionKV.clear_last()


@contextmanager
def _packed_patches(backbone: Backbone) -> Iterator[None]:
    if on_gpu():
        patched = apply_gpu_patches(backbone.model, _packed_attention_on_gpu, packed=True)
    else:
        patched = apply_patches(backbone.model, _attention_of_packed_rows, packed=True)
    try:
        with patched:
            yield
    finally:
        PackedKV.clear_last()


def _attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float
) -> mx.array | None:
    out = _attention_to_prompts(queries, keys, values, scale)
    return blockwise_causal_attention(queries, keys, values, scale) if out is None else out


def _attention_to_prompts(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float
) -> mx.array | None:
    """Attention of completions to shared prompts. None for other rows.

    Raises:
        ModelError: The keys are not a cache's, so it is unknown which of them are padding.
    """
    if queries.shape[2] == keys.shape[2]:
        return None
    cache = CompletionKV.find_by_keys(keys)
    if cache.own is None or cache.keys is None or cache.values is None:
        raise ModelError(FOREIGN_KEYS)
    prompt = (cache.keys, cache.values)
    return shared_prompt_attention(queries, cache.own, prompt, cache.lengths, scale)


def _attention_of_packed_rows(
    queries: mx.array, keys: mx.array, _values: mx.array, scale: float
) -> mx.array | None:
    return PackedKV.find_by_keys(keys).attend(queries, scale)


def _packed_attention_on_gpu(
    queries: mx.array, keys: mx.array, _values: mx.array, scale: float, *_others: Any
) -> mx.array:
    return packed_gpu_attention(queries, keys, scale)


def _shared_rows(backbone: Backbone, batch: GroupBatch) -> mx.array:
    caches = prompt_caches(backbone.model, batch.prompt_lengths)
    prompt = backbone.hidden(batch.prompt_tokens, cache=caches)
    rows = batch.completion_tokens.shape[0]
    last = mx.take_along_axis(prompt, batch.prompt_lengths[:, None, None] - 1, axis=1)
    if batch.completion_tokens.shape[1] == 1:
        return batch.for_each_completion(last)  # the last token is predicted, never read
    completions = backbone.hidden(
        batch.completion_tokens[:, :-1],
        cache=[
            cache.completion_cache(rows, batch.prompt_lengths, backbone.mask_axes)
            for cache in caches
        ],
    )
    return mx.concatenate([batch.for_each_completion(last), completions], axis=1)


def _full_rows(backbone: Backbone, batch: GroupBatch) -> mx.array:
    rows, starts = full_rows(batch)
    length = batch.completion_tokens.shape[1]
    caches = prompt_caches(backbone.model, starts + length) if backbone.flat_caches else None
    hidden = backbone.hidden(rows, cache=caches)
    positions = starts[:, None] - 1 + mx.arange(length)[None]
    return mx.take_along_axis(hidden, positions[..., None], axis=1)


def full_rows(batch: GroupBatch) -> tuple[mx.array, mx.array]:
    """Put each completion into one row with its prompt, without padding in between.

    Returns:
        The rows (N, P + C), and the position (N,) at which each row's completion starts.
    """
    prompt_width = batch.prompt_tokens.shape[1]
    width = prompt_width + batch.completion_tokens.shape[1]
    prompts = batch.for_each_completion(batch.prompt_tokens)
    both = mx.concatenate([prompts, batch.completion_tokens], axis=1)
    starts = batch.for_each_completion(batch.prompt_lengths)
    position = mx.arange(width)[None]
    in_prompt = position < starts[:, None]
    source = mx.where(in_prompt, position, position - starts[:, None] + prompt_width)
    return mx.take_along_axis(both, mx.minimum(source, width - 1), axis=1), starts


# The vocabulary head


def _head(
    backbone: Backbone, hidden: mx.array, targets: mx.array, extra: Extra = "none"
) -> list[mx.array]:
    """Log-probs (…,) of `targets` (…,) and, if requested, `extra` (…,), in one pass."""
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])
    flat_targets = targets.reshape(-1)
    head = backbone.trainable_head()
    if head:
        outputs = _trainable_head(backbone, head, flat_hidden, flat_targets, extra)
    else:
        outputs = _frozen_head(backbone, flat_hidden, flat_targets, extra)
    return [output.reshape(targets.shape) for output in outputs]


def _frozen_head(
    backbone: Backbone, hidden: mx.array, targets: mx.array, extra: Extra
) -> Sequence[mx.array]:
    if not backbone.model.training:
        return _chunked(backbone, partial(_logps, extra), hidden, targets)

    # The first outputs are differentiable; their gradients come after all of the values.
    differentiable = 2 if extra == "entropy" else 1

    # Integer targets are closed over: a custom function's inputs all get gradients.
    @_custom_function
    def values_and_gradients(hidden: mx.array) -> tuple[mx.array, ...]:
        compute = partial(_logps_and_gradient, extra)
        return _chunked(backbone, compute, mx.stop_gradient(hidden), targets)

    @values_and_gradients.vjp
    def backward(
        _primals: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> mx.array:
        gradients = outputs[-differentiable:]
        weighted = [
            cotangent[:, None] * gradient.astype(mx.float32)
            for cotangent, gradient in zip(cotangents, gradients, strict=False)
        ]
        return sum(weighted[1:], weighted[0]).astype(gradients[0].dtype)

    return list(values_and_gradients(hidden))[:-differentiable]


def _trainable_head(
    backbone: Backbone,
    head: dict[str, Any],
    hidden: mx.array,
    targets: mx.array,
    extra: Extra,
) -> Sequence[mx.array]:
    """As `_frozen_head`, for a trained head: its parameters are inputs, and backward recomputes."""

    @_custom_function
    def values(hidden: mx.array, head: dict[str, Any]) -> tuple[mx.array, ...]:
        with use_adapter(backbone.owner, head):
            return _chunked(backbone, partial(_logps, extra), hidden, targets)

    differentiable: Extra = "entropy" if extra == "entropy" else "none"

    @values.vjp
    def backward(
        primals: tuple[mx.array, dict[str, Any]],
        cotangents: tuple[mx.array, ...],
        _outputs: tuple[mx.array, ...],
    ) -> tuple[mx.array, dict[str, Any]]:
        hidden, head = primals
        head_gradient = tree_map(mx.zeros_like, head)
        hidden_gradients: list[mx.array] = []
        for rows in _chunks(backbone, hidden):

            def weighted(h: mx.array, head: dict[str, Any], rows: slice = rows) -> mx.array:
                with use_adapter(backbone.owner, head):
                    outputs = _logps(differentiable, backbone, h, targets[rows])
                parts = [
                    (output * cotangent[rows]).sum()
                    for output, cotangent in zip(outputs, cotangents, strict=False)
                ]
                return sum(parts[1:], parts[0])

            part = hidden[rows]
            if hidden_gradients:
                part = mx.depends([part], [hidden_gradients[-1]])[0]
            grad_hidden, grad_head = mx.grad(weighted, argnums=(0, 1))(part, head)
            hidden_gradients.append(grad_hidden)
            head_gradient = tree_map(mx.add, head_gradient, grad_head)
        return mx.concatenate(hidden_gradients), head_gradient

    return list(values(hidden, head))


def _logps(
    extra: Extra, backbone: Backbone, hidden: mx.array, targets: mx.array
) -> tuple[mx.array, ...]:
    """Log-probs (n,) of one chunk and, if requested, log Σ_v p_v² or the entropy (n,)."""
    logits = backbone.logits(hidden).astype(mx.float32)
    target = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    normaliser = logsumexp(logits)
    logps = target - normaliser
    if extra == "none":
        return (logps,)
    if extra == "log_squares":
        return logps, logsumexp(2 * logits) - 2 * normaliser
    top = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    centred = mx.maximum(logits - top, MIN_LOG_RATIO)
    exponential = exp(centred)
    total = exponential.sum(axis=-1)
    return logps, mx.log(total) - (exponential * centred).sum(axis=-1) / total


def _logps_and_gradient(
    extra: Extra, backbone: Backbone, hidden: mx.array, targets: mx.array
) -> tuple[mx.array, ...]:
    """As `_logps`, followed by gradients with respect to the hidden states (n, D).

    One exponential serves them all. The gradients are those of the log-probs and, last, of the
    entropy if that has one: ∂H/∂logit = −p(log p + H).
    """
    raw = backbone.logits(hidden)
    top = raw.max(axis=-1, keepdims=True).astype(mx.float32)
    target = mx.take_along_axis(raw, targets[:, None], axis=-1).astype(mx.float32)
    centred = None
    if extra in ("entropy", "entropy_value"):
        centred = mx.maximum(raw.astype(mx.float32) - top, MIN_LOG_RATIO)
        exponential = exp(centred)
    else:
        # All other operations that read the logits run before the exponential, so that it can
        # reuse their memory.
        (raw,) = mx.depends([raw], [top, target])
        exponential = exp(raw.astype(mx.float32) - top)
    total = exponential.sum(axis=-1, keepdims=True)
    logps = (target - top - mx.log(total))[:, 0]
    is_target = mx.arange(raw.shape[-1])[None] == targets[:, None]

    def hidden_gradient(logits_gradient: mx.array) -> mx.array:
        return mx.vjp(backbone.logits, [hidden], [logits_gradient.astype(raw.dtype)])[1][0]

    gradient = hidden_gradient(is_target - exponential / total)
    if extra == "log_squares":
        squares = mx.log(mx.square(exponential).sum(axis=-1)) - 2 * mx.log(total[:, 0])
        return logps, squares, gradient
    if centred is None:
        return logps, gradient
    mean = (exponential * centred).sum(axis=-1, keepdims=True) / total
    entropy = (mx.log(total) - mean)[:, 0]
    if extra == "entropy_value":
        return logps, entropy, gradient
    # One product with the vocabulary's weights after the other.
    centred, total = mx.depends([centred, total], [gradient])
    return logps, entropy, gradient, hidden_gradient(exponential / total * (mean - centred))


def _chunked(
    backbone: Backbone,
    compute: Callable[[Backbone, mx.array, mx.array], tuple[mx.array, ...]],
    hidden: mx.array,
    targets: mx.array,
) -> tuple[mx.array, ...]:
    """Apply `compute` to chunks of rows, one after the other, and concatenate its outputs."""
    parts: list[tuple[mx.array, ...]] = []
    for rows in _chunks(backbone, hidden):
        part = hidden[rows]
        if parts:
            # Otherwise mlx may evaluate several chunks, and keep their logits, at the same time.
            part = mx.depends([part], list(parts[-1]))[0]
        parts.append(compute(backbone, part, targets[rows]))
    return tuple(mx.concatenate(list(column)) for column in zip(*parts, strict=True))


def _chunks(backbone: Backbone, hidden: mx.array) -> list[slice]:
    vocabulary = backbone.logits(hidden[:1]).shape[-1]  # a shape: nothing is computed
    rows = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, start + rows) for start in range(0, hidden.shape[0], rows)]
