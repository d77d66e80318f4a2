"""What keeping the best of n samples gives: pure functions of the scores of N ≥ n samples."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def expected_best(scores: npt.ArrayLike, n: int, values: npt.ArrayLike | None = None) -> float:
    """Expected score of the best of n samples of a prompt, from the scores (N,) of N of them.

    The mean, over all C(N, n) ways to take n of the N, of the best one's score: Σ_i x_(i) ·
    C(i − 1, n − 1) / C(N, n), with x_(1) ≤ … ≤ x_(N). Without bias for the expectation over fresh
    samples, whatever N; the best of n drawn with replacement would be biased low.

    Source: Nakano et al. 2021, "WebGPT", appendix I.

    Args:
        scores: (N,) what is ranked by; higher is better.
        n: How many are sampled, 1 to N.
        values: (N,) what is averaged of the best one instead of its score (whether it is right,
            another judge's score). Among equal scores any one is as likely to be taken.

    Raises:
        ValueError: n is out of range, or the arrays' shapes are not (N,).
    """
    ranked_by = np.asarray(scores, np.float64)
    counted = ranked_by if values is None else np.asarray(values, np.float64)
    if ranked_by.ndim != 1 or counted.shape != ranked_by.shape:
        raise ValueError(f"scores {ranked_by.shape} and values {counted.shape}: expected (N,)")
    size = len(ranked_by)
    if not 1 <= n <= size:
        raise ValueError(f"the best of {n} can't be told from {size} samples")
    order = np.argsort(ranked_by, kind="stable")
    _, tie, counts = np.unique(ranked_by[order], return_inverse=True, return_counts=True)
    by_tie = np.bincount(tie, weights=best_weights(size, n)) / counts
    return float((by_tie[tie] * counted[order]).sum())


def best_weights(size: int, n: int) -> Floats:
    """How likely the i-th worst of `size` samples is the best of n of them, (size,); sums to 1.

    C(i − 1, n − 1) / C(size, n), through logarithms: the binomials of 1,000 overflow.
    """
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size + 1)))])
    below = np.arange(n - 1, size)  # of the ones that can be best: how many are worse
    chosen = log_factorial[below] - log_factorial[n - 1] - log_factorial[below - n + 1]
    every = log_factorial[size] - log_factorial[n] - log_factorial[size - n]
    weights = np.zeros(size)
    weights[n - 1 :] = np.exp(chosen - every)
    return weights


def best_of_kl(n: int) -> float:
    """Upper bound (nats) of KL(best of n independent samples ‖ one sample): log n − (n − 1)/n.

    It is reached where no two completions are the same and none score alike.

    Source: Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy".
    """
    return math.log(n) - (n - 1) / n
