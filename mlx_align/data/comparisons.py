"""Pairwise comparisons of a group's completions, for reward models.

Pairs and ranked lists are treated alike: a pair is a list of two. All groups of a dataset are
padded to the same number of completions; padding completions are never compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_align.data.batching import collate_groups, prompt_numbers
from mlx_align.data.buckets import AnyShape
from mlx_align.types import Comparisons, RewardBatch, TokenizedGroup

Floats = npt.NDArray[np.float32]


class GroupComparisons(NamedTuple):
    """The comparisons of one group: one row of `Comparisons`, (P,) each."""

    probability: Floats
    margin: Floats
    weight: Floats


def compare_completions(
    group: TokenizedGroup, *, rating_margin: float = 0.0, ties: str = "skip"
) -> GroupComparisons:
    """Label every pair of completions of a group, which are ordered best first.

    In a pair, the first completion is better, with the probability of the soft label if there is
    one. In longer lists, the scores decide. Each comparison has the weight 1/C(K,2), where K is the
    number of completions without padding; identical completions have weight 0.

    Args:
        group: A pair, or a ranked list with scores.
        rating_margin: Margin per point of difference between two scores. A margin given in the
            data takes precedence.
        ties: How to treat equal scores in a list: `skip` ignores them, `half` gives both
            completions the probability 0.5.
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
    return GroupComparisons(
        *(column.astype(np.float32) for column in (probability, margin, weight))
    )


def pad_completion_lists(groups: Sequence[TokenizedGroup]) -> list[TokenizedGroup]:
    """Add empty completions so that all groups have as many as the longest list."""
    longest = max((len(group.completions) for group in groups), default=0)
    no_tokens = np.zeros(0, np.int32)
    no_mask = np.zeros(0, np.bool_)

    def pad(group: TokenizedGroup) -> TokenizedGroup:
        missing = longest - len(group.completions)
        masks = group.loss_masks
        return replace(
            group,
            completions=(*group.completions, *[no_tokens] * missing),
            loss_masks=None if masks is None else (*masks, *[no_mask] * missing),
        )

    return [pad(group) for group in groups]


def assign_folds(groups: Sequence[TokenizedGroup], count: int, seed: int) -> npt.NDArray[np.int64]:
    """Assign each group to one of `count` folds; groups with the same prompt share a fold."""
    prompts = prompt_numbers(groups)
    order = np.random.default_rng((seed, count)).permutation(len(np.unique(prompts)))
    return order[prompts] % count


def ensemble_mask(
    groups: Sequence[TokenizedGroup], members: int, seed: int
) -> npt.NDArray[np.float32]:
    """Mask of the groups that each member of an ensemble is trained on: all but its own fold.

    Returns:
        (groups, members), 1 if the member is trained on the group, else 0.
    """
    if members == 1:
        return np.ones((len(groups), 1), np.float32)
    fold = assign_folds(groups, members, seed)
    return (fold[:, None] != np.arange(members)[None]).astype(np.float32)


def collate_rewards(
    groups: Sequence[TokenizedGroup],
    comparisons: Sequence[GroupComparisons],
    member_mask: npt.NDArray[np.float32],
    shape: AnyShape,
) -> RewardBatch:
    """Collate groups with the same number of completions, and their comparisons.

    Args:
        groups: The groups of the microbatch.
        comparisons: Their comparisons, from `compare_completions`.
        member_mask: (groups, members), the rows of `ensemble_mask` for these groups.
        shape: The shape of the microbatch.
    """
    missing = shape.groups - len(groups)

    def rows(values: Sequence[npt.NDArray[np.float32]]) -> mx.array:
        array = np.stack(values).astype(np.float32)
        return mx.array(np.pad(array, [(0, missing), (0, 0)]))

    return RewardBatch(
        groups=collate_groups(groups, shape),
        comparisons=Comparisons(*(rows(column) for column in zip(*comparisons, strict=True))),
        weight=mx.array((np.arange(shape.groups) < len(groups)).astype(np.float32)),
        member_mask=rows(list(member_mask)),
    )
