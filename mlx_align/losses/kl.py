"""Estimators of KL(policy‖reference) from log-probs of tokens that the policy sampled.

Each is elementwise, in nats; its mean over samples of the policy estimates the KL. With
l = logp − ref_logp the three differ in variance and, more importantly, in their gradient:

    k1 = l                   unbiased; as a loss its expected gradient is 0, so it is only useful
                             in the reward
    k2 = l²/2                biased, small variance; as an on-policy loss it has the gradient of
                             KL(policy‖reference)
    k3 = e^(−l) − 1 + l      unbiased, never negative; as an on-policy loss it has the gradient of
                             KL(reference‖policy), which has another optimum

Set positions off the mask to equal log-probs *before* the call: padding can overflow in the
exponent of k3, and multiplying by a mask afterwards turns inf into NaN.

Source: Schulman 2020, "Approximating KL divergence"; for the gradients Tang & Munos 2025, "On a
few pitfalls in KL divergence gradient estimation for RL".
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx


def k1(logps: mx.array, ref_logps: mx.array) -> mx.array:
    """Estimator k1 = logp − ref_logp, elementwise."""
    return logps - ref_logps


def k2(logps: mx.array, ref_logps: mx.array) -> mx.array:
    """Estimator k2 = (logp − ref_logp)²/2, elementwise."""
    return mx.square(logps - ref_logps) / 2


def k3(logps: mx.array, ref_logps: mx.array) -> mx.array:
    """Estimator k3 = e^(ref_logp − logp) − 1 − (ref_logp − logp), elementwise."""
    difference = ref_logps - logps
    # expm1: near 0 the value is difference²/2, which e^x − 1 − x would lose to rounding.
    return mx.expm1(difference) - difference


KL_ESTIMATORS: dict[str, Callable[[mx.array, mx.array], mx.array]] = {"k1": k1, "k2": k2, "k3": k3}
