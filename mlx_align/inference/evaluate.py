"""How good a reward model is, from its scores of labelled comparisons: pure functions of arrays.

Accuracy alone does not tell: a model that has learned that longer is better, or that has seen the
held-out data, looks as good. So accuracy stands beside that of "pick the longer", is split by how
sure the model is and by which completion is longer, and its probabilities are held to what came
true.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlx_align.inference.statistics import Floats, mean_estimate, sigmoid

ECE_BINS = 10
# Honest models of people's preferences reach 60–75%: more is a leak, or something easy like length.
SUSPICIOUS = 0.9
# Share of what is gained over a coin that "pick the longer" (or the shorter) may gain alone.
MOST = 0.5
# Ratios of the lengths of better and worse completion at which the bins of lengths end.
RATIO_EDGES = (0.5, 0.8, 1.25, 2.0)
RATIO_NAMES = ("below 0.5", "0.5 to 0.8", "0.8 to 1.25", "1.25 to 2", "above 2")
# Rates at which a temperature is no longer told from 0 or infinity.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
# Comparisons fewer than this make every number of a report a guess.
FEW = 100


class Judged(NamedTuple):
    """n comparisons of two completions of a prompt, the one labelled better first.

    `probability` is that of the label, at least ½ (an undecided comparison has ½, and counts for
    calibration only); `prompt` numbers the prompts, as comparisons of one are no independent
    evidence.
    """

    difference: Floats  # (n,) score of the better one minus score of the worse one
    probability: Floats  # (n,)
    better_length: Floats  # (n,) tokens
    worse_length: Floats  # (n,) tokens
    prompt: npt.NDArray[np.int64]  # (n,)


class Part(NamedTuple):
    """Accuracy on a part of the comparisons; None where it is empty."""

    name: str
    accuracy: float | None
    comparisons: int


class Bin(NamedTuple):
    """Comparisons that the model is about equally sure of: how sure, and how often it is right."""

    confidence: float
    right: float
    comparisons: int


@dataclass(frozen=True)
class RewardReport:
    """What is to be known of a reward model on held-out data; shares are in [0, 1].

    Attributes:
        comparisons: Decided comparisons (undecided ones count for calibration only).
        accuracy: Share of them that the model gets right; equal scores count half.
        accuracy_low: Lower end of its 95% interval, by bootstrap over prompts.
        accuracy_high: Upper end.
        longer_accuracy: What "pick the longer" gets right, equal lengths counting half.
        accuracy_shorter_chosen: Accuracy where the better completion is the shorter one.
        shorter_chosen: How many comparisons that are.
        by_difference: Accuracy by quartile of |Δ score|, from unsure to sure.
        by_length_ratio: Accuracy by length of the better over length of the worse completion.
        ece: Expected calibration error of σ(Δ) over 10 bins of confidence.
        calibration: Those bins, empty ones left out, from unsure to sure.
        temperature: T for which σ(Δ/T) is likeliest: above 1 the model is too sure of itself.
            None where no T is: every comparison right, or no more than half.
        ece_at_temperature: The calibration error after dividing by T.
        length_correlation: Spearman's, of score and length over all completions.
        length_correlation_within: Spearman's, of the differences in score and in length.
        warnings: What its user should worry about, a sentence each.
    """

    comparisons: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    longer_accuracy: float
    accuracy_shorter_chosen: float | None
    shorter_chosen: int
    by_difference: tuple[Part, ...]
    by_length_ratio: tuple[Part, ...]
    ece: float
    calibration: tuple[Bin, ...]
    temperature: float | None
    ece_at_temperature: float | None
    length_correlation: float | None
    length_correlation_within: float | None
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The report for programs, parts as objects."""
        content = asdict(self)
        for name in ("by_difference", "by_length_ratio", "calibration"):
            content[name] = [part._asdict() for part in getattr(self, name)]
        return content


def report(judged: Judged, scores: Floats, lengths: Floats, *, seed: int = 0) -> RewardReport:
    """Judge a reward model.

    Args:
        judged: The comparisons; at least one of them decided.
        scores: (rows,) of all completions, for the correlation with length.
        lengths: (rows,) of the same completions, tokens.
        seed: Of the bootstrap.
    """
    decided = judged.probability > 0.5
    one = Judged(
        judged.difference[decided],
        judged.probability[decided],
        judged.better_length[decided],
        judged.worse_length[decided],
        judged.prompt[decided],
    )
    right = _share_right(one.difference)
    low, high = bootstrap_interval(right, one.prompt, seed=seed)
    longer = _share_right(one.better_length - one.worse_length)
    shorter = one.better_length < one.worse_length
    temperature = fitted_temperature(judged.difference, judged.probability)
    accuracy, longer_accuracy = float(right.mean()), float(longer.mean())
    return RewardReport(
        comparisons=len(right),
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        longer_accuracy=longer_accuracy,
        accuracy_shorter_chosen=float(right[shorter].mean()) if shorter.any() else None,
        shorter_chosen=int(shorter.sum()),
        by_difference=_by_difference(np.abs(one.difference), right),
        by_length_ratio=_by_length_ratio(one, right),
        ece=calibration_error(judged.difference, judged.probability),
        calibration=calibration_bins(judged.difference, judged.probability),
        temperature=temperature,
        ece_at_temperature=None
        if temperature is None
        else calibration_error(judged.difference / temperature, judged.probability),
        length_correlation=spearman(scores, lengths),
        length_correlation_within=spearman(one.difference, one.better_length - one.worse_length),
        warnings=_warnings(accuracy, longer_accuracy, len(right)),
    )


def _share_right(difference: Floats) -> Floats:
    """1 where positive, 0 where negative, ½ where equal."""
    return 0.5 * (1 + np.sign(difference))


def bootstrap_interval(
    values: Floats, cluster: npt.NDArray[np.int64], *, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` (n,), resampling whole clusters (n,)."""
    found = mean_estimate(values, cluster, seed=seed)
    return found.low, found.high


def calibration_error(difference: Floats, probability: Floats) -> float:
    """Expected calibration error of σ(difference) over equal bins of confidence in [½, 1].

    Σ over bins of the share of comparisons in it times |how often the model was right − how sure
    it was|. `probability` (n,) is that of the first being better.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3.
    """
    bins = calibration_bins(difference, probability)
    gap = sum(one.comparisons * abs(one.right - one.confidence) for one in bins)
    return float(gap / len(difference))


def calibration_bins(difference: Floats, probability: Floats) -> tuple[Bin, ...]:
    """The bins of `calibration_error` that hold anything, by rising confidence."""
    confidence = sigmoid(np.abs(difference))
    right = np.where(difference >= 0, probability, 1 - probability)
    place = np.minimum(((confidence - 0.5) * 2 * ECE_BINS).astype(int), ECE_BINS - 1)
    counts = np.bincount(place, minlength=ECE_BINS)
    sums = [np.bincount(place, weights=part, minlength=ECE_BINS) for part in (confidence, right)]
    return tuple(
        Bin(float(sums[0][i] / n), float(sums[1][i] / n), int(n)) for i, n in enumerate(counts) if n
    )


def fitted_temperature(difference: Floats, probability: Floats) -> float | None:
    """The T for which σ(difference/T) is likeliest, or None where there is none.

    The slope of the log-likelihood by 1/T, Σ Δ·(p − σ(Δ/T)), falls in 1/T: bisection finds where
    it is 0. It is nowhere where all is right without doubt, or no more right than wrong.

    Source: Guo et al. 2017, section 4.2.
    """

    def slope(inverse: float) -> float:
        return float((difference * (probability - sigmoid(inverse * difference))).sum())

    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    if slope(low) <= 0 or slope(high) >= 0:
        return None
    for _ in range(100):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return float(1 / np.sqrt(low * high))


def spearman(one: Floats, other: Floats) -> float | None:
    """Spearman's rank correlation (ties get mean ranks); None where one of them is constant."""
    ranks = [_mean_ranks(values) for values in (one, other)]
    centred = [rank - rank.mean() for rank in ranks]
    sizes = [float(np.sqrt((rank**2).sum())) for rank in centred]
    if min(sizes) == 0:
        return None
    return float((centred[0] * centred[1]).sum() / (sizes[0] * sizes[1]))


def _mean_ranks(values: Floats) -> Floats:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    mean: Floats = (ends - (counts - 1) / 2)[index]
    return mean


def _by_difference(size: Floats, right: Floats) -> tuple[Part, ...]:
    """Four parts of equal size, in order of |Δ score|."""
    order = np.argsort(size, kind="stable")
    names = ("least sure quarter", "second quarter", "third quarter", "surest quarter")
    quarters = zip(names, np.array_split(order, 4), strict=True)
    return tuple(_part(name, right[quarter]) for name, quarter in quarters)


def _by_length_ratio(one: Judged, right: Floats) -> tuple[Part, ...]:
    ratio = one.better_length / np.maximum(one.worse_length, 1)
    place = np.digitize(ratio, RATIO_EDGES)
    return tuple(_part(name, right[place == i]) for i, name in enumerate(RATIO_NAMES))


def _part(name: str, right: Floats) -> Part:
    return Part(name, float(right.mean()) if len(right) else None, len(right))


def _warnings(accuracy: float, longer: float, count: int) -> tuple[str, ...]:
    found = []
    if count < FEW:
        found.append(f"{count} comparisons are few: the interval says how little the numbers mean")
    if accuracy > SUSPICIOUS:
        found.append(
            f"accuracy {accuracy:.1%} is above {SUSPICIOUS:.0%}, which people's preferences hardly "
            "allow: look for held-out prompts in the training data, or for something easy, like "
            "length or a phrase, that tells chosen from rejected"
        )
    gained, by_length = accuracy - 0.5, abs(longer - 0.5)
    if gained > 0 and by_length >= MOST * gained:
        which = "longer" if longer > 0.5 else "shorter"
        found.append(
            f'"pick the {which}" alone gains {by_length:.1%} over a coin, the model {gained:.1%}: '
            f"it may have learned little more than length; balance the data, or prefer pairs whose "
            f"chosen answer is the {'shorter' if which == 'longer' else 'longer'} one"
        )
    return tuple(found)


def render_report(found: RewardReport) -> str:
    """The report for people, one screen."""
    shorter = found.accuracy_shorter_chosen
    temperature = found.temperature
    lines = [
        f"accuracy {found.accuracy:.1%} (95%: {found.accuracy_low:.1%} to "
        f"{found.accuracy_high:.1%}) on {found.comparisons:,} held-out comparisons",
        f'  "pick the longer" gets {found.longer_accuracy:.1%} of them',
        f"  where the shorter is chosen: {_percent(shorter)} of {found.shorter_chosen:,}",
        "  by how far apart the scores are: " + _say_parts(found.by_difference),
        "  by length, chosen over rejected: " + _say_parts(found.by_length_ratio),
        f"calibration error {found.ece:.1%}"
        + (
            "; no temperature fits"
            if temperature is None or found.ece_at_temperature is None
            else f"; {found.ece_at_temperature:.1%} at the fitted temperature {temperature:.2f}"
            + (" (too sure of itself)" if temperature > 1.2 else "")
            + (" (not sure enough)" if temperature < 1 / 1.2 else "")
        ),
        f"correlation of score and length: {_signed(found.length_correlation)} over all "
        f"completions, {_signed(found.length_correlation_within)} within prompts",
    ]
    return "\n".join(lines + [f"! {warning}" for warning in found.warnings])


def _say_parts(parts: tuple[Part, ...]) -> str:
    return ", ".join(f"{part.name} {_percent(part.accuracy)}" for part in parts if part.comparisons)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"
