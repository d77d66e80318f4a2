"""Evaluation of scores on labelled comparisons: accuracy, calibration, and length bias.

Accuracy alone can't distinguish a good reward model from one that prefers longer completions or was
trained on the held-out data. So it is reported next to the accuracy of "pick the longer", and by
confidence and length ratio, and the probabilities are compared with the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlx_align.data.batching import prompt_numbers
from mlx_align.data.comparisons import GroupComparisons, compare_completions
from mlx_align.evaluation.statistics import Floats, mean_estimate, rate_estimate, sigmoid
from mlx_align.inference.scoring import GroupScores
from mlx_align.types import TokenizedGroup

Scores = npt.NDArray[np.floating[Any]]

ECE_BINS = 10
# Reward models reach 60–75% on human preferences. More suggests a leak, or a shortcut like length.
SUSPICIOUS_ACCURACY = 0.9
# Warn if "pick the longer" (or the shorter) alone reaches this fraction of the gain over chance.
MAX_LENGTH_GAIN = 0.5
# Edges of the bins of length ratios (better over worse completion).
RATIO_EDGES = (0.5, 0.8, 1.25, 2.0)
RATIO_NAMES = ("below 0.5", "0.5 to 0.8", "0.8 to 1.25", "1.25 to 2", "above 2")
# Temperatures outside this range count as 0 or infinity.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
# Warn if there are fewer comparisons.
MIN_COMPARISONS = 100


class ScoredComparisons(NamedTuple):
    """Scores of n comparisons of two completions of one prompt, the one labelled better first.

    `probability` is the label's: the probability that the first is better, at least ½. A comparison
    of ½ is undecided and counts for calibration only. `prompt` is the number of the prompt:
    comparisons of one prompt are not independent.
    """

    difference: Floats  # (n,) score of the better one minus score of the worse one
    probability: Floats  # (n,)
    better_length: Floats  # (n,) tokens
    worse_length: Floats  # (n,) tokens
    prompt: npt.NDArray[np.int64]  # (n,)


class AccuracyBin(NamedTuple):
    """Accuracy on a subset of the comparisons; None if it is empty."""

    name: str
    accuracy: float | None
    comparisons: int


class CalibrationBin(NamedTuple):
    """Mean confidence and accuracy of comparisons with similar confidence."""

    confidence: float
    right: float
    comparisons: int


@dataclass(frozen=True)
class RewardReport:
    """Evaluation of a reward model on labelled comparisons. Rates are in [0, 1].

    Attributes:
        comparisons: Number of decided comparisons.
        accuracy: Fraction of decided comparisons in which the better completion scores higher; ties
            count half.
        accuracy_low: Lower end of its 95% interval over prompts.
        accuracy_high: Upper end of that interval.
        longer_accuracy: Accuracy of "pick the longer"; equal lengths count half.
        accuracy_shorter_chosen: Accuracy if the better completion is the shorter one.
        shorter_chosen: Number of those comparisons.
        by_difference: Accuracy by quartile of |Δ score|, least confident first.
        by_length_ratio: Accuracy by length ratio (better over worse completion).
        ece: Expected calibration error of σ(Δ) over 10 bins of confidence.
        calibration: The bins that are not empty, least confident first.
        temperature: The T that maximises the likelihood of σ(Δ/T); above 1 the model is
            overconfident. None if no T does: every comparison right, or at most half.
        ece_at_temperature: Calibration error after dividing by T.
        length_correlation: Spearman correlation of score and length over all completions.
        length_correlation_within: Spearman correlation of the differences within comparisons.
        warnings: Problems that a user should know of, one sentence each.
    """

    comparisons: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    longer_accuracy: float
    accuracy_shorter_chosen: float | None
    shorter_chosen: int
    by_difference: tuple[AccuracyBin, ...]
    by_length_ratio: tuple[AccuracyBin, ...]
    ece: float
    calibration: tuple[CalibrationBin, ...]
    temperature: float | None
    ece_at_temperature: float | None
    length_correlation: float | None
    length_correlation_within: float | None
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON-serialisable values."""
        content = asdict(self)
        for name in ("by_difference", "by_length_ratio", "calibration"):
            content[name] = [part._asdict() for part in getattr(self, name)]
        return content


def reward_report(compared: ScoredComparisons, scores: Floats, lengths: Floats) -> RewardReport:
    """Evaluate a reward model from its scores.

    Args:
        compared: The comparisons, at least one of them decided.
        scores: (rows,) scores of all completions, for the correlation with length.
        lengths: (rows,) lengths of the same completions, tokens.
    """
    decided = compared.probability > 0.5
    one = ScoredComparisons(
        compared.difference[decided],
        compared.probability[decided],
        compared.better_length[decided],
        compared.worse_length[decided],
        compared.prompt[decided],
    )
    right = _is_right(one.difference)
    rate = rate_estimate(right, one.prompt)
    low, high = rate.low, rate.high
    longer = _is_right(one.better_length - one.worse_length)
    shorter = one.better_length < one.worse_length
    temperature = fitted_temperature(compared.difference, compared.probability)
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
        ece=calibration_error(compared.difference, compared.probability),
        calibration=calibration_bins(compared.difference, compared.probability),
        temperature=temperature,
        ece_at_temperature=None
        if temperature is None
        else calibration_error(compared.difference / temperature, compared.probability),
        length_correlation=spearman(scores, lengths),
        length_correlation_within=spearman(one.difference, one.better_length - one.worse_length),
        warnings=_warnings(accuracy, longer_accuracy, len(right)),
    )


def _is_right(difference: Floats) -> Floats:
    """1 where positive, 0 where negative, ½ where equal."""
    return 0.5 * (1 + np.sign(difference))


def calibration_error(difference: Floats, probability: Floats) -> float:
    """Expected calibration error of σ(difference) over equal-width bins of confidence in [½, 1].

    Σ over bins of (fraction of comparisons in the bin) · |accuracy − confidence|. `probability`
    (n,) is the label's probability that the first completion is better.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3.
    """
    bins = calibration_bins(difference, probability)
    gap = sum(one.comparisons * abs(one.right - one.confidence) for one in bins)
    return float(gap / len(difference))


def calibration_bins(difference: Floats, probability: Floats) -> tuple[CalibrationBin, ...]:
    """The bins of `calibration_error` that are not empty, by increasing confidence."""
    confidence = sigmoid(np.abs(difference))
    right = np.where(difference >= 0, probability, 1 - probability)
    place = np.minimum(((confidence - 0.5) * 2 * ECE_BINS).astype(int), ECE_BINS - 1)
    counts = np.bincount(place, minlength=ECE_BINS)
    sums = [np.bincount(place, weights=part, minlength=ECE_BINS) for part in (confidence, right)]
    return tuple(
        CalibrationBin(float(sums[0][i] / n), float(sums[1][i] / n), int(n))
        for i, n in enumerate(counts)
        if n
    )


def fitted_temperature(difference: Floats, probability: Floats) -> float | None:
    """The T that maximises the likelihood of σ(difference/T), or None if no T does.

    The derivative of the log-likelihood by 1/T, Σ Δ·(p − σ(Δ/T)), decreases in 1/T; its root is
    found by bisection. There is no root if every comparison is right, or at most half.

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
    """Spearman's rank correlation (ties get mean ranks); None if one of them is constant."""
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


def _by_difference(size: Floats, right: Floats) -> tuple[AccuracyBin, ...]:
    """Accuracy of four subsets of equal size, by |Δ score|."""
    order = np.argsort(size, kind="stable")
    names = ("least sure quarter", "second quarter", "third quarter", "surest quarter")
    quarters = zip(names, np.array_split(order, 4), strict=True)
    return tuple(_accuracy_bin(name, right[quarter]) for name, quarter in quarters)


def _by_length_ratio(one: ScoredComparisons, right: Floats) -> tuple[AccuracyBin, ...]:
    ratio = one.better_length / np.maximum(one.worse_length, 1)
    place = np.digitize(ratio, RATIO_EDGES)
    return tuple(_accuracy_bin(name, right[place == i]) for i, name in enumerate(RATIO_NAMES))


def _accuracy_bin(name: str, right: Floats) -> AccuracyBin:
    return AccuracyBin(name, float(right.mean()) if len(right) else None, len(right))


def _warnings(accuracy: float, longer: float, count: int) -> tuple[str, ...]:
    found = []
    if count < MIN_COMPARISONS:
        found.append(f"{count} comparisons are few: see how wide the interval is")
    if accuracy > SUSPICIOUS_ACCURACY:
        found.append(
            f"accuracy {accuracy:.1%} is above {SUSPICIOUS_ACCURACY:.0%}, which is rare on human "
            "preferences: check for held-out prompts in the training data, or for a shortcut, like "
            "length or a phrase, that separates chosen from rejected"
        )
    gained, by_length = accuracy - 0.5, abs(longer - 0.5)
    if gained > 0 and by_length >= MAX_LENGTH_GAIN * gained:
        which = "longer" if longer > 0.5 else "shorter"
        found.append(
            f'"pick the {which}" alone gains {by_length:.1%} over chance, the model {gained:.1%}: '
            "it may have learned little more than length; balance the data, or add pairs whose "
            f"chosen completion is the {'shorter' if which == 'longer' else 'longer'} one"
        )
    return tuple(found)


@dataclass(frozen=True)
class PairReport:
    """Accuracy and margin of any kind of score; 95% intervals, over prompts.

    Attributes:
        comparisons: Number of decided comparisons.
        accuracy: Fraction in which the better completion scores higher; ties count half.
        accuracy_low: Lower end of its interval.
        accuracy_high: Upper end of its interval.
        margin: Mean score of the better minus the worse completion, in the scores' unit.
        margin_low: Lower end of its interval.
        margin_high: Upper end of its interval.
        longer_accuracy: Accuracy of "pick the longer"; equal lengths count half.
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
        """The report as JSON-serialisable values."""
        return asdict(self)


def pair_report(compared: ScoredComparisons) -> PairReport:
    """Evaluate scores on comparisons, at least one of which is decided.

    Args:
        compared: The comparisons.
    """
    decided = compared.probability > 0.5
    margins, prompt = compared.difference[decided], compared.prompt[decided]
    right = _is_right(margins)
    longer = _is_right(compared.better_length[decided] - compared.worse_length[decided])
    rate = rate_estimate(right, prompt)
    accuracy_low, accuracy_high = rate.low, rate.high
    margin = mean_estimate(margins, prompt)
    return PairReport(
        comparisons=len(right),
        accuracy=float(right.mean()),
        accuracy_low=accuracy_low,
        accuracy_high=accuracy_high,
        margin=margin.value,
        margin_low=margin.low,
        margin_high=margin.high,
        longer_accuracy=float(longer.mean()),
    )


class ComparisonScores(NamedTuple):
    """Scored comparisons, at least one decided, and score and length of every completion."""

    compared: ScoredComparisons
    scores: Floats
    lengths: Floats


def evaluate_reward_model(
    groups: Sequence[TokenizedGroup],
    compared: Sequence[GroupComparisons],
    scores: Sequence[Scores],
) -> RewardReport | None:
    """Evaluate the mean of a reward model's members on scored groups.

    Args:
        groups: The groups as scored, completions best first.
        compared: The labels of each group, from `compare_completions`.
        scores: The scores (K, members) of each group.

    Returns:
        The report; None if no comparison is decided.
    """
    found = collect_comparisons(groups, compared, scores)
    return None if found is None else reward_report(*found)


def evaluate_reward_scores(scores: Sequence[GroupScores]) -> RewardReport | None:
    """Evaluate a reward model from the output of `RewardModel.score_groups` for labelled groups.

    Args:
        scores: Scores of groups of pairs or ranked completions; those without scores are skipped.

    Returns:
        The report; None if no comparison is decided.
    """
    found = _collect_scored_groups(scores)
    return None if found is None else reward_report(*found)


def evaluate_pair_scores(scores: Sequence[GroupScores]) -> PairReport | None:
    """Evaluate scores of any kind, such as implicit rewards; see `evaluate_reward_scores`."""
    found = _collect_scored_groups(scores)
    return None if found is None else pair_report(found.compared)


def _collect_scored_groups(scores: Sequence[GroupScores]) -> ComparisonScores | None:
    groups, values = [], []
    for one in scores:
        if one.tokens is not None and one.scores is not None:
            groups.append(one.tokens)
            values.append(one.scores[:, None])
    return collect_comparisons(groups, [compare_completions(group) for group in groups], values)


def collect_comparisons(
    groups: Sequence[TokenizedGroup], compared: Sequence[GroupComparisons], scores: Sequence[Scores]
) -> ComparisonScores | None:
    """Pair the completions of scored groups. Arguments are those of `evaluate_reward_model`.

    Returns:
        The comparisons; None if all are undecided.
    """
    rows: list[tuple[float, float, int, int, int]] = []
    all_scores: list[float] = []
    all_lengths: list[int] = []
    numbered = zip(groups, compared, scores, prompt_numbers(groups), strict=True)
    for group, pairs, members, prompt in numbered:
        score = members.mean(axis=1, dtype=np.float64)
        length = [len(completion) for completion in group.completions]
        all_scores += [float(s) for s, n in zip(score, length, strict=True) if n]
        all_lengths += [n for n in length if n]
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
    return ComparisonScores(
        ScoredComparisons(
            columns[0], columns[1], columns[2], columns[3], columns[4].astype(np.int64)
        ),
        np.array(all_scores),
        np.array(all_lengths, np.float64),
    )
