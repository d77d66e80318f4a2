r"""The rewards that come along, run in our own process.

Each function here takes the options of `--reward "length(target=200)"` and makes a reward: a pure
function of one completion's text, its facts and its row's other fields. None means that a
completion has no reward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mlx_align.errors import ConfigError
from mlx_align.rollout.answers import first_number, last_number, marked_answer, plain, whole_number

# Reasoning, then an answer, as DeepSeek-R1-Zero is asked for (DeepSeek-AI 2025, table 1).
THINK_ANSWER = r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*"
# DAPO's buffer: 4,096 of 20,480 tokens.
_BUFFER = 0.2


@dataclass(frozen=True, slots=True)
class CompletionFacts:
    """What of a completion its text doesn't tell.

    Attributes:
        tokens: Tokens sampled, the end token among them.
        ended: Whether it ended by itself: its end token was sampled, not forced, nor was it cut.
        max_tokens: The most tokens it could have had.
    """

    tokens: int
    ended: bool
    max_tokens: int


Columns = Mapping[str, Any]
Reward = Callable[[str, CompletionFacts, Columns], float | None]


def exact_answer(*, column: str = "answer") -> Reward:
    r"""1 for the right final answer, 0 for another or none; None where there is no gold answer.

    A completion's final answer is what follows its last `####`, else what its last `\boxed{}`
    holds, else its last number. The gold answer is the field `column`, or what is so marked in it.
    Numbers are compared as numbers: 1,200 is $1200.00, and 0.5 is 1/2; % is left out. A gold answer
    that is no number is compared as text, blanks and case apart, with what is marked or, where
    nothing is, with the whole completion.

    Source: GSM8K (Cobbe et al. 2021), whose solutions end with `#### 72`.
    """
    _need(isinstance(column, str), "column: expected a name")

    def reward(text: str, facts: CompletionFacts, columns: Columns) -> float | None:
        gold = columns.get(column)
        if gold is None or gold == "":
            return None
        if not isinstance(gold, str | int | float):
            kind = type(gold).__name__
            raise ConfigError(f"column {column!r} holds a {kind}; expected text or a number")
        marked = marked_answer(text)
        wanted = _gold(gold)
        if isinstance(wanted, str):
            return float(plain(text if marked is None else marked) == wanted)
        found = last_number(text) if marked is None else first_number(marked)
        return float(found is not None and found == wanted)

    return reward


def _gold(gold: str | int | float) -> Fraction | str:
    if isinstance(gold, int | float) and not isinstance(gold, bool):
        return Fraction(str(gold))
    marked = marked_answer(str(gold))
    text = str(gold) if marked is None else marked
    number = whole_number(text)
    return plain(text) if number is None else number


def format(*, pattern: str = THINK_ANSWER) -> Reward:
    r"""1 where the whole completion fits a regular expression, else 0; a dot is any character.

    Without a pattern: `<think>…</think>` and then `<answer>…</answer>`, once each, and nothing
    else.
    """
    compiled = _compiled(pattern, re.DOTALL)
    return lambda text, facts, columns: float(compiled.fullmatch(text) is not None)


def regex(*, pattern: str) -> Reward:
    """1 where a regular expression is found in the completion, else 0."""
    compiled = _compiled(pattern)
    return lambda text, facts, columns: float(compiled.search(text) is not None)


def length(*, target: float | None = None, unit: str = "tokens") -> Reward:
    """How near n tokens (or words) are to a target: max(0, 1 − |n − target| / target).

    Without a target, shorter is better: 1 − n / (the most tokens a completion may have).
    """
    _need(unit in ("tokens", "words"), f"unit {unit!r}: expected 'tokens' or 'words'")
    _need(target is None or (_is_number(target) and target > 0), "target: expected more than 0")
    _need(target is not None or unit == "tokens", "unit 'words' needs a target")

    def reward(text: str, facts: CompletionFacts, columns: Columns) -> float:
        count = facts.tokens if unit == "tokens" else len(text.split())
        if target is None:
            return max(0.0, 1 - count / facts.max_tokens)
        return max(0.0, 1 - abs(count - target) / target)

    return reward


def repetition(*, n: int = 4) -> Reward:
    """A penalty: minus the share of n-grams of words that were there before; 0 to −1.

    −(1 − distinct / all), case apart; 0 where there are fewer than n words.

    Source: the repetition penalty of Yeo et al. 2025, "Demystifying Long Chain-of-Thought
    Reasoning in LLMs", as a share of all n-grams.
    """
    _need(isinstance(n, int) and n >= 1, "n: expected a whole number of at least 1")

    def reward(text: str, facts: CompletionFacts, columns: Columns) -> float:
        words = text.lower().split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0

    return reward


def overlong(*, max_tokens: int | None = None, buffer: int | None = None) -> Reward:
    """DAPO's soft penalty of over-long completions, of n tokens: 0 to −1.

    0 up to max_tokens − buffer, then (max_tokens − buffer − n) / buffer, −1 above max_tokens.

    Args:
        max_tokens: Default: the most that a completion may have.
        buffer: Default: a fifth of max_tokens, as in the paper.

    Source: Yu et al. 2025, "DAPO", equation 13.
    """
    for name, value in (("max_tokens", max_tokens), ("buffer", buffer)):
        right = value is None or (isinstance(value, int) and value >= 1)
        _need(right, f"{name}: expected a whole number of at least 1")
    _need(
        max_tokens is None or buffer is None or buffer <= max_tokens,
        "buffer: expected at most max_tokens",
    )

    def reward(text: str, facts: CompletionFacts, columns: Columns) -> float:
        most = max_tokens or facts.max_tokens
        width = min(buffer, most) if buffer else max(1, round(_BUFFER * most))
        return min(0.0, max(-1.0, (most - width - facts.tokens) / width))

    return reward


BUILTIN_REWARDS: Mapping[str, Callable[..., Reward]] = {
    maker.__name__: maker for maker in (exact_answer, format, regex, length, repetition, overlong)
}


def _need(right: bool, otherwise: str) -> None:
    if not right:
        raise ConfigError(otherwise)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _compiled(pattern: str, flags: int = 0) -> re.Pattern[str]:
    _need(isinstance(pattern, str), "pattern: expected text")
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ConfigError(f"pattern: no regular expression ({error})") from None
