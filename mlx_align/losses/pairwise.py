"""Losses of preference pairs: pure functions of log-probabilities, one value per pair.

Every function takes `PairLogps` and returns a (B,) float32 array, in nats; the caller averages.
Its keyword-only arguments are its hyperparameters, with the paper's or TRL's defaults: the
command line reads names, types and defaults from the signature.

Notation in the formulas: a and d are the log-ratios policy − reference of chosen and rejected,
Δ = a − d, ε the label smoothing, p the soft label, ls = log-sigmoid.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

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
    return _logistic(beta * (chosen_logratio - rejected_logratio), 1.0)


def sigmoid_loss(
    logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> mx.array:
    """DPO, and with label smoothing conservative DPO: −(1−ε)·ls(βΔ) − ε·ls(−βΔ).

    A pair's soft label p takes the place of certainty: its weight on "chosen is better" is
    p(1−ε) + (1−p)ε.

    Source: Rafailov et al. 2023, eq. 7; Mitchell 2023, "A note on DPO with noisy preferences".
    """
    logits = beta * (logps.chosen_logratio - logps.rejected_logratio)
    return _logistic(logits, _target(logps, label_smoothing))


def _target(logps: PairLogps, label_smoothing: float) -> mx.array:
    """Probability (B,) given to "chosen is better" by soft label and smoothing together."""
    return logps.soft_label * (1 - label_smoothing) + (1 - logps.soft_label) * label_smoothing


def _logistic(logits: mx.array, target: mx.array | float) -> mx.array:
    """Cross-entropy of σ(logits) against `target`, through log-sigmoid: exact at ±1e4."""
    return -target * nn.log_sigmoid(logits) - (1 - target) * nn.log_sigmoid(-logits)
