"""What a group says of every two of its completions, for reward models.

Pairs and ranked lists take one way: a pair is a list of two. Groups of one data set are filled up
to a common number of completions, and fillers are compared with nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_align.data.batching import collate_groups
from mlx_align.data.shapes import AnyShape
from mlx_align.types import Comparisons, RewardBatch, TokenizedGroup

Floats = npt.NDArray[np.float32]


class Compared(NamedTuple):
    """One row of `Comparisons`, (P,) each."""

    probability: Floats
    margin: Floats
    weight: Floats


def compare(group: TokenizedGroup, *, rating_margin: float = 0.0, ties: str = "skip") -> Compared:
    """What is known of every two of a group's completions, which stand best first.

    Of a pair the order is the label, or its soft label the probability; of longer lists the
    ratings decide. Each two weigh 1/C(K,2), of K completions without fillers; equal completions
    are not compared.

    Args:
        group: A pair, or a ranked list with its ratings.
        rating_margin: Margin asked for per point that two ratings differ by; a margin the data
            names wins.
        ties: What two equal ratings of a list mean: nothing (`skip`), or that each wins half of
            the time (`half`).
    """
    count = len(group.completions)
    real = sum(len(completion) > 0 for completion in group.completions)
    first, second = np.triu_indices(count, 1)
    rating = np.zeros(count)
    if group.scores is not None:
        rating[: len(group.scores)] = group.scores
    probability = np.ones(len(first))
    weight = np.where((first < real) & (second < real), 1.0 / max(real * (real - 1) / 2, 1), 0.0)
    if real == 2:
        probability[0] = 1.0 if group.soft_label is None else group.soft_label
    else:
        tied = rating[first] == rating[second]
        probability[tied] = 0.5
        if ties == "skip":
            weight[tied] = 0.0
    for column, (i, j) in enumerate(zip(first, second, strict=True)):
        if np.array_equal(group.completions[i], group.completions[j]):
            weight[column] = 0.0
    margin = rating_margin * np.abs(rating[first] - rating[second])
    if group.margin is not None:
        margin[0] = group.margin
    return Compared(*(column.astype(np.float32) for column in (probability, margin, weight)))


def filled_up(groups: Sequence[TokenizedGroup]) -> list[TokenizedGroup]:
    """The groups, all with as many completions as the longest list has; fillers have no tokens."""
    most = max((len(group.completions) for group in groups), default=0)
    nothing = np.zeros(0, np.int32)
    no_mask = np.zeros(0, np.bool_)

    def fill(group: TokenizedGroup) -> TokenizedGroup:
        missing = most - len(group.completions)
        masks = group.loss_masks
        return replace(
            group,
            completions=(*group.completions, *[nothing] * missing),
            loss_masks=None if masks is None else (*masks, *[no_mask] * missing),
        )

    return [fill(group) for group in groups]


def folds(groups: Sequence[TokenizedGroup], count: int, seed: int) -> npt.NDArray[np.int64]:
    """Per group, the one of `count` folds it falls into; all groups of a prompt fall together."""
    prompts = {group.prompt.tobytes(): 0 for group in groups}
    order = np.random.default_rng((seed, count)).permutation(len(prompts))
    for position, prompt in enumerate(prompts):
        prompts[prompt] = int(order[position]) % count
    return np.array([prompts[group.prompt.tobytes()] for group in groups], np.int64)


def members_that_learn(
    groups: Sequence[TokenizedGroup], members: int, seed: int
) -> npt.NDArray[np.float32]:
    """(groups, members), 1 where a member learns from a group: each leaves its own fold out."""
    if members == 1:
        return np.ones((len(groups), 1), np.float32)
    fold = folds(groups, members, seed)
    return (fold[:, None] != np.arange(members)[None]).astype(np.float32)


def collate_rewards(
    groups: Sequence[TokenizedGroup],
    compared: Sequence[Compared],
    learns: npt.NDArray[np.float32],
    shape: AnyShape,
) -> RewardBatch:
    """Pad groups of equally many completions, with what is known of each two of them.

    Args:
        groups: The groups of the microbatch.
        compared: What `compare` gave for each.
        learns: (groups, members), as `members_that_learn` gave it for each.
        shape: Widths, and groups of a full microbatch.
    """
    missing = shape.groups - len(groups)

    def rows(values: Sequence[npt.NDArray[np.float32]]) -> mx.array:
        array = np.stack(values).astype(np.float32)
        return mx.array(np.pad(array, [(0, missing), (0, 0)]))

    return RewardBatch(
        groups=collate_groups(groups, shape),
        comparisons=Comparisons(*(rows(column) for column in zip(*compared, strict=True))),
        weight=mx.array((np.arange(shape.groups) < len(groups)).astype(np.float32)),
        learns=rows(list(learns)),
    )
