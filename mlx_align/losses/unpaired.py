"""Losses of single completions: KTO for labelled rows, and supervised losses per token.

Losses of rows return a (B,) float32 array, whose weighted mean over the update's rows is the loss.
Losses of tokens return (N, C); their sum under the mask, divided by the update's number of tokens,
is the loss.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_align.losses.hyperparameters import Positive
from mlx_align.losses.masking import weighted_sum


def kto_loss(
    logratio: mx.array,
    desirable: mx.array,
    kl: mx.array | float,
    *,
    beta: Positive = 0.1,
    desirable_weight: Positive = 1.0,
    undesirable_weight: Positive = 1.0,
) -> mx.array:
    """Kahneman–Tversky optimisation: w·(1 − σ(±β(l − KL))), + for desirable rows, − for others.

    Args:
        logratio: (B,) nats, policy − reference, summed over the completion's tokens.
        desirable: (B,) bool.
        kl: The reference point in nats, one number for the whole update (see `kto_kl`).
        beta: Temperature.
        desirable_weight: w of desirable rows.
        undesirable_weight: w of undesirable rows.

    Returns:
        (B,) losses.

    Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization";
    its constant λ_y is dropped, as it has no gradient.
    """
    sign = mx.where(desirable, 1.0, -1.0)
    weight = mx.where(desirable, desirable_weight, undesirable_weight)
    return weight * mx.sigmoid(-sign * beta * (logratio - mx.stop_gradient(mx.array(kl))))


def kto_kl(mismatched_logratio: mx.array, weight: mx.array) -> mx.array:
    """KTO's reference point: max(0, mean log-ratio of mismatched completions), without gradient.

    Mismatched means each prompt with another prompt's completion. The estimate is noisy in small
    batches, so it is computed over the whole update, before the update's gradient.

    Args:
        mismatched_logratio: (M,) nats, policy − reference, summed over tokens.
        weight: (M,), 0 for filler rows.

    Returns:
        Scalar, nats.

    Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization".
    """
    mean = weighted_sum(mismatched_logratio, weight) / mx.maximum(mx.sum(weight), 1.0)
    return mx.stop_gradient(mx.maximum(mean, 0.0))


def apo_zero_unpaired_loss(
    logratio: mx.array,
    desirable: mx.array,
    *,
    beta: Positive = 0.1,
    desirable_weight: Positive = 1.0,
    undesirable_weight: Positive = 1.0,
) -> mx.array:
    """APO-zero of single rows: KTO with its reference point at 0. Arguments: `kto_loss`.

    Source: D'Oosterlinck et al. 2024, "Anchored Preference Optimization".
    """
    return kto_loss(
        logratio,
        desirable,
        0.0,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


def nll_loss(token_logps: mx.array) -> mx.array:
    """Supervised fine-tuning, per token: −log p, nats."""
    return -token_logps


def dft_loss(token_logps: mx.array) -> mx.array:
    """Dynamic fine-tuning, per token: −sg(p)·log p, nats; unlikely tokens have smaller gradients.

    Source: Wu et al. 2025, "On the Generalization of SFT: a Reinforcement Learning Perspective".
    """
    return -mx.stop_gradient(mx.exp(token_logps)) * token_logps
