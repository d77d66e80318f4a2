"""The one way through the model: a prompt once, and all its completions on top of it.

Hidden state t of a completion is the one that predicts its token t (the prompt's last state
predicts token 0), so no loss ever shifts by one and prompt positions never meet the vocabulary
head. Where a family can't share a prompt, the same hidden states come from whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import mlx.core as mx

from mlx_align.errors import ModelError
from mlx_align.models.attention import attend_to_prompt, attend_within, causal_attention
from mlx_align.models.caches import CompletionKV, prompt_caches
from mlx_align.models.checkpointing import checkpointed
from mlx_align.models.compat import Anatomy
from mlx_align.models.gated import lean_gates
from mlx_align.models.packed import packed_completion_caches, packed_prompt_caches, packed_rows
from mlx_align.types import GroupBatch


def completion_hidden(
    anatomy: Anatomy, batch: GroupBatch, *, shared: bool = True, grad_checkpoint: bool = False
) -> mx.array:
    """Hidden states (N, C, D) that predict the completions' tokens; gradients flow through.

    Args:
        anatomy: The model, with whatever adapter it holds now.
        batch: B prompts and N completions.
        shared: Run each prompt once and let its completions attend to its keys and values; else
            run every completion as a whole row of its own.
        grad_checkpoint: Keep only each block's inputs and recompute it in the backward pass.
    """
    assert batch.packing is None
    way = _shared if shared else _flat
    within = partial(_own_parts, anatomy)
    with within(), checkpointed(anatomy.model, within) if grad_checkpoint else nullcontext():
        return way(anatomy, batch)


def packed_hidden(
    anatomy: Anatomy, batch: GroupBatch, *, grad_checkpoint: bool = False
) -> tuple[mx.array, mx.array]:
    """Hidden states of a packed batch's two rows, (1, P, D) and (1, T, D), after each token.

    Raises:
        ModelError: The family can't be packed.
    """
    assert batch.packing is not None

    @contextmanager
    def within() -> Iterator[None]:
        with packed_rows(), lean_gates(anatomy.model):
            yield

    with within(), checkpointed(anatomy.model, within) if grad_checkpoint else nullcontext():
        caches = packed_prompt_caches(anatomy.model, batch)
        prompts = anatomy.hidden(batch.prompt_tokens, cache=caches)
        on_top = packed_completion_caches(batch, batch.packing, caches)
        return prompts, anatomy.hidden(batch.packing.tokens[None], cache=on_top)


@contextmanager
def _own_parts(anatomy: Anatomy) -> Iterator[None]:
    """Within the block, the model's code meets our attention and our gates."""
    try:
        with causal_attention(_fused if _is_fused(anatomy) else _ours), lean_gates(anatomy.model):
            yield
    finally:
        CompletionKV.forget()


def _is_fused(anatomy: Anatomy) -> bool:
    """Whether mlx's own attention makes no scores: on a GPU, where no gradient is needed."""
    return not anatomy.model.training and mx.default_device() == mx.gpu


def _ours(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array | None:
    out = _fused(queries, keys, values, scale)
    return attend_within(queries, keys, values, scale) if out is None else out


def _fused(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array | None:
    """Attention of completions to shared prompts, which mlx has not; the rest is mlx's.

    Raises:
        ModelError: The keys are not those of a cache: whose padding to hide, nobody knows.
    """
    if queries.shape[2] == keys.shape[2]:
        return None
    cache = CompletionKV.that_handed_out(keys)
    if cache is None or cache.own is None or cache.keys is None or cache.values is None:
        raise ModelError("its blocks attend to keys that are not their cache's")
    prompt = (cache.keys, cache.values)
    return attend_to_prompt(queries, cache.own, prompt, cache.lengths, scale)


def _shared(anatomy: Anatomy, batch: GroupBatch) -> mx.array:
    caches = prompt_caches(anatomy.model, batch.prompt_lengths)
    prompt = anatomy.hidden(batch.prompt_tokens, cache=caches)
    rows = batch.completion_tokens.shape[0]
    last = mx.take_along_axis(prompt, batch.prompt_lengths[:, None, None] - 1, axis=1)
    if batch.completion_tokens.shape[1] == 1:
        return batch.for_each_completion(last)  # the last token is predicted, never read
    completions = anatomy.hidden(
        batch.completion_tokens[:, :-1],
        cache=[
            cache.completion_cache(rows, batch.prompt_lengths, anatomy.mask_axes)
            for cache in caches
        ],
    )
    return mx.concatenate([batch.for_each_completion(last), completions], axis=1)


def _flat(anatomy: Anatomy, batch: GroupBatch) -> mx.array:
    rows, starts = flat_rows(batch)
    length = batch.completion_tokens.shape[1]
    caches = prompt_caches(anatomy.model, starts + length) if anatomy.flat_caches else None
    hidden = anatomy.hidden(rows, cache=caches)
    positions = starts[:, None] - 1 + mx.arange(length)[None]
    return mx.take_along_axis(hidden, positions[..., None], axis=1)


def flat_rows(batch: GroupBatch) -> tuple[mx.array, mx.array]:
    """Each completion behind its own prompt, gaps closed: rows (N, P + C), starts (N,).

    `starts` is where a row's completion begins, its prompt's length.
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
