"""Losses of preference pairs: pure functions of log-probabilities, one value per pair.

Every function takes `PairLogps` and returns a (B,) float32 array, in nats; the mean over the
update's pairs is the loss. Its keyword-only arguments are its hyperparameters, with the paper's
or TRL's defaults: the command line reads names, ranges and defaults from the signature.

Notation in the formulas: a and d are the log-ratios policy − reference of chosen and rejected,
Δ = φ(a) − φ(d), φ the identity or another f-divergence's (`divergence.py`), n_c and n_r the
lengths in tokens, ε the label smoothing, p the soft label, σ the sigmoid, ls its logarithm.
1 − σ(x) is written σ(−x), and its logarithm ls(−x): they keep their digits where σ is nearly 1.
"""

from __future__ import annotations

import math
from typing import Annotated

import mlx.core as mx

from mlx_align.losses.divergence import Divergence, phi
from mlx_align.losses.masking import safe_length
from mlx_align.losses.numerics import log_sigmoid, logistic
from mlx_align.losses.options import (
    NonNegative,
    Positive,
    PositiveSmoothing,
    Range,
    Smoothing,
    UnitInterval,
)
from mlx_align.types import PairLogps


def dpo_loss(
    pol_chosen_logp: mx.array | float,
    pol_rejected_logp: mx.array | float,
    ref_chosen_logp: mx.array | float,
    ref_rejected_logp: mx.array | float,
    beta: float,
) -> mx.array:
    """Direct preference optimisation, elementwise: −ls(β[(π_c − ref_c) − (π_r − ref_r)]).

    Args:
        pol_chosen_logp: Policy log-prob of the chosen completion, nats; any shape, or a float.
        pol_rejected_logp: The same of the rejected completion.
        ref_chosen_logp: Reference log-prob of the chosen completion.
        ref_rejected_logp: The same of the rejected completion.
        beta: Temperature: how strongly the policy is held to the reference.

    Returns:
        The losses in nats, of the arguments' common shape (floats give a scalar array); the
        caller averages.

    Source: Rafailov et al. 2023, "Direct Preference Optimization", eq. 7.
    """
    chosen_logratio = mx.array(pol_chosen_logp, mx.float32) - ref_chosen_logp
    rejected_logratio = mx.array(pol_rejected_logp, mx.float32) - ref_rejected_logp
    return logistic(beta * (chosen_logratio - rejected_logratio), 1.0)


def sigmoid_loss(
    logps: PairLogps,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
    f_divergence: Divergence = "reverse_kl",
    f_alpha: UnitInterval = 0.5,
) -> mx.array:
    """DPO, and with label smoothing conservative DPO: −(1−ε)·ls(βΔ) − ε·ls(−βΔ).

    A pair's soft label p takes the place of certainty: its weight on "chosen is better" is
    p(1−ε) + (1−p)ε.

    Source: Rafailov et al. 2023, eq. 7; Mitchell 2023, "A note on DPO with noisy preferences".
    """
    logits = beta * _difference(logps, f_divergence, f_alpha)
    return logistic(logits, target(logps, label_smoothing))


def sigmoid_norm_loss(
    logps: PairLogps,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
    f_divergence: Divergence = "reverse_kl",
    f_alpha: UnitInterval = 0.5,
) -> mx.array:
    """Length-normalised DPO: −ls(β(φ(a)/n_c − φ(d)/n_r)); smoothing, soft labels as in sigmoid.

    Source: Lambert et al. 2024, "Tülu 3: Pushing Frontiers in Open Language Model Post-Training".
    """
    logits = beta * _difference_per_token(logps, f_divergence, f_alpha)
    return logistic(logits, target(logps, label_smoothing))


def hinge_loss(
    logps: PairLogps,
    *,
    beta: Positive = 0.1,
    f_divergence: Divergence = "reverse_kl",
    f_alpha: UnitInterval = 0.5,
) -> mx.array:
    """Hinge: max(0, 1 − βΔ): a pair that is apart by 1/β nats teaches nothing more.

    Source: Zhao et al. 2023, "SLiC-HF"; Liu et al. 2023, "Statistical Rejection Sampling
    Improves Preference Optimization".
    """
    return mx.maximum(0.0, 1 - beta * _difference(logps, f_divergence, f_alpha))


def ipo_loss(
    logps: PairLogps,
    *,
    beta: Positive = 0.1,
    f_divergence: Divergence = "reverse_kl",
    f_alpha: UnitInterval = 0.5,
) -> mx.array:
    """IPO, length-averaged: (φ(a)/n_c − φ(d)/n_r − 1/(2β))²: a gap to meet, not to widen for ever.

    The paper's formula has sums; TRL averages over tokens, after asking its authors. β is the
    paper's τ.

    Source: Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human
    Preferences", eq. 17.
    """
    return mx.square(_difference_per_token(logps, f_divergence, f_alpha) - 1 / (2 * beta))


def exo_pair_loss(
    logps: PairLogps,
    *,
    beta: Positive = 0.1,
    label_smoothing: PositiveSmoothing = 1e-3,
    f_divergence: Divergence = "reverse_kl",
    f_alpha: UnitInterval = 0.5,
) -> mx.array:
    """EXO: KL of (σ(βΔ), σ(−βΔ)) to the smoothed label (1−ε, ε): the reverse of DPO's direction.

    q(log q − log(1−ε)) + (1−q)(log(1−q) − log ε), q = σ(βΔ).

    Source: Ji et al. 2024, "Towards Efficient Exact Optimization of Language Model Alignment".
    """
    logits = beta * _difference(logps, f_divergence, f_alpha)
    as_seen = mx.sigmoid(logits) * (log_sigmoid(logits) - math.log(1 - label_smoothing))
    flipped = mx.sigmoid(-logits) * (log_sigmoid(-logits) - math.log(label_smoothing))
    return as_seen + flipped


def robust_loss(
    logps: PairLogps,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.1,
    f_divergence: Divergence = "reverse_kl",
    f_alpha: UnitInterval = 0.5,
) -> mx.array:
    """Robust DPO: [−(1−ε)·ls(βΔ) + ε·ls(−βΔ)] / (1−2ε), unbiased if a share ε of labels is flipped.

    Source: Chowdhury et al. 2024, "Provably Robust DPO: Aligning Language Models with Noisy
    Feedback".
    """
    logits = beta * _difference(logps, f_divergence, f_alpha)
    as_seen = (1 - label_smoothing) * log_sigmoid(logits)
    flipped = label_smoothing * log_sigmoid(-logits)
    return (flipped - as_seen) / (1 - 2 * label_smoothing)


def discopop_loss(
    logps: PairLogps,
    *,
    beta: Positive = 0.1,
    tau: Annotated[float, Range(low=0.0, high=1.0, low_open=True)] = 0.05,
    f_divergence: Divergence = "reverse_kl",
    f_alpha: UnitInterval = 0.5,
) -> mx.array:
    """DiscoPOP: (1−m)·(−ls z) + m·e^(−z), z = βΔ, m = σ(z/τ).

    Source: Lu et al. 2024, "Discovering Preference Optimization Algorithms with and for Large
    Language Models".
    """
    z = beta * _difference(logps, f_divergence, f_alpha)
    # m·e^(−z) in one exponent: apart they are 0·inf for pairs that are far on the wrong side.
    exponential = mx.exp(log_sigmoid(z / tau) - z)
    return mx.sigmoid(-z / tau) * logistic(z, 1.0) + exponential


def nca_pair_loss(logps: PairLogps, *, beta: Positive = 0.1) -> mx.array:
    """NCA of pairs: −ls(βa) − ½·ls(−βa) − ½·ls(−βd).

    Source: Chen et al. 2024, "Noise Contrastive Alignment of Language Models with Explicit
    Rewards".
    """
    chosen, rejected = beta * logps.chosen_logratio, beta * logps.rejected_logratio
    noise = log_sigmoid(-chosen) + log_sigmoid(-rejected)
    return -log_sigmoid(chosen) - 0.5 * noise


def bco_pair_loss(logps: PairLogps, *, beta: Positive = 0.1) -> mx.array:
    """BCO of pairs: −ls(βa) − ls(−βd): a classifier of good and bad, without the reward shift δ.

    Source: Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment".
    """
    chosen, rejected = beta * logps.chosen_logratio, beta * logps.rejected_logratio
    return -log_sigmoid(chosen) - log_sigmoid(-rejected)


def sppo_hard_loss(logps: PairLogps, *, beta: Positive = 0.1) -> mx.array:
    """SPPO with certain labels: (a − 1/(2β))² + (d + 1/(2β))².

    Source: Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment".
    """
    goal = 0.5 / beta
    return mx.square(logps.chosen_logratio - goal) + mx.square(logps.rejected_logratio + goal)


def aot_loss(
    logps: PairLogps, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0
) -> mx.array:
    """AOT, paired: sigmoid loss of x = sort(π_c − π_r) − sort(ref_c − ref_r), sorted over pairs.

    The distribution of the policy's margins is to dominate the reference's, quantile by
    quantile: rows don't keep their partners. The B values are those of the quantiles; pass
    exactly the pairs of the whole update, no fillers.

    Source: Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal
    Transport".
    """
    policy = logps.chosen - logps.rejected
    # The reference is a constant; without the stop the policy's gradient would come in through
    # both terms and cancel only up to rounding.
    reference = mx.stop_gradient(policy - (logps.chosen_logratio - logps.rejected_logratio))
    logits = beta * (mx.sort(policy) - mx.sort(reference))
    return logistic(logits, 1 - label_smoothing)


def aot_unpaired_loss(
    logps: PairLogps, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0
) -> mx.array:
    """AOT, unpaired: sigmoid loss of x = sort(a) − sort(d), sorted over the update's pairs.

    Source: Melnyk et al. 2024, as `aot_loss`.
    """
    logits = beta * (mx.sort(logps.chosen_logratio) - mx.sort(logps.rejected_logratio))
    return logistic(logits, 1 - label_smoothing)


def apo_zero_loss(logps: PairLogps, *, beta: Positive = 0.1) -> mx.array:
    """APO-zero: 1 − σ(βa) + σ(βd): chosen up, rejected down (the policy is worse than chosen).

    Source: D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive
    Revisions".
    """
    chosen, rejected = beta * logps.chosen_logratio, beta * logps.rejected_logratio
    return mx.sigmoid(-chosen) + mx.sigmoid(rejected)


def apo_down_loss(logps: PairLogps, *, beta: Positive = 0.1) -> mx.array:
    """APO-down: σ(βa) + 1 − σ(β(a − d)): both down, rejected more (the policy is the better one).

    Source: D'Oosterlinck et al. 2024, as `apo_zero_loss`.
    """
    margin = logps.chosen_logratio - logps.rejected_logratio
    return mx.sigmoid(beta * logps.chosen_logratio) + mx.sigmoid(-beta * margin)


def dpop_loss(logps: PairLogps, *, beta: Positive = 0.1, penalty: NonNegative = 50.0) -> mx.array:
    """DPO-positive: −ls(β(Δ − λ·max(0, −a))): λ (`penalty`) for a chosen that lost probability.

    Source: Pal et al. 2024, "Smaug: Fixing Failure Modes of Preference Optimisation with
    DPO-Positive".
    """
    lost = mx.maximum(0.0, -logps.chosen_logratio)
    margin = logps.chosen_logratio - logps.rejected_logratio
    return logistic(beta * (margin - penalty * lost), 1.0)


def target(logps: PairLogps, label_smoothing: float) -> mx.array:
    """Probability (B,) given to "chosen is better" by soft label and smoothing together."""
    return logps.soft_label * (1 - label_smoothing) + (1 - logps.soft_label) * label_smoothing


def _difference(logps: PairLogps, f_divergence: Divergence, f_alpha: UnitInterval) -> mx.array:
    """Δ = φ(a) − φ(d), (B,)."""
    chosen = phi(logps.chosen_logratio, f_divergence, f_alpha)
    return chosen - phi(logps.rejected_logratio, f_divergence, f_alpha)


def _difference_per_token(
    logps: PairLogps, f_divergence: Divergence, f_alpha: UnitInterval
) -> mx.array:
    """φ(a)/n_c − φ(d)/n_r, (B,)."""
    chosen = phi(logps.chosen_logratio, f_divergence, f_alpha) / safe_length(logps.chosen_length)
    rejected = phi(logps.rejected_logratio, f_divergence, f_alpha)
    return chosen - rejected / safe_length(logps.rejected_length)
