"""How good a judge is: position bias, noise, self-preference, agreement, calibration.

A judge compares two answers, a and b, in both orders. `forward` is its probability that the answer
shown first is better when a is first, `backward` the same when b is first. A verdict without
probabilities is 1 or 0, and ½ for a tie. All functions are pure functions of arrays.

The model behind the corrections: the log-odds that the first answer wins are t + s, where t
is how much better that answer is and s is the effect of being first. Averaging the log-odds of both
orders removes s, however large, and leaves t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlx_align.evaluation.statistics import (
    LENGTH_CONTROLLED_RESAMPLES,
    Clusters,
    Floats,
    fit_logistic,
    rate_estimate,
    ratio_estimate,
    resample_counts,
    sigmoid,
    wins,
)
from mlx_align.system.intervals import LEVEL, Estimate, wilson_interval

# Probabilities are kept this far from 0 and 1. Log-odds are then at most 9.2, so one verdict that a
# model is sure of doesn't outweigh all others.
MIN_PROBABILITY = 1e-4
# Standard deviation of the prior on the self-preference, in the judge's log-odds: with few answers
# by the judge in the sample, the correction is near 0.
SELF_PREFERENCE_SD = 1.0
FOLDS = 5
_TAILS = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]


class BothOrders(NamedTuple):
    """Verdicts on n pairs (a, b), shown in both orders.

    Attributes:
        forward: (n,) probability that the answer shown first is better, with a first.
        backward: (n,) the same with b first.
    """

    forward: Floats
    backward: Floats


class Sample(NamedTuple):
    """A judge's verdicts on pairs that people have labelled.

    Attributes:
        verdicts: The judge's.
        human: (n,) probability that a is better, according to people; ½ for a tie.
        own: (n,) 1 if only a was written by the judge's model, −1 if only b was, else 0.
        cluster: (n,) number of the prompt: pairs of one prompt are not independent.
    """

    verdicts: BothOrders
    human: Floats
    own: Floats
    cluster: Clusters

    def select(self, rows: npt.NDArray[np.bool_]) -> Sample:
        """The sample with only these pairs."""
        forward, backward = self.verdicts
        verdicts = BothOrders(forward[rows], backward[rows])
        return Sample(verdicts, self.human[rows], self.own[rows], self.cluster[rows])


@dataclass(frozen=True, slots=True)
class Calibration:
    """The map from a judge's log-odds to a probability: σ(log-odds / temperature + own · shift).

    Attributes:
        temperature: Above 1 for a judge that is too sure of its verdicts.
        own_shift: Log-odds added for an answer by the judge's own model; negative if it prefers
            its own answers.
    """

    temperature: float = 1.0
    own_shift: float = 0.0

    def probability(self, log_odds: Floats, own: Floats) -> Floats:
        """(n,) calibrated probability that a is better."""
        return sigmoid(log_odds / self.temperature + self.own_shift * own)


@dataclass(frozen=True)
class JudgeReport:
    """A judge measured on a sample that people have labelled.

    Attributes:
        pairs: Pairs of the sample on which the judge gave a verdict in both orders.
        invalid: Pairs of the sample without a valid verdict.
        agreement: Share of the pairs that people decided on which the judge, with both orders
            averaged, prefers the same answer; a tie of the judge counts ½.
        decided: The agreement on the pairs that the judge doesn't call a tie; None if it calls
            all so.
        one_order: The agreement from the verdict in one order alone.
        position_bias: Probability of choosing the first of two equally good answers; .5: no bias.
        consistency: Share of pairs with the same preference in both orders.
        noise: Share of verdicts that are against people's choice, without the position bias.
        self_preference: Probability of choosing its own of two equally good answers; None if the
            sample has no pair with one answer by the judge's model.
        calibration: Fitted to people's choices.
        log_loss: Nats per pair, before and after calibration, on pairs that were left out of the
            fit. A coin has ln 2 = .693.
    """

    pairs: int
    invalid: int
    agreement: Estimate
    decided: Estimate | None
    one_order: Estimate
    position_bias: Estimate
    consistency: float
    noise: Estimate
    self_preference: Estimate | None
    calibration: Calibration
    log_loss: tuple[float, float]

    @property
    def beats_coin(self) -> bool:
        """Whether the interval of the agreement is above one half."""
        return self.agreement.low > 0.5


def log_odds(probability: Floats) -> Floats:
    """Log p/(1 − p), nats, of probabilities kept `MIN_PROBABILITY` from 0 and 1."""
    p = np.clip(probability, MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    return np.log(p) - np.log1p(-p)


def average_orders(verdicts: BothOrders) -> Floats:
    """(n,) log-odds that a is better: the mean over both orders, in which position cancels.

    Two verdicts of 1 or 0 that contradict each other give 0, a tie.
    """
    return 0.5 * (log_odds(verdicts.forward) - log_odds(verdicts.backward))


def position_bias(verdicts: BothOrders, cluster: Clusters, *, seed: int = 0) -> Estimate:
    """The probability of choosing the first of two equally good answers, σ(s).

    If the log-odds of the first answer are s + t in one order and s − t in the other, then
    P(first, first) / P(second, second) = e^2s for every t. So s = ½ log of the ratio of the sums
    over pairs, also if pairs differ in difficulty. Needs no labels. (Conditional logistic
    regression with one parameter.)
    """
    forward, backward = verdicts
    half = 0.5 / len(forward)  # half a pair is added to each sum, so that none is 0
    first = forward * backward + half
    second = (1 - forward) * (1 - backward) + half
    found = ratio_estimate(first, second, cluster, seed=seed)
    return Estimate(*(_first_share(ratio) for ratio in (found.value, found.low, found.high)))


def _first_share(ratio: float) -> float:
    return 1 / (1 + 1 / math.sqrt(ratio))


def consistency(verdicts: BothOrders) -> float:
    """Share of pairs on which both orders prefer the same answer, or neither."""
    forward, backward = np.sign(verdicts.forward - 0.5), np.sign(verdicts.backward - 0.5)
    return float(np.mean(forward == -backward))


def agreement(a_preferred: Floats, sample: Sample, *, seed: int = 0) -> Estimate:
    """Share of the pairs decided by people on which a judge prefers the same answer; ties count ½.

    Args:
        a_preferred: (n,) above 0 where the judge prefers a, below where b, 0 for a tie.
        sample: People's labels, with at least one pair that is not a tie.
        seed: Random seed of the bootstrap, if several pairs have the same prompt.
    """
    decided = sample.human != 0.5
    outcomes = wins(a_preferred * np.sign(sample.human - 0.5), np.zeros_like(a_preferred))[decided]
    return rate_of_pairs(outcomes, sample.cluster[decided], seed)


def rate_of_pairs(outcomes: Floats, cluster: Clusters, seed: int) -> Estimate:
    """Mean of outcomes (n,) in [0, 1]: Wilson's interval, or a bootstrap over prompts (n,).

    The bootstrap is for pairs of the same prompt, which depend on each other.
    """
    if len(np.unique(cluster)) == len(cluster):
        return wilson_interval(float(outcomes.mean()), len(outcomes))
    return rate_estimate(outcomes, cluster)


def noise(sample: Sample, *, seed: int = 0) -> Estimate:
    """Share of verdicts against people's choice if no position were preferred, σ(−t).

    t is the slope of a logistic regression, over the verdicts of both orders, of "the first wins"
    on "the first is people's choice"; its intercept is the position bias.
    """
    decided = sample.human != 0.5
    better = np.sign(sample.human[decided] - 0.5)
    outcomes = np.concatenate([sample.verdicts.forward[decided], sample.verdicts.backward[decided]])
    feature = np.concatenate([better, -better])
    cluster = np.tile(sample.cluster[decided], 2)
    found = _coefficient(outcomes, feature, cluster, 1, seed)
    low, high = sorted(float(sigmoid(np.array(-t))) for t in (found.low, found.high))
    return Estimate(float(sigmoid(np.array(-found.value))), low, high)


def self_preference(sample: Sample, *, seed: int = 0) -> Estimate | None:
    """The probability of choosing its own of two equally good answers; None without such pairs.

    The intercept of a logistic regression of "its own wins", with both orders averaged, on
    people's choice (1 its own, −1 the other, 0 a tie).
    """
    rows = sample.own != 0
    if not rows.any():
        return None
    own = sample.own[rows]
    outcomes = sigmoid(own * average_orders(sample.verdicts)[rows])
    choice = own * np.sign(sample.human[rows] - 0.5)
    found = _coefficient(outcomes, choice, sample.cluster[rows], 0, seed)
    return Estimate(*(float(sigmoid(np.array(c))) for c in (found.value, found.low, found.high)))


def _coefficient(
    outcomes: Floats, feature: Floats, cluster: Clusters, which: int, seed: int
) -> Estimate:
    """A coefficient of `fit_logistic`, with a bootstrap interval over clusters."""
    _, index = np.unique(cluster, return_inverse=True)
    fit = fit_logistic(outcomes, feature, np.ones((1, len(outcomes))))[0]
    clusters = int(index.max()) + 1
    draws = np.concatenate(
        [
            fit_logistic(outcomes, feature, counts[:, index], start=fit)[:, which]
            for counts in resample_counts(
                clusters, len(outcomes), seed, LENGTH_CONTROLLED_RESAMPLES
            )
        ]
    )
    low, high = np.quantile(draws, _TAILS)
    return Estimate(float(fit[which]), float(low), float(high))


def calibrate(odds: Floats, human: Floats, own: Floats) -> Calibration:
    """Fit temperature and self-preference to people's choices, by maximum likelihood.

    The targets are (n + 1)/(n + 2) and 1/(n + 2) in place of 1 and 0: with n of n right, a judge
    is right with (n + 1)/(n + 2), not with certainty.

    Args:
        odds: (n,) the judge's log-odds that a is better, both orders averaged.
        human: (n,) people's probability that a is better.
        own: (n,) as in `Sample`.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks" (temperature); Platt 1999,
    "Probabilistic Outputs for Support Vector Machines" (targets).
    """
    n = len(odds)
    target = (human * n + 1) / (n + 2)
    features = np.stack([odds, own], axis=1)
    weights = np.array([1.0, 0.0])
    for _ in range(100):
        # The prior is on the judge's scale, where the shift is weights[1] / weights[0].
        ridge = np.array([1e-6, 1 / (SELF_PREFERENCE_SD * max(weights[0], 0.1)) ** 2])
        p = sigmoid(features @ weights)
        slope = features.T @ (target - p) - ridge * weights
        curvature = (features * (p * (1 - p))[:, None]).T @ features + np.diag(ridge)
        step = np.clip(np.linalg.solve(curvature, slope), -1.0, 1.0)
        weights = weights + step
        if np.abs(step).max() < 1e-10:
            break
    # A judge that is right less often than a coin has a slope below 0: its verdicts count nothing.
    slope_of_odds = max(float(weights[0]), 1e-6)
    return Calibration(1 / slope_of_odds, float(weights[1]))


def log_loss(probability: Floats, human: Floats) -> float:
    """−mean of y·log p + (1 − y)·log(1 − p), nats per pair."""
    p = np.clip(probability, MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    return float(-np.mean(human * np.log(p) + (1 - human) * np.log1p(-p)))


def _held_out_log_loss(odds: Floats, sample: Sample) -> float:
    """Log-loss of calibrations fitted to the other folds; prompts are not split."""
    _, index = np.unique(sample.cluster, return_inverse=True)
    fold = index % min(FOLDS, int(index.max()) + 1)
    probability = np.zeros_like(odds)
    for k in range(int(fold.max()) + 1):
        train, held_out = fold != k, fold == k
        if not train.any():
            train = held_out  # a single prompt
        fitted = calibrate(odds[train], sample.human[train], sample.own[train])
        probability[held_out] = fitted.probability(odds[held_out], sample.own[held_out])
    return log_loss(probability, sample.human)


def measure_judge(sample: Sample, *, invalid: int = 0, seed: int = 0) -> JudgeReport:
    """Measure a judge on a sample with at least one pair that people decided.

    Args:
        sample: Pairs with valid verdicts.
        invalid: Pairs without.
        seed: Random seed of the bootstrap.
    """
    verdicts, cluster = sample.verdicts, sample.cluster
    odds = average_orders(verdicts)
    both = Sample(
        BothOrders(np.tile(verdicts.forward, 2), np.tile(verdicts.backward, 2)),
        np.tile(sample.human, 2),
        np.tile(sample.own, 2),
        np.tile(cluster, 2),
    )
    decides = (np.abs(odds) > 1e-9) & (sample.human != 0.5)
    alone = np.concatenate([verdicts.forward - 0.5, 0.5 - verdicts.backward])
    return JudgeReport(
        pairs=len(odds),
        invalid=invalid,
        agreement=agreement(odds, sample, seed=seed),
        decided=agreement(odds[decides], sample.select(decides), seed=seed)
        if decides.any()
        else None,
        one_order=agreement(alone, both, seed=seed),
        position_bias=position_bias(verdicts, cluster, seed=seed),
        consistency=consistency(verdicts),
        noise=noise(sample, seed=seed),
        self_preference=self_preference(sample, seed=seed),
        calibration=calibrate(odds, sample.human, sample.own),
        log_loss=(log_loss(sigmoid(odds), sample.human), _held_out_log_loss(odds, sample)),
    )
