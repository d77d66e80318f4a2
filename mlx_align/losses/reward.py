"""Losses of reward models: Bradley–Terry for pairs, with margins, and for rankings."""

from __future__ import annotations

import mlx.core as mx

from mlx_align.losses.hyperparameters import NonNegative, Smoothing
from mlx_align.losses.masking import log_sigmoid
from mlx_align.types import Comparisons


def bt_loss(r_chosen: mx.array | float, r_rejected: mx.array | float) -> mx.array:
    """Bradley–Terry negative log-likelihood, elementwise: −ls(r_chosen − r_rejected).

    Args:
        r_chosen: Scores of the chosen completions; any shape, or a float.
        r_rejected: Scores of the rejected completions.

    Returns:
        The losses in nats, of the arguments' common shape (floats give a scalar array); the
        caller averages.

    Source: Bradley & Terry 1952; Ouyang et al. 2022 (InstructGPT), eq. 1.
    """
    return -log_sigmoid(mx.array(r_chosen, mx.float32) - r_rejected)


def reward_bt(
    r_chosen: mx.array,
    r_rejected: mx.array,
    margin: mx.array | float = 0.0,
    soft_label: mx.array | float = 1.0,
    *,
    center: NonNegative = 0.0,
    label_smoothing: Smoothing = 0.0,
) -> mx.array:
    """Bradley–Terry with margins, soft labels and centred scores.

    −q·ls(r_c − r_r − m) − (1−q)·ls(r_r − r_c − m) + center·(r_c + r_r)², with q = (1−ε)p + ε(1−p)
    the probability that the labelled order is right. Without a margin the optimum of r_c − r_r is
    log q/(1−q).

    Args:
        r_chosen: Scores of the chosen completions, any shape.
        r_rejected: Scores of the rejected completions, the same shape.
        margin: m, the minimum difference that the scores should have.
        soft_label: p, the probability that chosen is better.
        center: Weight of the squared sum, which determines the mean of the scores; Bradley–Terry
            alone leaves it free.
        label_smoothing: ε, the probability that a label is wrong.

    Returns:
        Losses in nats, of the scores' shape.

    Source: Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023 (Llama 2), eq. 2; centering:
    Eisenstein et al. 2023, "Helping or Herding?"; soft labels and smoothing: Wang et al. 2024,
    "Secrets of RLHF in Large Language Models Part II: Reward Modeling".
    """
    as_seen = bt_loss(r_chosen - margin, r_rejected)
    reversed_order = bt_loss(r_rejected - margin, r_chosen)
    q = (1 - label_smoothing) * soft_label + label_smoothing * (1 - soft_label)
    likelihood = q * as_seen + (1 - q) * reversed_order
    return likelihood + center * mx.square(r_chosen + r_rejected)


def pair_indices(count: int) -> tuple[list[int], list[int]]:
    """The first and the second completion of each pair, for the columns of `Comparisons`."""
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    return [i for i, _ in pairs], [j for _, j in pairs]


def score_differences(scores: mx.array, comparisons: Comparisons) -> mx.array:
    """Score of the first minus score of the second, (B, P); 0 where a pair is not compared."""
    first, second = _pair_scores(scores, comparisons)
    return first - second


def kwise_loss(
    scores: mx.array,
    comparisons: Comparisons,
    *,
    center: NonNegative = 0.0,
    label_smoothing: Smoothing = 0.0,
) -> mx.array:
    """Bradley–Terry loss of rankings: Σ w_ij·reward_bt(s_i, s_j) over all pairs of K completions.

    With weights 1/C(K,2) each prompt counts once, however many completions it has. K = 2 is the
    loss of a pair.

    Args:
        scores: (B, K) scores; those of completions that are never compared may be anything.
        comparisons: Labels of the pairs.
        center: As in `reward_bt`.
        label_smoothing: As in `reward_bt`.

    Returns:
        (B,) losses in nats; 0 where nothing is compared.

    Source: Ouyang et al. 2022 (InstructGPT), eq. 1.
    """
    first, second = _pair_scores(scores, comparisons)
    losses = reward_bt(
        first,
        second,
        comparisons.margin,
        comparisons.probability,
        center=center,
        label_smoothing=label_smoothing,
    )
    return mx.sum(comparisons.weight * losses, axis=1)


def _pair_scores(scores: mx.array, comparisons: Comparisons) -> tuple[mx.array, mx.array]:
    """Scores (B, P) of the first and the second completion of each pair."""
    # Select before subtracting: the gradient of inf − inf is NaN, even if it is masked afterwards.
    real = comparisons.weight > 0
    first, second = (mx.array(column) for column in pair_indices(scores.shape[1]))
    return mx.where(real, scores[:, first], 0.0), mx.where(real, scores[:, second], 0.0)
