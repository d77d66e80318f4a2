"""The best of n against every subset, and against fresh draws."""

from itertools import combinations, pairwise
from math import comb

import numpy as np
import pytest

from mlx_align.evaluation.metrics import best_of_kl, best_weights, expected_best


def test_known_values():
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 11.0))
    assert expected_best(scores, 4) == pytest.approx(8.8, abs=1e-12)
    # Drawing with replacement is another number.
    with_replacement = sum(x * ((x / 10) ** 4 - ((x - 1) / 10) ** 4) for x in range(1, 11))
    assert with_replacement == pytest.approx(8.4667, abs=1e-12)
    assert best_of_kl(4) == pytest.approx(0.636294, abs=5e-7)
    assert best_of_kl(1) == 0


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_expected_best_is_the_mean_over_all_subsets(n):
    random = np.random.default_rng(n)
    scores = np.round(random.normal(size=7), 1)
    scores[3] = scores[0] = scores.max()
    values = random.normal(size=7)
    best, gold = [], []
    for subset in combinations(range(7), n):
        top = max(scores[list(subset)])
        best.append(top)
        gold.append(np.mean([values[i] for i in subset if scores[i] == top]))
    assert expected_best(scores, n) == pytest.approx(np.mean(best), abs=1e-12)
    assert expected_best(scores, n, values) == pytest.approx(np.mean(gold), abs=1e-12)


def test_expected_best_is_unbiased():
    random = np.random.default_rng(3)
    found = [expected_best(random.uniform(size=6), 3) for _ in range(4000)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - 3 / 4) < 4 * error
    # The plug-in estimator, with replacement, is off by far more than that.
    draws = random.uniform(size=(4000, 6))
    plugged = np.array([d[random.integers(0, 6, 3)].max() for d in draws])
    assert abs(plugged.mean() - 3 / 4) > 4 * error


def test_large_numbers_do_not_overflow():
    weights = best_weights(4000, 1500)
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    assert weights[-1] == pytest.approx(1500 / 4000, rel=1e-9)
    assert weights[-3] == pytest.approx(comb(3997, 1499) / comb(4000, 1500), rel=1e-9)
    assert not weights[:1499].any()


def test_the_curve_rises_and_shifts_with_the_scores():
    scores = np.random.default_rng(1).normal(size=16)
    curve = [expected_best(scores, n) for n in range(1, 17)]
    assert curve[0] == pytest.approx(scores.mean())
    assert curve[-1] == pytest.approx(scores.max())
    assert all(later > earlier for earlier, later in pairwise(curve))
    assert expected_best(scores + 5, 4) == pytest.approx(expected_best(scores, 4) + 5)


def test_numbers_beyond_the_samples_are_refused():
    with pytest.raises(ValueError, match="best of 4 can't be estimated from 3"):
        expected_best([1, 2, 3], 4)
    with pytest.raises(ValueError, match="best of 0"):
        expected_best([1, 2, 3], 0)
    with pytest.raises(ValueError, match="expected"):
        expected_best([1, 2, 3], 2, [1, 2])
