"""What keeping the best of n answers is worth, from N scored answers to one prompt."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def expected_best(scores: Floats, n: int) -> float:
    """The expected highest score of n answers drawn from the N scored, without replacement.

    Σᵢ r₍ᵢ₎·C(i − 1, n − 1)/C(N, n) over the scores in ascending order r₍₁₎ ≤ … ≤ r₍ₙ₎: unbiased for
    the expected best of n independent answers, with every score used.

    Args:
        scores: (N,) of independent answers to one prompt.
        n: 1 to N.

    Source: the estimator of pass@k of Chen et al. 2021, "Evaluating Large Language Models Trained
    on Code", for scores instead of passes.
    """
    total = len(scores)
    if not 1 <= n <= total:
        raise ValueError(f"best of {n} from {total} scores")
    ways = np.array([_log_choose(rank - 1, n - 1) for rank in range(n, total + 1)])
    log_share = ways - _log_choose(total, n)
    return float(np.sort(scores)[n - 1 :] @ np.exp(log_share))


def kl_bound(n: int) -> float:
    """The most that keeping the best of n independent answers moves from their source, nats.

    log n − (n − 1)/n, an upper bound of KL(best of n‖one).

    Source: Stiennon et al. 2020; a bound by Beirami et al. 2024, "Theoretical guarantees on the
    best-of-n alignment policy".
    """
    return math.log(n) - (n - 1) / n


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
