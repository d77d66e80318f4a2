"""The Bradley–Terry loss of reward models: pure functions of scores."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


def bt_loss(r_chosen: mx.array | float, r_rejected: mx.array | float) -> mx.array:
    """Bradley–Terry negative log-likelihood, elementwise: −ls(r_chosen − r_rejected).

    Args:
        r_chosen: Scores of the chosen completions; any shape, or a float.
        r_rejected: Scores of the rejected completions.

    Returns:
        The losses in nats, of the arguments' common shape (floats give a scalar array); the
        caller averages.

    Source: Bradley & Terry 1952; Ouyang et al. 2022 (InstructGPT), eq. 1.
    """
    return -nn.log_sigmoid(mx.array(r_chosen, mx.float32) - r_rejected)
