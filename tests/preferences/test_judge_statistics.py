"""Judges with planted faults: position bias, noise and self-preference are found and corrected."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mlx_align.preferences.judge_statistics import (
    BothOrders,
    Sample,
    agreement,
    average_orders,
    calibrate,
    consistency,
    log_loss,
    log_odds,
    measure_judge,
    noise,
    position_bias,
    self_preference,
)


def logistic(x):
    return 1 / (1 + np.exp(-np.asarray(x, float)))


def logit(p):
    return math.log(p / (1 - p))


def planted(n, seed, *, position=0.7, error=0.2, own=0.0, sampled=True, spread=0.0):
    """Verdicts of a judge whose log-odds for the first answer are position + quality + own."""
    draw = np.random.default_rng(seed)
    a_better = draw.random(n) < 0.5
    size = logit(1 - error) + spread * draw.normal(size=n)
    author = draw.integers(-1, 2, n).astype(float) if own else np.zeros(n)
    quality = np.where(a_better, size, -size) + own * author
    forward, backward = (logistic(logit(position) + sign * quality) for sign in (1, -1))
    if sampled:
        forward, backward = ((draw.random(n) < p).astype(float) for p in (forward, backward))
    return Sample(BothOrders(forward, backward), a_better.astype(float), author, np.arange(n))


def test_a_judge_with_position_bias_and_noise_is_found_out_and_corrected():
    """Position bias .7 and 20% noise, 400 pairs: everything within .05 (two standard errors)."""
    for seed in range(5):
        sample = planted(400, seed)
        report = measure_judge(sample)
        assert report.position_bias.value == pytest.approx(0.7, abs=0.05)
        assert report.noise.value == pytest.approx(0.2, abs=0.05)
        # One order alone is right in (σ(s + t) + 1 − σ(s − t)) / 2 of the cases.
        s, t = logit(0.7), logit(0.8)
        expected = (logistic(s + t) + 1 - logistic(s - t)) / 2
        assert report.one_order.value == pytest.approx(expected, abs=0.05)
        assert report.decided.value == pytest.approx(float(logistic(2 * t)), abs=0.05)
        # Two verdicts that agree are right with σ(2t) = .941; those that contradict each other
        # cancel.
        odds = average_orders(sample.verdicts)
        decided = odds != 0
        right = (np.sign(odds) == np.sign(sample.human - 0.5))[decided].mean()
        assert right == pytest.approx(float(logistic(2 * t)), abs=0.05)
        corrected = report.calibration.probability(odds, sample.own)
        confidence = np.maximum(corrected, 1 - corrected)[decided]
        np.testing.assert_allclose(confidence, logistic(2 * t), atol=0.05)
        assert report.beats_coin
        # Expected: .41 calibrated, .60 when every agreement is taken as certain.
        assert report.log_loss[1] < min(0.47, report.log_loss[0])


def test_intervals_cover_the_planted_values():
    covered = np.zeros(2)
    for seed in range(60):
        sample = planted(150, 100 + seed)
        for k, (found, truth) in enumerate(
            [(position_bias(*[sample.verdicts, sample.cluster]), 0.7), (noise(sample), 0.2)]
        ):
            covered[k] += found.low <= truth <= found.high
    assert (covered >= 0.88 * 60).all(), covered


def test_probabilities_lose_an_additive_position_bias_exactly():
    biased = planted(50, 0, position=0.9, sampled=False, spread=0.5)
    unbiased = planted(50, 0, position=0.5, sampled=False, spread=0.5)
    np.testing.assert_allclose(
        average_orders(biased.verdicts), average_orders(unbiased.verdicts), atol=1e-9
    )
    np.testing.assert_allclose(
        average_orders(unbiased.verdicts), log_odds(unbiased.verdicts.forward), atol=1e-9
    )


def test_position_bias_does_not_depend_on_the_difficulty_of_the_pairs():
    for spread in (0.0, 2.0):
        sample = planted(4000, 1, position=0.7, spread=spread)
        found = position_bias(sample.verdicts, sample.cluster)
        assert found.value == pytest.approx(0.7, abs=0.02)
    # Also for a judge that mostly repeats the first answer.
    always = BothOrders(np.ones(100), np.ones(100))
    assert position_bias(always, np.arange(100)).low > 0.9


def test_position_bias_agrees_with_a_plain_count():
    """30 pairs first-first, 10 second-second: s = ½·log 3, with half a pair added to each."""
    forward = np.array([1.0] * 30 + [0.0] * 10 + [1.0] * 20)
    backward = np.array([1.0] * 30 + [0.0] * 10 + [0.0] * 20)
    found = position_bias(BothOrders(forward, backward), np.arange(60))
    assert found.value == pytest.approx(float(logistic(0.5 * math.log(30.5 / 10.5))))
    assert found.low < found.value < found.high
    assert consistency(BothOrders(forward, backward)) == pytest.approx(20 / 60)


def test_self_preference_is_found_and_corrected():
    sample = planted(3000, 3, position=0.6, error=0.25, own=1.0, sampled=False)
    found = self_preference(sample)
    assert found.value == pytest.approx(float(logistic(1.0)), abs=0.02)
    odds = average_orders(sample.verdicts)
    fitted = calibrate(odds, sample.human, sample.own)
    # Log-odds of 1 in favour of its own, in units of the calibrated scale.
    assert fitted.own_shift * fitted.temperature == pytest.approx(-1.0, abs=0.05)
    corrected = fitted.probability(odds, sample.own)
    own_preferred = (sample.own * (corrected - 0.5) > 0)[sample.own != 0].mean()
    assert own_preferred == pytest.approx(0.5, abs=0.03)
    assert self_preference(sample._replace(own=np.zeros(3000))) is None


def test_self_preference_is_not_confused_with_better_answers():
    """A judge whose model writes better answers than the others does not prefer its own."""
    draw = np.random.default_rng(0)
    own = np.ones(2000)
    human = (draw.random(2000) < 0.8).astype(float)
    verdict = logistic(np.where(human == 1, 1.5, -1.5))
    sample = Sample(BothOrders(verdict, 1 - verdict), human, own, np.arange(2000))
    assert self_preference(sample).value == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_found(temperature):
    draw = np.random.default_rng(4)
    truth = draw.normal(0, 1.5, 20_000)
    human = (draw.random(20_000) < logistic(truth)).astype(float)
    fitted = calibrate(truth * temperature, human, np.zeros(20_000))
    assert fitted.temperature == pytest.approx(temperature, rel=0.05)
    assert fitted.own_shift == 0
    # The gradient of the log-loss is 0 there: no other temperature is better.
    best = log_loss(fitted.probability(truth * temperature, human * 0), human)
    for other in (0.9, 1.1):
        moved = replace(fitted, temperature=fitted.temperature * other)
        assert log_loss(moved.probability(truth * temperature, human * 0), human) > best


def test_a_judge_that_is_always_right_is_not_certain():
    odds = np.tile([9.0, -9.0], 25)
    fitted = calibrate(odds, (odds > 0).astype(float), np.zeros(50))
    assert fitted.probability(odds, np.zeros(50)).max() == pytest.approx(51 / 52)


def test_a_judge_that_is_always_wrong_counts_nothing():
    odds = np.tile([2.0, -2.0], 25)
    fitted = calibrate(odds, (odds < 0).astype(float), np.zeros(50))
    np.testing.assert_allclose(fitted.probability(odds, np.zeros(50)), 0.5, atol=1e-3)


def test_agreement_counts_ties_as_half_and_leaves_out_peoples_ties():
    human = np.array([1.0, 0.0, 1.0, 0.5])
    sample = Sample(BothOrders(human, 1 - human), human, np.zeros(4), np.arange(4))
    found = agreement(np.array([1.0, 1.0, 0.0, 1.0]), sample)
    assert found.value == pytest.approx(0.5)


def test_a_coin_is_found_out():
    sample = planted(200, 5, position=0.5, error=0.5)
    report = measure_judge(sample)
    assert not report.beats_coin
    assert report.log_loss[1] == pytest.approx(math.log(2), abs=0.03)


def test_pairs_of_one_prompt_widen_the_interval():
    sample = planted(200, 6)
    separate = measure_judge(sample).agreement
    together = measure_judge(sample._replace(cluster=np.repeat(np.arange(10), 20))).agreement
    assert together.value == separate.value
    assert together.low != separate.low
