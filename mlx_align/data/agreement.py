"""How far raters agree, and what their verdicts say together: alpha, kappa, Dawid–Skene.

Pure functions of arrays. They give the numbers of the packages krippendorff, statsmodels and
crowd-kit (`tests/data/test_agreement.py`), which are not dependencies: krippendorff's licence is
the GPL, and the other two bring scipy and scikit-learn, 260 MB, for a few lines of numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mlx_align.system.intervals import LEVEL, Estimate

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Level = Literal["nominal", "ordinal"]

# The label of a pair that a rater didn't rate.
MISSING = -1
RESAMPLES = 1000
# Verdicts as labels, in their order: a is better, equal, b is better.
VERDICT_LABELS: Mapping[str, int] = {"a": 0, "tie": 1, "b": 2}
# Each rater counts as having been right in 4 of 5 verdicts before the first. Two raters who are
# right in 80% agree on 68% of the pairs; trained labellers agreed on 72.6% (± 1.5%), others on
# 77.3% (± 1.3%) (Ouyang et al. 2022, section 3.4).
PRIOR_RIGHT, PRIOR_WRONG = 4.0, 1.0
_MAX_STEPS = 10_000
_TOLERANCE = 1e-10


def krippendorff_alpha(ratings: Labels, level: Level = "nominal") -> float:
    """Krippendorff's alpha: 1 is perfect agreement, 0 what chance gives.

    Args:
        ratings: (raters, units) labels from 0; `MISSING` for what wasn't rated.
        level: `nominal` if labels are equal or not; `ordinal` if they have an order.

    Returns:
        NaN if no unit has two ratings, or if all ratings are the same.

    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".
    """
    pairs = _coincidences(ratings)
    return float(_alpha(pairs.sum(0)[None], level)[0])


def alpha_interval(ratings: Labels, level: Level = "nominal", *, seed: int = 0) -> Estimate:
    """Krippendorff's alpha with a percentile bootstrap interval over units."""
    pairs = _coincidences(ratings)
    pairs = pairs[pairs.sum((1, 2)) > 0]
    value = krippendorff_alpha(ratings, level)
    if not len(pairs) or np.isnan(value):
        return Estimate(value, float("nan"), float("nan"))
    draw = np.random.default_rng(seed)
    counts = draw.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), RESAMPLES)
    alphas = _alpha(np.tensordot(counts.astype(np.float64), pairs, 1), level)
    low, high = np.nanquantile(alphas, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, min(value, float(low)), max(value, float(high)))


def _coincidences(ratings: Labels) -> Floats:
    """(units, labels, labels): how often two raters gave these labels, 1/(raters − 1) each."""
    size = max(int(ratings.max(initial=0)) + 1, 1)
    counts = (ratings[:, :, None] == np.arange(size)).sum(0).astype(np.float64)
    raters = counts.sum(1)
    both = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(size)
    found: Floats = both / np.maximum(raters - 1, 1)[:, None, None]
    return found


def _alpha(coincidences: Floats, level: Level) -> Floats:
    """(n,) alphas of (n, labels, labels) sums of coincidences."""
    totals = coincidences.sum(2)
    size = totals.shape[1]
    if level == "nominal":
        distance = np.broadcast_to(1 - np.eye(size), coincidences.shape)
    else:
        # The number of ratings between two labels, with half of those at both ends.
        upto = np.cumsum(totals, 1) - totals / 2
        distance = (upto[:, :, None] - upto[:, None, :]) ** 2
    observed = (coincidences * distance).sum((1, 2))
    expected = (totals[:, :, None] * totals[:, None, :] * distance).sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = 1 - (totals.sum(1) - 1) * observed / expected
    return found


def fleiss_kappa(counts: Floats) -> float:
    """Fleiss' kappa.

    Args:
        counts: (units, labels) number of raters who gave the label; the same sum for each unit.

    Source: Fleiss 1971, "Measuring nominal scale agreement among many raters".
    """
    raters = counts[0].sum()
    if raters < 2 or not np.all(counts.sum(1) == raters):
        raise ValueError("every unit needs the same number of raters, at least 2")
    observed = ((counts**2).sum(1) - raters) / (raters * (raters - 1))
    chance = ((counts.sum(0) / counts.sum()) ** 2).sum()
    return _kappa(float(observed.mean()), float(chance))


def cohen_kappa(first: Labels, second: Labels) -> float:
    """Cohen's kappa of two raters, from their labels (units,); units with `MISSING` don't count.

    Source: Cohen 1960, "A coefficient of agreement for nominal scales".
    """
    both = (first != MISSING) & (second != MISSING)
    first, second = first[both], second[both]
    if not len(first):
        return float("nan")
    size = int(max(first.max(), second.max())) + 1
    shares = [np.bincount(one, minlength=size) / len(one) for one in (first, second)]
    return _kappa(float(np.mean(first == second)), float(shares[0] @ shares[1]))


def _kappa(observed: float, chance: float) -> float:
    return float("nan") if chance >= 1 else (observed - chance) / (1 - chance)


class RaterModel(NamedTuple):
    """What raters' labels say together.

    Attributes:
        truth: (units, classes) probability of each true class.
        confusion: (raters, classes, labels) probability of a label given the true class.
        classes: (classes,) probability of each class.
    """

    truth: Floats
    confusion: Floats
    classes: Floats


def dawid_skene(
    ratings: Labels,
    votes: Floats,
    *,
    prior: Floats | float = 0.0,
    symmetric: bool = False,
) -> RaterModel:
    """The model of Dawid and Skene: each rater has a confusion matrix; fitted by EM.

    Args:
        ratings: (raters, units) labels from 0; `MISSING` for what wasn't rated.
        votes: (labels, classes) what a label says for each class at the start; the identity if
            labels and classes are the same.
        prior: (classes, labels) counts that are added to those of every rater.
        symmetric: Whether naming classes and labels in the reverse order changes nothing, as for
            two answers that are called a and b at random. Classes are then equally frequent.

    Source: Dawid and Skene 1979, "Maximum Likelihood Estimation of Observer Error-Rates Using the
    EM Algorithm".
    """
    labels, classes = votes.shape
    given = (ratings[:, :, None] == np.arange(labels)).astype(np.float64)
    truth = np.einsum("rul,lc->uc", given, votes)
    truth /= np.maximum(truth.sum(1, keepdims=True), 1e-300)
    for _ in range(_MAX_STEPS):
        counts = np.einsum("rul,uc->rcl", given, truth) + prior
        share = truth.mean(0)
        if symmetric:
            counts = counts + counts[:, ::-1, ::-1]
            share = np.full(classes, 1 / classes)
        confusion = counts / np.maximum(counts.sum(2, keepdims=True), 1e-300)
        log_odds = np.einsum("rul,rcl->uc", given, np.log(np.maximum(confusion, 1e-300)))
        log_odds += np.log(np.maximum(share, 1e-300))
        updated = np.exp(log_odds - log_odds.max(1, keepdims=True))
        updated /= updated.sum(1, keepdims=True)
        change = float(np.abs(updated - truth).max(initial=0))
        truth = updated
        if change < _TOLERANCE:
            break
    return RaterModel(truth, confusion, share)


class PreferenceModel(NamedTuple):
    """What raters' verdicts on pairs say together.

    Attributes:
        soft_labels: (pairs,) probability that a is better.
        reliability: (raters,) probability that a verdict of the rater other than a tie is right.
    """

    soft_labels: Floats
    reliability: Floats


def fit_preferences(verdicts: Labels) -> PreferenceModel:
    """Soft labels of pairs and reliabilities of raters, by the model of Dawid and Skene.

    The true classes are "a is better" and "b is better". Which answer is a means nothing, so a
    rater is right with the same probability in both; a tie says nothing about a pair.

    Args:
        verdicts: (raters, pairs) labels of `VERDICT_LABELS`; `MISSING` for what wasn't rated.
    """
    votes = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    prior = np.array([[PRIOR_RIGHT, 0.0, PRIOR_WRONG], [PRIOR_WRONG, 0.0, PRIOR_RIGHT]]) / 2
    model = dawid_skene(verdicts, votes, prior=prior, symmetric=True)
    right, wrong = model.confusion[:, 0, 0], model.confusion[:, 0, 2]
    return PreferenceModel(model.truth[:, 0], right / (right + wrong))


def verdict_table(
    verdicts: Mapping[tuple[str, str], str],
) -> tuple[Sequence[str], Sequence[str], Labels]:
    """Names of raters, ids of pairs, and (raters, pairs) labels of `VERDICT_LABELS`.

    Args:
        verdicts: Verdict by rater and pair; those other than a, b and tie are `MISSING`.
    """
    raters = list(dict.fromkeys(rater for rater, _ in verdicts))
    pairs = list(dict.fromkeys(pair for _, pair in verdicts))
    row = {name: i for i, name in enumerate(raters)}
    column = {name: i for i, name in enumerate(pairs)}
    table = np.full((len(raters), len(pairs)), MISSING, np.int64)
    for (rater, pair), verdict in verdicts.items():
        table[row[rater], column[pair]] = VERDICT_LABELS.get(verdict, MISSING)
    return raters, pairs, table
