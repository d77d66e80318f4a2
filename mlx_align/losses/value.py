"""The critic's loss and its explained variance."""

from __future__ import annotations

import mlx.core as mx

from mlx_align.losses.masking import masked_mean


def value_loss(
    values: mx.array,
    old_values: mx.array,
    returns: mx.array,
    mask: mx.array,
    *,
    clip: float | None,
) -> mx.array:
    """Value loss ½·max((V − R)², (V_clip − R)²) per token, V_clip = V clipped to V_old ± clip.

    Args:
        values: (N, C) the critic's values, with gradient.
        old_values: (N, C) the values that the advantages were computed from.
        returns: (N, C).
        mask: (N, C) nonzero where a token counts; the other arrays may hold anything elsewhere.
        clip: In units of the rewards; None for no clipping, ½(V − R)².

    Returns:
        (N, C) float32, 0 off the mask; the caller averages.

    Source: Schulman et al. 2017 (PPO), eq. 9; the clip: their code, as Engstrom et al. 2020
    ("Implementation Matters"), section 3, describe it.
    """
    real = mask != 0
    values, old_values, returns = (
        mx.where(real, part.astype(mx.float32), 0.0) for part in (values, old_values, returns)
    )
    old_values, returns = mx.stop_gradient(old_values), mx.stop_gradient(returns)
    errors = mx.square(values - returns)
    if clip is not None:
        clipped = mx.clip(values, old_values - clip, old_values + clip)
        errors = mx.maximum(errors, mx.square(clipped - returns))
    return errors / 2


def explained_variance(values: mx.array, returns: mx.array, mask: mx.array) -> mx.array:
    """Explained variance 1 − Var(R − V)/Var(R) over the tokens under the mask, scalar.

    1 for a perfect critic, 0 for a constant one, below 0 for a worse one; 0 if R is constant.
    """
    real = mask != 0
    values, returns = (mx.where(real, x.astype(mx.float32), 0.0) for x in (values, returns))

    def variance(x: mx.array) -> mx.array:
        return masked_mean(mx.square(x - masked_mean(x, real, axis=None)), real, axis=None)

    total = variance(returns)
    return mx.where(total > 0, 1 - variance(returns - values) / mx.where(total > 0, total, 1.0), 0)
