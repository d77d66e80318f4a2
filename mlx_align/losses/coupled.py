"""Losses that couple pairs (they sort over the batch), under gradient accumulation.

The loss of an update is a function of all its log-probs at once, the model runs on one
microbatch at a time. The chain rule parts the two: first all log-probs without gradient, then
the gradient of the loss by them, then for each microbatch again a forward pass, with a loss that
is linear in its log-probs and has that gradient as its factors.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_align.types import PairLogps

LossFunction = Callable[[PairLogps, mx.array | float], mx.array]


def loss_and_logps_gradient(
    loss: LossFunction, logps: PairLogps, mean_chosen_length: mx.array | float
) -> tuple[mx.array, PairLogps]:
    """Values (B,) of the update's pairs, and the gradient of their mean by each log-prob.

    Args:
        loss: As `registry.combine` gives it.
        logps: All pairs of the update, no fillers.
        mean_chosen_length: Scored chosen tokens per pair.

    Returns:
        The values, and a `PairLogps` whose four log-prob fields hold the gradient (nats per
        nat); its other fields are 0.
    """
    values = loss(logps, mean_chosen_length)

    def mean(
        chosen: mx.array, rejected: mx.array, chosen_ratio: mx.array, rejected_ratio: mx.array
    ) -> mx.array:
        moved = logps._replace(
            chosen=chosen,
            rejected=rejected,
            chosen_logratio=chosen_ratio,
            rejected_logratio=rejected_ratio,
        )
        return mx.mean(loss(moved, mean_chosen_length))

    by_chosen, by_rejected, by_chosen_ratio, by_rejected_ratio = mx.grad(
        mean, argnums=(0, 1, 2, 3)
    )(logps.chosen, logps.rejected, logps.chosen_logratio, logps.rejected_logratio)
    zero = mx.zeros(logps.chosen.shape)
    return values, PairLogps(
        by_chosen, by_rejected, by_chosen_ratio, by_rejected_ratio, zero, zero, zero
    )


def linear_loss(logps: PairLogps, gradient: PairLogps) -> mx.array:
    """Scalar whose gradient by the model is that of the coupled loss, summed over microbatches.

    Args:
        logps: The pairs of one microbatch, this time with gradient.
        gradient: The same rows of `loss_and_logps_gradient`; zeros for filler rows.
    """
    total = (
        logps.chosen * mx.stop_gradient(gradient.chosen)
        + logps.rejected * mx.stop_gradient(gradient.rejected)
        + logps.chosen_logratio * mx.stop_gradient(gradient.chosen_logratio)
        + logps.rejected_logratio * mx.stop_gradient(gradient.rejected_logratio)
    )
    return mx.sum(total)
