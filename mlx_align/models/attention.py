"""Attention of completions that share a prompt, and of prompts, with no score computed in vain.

mlx's own attention is not fused where a gradient is needed: it makes and keeps every score of a
square of which a causal mask hides half, and it needs the shared prompt's keys and values copied
for each completion. Here queries attend to *segments* of keys: completions to their prompt's, once
for all of them, and to their own; a stretch of a prompt to all before it, without a mask, and to
itself. The softmax runs over all segments together; its gradient is written out, and keeps nothing
but the exponentials and what goes in and out.

Shape letters: B prompts, K completions of each (1 while prompts run), G heads of keys and values,
R query heads to each of them, L queries, T keys, E size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_align.models.exponential import exp

# Stretches that a prompt is cut into, and the fewest queries in one: 8 leave 56% of the square,
# and matrices much smaller than 64 rows are slow to multiply.
STRETCHES = 8
SHORTEST_STRETCH = 64

_custom_function: Any = mx.custom_function  # the stubs lose the signature of what it wraps


class Segment(NamedTuple):
    """Keys that queries attend to, and which of them.

    Keys and values of one prompt, (B, G, T, E), serve the queries of all its completions; those of
    a completion, (B, G, K, T, E), its own. `mask` (bool, false hides) broadcasts to
    (B, G, K, R, L, T); None hides nothing.
    """

    keys: mx.array
    values: mx.array
    mask: mx.array | None


def attend(queries: mx.array, segments: Sequence[Segment], scale: float) -> mx.array:
    """Softmax attention (B, G, K, R, L, E) of `queries`, of that shape, over all segments' keys.

    Every query must see at least one key.
    """
    masks = [segment.mask for segment in segments]  # closed over: inputs all get gradients

    @_custom_function
    def attention(queries: mx.array, *pairs: mx.array) -> tuple[mx.array, ...]:
        scores = []
        for keys, mask in zip(pairs[0::2], masks, strict=True):
            score = _times(queries * scale, keys.swapaxes(-1, -2)).astype(mx.float32)
            scores.append(score if mask is None else mx.where(mask, score, -mx.inf))
        top = scores[0].max(axis=-1, keepdims=True)
        for score in scores[1:]:
            top = mx.maximum(top, score.max(axis=-1, keepdims=True))
        exponentials = [exp(score - top) for score in scores]
        total = sum(exponential.sum(axis=-1, keepdims=True) for exponential in exponentials)
        kept = [exponential.astype(queries.dtype) for exponential in exponentials]
        out = sum(_times(e, values) for e, values in zip(kept, pairs[1::2], strict=True))
        inverse = 1 / mx.array(total)
        return ((out * inverse).astype(queries.dtype), inverse, *kept)

    @attention.vjp
    def backward(
        primals: tuple[mx.array, ...],
        cotangents: tuple[mx.array, ...],
        outputs: tuple[mx.array, ...],
    ) -> tuple[mx.array, ...]:
        queries, *pairs = primals
        _out, inverse, *kept = outputs
        by_out = (cotangents[0] * inverse).astype(queries.dtype)
        by_exponentials = [_times(by_out, values.swapaxes(-1, -2)) for values in pairs[1::2]]
        # Σ_t p_t·∂p_t of the softmax. As a product of `out` and its cotangent (FlashAttention) it
        # would be one pass over the scores less, no faster where measured, and gradients by
        # queries and keys a quarter less exact.
        mean = inverse * sum(
            (exponential * by_exponential).sum(axis=-1, keepdims=True).astype(mx.float32)
            for exponential, by_exponential in zip(kept, by_exponentials, strict=True)
        )
        by_queries: Any = 0
        by_pairs: list[mx.array] = []
        for exponential, by_exponential, keys, values in zip(
            kept, by_exponentials, pairs[0::2], pairs[1::2], strict=True
        ):
            by_score = (exponential * (by_exponential - mean)).astype(queries.dtype)
            by_queries = by_queries + _times(by_score, keys)
            by_pairs.append(_times_transposed(by_score, queries * scale, like=keys))
            by_pairs.append(_times_transposed(exponential, by_out, like=values))
        return (by_queries * scale, *by_pairs)

    pairs = [array for segment in segments for array in (segment.keys, segment.values)]
    return attention(queries, *pairs)[0]


def _times(rows: mx.array, matrix: mx.array) -> mx.array:
    """`rows` (B, G, K, R, L, x) @ `matrix` (B, G, [K,] x, y), in few and tall products."""
    folded = rows.reshape(*matrix.shape[:-2], -1, rows.shape[-1])
    return (folded @ matrix).reshape(*rows.shape[:-1], matrix.shape[-1])


def _times_transposed(left: mx.array, right: mx.array, like: mx.array) -> mx.array:
    """leftᵀ @ right, in the shape of `like` (B, G, [K,] T, E): summed over all rows they share."""
    batch = like.shape[:-2]
    left = left.reshape(*batch, -1, left.shape[-1])
    return left.swapaxes(-1, -2) @ right.reshape(*batch, -1, right.shape[-1])


def stretch_of(length: int) -> int:
    """Queries in a stretch of a prompt of `length` tokens."""
    return max(SHORTEST_STRETCH, -(-length // STRETCHES))


def causal_share(length: int) -> float:
    """Share of the square of `length` tokens whose scores are made."""
    stretch = stretch_of(length)
    ends = [min(start + stretch, length) for start in range(0, length, stretch)]
    return sum(end * (end - i * stretch) for i, end in enumerate(ends)) / length**2


def attend_within(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
    """Causal attention (rows, heads, L, E) of rows to themselves, stretch after stretch."""
    rows, heads, length, size = queries.shape
    groups = keys.shape[1]
    split = queries.reshape(rows, groups, 1, heads // groups, length, size)
    stretch = stretch_of(length)
    parts = []
    for start in range(0, length, stretch):
        end = min(start + stretch, length)
        position = mx.arange(end - start)
        own = Segment(
            keys[:, :, start:end], values[:, :, start:end], position[:, None] >= position[None]
        )
        past = [Segment(keys[:, :, :start], values[:, :, :start], None)] if start else []
        parts.append(attend(split[..., start:end, :], [*past, own], scale))
    return mx.concatenate(parts, axis=-2).reshape(queries.shape[:-1] + values.shape[-1:])


def attend_to_prompt(
    queries: mx.array,
    own: tuple[mx.array, mx.array],
    prompt: tuple[mx.array, mx.array],
    prompt_lengths: mx.array,
    scale: float,
) -> mx.array:
    """Attention (N, heads, L, E) of N completions to their prompts and, causally, to themselves.

    Args:
        queries: (N, heads, L, E), the K = N / B completions of a prompt side by side.
        own: Keys and values of the completions, (N, G, L, E).
        prompt: Keys and values of the prompts, (B, G, P, E).
        prompt_lengths: (B,); what stands after them is padding.
        scale: Of the scores.
    """
    rows, heads, length, _ = queries.shape
    prompts, groups, width, _ = prompt[0].shape
    each = rows // prompts

    def by_prompt(array: mx.array, *shape: int) -> mx.array:
        split = array.reshape(prompts, each, groups, *shape, *array.shape[-2:])
        return mx.moveaxis(split, 1, 2)

    inside = mx.arange(width) < prompt_lengths[:, None]
    position = mx.arange(length)
    out = attend(
        by_prompt(queries, heads // groups),
        [
            Segment(*prompt, inside[:, None, None, None, None]),
            Segment(by_prompt(own[0]), by_prompt(own[1]), position[:, None] >= position[None]),
        ],
        scale,
    )
    return mx.moveaxis(out, 2, 1).reshape(rows, heads, length, out.shape[-1])


def attend_among(
    queries: mx.array,
    own: tuple[mx.array, mx.array],
    member: mx.array,
    scale: float,
    prompt: tuple[mx.array, mx.array, mx.array] | None = None,
    longest: int | None = None,
) -> mx.array:
    """Attention (1, heads, L, E) of a packed row: each token to its prompt and its member's past.

    Args:
        queries: (1, heads, L, E).
        own: The row's keys and values, (1, G, L, E).
        member: (L,), which tokens belong together; a member's stand side by side.
        scale: Of the scores.
        prompt: Keys and values (1, G, P, E) of another row, and who sees which, (L, P) bool.
        longest: The most tokens of a member.
    """
    _, heads, length, size = queries.shape
    groups = own[0].shape[1]
    split = queries.reshape(1, groups, 1, heads // groups, length, size)
    stretch = max(SHORTEST_STRETCH, -(-length // STRETCHES))
    position = mx.arange(length)
    parts = []
    for start in range(0, length, stretch):
        end = min(start + stretch, length)
        first = 0 if longest is None else max(0, start + 1 - longest)
        rows, past = slice(start, end), slice(first, end)
        near = member[rows, None] == member[None, past]
        mask = near & (position[rows, None] >= position[None, past])
        segments = [Segment(own[0][:, :, past], own[1][:, :, past], mask)]
        if prompt is not None:
            segments.append(Segment(prompt[0], prompt[1], prompt[2][rows]))
        parts.append(attend(split[..., rows, :], segments, scale))
    return mx.concatenate(parts, axis=-2).reshape(queries.shape[:-1] + own[1].shape[-1:])


# (queries, keys, values, scale) -> attention, or None where mlx must compute it.
Attention = Callable[[mx.array, mx.array, mx.array, float], mx.array | None]


@contextmanager
def causal_attention(ours: Attention) -> Iterator[None]:
    """Within the block, `ours` serves the models' calls of mlx's attention with a causal mask.

    All others (a mask that is an array, attention sinks) go to mlx.
    """
    theirs = mx.fast.scaled_dot_product_attention

    def attention(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **others: Any
    ) -> mx.array:
        if isinstance(mask, str) and all(value is None for value in others.values()):
            out = ours(q, k, v, scale)
            if out is not None:
                return out
        return theirs(q, k, v, scale=scale, mask=mask, **others)

    with _in_place_of_mlxs(attention):
        yield


@contextmanager
def float32_attention() -> Iterator[None]:
    """Within the block, mlx's attention computes in float32, whatever it is given."""
    theirs = mx.fast.scaled_dot_product_attention

    def attention(q: mx.array, k: mx.array, v: mx.array, **others: Any) -> mx.array:
        wide = (array.astype(mx.float32) for array in (q, k, v))
        return theirs(*wide, **others).astype(q.dtype)

    with _in_place_of_mlxs(attention):
        yield


@contextmanager
def _in_place_of_mlxs(attention: Any) -> Iterator[None]:
    theirs = mx.fast.scaled_dot_product_attention
    mx.fast.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = theirs
