"""Estimators of KL(policy‖reference) from log-probs of tokens the policy sampled.

Each is elementwise: nats in, nats out, and its mean over samples of the policy estimates the KL.
With l = logp − ref_logp the three differ in variance and, which matters more, in their gradient:

    k1 = l                   unbiased; as a loss its gradient is 0 on average (it teaches nothing):
                             it belongs into the reward
    k2 = l²/2                biased, small variance; as a loss on policy its gradient is that of
                             KL(policy‖reference)
    k3 = e^(−l) − 1 + l      unbiased, never negative; as a loss on policy its gradient is that of
                             KL(reference‖policy): another optimum

Positions off the mask have to be set to equal log-probs *before* the call: garbage in the
exponent of k3 overflows, and no mask afterwards mends inf.

Source: Schulman 2020, "Approximating KL divergence"; for the gradients Tang & Munos 2025, "On a
few pitfalls in KL divergence gradient estimation for RL".
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx


def k1(logps: mx.array, ref_logps: mx.array) -> mx.array:
    """k1 = logp − ref_logp, elementwise."""
    return logps - ref_logps


def k2(logps: mx.array, ref_logps: mx.array) -> mx.array:
    """k2 = (logp − ref_logp)²/2, elementwise."""
    return mx.square(logps - ref_logps) / 2


def k3(logps: mx.array, ref_logps: mx.array) -> mx.array:
    """k3 = e^(ref_logp − logp) − 1 − (ref_logp − logp), elementwise."""
    difference = ref_logps - logps
    # expm1: near 0 the value is difference²/2, which e^x − 1 − x would drown in rounding.
    return mx.expm1(difference) - difference


KL_ESTIMATORS: dict[str, Callable[[mx.array, mx.array], mx.array]] = {"k1": k1, "k2": k2, "k3": k3}
