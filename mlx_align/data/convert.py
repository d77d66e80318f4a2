"""Write data of any format as plain rows: messages, and the labels under their usual names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from mlx_align.data.formats import (
    PREFERENCE_FORMATS,
    PROMPT_FORMATS,
    SUPERVISED_FORMATS,
    UNPAIRED_FORMATS,
    Format,
    ReadReport,
    detect_format,
    read_preferences,
    read_prompts,
    read_supervised,
    read_unpaired,
)
from mlx_align.data.messages import text_as_json
from mlx_align.data.readers import DataSource, read_rows
from mlx_align.types import Message, PromptGroup

_Reader = Callable[[DataSource, str, str | None], tuple[list[PromptGroup], ReadReport]]
_KINDS: tuple[tuple[tuple[Format, ...], _Reader], ...] = (
    (PREFERENCE_FORMATS, read_preferences),
    (UNPAIRED_FORMATS, read_unpaired),
    (SUPERVISED_FORMATS, read_supervised),
    (PROMPT_FORMATS, read_prompts),
)


def read_any(
    data: DataSource, split: str, format: str | None
) -> tuple[list[PromptGroup], ReadReport]:
    """Read data as the first kind that it is: preferences, labelled, demonstrations, prompts.

    Raises:
        DataError: It has another format, or can't be read.
    """
    if format is None:
        row = read_rows(data, split)[0]
        kinds = [formats for formats, _ in _KINDS]
        formats = next((f for f in kinds if any(one.matches(row) for one in f)), None)
        if formats is None:
            detect_format(row, "preference", kinds)  # raises, with the mapping to try
        reader = next(read for known, read in _KINDS if known is formats)
    else:
        named = (read for formats, read in _KINDS if format in {one.name for one in formats})
        reader = next(named, read_preferences)
    return reader(data, split, format)


def plain_row(group: PromptGroup) -> dict[str, Any]:
    """A group as a row that is read as the same group.

    Pairs become `prompt`, `chosen`, `rejected`; longer lists `completions` and `scores`; single
    completions `completion` and `label`, `messages` or `text`; prompts keep their other columns.
    Text stays text, because it is trained on without a chat template.
    """
    row: dict[str, Any] = {"prompt": text_as_json(group.prompt)}
    texts = [text_as_json(text) for text in group.completions]
    if len(texts) == 2:
        row.update(zip(("chosen", "rejected"), texts, strict=True))
        if group.scores is not None:
            row.update(zip(("score_chosen", "score_rejected"), group.scores, strict=True))
    elif len(texts) > 2:
        row.update(completions=texts, scores=list(group.scores or ()))
    elif texts and group.label is not None:
        row.update(completion=texts[0], label=group.label)
    elif texts and isinstance(group.prompt, str):
        row = (
            {"prompt": group.prompt, "completion": texts[0]} if group.prompt else {"text": texts[0]}
        )
    elif texts:
        row = {"messages": [*row["prompt"], *texts[0]]}
    else:
        row = {**group.columns, **row}
    for name in ("soft_label", "margin"):
        if getattr(group, name) is not None:
            row[name] = getattr(group, name)
    if group.tools:
        row["tools"] = list(group.tools)
    return row


def as_messages(group: PromptGroup) -> PromptGroup:
    """A group of text as a conversation: the prompt by the user, completions by the assistant.

    Groups of messages, and text without a prompt, are returned unchanged.
    """
    if not isinstance(group.prompt, str) or not group.prompt:
        return group
    return replace(
        group,
        prompt=(Message("user", group.prompt.strip()),),
        completions=tuple(
            (Message("assistant", text.strip()),) if isinstance(text, str) else text
            for text in group.completions
        ),
    )


def unique_groups(groups: Iterable[PromptGroup]) -> list[PromptGroup]:
    """The groups without those whose prompt, completions and label equal an earlier one's."""
    seen: dict[Any, PromptGroup] = {}
    for group in groups:
        seen.setdefault((group.prompt, group.completions, group.label), group)
    return list(seen.values())
