"""`mlx-align data agreement`: join files of judgements into pairs with soft labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_align.config import AgreementConfig
from mlx_align.data.columns import ConfiguredSource, LabelRules
from mlx_align.data.convert import plain_row
from mlx_align.data.formats import read_preferences
from mlx_align.data.judgements import Judgement, is_judgement, read_judgement
from mlx_align.data.readers import DataSource, Row, read_rows
from mlx_align.errors import DataError
from mlx_align.preferences.raters import AgreementReport, report_agreement, warnings_of
from mlx_align.system.atomic_io import open_atomic
from mlx_align.system.json_text import to_json
from mlx_align.system.row_file import new_file


class JudgementSource:
    """The rows of several files of judgements, as a train split.

    Args:
        rows: The rows.
    """

    name = "judgements"

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def has_split(self, split: str) -> bool:
        """Whether it is the train split."""
        return split == "train"

    def rows(self, split: str) -> list[Row]:
        """All rows."""
        return list(self._rows)


def read_judgements(files: Sequence[str]) -> tuple[list[Row], list[Judgement]]:
    """The judgements in files, and their rows.

    Raises:
        DataError: A file can't be read, or has a row that is no judgement.
    """
    rows = [row for file in files for row in read_rows(file)]
    for row in rows:
        if not is_judgement(row):
            raise DataError(
                f"{row.source}: not a judgement; expected prompt, response_a, response_b, winner "
                "and rater, as mlx-align label writes them"
            )
    return rows, [read_judgement(row) for row in rows]


def read_any_judgements(data: DataSource) -> list[Judgement]:
    """The judgements in training data; none if it has another format.

    Raises:
        DataError: The data can't be read.
    """
    rows = data.rows("train")
    return [read_judgement(row) for row in rows] if is_judgement(rows[0]) else []


@dataclass(frozen=True)
class AgreementOutcome:
    """The result of `mlx-align data agreement`.

    Attributes:
        report: The report on the raters.
        output: The file of joined pairs; None if none was to be written.
        written: Pairs in it.
        dropped: Number of pairs left out, by reason.
    """

    report: AgreementReport
    output: Path | None = None
    written: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        found = {**asdict(self.report), "warnings": warnings_of(self.report)}
        if self.output is not None:
            found |= {
                "output": str(self.output),
                "written": self.written,
                "dropped": dict(self.dropped),
            }
        return found


def measure_agreement(config: AgreementConfig) -> AgreementOutcome:
    """Report on the raters of files of judgements, and join the files if there is an output.

    Raises:
        ConfigError: The output exists already.
        DataError: A file can't be read, or no pair has a verdict.
        WriteError: The output can't be written.
    """
    target = None if config.output is None else new_file(config.output)
    rows, judgements = read_judgements(config.input)
    report = report_agreement(judgements, seed=config.seed)
    if target is None:
        return AgreementOutcome(report)
    return AgreementOutcome(report, target, *join_files(rows, config, target))


def join_files(
    rows: Sequence[Row], config: AgreementConfig, output: Path
) -> tuple[int, Mapping[str, int]]:
    """Write the pairs of judgements; returns their number, and what was left out by reason.

    Raises:
        DataError: No pair has a verdict.
        WriteError: The file can't be written.
    """
    rules = LabelRules(ties=config.ties, min_agreement=config.min_agreement)
    source = ConfiguredSource(JudgementSource(rows), {}, rules)
    groups, report = read_preferences(source, "train", "judgements")
    with open_atomic(output) as stream:
        for group in groups:
            assert group.votes is not None
            row = {**group.columns, **plain_row(group), "agreement": max(group.votes)}
            row["agreement"] /= sum(group.votes)
            stream.write(to_json(row, ascii=False) + "\n")
    return len(groups), report.dropped
