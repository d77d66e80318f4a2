"""Regrouping what was read: lists as pairs, pairs as answers, last answers, a part held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlx_align.errors import ConfigError, DataError
from mlx_align.types import PromptGroup


def to_pairs(groups: Sequence[PromptGroup], *, best_only: bool = False) -> list[PromptGroup]:
    """Ranked groups as pairs: every two completions of which one is rated strictly higher.

    Groups of two stay as they are.

    Args:
        groups: Groups of two or more; those of more than two carry scores, best first.
        best_only: Only the best completion against each lower one: K − 1 pairs at most, not
            K·(K − 1)/2.
    """
    pairs = []
    for group in groups:
        if len(group.completions) == 2:
            pairs.append(group)
            continue
        scores = group.scores
        if scores is None:
            raise DataError(f"{group.source}: {len(group.completions)} completions without scores")
        for better in range(1 if best_only else len(scores)):
            for worse in range(better + 1, len(scores)):
                chosen, rejected = group.completions[better], group.completions[worse]
                if scores[better] > scores[worse] and chosen != rejected:
                    pairs.append(
                        replace(
                            group,
                            completions=(chosen, rejected),
                            scores=(scores[better], scores[worse]),
                        )
                    )
    return pairs


def unpair(groups: Sequence[PromptGroup]) -> list[PromptGroup]:
    """Pairs taken apart: chosen as a desirable answer, rejected as an undesirable one."""
    return [
        replace(group, completions=(text,), label=label, scores=None, soft_label=None, margin=None)
        for group in groups
        for text, label in zip(group.completions, (True, False), strict=True)
    ]


def last_answers(groups: Sequence[PromptGroup]) -> list[PromptGroup]:
    """Conversations with all but what follows the last user's (or tool's) turn in the prompt."""
    return [_last_answer(group) for group in groups]


def _last_answer(group: PromptGroup) -> PromptGroup:
    (answer,) = group.completions
    if isinstance(answer, str) or isinstance(group.prompt, str):
        return group
    asked = [i for i, turn in enumerate(answer) if turn.role in ("user", "tool")]
    if not asked:
        return group
    start = asked[-1] + 1
    return replace(group, prompt=(*group.prompt, *answer[:start]), completions=(answer[start:],))


def split_validation(
    groups: Sequence[PromptGroup], fraction: float, seed: int
) -> tuple[list[PromptGroup], list[PromptGroup]]:
    """Part groups into (train, valid); all groups of one prompt fall on the same side.

    Args:
        groups: The groups, whose order is kept within both parts.
        fraction: The share of groups wanted in valid, in (0, 1); both parts get at least one.
        seed: Same seed and same groups, same parts.

    Raises:
        ConfigError: `fraction` is out of range.
        DataError: There are fewer than two different prompts.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"validation fraction {fraction}: expected between 0 and 1")
    sizes = Counter(group.prompt for group in groups)
    if len(sizes) < 2:
        raise DataError(
            "can't set rows aside for validation: they hold fewer than two different prompts; "
            "give a valid split"
        )
    prompts = list(sizes)
    wanted = fraction * len(groups)
    held_out = set()
    taken = 0
    for index in np.random.default_rng(seed).permutation(len(prompts)).tolist()[:-1]:
        if taken and taken + sizes[prompts[index]] / 2 > wanted:
            break
        held_out.add(prompts[index])
        taken += sizes[prompts[index]]
    return (
        [group for group in groups if group.prompt not in held_out],
        [group for group in groups if group.prompt in held_out],
    )
