"""Reading rows to be scored: pairs, lists, single answers and conversations, in the row's order.

Unlike in training, no row is without use: one that can't be scored keeps its place, with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlx_align.data import pair_converters
from mlx_align.data.conversations import Unusable, as_messages, as_text, need
from mlx_align.data.converters import group, with_system
from mlx_align.data.formats import PREFERENCE_FORMATS, Data, Format, recognise
from mlx_align.data.sources import Row, read_rows
from mlx_align.errors import ConfigError, DataError
from mlx_align.types import PromptGroup


def single(row: Row) -> PromptGroup:
    """`prompt` and `completion`, whatever its label."""
    prompt = as_text(row, "prompt", need(row, "prompt"))
    answer = as_text(row, "completion", need(row, "completion"))
    return group(row, with_system(row, prompt), [answer], ("prompt", "completion", "system"))


def last_answer(row: Row) -> PromptGroup:
    """`messages` or `conversations`: the last turn is the answer that is scored."""
    key = "conversations" if "conversations" in row.fields else "messages"
    turns = as_messages(row, key, need(row, key))
    if len(turns) < 2:
        raise DataError(f"{row.source}: {key!r} holds one turn; expected a question and an answer")
    return group(row, with_system(row, turns[:-1]), [turns[-1:]], (key, "system"))


PAIR_FORMATS = tuple(entry for entry in PREFERENCE_FORMATS if entry.name != "ranked")
_RANKED = next(entry for entry in PREFERENCE_FORMATS if entry.name == "ranked")
LIST_FORMATS = (
    Format(
        "completions", "prompts with lists of completions", _RANKED.matches, pair_converters.listed
    ),
)
SINGLE_FORMATS = (
    Format(
        "completion",
        "prompts with completions",
        lambda row: {"prompt", "completion"} <= row.fields.keys(),
        single,
    ),
    Format(
        "conversation",
        "conversations, the last answer counting",
        lambda row: bool({"messages", "conversations"} & row.fields.keys()),
        last_answer,
    ),
)


@dataclass(frozen=True, slots=True)
class Scorable:
    """A row, and its group or why it has none."""

    row: Row
    group: PromptGroup | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ScorableRows:
    """The rows of a file, and what they were read as.

    Attributes:
        title: In words.
        rows: In the file's order.
        format: How each is read.
    """

    title: str
    rows: list[Row]
    format: Format

    @property
    def is_pairs(self) -> bool:
        """Whether the first completion of each row is labelled the better one."""
        return self.format in PAIR_FORMATS

    def __iter__(self) -> Iterator[Scorable]:
        """The rows one by one, read as they are asked for.

        Raises:
            DataError: A row is not of the format that the first row has.
        """
        for row in self.rows:
            try:
                yield Scorable(row, self.format.convert(row))
            except Unusable as reason:
                yield Scorable(row, None, str(reason))


def read_scorable(data: Data, split: str = "train", format: str | None = None) -> ScorableRows:
    """Open data to be scored; arguments as in `formats.read_preferences`.

    Raises:
        ConfigError: There is no such format.
        DataError: The data can't be read, or its first row is not recognised.
    """
    preferred = (PAIR_FORMATS + LIST_FORMATS, SINGLE_FORMATS)
    every = {entry.name: entry for entries in preferred for entry in entries}
    if format is not None and format not in every:
        raise ConfigError(
            f"--format {format}: not a format of data to score (those: {', '.join(every)})"
        )
    rows = read_rows(data, split)
    chosen = every[format] if format is not None else recognise(rows[0], "scorable", preferred)
    return ScorableRows(chosen.title, rows, chosen)
