"""Transform groups: ranked lists to pairs, pairs to labelled completions, a validation split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_align.data.batching import completion_mask
from mlx_align.data.buckets import LENGTH_MULTIPLE
from mlx_align.errors import ConfigError, DataError, SplitError
from mlx_align.types import PromptGroup, Text, TokenizedGroup

# What a group has no longer when its completions are split up.
NO_LABELS: Mapping[str, Any] = {
    "scores": None,
    "soft_label": None,
    "margin": None,
    "strength": None,
    "votes": None,
}
# Indices of the two completions of a group after `add_mismatched`.
OWN, MISMATCHED = 0, 1


def to_pairs(groups: Sequence[PromptGroup], *, best_only: bool = False) -> list[PromptGroup]:
    """Convert ranked lists of K completions to pairs; groups of two are returned unchanged.

    Every two completions with different scores and different text make a pair.

    Args:
        groups: Groups of two or more completions. Longer ones need scores, best first.
        best_only: Pair only the best completion with each of the others: at most K − 1 pairs
            instead of K·(K − 1)/2.

    Raises:
        DataError: A list of more than two completions has no scores.
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
    """Split each pair into a desirable completion (chosen) and an undesirable one (rejected).

    With a soft label p, chosen is desirable with probability p, and rejected with 1 − p.
    """
    found = []
    for group in groups:
        p = group.soft_label
        good = p is None or p >= 0.5
        for text, label, soft in zip(
            group.completions, (good, not good), (p, None if p is None else 1 - p), strict=True
        ):
            one = replace(group, completions=(text,), label=label, **NO_LABELS)
            found.append(replace(one, soft_label=soft))
    return found


def keep_last_completion(groups: Sequence[PromptGroup]) -> list[PromptGroup]:
    """Move all turns up to the last user or tool turn of a conversation into the prompt."""
    return [_keep_last_completion(group) for group in groups]


def _keep_last_completion(group: PromptGroup) -> PromptGroup:
    (turns,) = group.completions
    if isinstance(turns, str) or isinstance(group.prompt, str):
        return group
    user_turns = [i for i, turn in enumerate(turns) if turn.role in ("user", "tool")]
    if not user_turns:
        return group
    start = user_turns[-1] + 1
    return replace(group, prompt=(*group.prompt, *turns[:start]), completions=(turns[start:],))


def split_validation(
    groups: Sequence[PromptGroup], fraction: float, seed: int, *, min_prompts: int = 1
) -> tuple[list[PromptGroup], list[PromptGroup]]:
    """Split groups into (train, valid). All groups with the same prompt go to the same split.

    Plain text has no prompt; there, all groups with the same text do.

    Args:
        groups: The groups; both splits keep their order.
        fraction: The fraction of groups to put into valid, in (0, 1). Both splits get at least one.
        seed: Random seed. The split is a function of the groups, the fraction and the seed.
        min_prompts: Prompts that valid needs; it has fewer only if train would be left with fewer.

    Raises:
        ConfigError: `fraction` is out of range.
        SplitError: There are fewer than two different prompts.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"--valid-fraction {fraction}: expected between 0 and 1")
    keys = [group.prompt or group.completions for group in groups]
    sizes = Counter(keys)
    if len(sizes) < 2:
        raise SplitError(
            "can't make a validation split: the data has fewer than two different prompts; "
            "add prompts, or provide a valid split"
        )
    prompts = list(sizes)
    target_size = fraction * len(groups)
    held_out: set[Text | tuple[Text, ...]] = set()
    size = 0
    min_prompts = min(min_prompts, len(sizes) // 2)
    for index in np.random.default_rng(seed).permutation(len(prompts)).tolist()[:-1]:
        enough = len(held_out) >= max(min_prompts, 1)
        if enough and size + sizes[prompts[index]] / 2 > target_size:
            break
        held_out.add(prompts[index])
        size += sizes[prompts[index]]
    return (
        [group for group, key in zip(groups, keys, strict=True) if key not in held_out],
        [group for group, key in zip(groups, keys, strict=True) if key in held_out],
    )


def add_mismatched(groups: Sequence[TokenizedGroup], seed: int) -> list[TokenizedGroup]:
    """Give each group a second completion, taken from another prompt, for the KL term of KTO.

    Partners are neighbours in an order shuffled by `seed` and sorted by length, so that padding
    stays small. A partner never has the same prompt, and has the same completion only if every
    other group does.

    Raises:
        DataError: All groups have the same prompt.
    """
    shuffled = np.random.default_rng((seed, 1)).permutation(len(groups))
    width = np.array([-(-len(group.completions[OWN]) // LENGTH_MULTIPLE) for group in groups])
    order = [int(i) for i in shuffled[np.argsort(width[shuffled], kind="stable")]]
    prompts = [group.prompt.tobytes() for group in groups]
    completions = [group.completions[OWN].tobytes() for group in groups]
    paired = list(groups)
    for place, index in enumerate(order):
        fallback: int | None = None
        for step in range(1, len(order)):
            other = order[(place + step) % len(order)]
            if prompts[other] == prompts[index]:
                continue
            if completions[other] != completions[index]:
                break
            fallback = other if fallback is None else fallback
        else:
            if fallback is None:
                raise DataError(
                    "all rows of a split have the same prompt; the KL estimate of kto needs at "
                    "least two prompts (or --loss apo_zero_unpaired)"
                )
            other = fallback
        paired[index] = _append_completion(groups[index], groups[other])
    return paired


def _append_completion(group: TokenizedGroup, partner: TokenizedGroup) -> TokenizedGroup:
    """The group with its own completion and the partner's."""
    masks = None
    if group.loss_masks is not None or partner.loss_masks is not None:
        masks = (completion_mask(group, OWN), completion_mask(partner, OWN))
    completions = (group.completions[OWN], partner.completions[OWN])
    return replace(group, completions=completions, loss_masks=masks)
