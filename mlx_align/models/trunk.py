"""The one way through the model: a prompt once, and all its completions on top of it.

Hidden state t of a completion is the one that predicts its token t (the prompt's last state
predicts token 0), so no loss ever shifts by one and prompt positions never meet the vocabulary
head. Where a family can't share a prompt, the same hidden states come from whole rows.
"""

from __future__ import annotations

from contextlib import nullcontext

import mlx.core as mx

from mlx_align.models.caches import prompt_caches
from mlx_align.models.checkpointing import checkpointed
from mlx_align.models.compat import Anatomy
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
    way = _shared if shared else _flat
    with checkpointed(anatomy.model) if grad_checkpoint else nullcontext():
        return way(anatomy, batch)


def _shared(anatomy: Anatomy, batch: GroupBatch) -> mx.array:
    caches = prompt_caches(anatomy.model, batch.prompt_lengths)
    prompt = anatomy.hidden(batch.prompt_tokens, cache=caches)
    last = batch.prompt_lengths[batch.group] - 1
    first = prompt[batch.group, last][:, None]
    completions = anatomy.hidden(
        batch.completion_tokens[:, :-1],
        cache=[
            cache.completion_cache(batch.group, batch.prompt_lengths, anatomy.mask_axes)
            for cache in caches
        ],
    )
    return mx.concatenate([first, completions], axis=1)


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
    both = mx.concatenate([batch.prompt_tokens[batch.group], batch.completion_tokens], axis=1)
    starts = batch.prompt_lengths[batch.group]
    position = mx.arange(width)[None]
    in_prompt = position < starts[:, None]
    source = mx.where(in_prompt, position, position - starts[:, None] + prompt_width)
    return mx.take_along_axis(both, mx.minimum(source, width - 1), axis=1), starts
