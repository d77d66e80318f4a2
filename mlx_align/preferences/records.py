"""The files of `data sample` and `label`: answers to prompts, and judgements of people.

A line of a file of answers is a prompt with K answers, and how each was sampled. A line of a file
of judgements is one verdict of one rater (`mlx_align.data.judgements`); lines are added and never
changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_align.data.judgements import (
    DECIDED,
    Judgement,
    is_judgement,
    latest_judgements,
    read_judgement,
)
from mlx_align.data.messages import text_as_json
from mlx_align.data.readers import Row, read_rows
from mlx_align.errors import DataError
from mlx_align.system.row_file import append_rows, remove_partial_line
from mlx_align.types import Text


@dataclass(frozen=True, slots=True)
class Answers:
    """K answers to a prompt: one line of a file of answers.

    `read_scorable` reads such files as prompts with lists of completions; `models` and `arms` are
    in its columns.

    Attributes:
        prompt: The prompt, without the system prompts of arms.
        completions: The answers.
        models: The model that wrote each.
        arms: Name of the arm that each came from.
        columns: The other fields of the prompt's row.
    """

    prompt: Text
    completions: Sequence[str]
    models: Sequence[str]
    arms: Sequence[str]
    columns: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The line of the file."""
        return {
            **self.columns,
            "prompt": text_as_json(self.prompt),
            "completions": list(self.completions),
            "models": list(self.models),
            "arms": list(self.arms),
        }


class JsonLog:
    """A JSONL file to which lines are added, each flushed to the disk before `add` returns.

    Several processes may add to one file. A last line that is incomplete, because the process ended
    while it wrote, is removed.

    Args:
        file: The file; created with the first line.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        if file.is_file():
            remove_partial_line(file, shared=True)

    def rows(self) -> Iterator[Row]:
        """The rows in the file; none if there is no file yet.

        Raises:
            DataError: A line is not JSON.
        """
        if self.file.is_file() and self.file.stat().st_size:
            yield from read_rows(self.file)

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Add lines, all or none.

        Raises:
            WriteError: The file can't be written.
        """
        append_rows(self.file, rows, shared=True)


class JudgementLog:
    """A file of judgements: reads those that are there, and adds more.

    Args:
        file: The file; created with the first judgement.

    Raises:
        DataError: The file has a row that is not a judgement.
    """

    def __init__(self, file: Path) -> None:
        self._log = JsonLog(file)
        self.file = file
        self._all: list[Judgement] = []
        for row in self._log.rows():
            if not is_judgement(row):
                raise DataError(
                    f"{row.source}: not a judgement of mlx-align label; name another --output"
                )
            self._all.append(read_judgement(row))

    def add(self, judgement: Judgement) -> None:
        """Write a judgement.

        Raises:
            WriteError: The file can't be written.
        """
        self._log.add(judgement.to_dict())
        self._all.append(judgement)

    def latest(self) -> list[Judgement]:
        """The judgements that count."""
        return latest_judgements(self._all)

    def by(self, rater: str) -> dict[str, Judgement]:
        """The judgements of a rater that count, by pair."""
        return {one.pair.id: one for one in self.latest() if one.rater == rater}

    def decided(self) -> list[Judgement]:
        """The judgements that prefer an answer or call both equal."""
        return [one for one in self.latest() if one.winner in DECIDED]
