"""Completions in their order: what became of a prompt, from scores to ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_align.data.pair_converters import RATING_LISTS
from mlx_align.errors import DataError, ModelError
from mlx_align.inference.scored import Scored
from mlx_align.models.generation import Generated
from mlx_align.types import Message, PromptGroup, Text

# Why a row of an output has no completions.
NOTE = "rerank_note"
# What a row may say of its completions in their old order.
_OF_OLD_ORDER = ("chosen", "rejected", *RATING_LISTS)


@dataclass(frozen=True, slots=True)
class Ranked:
    """A completion in its place.

    Attributes:
        text: Without its end token.
        score: Higher is better.
        index: Its place among the completions as given or sampled (of the first of its kind).
        count: How often it was sampled; a given completion stands for itself.
        cut: Whether it was cut at the most tokens allowed: it has no end token.
        tokens: Its length, end token included.
        policy_logp: Its log-prob, nats, under the policy; None beside a reward model's score.
        reference_logp: Under the reference; None likewise.
    """

    text: str
    score: float
    index: int
    count: int = 1
    cut: bool = False
    tokens: int = 0
    policy_logp: float | None = None
    reference_logp: float | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """What became of one prompt.

    Attributes:
        prompt: Its group, as asked.
        ranked: Its completions, best first; none where it could not be answered or scored.
        reason: Why there are none.
    """

    prompt: PromptGroup
    ranked: tuple[Ranked, ...]
    reason: str = ""


# A sampled completion, its place among the samples, and how often it is there.
Sample = tuple[Generated, int, int]


def different(completions: Sequence[Generated]) -> list[Sample]:
    """Those that differ, in the order in which they first come."""
    found: dict[tuple[int, ...], Sample] = {}
    for index, one in enumerate(completions):
        first, place, count = found.get(tuple(one.tokens), (one, index, 0))
        found[tuple(one.tokens)] = first, place, count + 1
    return list(found.values())


def ranking_of(
    group: PromptGroup,
    scored: Scored,
    texts: Sequence[str],
    samples: Sequence[Sample] | None = None,
) -> Ranking:
    """The completions of a group by their scores; equal ones keep their order.

    Args:
        group: The prompt.
        scored: Its completions' scores.
        texts: Their texts.
        samples: The same as sampled, where they were.

    Raises:
        ModelError: A score is not finite.
    """
    if scored.scores is None:
        return Ranking(group, (), scored.reason)
    scores = [float(score) for score in scored.scores]
    if not np.isfinite(scores).all():
        raise ModelError(f"{group.source}: a completion's score is not a finite number")
    lengths = [] if scored.tokens is None else [len(ids) for ids in scored.tokens.completions]
    ranked = []
    for k in sorted(range(len(scores)), key=lambda k: -scores[k]):
        one, index, count = (None, k, 1) if samples is None else samples[k]
        ranked.append(
            Ranked(
                text=texts[k],
                score=scores[k],
                index=index,
                count=count,
                cut=one is not None and not one.ended,
                tokens=lengths[k] if one is None else len(one.tokens),
                policy_logp=_of(scored.policy_logps, k),
                reference_logp=_of(scored.reference_logps, k),
            )
        )
    return Ranking(group, tuple(ranked))


def _of(values: Any, k: int) -> float | None:
    return None if values is None else float(values[k])


def text_of(completion: Text) -> str:
    """A completion for people: of several turns, the last."""
    return completion if isinstance(completion, str) else completion[-1].content


def as_answer(group: PromptGroup, text: str) -> Text:
    """An answer to the group's prompt, text beside text and a turn beside turns."""
    return text if isinstance(group.prompt, str) else (Message("assistant", text),)


def ranked_or_error(ranking: Ranking) -> list[Ranked]:
    """What is ranked.

    Raises:
        DataError: Nothing is.
    """
    if ranking.reason:
        raise DataError(f"can't be scored: {ranking.reason}")
    return list(ranking.ranked)


def as_row(ranking: Ranking) -> dict[str, Any]:
    """A ranking for programs: a row that is read as ranked completions, `data` of dpo and reward.

    The row's other fields are kept, but for what it said of completions in their old order.
    """
    group = ranking.prompt
    row = {name: value for name, value in group.columns.items() if name not in _OF_OLD_ORDER}
    row["prompt"] = group.prompt if isinstance(group.prompt, str) else _turns(group.prompt)
    if ranking.reason:
        return {**row, "completions": None, NOTE: ranking.reason}
    row["completions"] = [
        {name: value for name, value in asdict(one).items() if value is not None}
        for one in ranking.ranked
    ]
    return row


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in messages]
