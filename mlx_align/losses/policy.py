"""Policy-gradient losses: PPO's and the group methods', as one loss with visible parts.

The parts are named in `methods.py`, ratios and surrogates are in `surrogates.py`.

An update's microbatches share their denominators (`policy_totals`), so that their losses and
gradients add up to those of one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_align.losses.kl import k2, k3
from mlx_align.losses.masking import lengths, masked_sum, safe_length
from mlx_align.losses.methods import POLICY_METHODS, Aggregation, PolicyMethod
from mlx_align.losses.surrogates import (
    MAX_LOG_RATIO,
    RATIOS,
    SURROGATES,
    Bounds,
    Terms,
    clip_metrics,
    vespo_weight,
)
from mlx_align.types import PolicySample

__all__ = ["POLICY_METHODS", "PolicyMethod", "PolicyTotals", "policy_loss", "policy_totals"]


class PolicyTotals(NamedTuple):
    """What the microbatches of an update share: scalars, float32."""

    rows: mx.array  # completions that count: those with a token under the mask
    tokens: mx.array  # their tokens
    microbatches: mx.array  # microbatches with a token
    max_length: mx.array  # the longest completion allowed, tokens
    entropy_threshold: mx.array  # nats; tokens of less entropy have no surrogate


def policy_totals(
    masks: Sequence[mx.array],
    method: PolicyMethod,
    max_length: int,
    entropies: Sequence[mx.array] | None = None,
) -> PolicyTotals:
    """The denominators of an update.

    Args:
        masks: Of each microbatch the mask (N, C) of its `PolicySample`.
        method: The method.
        max_length: The longest completion allowed, in tokens.
        entropies: Of each microbatch the entropies (N, C), nats, where the method has a quantile
            of them: the rollout's are as good as any.

    Raises:
        ValueError: The method has a quantile of entropies, and there are none.
    """
    length = [lengths(mask) for mask in masks]
    rows = [mx.sum((row > 0).astype(mx.float32)) for row in length]
    threshold = mx.array(-mx.inf)
    if method.entropy_quantile > 0:
        if entropies is None:
            raise ValueError("entropy_quantile: no entropies given")
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
    """A microbatch's share of an update's loss, and sums of metrics.

    Per token correction·(surrogate + kl_coef·KL), averaged as `method.aggregation` says, minus
    entropy_coef times the mean entropy over all tokens. Only `logps` and `entropies` of the
    sample have a gradient.

    Args:
        method: The method.
        sample: The microbatch.
        totals: Of the update, as `policy_totals` gives them.
        kl_coef: Weight of the KL in the loss, an array where it changes under `mx.compile`; no
            effect where `method.kl` is k1_reward.
        entropy_coef: Weight of the entropy bonus, likewise.

    Returns:
        A scalar, and metrics without gradient whose sums over the microbatches are to be divided
        by the sum of "weight", the tokens: of a token its `ratio` (at the method's level),
        `ratio/deviation` = |ratio − 1|, `approx_kl` = k3 of KL(old‖policy), where there is a
        reference `kl` = k3 of KL(policy‖reference), `entropy` where it is known, and what the
        clip did. Ratios of completions are averaged over completions, as in TRL. `policy_loss` is
        the loss without KL and entropy.

    Raises:
        ValueError: A coefficient has no effect, or lacks the entropies it needs.
    """
    _refuse_without_effect(method, sample, kl_coef, entropy_coef)
    mask = sample.mask != 0
    logps = _real(sample.logps, mask)
    old = mx.stop_gradient(_real(sample.old_logps, mask))
    advantages = mx.stop_gradient(_real(sample.advantages, mask))
    log_ratio = logps - old
    ratio = RATIOS[method.ratio](logps, log_ratio, mask)
    terms = Terms(logps, log_ratio, ratio, advantages, mask)
    bounds = Bounds(method.clip_low, method.clip_high, method.delta)

    surrogate = SURROGATES[method.surrogate](terms, bounds)
    correction = mx.stop_gradient(_real(sample.correction, mask))
    surrogate = mx.where(_selected(method, sample, terms, totals), correction * surrogate, 0.0)
    loss = policy = _aggregate(method.aggregation, surrogate, mask, totals)

    sums = clip_metrics(terms, method.surrogate, bounds) | {
        "ratio": ratio,
        "ratio/deviation": mx.abs(ratio - 1),
    }
    if method.surrogate == "vespo":
        sums["vespo/phi_seq_mean"] = vespo_weight(terms)
    per_row = method.ratio in ("sequence", "trajectory")
    metrics = {
        name: _token_sum(mx.stop_gradient(value), mask, totals, per_row or name.startswith("vespo"))
        for name, value in sums.items()
    }
    metrics["approx_kl"] = _token_sum(k3(old, mx.clip(logps, old - 20, old + 20)), mask, totals)
    metrics["policy_loss"] = policy * totals.tokens

    if _has_reference(method, kl_coef):
        reference = mx.stop_gradient(_real(sample.reference_logps, mask))
        # k3 alone: clamped exponent; k2's gradient has to hold at any distance.
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
        if _may_act(entropy_coef):
            loss = loss - entropy_coef * entropy / safe_length(totals.tokens)
        metrics["entropy"] = entropy
    metrics["weight"] = mx.sum(lengths(mask))
    return loss, {name: mx.stop_gradient(value) for name, value in metrics.items()}


def _may_act(coefficient: mx.array | float) -> bool:
    """Whether it is an array, which may become anything, or a number that is not 0."""
    return isinstance(coefficient, mx.array) or coefficient != 0


def _has_reference(method: PolicyMethod, kl_coef: mx.array | float) -> bool:
    return method.kl != "none" and _may_act(kl_coef)


def _refuse_without_effect(
    method: PolicyMethod,
    sample: PolicySample,
    kl_coef: mx.array | float,
    entropy_coef: mx.array | float,
) -> None:
    if method.kl == "none" and not isinstance(kl_coef, mx.array) and kl_coef != 0:
        raise ValueError(f"kl_coef={kl_coef}: has no effect, the method has no KL term")
    if sample.entropies is None and (_may_act(entropy_coef) or method.entropy_quantile > 0):
        raise ValueError("entropy_coef or entropy_quantile: no entropies given")


def _real(values: mx.array, mask: mx.array) -> mx.array:
    """The values in float32 under the mask, 0 off it: before the exponential sees them."""
    return mx.where(mask, values.astype(mx.float32), 0.0)


def _selected(
    method: PolicyMethod, sample: PolicySample, terms: Terms, totals: PolicyTotals
) -> mx.array:
    """Tokens (N, C) whose surrogate counts; those that don't still count in the denominators.

    Source: quantile of the entropies: Wang et al. 2025 ("Beyond the 80/20 rule");
    off-policy completions: DeepSeek-AI 2025 (DeepSeek-V3.2), section 3.1.
    """
    selected = terms.mask
    if method.entropy_quantile > 0 and sample.entropies is not None:
        entropies = mx.stop_gradient(_real(sample.entropies, terms.mask))
        selected = mx.logical_and(selected, entropies >= totals.entropy_threshold)
    if method.off_policy_threshold is not None:
        drift = masked_sum(mx.stop_gradient(-terms.log_ratio), terms.mask)
        near = drift / safe_length(lengths(terms.mask)) <= method.off_policy_threshold
        selected = mx.logical_and(selected, mx.logical_or(terms.advantages >= 0, near[:, None]))
    return selected


def _aggregate(
    aggregation: Aggregation, losses: mx.array, mask: mx.array, totals: PolicyTotals
) -> mx.array:
    """The share of losses (N, C) in the update's loss, scalar."""
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
    raise ValueError(f"aggregation {aggregation!r}: unknown")


def _token_sum(
    values: mx.array, mask: mx.array, totals: PolicyTotals, per_row: bool = False
) -> mx.array:
    """Σ over tokens; `per_row` what, by the tokens, gives the mean over completions."""
    if not per_row:
        return masked_sum(values, mask, axis=None)
    by_row = masked_sum(values, mask) / safe_length(lengths(mask))
    return mx.sum(by_row) * totals.tokens / safe_length(totals.rows)


def _quantile(values: mx.array, real: mx.array, quantile: float) -> mx.array:
    """The quantile of the real values (n,), linear between neighbours; −inf where none is."""
    if values.size == 0:
        return mx.array(-mx.inf)
    count = mx.sum(real)
    ordered = mx.sort(mx.where(real, values.astype(mx.float32), mx.inf))
    place = quantile * (count.astype(mx.float32) - 1)
    below = mx.maximum(mx.floor(place).astype(mx.int32), 0)
    above = mx.minimum(below + 1, mx.maximum(count - 1, 0))
    between = ordered[below] + (place - below) * (ordered[above] - ordered[below])
    return mx.where(count > 0, between, -mx.inf)
