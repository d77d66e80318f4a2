"""From tokenised groups to padded batches of few shapes, in an order that repeats.

The order of batches is a function of (seed, epoch) alone, so a run can be continued at any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_align.data.packing import collate_packed, packed_order
from mlx_align.data.shapes import (
    AnyShape,
    BatchLimit,
    PackedShape,
    Shape,
    lengths_of,
    plan_shapes,
    tokens_of,
    tokens_run,
)
from mlx_align.types import GroupBatch, LabelledBatch, Logps, PairBatch, TokenizedGroup


class Microbatch(NamedTuple):
    """Which groups run together, and in which shape."""

    indices: tuple[int, ...]
    shape: AnyShape


def epoch_order(
    groups: Sequence[TokenizedGroup],
    shapes: Sequence[AnyShape],
    *,
    seed: int | None,
    epoch: int = 0,
) -> list[Microbatch]:
    """Every group once, in microbatches of one shape each, shuffled by (seed, epoch).

    The shapes are all packed or all padded. `seed=None` keeps the order of the data, for
    evaluation.
    """
    random = None if seed is None else np.random.default_rng((seed, epoch))
    order = np.arange(len(groups)) if random is None else random.permutation(len(groups))
    packed = [shape for shape in shapes if isinstance(shape, PackedShape)]
    if packed:
        batches = [Microbatch(*batch) for batch in packed_order(groups, packed, order)]
    else:
        padded = [shape for shape in shapes if isinstance(shape, Shape)]
        batches = _padded_order(groups, padded, order)
    if random is None:
        return sorted(batches, key=lambda batch: min(batch.indices))
    return [batches[i] for i in random.permutation(len(batches))]


def _padded_order(
    groups: Sequence[TokenizedGroup], shapes: Sequence[Shape], order: npt.NDArray[np.int64]
) -> list[Microbatch]:
    """Groups left over in one shape move on to the next that holds them.

    That has room for as many or fewer: so fillers are needed once at most.
    """
    waiting: dict[Shape, list[int]] = {shape: [] for shape in shapes}
    for index in order:
        waiting[_fitting(lengths_of(groups[index]), shapes)].append(int(index))
    batches = []
    for position, shape in enumerate(shapes):
        row = waiting[shape]
        size = shape.groups
        full = len(row) - len(row) % size
        batches += [Microbatch(tuple(row[i : i + size]), shape) for i in range(0, full, size)]
        for index in row[full:]:
            if position == len(shapes) - 1:
                batches.append(_last(row[full:], groups, shapes))
                break
            target = _fitting(lengths_of(groups[index]), shapes[position + 1 :])
            waiting[target].append(index)
    return batches


def _last(
    indices: Sequence[int], groups: Sequence[TokenizedGroup], shapes: Sequence[Shape]
) -> Microbatch:
    """The batch of what is left over at the end, in whichever shape runs fewest tokens."""
    lengths = [lengths_of(groups[index]) for index in indices]
    longest = max(p for p, _ in lengths), max(c for _, c in lengths)
    rows = len(groups[indices[0]].completions)
    holding = [
        shape
        for shape in shapes
        if shape.groups >= len(indices)
        and longest[0] <= shape.prompt
        and longest[1] <= shape.completion
    ]
    cheapest = min(holding, key=lambda shape: shape.groups * tokens_of(shape, rows))
    return Microbatch(tuple(indices), cheapest)


def _fitting(lengths: tuple[int, int], shapes: Sequence[Shape]) -> Shape:
    """The first of `shapes` (cheapest first) that holds a group; the last one always does."""
    for shape in shapes:
        if lengths[0] <= shape.prompt and lengths[1] <= shape.completion:
            return shape
    raise AssertionError(f"no shape of {shapes} holds {lengths}")


def microbatch_stream(
    groups: Sequence[TokenizedGroup],
    shapes: Sequence[AnyShape],
    *,
    seed: int,
    start: int = 0,
) -> Iterator[Microbatch]:
    """Microbatches without end, epoch after epoch, from the `start`-th on.

    Epochs may differ in length: which groups are left over depends on their order.
    """
    epoch = 0
    while True:
        order = epoch_order(groups, shapes, seed=seed, epoch=epoch)
        yield from order[start:]
        start = max(0, start - len(order))
        epoch += 1


def collate_groups(groups: Sequence[TokenizedGroup], shape: AnyShape) -> GroupBatch:
    """Groups in `shape`; short batches are filled up with groups whose mask is all false."""
    if isinstance(shape, PackedShape):
        return collate_packed(groups, shape)
    rows, size = len(groups[0].completions), shape.groups
    prompts = np.zeros((size, shape.prompt), np.int32)
    lengths = np.ones((size,), np.int32)
    completions = np.zeros((size * rows, shape.completion), np.int32)
    mask = np.zeros(completions.shape, np.bool_)
    for b, group in enumerate(groups):
        prompts[b, : len(group.prompt)] = group.prompt
        lengths[b] = len(group.prompt)
        for k, completion in enumerate(group.completions):
            n = b * rows + k
            completions[n, : len(completion)] = completion
            scored = True if group.loss_masks is None else group.loss_masks[k]
            mask[n, : len(completion)] = scored
    return GroupBatch(
        prompt_tokens=mx.array(prompts),
        prompt_lengths=mx.array(lengths),
        completion_tokens=mx.array(completions),
        completion_mask=mx.array(mask),
    )


def collate_pairs(
    groups: Sequence[TokenizedGroup],
    reference_logps: Sequence[tuple[Logps, ...]] | None,
    shape: AnyShape,
) -> PairBatch:
    """Pad pairs, with the reference's log-prob of each completion token where there is one."""
    batch = collate_groups(groups, shape)
    rows = [row for logps in reference_logps or () for row in logps]
    filled = np.arange(shape.groups) < len(groups)
    soft = [1.0 if group.soft_label is None else group.soft_label for group in groups]
    return PairBatch(
        groups=batch,
        reference_logps=_padded(rows, batch.completion_tokens),
        weight=mx.array(filled.astype(np.float32)),
        soft_label=mx.array(np.array(soft + [1.0] * (shape.groups - len(groups)), np.float32)),
    )


def collate_labelled(
    groups: Sequence[TokenizedGroup],
    reference_logps: Sequence[tuple[Logps, ...]],
    shape: AnyShape,
    completion: int = 0,
) -> LabelledBatch:
    """Pad groups, one completion of each, with the reference's log-probs of its tokens."""
    batch = collate_groups([_single(group, completion) for group in groups], shape)
    labels = np.zeros((shape.groups,), np.bool_)
    labels[: len(groups)] = [bool(group.label) for group in groups]
    filled = np.arange(shape.groups) < len(groups)
    return LabelledBatch(
        groups=batch,
        reference_logps=_padded([r[completion] for r in reference_logps], batch.completion_tokens),
        weight=mx.array(filled.astype(np.float32)),
        desirable=mx.array(labels),
    )


def _single(group: TokenizedGroup, completion: int) -> TokenizedGroup:
    """The group with one of its completions."""
    one = slice(completion, completion + 1)
    masks = None if group.loss_masks is None else group.loss_masks[one]
    return replace(group, completions=group.completions[one], loss_masks=masks)


def _padded(rows: Sequence[Logps], like: mx.array) -> mx.array:
    """Rows of floats in an array of the shape of `like` (N, C); 0 where nothing is given."""
    padded = np.zeros(like.shape, np.float32)
    for n, row in enumerate(rows):
        padded[n, : len(row)] = row
    return mx.array(padded)


def scored(group: TokenizedGroup, completion: int) -> npt.NDArray[np.bool_]:
    """Which tokens of a completion count, (length,) bool."""
    if group.loss_masks is not None:
        return group.loss_masks[completion]
    return np.ones(len(group.completions[completion]), np.bool_)


def groups_per_batch(groups: Sequence[TokenizedGroup], limit: BatchLimit) -> float:
    """Groups of a microbatch: the number asked for, or the mean of what fits."""
    if limit.tokens is None:
        return limit.groups
    return len(groups) / len(epoch_order(groups, plan_shapes(groups, limit), seed=None))


def padding_waste(batches: Sequence[Microbatch], groups: Sequence[TokenizedGroup]) -> float:
    """Share of the tokens run through the model that are padding."""
    run = real = 0
    for batch in batches:
        rows = len(groups[batch.indices[0]].completions)
        run += tokens_run(batch.shape, rows)
        for index in batch.indices:
            group = groups[index]
            real += len(group.prompt) + sum(len(c) for c in group.completions)
    return 1 - real / run
