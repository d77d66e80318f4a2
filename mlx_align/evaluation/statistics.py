"""Statistics of evaluations: intervals, length-controlled win rates, detectable differences.

Pure functions of arrays. The unit of every interval is the prompt, not the single completion:
several completions of one prompt are not independent evidence. Intervals are Wilson's for rates,
normal for means, and a bootstrap over prompts for ratios and length-controlled rates. Policy and
reference are always compared on the same prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from mlx_align.system.intervals import (
    LEVEL,
    Estimate,
    effective_size,
    mean_interval,
    wilson_interval,
    z_score,
)

Floats = npt.NDArray[np.float64]
Clusters = npt.NDArray[np.int64]

RESAMPLES = 2000
# Each resample fits a regression.
LENGTH_CONTROLLED_RESAMPLES = 500
POWER = 0.8
# Standard deviation of the prior on both coefficients of the length-controlled rate. It keeps them
# finite if one model wins everything, or if every longer completion wins. At 64 completions and
# rates of 20% to 80% it moves the rate by less than .005.
PRIOR_SD = 3.0
# Maximum size of the arrays of resamples, elements (8 MB).
_BLOCK_SIZE = 1 << 20
_NEWTON_STEPS = 50
# Maximum change of a coefficient in a step: a logistic fit that starts at 0 can overshoot.
_MAX_STEP = 2.0


def mean_estimate(values: Floats, cluster: Clusters) -> Estimate:
    """The mean of `values` (n,), with a t interval over clusters (n,).

    The interval is that of the held-out means of a run (`system.intervals.metric_interval`).
    """
    error = standard_error(values, cluster)
    if error is None:
        return Estimate(*[float(values.mean())] * 3)
    return mean_interval(float(values.mean()), error, len(np.unique(cluster)))


def ratio_estimate(
    numerator: Floats, denominator: Floats, cluster: Clusters, *, seed: int = 0
) -> Estimate:
    """Σ numerator / Σ denominator, (n,) each, with a percentile bootstrap interval over clusters.

    For example nats per token, with documents as clusters.
    """
    _, index = np.unique(cluster, return_inverse=True)
    above = np.bincount(index, weights=numerator)
    below = np.bincount(index, weights=denominator)
    ratios = np.concatenate(
        [
            (counts @ above) / (counts @ below)
            for counts in resample_counts(len(above), len(above), seed)
        ]
    )
    low, high = np.quantile(ratios, _TAILS)
    return Estimate(float(above.sum() / below.sum()), float(low), float(high))


def rate_estimate(outcomes: Floats, cluster: Clusters) -> Estimate:
    """A mean of outcomes in [0, 1], (n,), with an interval over clusters (n,).

    The interval is Wilson's for the number of independent trials that the clusters are worth, as
    everywhere for held-out rates (`system.intervals.effective_size`).
    """
    rate, clusters = float(outcomes.mean()), len(np.unique(cluster))
    error = standard_error(outcomes, cluster) or 0.0
    return wilson_interval(rate, effective_size(rate, error, len(outcomes), clusters))


def standard_error(values: Floats, cluster: Clusters) -> float | None:
    """Standard error of the mean of `values` (n,), from clusters (n,); None with one cluster.

    For clusters of equal size it is s/√m of the m cluster means.
    """
    _, index = np.unique(cluster, return_inverse=True)
    residuals = np.bincount(index, weights=values - values.mean())
    m = len(residuals)
    if m < 2:
        return None
    return float(math.sqrt(m / (m - 1) * (residuals**2).sum()) / len(values))


def wins(one: Floats, other: Floats) -> Floats:
    """1 where `one` scores higher, 0 where lower, ½ where equal."""
    return 0.5 * (1 + np.sign(one - other))


def length_controlled(
    outcomes: Floats, length_difference: Floats, cluster: Clusters, *, seed: int = 0
) -> Estimate | None:
    """The win rate expected for completions of equal length: σ(θ) of a logistic regression.

    logit P(win) = θ + φ·tanh(d), where d is the length difference divided by its standard deviation
    (not centred: d = 0 is equal length). Ties are outcomes of ½. Both coefficients have a normal
    prior of standard deviation 3, so that separable data has a fit too.

    Args:
        outcomes: (n,) in [0, 1], of the first of two models.
        length_difference: (n,) tokens of the first model's completion minus the second's.
        cluster: (n,) number of the prompt, the unit of the bootstrap.
        seed: Random seed of the bootstrap.

    Returns:
        The rate; None if all differences are the same number other than 0, because the effect of
        length can't be separated then.

    Source: Dubois et al. 2024, "Length-Controlled AlpacaEval", only the length term.
    """
    spread = float(length_difference.std())
    if spread < 1e-12 and abs(length_difference[0]) > 0:
        return None
    feature = np.tanh(length_difference / spread) if spread > 0 else np.zeros_like(outcomes)
    _, index = np.unique(cluster, return_inverse=True)
    fit = fit_logistic(outcomes, feature, np.ones((1, len(outcomes))))
    rate = float(sigmoid(fit[0, 0]))
    if np.ptp(cluster_means(outcomes, cluster)) < 1e-12:
        raw = rate_estimate(outcomes, cluster)
        return Estimate(rate, min(raw.low, rate), max(raw.high, rate))
    thetas = np.concatenate(
        [
            fit_logistic(outcomes, feature, counts[:, index], start=fit[0])[:, 0]
            for counts in resample_counts(
                int(index.max()) + 1, len(outcomes), seed, LENGTH_CONTROLLED_RESAMPLES
            )
        ]
    )
    low, high = sigmoid(np.quantile(thetas, _TAILS))
    return Estimate(rate, float(low), float(high))


def fit_logistic(
    outcomes: Floats, feature: Floats, weights: Floats, *, start: Floats | None = None
) -> Floats:
    """(θ, φ) of logit P = θ + φ·feature by Newton's method, one fit per row of weights.

    Args:
        outcomes: (n,) in [0, 1].
        feature: (n,).
        weights: (fits, n) weight of each outcome in each fit.
        start: (2,) initial coefficients; near the solutions they save steps.

    Returns:
        (fits, 2) coefficients that maximise the penalised likelihood.
    """
    ridge = 1 / PRIOR_SD**2
    fits = np.zeros((len(weights), 2)) + (0.0 if start is None else start)
    for _ in range(_NEWTON_STEPS):
        p = sigmoid(fits[:, :1] + fits[:, 1:] * feature)
        residuals = weights * (outcomes - p)
        slope = np.stack([residuals.sum(axis=1), residuals @ feature], axis=1) - ridge * fits
        # The Hessian is [[a, b], [b, c]].
        curvature = weights * p * (1 - p)
        a = curvature.sum(axis=1) + ridge
        b = curvature @ feature
        c = curvature @ feature**2 + ridge
        step = np.stack([c * slope[:, 0] - b * slope[:, 1], a * slope[:, 1] - b * slope[:, 0]], 1)
        step = np.clip(step / (a * c - b * b)[:, None], -_MAX_STEP, _MAX_STEP)
        fits = fits + step
        if np.abs(step).max() < 1e-8:
            break
    return fits


def cluster_means(values: Floats, cluster: Clusters) -> Floats:
    """The mean of `values` (n,) within each cluster, (clusters,)."""
    _, index = np.unique(cluster, return_inverse=True)
    means: Floats = np.bincount(index, weights=values) / np.bincount(index)
    return means


def detectable_difference(spread: float, n: int) -> float:
    """The smallest true difference that an evaluation of n prompts detects, with a power of 80%.

    In four of five evaluations of n prompts, a two-sided test at 5% finds a difference of this
    size: (z₀.₉₇₅ + z₀.₈)·spread/√n.

    Args:
        spread: Standard deviation of a prompt's outcome.
        n: Number of prompts.
    """
    return (z_score() + NormalDist().inv_cdf(POWER)) * spread / math.sqrt(n)


def detectable_rate(outcomes: Floats, cluster: Clusters) -> float:
    """The smallest difference of a win rate from ½ that these prompts could show.

    Uses the standard deviation of the outcomes, or, if all prompts have the same outcome and
    their spread is unknown, that of single wins and losses, ½.
    """
    means = cluster_means(outcomes, cluster)
    spread = float(means.std(ddof=1)) if len(means) > 1 else 0.0
    return detectable_difference(spread or 0.5, len(means))


_TAILS = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]


def resample_counts(
    clusters: int, width: int, seed: int, count: int = RESAMPLES
) -> Iterator[Floats]:
    """Yield the number of times that clusters occur in resamples, (resamples, clusters), in blocks.

    `width` is the width of the widest array that is made from a block.
    """
    random = np.random.default_rng(seed)
    remaining = count
    while remaining:
        block = min(remaining, max(1, _BLOCK_SIZE // width))
        remaining -= block
        drawn = random.integers(0, clusters, (block, clusters))
        drawn += np.arange(block)[:, None] * clusters
        counts = np.bincount(drawn.ravel(), minlength=block * clusters)
        yield counts.reshape(block, clusters).astype(np.float64)


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + e^−x), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))
