"""Batch tokenised groups: the order of an epoch, padding, and packing.

The order of batches depends only on the seed and the epoch, so a run can be resumed at any batch.

A *padded* microbatch has one row for each prompt and for each completion. A *packed* microbatch has
one row of prompts and one row of completions, each filled with as many groups as fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_align.data.buckets import (
    AnyShape,
    BatchLimit,
    PackedShape,
    Shape,
    group_lengths,
    group_tokens,
    microbatch_tokens,
    packed_lengths,
    plan_shapes,
)
from mlx_align.types import GroupBatch, LabelledBatch, Logps, Packing, PairBatch, TokenizedGroup

# Number of groups that are packed at once. The time to pack is quadratic in it; each window ends
# with rows that are not full.
PACKING_WINDOW = 1024


class Microbatch(NamedTuple):
    """The groups of a microbatch and its shape.

    Attributes:
        indices: Indices of the groups in the dataset.
        shape: The shape to which they are padded, or in which they are packed.
    """

    indices: tuple[int, ...]
    shape: AnyShape


def epoch_order(
    groups: Sequence[TokenizedGroup],
    shapes: Sequence[AnyShape],
    *,
    seed: int | None,
    epoch: int = 0,
) -> list[Microbatch]:
    """Arrange all groups in microbatches, each group once, shuffled by (seed, epoch).

    Args:
        groups: All groups of the dataset.
        shapes: From `plan_shapes`; all packed or all padded.
        seed: Random seed; None keeps the order of the data, for evaluation.
        epoch: Number of the epoch, from 0.
    """
    random = None if seed is None else np.random.default_rng((seed, epoch))
    order = np.arange(len(groups)) if random is None else random.permutation(len(groups))
    packed = [shape for shape in shapes if isinstance(shape, PackedShape)]
    if packed:
        batches = _packed_order(groups, packed, order)
    else:
        padded = [shape for shape in shapes if isinstance(shape, Shape)]
        batches = _padded_order(groups, padded, order)
    if random is None:
        return sorted(batches, key=lambda batch: min(batch.indices))
    return [batches[i] for i in random.permutation(len(batches))]


def _padded_order(
    groups: Sequence[TokenizedGroup], shapes: Sequence[Shape], order: npt.NDArray[np.int64]
) -> list[Microbatch]:
    """Fill microbatches shape by shape; leftover groups move to the next shape that fits them.

    Later shapes hold as many groups or fewer, so at most one microbatch is not full.
    """
    waiting: dict[Shape, list[int]] = {shape: [] for shape in shapes}
    for index in order:
        waiting[_fitting(group_lengths(groups[index]), shapes)].append(int(index))
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
            target = _fitting(group_lengths(groups[index]), shapes[position + 1 :])
            waiting[target].append(index)
    return batches


def _last(
    indices: Sequence[int], groups: Sequence[TokenizedGroup], shapes: Sequence[Shape]
) -> Microbatch:
    """The last, partly filled microbatch, in the shape with the fewest tokens."""
    lengths = [group_lengths(groups[index]) for index in indices]
    longest = max(p for p, _ in lengths), max(c for _, c in lengths)
    rows = len(groups[indices[0]].completions)
    holding = [
        shape
        for shape in shapes
        if shape.groups >= len(indices)
        and longest[0] <= shape.prompt
        and longest[1] <= shape.completion
    ]
    cheapest = min(holding, key=lambda shape: shape.groups * group_tokens(shape, rows))
    return Microbatch(tuple(indices), cheapest)


def _fitting(lengths: tuple[int, int], shapes: Sequence[Shape]) -> Shape:
    """The first of `shapes` (smallest first) that a group fits into; it always fits the last."""
    for shape in shapes:
        if lengths[0] <= shape.prompt and lengths[1] <= shape.completion:
            return shape
    raise AssertionError(f"lengths {lengths} fit none of the shapes {shapes}")


def _packed_order(
    groups: Sequence[TokenizedGroup], shapes: Sequence[PackedShape], order: npt.NDArray[np.int64]
) -> list[Microbatch]:
    """Pack all groups into microbatches, taking them from `order` in windows.

    A microbatch starts with a group that fits no earlier shape. Then the group is added whose
    prompt and completions best match the remaining room of the two rows: large groups first, then
    small ones, so that both rows fill up together.
    """
    batches = []
    for start in range(0, len(order), PACKING_WINDOW):
        window = order[start : start + PACKING_WINDOW]
        sizes = np.array([packed_lengths(groups[index]) for index in window])
        widths = np.array([[shape.prompt, shape.completion] for shape in shapes])
        first = (sizes[:, None] <= widths[None]).all(axis=2).argmax(axis=1)
        waiting = np.arange(len(window))
        while len(waiting):
            largest = int(first[waiting].max())
            # The first group must be one that needs this shape; the others need not.
            needs_shape = first[waiting] == largest
            taken = _fill(sizes[waiting], widths[largest], needs_shape)
            members = tuple(int(window[i]) for i in waiting[taken])
            batches.append(Microbatch(members, shapes[largest]))
            waiting = np.delete(waiting, taken)
    return batches


def _fill(
    sizes: npt.NDArray[np.int64], widths: npt.NDArray[np.int64], first: npt.NDArray[np.bool_]
) -> list[int]:
    """Choose the groups that go into one microbatch.

    Args:
        sizes: (n, 2) tokens of each group: prompt, completions.
        widths: (2,) lengths of the two rows.
        first: (n,) which groups may be chosen first.
    """
    room = widths.copy()
    taken: list[int] = []
    candidates = first.copy()
    while candidates.any():
        match = (sizes / widths) @ (room / widths)
        best = int(np.where(candidates, match, -1.0).argmax())
        taken.append(best)
        room -= sizes[best]
        candidates = np.asarray((sizes <= room).all(axis=1))
        candidates[taken] = False
    return taken


def microbatch_stream(
    groups: Sequence[TokenizedGroup],
    shapes: Sequence[AnyShape],
    *,
    seed: int,
    start: int = 0,
) -> Iterator[Microbatch]:
    """Yield microbatches forever, epoch after epoch, beginning with number `start`.

    Epochs may differ in length, because the leftover groups depend on the order.
    """
    epoch = 0
    while True:
        order = epoch_order(groups, shapes, seed=seed, epoch=epoch)
        yield from order[start:]
        start = max(0, start - len(order))
        epoch += 1


def collate_groups(groups: Sequence[TokenizedGroup], shape: AnyShape) -> GroupBatch:
    """Pad or pack groups; missing groups become filler whose mask is all false."""
    if isinstance(shape, PackedShape):
        return _collate_packed(groups, shape)
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
            mask[n, : len(completion)] = completion_mask(group, k)
    return GroupBatch(
        prompt_tokens=mx.array(prompts),
        prompt_lengths=mx.array(lengths),
        completion_tokens=mx.array(completions),
        completion_mask=mx.array(mask),
    )


def _collate_packed(groups: Sequence[TokenizedGroup], shape: PackedShape) -> GroupBatch:
    """Pack groups into two rows, with the index of every completion token in the (N, C) layout."""
    rows = len(groups[0].completions)
    prompts = np.zeros((1, shape.prompt), np.int32)
    lengths = np.zeros((shape.groups,), np.int32)
    completions = np.zeros((shape.groups * rows, shape.longest), np.int32)
    mask = np.zeros(completions.shape, np.bool_)
    place = np.zeros(completions.shape, np.int32)
    tokens, step, completion = np.zeros((3, shape.completion), np.int32)
    completion -= 1
    prompts_end = completions_end = 0
    for b, group in enumerate(groups):
        lengths[b] = len(group.prompt)
        prompts[0, prompts_end : prompts_end + lengths[b]] = group.prompt
        prompts_end += len(group.prompt)
        for k, ids in enumerate(group.completions):
            n = b * rows + k
            span = slice(completions_end, completions_end + len(ids))
            tokens[span], step[span], completion[span] = ids, np.arange(len(ids)), n
            completions[n, : len(ids)] = ids
            mask[n, : len(ids)] = completion_mask(group, k)
            place[n, : len(ids)] = np.arange(span.start, span.stop)
            completions_end = span.stop
    return GroupBatch(
        prompt_tokens=mx.array(prompts),
        prompt_lengths=mx.array(lengths),
        completion_tokens=mx.array(completions),
        completion_mask=mx.array(mask),
        packing=Packing(*(mx.array(array) for array in (tokens, completion, step, place))),
    )


def collate_pairs(
    groups: Sequence[TokenizedGroup],
    reference_logps: Sequence[tuple[Logps, ...]] | None,
    shape: AnyShape,
) -> PairBatch:
    """Collate pairs and the reference log-probs of their completion tokens, if there are any."""
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
    """Collate one completion of each group, its label and its reference log-probs."""
    batch = collate_groups([_select_completion(group, completion) for group in groups], shape)
    labels = np.zeros((shape.groups,), np.bool_)
    labels[: len(groups)] = [bool(group.label) for group in groups]
    probability = np.zeros((shape.groups,), np.float32)
    probability[: len(groups)] = [desirable_probability(group) for group in groups]
    filled = np.arange(shape.groups) < len(groups)
    return LabelledBatch(
        groups=batch,
        reference_logps=_padded([r[completion] for r in reference_logps], batch.completion_tokens),
        weight=mx.array(filled.astype(np.float32)),
        desirable=mx.array(labels),
        probability=mx.array(probability),
    )


def desirable_probability(group: TokenizedGroup) -> float:
    """The probability that a labelled completion is desirable: its soft label, or 0 or 1."""
    return float(bool(group.label)) if group.soft_label is None else group.soft_label


def _select_completion(group: TokenizedGroup, completion: int) -> TokenizedGroup:
    """The group with only one of its completions."""
    one = slice(completion, completion + 1)
    masks = None if group.loss_masks is None else group.loss_masks[one]
    return replace(group, completions=group.completions[one], loss_masks=masks)


def _padded(rows: Sequence[Logps], like: mx.array) -> mx.array:
    """Rows of floats as an array of the shape of `like` (N, C), padded with zeros."""
    padded = np.zeros(like.shape, np.float32)
    for n, row in enumerate(rows):
        padded[n, : len(row)] = row
    return mx.array(padded)


def completion_mask(group: TokenizedGroup, completion: int) -> npt.NDArray[np.bool_]:
    """Mask of a completion's tokens that are in the loss, (length,) bool."""
    if group.loss_masks is not None:
        return group.loss_masks[completion]
    return np.ones(len(group.completions[completion]), np.bool_)


def groups_per_batch(groups: Sequence[TokenizedGroup], limit: BatchLimit) -> float:
    """Groups per microbatch: --batch-size, or the average number that fits --batch-tokens."""
    if limit.tokens is None:
        return limit.groups
    return len(groups) / len(epoch_order(groups, plan_shapes(groups, limit), seed=None))


def padding_fraction(batches: Sequence[Microbatch], groups: Sequence[TokenizedGroup]) -> float:
    """Fraction of the tokens run through the model that are padding, in [0, 1]."""
    total = real = 0
    for batch in batches:
        rows = len(groups[batch.indices[0]].completions)
        total += microbatch_tokens(batch.shape, rows)
        for index in batch.indices:
            group = groups[index]
            real += len(group.prompt) + sum(len(c) for c in group.completions)
    return 1 - real / total


def prompt_numbers(groups: Sequence[TokenizedGroup]) -> npt.NDArray[np.int64]:
    """A number for each group (n,), the same for groups with the same prompt."""
    numbers: dict[bytes, int] = {}
    found = [numbers.setdefault(group.prompt.tobytes(), len(numbers)) for group in groups]
    return np.array(found, np.int64)
