"""Intervals of rates and means over examples of which several have the same prompt."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mlx_align.algorithms.base import held_out_means
from mlx_align.algorithms.kto import KtoLoss, _influence, evaluate_rows
from mlx_align.evaluation.statistics import rate_estimate
from mlx_align.losses.registry import UNPAIRED_LOSSES, resolve_options
from mlx_align.system.intervals import effective_size, metric_interval, t_score, wilson_interval
from mlx_align.types import TokenizedGroup

RATE = "rewards/accuracies"
KTO_LOSS = KtoLoss("kto", UNPAIRED_LOSSES["kto"], resolve_options("kto", {}))


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


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (7, 2.3646), (30, 2.0423)]
)
def test_quantiles_of_t(freedom, quantile):
    assert t_score(freedom) == pytest.approx(quantile, rel=0.02 if 2 < freedom < 6 else 1e-3)


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


def test_intervals_of_few_means_cover_the_truth():
    random = np.random.default_rng(4)
    covered = 0
    for _ in range(1_000):
        values = random.normal(size=4)
        metrics = {"margins": values.mean(), "margins_std": values.std(ddof=1)}
        found = metric_interval(metrics, "margins", 4)
        covered += found.low <= 0 <= found.high
    assert 0.93 <= covered / 1_000 <= 0.97  # with the normal quantile .85


def test_the_margin_of_rows_in_pairs_has_the_error_of_the_differences():
    random = np.random.default_rng(1)
    shared = random.normal(size=50)
    own = np.stack([shared + 0.3 + 0.1 * random.normal(size=50), shared], 1).ravel()
    good, prompts = np.tile([True, False], 50), groups(np.repeat(np.arange(50), 2))
    found = held_out_means({"margin": _influence(0.5 * own, good, -1)}, prompts)
    differences = 0.5 * (own[0::2] - own[1::2])
    wanted = differences.std(ddof=1) / math.sqrt(50)
    assert found["margin_std"] / math.sqrt(100) == pytest.approx(wanted, rel=1e-9)


def labelled(random, good, bad, rows, spread):
    """KTO's held-out metrics of prompts with so many good and bad rows each.

    Rewards are normal, of good rows √2 higher: the AUC is Φ(1) = .841. `spread` is the part of
    their deviation that the rows of a prompt share.
    """
    prompts = [p for p in range(rows // (good + bad)) for _ in range(good + bad)]
    label = np.tile([True] * good + [False] * bad, rows // (good + bad))
    shared = np.repeat(random.normal(size=rows // (good + bad)), good + bad)
    own = spread * shared + math.sqrt(1 - spread**2) * random.normal(size=rows)
    own += math.sqrt(2) * label
    tokens = [np.array([value]) for value in own]
    pairs = [(one, np.zeros(1)) for one in tokens]
    start = [(np.zeros(1), np.zeros(1))] * rows
    found = [
        replace(group, completions=group.completions[:1], label=bool(one))
        for group, one in zip(groups(prompts), label, strict=True)
    ]
    return own, label, np.array(prompts), evaluate_rows(pairs, start, found, KTO_LOSS)


@pytest.mark.parametrize("spread", [0.0, 0.7])
def test_the_auc_of_rows_that_share_prompts_has_the_error_over_prompts(spread):
    random = np.random.default_rng(2)
    own, label, prompt, found = labelled(random, 2, 1, 240, spread)
    truth = (own[label][:, None] > own[~label]).mean()
    assert found["rewards/auc"] == pytest.approx(truth)
    rows = [np.flatnonzero(prompt == p) for p in range(80)]
    draws = []
    for _ in range(2_000):
        drawn = np.concatenate([rows[p] for p in random.integers(80, size=80)])
        high, low = own[drawn][label[drawn]], own[drawn][~label[drawn]]
        draws.append((high[:, None] > low).mean())
    error = found["rewards/auc_std"] / math.sqrt(240)
    assert error == pytest.approx(np.std(draws), rel=0.1)


@pytest.mark.parametrize(("good", "bad", "spread"), [(2, 1, None), (1, 1, 0.0), (3, 3, 0.7)])
def test_intervals_of_the_auc_cover_the_truth(good, bad, spread):
    random, covered, truth = np.random.default_rng(3), 0, 0.8413
    for _ in range(200):
        metrics = labelled(random, good, bad, 90, spread or 0.0)[-1]
        if spread is None:  # as if every row had a prompt of its own
            metrics = {k: v for k, v in metrics.items() if not k.endswith("_std")}
        found = metric_interval(metrics, "rewards/auc", 90)
        covered += found.low <= truth <= found.high
    assert covered / 200 >= 0.92


def test_a_perfect_auc_has_an_interval_of_its_rarer_kind():
    metrics = {"rewards/auc": 1.0, "count/chosen": 30.0, "count/rejected": 8.0}
    assert metric_interval(metrics, "rewards/auc", 38) == wilson_interval(1.0, 8)
    held_out = {f"eval/{name}": value for name, value in metrics.items()}
    assert metric_interval(held_out, "eval/rewards/auc", 38) == wilson_interval(1.0, 8)
