"""Which groups stand together in the two rows of a packed microbatch, and its arrays."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_align.data.shapes import PackedShape, packed_lengths
from mlx_align.types import GroupBatch, Packing, TokenizedGroup

# Groups that are packed at once. Time is their square; each such window ends on rows that are not
# full.
WINDOW = 1024


def packed_order(
    groups: Sequence[TokenizedGroup], shapes: Sequence[PackedShape], order: npt.NDArray[np.int64]
) -> list[tuple[tuple[int, ...], PackedShape]]:
    """Every group once, taken from `order` window after window; the members of each microbatch.

    A microbatch starts with a group that fits no earlier shape than its own, and takes whichever
    group lies best along the room that both its rows still have: large groups first, then small
    ones, and prompts and completions fill up together.
    """
    batches = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        sizes = np.array([packed_lengths(groups[index]) for index in window])
        widths = np.array([[shape.prompt, shape.completion] for shape in shapes])
        first = (sizes[:, None] <= widths[None]).all(axis=2).argmax(axis=1)
        waiting = np.arange(len(window))
        while len(waiting):
            largest = int(first[waiting].max())
            # The shape is opened for one of these, whatever else then fits beside it.
            openers = first[waiting] == largest
            taken = _fill(sizes[waiting], widths[largest], openers)
            members = tuple(int(window[i]) for i in waiting[taken])
            batches.append((members, shapes[largest]))
            waiting = np.delete(waiting, taken)
    return batches


def _fill(
    sizes: npt.NDArray[np.int64], widths: npt.NDArray[np.int64], openers: npt.NDArray[np.bool_]
) -> list[int]:
    """Which of the groups of `sizes` (n, 2) go into rows of `widths` (2,)."""
    room = widths.copy()
    taken: list[int] = []
    free = openers.copy()
    while free.any():
        along = (sizes / widths) @ (room / widths)
        best = int(np.where(free, along, -1.0).argmax())
        taken.append(best)
        room -= sizes[best]
        free = np.asarray((sizes <= room).all(axis=1))
        free[taken] = False
    return taken


def collate_packed(groups: Sequence[TokenizedGroup], shape: PackedShape) -> GroupBatch:
    """The groups' two rows, and where each completion's tokens stand in the layout (N, C)."""
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
            here = slice(completions_end, completions_end + len(ids))
            tokens[here], step[here], completion[here] = ids, np.arange(len(ids)), n
            completions[n, : len(ids)] = ids
            mask[n, : len(ids)] = True if group.loss_masks is None else group.loss_masks[k]
            place[n, : len(ids)] = np.arange(here.start, here.stop)
            completions_end = here.stop
    return GroupBatch(
        prompt_tokens=mx.array(prompts),
        prompt_lengths=mx.array(lengths),
        completion_tokens=mx.array(completions),
        completion_mask=mx.array(mask),
        packing=Packing(*(mx.array(array) for array in (tokens, completion, step, place))),
    )
