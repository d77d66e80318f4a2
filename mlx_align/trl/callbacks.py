"""Callbacks of transformers, `TrainerCallback` objects, as callbacks of a run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_align.errors import ConfigError
from mlx_align.training.callbacks import Callback
from mlx_align.training.metrics import Progress


@dataclass
class TrainerState:
    """The state of a run for callbacks, under transformers' names.

    Attributes:
        epoch: Passes over the data.
        global_step: Updates made.
        max_steps: Updates of the whole run.
        log_history: Every row of metrics, with `step` and `epoch`; held-out ones as `eval_…`.
    """

    epoch: float = 0.0
    global_step: int = 0
    max_steps: int = 0
    logging_steps: float = 10
    eval_steps: float | None = None
    save_steps: float = 500
    num_train_epochs: float = 0
    train_batch_size: int | None = None
    log_history: list[dict[str, float]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    stateful_callbacks: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainerControl:
    """Requests of callbacks; `should_training_stop` ends the run after this step."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


class TrainerCallbacks(Callback):
    """Calls `TrainerCallback` objects with (args, state, control) and keywords.

    Args:
        callbacks: The objects, or their classes.
        args: The trainer's config.
        state: Kept up to date.
        rows: Rows of training data, to count epochs; None if unknown.
        updates_per_step: Updates in a step of the run: more than 1 if a rollout batch is used for
            several.
        context: Further keywords that they are called with, such as `processing_class`.

    Raises:
        ConfigError: An object has no method of a callback.
    """

    def __init__(
        self,
        callbacks: Sequence[Any],
        args: Any,
        state: TrainerState,
        rows: int | None,
        updates_per_step: int,
        context: Mapping[str, Any],
    ) -> None:
        self._callbacks = [one() if isinstance(one, type) else one for one in callbacks]
        for one in self._callbacks:
            if not any(name.startswith("on_") for name in dir(one)):
                raise ConfigError(f"callbacks: {type(one).__name__} has no on_… method")
        self._args, self._state, self._rows = args, state, rows
        self._per_step, self._context = updates_per_step, dict(context)
        self._control = TrainerControl()
        self._progress = Progress()
        self._call("on_init_end")

    def on_train_begin(self, progress: Progress, total_steps: int) -> None:
        """Training begins, or continues."""
        self._progress = progress
        self._state.max_steps = total_steps * self._per_step
        self._update(progress.step)
        for event in ("on_train_begin", "on_epoch_begin", "on_step_begin"):
            self._call(event)

    def on_step_end(self, step: int, metrics: Mapping[str, float]) -> bool:
        """An update is done; whether to stop."""
        epoch = int(self._state.epoch)
        self._update(step)
        self._call("on_step_end")
        last = self._state.global_step == self._state.max_steps
        if last or int(self._state.epoch) > epoch:
            self._call("on_epoch_end")
        if not last and not self._control.should_training_stop:
            if int(self._state.epoch) > epoch:
                self._call("on_epoch_begin")
            self._call("on_step_begin")
        return self._control.should_training_stop

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row of training metrics was written."""
        self._log(step, {name: value for name, value in metrics.items() if name != "step"})

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Held-out metrics were written; whether to stop."""
        if step == 0 and not getattr(self._args, "eval_on_start", False):
            return False
        found = {f"eval_{name}": value for name, value in metrics.items()}
        self._log(step, found)
        self._call("on_evaluate", metrics={**found, "epoch": self._state.epoch})
        return self._control.should_training_stop

    def on_save(self, step: int, folder: Path) -> None:
        """A checkpoint was written."""
        self._call("on_save")

    def on_train_end(self, error: BaseException | None) -> None:
        """Training has ended."""
        if error is None:
            self._call("on_train_end")

    def _update(self, step: int) -> None:
        self._state.global_step = step * self._per_step
        if self._rows:
            self._state.epoch = self._progress.groups / self._rows

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._update(step)
        logs = {**metrics, "epoch": self._state.epoch}
        self._state.log_history.append({**logs, "step": self._state.global_step})
        self._call("on_log", logs=logs)

    def _call(self, event: str, **keywords: Any) -> None:
        for one in self._callbacks:
            method = getattr(one, event, None)
            if method is None:
                continue
            returned = method(self._args, self._state, self._control, **self._context, **keywords)
            self._control = self._control if returned is None else returned
        for name in ("should_save", "should_evaluate", "should_log", "should_epoch_stop"):
            if getattr(self._control, name):
                setattr(self._control, name, False)
                warnings.warn(
                    f"a callback set control.{name}, which has no effect here; use save_steps, "
                    "eval_steps and logging_steps",
                    stacklevel=2,
                )
