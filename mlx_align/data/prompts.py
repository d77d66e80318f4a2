"""Prompts as token ids, ready to be answered: with the opening of an answer, and no answer yet.

They are cut from the chat template as those of pairs are, so a policy is given at sampling what it
was given in training before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_align.data.rendering import chat_style
from mlx_align.data.tokenize import percentiles, refuse_great_loss, try_tokenize_group
from mlx_align.errors import ConfigError
from mlx_align.types import PromptGroup, TokenizedGroup


@dataclass(frozen=True, slots=True)
class PromptReport:
    """What became of the prompts.

    Attributes:
        rows: Prompts given.
        places: Of those left, their places among the given.
        dropped: Prompts dropped, by reason.
        system_folded: Prompts whose system turn went in front of the first user turn.
        lengths: Percentiles of their tokens, before dropping: "50", "90", "99", "100" → tokens.
        notes: Sentences about the tokenizer that its user should read.
    """

    rows: int
    places: tuple[int, ...]
    dropped: Mapping[str, int]
    system_folded: int
    lengths: Mapping[str, int]
    notes: tuple[str, ...]


def tokenize_prompts(
    groups: Sequence[PromptGroup], tokenizer: Any, max_prompt_length: int
) -> tuple[list[TokenizedGroup], PromptReport]:
    """Prompts as token ids: groups without completions, and what became of all.

    Args:
        groups: Whatever they are, their completions are not looked at.
        tokenizer: An mlx-lm `TokenizerWrapper` or a Hugging Face tokenizer.
        max_prompt_length: In tokens; longer prompts are dropped, never cut.

    Raises:
        ConfigError: `max_prompt_length` is below 1.
        DataError: More than a tenth of the prompts would be dropped, or none is left.
    """
    if max_prompt_length < 1:
        raise ConfigError(f"--max-prompt-length {max_prompt_length}: expected at least 1")
    style = chat_style(tokenizer)
    results = [
        try_tokenize_group(
            replace(group, completions=(), scores=None), style, max_seq_length=max_prompt_length
        )
        for group in groups
    ]
    refuse_great_loss(results, "--max-prompt-length", max_prompt_length)
    kept = [(place, r.group) for place, r in enumerate(results) if r.group is not None]
    chats = any(not isinstance(group.prompt, str) for group in groups)
    return [group for _, group in kept], PromptReport(
        rows=len(results),
        places=tuple(place for place, _ in kept),
        dropped=dict(Counter(r.dropped for r in results if r.dropped is not None)),
        system_folded=sum(r.system_folded for r in results),
        lengths=percentiles([r.length for r in results if r.length]),
        notes=style.notes + (style.chat_notes if chats else ()),
    )
