"""Metrics of a policy against its reference, with intervals: pure functions of arrays.

Policy and reference are compared on the same pairs, prompts and documents. `prompt` (n,) int is the
number of the prompt that a value belongs to; intervals resample whole prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_align.evaluation.statistics import (
    Clusters,
    Floats,
    detectable_rate,
    length_controlled,
    mean_estimate,
    rate_estimate,
    ratio_estimate,
    standard_error,
    wins,
)
from mlx_align.system.intervals import Estimate


@dataclass(frozen=True)
class Preferences:
    """Accuracy and margins on held-out pairs, by log-probs and by implicit reward.

    In accuracies, ties count half.

    Attributes:
        pairs: Number of pairs.
        prompts: Number of different prompts.
        beta: β of the implicit reward β·(policy − reference); 1 if the run has none.
        accuracy: Fraction of pairs whose chosen completion is more likely under the policy.
        reference_accuracy: The same under the reference.
        margin: Mean log-prob of chosen − rejected under the policy, nats.
        reference_margin: The same under the reference.
        reward_accuracy: Fraction of pairs whose chosen completion has the higher implicit reward.
        reward_margin: Mean implicit reward of chosen − rejected.
        chosen_change: Mean log-prob of the chosen completion, policy − reference, nats.
        rejected_change: The same for the rejected completion.
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


def preferences(reference: Floats, logratios: Floats, prompt: Clusters, beta: float) -> Preferences:
    """Metrics on pairs from reference log-probs (n, 2) and log-ratios (n, 2), chosen first.

    The policy's log-probs are the sum of both. Log-ratios are an argument, instead of the policy's
    log-probs, because they are exactly 0 for identical models; differences of sums are not.
    """
    policy = reference + logratios
    rewards = beta * logratios

    def rate(scores: Floats) -> Estimate:
        return rate_estimate(wins(scores[:, 0], scores[:, 1]), prompt)

    def mean(values: Floats) -> Estimate:
        return mean_estimate(values, prompt)

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
    """KL(policy‖reference), estimated from the policy's samples at temperature 1 (k1 estimator).

    Attributes:
        prompts: Number of prompts.
        answers: Number of samples, all prompts together.
        per_answer: Mean KL per completion, nats.
        standard_error: Its standard error between prompts; None with one prompt.
        per_token: KL per token, nats.
        truncated: Fraction of samples that reached the maximum length; their KL ends there.
    """

    prompts: int
    answers: int
    per_answer: float
    standard_error: float | None
    per_token: float
    truncated: float


def divergence(
    logratios: Floats, lengths: Floats, prompt: Clusters, truncated: float
) -> Divergence:
    """KL from the log-ratios (n,) of the policy's samples, nats, and their lengths (n,), tokens."""
    return Divergence(
        prompts=len(np.unique(prompt)),
        answers=len(logratios),
        per_answer=float(logratios.mean()),
        standard_error=standard_error(logratios, prompt),
        per_token=float(logratios.sum() / lengths.sum()),
        truncated=truncated,
    )


@dataclass(frozen=True)
class WinRate:
    """The policy's completions against the reference's, scored by a reward model.

    Each completion is compared with all completions of the other role to the same prompt, except
    the one sampled with the same random numbers: similar models sample similar completions from
    them, which would bias the rate towards ties. With one completion each, both are compared.

    Attributes:
        prompts: Number of prompts whose completions were all scored.
        answers: Number of completions per role, all prompts together.
        unjudged: Number of prompts left out because a completion could not be scored.
        rate: Fraction of comparisons that the policy wins; ties count half.
        length_controlled: The win rate for completions of equal length; None if all lengths differ
            by the same amount.
        ties: Fraction of comparisons that are ties.
        detectable: The smallest difference of the rate from ½ that this number of prompts can
            detect (80% power, two-sided 5%).
        reward: Mean score of the policy's completions.
        reference_reward: Mean score of the reference's completions.
        reward_gain: Mean difference of the two, paired by prompt.
        length: Mean length of the policy's completions, tokens.
        reference_length: Mean length of the reference's completions, tokens.
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


def win_rate(
    policy: Floats,
    reference: Floats,
    policy_length: Floats,
    reference_length: Floats,
    *,
    unjudged: int,
    seed: int,
) -> WinRate:
    """Win rate from scores (P, K) of K completions of each role to P prompts.

    The k-th completions of both roles were sampled with the same random numbers.

    Args:
        policy: (P, K) scores of the policy's completions.
        reference: (P, K) scores of the reference's completions.
        policy_length: (P, K) lengths of the policy's completions, tokens.
        reference_length: (P, K) lengths of the reference's completions, tokens.
        unjudged: Number of prompts left out, for the result.
        seed: Random seed of the bootstrap.
    """
    count = policy.shape[1]
    compared = ~np.eye(count, dtype=np.bool_) if count > 1 else np.ones((1, 1), np.bool_)

    def against(ours: Floats, theirs: Floats) -> tuple[Floats, Floats]:
        one, other = np.broadcast_arrays(ours[:, :, None], theirs[:, None, :])
        return one[:, compared].ravel(), other[:, compared].ravel()

    outcome = wins(*against(policy, reference))
    ours, theirs = against(policy_length, reference_length)
    longer = ours - theirs
    prompt = np.repeat(np.arange(len(policy)), compared.sum())
    return WinRate(
        prompts=len(policy),
        answers=policy.size,
        unjudged=unjudged,
        rate=rate_estimate(outcome, prompt),
        length_controlled=length_controlled(outcome, longer, prompt, seed=seed),
        ties=float((outcome == 0.5).mean()),
        detectable=detectable_rate(outcome, prompt),
        reward=float(policy.mean()),
        reference_reward=float(reference.mean()),
        reward_gain=mean_estimate((policy - reference).mean(axis=1), np.arange(len(policy))),
        length=float(policy_length.mean()),
        reference_length=float(reference_length.mean()),
    )


@dataclass(frozen=True)
class BestOf:
    """The expected score of the best of n completions, selected by that score.

    Attributes:
        n: Number of completions to choose from.
        score: Expected best score, mean over prompts.
        gain: Its difference from the expected score of one completion, paired by prompt.
        kl_at_most: Upper bound of KL(best of n‖policy), nats.
    """

    n: int
    score: Estimate
    gain: Estimate
    kl_at_most: float


def best_of_curve(scores: Floats) -> list[BestOf]:
    """Best-of-n for n = 1 to K, from scores (P, K) of K completions to P prompts."""
    prompt = np.arange(len(scores))
    one = np.array([expected_best(row, 1) for row in scores])
    curve = []
    for n in range(1, scores.shape[1] + 1):
        best = np.array([expected_best(row, n) for row in scores])
        score = mean_estimate(best, prompt)
        gain = mean_estimate(best - one, prompt)
        curve.append(BestOf(n, score, gain, best_of_kl(n)))
    return curve


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of unrelated text under policy and reference: the alignment tax.

    Attributes:
        documents: Number of documents.
        tokens: Number of scored tokens.
        nats_per_token: Mean negative log-prob per token under the policy.
        reference_nats_per_token: The same under the reference.
        change: Their difference; above 0, the text became less likely.
        ratio: Perplexity of the policy divided by that of the reference, e^change.
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
    """Perplexity change from n segments of text.

    Args:
        reference: (n,) summed log-probs under the reference, nats.
        logratios: (n,) summed log-ratios policy − reference, nats.
        tokens: (n,) scored tokens.
        document: (n,) number of the document that a segment belongs to.
        seed: Random seed of the bootstrap.
    """
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


def expected_best(scores: npt.ArrayLike, n: int, values: npt.ArrayLike | None = None) -> float:
    """Expected score of the best of n samples, from the scores (N,) of N ≥ n samples of a prompt.

    The mean of the best score over all C(N, n) subsets of size n: Σ_i x_(i) · C(i − 1, n − 1) /
    C(N, n), with x_(1) ≤ … ≤ x_(N). This estimate is unbiased for any N; sampling the n with
    replacement would bias it downwards.

    Source: Nakano et al. 2021, "WebGPT", appendix I.

    Args:
        scores: (N,) scores to rank by; higher is better.
        n: Number of samples to choose from, 1 to N.
        values: (N,) numbers to average instead of the best one's score, such as its correctness.
            Among equal scores, each is equally likely to be the best.

    Raises:
        ValueError: n is out of range, or the arrays' shapes are not (N,).
    """
    ranked_by = np.asarray(scores, np.float64)
    averaged = ranked_by if values is None else np.asarray(values, np.float64)
    if ranked_by.ndim != 1 or averaged.shape != ranked_by.shape:
        raise ValueError(f"scores {ranked_by.shape} and values {averaged.shape}: expected (N,)")
    size = len(ranked_by)
    if not 1 <= n <= size:
        raise ValueError(f"the best of {n} can't be estimated from {size} samples")
    order = np.argsort(ranked_by, kind="stable")
    _, tie, counts = np.unique(ranked_by[order], return_inverse=True, return_counts=True)
    by_tie = np.bincount(tie, weights=best_weights(size, n)) / counts
    return float((by_tie[tie] * averaged[order]).sum())


def best_weights(size: int, n: int) -> Floats:
    """Probability (size,) that the i-th smallest of `size` samples is the best of a subset of n.

    C(i − 1, n − 1) / C(size, n), computed in logarithms: binomials of 1,000 overflow.
    """
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size + 1)))])
    below = np.arange(n - 1, size)  # number of smaller samples, for those that can be the best
    subsets = log_factorial[below] - log_factorial[n - 1] - log_factorial[below - n + 1]
    total = log_factorial[size] - log_factorial[n] - log_factorial[size - n]
    weights = np.zeros(size)
    weights[n - 1 :] = np.exp(subsets - total)
    return weights


def best_of_kl(n: int) -> float:
    """Upper bound (nats) of KL(best of n independent samples ‖ one sample): log n − (n − 1)/n.

    The bound is attained if no two completions are equal and no two scores tie.

    Source: Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy".
    """
    return math.log(n) - (n - 1) / n
