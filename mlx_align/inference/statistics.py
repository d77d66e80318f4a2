"""What a number of an evaluation is worth: intervals, corrected rates, what could be detected.

Pure functions of arrays. Prompts are drawn anew, never single answers: several answers to one
prompt are no independent evidence, and both roles are always compared on the same prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Clusters = npt.NDArray[np.int64]

RESAMPLES = 2000
# Each of them is a regression.
LENGTH_CONTROLLED_RESAMPLES = 500
LEVEL = 0.95
POWER = 0.8
# Standard deviation of the prior on both coefficients of the length-controlled rate. It keeps them
# finite where one role wins everything, or every longer answer wins; at 64 answers and rates of
# 20% to 80% it moves the rate by less than .005.
PRIOR_SD = 3.0
# Numbers of an array of resamples that are held at once, 8 MB of them.
_HELD = 1 << 20
_NEWTON_STEPS = 50
# A logistic fit that starts at 0 can overshoot; no coefficient moves further in one step.
_LONGEST_STEP = 2.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95% interval.

    Attributes:
        value: The number itself.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def mean_estimate(values: Floats, cluster: Clusters, *, seed: int = 0) -> Estimate:
    """The mean of `values` (n,), with a percentile bootstrap interval over clusters (n,)."""
    return ratio_estimate(values, np.ones_like(values), cluster, seed=seed)


def ratio_estimate(above: Floats, below: Floats, cluster: Clusters, *, seed: int = 0) -> Estimate:
    """Σ above / Σ below, both (n,), with a percentile bootstrap interval over clusters (n,).

    Nats per token, say, with documents as clusters.
    """
    _, index = np.unique(cluster, return_inverse=True)
    sums = np.bincount(index, weights=above)
    counts = np.bincount(index, weights=below)
    ratios = np.concatenate(
        [(drawn @ sums) / (drawn @ counts) for drawn in _resamples(len(sums), len(sums), seed)]
    )
    low, high = np.quantile(ratios, _TAILS)
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))


def rate_estimate(outcomes: Floats, cluster: Clusters, *, seed: int = 0) -> Estimate:
    """A mean of outcomes in [0, 1], (n,), with an interval over clusters (n,).

    Where all clusters have one mean (all won, say, or all tied) there is nothing to resample; the
    interval is then Wilson's for as many trials as there are clusters.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    means = cluster_means(outcomes, cluster)
    if np.ptp(means) > 1e-12:
        return mean_estimate(outcomes, cluster, seed=seed)
    rate, n, z = float(means[0]), len(means), NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # Rounding must not put an end on the wrong side of the rate.
    return Estimate(rate, min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half)))


def standard_error(values: Floats, cluster: Clusters) -> float | None:
    """Of the mean of `values` (n,), from the spread between clusters; None with one cluster.

    For clusters of one size it is s/√m of the m cluster means.
    """
    _, index = np.unique(cluster, return_inverse=True)
    off = np.bincount(index, weights=values - values.mean())
    m = len(off)
    if m < 2:
        return None
    return float(math.sqrt(m / (m - 1) * (off**2).sum()) / len(values))


def wins(one: Floats, other: Floats) -> Floats:
    """1 where `one` scores higher, 0 where lower, ½ where equal."""
    return 0.5 * (1 + np.sign(one - other))


def length_controlled(
    outcomes: Floats, length_difference: Floats, cluster: Clusters, *, seed: int = 0
) -> Estimate | None:
    """The win rate that would be at answers of equal length: σ(θ) of a logistic regression.

    logit P(win) = θ + φ·tanh(d), d the length difference over its standard deviation (which is not
    centred: d = 0 is equal length). Ties are outcomes of ½. Both coefficients have a normal prior
    of standard deviation 3, so that separable data has a fit too.

    Args:
        outcomes: (n,) in [0, 1], of the first of two roles.
        length_difference: (n,) tokens, the first's answer minus the other's.
        cluster: (n,) number of the prompt, the unit of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        None where all differences are one number other than 0: what is length and what is not
        can't be told apart then.

    Source: Dubois et al. 2024, "Length-Controlled AlpacaEval", its length term alone.
    """
    spread = float(length_difference.std())
    if spread < 1e-12 and abs(length_difference[0]) > 0:
        return None
    feature = np.tanh(length_difference / spread) if spread > 0 else np.zeros_like(outcomes)
    _, index = np.unique(cluster, return_inverse=True)
    fit = fit_logistic(outcomes, feature, np.ones((1, len(outcomes))))
    whole = float(sigmoid(fit[0, 0]))
    if np.ptp(cluster_means(outcomes, cluster)) < 1e-12:
        raw = rate_estimate(outcomes, cluster)
        return Estimate(whole, min(raw.low, whole), max(raw.high, whole))
    thetas = np.concatenate(
        [
            fit_logistic(outcomes, feature, drawn[:, index], start=fit[0])[:, 0]
            for drawn in _resamples(
                int(index.max()) + 1, len(outcomes), seed, LENGTH_CONTROLLED_RESAMPLES
            )
        ]
    )
    low, high = sigmoid(np.quantile(thetas, _TAILS))
    return Estimate(whole, float(low), float(high))


def fit_logistic(
    outcomes: Floats, feature: Floats, weights: Floats, *, start: Floats | None = None
) -> Floats:
    """(θ, φ) of logit P = θ + φ·feature by Newton's method, one fit per row of weights.

    Args:
        outcomes: (n,) in [0, 1].
        feature: (n,).
        weights: (fits, n) what each outcome counts in each fit.
        start: (2,) near the solutions, to save steps.

    Returns:
        (fits, 2), where the penalised likelihood is greatest.
    """
    ridge = 1 / PRIOR_SD**2
    found = np.zeros((len(weights), 2)) + (0.0 if start is None else start)
    for _ in range(_NEWTON_STEPS):
        p = sigmoid(found[:, :1] + found[:, 1:] * feature)
        off = weights * (outcomes - p)
        slope = np.stack([off.sum(axis=1), off @ feature], axis=1) - ridge * found
        curve = weights * p * (1 - p)
        a = curve.sum(axis=1) + ridge
        b = curve @ feature
        c = curve @ feature**2 + ridge
        step = np.stack([c * slope[:, 0] - b * slope[:, 1], a * slope[:, 1] - b * slope[:, 0]], 1)
        step = np.clip(step / (a * c - b * b)[:, None], -_LONGEST_STEP, _LONGEST_STEP)
        found = found + step
        if np.abs(step).max() < 1e-8:
            break
    return found


def cluster_means(values: Floats, cluster: Clusters) -> Floats:
    """The mean of `values` (n,) within each cluster, (clusters,)."""
    _, index = np.unique(cluster, return_inverse=True)
    means: Floats = np.bincount(index, weights=values) / np.bincount(index)
    return means


def detectable_difference(spread: float, n: int) -> float:
    """The smallest true difference from "none" that n prompts would show.

    In four of five evaluations of n prompts, a two-sided test at 5% finds a difference of this
    size: (z₀.₉₇₅ + z₀.₈)·spread/√n.

    Args:
        spread: Standard deviation of a prompt's outcome.
        n: Prompts.
    """
    normal = NormalDist()
    return (normal.inv_cdf((1 + LEVEL) / 2) + normal.inv_cdf(POWER)) * spread / math.sqrt(n)


def detectable_rate(outcomes: Floats, cluster: Clusters) -> float:
    """The smallest difference of a win rate from ½ that so many prompts would show.

    With the spread of the outcomes themselves, or where all prompts are alike, which tells
    nothing of it, that of single wins and losses, ½.
    """
    means = cluster_means(outcomes, cluster)
    spread = float(means.std(ddof=1)) if len(means) > 1 else 0.0
    return detectable_difference(spread or 0.5, len(means))


_TAILS = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]


def _resamples(clusters: int, width: int, seed: int, count: int = RESAMPLES) -> Iterator[Floats]:
    """How often each cluster comes in each resample, in blocks (resamples, clusters).

    `width` is that of the widest array that is made of a block.
    """
    random = np.random.default_rng(seed)
    left = count
    while left:
        block = min(left, max(1, _HELD // width))
        left -= block
        drawn = random.integers(0, clusters, (block, clusters))
        drawn += np.arange(block)[:, None] * clusters
        counts = np.bincount(drawn.ravel(), minlength=block * clusters)
        yield counts.reshape(block, clusters).astype(np.float64)


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + e^−x), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))
