"""Functions that keep their value and gradient where the textbook form overflows."""

from __future__ import annotations

import mlx.core as mx


def log_sigmoid(x: mx.array) -> mx.array:
    """−log(1 + e^(−x)), elementwise: log σ(x), with value and gradient right at ±1e4."""
    return -mx.logaddexp(-x, mx.array(0.0))


def logistic(logits: mx.array, probability: mx.array | float) -> mx.array:
    """Cross-entropy of σ(logits) against `probability`, elementwise, nats."""
    return -probability * log_sigmoid(logits) - (1 - probability) * log_sigmoid(-logits)
