"""95% confidence intervals of rates and means, from what a row of metrics has of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

LEVEL = 0.95
# Rates: each example counts as 0 or 1 (a tie as ½). All other metrics are means.
AUC = "rewards/auc"
RATES = frozenset({"rewards/accuracies", "logps/accuracies", "completions/ended", AUC})


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95% confidence interval.

    Attributes:
        value: The number.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float


def z_score(level: float = LEVEL) -> float:
    """The quantile of the normal distribution for a two-sided interval: 1.96 for 95%."""
    return NormalDist().inv_cdf((1 + level) / 2)


def t_score(freedom: int) -> float:
    """The quantile of Student's t for a two-sided interval of 95%.

    Exact for 1 and 2 degrees of freedom. From 3 on the expansion of Cornish and Fisher in
    1 / freedom: within 2% at 3, 0.1% from 6 on.

    Args:
        freedom: Degrees of freedom, at least 1.
    """
    if freedom == 1:
        return math.tan(math.pi * LEVEL / 2)
    if freedom == 2:
        return LEVEL * math.sqrt(2 / (1 - LEVEL**2))
    z = z_score()
    coefficients = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(value / freedom**power for power, value in enumerate(coefficients, 1))


def effective_size(rate: float, standard_error: float, n: int, clusters: int) -> float:
    """The number of independent trials that tell as much as `n` trials in clusters.

    Several pairs of one prompt are not independent. This many independent trials have the
    standard error that the clusters show: n divided by the design effect, at most n. It is lowered
    by (z / t)², because a standard error from few clusters is uncertain itself. For a rate of 0 or
    1, where nothing varies, it is the number of clusters.

    Args:
        rate: The rate, in [0, 1].
        standard_error: Its standard error, from the clusters.
        n: Number of trials.
        clusters: Number of clusters; n if every trial is its own.

    Source: Korn and Graubard 1998, "Confidence Intervals for Proportions With Small Expected
    Number of Positive Counts Estimated From Survey Data".
    """
    spread = rate * (1 - rate)
    if clusters >= n:
        return n
    if spread <= 0 or standard_error <= 0:
        return clusters
    adjusted = min(float(n), spread / standard_error**2) * (z_score() / t_score(clusters - 1)) ** 2
    return max(1.0, adjusted)


def wilson_interval(rate: float, n: float) -> Estimate:
    """A rate out of `n` independent trials, with Wilson's score interval.

    Args:
        rate: Share of successes in [0, 1]; ties may count ½.
        n: Number of trials, at least 1; of trials in clusters, their `effective_size`.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    z = z_score()
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # Rounding must not put an end of the interval on the wrong side of the rate.
    return Estimate(rate, min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half)))


def rate_difference(first: Estimate, second: Estimate) -> Estimate:
    """The difference of two rates, first − second, from their Wilson intervals.

    The rates are taken as independent. For two models on the same examples, that makes the
    interval wider than it has to be.

    Source: Newcombe 1998, "Interval Estimation for the Difference Between Independent
    Proportions", method 10.
    """
    value = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, value - below, value + above)


def mean_difference(
    first: float, first_std: float, second: float, second_std: float, n: int
) -> Estimate:
    """The difference of two means of `n` values each, first − second, with a t interval.

    It has n − 1 degrees of freedom, the fewest that Welch's interval can have.

    Args:
        first: First mean.
        first_std: Standard deviation of the first sample.
        second: Second mean.
        second_std: Standard deviation of the second sample.
        n: Size of each sample.
    """
    value, error = first - second, math.hypot(first_std, second_std) / math.sqrt(n)
    half = t_score(max(n - 1, 1)) * error
    return Estimate(value, value - half, value + half)


def mean_interval(mean: float, error: float, clusters: int) -> Estimate:
    """A mean with a t interval.

    Args:
        mean: The mean.
        error: Its standard error.
        clusters: Number of independent clusters of values, or of values; at least 2.
    """
    half = t_score(clusters - 1) * error
    return Estimate(mean, mean - half, mean + half)


def metric_interval(metrics: Mapping[str, float], name: str, n: int | None) -> Estimate | None:
    """A held-out metric with its interval: Wilson's for rates, Student's for means.

    The AUC is a rate of all pairs of a good and a bad example, which are not independent. Its
    variance is at most that of a rate of as many trials as there are examples of the rarer kind.

    Source: Birnbaum and Klose 1957, "Bounds for the Variance of the Mann-Whitney Statistic".

    Args:
        metrics: Metrics by name, with `<name>_std`, the standard deviation over examples. If
            several examples have the same prompt, there is `prompts` too, their number, and the
            deviations are those that give the standard error over prompts.
        name: The metric.
        n: Number of held-out examples; None if unknown.

    Returns:
        None if the metric, its number of examples or its standard deviation is unknown.
    """
    value = metrics.get(name)
    if value is None or not n:
        return None
    std = metrics.get(f"{name}_std")
    if name.removeprefix("eval/") in RATES:
        if not 0 <= value <= 1:
            return None
        prompts, size = prompts_of(metrics), float(n)
        if std is not None and prompts is not None:
            size = effective_size(value, std / math.sqrt(n), n, prompts)
        if name.endswith(AUC):
            start = name.removesuffix(AUC)
            counts = [metrics.get(f"{start}count/{kind}", n) for kind in ("chosen", "rejected")]
            size = min(size, *counts)
        return wilson_interval(value, size)
    clusters = prompts_of(metrics) or n
    if std is None or clusters < 2:
        return None
    return mean_interval(value, std / math.sqrt(n), clusters)


def prompts_of(metrics: Mapping[str, float]) -> int | None:
    """The number of prompts of held-out examples; None if each has its own, or if unknown."""
    found = metrics.get("eval/prompts", metrics.get("prompts"))
    return None if found is None else int(found)


def kl_interval(kl: Mapping[str, Any]) -> Estimate | None:
    """The interval of a KL as in summary.json: mean, standard error and number of samples."""
    mean, error = kl.get("mean"), kl.get("standard_error")
    if mean is None or error is None or not math.isfinite(error):
        return None
    return mean_interval(mean, error, int(kl["samples"]))
