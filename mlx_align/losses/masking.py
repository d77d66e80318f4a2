"""From per-token to per-row to per-pair numbers: sums under masks, lengths, weights.

Masks are true (or positive, when they weigh) where a token counts. Everything here selects with
`where` before it sums: a product with 0 would keep the inf or NaN of a padded position.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_align.types import PairLogps


def masked_sum(values: mx.array, mask: mx.array, axis: int | None = -1) -> mx.array:
    """Σ mask·values in float32 along `axis` (None: everywhere); unmasked garbage is ignored."""
    kept = mx.where(mask != 0, values.astype(mx.float32), 0.0)
    return mx.sum(kept * mask.astype(mx.float32), axis=axis)


def masked_mean(values: mx.array, mask: mx.array, axis: int | None = -1) -> mx.array:
    """Mean of the values under the mask; 0 where the mask is empty."""
    return masked_sum(values, mask, axis) / mx.maximum(lengths(mask, axis), 1.0)


def lengths(mask: mx.array, axis: int | None = -1) -> mx.array:
    """Scored tokens per row, (N,) float32, of a mask (N, C)."""
    return mx.sum((mask != 0).astype(mx.float32), axis=axis)


def safe_length(length: mx.array) -> mx.array:
    """Lengths to divide by: filler rows have none, and 0/0 would reach every weight as NaN."""
    return mx.maximum(length, 1.0)


def weighted_sum(values: mx.array, weight: mx.array) -> mx.array:
    """Σ weight·values over the rows of a batch, scalar; rows of weight 0 can't spoil it."""
    return masked_sum(values, weight, axis=None)


def pair_logps(
    token_logps: mx.array,
    reference_logps: mx.array,
    mask: mx.array,
    soft_label: mx.array,
    token_weight: mx.array | None = None,
) -> PairLogps:
    """What the pairwise losses see, from per-token log-probs of alternating rows.

    Args:
        token_logps: (2B, C) nats, policy; the rows are chosen 0, rejected 0, chosen 1 …
        reference_logps: (2B, C) nats; zeros where the loss has no reference.
        mask: (2B, C), true where a token is scored: lengths are counted from it.
        soft_label: (B,) probability that chosen is the better one.
        token_weight: (2B, C) weights of tokens in the sums (see `ld_mask`); default the mask.

    Returns:
        Sums over tokens. The log-ratio is the sum of per-token differences.
    """
    weight = mask if token_weight is None else token_weight
    # In float32 before the difference: in bf16 it would have three digits.
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
    """For rows chosen 0, rejected 0, …: the length (2B,) of the shorter row of each row's pair."""
    pairs = lengths(mask).reshape(-1, 2)
    return mx.repeat(mx.min(pairs, axis=1), 2)


def ld_mask(mask: mx.array, shared_length: mx.array, alpha: float) -> mx.array:
    """LD-DPO's token weights (N, C): 1 up to the shared length, α past it, 0 off the mask.

    Given as the `token_weight` of `pair_logps`, for policy and reference alike; α = 1 is plain
    DPO, α = 0 ignores what the longer completion says after the shorter one ended.

    Args:
        mask: (N, C), true where a token is scored.
        shared_length: (N,) scored tokens that both rows of the pair have.
        alpha: What a token past them counts, 0 to 1.

    Source: Liu et al. 2024, "Length Desensitization in Direct Preference Optimization".
    """
    scored = (mask != 0).astype(mx.float32)
    within = mx.cumsum(scored, axis=-1) <= shared_length[:, None]
    return scored * mx.where(within, 1.0, alpha)


def wpo_weight(token_logps: mx.array, log_square_sums: mx.array, mask: mx.array) -> mx.array:
    """WPO's weight of each row, (N,): exp(mean over tokens of log p − log Σ_v p_v²), no gradient.

    How likely the policy itself would have written the completion, per token and measured
    against how peaked it is there. A pair's loss is multiplied by the weights of both its rows.

    Args:
        token_logps: (N, C) nats, policy log-prob of the completion's tokens.
        log_square_sums: (N, C) nats, log Σ_v p_v² of the distributions they were drawn from.
        mask: (N, C), true where a token is scored.

    Source: Zhou et al. 2024, "WPO: Enhancing RLHF with Weighted Preference Optimization".
    """
    return mx.stop_gradient(mx.exp(masked_mean(token_logps - log_square_sums, mask)))
