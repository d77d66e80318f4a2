"""Policy-gradient losses: PPO and the group methods (GRPO, RLOO, DAPO, …).

A method is a `PolicyMethod`, a combination of named parts: how rewards become advantages
(`rollout/advantages.py`), what the ratio π/π_old is taken of, the surrogate that limits it, how
tokens are averaged, and where the KL to the reference acts. `POLICY_METHODS` lists them by name;
`policy_loss` computes all of them.

- A *ratio* says how far the policy has moved from the one that sampled, π_old.
- A *surrogate* is a loss per token whose gradient at π = π_old is −A·∇log π. Surrogates differ in
  what they do with tokens whose ratio is no longer near 1.

An update is split into microbatches that share their denominators (`policy_totals`), so that their
losses and gradients add up to those of one batch.

Shape letters: N completions, C completion positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import mlx.core as mx

from mlx_align.losses.kl import k2, k3
from mlx_align.losses.masking import lengths, masked_sum, safe_length
from mlx_align.types import PolicySample

Ratio = Literal["token", "sequence", "trajectory", "none"]
Surrogate = Literal["clip", "plain", "cispo", "sapo", "vespo"]
Aggregation = Literal[
    "sequence_mean", "token_mean", "local_token_mean", "sequence_sum", "max_length"
]
KlPlace = Literal["none", "k1_reward", "k2", "k3", "k3_corrected"]

# e^20 is 5e8: a token with such a ratio has no useful gradient, and its square still fits float32.
MAX_LOG_RATIO = 20.0
# τ of SAPO for positive and for other advantages (Gao et al. 2025; as in TRL).
SAPO_TEMPERATURES = (1.0, 1.05)
# (k, λ) of VESPO for advantages of at least 0 and for others (Shen et al. 2026, section 4.1).
VESPO_SHAPES = ((2.0, 3.0), (3.0, 2.0))
VESPO_MIN_RATIO = 1e-8


# Methods


@dataclass(frozen=True, slots=True)
class PolicyMethod:
    """The parts of a policy-gradient method.

    Attributes:
        advantage: The advantage estimator: a name in `GROUP_ADVANTAGES`, or "gae" with a
            critic.
        ratio: The level of the ratio π/π_old: each token; the geometric mean over a completion
            (sequence); a whole completion (trajectory); or nothing (REINFORCE).
        surrogate: A name in `SURROGATES`.
        clip_low: Ratios are clipped at 1 − clip_low.
        clip_high: Ratios are clipped at 1 + clip_high; for cispo, the upper bound itself.
        delta: Upper bound of the ratios of negative advantages, which `clip` does not limit.
        aggregation: The average of token losses. sequence_mean: over each completion, then
            over completions. token_mean: over all tokens of the update. local_token_mean: over
            all tokens of a microbatch, then over microbatches (TRL's bnpo; the only one that
            depends on the microbatch size). sequence_sum: summed over each completion, then
            averaged over completions. max_length: sequence_sum divided by the maximum length.
        kl: Where the KL to the reference acts: nowhere; in the reward, as k1 of each token (not
            computed here); or in the loss, as k2, k3, or k3 times the ratio (as in TRL's GRPO).
        entropy_quantile: Only tokens whose entropy is at least this quantile have a surrogate.
        off_policy_threshold: Completions with a negative advantage have no surrogate if their mean
            log π_old/π, in nats per token, exceeds this.
    """

    advantage: str
    ratio: Ratio = "token"
    surrogate: Surrogate = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float | None = None
    aggregation: Aggregation = "token_mean"
    kl: KlPlace = "none"
    entropy_quantile: float = 0.0
    off_policy_threshold: float | None = None


# Group methods with a KL in the loss use k2: as a loss, k3 has the gradient of
# KL(reference‖policy), which has another optimum (see kl.py).
POLICY_METHODS: dict[str, PolicyMethod] = {
    # Schulman et al. 2017; k1 in the reward: Ziegler et al. 2019, eq. 2
    "ppo": PolicyMethod("gae", kl="k1_reward"),
    # Shao et al. 2024 (DeepSeekMath), eq. 3
    "grpo": PolicyMethod("group_std", aggregation="sequence_mean", kl="k2"),
    # Ahmadian et al. 2024 (RLOO)
    "rloo": PolicyMethod(
        "leave_one_out", "none", "plain", aggregation="sequence_sum", kl="k1_reward"
    ),
    # Liu et al. 2025 ("Understanding R1-Zero-like training")
    "dr_grpo": PolicyMethod("centred", aggregation="max_length"),
    # Yu et al. 2025, eq. 8
    "dapo": PolicyMethod("group_std", clip_high=0.28),
    # Zheng et al. 2025, eq. 5
    "gspo": PolicyMethod(
        "group_std", "sequence", clip_low=3e-4, clip_high=4e-4, aggregation="sequence_mean"
    ),
    # Hu et al. 2025 (REINFORCE++), and its variant with a group's mean as the baseline
    "reinforce++": PolicyMethod("whitened", kl="k1_reward"),
    "reinforce++-baseline": PolicyMethod("centred_whitened", kl="k1_reward"),
    # MiniMax 2025 (MiniMax-M1), eq. 4; the bound 5 as TRL recommends
    "cispo": PolicyMethod("group_std", surrogate="cispo", clip_high=5.0),
    # Gao et al. 2025
    "sapo": PolicyMethod("group_std", surrogate="sapo", aggregation="sequence_mean"),
    # Shen et al. 2026, eq. 20; token mean as TRL
    "vespo": PolicyMethod("centred", surrogate="vespo"),
    # Liu et al. 2026 (length-unbiased sequence policy optimization)
    "luspo": PolicyMethod("group_std", "sequence", aggregation="sequence_sum"),
}


# Ratios and surrogates


class SurrogateInputs(NamedTuple):
    """Arguments of a surrogate, all (N, C); zeros off the mask."""

    logps: mx.array  # nats, with gradient
    log_ratio: mx.array  # nats, per token also where `ratio` is of a sequence
    ratio: mx.array  # of each token, or of the sequence and then constant along a row
    advantages: mx.array
    mask: mx.array  # bool


class ClipBounds(NamedTuple):
    """Bounds of ratios: they are clipped to [1 − low, 1 + high]; for `delta` see `PolicyMethod`."""

    low: float
    high: float
    delta: float | None


def clamped_exp(log_ratio: mx.array) -> mx.array:
    """e^x with x clamped to ±20, elementwise; no gradient outside."""
    return mx.exp(mx.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def token_ratio(logps: mx.array, log_ratio: mx.array, mask: mx.array) -> mx.array:
    """π/π_old of each token (N, C). Source: Schulman et al. 2017 (PPO), section 3."""
    return clamped_exp(log_ratio)


def sequence_ratio(logps: mx.array, log_ratio: mx.array, mask: mx.array) -> mx.array:
    """(π/π_old)^(1/length) of each completion, (N, C). Source: Zheng et al. 2025 (GSPO), eq. 7."""
    mean = masked_sum(log_ratio, mask) / safe_length(lengths(mask))
    return mx.broadcast_to(clamped_exp(mean)[:, None], log_ratio.shape)


def trajectory_ratio(logps: mx.array, log_ratio: mx.array, mask: mx.array) -> mx.array:
    """π/π_old of each completion, (N, C), as in TRL's RLOO.

    Source: Ahmadian et al. 2024 ("Back to Basics"), where a whole completion is one action.
    """
    return mx.broadcast_to(clamped_exp(masked_sum(log_ratio, mask))[:, None], log_ratio.shape)


def no_ratio(logps: mx.array, log_ratio: mx.array, mask: mx.array) -> mx.array:
    """The number 1 with the gradient of log π: REINFORCE. Source: Williams 1992."""
    return mx.exp(logps - mx.stop_gradient(logps))


RATIOS: dict[str, Callable[[mx.array, mx.array, mx.array], mx.array]] = {
    "token": token_ratio,
    "sequence": sequence_ratio,
    "trajectory": trajectory_ratio,
    "none": no_ratio,
}


def plain(inputs: SurrogateInputs, bounds: ClipBounds) -> mx.array:
    """−w·A. Source: Williams 1992, with importance weights."""
    return -inputs.ratio * inputs.advantages


def clip(inputs: SurrogateInputs, bounds: ClipBounds) -> mx.array:
    """PPO's −min(w·A, min(max(w, 1 − low), 1 + high)·A), where the first w is at most `delta`.

    Source: Schulman et al. 2017 (PPO), eq. 7; unequal bounds: Yu et al. 2025 (DAPO), eq. 10;
    delta: Prime Intellect 2025 (INTELLECT-2), two-sided clipping, because nothing else limits the
    ratio of negative advantages.
    """
    ratio = inputs.ratio
    clipped = mx.clip(ratio, 1 - bounds.low, 1 + bounds.high)
    if bounds.delta is not None:
        ratio = mx.minimum(ratio, bounds.delta)
    return -mx.minimum(ratio * inputs.advantages, clipped * inputs.advantages)


def cispo(inputs: SurrogateInputs, bounds: ClipBounds) -> mx.array:
    """−sg(min(w, high))·A·log π: the weight is clipped, the gradient is not.

    `high` is the bound itself here, and there is no lower bound. Source: MiniMax 2025 (MiniMax-M1),
    eq. 4 and 5.
    """
    weight = mx.stop_gradient(mx.minimum(inputs.ratio, bounds.high))
    return -weight * inputs.advantages * inputs.logps


def sapo(inputs: SurrogateInputs, bounds: ClipBounds) -> mx.array:
    """−(4/τ)·σ(τ(w − 1))·A: a soft gate instead of the clip, with slope 1 at w = 1.

    Source: Gao et al. 2025 ("Soft Adaptive Policy Optimization"), the gate f.
    """
    positive, other = SAPO_TEMPERATURES
    tau = mx.where(inputs.advantages > 0, positive, other)
    return -4 / tau * mx.sigmoid(tau * (inputs.ratio - 1)) * inputs.advantages


def vespo_weight(inputs: SurrogateInputs) -> mx.array:
    """VESPO's φ (N, C) = W^k·e^(λ(1 − W)) of a completion's ratio W, without gradient.

    Source: Shen et al. 2026 (VESPO), eq. 20.
    """
    log_ratio = mx.stop_gradient(mx.clip(inputs.log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    total = mx.clip(masked_sum(log_ratio, inputs.mask), math.log(VESPO_MIN_RATIO), MAX_LOG_RATIO)
    (k_up, lam_up), (k_down, lam_down) = VESPO_SHAPES
    upward = inputs.advantages >= 0
    k, lam = mx.where(upward, k_up, k_down), mx.where(upward, lam_up, lam_down)
    return mx.exp(lam + k * total[:, None] - lam * mx.exp(total)[:, None])


def vespo(inputs: SurrogateInputs, bounds: ClipBounds) -> mx.array:
    """−φ(W)·A·log π. Source: Shen et al. 2026 (VESPO), eq. 20."""
    return -vespo_weight(inputs) * inputs.advantages * inputs.logps


SURROGATES: dict[str, Callable[[SurrogateInputs, ClipBounds], mx.array]] = {
    "plain": plain,
    "clip": clip,
    "cispo": cispo,
    "sapo": sapo,
    "vespo": vespo,
}


def clip_metrics(
    inputs: SurrogateInputs, surrogate: str, bounds: ClipBounds
) -> dict[str, mx.array]:
    """Masks (N, C) of the tokens that were clipped, under TRL's metric names."""
    ratio, advantages = inputs.ratio, inputs.advantages
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


# The loss


class PolicyTotals(NamedTuple):
    """Denominators that the microbatches of an update share; float32 scalars."""

    rows: mx.array  # completions with a token under the mask
    tokens: mx.array  # tokens under the mask
    microbatches: mx.array  # microbatches with a token under the mask
    max_length: mx.array  # maximum length of a completion, tokens
    entropy_threshold: mx.array  # nats; tokens with less entropy have no surrogate


def policy_totals(
    masks: Sequence[mx.array],
    method: PolicyMethod,
    max_length: int,
    entropies: Sequence[mx.array] | None = None,
) -> PolicyTotals:
    """The denominators of an update.

    Args:
        masks: The masks (N, C) of the microbatches.
        method: The method.
        max_length: Maximum length of a completion, in tokens.
        entropies: The entropies (N, C) of the microbatches, nats, if the method has an entropy
            quantile; those of the rollout are sufficient.

    Raises:
        ValueError: The method has an entropy quantile and `entropies` is None.
    """
    length = [lengths(mask) for mask in masks]
    rows = [mx.sum((row > 0).astype(mx.float32)) for row in length]
    threshold = mx.array(-mx.inf)
    if method.entropy_quantile > 0:
        if entropies is None:
            raise ValueError("entropy_quantile: expected entropies")
        flat = [part.reshape(-1) for part in entropies]
        real = [mask.reshape(-1) != 0 for mask in masks]
        threshold = _quantile(mx.concatenate(flat), mx.concatenate(real), method.entropy_quantile)
    return PolicyTotals(
        rows=sum(rows, mx.array(0.0)),
        tokens=sum((mx.sum(row) for row in length), mx.array(0.0)),
        microbatches=sum((mx.minimum(row, 1.0) for row in rows), mx.array(0.0)),
        max_length=mx.array(float(max_length)),
        entropy_threshold=threshold,
    )


def policy_loss(
    method: PolicyMethod,
    sample: PolicySample,
    totals: PolicyTotals,
    *,
    kl_coef: mx.array | float,
    entropy_coef: mx.array | float = 0.0,
) -> tuple[mx.array, dict[str, mx.array]]:
    """A microbatch's contribution to an update's loss, and sums of metrics.

    Per token correction·(surrogate + kl_coef·KL), averaged by `method.aggregation`, minus
    entropy_coef times the mean entropy over all tokens. Only `logps` and `entropies` of the
    sample have a gradient.

    Args:
        method: The method.
        sample: The microbatch.
        totals: Denominators of the update, from `policy_totals`.
        kl_coef: Weight of the KL in the loss; an array if it changes under `mx.compile`. It has no
            effect if `method.kl` is k1_reward.
        entropy_coef: Weight of the entropy bonus, likewise.

    Returns:
        The loss contribution, scalar, and metrics without gradient. Divide the metrics' sums over
        the microbatches by the sum of "weight", the number of tokens. They are `ratio` (at the
        method's level), `ratio/deviation` = |ratio − 1|, `approx_kl` = k3 of KL(old‖policy), `kl` =
        k3 of KL(policy‖reference) if there is a reference, `entropy` if known, the fractions that
        were clipped, and `policy_loss`, the loss without KL and entropy. Ratios of completions are
        averaged over completions, as in TRL.

    Raises:
        ValueError: A coefficient has no effect, or the entropies it needs are missing.
    """
    _check_coefficients(method, sample, kl_coef, entropy_coef)
    mask = sample.mask != 0
    logps = _zero_padding(sample.logps, mask)
    old = mx.stop_gradient(_zero_padding(sample.old_logps, mask))
    advantages = mx.stop_gradient(_zero_padding(sample.advantages, mask))
    log_ratio = logps - old
    ratio = RATIOS[method.ratio](logps, log_ratio, mask)
    inputs = SurrogateInputs(logps, log_ratio, ratio, advantages, mask)
    bounds = ClipBounds(method.clip_low, method.clip_high, method.delta)

    surrogate = SURROGATES[method.surrogate](inputs, bounds)
    correction = mx.stop_gradient(_zero_padding(sample.correction, mask))
    surrogate = mx.where(_selected(method, sample, inputs, totals), correction * surrogate, 0.0)
    loss = policy = _aggregate(method.aggregation, surrogate, mask, totals)

    sums = clip_metrics(inputs, method.surrogate, bounds) | {
        "ratio": ratio,
        "ratio/deviation": mx.abs(ratio - 1),
    }
    if method.surrogate == "vespo":
        sums["vespo/phi_seq_mean"] = vespo_weight(inputs)
    per_row = method.ratio in ("sequence", "trajectory")
    metrics = {
        name: _token_sum(mx.stop_gradient(value), mask, totals, per_row or name.startswith("vespo"))
        for name, value in sums.items()
    }
    metrics["approx_kl"] = _token_sum(k3(old, mx.clip(logps, old - 20, old + 20)), mask, totals)
    metrics["policy_loss"] = policy * totals.tokens

    if _has_reference(method, kl_coef):
        reference = mx.stop_gradient(_zero_padding(sample.reference_logps, mask))
        # Clamped for k3's exponent only: k2 needs its gradient at any distance.
        near = mx.clip(reference - logps, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        estimate = k3(mx.zeros_like(near), near)
        if method.kl == "k3_corrected":
            estimate = estimate * ratio
        if method.kl != "k1_reward":
            penalty = correction * (k2(logps, reference) if method.kl == "k2" else estimate)
            loss = loss + kl_coef * _aggregate(method.aggregation, penalty, mask, totals)
        metrics["kl"] = _token_sum(estimate, mask, totals)
    if sample.entropies is not None:
        entropy = masked_sum(sample.entropies, mask, axis=None)
        if _may_be_nonzero(entropy_coef):
            loss = loss - entropy_coef * entropy / safe_length(totals.tokens)
        metrics["entropy"] = entropy
    metrics["weight"] = mx.sum(lengths(mask))
    return loss, {name: mx.stop_gradient(value) for name, value in metrics.items()}


def _may_be_nonzero(coefficient: mx.array | float) -> bool:
    """Whether a coefficient is an array, which may take any value, or a number that is not 0."""
    return isinstance(coefficient, mx.array) or coefficient != 0


def _has_reference(method: PolicyMethod, kl_coef: mx.array | float) -> bool:
    return method.kl != "none" and _may_be_nonzero(kl_coef)


def _check_coefficients(
    method: PolicyMethod,
    sample: PolicySample,
    kl_coef: mx.array | float,
    entropy_coef: mx.array | float,
) -> None:
    """Raise a ValueError if a coefficient has no effect, or the entropies it needs are missing."""
    if method.kl == "none" and not isinstance(kl_coef, mx.array) and kl_coef != 0:
        raise ValueError(f"kl_coef={kl_coef}: has no effect, because the method has no KL term")
    if sample.entropies is None and (_may_be_nonzero(entropy_coef) or method.entropy_quantile > 0):
        raise ValueError("entropy_coef or entropy_quantile: expected entropies in the sample")


def _zero_padding(values: mx.array, mask: mx.array) -> mx.array:
    """The values in float32, 0 off the mask, so that no exponential of padding is taken."""
    return mx.where(mask, values.astype(mx.float32), 0.0)


def _selected(
    method: PolicyMethod, sample: PolicySample, inputs: SurrogateInputs, totals: PolicyTotals
) -> mx.array:
    """Tokens (N, C) whose surrogate counts; the others still count in the denominators.

    Source: entropy quantile: Wang et al. 2025 ("Beyond the 80/20 rule"); off-policy completions:
    DeepSeek-AI 2025 (DeepSeek-V3.2), section 3.1.
    """
    selected = inputs.mask
    if method.entropy_quantile > 0 and sample.entropies is not None:
        entropies = mx.stop_gradient(_zero_padding(sample.entropies, inputs.mask))
        selected = mx.logical_and(selected, entropies >= totals.entropy_threshold)
    if method.off_policy_threshold is not None:
        drift = masked_sum(mx.stop_gradient(-inputs.log_ratio), inputs.mask)
        near = drift / safe_length(lengths(inputs.mask)) <= method.off_policy_threshold
        selected = mx.logical_and(selected, mx.logical_or(inputs.advantages >= 0, near[:, None]))
    return selected


def _aggregate(
    aggregation: Aggregation, losses: mx.array, mask: mx.array, totals: PolicyTotals
) -> mx.array:
    """Contribution of the losses (N, C) to the update's loss, scalar."""
    by_row = masked_sum(losses, mask)
    length = lengths(mask)
    if aggregation == "sequence_mean":
        return mx.sum(by_row / safe_length(length)) / safe_length(totals.rows)
    if aggregation == "token_mean":
        return mx.sum(by_row) / safe_length(totals.tokens)
    if aggregation == "local_token_mean":
        return mx.sum(by_row) / safe_length(mx.sum(length)) / safe_length(totals.microbatches)
    if aggregation == "sequence_sum":
        return mx.sum(by_row) / safe_length(totals.rows)
    if aggregation == "max_length":
        return mx.sum(by_row) / (safe_length(totals.rows) * totals.max_length)
    raise ValueError(f"aggregation {aggregation!r}: choose from {', '.join(get_args(Aggregation))}")


def _token_sum(
    values: mx.array, mask: mx.array, totals: PolicyTotals, per_row: bool = False
) -> mx.array:
    """Σ over tokens; if `per_row`, the mean over completions times the number of tokens."""
    if not per_row:
        return masked_sum(values, mask, axis=None)
    by_row = masked_sum(values, mask) / safe_length(lengths(mask))
    return mx.sum(by_row) * totals.tokens / safe_length(totals.rows)


def _quantile(values: mx.array, real: mx.array, quantile: float) -> mx.array:
    """Quantile of the real values (n,), linear between neighbours; −inf without any."""
    if values.size == 0:
        return mx.array(-mx.inf)
    count = mx.sum(real)
    ordered = mx.sort(mx.where(real, values.astype(mx.float32), mx.inf))
    position = quantile * (count.astype(mx.float32) - 1)
    below = mx.maximum(mx.floor(position).astype(mx.int32), 0)
    above = mx.minimum(below + 1, mx.maximum(count - 1, 0))
    between = ordered[below] + (position - below) * (ordered[above] - ordered[below])
    return mx.where(count > 0, between, -mx.inf)
