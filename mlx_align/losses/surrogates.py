"""Ratios and surrogates of policy-gradient losses: elementwise, before anything is summed.

A *ratio* says how far the policy went from the one that is improved upon, π_old; a *surrogate*
is the loss of a token whose gradient, at π = π_old, is −A·∇log π. They differ in what they do with
tokens whose ratio has left the neighbourhood of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlx_align.losses.masking import lengths, masked_sum, safe_length

# e^20 is 5e8: a token that went so far teaches nothing, and its square still fits float32.
MAX_LOG_RATIO = 20.0
# τ of SAPO for positive and other advantages (Gao et al. 2025; as TRL has them).
SAPO_TEMPERATURES = (1.0, 1.05)
# (k, λ) of VESPO for advantages of at least 0 and others (Shen et al. 2026, section 4.1).
VESPO_SHAPES = ((2.0, 3.0), (3.0, 2.0))
VESPO_MIN_RATIO = 1e-8


class Terms(NamedTuple):
    """What a surrogate is made of; zeros stand off the mask."""

    logps: mx.array  # (N, C) nats, with gradient
    log_ratio: mx.array  # (N, C) nats, per token whatever the level of `ratio`
    ratio: mx.array  # (N, C), of a token or, the same along a row, of a sequence
    advantages: mx.array  # (N, C)
    mask: mx.array  # (N, C) bool


class Bounds(NamedTuple):
    """Where ratios are clipped: [1 − low, 1 + high], and `delta` for those that would not be."""

    low: float
    high: float
    delta: float | None


def clamped_exp(log_ratio: mx.array) -> mx.array:
    """e^x with x held to ±20, elementwise; no gradient from beyond."""
    return mx.exp(mx.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def token_ratio(logps: mx.array, log_ratio: mx.array, mask: mx.array) -> mx.array:
    """π/π_old of each token (N, C). Source: Schulman et al. 2017 (PPO), section 3."""
    return clamped_exp(log_ratio)


def sequence_ratio(logps: mx.array, log_ratio: mx.array, mask: mx.array) -> mx.array:
    """(π/π_old)^(1/length) of each completion, (N, C). Source: Zheng et al. 2025 (GSPO), eq. 7."""
    mean = masked_sum(log_ratio, mask) / safe_length(lengths(mask))
    return mx.broadcast_to(clamped_exp(mean)[:, None], log_ratio.shape)


def trajectory_ratio(logps: mx.array, log_ratio: mx.array, mask: mx.array) -> mx.array:
    """π/π_old of each completion, (N, C): the completion is the action, as TRL's RLOO has it.

    Source: Ahmadian et al. 2024 ("Back to Basics"), the full generation as one action.
    """
    return mx.broadcast_to(clamped_exp(masked_sum(log_ratio, mask))[:, None], log_ratio.shape)


def no_ratio(logps: mx.array, log_ratio: mx.array, mask: mx.array) -> mx.array:
    """1 with the gradient of log π: REINFORCE (Williams 1992) is a surrogate of it."""
    return mx.exp(logps - mx.stop_gradient(logps))


RATIOS: dict[str, Callable[[mx.array, mx.array, mx.array], mx.array]] = {
    "token": token_ratio,
    "sequence": sequence_ratio,
    "trajectory": trajectory_ratio,
    "none": no_ratio,
}


def plain(terms: Terms, bounds: Bounds) -> mx.array:
    """−w·A. Source: Williams 1992, with importance weights."""
    return -terms.ratio * terms.advantages


def clip(terms: Terms, bounds: Bounds) -> mx.array:
    """PPO's −min(w·A, min(max(w, 1 − low), 1 + high)·A), the first w at most `delta` if given.

    Source: Schulman et al. 2017 (PPO), eq. 7; unequal bounds: Yu et al. 2025 (DAPO), eq. 10;
    delta: Prime Intellect 2025 (INTELLECT-2), two-sided clipping, for negative advantages, whose
    ratio nothing bounds otherwise.
    """
    ratio = terms.ratio
    clipped = mx.clip(ratio, 1 - bounds.low, 1 + bounds.high)
    if bounds.delta is not None:
        ratio = mx.minimum(ratio, bounds.delta)
    return -mx.minimum(ratio * terms.advantages, clipped * terms.advantages)


def cispo(terms: Terms, bounds: Bounds) -> mx.array:
    """−sg(min(w, high))·A·log π: the weight is clipped, the gradient is not.

    `high` is the bound itself here, and there is none below. Source: MiniMax 2025 (MiniMax-M1),
    eq. 4 and 5.
    """
    weight = mx.stop_gradient(mx.minimum(terms.ratio, bounds.high))
    return -weight * terms.advantages * terms.logps


def sapo(terms: Terms, bounds: Bounds) -> mx.array:
    """−(4/τ)·σ(τ(w − 1))·A: a soft gate in place of the clip, of slope 1 at w = 1.

    Source: Gao et al. 2025 ("Soft Adaptive Policy Optimization"), the gate f.
    """
    positive, other = SAPO_TEMPERATURES
    tau = mx.where(terms.advantages > 0, positive, other)
    return -4 / tau * mx.sigmoid(tau * (terms.ratio - 1)) * terms.advantages


def vespo_weight(terms: Terms) -> mx.array:
    """φ (N, C) = W^k·e^(λ(1 − W)) of the ratio W of a whole completion, without gradient.

    Source: Shen et al. 2026 (VESPO), eq. 20.
    """
    log_ratio = mx.stop_gradient(mx.clip(terms.log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    total = mx.clip(masked_sum(log_ratio, terms.mask), math.log(VESPO_MIN_RATIO), MAX_LOG_RATIO)
    (k_up, lam_up), (k_down, lam_down) = VESPO_SHAPES
    upward = terms.advantages >= 0
    k, lam = mx.where(upward, k_up, k_down), mx.where(upward, lam_up, lam_down)
    return mx.exp(lam + k * total[:, None] - lam * mx.exp(total)[:, None])


def vespo(terms: Terms, bounds: Bounds) -> mx.array:
    """−φ(W)·A·log π. Source: Shen et al. 2026 (VESPO), eq. 20."""
    return -vespo_weight(terms) * terms.advantages * terms.logps


SURROGATES: dict[str, Callable[[Terms, Bounds], mx.array]] = {
    "plain": plain,
    "clip": clip,
    "cispo": cispo,
    "sapo": sapo,
    "vespo": vespo,
}


def clip_metrics(terms: Terms, surrogate: str, bounds: Bounds) -> dict[str, mx.array]:
    """What the surrogate did to each token (N, C), under TRL's names."""
    ratio, advantages = terms.ratio, terms.advantages
    if surrogate == "clip":
        low = mx.logical_and(ratio < 1 - bounds.low, advantages < 0)
        high = mx.logical_and(ratio > 1 + bounds.high, advantages > 0)
        return {
            "clip_ratio/low_mean": low,
            "clip_ratio/high_mean": high,
            "clip_ratio/region_mean": mx.logical_or(low, high),
        }
    if surrogate == "cispo":
        return {"cispo_clip_ratio": mx.logical_and(ratio > bounds.high, advantages > 0)}
    return {}
