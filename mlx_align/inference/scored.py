"""From text to what can be scored, and what became of it: shared by all that score completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_align.data.conversations import as_text
from mlx_align.data.rendering import ChatStyle
from mlx_align.data.sources import Row
from mlx_align.data.tokenize import TOO_LONG, try_tokenize_group
from mlx_align.errors import DataError
from mlx_align.types import Message, PromptGroup, Text, TokenizedGroup

Prompt = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Scored:
    """What became of one group.

    Attributes:
        scores: (K,) one per completion; None where the group can't be scored.
        members: (K, members) what the members of a reward model say.
        reason: Why there are none.
        tokens: The group as it was read; None where it could not be.
        policy_logps: (K,) summed log-probs of the policy, nats; None from a reward model.
        reference_logps: (K,) those of the reference; None where there is none.
    """

    scores: npt.NDArray[np.floating[Any]] | None
    members: npt.NDArray[np.float32] | None = None
    reason: str = ""
    tokens: TokenizedGroup | None = None
    policy_logps: npt.NDArray[np.float64] | None = None
    reference_logps: npt.NDArray[np.float64] | None = None


def tokenize_to_score(
    groups: Sequence[PromptGroup], style: ChatStyle, max_seq_length: int
) -> list[TokenizedGroup | Scored]:
    """Each group as tokens, or why it gets no scores."""
    found: list[TokenizedGroup | Scored] = []
    for group in groups:
        result = try_tokenize_group(
            group, style, max_seq_length=max_seq_length, drop_identical=False
        )
        if result.group is not None:
            found.append(result.group)
            continue
        reason = result.dropped or ""
        if reason == TOO_LONG:
            reason += f" ({result.length} tokens, at most {max_seq_length})"
        found.append(Scored(None, reason=reason + (result.detail and f": {result.detail}")))
    return found


def as_group(
    where: str, prompt: Prompt, completions: Sequence[str | Sequence[Mapping[str, str]]]
) -> PromptGroup:
    """A prompt and its completions as Python callers give them.

    Raises:
        DataError: One of them is neither text nor messages, or there are no completions.
    """
    row = Row(where, {})
    if isinstance(completions, str) or not completions:
        raise DataError(f"{where}: completions has to be a list of at least one")
    question = as_prompt(where, prompt)
    answers: list[Text] = [as_text(row, "completions", _plain(text)) for text in completions]
    if not isinstance(question, str) or any(not isinstance(text, str) for text in answers):
        question = (Message("user", question),) if isinstance(question, str) else question
        answers = [
            (Message("assistant", text),) if isinstance(text, str) else text for text in answers
        ]
    return PromptGroup(question, tuple(answers), where)


def as_prompt(where: str, prompt: Prompt) -> Text:
    """A prompt as Python callers give it.

    Raises:
        DataError: It is neither text nor messages.
    """
    return as_text(Row(where, {}), "prompt", _plain(prompt))


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else [dict(turn) for turn in value]
