"""Intervals, corrected rates and detectable differences: against closed forms and simulation."""

import math

import numpy as np
import pytest

from mlx_align.evaluation.metrics import (
    best_of_curve,
    divergence,
    perplexity_change,
    preferences,
    win_rate,
)
from mlx_align.evaluation.statistics import (
    PRIOR_SD,
    detectable_difference,
    detectable_rate,
    fit_logistic,
    length_controlled,
    mean_estimate,
    rate_estimate,
    ratio_estimate,
    sigmoid,
    standard_error,
    wins,
)

Z = 1.959963984540054  # the normal quantile of .975
SIMULATED = 200


def covered(truth, estimates):
    return np.mean([one.low <= truth <= one.high for one in estimates])


def longer_wins(random, n, quality=0.0, pull=2.0):
    """Outcomes that depend on length and on a quality of the first, in logits; differences."""
    longer = random.normal(60, 60, n)
    won = random.uniform(size=n) < sigmoid(quality + pull * np.tanh(longer / 60))
    return won.astype(float), longer


def test_interval_of_a_mean_is_normal_for_large_samples():
    values = np.random.default_rng(0).normal(3, 2, 4000)
    found = mean_estimate(values, np.arange(4000))
    half = Z * values.std() / math.sqrt(4000)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_intervals_cover_the_truth_as_often_as_stated():
    random = np.random.default_rng(0)
    prompt = np.repeat(np.arange(60), 4)
    means, naive, rates, ratios = [], [], [], []
    for seed in range(SIMULATED):
        # Four answers to a prompt that are alike: 60 pieces of evidence, not 240.
        values = np.repeat(random.normal(1, 2, 60), 4) + random.normal(0, 0.5, 240)
        means.append(mean_estimate(values, prompt))
        if seed < 50:
            naive.append(mean_estimate(values, np.arange(240)))
        rates.append(rate_estimate((random.uniform(size=80) < 0.6) * 1.0, np.arange(80)))
        tokens = random.integers(20, 200, 60).astype(float)
        nats = random.normal(2, 0.3, 60) * tokens
        ratios.append(ratio_estimate(nats, tokens, np.arange(60), seed=seed))
    assert 0.9 <= covered(1, means) <= 0.98
    assert covered(1, naive) < 0.8
    assert 0.9 <= covered(0.6, rates) <= 0.98
    assert 0.9 <= covered(2, ratios) <= 0.98


def test_length_controlled_intervals_cover_the_truth_as_often_as_stated():
    random = np.random.default_rng(1)
    raw, found = [], []
    for seed in range(SIMULATED):
        won, longer = longer_wins(random, 80)
        raw.append(won.mean())
        found.append(length_controlled(won, longer, np.arange(80), seed=seed))
    assert np.mean(raw) > 0.68
    assert np.mean([one.value for one in found]) == pytest.approx(0.5, abs=0.01)
    assert 0.9 <= covered(0.5, found) <= 0.98


def test_length_controlled_rate_separates_quality_from_length():
    random = np.random.default_rng(2)
    won, longer = longer_wins(random, 4000, quality=0.3)
    found = length_controlled(won, longer, np.arange(4000))
    truth = float(sigmoid(np.array(0.3)))  # 57.4%
    assert won.mean() > 0.7
    assert found.low <= truth <= found.high
    assert found.value == pytest.approx(truth, abs=0.03)


def test_length_controlled_rate_is_the_raw_rate_if_length_has_no_effect():
    won = np.array([1.0, 0, 1, 1, 0.5] * 40)
    same = length_controlled(won, np.zeros(200), np.arange(200))
    theta = math.log(same.value / (1 - same.value))
    # Slope of likelihood and prior cancel, by hand.
    assert 200 * (won.mean() - same.value) == pytest.approx(theta / PRIOR_SD**2, abs=1e-6)
    assert same.value == pytest.approx(won.mean(), abs=0.001)
    balanced = np.array([5.0, -5, 5, -5, 5, -5, 5, -5])
    even = length_controlled(np.full(8, 0.5), balanced, np.arange(8))
    assert even.value == 0.5
    assert even.low < 0.5 < even.high
    assert length_controlled(won, np.full(200, 7.0), np.arange(200)) is None


def test_swapping_the_roles_complements_the_length_controlled_rate():
    random = np.random.default_rng(3)
    won, longer = longer_wins(random, 100)
    one = length_controlled(won, longer, np.arange(100))
    other = length_controlled(1 - won, -longer, np.arange(100))
    assert one.value == pytest.approx(1 - other.value, abs=1e-9)
    assert one.low == pytest.approx(1 - other.high, abs=1e-6)


@pytest.mark.parametrize("won", [np.ones(40), np.zeros(40), (np.arange(40) > 19) * 1.0])
def test_separable_outcomes_have_a_fit(won):
    longer = np.arange(40) - 19.5
    found = length_controlled(won, longer, np.arange(40))
    assert 0 < found.value < 1
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0.05  # 40 wins in a row are no certainty


def test_the_fit_is_the_best_of_the_penalised_likelihood():
    random = np.random.default_rng(4)
    outcomes = random.choice([0, 0.5, 1], 30)
    feature = np.tanh(random.normal(0, 1, 30))
    weights = random.integers(0, 4, (5, 30)).astype(float)

    def likelihood(theta, phi, weight):
        logit = theta + phi * feature
        each = outcomes * logit - np.logaddexp(0, logit)
        return (weight * each).sum() - (theta**2 + phi**2) / (2 * PRIOR_SD**2)

    for fit, weight in zip(fit_logistic(outcomes, feature, weights), weights, strict=True):
        best = likelihood(*fit, weight)
        for step in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
            assert likelihood(*(fit + step), weight) < best
    started = fit_logistic(outcomes, feature, weights, start=np.array([0.3, -0.2]))
    assert started == pytest.approx(fit_logistic(outcomes, feature, weights), abs=1e-7)


@pytest.mark.parametrize("rate", [1.0, 0.0, 0.5])
def test_equal_outcomes_have_wilsons_interval(rate):
    found = rate_estimate(np.full(16, rate), np.repeat(np.arange(8), 2))
    # Wilson's ends solve (p − rate)² = z²·p(1 − p)/n.
    assert found.value == rate
    assert found.low <= rate <= found.high
    for end in {found.low, found.high} - {rate}:
        assert (end - rate) ** 2 == pytest.approx(Z**2 * end * (1 - end) / 8)
    assert found.high - found.low > 0.3


def test_standard_errors():
    values = np.random.default_rng(5).normal(size=24)
    alone = values.std(ddof=1) / math.sqrt(24)
    assert standard_error(values, np.arange(24)) == pytest.approx(alone)
    by_prompt = values.reshape(8, 3).mean(axis=1).std(ddof=1) / math.sqrt(8)
    assert standard_error(values, np.repeat(np.arange(8), 3)) == pytest.approx(by_prompt)
    assert standard_error(values, np.zeros(24, int)) is None


def test_detectable_differences_are_detected_in_80_percent_of_samples():
    assert detectable_difference(0.5, 64) == pytest.approx((Z + 0.8416212) * 0.5 / 8)
    random = np.random.default_rng(6)
    for n in (30, 200):
        difference = detectable_difference(2.0, n)
        means = random.normal(difference, 2.0 / math.sqrt(n), 20_000)
        assert np.mean(np.abs(means) > Z * 2.0 / math.sqrt(n)) == pytest.approx(0.8, abs=0.01)
    outcomes = np.array([1.0, 0, 1, 0])
    assert detectable_rate(outcomes, np.arange(4)) == pytest.approx(
        detectable_difference(outcomes.std(ddof=1), 4)
    )
    # All alike: nothing is known of their spread, and single wins and losses have ½.
    alike = detectable_rate(np.ones(9), np.arange(9))
    assert alike == pytest.approx(detectable_difference(0.5, 9))


def test_wins_and_ties():
    assert wins(np.array([2.0, 1, 1]), np.array([1.0, 2, 1])).tolist() == [1, 0, 0.5]


def compared(policy, reference, **lengths):
    like = np.full(policy.shape, 9.0)
    return win_rate(
        policy,
        reference,
        lengths.get("policy_length", like),
        lengths.get("reference_length", like),
        unjudged=0,
        seed=0,
    )


@pytest.mark.parametrize("count", [1, 4])
def test_equal_answers_win_exactly_half(count):
    scores = np.random.default_rng(7).normal(size=(20, count))
    lengths = np.random.default_rng(8).integers(3, 30, (20, count)).astype(float)
    found = compared(scores, scores, policy_length=lengths, reference_length=lengths)
    assert found.rate.value == 0.5
    assert found.rate.low < 0.5 < found.rate.high
    assert found.length_controlled.value == pytest.approx(0.5, abs=1e-9)
    assert found.reward_gain.value == 0
    assert (found.ties == 1) == (count == 1)


def test_win_rate_compares_answers_that_were_drawn_independently():
    # What one role says is what the other would have said with these draws, and a hair better.
    reference = np.random.default_rng(9).normal(size=(400, 4))
    found = compared(reference + 1e-6, reference)
    assert found.rate.value == pytest.approx(0.5, abs=0.01)
    assert found.reward_gain.value == pytest.approx(1e-6)
    # Against brute force: every answer against every one of another number.
    policy = np.random.default_rng(10).normal(0.5, 1, (30, 3))
    rows = [
        policy[i, j] > reference[i, k]
        for i in range(30)
        for j in range(3)
        for k in range(3)
        if j != k
    ]
    assert compared(policy, reference[:30, :3]).rate.value == pytest.approx(np.mean(rows))


def test_the_best_of_n_curve():
    scores = np.array([np.arange(1.0, 11), np.arange(10.0, 0, -1)])
    curve = best_of_curve(scores)
    assert [one.n for one in curve] == list(range(1, 11))
    assert curve[3].score.value == pytest.approx(8.8)
    assert curve[3].gain.value == pytest.approx(8.8 - 5.5)
    assert curve[3].kl_at_most == pytest.approx(0.636294, abs=1e-6)
    assert (curve[0].gain.value, curve[0].kl_at_most) == (0, 0)
    assert curve[-1].score.value == 10


def test_preferences_by_hand():
    reference = np.array([[-4.0, -3.0], [-5.0, -5.0], [-6.0, -2.0], [-1.0, -2.0]])
    logratios = np.array([[2.0, 0.0], [0.0, 0.0], [1.0, 2.0], [0.5, -0.5]])
    found = preferences(reference, logratios, np.array([0, 1, 2, 2]), 0.1)
    assert (found.pairs, found.prompts, found.beta) == (4, 3, 0.1)
    assert found.reference_accuracy.value == pytest.approx((0 + 0.5 + 0 + 1) / 4)
    assert found.accuracy.value == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found.reward_accuracy.value == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found.margin.value == pytest.approx((1 + 0 - 5 + 2) / 4)
    assert found.reward_margin.value == pytest.approx(0.1 * (2 + 0 - 1 + 1) / 4)
    assert found.chosen_change.value == pytest.approx(3.5 / 4)
    assert found.rejected_change.value == pytest.approx(1.5 / 4)


def test_divergence_and_perplexity_by_hand():
    kl = divergence(np.array([2.0, 0, 1, 1]), np.array([5.0, 5, 5, 5]), np.array([0, 0, 1, 1]), 0)
    assert (kl.per_answer, kl.per_token) == (1.0, 0.2)
    assert kl.standard_error == 0
    # Two documents, one in two stretches: 30 and 10 tokens, 60 and 30 nats before.
    found = perplexity_change(
        np.array([-40.0, -20, -30]),
        np.array([-2.0, -1, 1]),
        np.array([20.0, 10, 10]),
        np.array([0, 0, 1]),
        seed=0,
    )
    assert (found.documents, found.tokens) == (2, 40)
    assert found.reference_nats_per_token == pytest.approx(90 / 40)
    assert found.change.value == pytest.approx(2 / 40)
    assert found.nats_per_token == pytest.approx(92 / 40)
    assert found.ratio.value == pytest.approx(math.exp(2 / 40))
    # Resampled are documents: −1/10 and 3/30 nats per token are the extremes.
    assert found.change.low == pytest.approx(-0.1)
    assert found.change.high == pytest.approx(0.1)
