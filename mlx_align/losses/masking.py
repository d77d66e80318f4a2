"""Masked sums, lengths and weights, and numerically stable sigmoids.

Masks are true where a token counts, or positive where they carry weights. All functions select with
`where` before they sum: a product with 0 would keep the inf or NaN of a padded position.

Shape letters: B pairs, N completions (2B for pairs), C completion positions.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_align.types import PairLogps

# Stable functions


def log_sigmoid(x: mx.array) -> mx.array:
    """Logarithm of the sigmoid, −log(1 + e^(−x)), elementwise; exact at ±1e4, also its gradient."""
    return -mx.logaddexp(-x, mx.array(0.0))


def logistic(logits: mx.array, probability: mx.array | float) -> mx.array:
    """Cross-entropy of σ(logits) against `probability`, elementwise, nats."""
    return -probability * log_sigmoid(logits) - (1 - probability) * log_sigmoid(-logits)


# Sums under a mask


def masked_sum(values: mx.array, mask: mx.array, axis: int | None = -1) -> mx.array:
    """Σ mask·values in float32 along `axis` (None: all axes); values off the mask are ignored."""
    kept = mx.where(mask != 0, values.astype(mx.float32), 0.0)
    return mx.sum(kept * mask.astype(mx.float32), axis=axis)


def masked_mean(values: mx.array, mask: mx.array, axis: int | None = -1) -> mx.array:
    """Mean of the values under the mask; 0 where the mask is empty."""
    return masked_sum(values, mask, axis) / mx.maximum(lengths(mask, axis), 1.0)


def lengths(mask: mx.array, axis: int | None = -1) -> mx.array:
    """Number of tokens under a mask (N, C) in each row, (N,) float32."""
    return mx.sum((mask != 0).astype(mx.float32), axis=axis)


def safe_length(length: mx.array) -> mx.array:
    """Lengths to divide by, at least 1: filler rows have length 0, and 0/0 is NaN."""
    return mx.maximum(length, 1.0)


def weighted_sum(values: mx.array, weight: mx.array) -> mx.array:
    """Σ weight·values over the rows of a batch, scalar; rows of weight 0 may hold anything."""
    return masked_sum(values, weight, axis=None)


# Pairs


def pair_logps(
    token_logps: mx.array,
    reference_logps: mx.array,
    mask: mx.array,
    soft_label: mx.array,
    token_weight: mx.array | None = None,
) -> PairLogps:
    """Sum per-token log-probs over completions, for the pairwise losses.

    Args:
        token_logps: (2B, C) nats, policy; the rows are chosen 0, rejected 0, chosen 1, …
        reference_logps: (2B, C) nats; zeros where the loss has no reference.
        mask: (2B, C), true where a token counts.
        soft_label: (B,) probability that chosen is better.
        token_weight: (2B, C) weights of tokens in the sums (see `ld_mask`); default: the mask.

    Returns:
        Sums over tokens. The log-ratio is the sum of per-token differences.
    """
    weight = mask if token_weight is None else token_weight
    # To float32 before the difference: in bf16 it would have three digits.
    policy = token_logps.astype(mx.float32)
    logps = masked_sum(policy, weight)
    logratios = masked_sum(policy - reference_logps.astype(mx.float32), weight)
    length = lengths(mask)
    return PairLogps(
        chosen=logps[0::2],
        rejected=logps[1::2],
        chosen_logratio=logratios[0::2],
        rejected_logratio=logratios[1::2],
        chosen_length=length[0::2],
        rejected_length=length[1::2],
        soft_label=soft_label,
    )


def shared_lengths(mask: mx.array) -> mx.array:
    """For rows chosen 0, rejected 0, …: length (2B,) of the shorter row of each row's pair."""
    pairs = lengths(mask).reshape(-1, 2)
    return mx.repeat(mx.min(pairs, axis=1), 2)


def ld_mask(mask: mx.array, shared_length: mx.array, alpha: float) -> mx.array:
    """LD-DPO's token weights (N, C): 1 up to the shared length, α after it, 0 off the mask.

    Pass them as the `token_weight` of `pair_logps`. α = 1 is plain DPO; α = 0 ignores the part of
    the longer completion that exceeds the shorter one.

    Args:
        mask: (N, C), true where a token counts.
        shared_length: (N,) length of the shorter completion of the row's pair.
        alpha: Weight of the tokens after it, 0 to 1.

    Source: Liu et al. 2024, "Length Desensitization in Direct Preference Optimization".
    """
    counted = (mask != 0).astype(mx.float32)
    within = mx.cumsum(counted, axis=-1) <= shared_length[:, None]
    return counted * mx.where(within, 1.0, alpha)


def wpo_weight(token_logps: mx.array, log_square_sums: mx.array, mask: mx.array) -> mx.array:
    """WPO's row weights (N,): exp(mean over tokens of log p − log Σ_v p_v²), without gradient.

    The weight says how likely the policy is to generate the completion itself, per token and
    relative to how peaked its distributions are. A pair's loss is multiplied by the weights of both
    its rows.

    Args:
        token_logps: (N, C) nats, policy log-probs of the completion's tokens.
        log_square_sums: (N, C) nats, log Σ_v p_v² of the distribution at each token.
        mask: (N, C), true where a token counts.

    Source: Zhou et al. 2024, "WPO: Enhancing RLHF with Weighted Preference Optimization".
    """
    return mx.stop_gradient(mx.exp(masked_mean(token_logps - log_square_sums, mask)))
