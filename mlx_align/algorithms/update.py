"""One optimizer update: microbatch gradients are accumulated, clipped and applied.

The gradient and the optimizer step are compiled once per batch shape. Everything that changes from
update to update (weights, learning rate) is an argument, so nothing is baked into the trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_align.algorithms.base import Loss, Objective
from mlx_align.data.batching import Microbatch
from mlx_align.data.buckets import AnyShape
from mlx_align.errors import TrainingError
from mlx_align.models.loading import LanguageModel
from mlx_align.models.patches import random_key, restore_random_key
from mlx_align.models.weights import AdapterWeights
from mlx_align.system.memory_limit import MemoryLimit

# Maximum number of updates skipped in a row. More mean that the cause is not in single rows.
MAX_SKIPPED_IN_A_ROW = 5


class NotFinite(TrainingError):
    """A loss or gradient is not finite; the message names the rows."""


class CollatedMicrobatch(NamedTuple):
    """A microbatch as arrays.

    Attributes:
        arrays: The argument of the loss.
        shape: The padded shape; one function is compiled per shape.
        sources: Returns `file:line` of its rows, for error messages.
    """

    arrays: Any
    shape: AnyShape
    sources: Callable[[], list[str]]


class OptimizerStep(NamedTuple):
    """The result of one update.

    Attributes:
        weights: The weights after the update; unchanged if it was skipped.
        loss: The update's loss; NaN if skipped.
        sums: Sums of metrics over its microbatches; empty if skipped.
        norm: Norm of the gradient before clipping; NaN if skipped.
        skipped: The reason why the update was skipped, or None.
    """

    weights: AdapterWeights
    loss: float
    sums: dict[str, float]
    norm: float
    skipped: str | None = None


class Updater:
    """Makes updates of one set of weights under one loss.

    Args:
        model: The base model; it holds the updated weights after each call.
        optimizer: Initialised for the weights.
        loss: The loss to minimise.
        max_grad_norm: Gradients with a larger norm are scaled down to it.
        memory: Bounds how far mlx runs ahead.
        skip: Skip an update whose loss or gradient is not finite instead of stopping. After
            `MAX_SKIPPED_IN_A_ROW` skipped updates in a row, the next one raises anyway.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: optim.Optimizer,
        loss: Loss,
        max_grad_norm: float,
        memory: MemoryLimit,
        *,
        skip: bool = False,
    ) -> None:
        self._model, self._optimizer, self._memory = model, optimizer, memory
        self._skips_left = self._max_skips = MAX_SKIPPED_IN_A_ROW if skip else 0
        self._max_grad_norm = max_grad_norm
        self._gradient = compiled_gradient(loss)

    @cached_property
    def _apply(self) -> Callable[..., Any]:
        # Compiled at the first update: restoring a checkpoint replaces the optimizer's state.
        return _compiled_update(self._optimizer)

    def __call__(
        self,
        weights: AdapterWeights,
        microbatches: Sequence[CollatedMicrobatch],
        totals: Any,
        learning_rate: float,
    ) -> OptimizerStep:
        """Make one update.

        Args:
            weights: The current weights.
            microbatches: Their gradients add up to that of one large batch.
            totals: The denominators shared by the microbatches.
            learning_rate: The learning rate of this update.

        Raises:
            TrainingError: The loss or gradient is not finite. Nothing was updated, and the state
                of the random generator was restored.
        """
        module = self._model.module
        key = random_key()
        module.train()
        try:
            with self._memory.bounded({batch.shape for batch in microbatches}):
                loss, sums, grads = accumulate(self._gradient, weights, microbatches, totals)
            norm = _norm(grads, microbatches)
            self._optimizer.learning_rate = mx.array(learning_rate)
            clip = mx.array(min(1.0, self._max_grad_norm / (norm + 1e-6)))
            weights = self._apply(weights, grads, clip)
            mx.eval(weights, self._optimizer.state)
            self._model.hold(weights)
        except NotFinite as error:
            if self._skips_left > 0:
                self._skips_left -= 1
                return OptimizerStep(weights, math.nan, {}, math.nan, skipped=str(error))
            restore_random_key(*key)
            raise TrainingError(f"{error}; {self._advice()}") from error
        finally:
            module.eval()
        self._skips_left = self._max_skips
        return OptimizerStep(weights, loss, sums, norm)

    def _advice(self) -> str:
        kept = "nothing was updated with it"
        if self._max_skips:
            kept = f"{self._max_skips} updates before it were skipped for the same reason; {kept}"
        other = "" if self._max_skips else ", or skip such updates with --on-non-finite skip"
        return f"{kept}: check these rows, lower --learning-rate{other}"


def accumulate(
    gradient: Callable[..., Any],
    weights: AdapterWeights,
    microbatches: Sequence[CollatedMicrobatch],
    totals: Any,
) -> tuple[float, dict[str, float], AdapterWeights]:
    """Loss, metric sums and gradient of one update, with one microbatch in memory at a time.

    Args:
        gradient: (weights, arrays, totals) -> ((loss contribution, metric sums), gradient), as
            `compiled_gradient` makes it.
        weights: The weights before the update.
        microbatches: The microbatches.
        totals: The denominators shared by the microbatches.

    Raises:
        NotFinite: A loss is not finite.
    """
    loss = 0.0
    sums: dict[str, float] = {}
    grads: AdapterWeights | None = None
    for batch in microbatches:
        (contribution, metrics), part = gradient(weights, batch.arrays, totals)
        grads = part if grads is None else tree_map(mx.add, grads, part)
        del part
        mx.eval(contribution, metrics, grads)
        if not math.isfinite(contribution.item()):
            raise NotFinite(_not_finite("loss", [batch]))
        loss += contribution.item()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    assert grads is not None
    return loss, sums, grads


def compiled_gradient(loss: Loss) -> Callable[..., Any]:
    """(weights, arrays, totals) -> ((loss contribution, metric sums), gradient of the weights)."""
    # Dropout draws from the global generator: its state is an input and an output of the trace.
    state = [mx.random.state]
    return mx.compile(mx.value_and_grad(loss), inputs=state, outputs=state)


def collate_microbatches(
    objective: Objective, batches: Sequence[Any], microbatches: Sequence[Microbatch]
) -> list[CollatedMicrobatch]:
    """Pair the arrays that `objective` collated with the shapes and sources of their rows."""
    return [
        CollatedMicrobatch(arrays, one.shape, partial(objective.sources, one))
        for arrays, one in zip(batches, microbatches, strict=True)
    ]


def make_optimizer(weights: AdapterWeights, weight_decay: float) -> optim.Optimizer:
    """AdamW with state for `weights`.

    Bias correction is on. mlx has it off by default, which makes the first steps several times
    too long.
    """
    optimizer = optim.AdamW(learning_rate=0.0, weight_decay=weight_decay, bias_correction=True)
    optimizer.init(weights)
    mx.eval(optimizer.state)
    return optimizer


def make_schedule(name: str, peak: float, total: int, warmup: float) -> Callable[[int], float]:
    """The learning rate of update 0, 1, … `total` − 1.

    The rate rises linearly during warm-up and is `peak` at the first update after it. Linear and
    cosine schedules then fall, and would reach 0 at the update after the last.

    Args:
        name: `constant`, `linear` or `cosine`.
        peak: The highest learning rate.
        total: Updates of the run.
        warmup: A fraction of the updates if below 1, else a number of updates.
    """
    warm = min(math.ceil(warmup * total) if warmup < 1 else int(warmup), max(total - 1, 0))

    def rate(step: int) -> float:
        if step < warm:
            return peak * (step + 1) / (warm + 1)
        progress = (step - warm) / max(1, total - warm)
        if name == "linear":
            return peak * (1 - progress)
        if name == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        return peak

    return rate


def _compiled_update(optimizer: optim.Optimizer) -> Callable[..., Any]:
    def update(weights: AdapterWeights, grads: AdapterWeights, scale: mx.array) -> AdapterWeights:
        scaled = tree_map(lambda grad: (grad * scale).astype(grad.dtype), grads)
        updated: AdapterWeights = optimizer.apply_gradients(scaled, weights)
        return updated

    return mx.compile(update, inputs=[optimizer.state], outputs=[optimizer.state])


def _norm(grads: AdapterWeights, microbatches: Sequence[CollatedMicrobatch]) -> float:
    """The gradient's Euclidean norm over all parameters."""
    # Sorted by name: weights read from a checkpoint come in another order, and the order of a sum
    # decides its last digits.
    by_name = sorted(tree_flatten(grads), key=lambda leaf: leaf[0])
    squares = [grad.astype(mx.float32).square().sum() for _, grad in by_name]
    norm = float(np.sqrt(np.array(mx.stack(squares)).sum(dtype=np.float64)))
    if not math.isfinite(norm):
        raise NotFinite(_not_finite("gradient", microbatches))
    return norm


def _not_finite(what: str, microbatches: Sequence[CollatedMicrobatch]) -> str:
    rows = [source for batch in microbatches for source in batch.sources()]
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return f"the {what} is not finite on rows {shown}"
