"""Which pairs to ask people about first: those on which an ensemble of reward heads disagrees.

Source: Christiano et al. 2017, "Deep Reinforcement Learning from Human Preferences", section 2.2.4
(the variance of the predicted preference across an ensemble).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlx_align.data.judgements import AnswerPair
from mlx_align.errors import ConfigError
from mlx_align.evaluation.statistics import Floats, sigmoid
from mlx_align.inference.reward_model import RewardModel, open_reward_model
from mlx_align.preferences.verdicts import as_plain_text
from mlx_align.types import Message, PromptGroup, Text


def preference_disagreement(first: Floats, second: Floats) -> Floats:
    """How far the members of an ensemble disagree about pairs.

    Args:
        first: (n, members) scores of the first answer of each pair.
        second: (n, members) scores of the second.

    Returns:
        (n,) standard deviation over the members of σ(first − second), 0 to ½.
    """
    found: Floats = sigmoid(first - second).std(axis=1)
    return found


def score_disagreement(
    model: RewardModel, pairs: Sequence[tuple[Text, Text, Text]]
) -> npt.NDArray[np.float64]:
    """The disagreement of a reward model's heads on pairs (prompt, answer, answer).

    Args:
        model: An ensemble.
        pairs: The pairs.

    Returns:
        (n,) as `preference_disagreement`; NaN for pairs that can't be scored.

    Raises:
        ConfigError: The reward model has a single head.
    """
    groups = [_group(*pair) for pair in pairs]
    found = np.full(len(pairs), np.nan)
    for index, scored in enumerate(model.score_groups(groups)):
        if scored.members is None:
            continue
        if scored.members.shape[1] < 2:
            raise ConfigError(
                "--reward-model: has a single head, and disagreement needs an ensemble: mlx-align "
                "reward --members 5"
            )
        members = scored.members.astype(np.float64)
        found[index] = preference_disagreement(members[:1], members[1:2])[0]
    return found


def most_disagreement_first(disagreement: Floats) -> list[int]:
    """Indices of pairs, the largest disagreement first; those without a score come last."""
    known = np.where(np.isnan(disagreement), -1.0, disagreement)
    return [int(index) for index in np.argsort(-known, kind="stable")]


def select_pairs(
    pairs: Sequence[AnswerPair], count: int, reward_model: str | None, seed: int
) -> tuple[list[int], dict[int, float] | None]:
    """Indices of `count` pairs to label: at random, or those with the most disagreement.

    Args:
        pairs: The pairs.
        count: Number of pairs.
        reward_model: An ensemble: a run of `mlx-align reward` with several members; None to draw.
        seed: Random seed.

    Returns:
        The indices, and the disagreement of each; None if they were drawn.

    Raises:
        ConfigError: The reward model has a single head.
        ModelError: It can't be loaded.
    """
    if reward_model is None:
        drawn = np.random.default_rng(seed).permutation(len(pairs))[:count]
        return sorted(int(index) for index in drawn), None
    scores = score_disagreement(
        open_reward_model(reward_model), [(pair.prompt, pair.a, pair.b) for pair in pairs]
    )
    order = [index for index in most_disagreement_first(scores) if not np.isnan(scores[index])]
    return order[:count], {index: float(scores[index]) for index in order}


def _group(prompt: Text, first: Text, second: Text) -> PromptGroup:
    if isinstance(prompt, str):
        return PromptGroup(prompt, (as_plain_text(first), as_plain_text(second)), "a pair")
    turns = (
        (Message("assistant", one),) if isinstance(one, str) else one for one in (first, second)
    )
    return PromptGroup(prompt, tuple(turns), "a pair")
