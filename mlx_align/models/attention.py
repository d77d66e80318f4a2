"""Causal attention that computes and keeps fewer scores than mlx's own, on a CPU.

On a GPU, `gpu_attention.py` is used. On a CPU, mlx computes and keeps the whole score matrix where
a gradient is needed, half of which a causal mask hides, and needs the keys and values of a shared
prompt copied for each completion. Here queries attend to *segments* of keys: completions to those
of their prompt, stored once, and to their own; a block of a prompt's queries to all keys before it,
without a mask, and to itself. The softmax runs over all segments together. Its backward pass is
written by hand and keeps only the exponentials, the inputs and the output.

`patches.replace_attention` puts these functions in the place of mlx's.

Shape letters: B prompts, K completions of each (1 while prompts run), N = B·K rows, G heads of keys
and values, R query heads for each of them, L queries, T keys, E size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_align.models.patches import exp

# Number of blocks that the queries of a row are split into, and the fewest queries in one. With 8
# blocks, 56% of the score matrix is computed; matrices with far fewer than 64 rows multiply slowly.
QUERY_BLOCKS = 8
MIN_BLOCK_LENGTH = 64

_custom_function: Any = mx.custom_function  # the stubs lose the signature of what it wraps


class Segment(NamedTuple):
    """Keys and values that queries attend to, and a mask.

    Keys and values of a prompt, (B, G, T, E), are shared by the queries of all its completions;
    those of completions have a row for each, (B, G, K, T, E). `mask` (bool, false hides) broadcasts
    to (B, G, K, R, L, T); None hides nothing.
    """

    keys: mx.array
    values: mx.array
    mask: mx.array | None


def segment_attention(queries: mx.array, segments: Sequence[Segment], scale: float) -> mx.array:
    """Softmax attention of `queries` (B, G, K, R, L, E) over the keys of all segments.

    Every query must see at least one key.

    Returns:
        The outputs (B, G, K, R, L, E), in the dtype of `queries`.
    """
    masks = [segment.mask for segment in segments]  # closed over: inputs all get gradients

    @_custom_function
    def attention(queries: mx.array, *pairs: mx.array) -> tuple[mx.array, ...]:
        scores = []
        for keys, mask in zip(pairs[0::2], masks, strict=True):
            score = matmul(queries * scale, keys.swapaxes(-1, -2)).astype(mx.float32)
            scores.append(score if mask is None else mx.where(mask, score, -mx.inf))
        maximum = scores[0].max(axis=-1, keepdims=True)
        for score in scores[1:]:
            maximum = mx.maximum(maximum, score.max(axis=-1, keepdims=True))
        exponentials = [exp(score - maximum) for score in scores]
        total = sum(exponential.sum(axis=-1, keepdims=True) for exponential in exponentials)
        kept = [exponential.astype(queries.dtype) for exponential in exponentials]
        out = sum(matmul(e, values) for e, values in zip(kept, pairs[1::2], strict=True))
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
        grad_out = (cotangents[0] * inverse).astype(queries.dtype)
        grad_exponentials = [matmul(grad_out, values.swapaxes(-1, -2)) for values in pairs[1::2]]
        # Σ_t p_t·∂p_t of the softmax. FlashAttention computes it as the product of the output and
        # its cotangent, which saves a pass over the scores. That was no faster where measured, and
        # the gradients of queries and keys were a quarter less exact.
        mean = inverse * sum(
            (exponential * grad_exponential).sum(axis=-1, keepdims=True).astype(mx.float32)
            for exponential, grad_exponential in zip(kept, grad_exponentials, strict=True)
        )
        grad_queries: Any = 0
        grad_pairs: list[mx.array] = []
        for exponential, grad_exponential, keys, values in zip(
            kept, grad_exponentials, pairs[0::2], pairs[1::2], strict=True
        ):
            grad_score = (exponential * (grad_exponential - mean)).astype(queries.dtype)
            grad_queries = grad_queries + matmul(grad_score, keys)
            grad_pairs.append(transposed_matmul(grad_score, queries * scale, like=keys))
            grad_pairs.append(transposed_matmul(exponential, grad_out, like=values))
        return (grad_queries * scale, *grad_pairs)

    pairs = [array for segment in segments for array in (segment.keys, segment.values)]
    return attention(queries, *pairs)[0]


def matmul(rows: mx.array, matrix: mx.array) -> mx.array:
    """`rows` (B, G, K, R, L, x) @ `matrix` (B, G, [K,] x, y), folded into few and tall products."""
    folded = rows.reshape(*matrix.shape[:-2], -1, rows.shape[-1])
    return (folded @ matrix).reshape(*rows.shape[:-1], matrix.shape[-1])


def transposed_matmul(left: mx.array, right: mx.array, like: mx.array) -> mx.array:
    """leftᵀ @ right in the shape of `like` (B, G, [K,] T, E), summed over rows that share it."""
    batch = like.shape[:-2]
    left = left.reshape(*batch, -1, left.shape[-1])
    return left.swapaxes(-1, -2) @ right.reshape(*batch, -1, right.shape[-1])


def query_block_length(length: int) -> int:
    """Number of queries in a block of a row of `length` tokens."""
    return max(MIN_BLOCK_LENGTH, -(-length // QUERY_BLOCKS))


def causal_fraction(length: int) -> float:
    """Fraction of a row's length × length score matrix that is computed."""
    block = query_block_length(length)
    ends = [min(start + block, length) for start in range(0, length, block)]
    return sum(end * (end - i * block) for i, end in enumerate(ends)) / length**2


def blockwise_causal_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float
) -> mx.array:
    """Causal self-attention, one block of queries after the other.

    Args:
        queries: (N, G·R, L, E).
        keys: (N, G, L, E).
        values: (N, G, L, E).
        scale: Factor on the scores.

    Returns:
        (N, G·R, L, E).
    """
    rows, heads, length, size = queries.shape
    groups = keys.shape[1]
    split = queries.reshape(rows, groups, 1, heads // groups, length, size)
    block = query_block_length(length)
    parts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        position = mx.arange(end - start)
        own = Segment(
            keys[:, :, start:end], values[:, :, start:end], position[:, None] >= position[None]
        )
        past = [Segment(keys[:, :, :start], values[:, :, :start], None)] if start else []
        parts.append(segment_attention(split[..., start:end, :], [*past, own], scale))
    return mx.concatenate(parts, axis=-2).reshape(queries.shape[:-1] + values.shape[-1:])


def shared_prompt_attention(
    queries: mx.array,
    own: tuple[mx.array, mx.array],
    prompt: tuple[mx.array, mx.array],
    prompt_lengths: mx.array,
    scale: float,
) -> mx.array:
    """Attention of completions to their prompt, whose keys are stored once, and to themselves.

    Args:
        queries: (N, G·R, L, E), the K = N / B completions of a prompt next to each other.
        own: Keys and values of the completions, (N, G, L, E) each.
        prompt: Keys and values of the prompts, (B, G, P, E) each.
        prompt_lengths: (B,); positions of a prompt from its length on are padding.
        scale: Factor on the scores.

    Returns:
        (N, G·R, L, E).
    """
    rows, heads, length, _ = queries.shape
    prompts, groups, width, _ = prompt[0].shape
    per_prompt = rows // prompts

    def group_by_prompt(array: mx.array, *shape: int) -> mx.array:
        split = array.reshape(prompts, per_prompt, groups, *shape, *array.shape[-2:])
        return mx.moveaxis(split, 1, 2)

    inside = mx.arange(width) < prompt_lengths[:, None]
    position = mx.arange(length)
    out = segment_attention(
        group_by_prompt(queries, heads // groups),
        [
            Segment(*prompt, inside[:, None, None, None, None]),
            Segment(
                group_by_prompt(own[0]),
                group_by_prompt(own[1]),
                position[:, None] >= position[None],
            ),
        ],
        scale,
    )
    return mx.moveaxis(out, 2, 1).reshape(rows, heads, length, out.shape[-1])


def packed_attention(
    queries: mx.array,
    own: tuple[mx.array, mx.array],
    sequence: mx.array,
    scale: float,
    prompt: tuple[mx.array, mx.array, mx.array] | None = None,
    longest: int | None = None,
) -> mx.array:
    """Attention of a packed row: each token sees its prompt and the past of its sequence.

    Args:
        queries: (1, G·R, L, E).
        own: The row's keys and values, (1, G, L, E) each.
        sequence: (L,) index of the sequence of each token; a sequence's tokens are contiguous.
        scale: Factor on the scores.
        prompt: Keys and values (1, G, P, E) of the row of prompts, and the mask (L, P).
        longest: Number of tokens of the longest sequence, if known.

    Returns:
        (1, G·R, L, E).
    """
    _, heads, length, size = queries.shape
    groups = own[0].shape[1]
    split = queries.reshape(1, groups, 1, heads // groups, length, size)
    block = query_block_length(length)
    position = mx.arange(length)
    parts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        first = 0 if longest is None else max(0, start + 1 - longest)
        rows, past = slice(start, end), slice(first, end)
        same = sequence[rows, None] == sequence[None, past]
        mask = same & (position[rows, None] >= position[None, past])
        segments = [Segment(own[0][:, :, past], own[1][:, :, past], mask)]
        if prompt is not None:
            segments.append(Segment(prompt[0], prompt[1], prompt[2][rows]))
        parts.append(segment_attention(split[..., rows, :], segments, scale))
    return mx.concatenate(parts, axis=-2).reshape(queries.shape[:-1] + own[1].shape[-1:])
