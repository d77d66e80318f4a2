"""Mismatched answers for KTO: each prompt with an answer that was given to another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlx_align.data.batching import scored
from mlx_align.data.shapes import ROUND
from mlx_align.errors import DataError
from mlx_align.types import TokenizedGroup

# Which completion of a group is which.
OWN, MISMATCHED = 0, 1


def with_mismatched(groups: Sequence[TokenizedGroup], seed: int) -> list[TokenizedGroup]:
    """Each group with a second completion: the answer of another prompt.

    Partners are neighbours in an order shuffled by `seed`, among answers of about the same
    length, so that pairing costs no padding. Neither the partner's prompt nor, where there is a
    choice, its answer is the group's own.

    Raises:
        DataError: All groups have the same prompt.
    """
    shuffled = np.random.default_rng((seed, 1)).permutation(len(groups))
    width = np.array([-(-len(group.completions[OWN]) // ROUND) for group in groups])
    order = [int(i) for i in shuffled[np.argsort(width[shuffled], kind="stable")]]
    prompts = [group.prompt.tobytes() for group in groups]
    answers = [group.completions[OWN].tobytes() for group in groups]
    paired = list(groups)
    for place, index in enumerate(order):
        fallback: int | None = None
        for step in range(1, len(order)):
            other = order[(place + step) % len(order)]
            if prompts[other] == prompts[index]:
                continue
            if answers[other] != answers[index]:
                break
            fallback = other if fallback is None else fallback
        else:
            if fallback is None:
                raise DataError(
                    "all rows of a split have one prompt; the KL point of kto needs two at least "
                    "(--loss apo_zero_unpaired needs none)"
                )
            other = fallback
        paired[index] = _joined(groups[index], groups[other])
    return paired


def _joined(group: TokenizedGroup, partner: TokenizedGroup) -> TokenizedGroup:
    masks = None
    if group.loss_masks is not None or partner.loss_masks is not None:
        masks = (scored(group, OWN), scored(partner, OWN))
    completions = (group.completions[OWN], partner.completions[OWN])
    return replace(group, completions=completions, loss_masks=masks)
