"""A file of prompts: to be answered, or with completions that are there to be ranked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mlx_align.data.formats import read_prompts
from mlx_align.data.scorable import LIST_FORMATS, Scorable, read_scorable
from mlx_align.data.sources import read_rows
from mlx_align.errors import DataError
from mlx_align.inference.ranking import Ranking
from mlx_align.inference.rerank import Reranker
from mlx_align.types import PromptGroup

# Prompts in memory at a time; their completions are sampled together.
WINDOW = 16


class Sampling(NamedTuple):
    """How prompts are answered."""

    n: int
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Asked:
    """The rows of a file, in its order.

    Attributes:
        rows: Each a group, or the reason why it is none.
        to_answer: Whether they have no completions.
        read_as: How they were read, one line.
    """

    rows: list[Scorable]
    to_answer: bool
    read_as: str

    @property
    def readable(self) -> list[PromptGroup]:
        """The groups."""
        return [row.group for row in self.rows if row.group is not None]

    def rankings(self, reranker: Reranker, how: Sampling) -> Iterator[Ranking]:
        """A ranking per row; those of a few rows are made together."""
        for start in range(0, len(self.rows), WINDOW):
            rows = self.rows[start : start + WINDOW]
            groups = [row.group for row in rows if row.group is not None]
            if self.to_answer:
                made = reranker.sample_groups(
                    groups,
                    how.n,
                    max_tokens=how.max_tokens,
                    temperature=how.temperature,
                    # A prompt that comes again is answered anew.
                    seed=how.seed + start,
                )
            else:
                made = reranker.rank_groups(groups)
            found = iter(made)
            for row in rows:
                if row.group is not None:
                    yield next(found)
                    continue
                bare = PromptGroup("", (), row.row.source, columns=row.row.fields)
                yield Ranking(bare, (), row.reason)


def read_asked(file: str) -> Asked:
    """Open a file of prompts, or of prompts with `completions`.

    Raises:
        DataError: It can't be read, or holds neither.
    """
    if not Path(file).expanduser().exists():
        raise DataError(f"--input {file}: no such file")
    rows = read_rows(file)
    if LIST_FORMATS[0].matches(rows[0]):
        source = read_scorable(file)
        return Asked(list(source), False, f"read as: {source.title} ({len(rows):,} rows)")
    groups, reading = read_prompts(file)
    by_source = {row.source: row for row in rows}
    return Asked([Scorable(by_source[g.source], g) for g in groups], True, str(reading))
