"""Intervals of rates and means over examples of which several have the same prompt."""

import math

import numpy as np
import pytest

from mlx_align.algorithms.base import held_out_means
from mlx_align.evaluation.statistics import rate_estimate
from mlx_align.system.intervals import effective_size, metric_interval, t_score, wilson_interval
from mlx_align.types import TokenizedGroup

RATE = "rewards/accuracies"


def groups(prompts):
    ids = np.ones(1, np.int32)
    return [TokenizedGroup(np.array([p], np.int32), (ids, ids), f"x:{p}") for p in prompts]


def test_examples_with_prompts_of_their_own_are_independent():
    right, margins = np.array([1, 1, 0, 1.0]), np.array([2.0, 1.0, -1.0, 3.0])
    rows = {RATE: right, "margins": margins}
    found = held_out_means(rows, groups(range(4)))
    assert found == held_out_means(rows)
    assert "prompts" not in found
    assert metric_interval(found, RATE, 4) == wilson_interval(0.75, 4)
    assert rate_estimate(right, np.arange(4)) == wilson_interval(0.75, 4)


def test_copies_of_an_example_are_no_evidence():
    right = np.array([1, 1, 0, 1, 0, 1, 1, 1.0])
    margins = np.arange(8.0) ** 2
    once = held_out_means({RATE: right, "margins": margins})
    rows = {RATE: np.repeat(right, 5), "margins": np.repeat(margins, 5)}
    often = held_out_means(rows, groups(np.repeat(np.arange(8), 5)))
    assert often["prompts"] == 8
    wanted, found = (metric_interval(one, "margins", n) for one, n in ((once, 8), (often, 40)))
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-12)
    # The variance of 8 prompts is estimated with 7 degrees of freedom; t is 2.3646 for them.
    expected = wilson_interval(0.75, 7 * (1.959964 / 2.364624) ** 2)
    for found in (
        metric_interval(often, RATE, 40),
        rate_estimate(rows[RATE], np.repeat(np.arange(8), 5)),
    ):
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-3)


def test_a_rate_of_all_or_nothing_counts_prompts():
    for rate in (0.0, 1.0):
        assert rate_estimate(np.full(40, rate), np.repeat(np.arange(8), 5)) == wilson_interval(
            rate, 8
        )
    # Prompts that happen to vary little are never worth more than n.
    assert effective_size(0.5, 1e-9, 160, 80) < 160


@pytest.mark.parametrize(("freedom", "quantile"), [(3, 3.1824), (7, 2.3646), (30, 2.0423)])
def test_quantiles_of_t(freedom, quantile):
    assert t_score(freedom) == pytest.approx(quantile, rel=0.02 if freedom < 6 else 1e-3)


def test_intervals_cover_the_truth_as_often_as_they_say():
    random = np.random.default_rng(0)
    covered = naive = 0
    prompt = np.repeat(np.arange(30), 6)
    for _ in range(400):
        # Rates of prompts vary: Beta(2, 1) has the mean 2/3.
        rates = np.repeat(random.beta(2, 1, 30), 6)
        right = (random.uniform(size=180) < rates) * 1.0
        found, plain = rate_estimate(right, prompt), wilson_interval(right.mean(), 180)
        covered += found.low <= 2 / 3 <= found.high
        naive += plain.low <= 2 / 3 <= plain.high
    assert 0.92 <= covered / 400 <= 0.98
    assert naive / 400 < 0.85


def test_the_margin_of_rows_in_pairs_has_the_error_of_the_differences():
    from mlx_align.algorithms.kto import _clustered_deviations

    random = np.random.default_rng(1)
    shared = random.normal(size=50)
    own = np.stack([shared + 0.3 + 0.1 * random.normal(size=50), shared], 1).ravel()
    good = np.tile([True, False], 50)
    found = _clustered_deviations(good, own, good, 0.5, np.repeat(np.arange(50), 2))
    differences = 0.5 * (own[0::2] - own[1::2])
    wanted = differences.std(ddof=1) / math.sqrt(50)
    assert found["rewards/margins_std"] / math.sqrt(100) == pytest.approx(wanted, rel=1e-9)
