"""Pairwise losses without a reference: sft, orpo, cpo, simpo, alphapo.

Contract and notation as in `pairwise.py`. Three of them hold a mean over tokens instead of
pairs, T being the scored chosen tokens of the whole update: mean NLL = −Σ logp_c / T. To come as
one value per pair like all others, a pair's share is −logp_c / (T / pairs): it takes that mean
length as its second argument, because no microbatch knows it from its own rows.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_align.losses.divergence import MAX_EXPONENT
from mlx_align.losses.masking import safe_length
from mlx_align.losses.numerics import logistic
from mlx_align.losses.options import NonNegative, Positive, Smoothing
from mlx_align.losses.pairwise import target
from mlx_align.types import PairLogps

# Where a mean log-prob per token is rounded to 0, its odds are infinite. This is the nearest to
# certainty that float32 tells apart well, 1 − p = 1e-6.
MAX_MEAN_LOGP = -1e-6


def sft_loss(logps: PairLogps, mean_chosen_length: mx.array | float) -> mx.array:
    """Supervised loss of the chosen: its share of the update's mean NLL per token, nats.

    Args:
        logps: The pairs.
        mean_chosen_length: Scored chosen tokens per pair, over the pairs of the whole update.

    Returns:
        (B,) values whose mean over the update's pairs is −Σ logp_c / Σ n_c.
    """
    return -logps.chosen / mean_chosen_length


def odds_ratio_loss(logps: PairLogps) -> mx.array:
    """ORPO's preference part: −ls(log-odds of chosen − log-odds of rejected), (B,) nats.

    The odds p/(1 − p) are those of the geometric mean probability of a token, p = e^(logp/n).

    Source: Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model",
    eq. 7.
    """
    chosen = _log_odds(logps.chosen / safe_length(logps.chosen_length))
    rejected = _log_odds(logps.rejected / safe_length(logps.rejected_length))
    return logistic(chosen - rejected, 1.0)


def orpo_loss(
    logps: PairLogps, mean_chosen_length: mx.array | float, *, beta: NonNegative = 0.1
) -> mx.array:
    """ORPO: NLL of the chosen completion + β · odds-ratio loss (the paper's λ), nats.

    Source: Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model",
    eq. 6.
    """
    return sft_loss(logps, mean_chosen_length) + beta * odds_ratio_loss(logps)


def cpo_loss(
    logps: PairLogps,
    mean_chosen_length: mx.array | float,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 1.0,
    label_smoothing: Smoothing = 0.0,
) -> mx.array:
    """CPO: DPO with a uniform reference, plus NLL: −ls(β(logp_c − logp_r)) + α·NLL(chosen).

    Source: Xu et al. 2024, "Contrastive Preference Optimization".
    """
    logits = beta * (logps.chosen - logps.rejected)
    preference = logistic(logits, target(logps, label_smoothing))
    return preference + alpha * sft_loss(logps, mean_chosen_length)


def simpo_loss(
    logps: PairLogps,
    *,
    beta: Positive = 2.0,
    gamma: NonNegative = 1.0,
    label_smoothing: Smoothing = 0.0,
) -> mx.array:
    """SimPO: −ls(β(logp_c/n_c − logp_r/n_r) − γ): mean log-probs apart by a margin of γ/β.

    γ is not scaled by β. Soft labels and smoothing as in `sigmoid_loss`.

    Source: Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward",
    eq. 6.
    """
    chosen = logps.chosen / safe_length(logps.chosen_length)
    rejected = logps.rejected / safe_length(logps.rejected_length)
    return logistic(beta * (chosen - rejected) - gamma, target(logps, label_smoothing))


def alphapo_loss(
    logps: PairLogps, *, beta: Positive = 2.0, gamma: NonNegative = 1.0, alpha: Positive = 0.25
) -> mx.array:
    """AlphaPO: SimPO with the reward reshaped, −ls(β(s_c − s_r) − γ), s = (1 − p^(−α))/α.

    p = e^(logp/n) is the geometric mean probability of a token; α → 0 is SimPO.

    Source: Gupta et al. 2025, "AlphaPO: Reward Shape Matters for LLM Alignment".
    """

    def shaped(logp: mx.array, length: mx.array) -> mx.array:
        exponent = mx.minimum(-alpha * logp / safe_length(length), MAX_EXPONENT)
        return -mx.expm1(exponent) / alpha

    chosen = shaped(logps.chosen, logps.chosen_length)
    rejected = shaped(logps.rejected, logps.rejected_length)
    return logistic(beta * (chosen - rejected) - gamma, 1.0)


def _log_odds(mean_logp: mx.array) -> mx.array:
    """log(p/(1−p)) of p = e^mean_logp, elementwise."""
    x = mx.minimum(mean_logp, MAX_MEAN_LOGP)
    return x - mx.log(-mx.expm1(x))
