"""e^x and the sigmoid, as the device at hand computes them fastest.

mlx's CPU kernels for other processors than Apple's make e^x from a polynomial whose multiply-adds
are calls into the C library: 15 to 22 ns an element, where the C library's own power takes 6
(x86-64, mlx 0.32.4, one core). Of a DPO step of 34M parameters with a vocabulary of 32,000 that
was two fifths. On a GPU, and on Apple's processors, mlx's own are used.
"""

from __future__ import annotations

import math
import sys

import mlx.core as mx


def exp(x: mx.array) -> mx.array:
    """e^x, elementwise, of float32, by power exact to 3e-8·|x| + 1e-7 of its value."""
    # float32's nearest to e is 3e-8 too small; 2^(x·log₂e) would round the exponent twice as much.
    return mx.power(mx.array(math.e), x) if _by_power() else mx.exp(x)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^−x), elementwise."""
    if not _by_power():
        return mx.sigmoid(x)
    return (1 / (1 + exp(-x.astype(mx.float32)))).astype(x.dtype)


def logsumexp(x: mx.array) -> mx.array:
    """The logarithm of Σ e^x over the last axis, of float32."""
    if not _by_power():
        return mx.logsumexp(x, axis=-1)
    top = mx.stop_gradient(x.max(axis=-1, keepdims=True))
    return top[..., 0] + mx.log(exp(x - top).sum(axis=-1))


def _by_power() -> bool:
    return sys.platform != "darwin" and mx.default_device() == mx.cpu
