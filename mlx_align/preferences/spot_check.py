"""Spot checks: a person labels a share of the pairs that a judge labelled, without its answer.

The judge's answer is in the line of each judgement, in a separate column, so the person's labels
alone are what `judge --human` and the training commands read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_align.data.columns import ConfiguredSource, LabelRules
from mlx_align.data.formats import read_preferences
from mlx_align.data.judgements import AnswerPair, Judgement, latest_judgements, pair_answers
from mlx_align.data.provenance import PROVENANCE
from mlx_align.data.readers import DataSource
from mlx_align.errors import DataError
from mlx_align.preferences.judge_statistics import rate_of_pairs
from mlx_align.system.intervals import Estimate
from mlx_align.types import Text

# The column of a judgement with the judge's answer on the pair.
SPOT_CHECK = "spot_check"


@dataclass(frozen=True)
class SpotCheckReport:
    """How far people agree with a judge's labels.

    Attributes:
        judge: The judge's name.
        pairs: Pairs of its labels on which a person decided for an answer.
        agreement: The share of these on which the judge chose the same answer; its ties count ½.
            Several people's verdicts on a pair are averaged.
        claimed: The share that the judge's soft labels promise for the same pairs; None if they
            are hard.
        before: Its agreement with people when it was measured before it labelled; None if it
            wasn't.
    """

    judge: str
    pairs: int
    agreement: Estimate
    claimed: float | None
    before: float | None

    @property
    def warning(self) -> str:
        """What is wrong, in a sentence; empty if nothing is known to be."""
        high, low = self.agreement.high, self.agreement.low
        if low <= 0.5:
            return (
                f"{self.judge}: on the spot check its labels can't be told apart from a coin's; "
                "check more pairs, or use another judge"
            )
        if self.claimed is not None and self.claimed > high:
            return (
                f"{self.judge}: its soft labels claim {self.claimed:.0%}, more than the spot check "
                "shows; label again with the spot check as --human"
            )
        if self.before is not None and self.before > high:
            return (
                f"{self.judge}: it agreed with {self.before:.0%} of people's labels before, and "
                "with fewer now; measure it on the spot check as --human"
            )
        return ""

    def __str__(self) -> str:
        rate = self.agreement
        line = (
            f"Spot check of {self.judge}: people agree with {rate.value:.0%} ({rate.low:.0%} to "
            f"{rate.high:.0%}) of {self.pairs:,} labels"
        )
        if self.claimed is not None:
            line += f"; its soft labels claim {self.claimed:.0%}"
        if self.before is not None:
            line += f"; measured before it labelled: {self.before:.0%}"
        return line


def read_judged_pairs(data: DataSource, format: str | None) -> tuple[list[AnswerPair], str]:
    """Read pairs that a judge labelled; its answer is in the column `SPOT_CHECK` of each.

    Raises:
        DataError: The data can't be read, or a row doesn't say which judge labelled it.
    """
    source = ConfiguredSource(data, {}, LabelRules(ties="half"))
    groups, report = read_preferences(source, "train", format)
    found = []
    for group in groups:
        given = group.columns.get(PROVENANCE)
        if not isinstance(given, Mapping) or not isinstance(given.get("judge"), str):
            raise DataError(
                f"{group.source}: doesn't say which judge labelled it (no 'provenance'); "
                "--spot-check takes the output of mlx-align judge or constitution"
            )
        authors = tuple(str(group.columns.get(f"{s}_model") or "") for s in ("chosen", "rejected"))
        chosen, rejected = group.completions
        columns = {k: v for k, v in group.columns.items() if k != PROVENANCE}
        for name in ("chosen_model", "rejected_model"):
            columns.pop(name, None)  # they would say which answer was chosen
        pair = pair_answers(
            group.prompt, (chosen, rejected), group.source, (authors[0], authors[1]), columns
        )
        label = group.soft_label
        probability = label if label is None or pair.a == chosen else 1 - label
        side = "a" if (pair.a == chosen) == (label is None or label >= 0.5) else "b"
        verdict = {
            "judge": given["judge"],
            "winner": "tie" if label == 0.5 else side,
            "probability": probability,
            "agreement": given.get("agreement"),
        }
        found.append(replace(pair, columns={**columns, SPOT_CHECK: verdict}))
    return found, f"labels of a judge, {report} ({len(found):,} pairs)"


def report_spot_checks(
    judgements: Sequence[Judgement], *, seed: int = 0
) -> tuple[SpotCheckReport, ...]:
    """How far people agree with each judge whose labels they checked; () without spot checks."""
    checks: dict[str, dict[str, list[tuple[Judgement, Mapping[str, Any]]]]] = {}
    for one in latest_judgements(judgements):
        verdict = one.pair.columns.get(SPOT_CHECK)
        if one.winner not in ("a", "b") or not isinstance(verdict, Mapping):
            continue
        of_judge = checks.setdefault(str(verdict.get("judge")), {})
        of_judge.setdefault(one.pair.id, []).append((one, verdict))
    return tuple(_report(name, pairs, seed) for name, pairs in checks.items())


def _report(
    judge: str, pairs: Mapping[str, Sequence[tuple[Judgement, Mapping[str, Any]]]], seed: int
) -> SpotCheckReport:
    outcomes, claims, prompts = [], [], []
    number: dict[Text, int] = {}
    before: float | None = None
    for given in pairs.values():
        verdict = given[0][1]
        winner, probability = verdict.get("winner"), verdict.get("probability")
        same = [0.5 if winner == "tie" else float(one.winner == winner) for one, _ in given]
        outcomes.append(float(np.mean(same)))
        if isinstance(probability, int | float):
            claims.append(max(probability, 1 - probability))
        prompts.append(number.setdefault(given[0][0].pair.prompt, len(number)))
        measured = verdict.get("agreement")
        if isinstance(measured, list) and measured and isinstance(measured[0], int | float):
            before = float(measured[0])
    agreement = rate_of_pairs(np.array(outcomes), np.array(prompts, np.int64), seed)
    claimed = float(np.mean(claims)) if len(claims) == len(outcomes) else None
    return SpotCheckReport(judge, len(outcomes), agreement, claimed, before)
