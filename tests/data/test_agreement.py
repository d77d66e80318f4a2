"""Agreement of raters against published examples, and against krippendorff, statsmodels, crowd-kit.

`tests/oracle/raters.json` has what these packages give, made by `scripts/make_raters.py`.
"""

import json

import numpy as np
import pytest
from helpers.paths import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_align.data.agreement import (
    MISSING,
    PRIOR_RIGHT,
    PRIOR_WRONG,
    alpha_interval,
    cohen_kappa,
    dawid_skene,
    fit_preferences,
    fleiss_kappa,
    krippendorff_alpha,
)

ORACLE = json.loads((ROOT / "tests" / "oracle" / "raters.json").read_text())
_ = None
# The example of krippendorff's README, and that of Krippendorff 2011, section C.
README = [
    [_, _, _, _, _, 3, 4, 1, 2, 1, 1, 3, 3, _, 3],
    [1, _, 2, 1, 3, 3, 4, 3, _, _, _, _, _, _, _],
    [_, _, 2, 1, 3, 4, 4, _, 2, 1, 1, 3, 3, _, 4],
]
PAPER = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
]


def table(rows):
    return np.array([[MISSING if x is None else x for x in row] for row in rows])


@pytest.mark.parametrize(
    ("rows", "level", "expected"),
    [
        (README, "nominal", 0.691358024691358),
        (README, "ordinal", 0.8067214199413153),
        (PAPER, "nominal", 0.743421052631579),
        (PAPER, "ordinal", 0.8153875037548814),
    ],
)
def test_alpha_of_published_examples(rows, level, expected):
    assert krippendorff_alpha(table(rows), level) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("level", ["nominal", "ordinal"])
def test_alpha_equals_the_package(level):
    found = krippendorff_alpha(np.array(ORACLE["ratings"]), level)
    assert found == pytest.approx(ORACLE[level], abs=1e-9)


def test_alpha_of_perfect_chance_and_missing():
    both = np.array([[0, 1, 2, 0], [0, 1, 2, 0]])
    assert krippendorff_alpha(both) == 1
    assert np.isnan(krippendorff_alpha(np.array([[0, 1, MISSING], [MISSING, MISSING, 1]])))
    draw = np.random.default_rng(0)
    chance = krippendorff_alpha(draw.integers(0, 3, (4, 5000)))
    assert chance == pytest.approx(0, abs=0.02)


def test_the_interval_of_alpha_covers_it():
    """Two raters right in 80% and 90%: alpha of a million pairs is known; 95% of 60 cover it."""
    draw = np.random.default_rng(1)

    def rate(count):
        truth = draw.integers(0, 2, count)
        wrong = draw.random((2, count)) < np.array([[0.2], [0.1]])
        return np.where(wrong, 1 - truth, truth)

    exact = krippendorff_alpha(rate(1_000_000))
    assert exact == pytest.approx(2 * 0.74 - 1, abs=0.01)
    intervals = [alpha_interval(rate(100), seed=seed) for seed in range(60)]
    assert 52 <= sum(one.low <= exact <= one.high for one in intervals) <= 60


def test_fleiss_kappa_of_the_published_example():
    """Fleiss 1971 in the form of Wikipedia's page on it: 14 raters, 10 units, 5 labels."""
    counts = """0 0 0 0 14  0 2 6 4 2  0 0 3 5 6  0 3 9 2 0  2 2 8 1 1
                7 7 0 0 0   3 2 6 3 0  2 5 3 2 2  6 5 2 1 0  0 2 2 3 7"""
    found = fleiss_kappa(np.array(counts.split(), float).reshape(10, 5))
    assert found == pytest.approx(0.20993070442195522, abs=1e-12)
    with pytest.raises(ValueError, match="same number of raters"):
        fleiss_kappa(np.array([[1.0, 1.0], [2.0, 1.0]]))


@pytest.mark.parametrize(
    ("cells", "expected"),
    [([[20, 5], [10, 15]], 0.4), ([[0, 10, 1], [9, 16, 2], [3, 1, 9]], 0.16287878787878776)],
)
def test_cohen_kappa_of_published_examples(cells, expected):
    """The grants of Wikipedia's page, and the three-label table of statsmodels' tests."""
    labels = [(i, j) for i, row in enumerate(cells) for j, n in enumerate(row) for _ in range(n)]
    first, second = np.array([*labels, (0, MISSING)]).T
    assert cohen_kappa(first, second) == pytest.approx(expected, abs=1e-12)


def test_kappas_equal_statsmodels():
    labels = np.array(ORACLE["complete"])
    counts = (labels[:, :, None] == np.arange(3)).sum(0).astype(float)
    assert fleiss_kappa(counts) == pytest.approx(ORACLE["fleiss"], abs=1e-9)
    assert cohen_kappa(*labels[:2]) == pytest.approx(ORACLE["cohen"], abs=1e-9)


def test_dawid_skene_equals_crowd_kit():
    found = dawid_skene(np.array(ORACLE["ratings"]), np.eye(3))
    np.testing.assert_allclose(found.truth, ORACLE["probabilities"], atol=1e-6)


VOTES = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])


def simulate(reliability, pairs, *, ties=0.1, rated=0.8, seed=0):
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, 2, pairs)
    right = draw.random((len(reliability), pairs)) < np.array(reliability)[:, None]
    labels = 2 * np.where(right, truth, 1 - truth)
    labels[draw.random(labels.shape) < ties] = 1
    labels[draw.random(labels.shape) > rated] = MISSING
    return truth, labels


def test_the_symmetric_model_is_the_general_one_on_pairs_in_both_orders():
    _, labels = simulate((0.9, 0.75, 0.6), 40)
    swapped = np.where(labels == MISSING, MISSING, 2 - labels)
    symmetric = dawid_skene(labels, VOTES, prior=0.5, symmetric=True)
    both = dawid_skene(np.concatenate([labels, swapped], 1), VOTES, prior=1.0)
    np.testing.assert_allclose(both.truth[:40], symmetric.truth, atol=1e-6)
    np.testing.assert_allclose(both.confusion, symmetric.confusion, atol=1e-6)


def test_reliabilities_are_recovered_and_labels_calibrated():
    reliability = (0.95, 0.85, 0.75, 0.6)
    truth, labels = simulate(reliability, 8000)
    found = fit_preferences(labels)
    np.testing.assert_allclose(found.reliability, reliability, atol=0.03)
    soft = found.soft_labels
    for low, high in ((0.5, 0.8), (0.8, 0.95), (0.95, 1.0)):
        sure = np.maximum(soft, 1 - soft)
        inside = (sure > low) & (sure <= high)
        right = (soft > 0.5) == (truth == 0)
        assert right[inside].mean() == pytest.approx(sure[inside].mean(), abs=0.03)
    # A bad rater is outvoted: better than the majority.
    votes = (labels == 0).sum(0) - (labels == 2).sum(0)
    model_right = ((soft > 0.5) == (truth == 0)).mean()
    vote_right = np.where(votes == 0, 0.5, (votes > 0) == (truth == 0)).mean()
    assert model_right > vote_right + 0.02


def test_without_pairs_in_common_a_rater_has_the_prior():
    labels = np.full((2, 30), MISSING)
    labels[0, :15], labels[1, 15:] = 0, 2
    found = fit_preferences(labels)
    prior = PRIOR_RIGHT / (PRIOR_RIGHT + PRIOR_WRONG)
    np.testing.assert_allclose(found.reliability, prior, atol=1e-6)
    np.testing.assert_allclose(found.soft_labels, [prior] * 15 + [1 - prior] * 15, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_names_of_answers_and_order_of_raters_mean_nothing(seed):
    _, labels = simulate((0.9, 0.7, 0.6), 25, seed=seed)
    found = fit_preferences(labels)
    flip = np.random.default_rng(seed).random(25) < 0.5
    flipped = np.where(flip & (labels != MISSING), 2 - labels, labels)[::-1]
    again = fit_preferences(flipped)
    expected = np.where(flip, 1 - found.soft_labels, found.soft_labels)
    np.testing.assert_allclose(again.soft_labels, expected, atol=1e-6)
    np.testing.assert_allclose(again.reliability, found.reliability[::-1], atol=1e-6)


def test_three_of_three_votes_are_no_certainty():
    labels = np.zeros((3, 1), np.int64)
    assert 0.9 < fit_preferences(labels).soft_labels[0] < 0.999
