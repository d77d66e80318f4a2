"""Losses of preference pairs: DPO and its relatives, with and without a reference model.

Every loss is a pure function of `PairLogps` that returns one value per pair, (B,) float32, in nats;
their mean over an update's pairs is the loss. Keyword-only arguments are its hyperparameters, with
the defaults of the paper or of TRL; names, ranges and defaults of `--loss-option` are read from the
signature. `registry.py` lists the losses by name.

Notation in the formulas:

    a, d      log-ratios log π − log π_ref of the chosen and the rejected completion, nats
    Δ         φ(a) − φ(d), where φ is the identity or belongs to another f-divergence (see `phi`)
    n_c, n_r  lengths in tokens
    ε, p      label smoothing; soft label, the probability that chosen is better
    σ, ls     the sigmoid and its logarithm

1 − σ(x) is written σ(−x), and its logarithm ls(−x), which stay accurate where σ is nearly 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import mlx.core as mx

from mlx_align.losses.hyperparameters import (
    Choice,
    NonNegative,
    Positive,
    PositiveSmoothing,
    Range,
    Smoothing,
    UnitInterval,
)
from mlx_align.losses.masking import log_sigmoid, logistic, safe_length
from mlx_align.types import PairLogps

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
Divergence = Annotated[str, Choice(DIVERGENCES)]

# Exponents are clamped here, so that a pair's score stops growing instead of becoming inf − inf:
# float32 overflows beyond e^88.
MAX_EXPONENT = 80.0
# A mean log-prob per token that rounds to 0 has infinite odds. At this bound, 1 − p = 1e-6, which
# float32 still resolves well.
MAX_MEAN_LOGP = -1e-6

# A loss as `registry.combine` returns it: (pairs, mean chosen length) -> (B,).
LossFunction = Callable[[PairLogps, mx.array | float], mx.array]


# Losses with a reference


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
        beta: Temperature; larger values keep the policy closer to the reference.

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
    """DPO, and with label smoothing conservative DPO: −q·ls(βΔ) − (1−q)·ls(−βΔ).

    q = p(1−ε) + (1−p)ε is the probability that chosen is better, after label smoothing.

    Source: Rafailov et al. 2023, eq. 7; Mitchell 2023, "A note on DPO with noisy preferences".
    """
    logits = beta * _difference(logps, f_divergence, f_alpha)
    return logistic(logits, smoothed_label(logps, label_smoothing))


def sigmoid_norm_loss(
    logps: PairLogps,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
    f_divergence: Divergence = "reverse_kl",
    f_alpha: UnitInterval = 0.5,
) -> mx.array:
    """Length-normalised DPO: −ls(β(φ(a)/n_c − φ(d)/n_r)).

    Label smoothing and soft labels as in `sigmoid_loss`.

    Source: Lambert et al. 2024, "Tülu 3: Pushing Frontiers in Open Language Model Post-Training".
    """
    logits = beta * _difference_per_token(logps, f_divergence, f_alpha)
    return logistic(logits, smoothed_label(logps, label_smoothing))


def hinge_loss(
    logps: PairLogps,
    *,
    beta: Positive = 0.1,
    f_divergence: Divergence = "reverse_kl",
    f_alpha: UnitInterval = 0.5,
) -> mx.array:
    """Hinge: max(0, 1 − βΔ). A pair whose Δ exceeds 1/β nats has no gradient.

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
    """IPO, averaged over tokens: (φ(a)/n_c − φ(d)/n_r − 1/(2β))², a margin with a fixed target.

    The paper's formula has sums; TRL averages over tokens, as confirmed by the paper's authors. β
    is the paper's τ.

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
    """EXO: KL from (σ(βΔ), σ(−βΔ)) to the smoothed label (1−ε, ε), DPO's KL reversed.

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
    """Robust DPO: [−(1−ε)·ls(βΔ) + ε·ls(−βΔ)] / (1−2ε).

    Unbiased if a fraction ε of the labels is flipped.

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
    # m·e^(−z) in one exponent: as two factors they are 0·inf for pairs with a very negative margin.
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
    """BCO of pairs: −ls(βa) − ls(−βd), a binary classifier, without the reward shift δ.

    Source: Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment".
    """
    chosen, rejected = beta * logps.chosen_logratio, beta * logps.rejected_logratio
    return -log_sigmoid(chosen) - log_sigmoid(-rejected)


def sppo_hard_loss(logps: PairLogps, *, beta: Positive = 0.1) -> mx.array:
    """SPPO with certain labels: (a − 1/(2β))² + (d + 1/(2β))².

    Source: Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment".
    """
    target = 0.5 / beta
    return mx.square(logps.chosen_logratio - target) + mx.square(logps.rejected_logratio + target)


def aot_loss(
    logps: PairLogps, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0
) -> mx.array:
    """AOT, paired: sigmoid loss of β(sort(π_c − π_r) − sort(ref_c − ref_r)), sorted over pairs.

    Compares the distribution of the policy's margins with the reference's, quantile by quantile,
    not pair by pair. The B values belong to quantiles; pass all pairs of the update and no fillers.

    Source: Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal
    Transport".
    """
    policy = logps.chosen - logps.rejected
    # The reference is a constant, but is computed from the policy here. Without stop_gradient, the
    # policy's gradient would enter twice and cancel only up to rounding.
    reference = mx.stop_gradient(policy - (logps.chosen_logratio - logps.rejected_logratio))
    logits = beta * (mx.sort(policy) - mx.sort(reference))
    return logistic(logits, 1 - label_smoothing)


def aot_unpaired_loss(
    logps: PairLogps, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0
) -> mx.array:
    """AOT, unpaired: sigmoid loss of β(sort(a) − sort(d)), sorted over the update's pairs.

    Source: Melnyk et al. 2024, as `aot_loss`.
    """
    logits = beta * (mx.sort(logps.chosen_logratio) - mx.sort(logps.rejected_logratio))
    return logistic(logits, 1 - label_smoothing)


def apo_zero_loss(logps: PairLogps, *, beta: Positive = 0.1) -> mx.array:
    """APO-zero: 1 − σ(βa) + σ(βd), for data whose chosen completions are better than the policy's.

    Source: D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive
    Revisions".
    """
    chosen, rejected = beta * logps.chosen_logratio, beta * logps.rejected_logratio
    return mx.sigmoid(-chosen) + mx.sigmoid(rejected)


def apo_down_loss(logps: PairLogps, *, beta: Positive = 0.1) -> mx.array:
    """APO-down: σ(βa) + 1 − σ(β(a − d)), for a policy that is better than the chosen completions.

    Source: D'Oosterlinck et al. 2024, as `apo_zero_loss`.
    """
    margin = logps.chosen_logratio - logps.rejected_logratio
    return mx.sigmoid(beta * logps.chosen_logratio) + mx.sigmoid(-beta * margin)


def dpop_loss(logps: PairLogps, *, beta: Positive = 0.1, penalty: NonNegative = 50.0) -> mx.array:
    """DPO-positive: −ls(β(Δ − λ·max(0, −a))); λ (`penalty`) acts if chosen becomes less likely.

    Source: Pal et al. 2024, "Smaug: Fixing Failure Modes of Preference Optimisation with
    DPO-Positive".
    """
    decrease = mx.maximum(0.0, -logps.chosen_logratio)
    margin = logps.chosen_logratio - logps.rejected_logratio
    return logistic(beta * (margin - penalty * decrease), 1.0)


# Losses without a reference
#
# sft, orpo and cpo contain a mean over tokens instead of pairs: mean NLL = −Σ logp_c / T, where T
# is the number of chosen tokens of the whole update. Written as one value per pair, that is
# −logp_c / (T / pairs). No microbatch can compute T / pairs from its own rows, so these losses take
# it as their second argument, `mean_chosen_length`.


def sft_loss(logps: PairLogps, mean_chosen_length: mx.array | float) -> mx.array:
    """Supervised loss of the chosen completions, as the mean NLL per token of the update.

    Args:
        logps: The pairs.
        mean_chosen_length: Mean number of chosen tokens per pair, over the whole update.

    Returns:
        (B,) values whose mean over the update's pairs is −Σ logp_c / Σ n_c.
    """
    return -logps.chosen / mean_chosen_length


def odds_ratio_loss(logps: PairLogps) -> mx.array:
    """ORPO's preference term: −ls(log-odds of chosen − log-odds of rejected), (B,) nats.

    The odds p/(1 − p) are those of the geometric mean of the token probabilities, p = e^(logp/n).

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
    preference = logistic(logits, smoothed_label(logps, label_smoothing))
    return preference + alpha * sft_loss(logps, mean_chosen_length)


def simpo_loss(
    logps: PairLogps,
    *,
    beta: Positive = 2.0,
    gamma: NonNegative = 1.0,
    label_smoothing: Smoothing = 0.0,
) -> mx.array:
    """SimPO: −ls(β(logp_c/n_c − logp_r/n_r) − γ), a margin of γ/β between mean log-probs.

    γ is not scaled by β. Soft labels and label smoothing as in `sigmoid_loss`.

    Source: Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward",
    eq. 6.
    """
    chosen = logps.chosen / safe_length(logps.chosen_length)
    rejected = logps.rejected / safe_length(logps.rejected_length)
    return logistic(beta * (chosen - rejected) - gamma, smoothed_label(logps, label_smoothing))


def alphapo_loss(
    logps: PairLogps, *, beta: Positive = 2.0, gamma: NonNegative = 1.0, alpha: Positive = 0.25
) -> mx.array:
    """AlphaPO: SimPO with the reward reshaped, −ls(β(s_c − s_r) − γ), s = (1 − p^(−α))/α.

    p = e^(logp/n) is the geometric mean of the token probabilities; α → 0 is SimPO.

    Source: Gupta et al. 2025, "AlphaPO: Reward Shape Matters for LLM Alignment".
    """

    def shaped(logp: mx.array, length: mx.array) -> mx.array:
        exponent = mx.minimum(-alpha * logp / safe_length(length), MAX_EXPONENT)
        return -mx.expm1(exponent) / alpha

    chosen = shaped(logps.chosen, logps.chosen_length)
    rejected = shaped(logps.rejected, logps.rejected_length)
    return logistic(beta * (chosen - rejected) - gamma, 1.0)


# Shared parts


def smoothed_label(logps: PairLogps, label_smoothing: float) -> mx.array:
    """Probability (B,) that chosen is better, from soft label and label smoothing."""
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


def phi(logratio: mx.array, f_divergence: Divergence, f_alpha: UnitInterval) -> mx.array:
    """φ(x) = f′(e^x), elementwise, of log-ratios x in nats.

    Takes the place of the log-ratio when the KL penalty is another f-divergence. DPO's closed form
    holds for any f whose derivative is invertible and goes to −∞ at 0: the implicit reward becomes
    β·f′(π/π_ref) plus a term of the prompt alone, which cancels between the two completions of a
    pair. Only losses of the difference φ(a) − φ(d) can use it.

    reverse_kl: x; forward_kl: 1 − e^(−x); js: log 2 + ls(x); alpha: (e^((α−1)x) − 1)/(α−1), which
    lies between forward KL (α → 0) and reverse KL (α → 1). Exponents are clamped at 80.

    Source: Wang et al. 2024, "Beyond Reverse KL", table 1 (f′ there, of u = e^x).
    """
    if f_divergence == "reverse_kl":
        return logratio
    if f_divergence == "forward_kl":
        return -mx.expm1(mx.minimum(-logratio, MAX_EXPONENT))
    if f_divergence == "js":
        return math.log(2) + log_sigmoid(logratio)
    if f_divergence == "alpha":
        return mx.expm1(mx.minimum((f_alpha - 1) * logratio, MAX_EXPONENT)) / (f_alpha - 1)
    raise ValueError(f"f_divergence {f_divergence!r}: choose from {', '.join(DIVERGENCES)}")


def _log_odds(mean_logp: mx.array) -> mx.array:
    """Log-odds log(p/(1−p)) of p = e^mean_logp, elementwise."""
    x = mx.minimum(mean_logp, MAX_MEAN_LOGP)
    return x - mx.log(-mx.expm1(x))


# Losses over the whole batch, with gradient accumulation
#
# aot and aot_unpaired sort over all pairs of an update, but the model runs on one microbatch at a
# time. The chain rule separates the two. First, all log-probs are computed without gradient, then
# the gradient of the loss with respect to them. Each microbatch then runs again with a loss that is
# linear in its log-probs and has that gradient as its coefficients.


def loss_and_logps_gradient(
    loss: LossFunction, logps: PairLogps, mean_chosen_length: mx.array | float
) -> tuple[mx.array, PairLogps]:
    """Values (B,) of an update's pairs, and the gradient of their mean.

    Args:
        loss: As `registry.combine` returns it.
        logps: All pairs of the update, no fillers.
        mean_chosen_length: Mean number of chosen tokens per pair.

    Returns:
        The values, and a `PairLogps` whose four log-prob fields hold the gradient with respect to
        them; its other fields are 0.
    """
    values = loss(logps, mean_chosen_length)

    def mean(
        chosen: mx.array, rejected: mx.array, chosen_ratio: mx.array, rejected_ratio: mx.array
    ) -> mx.array:
        variables = logps._replace(
            chosen=chosen,
            rejected=rejected,
            chosen_logratio=chosen_ratio,
            rejected_logratio=rejected_ratio,
        )
        return mx.mean(loss(variables, mean_chosen_length))

    grad_chosen, grad_rejected, grad_chosen_ratio, grad_rejected_ratio = mx.grad(
        mean, argnums=(0, 1, 2, 3)
    )(logps.chosen, logps.rejected, logps.chosen_logratio, logps.rejected_logratio)
    zero = mx.zeros(logps.chosen.shape)
    return values, PairLogps(
        grad_chosen, grad_rejected, grad_chosen_ratio, grad_rejected_ratio, zero, zero, zero
    )


def linear_loss(logps: PairLogps, gradient: PairLogps) -> mx.array:
    """A microbatch's contribution to a scalar that has the gradient of the coupled loss.

    Args:
        logps: The pairs of the microbatch, with gradient.
        gradient: The same rows of what `loss_and_logps_gradient` returned; zeros for fillers.
    """
    total = (
        logps.chosen * mx.stop_gradient(gradient.chosen)
        + logps.rejected * mx.stop_gradient(gradient.rejected)
        + logps.chosen_logratio * mx.stop_gradient(gradient.chosen_logratio)
        + logps.rejected_logratio * mx.stop_gradient(gradient.rejected_logratio)
    )
    return mx.sum(total)
