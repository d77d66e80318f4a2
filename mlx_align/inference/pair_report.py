"""How well scores agree with labelled comparisons, and by how much they tell them apart."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_align.inference.evaluate import Judged, bootstrap_interval


@dataclass(frozen=True)
class PairReport:
    """Scores of labelled comparisons; intervals are 95%, by bootstrap over prompts.

    Attributes:
        comparisons: Decided ones.
        accuracy: Share of them in which the better completion has the higher score; ties count
            half.
        accuracy_low: Lower end of its interval.
        accuracy_high: Upper end.
        margin: Mean score of the better minus that of the worse one, in the scores' unit.
        margin_low: Lower end of its interval.
        margin_high: Upper end.
        longer_accuracy: What "pick the longer" gets right, equal lengths counting half.
    """

    comparisons: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    margin: float
    margin_low: float
    margin_high: float
    longer_accuracy: float

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        return asdict(self)


def pair_report(judged: Judged, *, seed: int = 0) -> PairReport:
    """The report on comparisons of which at least one is decided; `seed` is the bootstrap's."""
    decided = judged.probability > 0.5
    margins, prompt = judged.difference[decided], judged.prompt[decided]
    right = 0.5 * (1 + np.sign(margins))
    longer = 0.5 * (1 + np.sign(judged.better_length[decided] - judged.worse_length[decided]))
    accuracy_low, accuracy_high = bootstrap_interval(right, prompt, seed=seed)
    margin_low, margin_high = bootstrap_interval(margins, prompt, seed=seed)
    return PairReport(
        comparisons=len(right),
        accuracy=float(right.mean()),
        accuracy_low=accuracy_low,
        accuracy_high=accuracy_high,
        margin=float(margins.mean()),
        margin_low=margin_low,
        margin_high=margin_high,
        longer_accuracy=float(longer.mean()),
    )


def render_pair_report(found: PairReport) -> str:
    """The report for people."""
    return (
        f"accuracy {found.accuracy:.1%} (95%: {found.accuracy_low:.1%} to "
        f"{found.accuracy_high:.1%}) on {found.comparisons:,} pairs\n"
        f'  "pick the longer" gets {found.longer_accuracy:.1%} of them\n'
        f"margin {found.margin:+.4g} (95%: {found.margin_low:+.4g} to {found.margin_high:+.4g})"
    )
