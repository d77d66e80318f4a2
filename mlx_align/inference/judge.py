"""From scored groups to the comparisons that reports are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlx_align.data.comparisons import Compared
from mlx_align.inference.evaluate import Judged, RewardReport, report
from mlx_align.inference.statistics import Floats
from mlx_align.types import TokenizedGroup

Scores = npt.NDArray[np.floating[Any]]


class Comparisons(NamedTuple):
    """All that is compared, at least one of it decided, and every completion's score and length."""

    judged: Judged
    scores: Floats
    lengths: Floats


def judge(
    groups: Sequence[TokenizedGroup],
    compared: Sequence[Compared],
    scores: Sequence[Scores],
    *,
    seed: int = 0,
) -> RewardReport | None:
    """The report on scored groups, by the mean of the members; None if nothing is decided.

    Args:
        groups: As scored, completions best first.
        compared: What `compare` gave for each: which is the better one of each two.
        scores: Per group (K, members).
        seed: Of the bootstrap.
    """
    found = comparisons(groups, compared, scores)
    return None if found is None else report(*found, seed=seed)


def comparisons(
    groups: Sequence[TokenizedGroup], compared: Sequence[Compared], scores: Sequence[Scores]
) -> Comparisons | None:
    """What the report is made of; arguments as in `judge`, None if nothing is decided."""
    rows: list[tuple[float, float, int, int, int]] = []
    every_score: list[float] = []
    every_length: list[int] = []
    prompts: dict[bytes, int] = {}
    for group, pairs, members in zip(groups, compared, scores, strict=True):
        prompt = prompts.setdefault(group.prompt.tobytes(), len(prompts))
        score = members.mean(axis=1, dtype=np.float64)
        length = [len(completion) for completion in group.completions]
        every_score += [float(s) for s, n in zip(score, length, strict=True) if n]
        every_length += [n for n in length if n]
        indices = zip(*np.triu_indices(len(length), 1), strict=True)
        for (i, j), p, weight in zip(indices, pairs.probability, pairs.weight, strict=True):
            if weight == 0:
                continue
            better, worse = (i, j) if p >= 0.5 else (j, i)
            gap = float(score[better] - score[worse])
            rows.append((gap, max(p, 1 - p), length[better], length[worse], prompt))
    if not any(p > 0.5 for _, p, *_ in rows):
        return None
    columns = np.array(rows, np.float64).T
    return Comparisons(
        Judged(columns[0], columns[1], columns[2], columns[3], columns[4].astype(np.int64)),
        np.array(every_score),
        np.array(every_length, np.float64),
    )
