"""The report on a reward model: each number against what it must be, by closed form or by hand."""

import json

import numpy as np
import pytest

from mlx_align.evaluation.render import render_reward_report
from mlx_align.evaluation.reward_model import (
    ScoredComparisons,
    calibration_bins,
    calibration_error,
    evaluate_pair_scores,
    evaluate_reward_scores,
    fitted_temperature,
    reward_report,
    spearman,
)
from mlx_align.evaluation.statistics import mean_estimate
from mlx_align.inference.scoring import GroupScores
from mlx_align.types import TokenizedGroup


def judged(difference, better=None, worse=None, probability=None, prompt=None):
    n = len(difference)
    full = np.full(n, 1.0)
    return ScoredComparisons(
        np.asarray(difference, float),
        full if probability is None else np.asarray(probability, float),
        10 * full if better is None else np.asarray(better, float),
        10 * full if worse is None else np.asarray(worse, float),
        np.arange(n) if prompt is None else np.asarray(prompt),
    )


def report_of(one, **more):
    scores = np.concatenate([one.difference, -one.difference])
    lengths = np.concatenate([one.better_length, one.worse_length])
    return reward_report(one, scores, lengths, **more)


def labeller(says, true, n=4000, seed=0):
    """Comparisons of which it is `says` sure and right in `true` of them."""
    right = np.random.default_rng(seed).uniform(size=n) < true
    return np.where(right, 1, -1) * np.log(says / (1 - says))


def test_accuracy_and_its_parts():
    one = judged([3, 1, -2, 0, 0.5, -4], better=[9, 3, 2, 5, 8, 8], worse=[4, 6, 4, 5, 2, 1])
    found = report_of(one)
    assert found.comparisons == 6
    assert found.accuracy == pytest.approx(3.5 / 6)  # equal scores count half
    assert found.longer_accuracy == pytest.approx(3.5 / 6)
    assert (found.accuracy_shorter_chosen, found.shorter_chosen) == (0.5, 2)
    # |Δ| in order: 0, .5, 1, 2, 3, 4; quarters of 2, 2, 1, 1.
    assert [part.accuracy for part in found.by_difference] == [0.75, 0.5, 1, 0]
    assert [part.comparisons for part in found.by_difference] == [2, 2, 1, 1]
    # Ratios 2.25, .5, .5, 1, 4, 8.
    assert [part.comparisons for part in found.by_length_ratio] == [0, 2, 1, 0, 3]
    assert [part.accuracy for part in found.by_length_ratio][1:3] == [0.5, 0.5]
    assert found.by_length_ratio[0].accuracy is None
    json.dumps(found.as_json())


def test_undecided_comparisons_count_for_calibration_alone():
    decided = report_of(judged([1.0, -1.0, 2.0]))
    both = report_of(judged([1.0, -1.0, 2.0, 5.0], probability=[1, 1, 1, 0.5]))
    assert (both.accuracy, both.comparisons) == (decided.accuracy, 3)
    assert both.ece > decided.ece


def test_temperature_of_an_overconfident_labeller():
    """Says .9 where .75 is true: logit(.9) / logit(.75) = 2."""
    gap = labeller(0.9, 0.75)
    found = report_of(judged(gap))
    assert found.temperature == pytest.approx(2.0, abs=0.1)
    assert found.ece == pytest.approx(0.15, abs=0.02)
    assert found.ece_at_temperature < 0.02
    # With the true shares as soft labels nothing is left to chance.
    exact = fitted_temperature(np.full(1, np.log(9.0)), np.full(1, 0.75))
    assert exact == pytest.approx(2.0, abs=1e-6)
    assert fitted_temperature(labeller(0.6, 0.8), np.ones(4000)) < 0.5
    assert "overconfident" in render_reward_report(found)


def test_no_temperature_fits():
    assert fitted_temperature(np.array([1.0, 2.0]), np.ones(2)) is None  # all right
    assert fitted_temperature(np.array([1.0, -2.0]), np.ones(2)) is None  # no more than half
    assert "no temperature fits" in render_reward_report(report_of(judged([1.0, 2.0])))


def test_a_calibrated_labeller():
    random = np.random.default_rng(0)
    gap = random.normal(0, 2, 20_000)
    right = random.uniform(size=20_000) < 1 / (1 + np.exp(-np.abs(gap)))
    signed = np.where(right, 1, -1) * np.abs(gap)
    assert calibration_error(signed, np.ones(20_000)) < 0.02
    assert fitted_temperature(signed, np.ones(20_000)) == pytest.approx(1, abs=0.05)
    # A single bin by hand: .72 sure, right in 1 of 2.
    sure = np.log(0.72 / 0.28)
    assert calibration_error(np.array([sure, -sure]), np.ones(2)) == pytest.approx(0.22)


def test_calibration_bins():
    """By hand: .51 and .54 sure in one bin, wrong and half right; .99 sure in the last, right."""
    gaps = [np.log(p / (1 - p)) for p in (0.51, 0.54, 0.99)]
    low, high = calibration_bins(np.array([-gaps[0], gaps[1], gaps[2]]), np.array([1, 0.5, 1]))
    assert low == pytest.approx((0.525, 0.25, 2))
    assert high == pytest.approx((0.99, 1, 1))
    error = calibration_error(np.array([-gaps[0], gaps[1], gaps[2]]), np.array([1, 0.5, 1]))
    assert error == pytest.approx((2 * 0.275 + 0.01) / 3)
    found = report_of(judged([1.0, -1.0])).as_json()["calibration"]
    assert found == [{"confidence": pytest.approx(0.731059), "right": 0.5, "comparisons": 2}]


def test_interval_of_a_margin_counts_prompts():
    values = (np.random.default_rng(1).uniform(size=400) < 0.7).astype(float)
    found = mean_estimate(values, np.arange(400))
    width = 2 * 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert found.high - found.low == pytest.approx(width, rel=0.01)
    # Four copies of each are no more evidence than one.
    copied = mean_estimate(np.repeat(values, 4), np.repeat(np.arange(400), 4))
    assert (copied.low, copied.high) == pytest.approx((found.low, found.high))


def test_spearman():
    random = np.random.default_rng(2)
    one = random.normal(size=50)
    assert spearman(one, np.exp(one)) == pytest.approx(1)
    assert spearman(one, -(one**3)) == pytest.approx(-1)
    # 1 − 6·Σd²/(n(n²−1)) where nothing ties.
    other = random.normal(size=50)
    d = one.argsort().argsort() - other.argsort().argsort()
    assert spearman(one, other) == pytest.approx(1 - 6 * (d**2).sum() / (50 * (50**2 - 1)))
    # With ties: ranks 1.5, 1.5, 3 and 1, 2, 3.
    assert spearman(np.array([1.0, 1, 2]), np.array([1.0, 2, 3])) == pytest.approx(0.866025)
    assert spearman(np.ones(3), np.array([1.0, 2, 3])) is None


def test_warnings():
    assert any("few" in w for w in report_of(judged([1.0, -1, 1])).warnings)
    random = np.random.default_rng(3)
    n = 400
    right = np.where(random.uniform(size=n) < 0.7, 1.0, -1.0)
    balanced = report_of(judged(right, better=[9, 4] * (n // 2), worse=[4, 9] * (n // 2)))
    assert balanced.warnings == ()
    longer = report_of(judged(np.ones(n), better=[9] * n, worse=[4] * n))
    assert longer.longer_accuracy == 1
    text = " ".join(longer.warnings)
    assert "above 90%" in text
    assert '"pick the longer" alone gains 50.0% over chance, the model 50.0%' in text
    shorter = report_of(judged(right, better=[4] * n, worse=[9] * n))
    assert '"pick the shorter"' in " ".join(shorter.warnings)


def test_reports_on_scored_groups():
    """Groups without scores are skipped; the first completion of a pair is the better one."""
    ids = [np.arange(1, n + 1, dtype=np.int32) for n in (3, 5, 2)]
    pairs = [
        TokenizedGroup(ids[0], (ids[i], ids[j]), "x") for i, j in ((1, 2), (2, 1), (1, 2), (1, 0))
    ]
    values = [[1.0, -1.0], [0.5, 0.0], [-1.0, 1.0], [2.0, 0.0]]
    scores = [
        GroupScores(np.array(value, np.float32), tokens=pair)
        for value, pair in zip(values, pairs, strict=True)
    ]
    scores.insert(1, GroupScores(None, reason="too long"))
    found = evaluate_reward_scores(scores)
    assert (found.comparisons, found.accuracy, found.longer_accuracy) == (4, 0.75, 0.75)
    found = evaluate_pair_scores(scores)
    assert (found.comparisons, found.accuracy) == (4, 0.75)
    assert found.margin == pytest.approx(0.625)
    assert evaluate_reward_scores(scores[1:2]) is None
    assert evaluate_pair_scores([]) is None
