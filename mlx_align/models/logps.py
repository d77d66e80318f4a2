"""Per-token log-probabilities through a vocabulary head that is never held whole.

Hidden states are taken in chunks: logits, log-sum-exp and the target's logit of one chunk, then
the next. With a frozen head, the gradient of a token's log-prob by its own hidden state,
∂logit_target/∂h − Σ_v softmax_v·∂logit_v/∂h, does not depend on the loss: it is computed in the
same pass, kept as (N, C, D), and scaled by the cotangent in the backward pass, so the vocabulary
is passed once, not twice. The entropy of the distribution a token was drawn from has such a
gradient too. Log-softmax is float32 whatever the model's dtype: in bf16 a token's log-prob is off
by up to 0.1 nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import mlx.core as mx
from mlx.utils import tree_map

from mlx_align.models.compat import Anatomy
from mlx_align.models.exponential import exp, logsumexp
from mlx_align.models.packed import predicting_states
from mlx_align.models.roles import acting_as
from mlx_align.models.trunk import completion_hidden, packed_hidden
from mlx_align.types import GroupBatch

# Logits held at a time, in elements: 8 MB of float32, some four times over with exponential and
# gradient. Two pairs of 256 + 2×128 tokens, 34M parameters, vocabulary 32,000, float32: a peak of
# .489 GB against .594 with eight times as many, for about 6% more time; checkpointed .264
# against .381.
CHUNK_ELEMENTS = 1 << 21
# Rows a chunk has at least: with fewer, a large vocabulary's weights are read for too little work.
# At width 896 and 152,000 words a step then peaks 191 MB (float) and 229 MB (4-bit) above one at
# 8,000; with 64 rows about 400.
MIN_CHUNK_ROWS = 32

# Entropies take p·log p of every word as 0 below e^−100: so does float32, and −∞·0 would be NaN.
MIN_LOG_RATIO = -100.0

# What the pass over the vocabulary gives beside log-probs; entropies with or without gradient.
Extra = Literal["none", "log_squares", "entropy", "entropy_value"]

_custom_function: Any = mx.custom_function  # the stubs lose the signature of what it wraps


def batch_token_logps(
    anatomy: Anatomy, batch: GroupBatch, *, shared: bool = True, grad_checkpoint: bool = False
) -> mx.array:
    """Log-prob (N, C) float32, nats, of every completion token; 0 where the mask is false."""
    hidden, targets = _predicting(anatomy, batch, shared, grad_checkpoint)
    return _laid_out(batch, token_logps(anatomy, hidden, targets))


def batch_token_statistics(
    anatomy: Anatomy, batch: GroupBatch, *, shared: bool = True, grad_checkpoint: bool = False
) -> tuple[mx.array, mx.array]:
    """Log-probs as above, and log Σ_v p_v² of the distribution at every completion token.

    The second (N, C) float32, nats, has no gradient; both come from one pass over the vocabulary
    and are 0 where the mask is false.
    """
    hidden, targets = _predicting(anatomy, batch, shared, grad_checkpoint)
    logps, squares = _head(anatomy, hidden, targets, "log_squares")
    return _laid_out(batch, logps), mx.stop_gradient(_laid_out(batch, squares))


def batch_token_entropies(
    anatomy: Anatomy,
    batch: GroupBatch,
    *,
    shared: bool = True,
    grad_checkpoint: bool = False,
    entropy_gradient: bool = True,
) -> tuple[mx.array, mx.array]:
    """Log-probs as above, and the Shannon entropy −Σ_v p_v·log p_v at every completion token.

    Both (N, C) float32, nats, at the anatomy's temperature, from one pass over the vocabulary, and
    0 where the mask is false. The entropy has a gradient unless `entropy_gradient` says no, which
    spares a second (N, C, D) and a product with the vocabulary's weights.
    """
    hidden, targets = _predicting(anatomy, batch, shared, grad_checkpoint)
    extra: Extra = "entropy" if entropy_gradient else "entropy_value"
    logps, entropies = _head(anatomy, hidden, targets, extra)
    if not entropy_gradient:
        entropies = mx.stop_gradient(entropies)
    return _laid_out(batch, logps), _laid_out(batch, entropies)


def _predicting(
    anatomy: Anatomy, batch: GroupBatch, shared: bool, grad_checkpoint: bool
) -> tuple[mx.array, mx.array]:
    """Hidden states (…, D) and the tokens (…,) they predict: (N, C), of a packed batch (T,)."""
    packing = batch.packing
    if packing is None:
        hidden = completion_hidden(anatomy, batch, shared=shared, grad_checkpoint=grad_checkpoint)
        return hidden, batch.completion_tokens
    rows = packed_hidden(anatomy, batch, grad_checkpoint=grad_checkpoint)
    return predicting_states(batch, packing, *rows), packing.tokens


def _laid_out(batch: GroupBatch, values: mx.array) -> mx.array:
    """Values of the tokens that `_predicting` gave, as (N, C); 0 where the mask is false."""
    if batch.packing is not None:
        values = values[batch.packing.place]
    return mx.where(batch.completion_mask, values, 0)


def token_logps(anatomy: Anatomy, hidden: mx.array, targets: mx.array) -> mx.array:
    """Log-prob (…,) float32, nats, of `targets` (…,) predicted by `hidden` (…, D)."""
    return _head(anatomy, hidden, targets)[0]


def _head(
    anatomy: Anatomy, hidden: mx.array, targets: mx.array, extra: Extra = "none"
) -> list[mx.array]:
    """Log-probs (…,) of `targets`, and what else is asked (…,), from the same pass."""
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])
    flat_targets = targets.reshape(-1)
    head = anatomy.trainable_head()
    if head:
        outputs = _trainable_head(anatomy, head, flat_hidden, flat_targets, extra)
    else:
        outputs = _frozen_head(anatomy, flat_hidden, flat_targets, extra)
    return [output.reshape(targets.shape) for output in outputs]


def _frozen_head(
    anatomy: Anatomy, hidden: mx.array, targets: mx.array, extra: Extra
) -> Sequence[mx.array]:
    if not anatomy.model.training:
        return _chunked(anatomy, partial(_logps, extra), hidden, targets)

    # Of the outputs the first have gradients, which follow all of them.
    learning = 2 if extra == "entropy" else 1

    # Integer targets are closed over: a custom function's inputs all get gradients.
    @_custom_function
    def values_and_gradients(hidden: mx.array) -> tuple[mx.array, ...]:
        compute = partial(_logps_and_gradient, extra)
        return _chunked(anatomy, compute, mx.stop_gradient(hidden), targets)

    @values_and_gradients.vjp
    def backward(
        _primals: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> mx.array:
        gradients = outputs[-learning:]
        weighed = [
            cotangent[:, None] * gradient.astype(mx.float32)
            for cotangent, gradient in zip(cotangents, gradients, strict=False)
        ]
        return sum(weighed[1:], weighed[0]).astype(gradients[0].dtype)

    return list(values_and_gradients(hidden))[:-learning]


def _trainable_head(
    anatomy: Anatomy,
    head: dict[str, Any],
    hidden: mx.array,
    targets: mx.array,
    extra: Extra,
) -> Sequence[mx.array]:
    """As above where the head learns too: its parameters are inputs, the backward recomputes."""

    @_custom_function
    def values(hidden: mx.array, head: dict[str, Any]) -> tuple[mx.array, ...]:
        with acting_as(anatomy.owner, head):
            return _chunked(anatomy, partial(_logps, extra), hidden, targets)

    learns: Extra = "entropy" if extra == "entropy" else "none"

    @values.vjp
    def backward(
        primals: tuple[mx.array, dict[str, Any]],
        cotangents: tuple[mx.array, ...],
        _outputs: tuple[mx.array, ...],
    ) -> tuple[mx.array, dict[str, Any]]:
        hidden, head = primals
        by_head = tree_map(mx.zeros_like, head)
        by_hidden: list[mx.array] = []
        for rows in _chunks(anatomy, hidden):

            def weighted(h: mx.array, head: dict[str, Any], rows: slice = rows) -> mx.array:
                with acting_as(anatomy.owner, head):
                    outputs = _logps(learns, anatomy, h, targets[rows])
                parts = [
                    (output * cotangent[rows]).sum()
                    for output, cotangent in zip(outputs, cotangents, strict=False)
                ]
                return sum(parts[1:], parts[0])

            part = hidden[rows]
            if by_hidden:
                part = mx.depends([part], [by_hidden[-1]])[0]
            grad_hidden, grad_head = mx.grad(weighted, argnums=(0, 1))(part, head)
            by_hidden.append(grad_hidden)
            by_head = tree_map(mx.add, by_head, grad_head)
        return mx.concatenate(by_hidden), by_head

    return list(values(hidden, head))


def _logps(
    extra: Extra, anatomy: Anatomy, hidden: mx.array, targets: mx.array
) -> tuple[mx.array, ...]:
    """Log-probs (n,) of one chunk and, if asked, log Σ_v p_v² or the entropy (n,)."""
    logits = anatomy.logits(hidden).astype(mx.float32)
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
    extra: Extra, anatomy: Anatomy, hidden: mx.array, targets: mx.array
) -> tuple[mx.array, ...]:
    """Log-probs (n,), what else is asked (n,), and gradients by the hidden states (n, D).

    One exponential serves them all. The gradients are those of the log-probs and, last, of the
    entropy if that has one: ∂H/∂logit = −p(log p + H).
    """
    raw = anatomy.logits(hidden)
    top = raw.max(axis=-1, keepdims=True).astype(mx.float32)
    target = mx.take_along_axis(raw, targets[:, None], axis=-1).astype(mx.float32)
    centred = None
    if extra in ("entropy", "entropy_value"):
        centred = mx.maximum(raw.astype(mx.float32) - top, MIN_LOG_RATIO)
        exponential = exp(centred)
    else:
        # All that reads the logits, but the exponential, comes before it, which can then take
        # their memory for its own; and what is made of it likewise.
        (raw,) = mx.depends([raw], [top, target])
        exponential = exp(raw.astype(mx.float32) - top)
    total = exponential.sum(axis=-1, keepdims=True)
    logps = (target - top - mx.log(total))[:, 0]
    is_target = mx.arange(raw.shape[-1])[None] == targets[:, None]

    def by_hidden(by_logits: mx.array) -> mx.array:
        return mx.vjp(anatomy.logits, [hidden], [by_logits.astype(raw.dtype)])[1][0]

    gradient = by_hidden(is_target - exponential / total)
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
    by_logits = exponential / total * (mean - centred)
    return logps, entropy, gradient, by_hidden(by_logits)


def _chunked(
    anatomy: Anatomy,
    compute: Callable[[Anatomy, mx.array, mx.array], tuple[mx.array, ...]],
    hidden: mx.array,
    targets: mx.array,
) -> tuple[mx.array, ...]:
    """`compute` over chunks of rows, one after the other, its outputs joined."""
    parts: list[tuple[mx.array, ...]] = []
    for rows in _chunks(anatomy, hidden):
        part = hidden[rows]
        if parts:
            # Without this several chunks may be evaluated, and their logits held, at once.
            part = mx.depends([part], list(parts[-1]))[0]
        parts.append(compute(anatomy, part, targets[rows]))
    return tuple(mx.concatenate(list(column)) for column in zip(*parts, strict=True))


def _chunks(anatomy: Anatomy, hidden: mx.array) -> list[slice]:
    vocabulary = anatomy.logits(hidden[:1]).shape[-1]  # a shape: nothing is computed
    rows = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, start + rows) for start in range(0, hidden.shape[0], rows)]
