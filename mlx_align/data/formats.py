"""Recognising what a data file means, and reading it into prompt groups.

A format is a signature (which fields, of which shape) and a converter. The first row decides; the
other rows have to fit it. Rows that fit two formats with different meanings are refused rather
than guessed at, and `format=` settles it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mlx_align.data import converters, pair_converters
from mlx_align.data.conversations import Unusable
from mlx_align.data.groups import to_pairs, unpair
from mlx_align.data.sources import Row, read_rows
from mlx_align.errors import ConfigError, DataError
from mlx_align.types import PromptGroup


@dataclass(frozen=True, slots=True)
class Format:
    """A data format: its name for `--format`, how it is announced, and how it is read."""

    name: str
    title: str
    matches: Callable[[Row], bool]
    convert: Callable[[Row], PromptGroup]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a file was read as. `str()` of it is the line a command prints.

    Attributes:
        format: Name of the format, as `--format` takes it.
        title: The same in words.
        rows: Rows in the file.
        dropped: Rows nothing can be learned from, by reason.
    """

    format: str
    title: str
    rows: int
    dropped: Mapping[str, int]

    def __str__(self) -> str:
        line = f"read as: {self.title}"
        if not self.dropped:
            return line
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        return f"{line} ({sum(self.dropped.values())} of {self.rows} rows dropped: {reasons})"


def _has(row: Row, *keys: str) -> bool:
    return any(key in row.fields for key in keys)


def _is_pair(row: Row) -> bool:
    return _has(row, "chosen", "rejected")


def _holds_prompt(row: Row) -> bool:
    return pair_converters.holds_prompt(row.fields.get("chosen"))


PREFERENCE_FORMATS = (
    Format(
        "pairs",
        "pairs (prompt, chosen, rejected)",
        lambda row: (
            _is_pair(row)
            and _has(row, "prompt")
            and not _holds_prompt(row)
            and not pair_converters.holds_transcript(row)
        ),
        pair_converters.pair,
    ),
    Format(
        "implicit",
        "pairs with the prompt inside chosen and rejected",
        lambda row: (
            _is_pair(row)
            and not _has(row, "prompt", "conversations", *converters.QUESTIONS)
            and not pair_converters.holds_transcript(row)
        ),
        pair_converters.implicit_pair,
    ),
    Format(
        "hh-rlhf",
        "HH-RLHF text",
        lambda row: _is_pair(row) and pair_converters.holds_transcript(row),
        pair_converters.transcript_pair,
    ),
    Format(
        "ultrafeedback",
        "UltraFeedback pairs (whole conversations)",
        lambda row: _is_pair(row) and _has(row, "prompt") and _holds_prompt(row),
        pair_converters.whole_conversation_pair,
    ),
    Format(
        "openai",
        "OpenAI preference pairs",
        lambda row: _has(row, "preferred_output", "non_preferred_output"),
        pair_converters.openai_pair,
    ),
    Format(
        "sharegpt",
        "ShareGPT conversations with chosen and rejected",
        lambda row: _is_pair(row) and _has(row, "conversations"),
        pair_converters.sharegpt_pair,
    ),
    Format(
        "instruction",
        "instructions with chosen and rejected",
        lambda row: _is_pair(row) and _has(row, *converters.QUESTIONS),
        pair_converters.instruction_pair,
    ),
    Format(
        "ranked",
        "ranked completions",
        lambda row: (
            _has(row, *pair_converters.COMPLETION_LISTS)
            and _has(row, "prompt", *converters.QUESTIONS)
        ),
        pair_converters.ranked,
    ),
)
UNPAIRED_FORMATS = (
    Format(
        "unpaired",
        "unpaired rows (prompt, completion, label)",
        lambda row: _has(row, "completion") and _has(row, "label"),
        converters.unpaired,
    ),
    Format(
        "unpaired-conversation",
        "labelled conversations",
        lambda row: _has(row, "messages", "conversations") and _has(row, "label", "kto_tag"),
        converters.unpaired_conversation,
    ),
)
SUPERVISED_FORMATS = (
    Format(
        "completion",
        "prompts with completions",
        lambda row: _has(row, "prompt") and _has(row, "completion"),
        converters.prompt_completion,
    ),
    Format(
        "conversation",
        "conversations, every answer counting",
        lambda row: _has(row, "messages", "conversations"),
        converters.conversation,
    ),
    Format(
        "instruction-output",
        "instructions with outputs",
        lambda row: _has(row, "output") and _has(row, *converters.QUESTIONS),
        converters.instruction_output,
    ),
    Format("text", "plain text", lambda row: _has(row, "text"), converters.plain_text),
)
PROMPT_FORMATS = (
    Format(
        "prompts",
        "prompts",
        lambda row: _has(row, "prompt", *converters.QUESTIONS),
        converters.prompt_only,
    ),
    Format(
        "conversation-prompts",
        "conversations up to the last question",
        lambda row: (
            _has(row, "messages", "conversations")
            and not _has(row, "prompt", *converters.QUESTIONS)
        ),
        converters.conversation_prompt,
    ),
)
_EXPECTED = {
    "preference": "prompt, chosen and rejected (or another pair format)",
    "unpaired": "prompt, completion and label (or pairs)",
    "supervised": "messages, prompt and completion, or text",
    "prompts": "prompt, question or messages",
    "scorable": "pairs, or a prompt with completion, completions or messages",
}

# What `--format` may name.
FORMAT_NAMES: tuple[str, ...] = tuple(
    entry.name
    for entry in (*PREFERENCE_FORMATS, *UNPAIRED_FORMATS, *SUPERVISED_FORMATS, *PROMPT_FORMATS)
)

Data = str | os.PathLike[str]


def read_preferences(
    data: Data, split: str = "train", format: str | None = None
) -> tuple[list[PromptGroup], Reading]:
    """Read preference data: pairs (chosen first, rejected second) or ranked lists (best first).

    Args:
        data: A file, folder or dataset name, as in `sources.read_rows`.
        split: `train`, `valid` or `test`.
        format: A name of `PREFERENCE_FORMATS`; by default it is recognised.

    Raises:
        DataError: The data can't be read, isn't preference data, fits several formats, or holds
            no usable row.
    """
    return _read(data, split, format, "preference", PREFERENCE_FORMATS)


def read_unpaired(
    data: Data, split: str = "train", format: str | None = None
) -> tuple[list[PromptGroup], Reading]:
    """Read labelled single answers (KTO); pairs are taken apart into a good and a bad answer.

    Arguments and errors as in `read_preferences`.
    """
    groups, reading = _read(data, split, format, "unpaired", UNPAIRED_FORMATS, PREFERENCE_FORMATS)
    if all(group.label is not None for group in groups):
        return groups, reading
    title = f"{reading.title}, taken apart into good and bad answers"
    return unpair(to_pairs(groups)), replace(reading, title=title)


def read_supervised(
    data: Data, split: str = "train", format: str | None = None
) -> tuple[list[PromptGroup], Reading]:
    """Read demonstrations: one completion a group; of preference data, the best one.

    Arguments and errors as in `read_preferences`.
    """
    groups, reading = _read(
        data, split, format, "supervised", SUPERVISED_FORMATS, PREFERENCE_FORMATS
    )
    if all(len(group.completions) == 1 for group in groups):
        return groups, reading
    best = [
        replace(group, completions=group.completions[:1], scores=None, soft_label=None)
        for group in groups
    ]
    return best, replace(reading, title=f"the best answers of {reading.title}")


def read_prompts(
    data: Data, split: str = "train", format: str | None = None
) -> tuple[list[PromptGroup], Reading]:
    """Read prompts to answer: groups without completions, other fields kept in `columns`.

    Of preference data the prompts are taken. Arguments and errors as in `read_preferences`.
    """
    # Beside a prompt, a list of completions may be anything; it stays in the columns.
    pairs = tuple(entry for entry in PREFERENCE_FORMATS if entry.name != "ranked")
    groups, reading = _read(data, split, format, "prompts", pairs, PROMPT_FORMATS)
    if all(not group.completions for group in groups):
        return groups, reading
    bare = [
        replace(group, completions=(), scores=None, soft_label=None, margin=None)
        for group in groups
    ]
    return bare, replace(reading, title=f"the prompts of {reading.title}")


def _read(
    data: Data, split: str, format: str | None, kind: str, *preferred: Sequence[Format]
) -> tuple[list[PromptGroup], Reading]:
    allowed = [entry for entries in preferred for entry in entries]
    if format is not None and format not in {entry.name for entry in allowed}:
        names = ", ".join(entry.name for entry in allowed)
        raise ConfigError(f"--format {format}: not a format of {kind} data (those: {names})")
    rows = read_rows(data, split)
    chosen = (
        next(entry for entry in allowed if entry.name == format)
        if format is not None
        else recognise(rows[0], kind, preferred)
    )
    groups: list[PromptGroup] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        try:
            group = chosen.convert(row)
        except Unusable as reason:
            dropped[str(reason)] += 1
            continue
        if format is None and not chosen.matches(row):
            raise DataError(
                f"{row.source}: doesn't read as {chosen.title}, which the first row is; separate "
                f"the files, or force one reading with --format {chosen.name}"
            )
        _check_alike(group, groups)
        groups.append(group)
    if not groups:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        where = rows[0].source.rpartition(":")[0]
        raise DataError(f"{where}: none of the {len(rows)} rows is of use ({reasons})")
    return groups, Reading(chosen.name, chosen.title, len(rows), dict(dropped))


def recognise(row: Row, kind: str, preferred: Sequence[Sequence[Format]]) -> Format:
    """The one format the row fits; formats of the second kind only count where no first does."""
    for entries in preferred:
        found = [entry for entry in entries if entry.matches(row)]
        if len(found) == 1:
            return found[0]
        if found:
            names = " and ".join(entry.name for entry in found)
            raise DataError(f"{row.source}: fits the formats {names}; say which with --format")
    if kind == "preference" and _has(row, "completion") and _has(row, "prompt"):
        raise DataError(
            f"{row.source}: prompt and completion, but no pair; expected chosen and rejected "
            "(labelled single answers are for kto, unlabelled ones for sft)"
        )
    found_keys = ", ".join(map(repr, row.fields))[:120] or "no fields"
    raise DataError(
        f"{row.source}: not recognised as {kind} data; found {found_keys}, expected "
        f"{_EXPECTED[kind]}"
    )


def _check_alike(group: PromptGroup, groups: Sequence[PromptGroup]) -> None:
    """Text and conversations take different ways to tokens: one file holds one of them."""
    if groups and isinstance(group.prompt, str) != isinstance(groups[0].prompt, str):
        kinds = ("text", "messages") if isinstance(group.prompt, str) else ("messages", "text")
        raise DataError(
            f"{group.source}: the prompt is {kinds[0]} where {groups[0].source} has {kinds[1]}; "
            "write all rows alike"
        )
