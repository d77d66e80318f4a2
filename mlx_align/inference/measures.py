"""The numbers of an evaluation, each made of plain arrays: what a run changed, and how surely.

Policy and reference are compared on the same pairs, prompts and documents. `prompt` numbers them,
(n,) int: the unit that intervals resample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mlx_align.inference.best_of import best_of_kl, expected_best
from mlx_align.inference.statistics import (
    Clusters,
    Estimate,
    Floats,
    detectable_rate,
    length_controlled,
    mean_estimate,
    rate_estimate,
    ratio_estimate,
    standard_error,
    wins,
)


@dataclass(frozen=True)
class Preferences:
    """Held-out pairs, by the policy's own log-probs and by its implicit reward.

    Attributes:
        pairs: How many.
        prompts: Of so many prompts.
        beta: Of the implicit reward β·(policy − reference); 1 where the run has none.
        accuracy: Share of pairs whose chosen completion the policy gives the higher log-prob;
            equal ones count half, here and in the next three.
        reference_accuracy: The same of the reference.
        margin: log-prob of chosen − rejected under the policy, nats, mean.
        reference_margin: The same of the reference.
        reward_accuracy: Share whose chosen completion has the higher implicit reward.
        reward_margin: Implicit reward of chosen − rejected, mean.
        chosen_change: log-prob of the chosen completion, policy − reference, nats, mean.
        rejected_change: The same of the rejected one.
    """

    pairs: int
    prompts: int
    beta: float
    accuracy: Estimate
    reference_accuracy: Estimate
    margin: Estimate
    reference_margin: Estimate
    reward_accuracy: Estimate
    reward_margin: Estimate
    chosen_change: Estimate
    rejected_change: Estimate


def preferences(
    reference: Floats, logratios: Floats, prompt: Clusters, beta: float, *, seed: int
) -> Preferences:
    """Judge pairs from log-probs of the reference (n, 2) and log-ratios (n, 2), chosen first.

    The policy's log-probs are their sum. Log-ratios are given, not two log-probs: those of the
    same function are 0, however the sums of two passes would round.
    """
    policy = reference + logratios
    rewards = beta * logratios

    def rate(scores: Floats) -> Estimate:
        return rate_estimate(wins(scores[:, 0], scores[:, 1]), prompt, seed=seed)

    def mean(values: Floats) -> Estimate:
        return mean_estimate(values, prompt, seed=seed)

    return Preferences(
        pairs=len(prompt),
        prompts=len(np.unique(prompt)),
        beta=beta,
        accuracy=rate(policy),
        reference_accuracy=rate(reference),
        margin=mean(policy[:, 0] - policy[:, 1]),
        reference_margin=mean(reference[:, 0] - reference[:, 1]),
        reward_accuracy=rate(rewards),
        reward_margin=mean(rewards[:, 0] - rewards[:, 1]),
        chosen_change=mean(logratios[:, 0]),
        rejected_change=mean(logratios[:, 1]),
    )


@dataclass(frozen=True)
class Divergence:
    """KL(policy‖reference), from the policy's own answers at temperature 1 (the k1 estimator).

    Attributes:
        prompts: How many.
        answers: To all of them.
        per_answer: Nats per answer, mean.
        standard_error: Of that, between prompts; None with one prompt.
        per_token: Nats per token of those answers.
        cut: Share of them that were cut at the longest allowed: of these, the KL up to there.
    """

    prompts: int
    answers: int
    per_answer: float
    standard_error: float | None
    per_token: float
    cut: float


def divergence(logratios: Floats, lengths: Floats, prompt: Clusters, cut: float) -> Divergence:
    """From log-ratios (n,) of own answers, nats, and their lengths (n,), tokens."""
    return Divergence(
        prompts=len(np.unique(prompt)),
        answers=len(logratios),
        per_answer=float(logratios.mean()),
        standard_error=standard_error(logratios, prompt),
        per_token=float(logratios.sum() / lengths.sum()),
        cut=cut,
    )


@dataclass(frozen=True)
class Wins:
    """The policy's answers against the reference's, as a reward model judges them.

    An answer is compared with every answer of the other role to its prompt but the one drawn with
    the same random numbers: that of a similar model is too much like it, and the rate would be
    that of a pair drawn together. With one answer each there is nothing to leave out.

    Attributes:
        prompts: Answered by both, and judged.
        answers: Of each role, to all of them.
        unjudged: Prompts left out, as an answer to them could not be scored.
        rate: Share of comparisons that the policy wins; ties count half.
        length_controlled: What the rate would be at answers of equal length; None where all
            differ by the same length.
        ties: Share of comparisons that are ties.
        detectable: The smallest difference of the rate from ½ that so many prompts would show
            (80% power, two-sided 5%).
        reward: Mean score of the policy's answers.
        reference_reward: Of the reference's.
        reward_gain: Their difference, prompt by prompt.
        length: Mean length of the policy's answers, tokens.
        reference_length: Of the reference's.
    """

    prompts: int
    answers: int
    unjudged: int
    rate: Estimate
    length_controlled: Estimate | None
    ties: float
    detectable: float
    reward: float
    reference_reward: float
    reward_gain: Estimate
    length: float
    reference_length: float


def compare_answers(
    policy: Floats,
    reference: Floats,
    policy_length: Floats,
    reference_length: Floats,
    *,
    unjudged: int,
    seed: int,
) -> Wins:
    """Judge scores (P, K) of K answers of each role to P prompts, the k-th drawn together."""
    count = policy.shape[1]
    apart = ~np.eye(count, dtype=np.bool_) if count > 1 else np.ones((1, 1), np.bool_)

    def against(ours: Floats, theirs: Floats) -> tuple[Floats, Floats]:
        one, other = np.broadcast_arrays(ours[:, :, None], theirs[:, None, :])
        return one[:, apart].ravel(), other[:, apart].ravel()

    outcome = wins(*against(policy, reference))
    ours, theirs = against(policy_length, reference_length)
    longer = ours - theirs
    prompt = np.repeat(np.arange(len(policy)), apart.sum())
    return Wins(
        prompts=len(policy),
        answers=policy.size,
        unjudged=unjudged,
        rate=rate_estimate(outcome, prompt, seed=seed),
        length_controlled=length_controlled(outcome, longer, prompt, seed=seed),
        ties=float((outcome == 0.5).mean()),
        detectable=detectable_rate(outcome, prompt),
        reward=float(policy.mean()),
        reference_reward=float(reference.mean()),
        reward_gain=mean_estimate(
            (policy - reference).mean(axis=1), np.arange(len(policy)), seed=seed
        ),
        length=float(policy_length.mean()),
        reference_length=float(reference_length.mean()),
    )


@dataclass(frozen=True)
class BestOf:
    """Keeping the best of n answers, by the score that is also the measure.

    Attributes:
        n: Answers to choose from.
        score: Expected best score, mean over prompts.
        gain: By how much it exceeds that of one answer, prompt by prompt.
        kl_at_most: Bound on how far choosing moves from the policy, nats.
    """

    n: int
    score: Estimate
    gain: Estimate
    kl_at_most: float


def best_of_curve(scores: Floats, *, seed: int) -> list[BestOf]:
    """From n = 1 to K, of scores (P, K) of K answers to P prompts."""
    prompt = np.arange(len(scores))
    one = np.array([expected_best(row, 1) for row in scores])
    curve = []
    for n in range(1, scores.shape[1] + 1):
        best = np.array([expected_best(row, n) for row in scores])
        score = mean_estimate(best, prompt, seed=seed)
        gain = mean_estimate(best - one, prompt, seed=seed)
        curve.append(BestOf(n, score, gain, best_of_kl(n)))
    return curve


@dataclass(frozen=True)
class Perplexity:
    """What the run cost elsewhere: a held-out text under policy and reference.

    Attributes:
        documents: How many.
        tokens: Scored tokens in them.
        nats_per_token: Mean negative log-prob of a token under the policy.
        reference_nats_per_token: Under the reference.
        change: Policy − reference, nats per token: above 0, the text has become less likely.
        ratio: Perplexity of the policy over that of the reference, e^change.
    """

    documents: int
    tokens: int
    nats_per_token: float
    reference_nats_per_token: float
    change: Estimate
    ratio: Estimate


def perplexity_change(
    reference: Floats, logratios: Floats, tokens: Floats, document: Clusters, *, seed: int
) -> Perplexity:
    """From sums (n,) of stretches of text: the reference's log-probs, log-ratios, tokens."""
    count = tokens.sum()
    change = ratio_estimate(-logratios, tokens, document, seed=seed)
    before = float(-reference.sum() / count)
    return Perplexity(
        documents=len(np.unique(document)),
        tokens=int(count),
        nats_per_token=before + change.value,
        reference_nats_per_token=before,
        change=change,
        ratio=Estimate(math.exp(change.value), math.exp(change.low), math.exp(change.high)),
    )
