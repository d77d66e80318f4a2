"""One optimizer update: the gradients of its microbatches, added up, clipped and applied.

All that changes from update to update travels as arguments (the tree, the rate), so nothing is
frozen into a compiled function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_align.data.shapes import AnyShape
from mlx_align.errors import TrainingError
from mlx_align.models.compat import random_key, restore_random_key
from mlx_align.models.loading import LanguageModel
from mlx_align.models.roles import Tree
from mlx_align.train.run_ahead import RunAhead

Sums = dict[str, mx.array]
# (tree, batch, totals) -> a microbatch's share of the update's loss, and sums of metrics; shares
# add up to the loss of one big batch.
Loss = Callable[[Tree, Any, Any], tuple[mx.array, Sums]]


# Updates skipped in a row before it is the run that is at fault, not its rows.
MOST_SKIPS = 5


class NotFinite(TrainingError):
    """A loss or gradient is not finite; the text names the rows."""


class Ready(NamedTuple):
    """A microbatch ready to be learned from: its arrays, their shape, and its rows for messages."""

    arrays: Any
    shape: AnyShape
    sources: Callable[[], list[str]]


class Updated(NamedTuple):
    """What an update was: its loss, sums of metrics, and the gradient's norm before clipping.

    One that was skipped has the tree it began with, and says why in `skipped`.
    """

    tree: Tree
    loss: float
    sums: dict[str, float]
    norm: float
    skipped: str | None = None


class Updater:
    """Updates of one tree by one loss; both passes are compiled once per shape.

    Args:
        model: The base. It holds the updated tree after each call.
        optimizer: With its state.
        loss: What to minimise.
        max_grad_norm: Gradients are scaled down to this norm.
        memory: Bounds how far mlx may run ahead.
        skip: Skip an update whose loss or gradient is not finite, instead of stopping; after
            `MOST_SKIPS` in a row it stops all the same.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: optim.Optimizer,
        loss: Loss,
        max_grad_norm: float,
        memory: RunAhead,
        *,
        skip: bool = False,
    ) -> None:
        self._model, self._optimizer, self._memory = model, optimizer, memory
        self._skips_left = self._most_skips = MOST_SKIPS if skip else 0
        self._max_grad_norm = max_grad_norm
        self._gradient = compiled_gradient(loss)

    @cached_property
    def _apply(self) -> Callable[..., Any]:
        # When it is first used: a checkpoint may have given the optimizer another state.
        return _compiled_update(self._optimizer)

    def __call__(self, tree: Tree, micro: Sequence[Ready], totals: Any, rate: float) -> Updated:
        """The tree after one update with learning rate `rate`.

        Args:
            tree: Where it stands now.
            micro: The microbatches, whose gradients add up.
            totals: What their losses divide by.
            rate: The learning rate.

        Raises:
            TrainingError: The loss or the gradient is not finite; nothing was updated, and the
                random generator is where it was.
        """
        module = self._model.module
        key = random_key()
        module.train()
        try:
            with self._memory.bounded({batch.shape for batch in micro}):
                loss, sums, grads = accumulate(self._gradient, tree, micro, totals)
            norm = _norm(grads, micro)
            self._optimizer.learning_rate = mx.array(rate)
            clip = mx.array(min(1.0, self._max_grad_norm / (norm + 1e-6)))
            tree = self._apply(tree, grads, clip)
            mx.eval(tree, self._optimizer.state)
            module.update(tree)
        except NotFinite as error:
            if self._skips_left > 0:
                self._skips_left -= 1
                return Updated(tree, math.nan, {}, math.nan, skipped=str(error))
            restore_random_key(*key)
            raise TrainingError(f"{error}; {self._what_to_do()}") from error
        finally:
            module.eval()
        self._skips_left = self._most_skips
        return Updated(tree, loss, sums, norm)

    def _what_to_do(self) -> str:
        kept = "nothing was updated with it, and what was trained before is in the last checkpoint"
        if self._most_skips:
            kept = f"{self._most_skips} updates before it were skipped for the same; {kept}"
        other = "" if self._most_skips else ", or skip such updates with --on-non-finite skip"
        return f"{kept}: look at these rows, lower --learning-rate{other}"


def accumulate(
    gradient: Callable[..., Any], tree: Tree, micro: Sequence[Ready], totals: Any
) -> tuple[float, dict[str, float], Tree]:
    """Loss, metric sums and gradient of one update; one microbatch in memory at a time.

    Args:
        gradient: (tree, arrays, totals) -> ((share, sums), gradient): `compiled_gradient` of a
            loss.
        tree: Where the update starts.
        micro: The microbatches.
        totals: What their losses divide by.

    Raises:
        NotFinite: A loss is not finite.
    """
    loss = 0.0
    sums: dict[str, float] = {}
    grads: Tree | None = None
    for batch in micro:
        (share, metrics), part = gradient(tree, batch.arrays, totals)
        grads = part if grads is None else tree_map(mx.add, grads, part)
        del part
        mx.eval(share, metrics, grads)
        if not math.isfinite(share.item()):
            raise NotFinite(_not_finite("loss", [batch]))
        loss += share.item()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    assert grads is not None
    return loss, sums, grads


def compiled_gradient(loss: Loss) -> Callable[..., Any]:
    """(tree, arrays, totals) -> ((share, sums), gradient by the tree), compiled once per shape."""
    # Dropout draws from the global generator: its state goes in and comes out.
    state = [mx.random.state]
    return mx.compile(mx.value_and_grad(loss), inputs=state, outputs=state)


def _compiled_update(optimizer: optim.Optimizer) -> Callable[..., Any]:
    def update(tree: Tree, grads: Tree, scale: mx.array) -> Tree:
        scaled = tree_map(lambda grad: (grad * scale).astype(grad.dtype), grads)
        updated: Tree = optimizer.apply_gradients(scaled, tree)
        return updated

    return mx.compile(update, inputs=[optimizer.state], outputs=[optimizer.state])


def _norm(grads: Tree, micro: Sequence[Ready]) -> float:
    """The gradient's Euclidean norm over all parameters."""
    # By name: a tree read from a checkpoint has another order, and sums round by theirs.
    by_name = sorted(tree_flatten(grads), key=lambda leaf: leaf[0])
    squares = [grad.astype(mx.float32).square().sum() for _, grad in by_name]
    norm = float(np.sqrt(np.array(mx.stack(squares)).sum(dtype=np.float64)))
    if not math.isfinite(norm):
        raise NotFinite(_not_finite("gradient", micro))
    return norm


def _not_finite(what: str, micro: Sequence[Ready]) -> str:
    rows = [source for batch in micro for source in batch.sources()]
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return f"the {what} is not finite on rows {shown}"
