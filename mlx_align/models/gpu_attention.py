"""Attention on a GPU: no array with a score per query and key, with or without a gradient.

Two ways, both with memory that grows with the length, not with its square:

- mlx's own kernel (`mx.fast.scaled_dot_product_attention` with the mask "causal"), where mlx has a
  backward pass for it: since 0.32.4 on Metal, on CUDA in 16 bits. Rows of a prompt are passed as
  they are. A completion is placed behind its prompt without padding in between, which leaves
  nothing to hide but the future.
- blocks of queries (`attention_in_blocks`) for everything else: sliding windows, attention sinks,
  masks as arrays, packed rows, other sizes of heads. The backward pass computes the scores again.

`attention.py` computes the same on a CPU, where it is faster and where the tests compare the two.

Shape letters as in `attention.py`: B prompts, K completions of each, N = B·K rows, G heads of keys
and values, R query heads for each of them, L queries, T keys, E size of a head.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_align.errors import ModelError
from mlx_align.models.attention import matmul, transposed_matmul
from mlx_align.models.patches import exp
from mlx_align.models.prefix_cache import FOREIGN_KEYS, CompletionKV, PackedKV

# With 8 queries or fewer, mlx 0.32.4 chooses its kernel for decoding on Metal, and then fails
# because that has no backward pass.
FEWEST_QUERIES = 9
# Sizes of heads that mlx 0.32.4 has kernels for on Metal.
KERNEL_HEAD_SIZES = (64, 72, 80, 96, 128, 192, 256)
# Fused attention of completions also computes scores for queries of their prompt, which are not
# used: (P + L)² / 2 instead of L·(P + L). Beyond this ratio of P to L, blocks compute less.
LONGEST_PROMPT_RATIO = 8
# cuDNN's backward pass takes lengths that are a multiple of this.
CUDA_LENGTH_MULTIPLE = 128
# Scores of a block of queries, all rows and heads together: 34 MB in float32. A block has at most
# 512 queries, and at least 16.
BLOCK_SCORES = 1 << 23
MAX_BLOCK_LENGTH, MIN_BLOCK_LENGTH = 512, 16

_custom_function: Any = mx.custom_function  # the stubs lose the signature of what it wraps

# mlx's function, unpatched: (queries, keys, values, scale=, mask=, sinks=) -> output.
MlxAttention = Callable[..., mx.array]


def gpu_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: Any,
    sinks: mx.array | None,
    softcap: float | None,
    mlx_attention: MlxAttention,
    *,
    fused: bool = True,
) -> mx.array:
    """Attention as mlx-lm's blocks call it, without a score matrix.

    Args:
        queries: (N, G·R, L, E).
        keys: (N, G, T, E); those that a `CompletionKV` returned stand for prompt and completion.
        values: (N, G, T, E).
        scale: Factor on the scores.
        mask: "causal", a `CausalMask`, None, or an array.
        sinks: A score per query head (G·R,) that takes part in the softmax without a value.
        softcap: Limit c of the scores, c·tanh(score / c).
        mlx_attention: mlx's own function.
        fused: Whether its kernel may be used.

    Returns:
        (N, G·R, L, E).

    Raises:
        ModelError: Fewer queries than keys that are not a cache's, so it is unknown which keys are
            padding.
    """
    length, width = queries.shape[2], keys.shape[2]
    extra = _Extra(getattr(mask, "window", None), sinks, softcap)
    if isinstance(mask, str) or (mask is None and length == 1):
        if length == width:
            if (chunk := getattr(mask, "chunk", None)) is not None and chunk < length:
                chunks = gpu_attention(
                    _chunks_as_rows(queries, chunk),
                    _chunks_as_rows(keys, chunk),
                    _chunks_as_rows(values, chunk),
                    scale,
                    "causal",
                    sinks,
                    softcap,
                    mlx_attention,
                    fused=fused,
                )
                return _rows_of_chunks(chunks, queries.shape[0], length)
            plain = fused and extra.is_none(width)
            if plain and fused_length(queries, keys, values) is not None:
                return _fused_rows(queries, keys, values, scale, mlx_attention)
            return _rows_in_blocks(queries, keys, values, scale, None, extra)
        own, prompt, lengths = _split_keys(queries, keys, values, mask)
        plain = fused and extra.is_none(width)
        if plain and prompt[0].shape[2] <= LONGEST_PROMPT_RATIO * length:
            out = _fused_completions(queries, own, prompt, lengths, scale, mlx_attention)
            if out is not None:
                return out
        return _completions_in_blocks(queries, own, prompt, lengths, scale, extra)
    if isinstance(mask, mx.array) and mask.dtype == mx.bool_ and _same_for_all_heads(mask):
        return _rows_in_blocks(queries, keys, values, scale, mask, extra)
    return mlx_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def _chunks_as_rows(array: mx.array, chunk: int) -> mx.array:
    """(N, G, L, E) as (N·chunks, G, `chunk`, E), padded at the end."""
    rows, heads, length, size = array.shape
    array = mx.pad(array, [(0, 0), (0, 0), (0, -length % chunk), (0, 0)])
    return array.reshape(rows, heads, -1, chunk, size).swapaxes(1, 2).flatten(0, 1)


def _rows_of_chunks(array: mx.array, rows: int, length: int) -> mx.array:
    """The inverse of `_chunks_as_rows`."""
    whole = mx.unflatten(array, 0, (rows, -1)).swapaxes(1, 2).flatten(2, 3)
    return whole[:, :, :length]


class _Extra(NamedTuple):
    """What mlx's kernel does not compute, or not with a gradient."""

    window: int | None = None
    sinks: mx.array | None = None
    softcap: float | None = None

    def is_none(self, keys: int) -> bool:
        """Whether this is plain causal attention to `keys` keys."""
        inside = self.window is None or keys <= self.window
        return inside and self.sinks is None and self.softcap is None


def _split_keys(
    queries: mx.array, keys: mx.array, values: mx.array, mask: Any
) -> tuple[tuple[mx.array, mx.array], tuple[mx.array, mx.array], mx.array]:
    """Keys and values of completions, of their prompts, and the lengths of the prompts.

    From the cache that returned `keys`, where the prompts' exist once. Some blocks change the keys
    first (stablelm, deepseek_v3) or attend to another block's (gemma4): those are cut in two.
    """
    found = CompletionKV.find(keys)
    if found is not None and found.own is not None:
        assert found.keys is not None
        assert found.values is not None
        return found.own, (found.keys, found.values), found.lengths
    lengths = getattr(mask, "prompt_lengths", None)
    if lengths is None:
        raise ModelError(FOREIGN_KEYS)
    width = keys.shape[2] - queries.shape[2]
    own = (keys[:, :, width:], values[:, :, width:])
    each = keys.shape[0] // lengths.shape[0]
    return own, (keys[:, :, :width], values[:, :, :width]), mx.repeat(lengths, each, axis=0)


def _same_for_all_heads(mask: mx.array) -> bool:
    return mask.ndim < 3 or mask.shape[-3] == 1


# mlx's own kernel


def fused_length(queries: mx.array, keys: mx.array, values: mx.array) -> int | None:
    """Length to pad these rows to, so that mlx computes them in one kernel, backward too.

    Returns:
        The number of tokens; None if mlx has no such kernel for them on this device.
    """
    heads, length, size = queries.shape[1:]
    shape = (heads, keys.shape[1], size, values.shape[-1])
    for padded in (length, -(-length // CUDA_LENGTH_MULTIPLE) * CUDA_LENGTH_MULTIPLE):
        if padded >= FEWEST_QUERIES and has_fused_backward(*shape, padded, queries.dtype):
            return padded
    return None


@cache
def has_fused_backward(
    heads: int, groups: int, size: int, value_size: int, length: int, dtype: mx.Dtype
) -> bool:
    """Whether mlx has a kernel for the gradient of causal attention of this shape, on this device.

    Found out from the graph that mlx builds for it; nothing is computed.
    """
    queries = mx.zeros((1, heads, length, size), dtype)
    keys = mx.zeros((1, groups, length, size), dtype)
    values = mx.zeros((1, groups, length, value_size), dtype)
    attend = partial(mx.fast.scaled_dot_product_attention, scale=1.0, mask="causal")
    outputs, gradients = mx.vjp(
        lambda *inputs: [attend(*inputs)],
        [queries, keys, values],
        [mx.zeros((1, heads, length, value_size), dtype)],
    )
    graph = io.StringIO()
    mx.export_to_dot(graph, *outputs, *gradients)
    return "ScaledDotProductAttentionVJP" in graph.getvalue()


def _fused_rows(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mlx_attention: MlxAttention,
) -> mx.array:
    """Causal attention of whole rows (N, heads, L, E), padded at the end as mlx needs it."""
    length = queries.shape[2]
    padded = fused_length(queries, keys, values)
    assert padded is not None
    if padded > length:
        queries, keys, values = (
            mx.pad(array, [(0, 0), (0, 0), (0, padded - length), (0, 0)])
            for array in (queries, keys, values)
        )
    out = mlx_attention(queries, keys, values, scale=scale, mask="causal")
    return out[:, :, :length] if padded > length else out


def _fused_completions(
    queries: mx.array,
    own: tuple[mx.array, mx.array],
    prompt: tuple[mx.array, mx.array],
    prompt_lengths: mx.array,
    scale: float,
    mlx_attention: MlxAttention,
) -> mx.array | None:
    """Attention of completions to their prompt and themselves; None if mlx has no kernel.

    mlx's backward pass takes fewer queries than keys, but only with a mask that ends with the last
    query, and prompts are padded before the completions start. So each completion's keys are moved
    right behind its prompt, and its queries to the same place in a row of that length.

    Args:
        queries: (N, G·R, L, E), the completions of a prompt next to each other.
        own: Keys and values of the completions, (N, G, L, E).
        prompt: Keys and values of the prompts, (B, G, P, E).
        prompt_lengths: (B,).
        scale: Factor on the scores.
        mlx_attention: mlx's own function.
    """
    rows, _, length, _ = queries.shape
    prompts, _, width, _ = prompt[0].shape
    each = rows // prompts
    outs = []
    for b in range(prompts):
        of_prompt = slice(b * each, (b + 1) * each)
        start = prompt_lengths[b : b + 1]

        def behind_prompt(array: mx.array, before: mx.array, start: mx.array = start) -> mx.array:
            room = mx.pad(before, [(0, 0), (0, 0), (0, length), (0, 0)])
            room = mx.repeat(room, array.shape[0], axis=0)
            return mx.slice_update(room, array, start, axes=(2,))

        row_keys, row_values = (
            behind_prompt(mine[of_prompt], shared[b : b + 1])
            for mine, shared in zip(own, prompt, strict=True)
        )
        mine = queries[of_prompt]
        nothing = mx.zeros((1, mine.shape[1], width, mine.shape[3]), mine.dtype)
        row_queries = behind_prompt(mine, nothing)
        if fused_length(row_queries, row_keys, row_values) is None:
            return None
        out = _fused_rows(row_queries, row_keys, row_values, scale, mlx_attention)
        size = (each, out.shape[1], length, out.shape[3])
        outs.append(mx.slice(out, start, axes=(2,), slice_size=size))
    return outs[0] if prompts == 1 else mx.concatenate(outs)


# Blocks of queries


class Source(NamedTuple):
    """Keys and values that queries attend to, and which of them a block of queries sees.

    Attributes:
        keys: (B, G, T, E) if shared by all completions of a prompt, else (B, G, K, T, E).
        values: Likewise.
        visible: (start, end) of a block of queries -> range of the keys that any of them sees.
        mask: (start, end, first, last) -> bool mask of queries and keys, broadcastable to
            (B, G, K, R, end − start, last − first); false hides.
    """

    keys: mx.array
    values: mx.array
    visible: Callable[[int, int], tuple[int, int]]
    mask: Callable[[int, int, int, int], mx.array]


def block_length(rows: int, keys: int) -> int:
    """Queries in a block, for `rows` rows and heads together and `keys` keys of each."""
    fitting = BLOCK_SCORES // max(1, rows * keys)
    return max(MIN_BLOCK_LENGTH, min(MAX_BLOCK_LENGTH, fitting))


def attention_in_blocks(
    queries: mx.array,
    sources: Sequence[Source],
    scale: float,
    *,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> mx.array:
    """Softmax attention over the keys of all sources, a block of queries after the other.

    Keeps its inputs, its output and the logarithm of each query's normaliser; the backward pass
    computes the scores again. Every query must see at least one key, or a sink.

    Args:
        queries: (B, G, K, R, L, E).
        sources: Keys and values.
        scale: Factor on the scores.
        sinks: (G·R,) scores without a value.
        softcap: Limit c of the scores, c·tanh(score / c).

    Returns:
        (B, G, K, R, L, E), in the dtype of `queries`.
    """
    length = queries.shape[-2]
    rows = queries.size // (length * queries.shape[-1])
    # Keys that the last queries see: with a window, far fewer than all.
    widest = [source.visible(max(0, length - MAX_BLOCK_LENGTH), length) for source in sources]
    step = block_length(rows, sum(last - first for first, last in widest))
    blocks = [(start, min(start + step, length)) for start in range(0, length, step)]
    groups, each = queries.shape[1], queries.shape[3]
    spans = [[source.visible(*block) for source in sources] for block in blocks]

    def scores(
        block: int, queries: mx.array, pairs: Sequence[mx.array]
    ) -> list[tuple[mx.array, mx.array | None, mx.array, mx.array]]:
        """For each source: scores in float32, their derivative if capped, keys and values."""
        found = []
        for source, keys, values, (first, last) in zip(
            sources, pairs[0::2], pairs[1::2], spans[block], strict=True
        ):
            keys, values = keys[..., first:last, :], values[..., first:last, :]
            score = matmul(queries * scale, keys.swapaxes(-1, -2)).astype(mx.float32)
            slope = None
            if softcap is not None:
                capped = mx.tanh(score / softcap)
                score, slope = softcap * capped, 1 - mx.square(capped)
            seen = source.mask(*blocks[block], first, last)
            found.append((mx.where(seen, score, -mx.inf), slope, keys, values))
        return found

    def as_scores(sinks: mx.array) -> mx.array:
        return sinks.astype(mx.float32).reshape(1, groups, 1, each, 1, 1)

    @_custom_function
    def attention(queries: mx.array, *rest: mx.array) -> tuple[mx.array, mx.array]:
        pairs, sink = (rest, None) if sinks is None else (rest[:-1], as_scores(rest[-1]))
        outs: list[mx.array] = []
        normalisers: list[mx.array] = []
        for index, (start, end) in enumerate(blocks):
            block = queries[..., start:end, :]
            if outs:  # otherwise mlx may compute several blocks at the same time
                (block,) = mx.depends([block], [outs[-1]])
            parts = scores(index, block, pairs)
            top = parts[0][0].max(axis=-1, keepdims=True)
            for score, *_ in parts[1:]:
                top = mx.maximum(top, score.max(axis=-1, keepdims=True))
            total: Any = 0
            if sink is not None:
                top = mx.maximum(top, sink)
                total = exp(sink - top)
            out: Any = 0
            for score, _, _, values in parts:
                exponential = exp(score - top)
                total = total + exponential.sum(axis=-1, keepdims=True)
                out = out + matmul(exponential.astype(queries.dtype), values)
            outs.append((out / total).astype(queries.dtype))
            normalisers.append(top + mx.log(total))
        return mx.concatenate(outs, axis=-2), mx.concatenate(normalisers, axis=-2)

    @attention.vjp
    def backward(
        primals: tuple[mx.array, ...],
        cotangents: tuple[mx.array, ...],
        outputs: tuple[mx.array, ...],
    ) -> tuple[mx.array, ...]:
        queries, *rest = primals
        pairs, sink = (rest, None) if sinks is None else (rest[:-1], as_scores(rest[-1]))
        # A sum of many blocks, in float32.
        grad_pairs = [mx.zeros(array.shape, mx.float32) for array in pairs]
        grad_sink: Any = 0
        grad_queries: list[mx.array] = []
        for index, (start, end) in enumerate(blocks):
            block, normaliser = queries[..., start:end, :], outputs[1][..., start:end, :]
            grad_out = cotangents[0][..., start:end, :]
            if grad_queries:
                block, grad_out = mx.depends([block, grad_out], [grad_queries[-1], *grad_pairs])
            parts = []
            mean: Any = 0
            for score, slope, keys, values in scores(index, block, pairs):
                probability = exp(score - normaliser)
                grad = matmul(grad_out, values.swapaxes(-1, -2))
                mean = mean + (probability * grad).sum(axis=-1, keepdims=True)
                parts.append((probability, grad, slope, keys))
            grad_query: Any = 0
            for place, (probability, grad, slope, keys) in enumerate(parts):
                first, last = spans[index][place]
                grad_score = probability * (grad - mean)
                if slope is not None:
                    grad_score = grad_score * slope
                grad_score = grad_score.astype(queries.dtype)
                grad_query = grad_query + matmul(grad_score, keys)
                for offset, left, right in (
                    (0, grad_score, block * scale),
                    (1, probability.astype(queries.dtype), grad_out),
                ):
                    added = transposed_matmul(left, right, like=keys)
                    grad_pairs[2 * place + offset][..., first:last, :] += added
            if sink is not None:
                grad_sink = grad_sink - (exp(sink - normaliser) * mean).sum(axis=(0, 2, 4, 5))
            grad_queries.append((grad_query * scale).astype(queries.dtype))
        gradients = [
            grad.astype(array.dtype) for grad, array in zip(grad_pairs, pairs, strict=True)
        ]
        if sinks is not None:
            gradients.append(grad_sink.reshape(-1).astype(sinks.dtype))
        return (mx.concatenate(grad_queries, axis=-2), *gradients)

    pairs = [array for source in sources for array in (source.keys, source.values)]
    return attention(queries, *pairs, *([] if sinks is None else [sinks]))[0]


def _causal(window: int | None, start: int, end: int, first: int, last: int) -> mx.array:
    """Mask (end − start, last − first) of queries that see themselves and their past."""
    query, key = mx.arange(start, end)[:, None], mx.arange(first, last)[None]
    seen = query >= key
    return seen if window is None else seen & (query - key < window)


def _past(window: int | None, start: int, end: int) -> tuple[int, int]:
    return 0 if window is None else max(0, start + 1 - window), end


def _causal_source(keys: mx.array, values: mx.array, extra: _Extra) -> Source:
    return Source(keys, values, partial(_past, extra.window), partial(_causal, extra.window))


def _rows_in_blocks(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | None,
    extra: _Extra,
) -> mx.array:
    """Attention of whole rows (N, heads, L, E): causal, or with a bool mask for all heads."""
    rows, heads, length, size = queries.shape
    groups, width = keys.shape[1:3]
    split = queries.reshape(rows, groups, 1, heads // groups, length, size)
    if mask is None:
        source = _causal_source(keys, values, extra)
    else:
        whole = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
        whole = whole.reshape(whole.shape[0], 1, 1, 1, *whole.shape[-2:])

        def part_of_mask(start: int, end: int, first: int, last: int) -> mx.array:
            rows = slice(None) if whole.shape[-2] == 1 else slice(start, end)
            return whole[..., rows, first:last]

        source = Source(keys, values, lambda _start, _end: (0, width), part_of_mask)
    out = attention_in_blocks(split, [source], scale, sinks=extra.sinks, softcap=extra.softcap)
    return out.reshape(rows, heads, length, values.shape[-1])


def _completions_in_blocks(
    queries: mx.array,
    own: tuple[mx.array, mx.array],
    prompt: tuple[mx.array, mx.array],
    prompt_lengths: mx.array,
    scale: float,
    extra: _Extra,
) -> mx.array:
    """As `attention.shared_prompt_attention`, with a sliding window, sinks and a soft cap."""
    rows, heads, length, _ = queries.shape
    prompts, groups, width, _ = prompt[0].shape
    per_prompt = rows // prompts

    def group_by_prompt(array: mx.array, *shape: int) -> mx.array:
        split = array.reshape(prompts, per_prompt, groups, *shape, *array.shape[-2:])
        return mx.moveaxis(split, 1, 2)

    lengths = prompt_lengths.reshape(-1, 1, 1, 1, 1, 1)

    def of_prompt(start: int, end: int, first: int, last: int) -> mx.array:
        key = mx.arange(first, last)
        inside = key < lengths
        if extra.window is None:
            return inside
        return inside & (lengths + mx.arange(start, end)[:, None] - key < extra.window)

    out = attention_in_blocks(
        group_by_prompt(queries, heads // groups),
        [
            Source(*prompt, lambda _start, _end: (0, width), of_prompt),
            _causal_source(group_by_prompt(own[0]), group_by_prompt(own[1]), extra),
        ],
        scale,
        sinks=extra.sinks,
        softcap=extra.softcap,
    )
    return mx.moveaxis(out, 2, 1).reshape(rows, heads, length, out.shape[-1])


def packed_gpu_attention(queries: mx.array, keys: mx.array, scale: float) -> mx.array:
    """Attention of a packed row (1, heads, L, E) (see `attention.packed_attention`)."""
    row = PackedKV.find_by_keys(keys)
    assert row.keys is not None
    assert row.values is not None
    _, heads, length, size = queries.shape
    groups = keys.shape[1]
    tokens, longest = row.tokens, row.longest

    def of_sequence(start: int, end: int, first: int, last: int) -> mx.array:
        same = tokens.sequence[start:end, None] == tokens.sequence[None, first:last]
        return same & _causal(None, start, end, first, last)

    sources = [Source(row.keys, row.values, partial(_past, longest), of_sequence)]
    prompt = row.prompt
    if prompt is not None:
        assert prompt.keys is not None
        assert prompt.values is not None
        width, owner = prompt.keys.shape[2], prompt.tokens.prompt

        def of_prompt(start: int, end: int, first: int, last: int) -> mx.array:
            return tokens.prompt[start:end, None] == owner[None, first:last]

        sources.append(
            Source(prompt.keys, prompt.values, lambda _start, _end: (0, width), of_prompt)
        )
    split = queries.reshape(1, groups, 1, heads // groups, length, size)
    out = attention_in_blocks(split, sources, scale)
    return out.reshape(1, heads, length, row.values.shape[-1])
