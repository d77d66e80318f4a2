"""Confidence intervals of rates that are known only as a rate and a count."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.95


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


def wilson_interval(rate: float, n: int) -> Estimate:
    """A rate out of `n` independent trials, with Wilson's score interval.

    Args:
        rate: Share of successes in [0, 1]; ties may count ½.
        n: Number of trials, at least 1.

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
    """The difference of two means of `n` values each, first − second, with a normal interval.

    Args:
        first: First mean.
        first_std: Standard deviation of the first sample.
        second: Second mean.
        second_std: Standard deviation of the second sample.
        n: Size of each sample.
    """
    value, half = first - second, z_score() * math.hypot(first_std, second_std) / math.sqrt(n)
    return Estimate(value, value - half, value + half)
