"""Questions for a judge and its verdicts: the prompt, and what counts as a reply."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mlx_align.types import Message, Text

# The verdicts, in the order of `Verdict`'s probabilities: the first answer, the second, a tie.
LABELS = ("A", "B", "C")
# A reply that is a verdict: the letter, with or without "Answer" and punctuation. "A good answer
# would …" is not.
_REPLY = re.compile(
    r"\W*(?:(?:the\s+)?(?:better\s+)?answer(?:\s+is)?\W*)?([ABC])\W*", re.IGNORECASE
)
# What tokenizers write for a space or a newline at the start of a token.
TOKEN_SPACES = "▁ĠĊ \n"
_SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison for a judge: a prompt and two answers, in the order in which they are shown.

    Attributes:
        prompt: The prompt.
        first: The answer shown first.
        second: The answer shown second.
        criteria: What to compare by: names and descriptions.
        source: File and line, for messages.
        columns: The other fields of the row, for reward functions.
    """

    prompt: Text
    first: Text
    second: Text
    criteria: Mapping[str, str]
    source: str = ""
    columns: Mapping[str, object] | None = None

    def swapped(self) -> Comparison:
        """The same comparison with the answers in the other order."""
        return Comparison(
            self.prompt, self.second, self.first, self.criteria, self.source, self.columns
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's verdict on one comparison.

    Attributes:
        first: Probability that the first answer is better; the three sum to 1.
        second: Probability that the second is.
        tie: Probability that they are equally good.
        mass: Probability of the verdicts among all that the judge could have answered.
        invalid: Why this is no verdict; empty for a valid one. The probabilities then mean nothing.
    """

    first: float
    second: float
    tie: float
    mass: float = 1.0
    invalid: str = ""

    @property
    def first_wins(self) -> float:
        """Probability that the first answer is better, with a tie as half."""
        return self.first + 0.5 * self.tie


class Judge(Protocol):
    """Compares answers."""

    @property
    def name(self) -> str:
        """The judge's name in the data, such as the model's."""

    @property
    def ignores_order(self) -> bool:
        """Whether both orders always give the same verdict, so that one is enough."""

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """The verdicts on comparisons, in their order.

        Raises:
            MlxAlignError: The judge can't be used any longer; verdicts so far are lost.
        """


def invalid_verdict(reason: str, mass: float = 0.0) -> Verdict:
    """A verdict that doesn't count."""
    return Verdict(0.0, 0.0, 0.0, mass, reason)


def verdict_from_probabilities(probabilities: Sequence[float], min_mass: float) -> Verdict:
    """The verdict of a model that gives these probabilities to A, B and C.

    Args:
        probabilities: Of the three labels among all tokens.
        min_mass: The verdict is invalid if they sum to less: the model would mostly answer with
            something else.
    """
    mass = sum(probabilities)
    if not mass >= max(min_mass, 1e-9):
        return invalid_verdict(f"only {mass:.1%} of the probability is on a verdict", mass)
    first, second, tie = (p / mass for p in probabilities)
    return Verdict(first, second, tie, mass)


def parse_reply(text: str) -> Verdict:
    """The verdict in a reply without probabilities: exactly one letter, else it is invalid."""
    found = _REPLY.fullmatch(text.strip())
    if found is None:
        shown = " ".join(text.split())[:40]
        return invalid_verdict(f"no verdict in the reply {shown!r}" if shown else "empty reply")
    label = found[1].upper()
    first, second, tie = (float(label == one) for one in LABELS)
    return Verdict(first, second, tie)


def label_of_token(token: str) -> str | None:
    """A, B or C if the token is that letter, with or without a space before it; else None."""
    text = token.strip(TOKEN_SPACES)
    return text if text in LABELS else None


def judge_prompt(comparison: Comparison) -> tuple[Message, ...]:
    """The conversation that asks a language model for a verdict of one letter."""
    if comparison.criteria:
        lines = "\n".join(
            f"- {name}: {text}" if text else f"- {name}"
            for name, text in comparison.criteria.items()
        )
        rubric = f"Compare the two answers by these criteria:\n{lines}"
    else:
        rubric = "Compare the two answers."
    content = (
        "Two assistants answered the same request.\n\n[Request]\n"
        f"{as_plain_text(comparison.prompt)}\n[End of request]\n\n[Answer A]\n"
        f"{as_plain_text(comparison.first)}\n[End of answer A]\n\n[Answer B]\n"
        f"{as_plain_text(comparison.second)}\n[End of answer B]\n\n{rubric}\n\n"
        "The order of the answers and their length are no reason to prefer one. Which answer is "
        "better? Reply with one letter: A, B, or C if they are equally good."
    )
    return (Message("user", content),)


def as_plain_text(text: Text) -> str:
    """Text or messages as plain text; a single turn without the name of its speaker."""
    if isinstance(text, str):
        return text.strip()
    if len(text) == 1:
        return text[0].content.strip()
    return "\n\n".join(
        f"{_SPEAKERS.get(turn.role, turn.role)}: {turn.content.strip()}" for turn in text
    )
