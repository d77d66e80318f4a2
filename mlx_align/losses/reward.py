"""Losses of reward models: pure functions of scores (Bradley–Terry, margins, rankings)."""

from __future__ import annotations

import mlx.core as mx

from mlx_align.losses.numerics import log_sigmoid
from mlx_align.losses.options import NonNegative


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
) -> mx.array:
    """Bradley–Terry with margins, soft labels and a pull of the scores towards 0.

    −p·ls(r_c − r_r − m) − (1−p)·ls(r_r − r_c − m) + center·(r_c + r_r)²: the order seen has to
    hold by m, and with probability 1 − p the pair is the other way round.

    Args:
        r_chosen: (B,) scores of the chosen completions.
        r_rejected: (B,) scores of the rejected completions.
        margin: (B,) how far apart the scores should be, at least.
        soft_label: (B,) probability p that chosen is the better one.
        center: Weight of the squared sum: Bradley–Terry leaves the mean of the scores free.

    Returns:
        (B,) losses in nats.

    Source: Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023 (Llama 2), eq. 2; centering:
    Eisenstein et al. 2023, "Helping or Herding?".
    """
    as_seen = bt_loss(r_chosen - margin, r_rejected)
    reversed_order = bt_loss(r_rejected - margin, r_chosen)
    likelihood = soft_label * as_seen + (1 - soft_label) * reversed_order
    return likelihood + center * mx.square(r_chosen + r_rejected)


def kwise_loss(scores: mx.array, ranks: mx.array, mask: mx.array | None = None) -> mx.array:
    """Bradley–Terry over all ordered pairs of K ranked completions, weighted 1/C(K,2).

    −1/C(K,2) · Σ over i better than j of ls(s_i − s_j). The weight makes each prompt count once,
    however many completions it has; tied completions are not compared.

    Args:
        scores: (B, K) the model's scores.
        ranks: (B, K) 1 is best; of ratings (higher is better) pass the negative.
        mask: (B, K) true for real completions; default all.

    Returns:
        (B,) losses in nats; 0 where a group has fewer than two completions.

    Source: Ouyang et al. 2022 (InstructGPT), eq. 1.
    """
    real = mx.ones(scores.shape, mx.bool_) if mask is None else mask
    # Before the differences: the gradient of inf − inf is NaN, whatever is selected afterwards.
    scores = mx.where(real, scores, 0.0)
    better = ranks[:, :, None] < ranks[:, None, :]
    compared = better & real[:, :, None] & real[:, None, :]
    losses = bt_loss(scores[:, :, None], scores[:, None, :])
    count = mx.sum(real.astype(mx.float32), axis=1)
    comparisons = mx.maximum(count * (count - 1) / 2, 1.0)
    return mx.sum(mx.where(compared, losses, 0.0), axis=(1, 2)) / comparisons
