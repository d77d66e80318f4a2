"""Callbacks of a run: the base class, the run page and status, and trackers (wandb, swanlab).

Failures of the page and the trackers never end a run: they are shown once, and training continues.
Exceptions of a caller's callbacks are raised.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_align.config import TrainConfig
from mlx_align.errors import ConfigError, MlxAlignError
from mlx_align.report.page import render_run
from mlx_align.system.atomic_io import write_text
from mlx_align.system.interrupts import Interrupted
from mlx_align.system.progress import Console
from mlx_align.tracking.diagnostics import HealthMonitor
from mlx_align.tracking.run_dir import (
    METRICS_FILE,
    PAGE_FILE,
    STATUS_FILE,
    package_versions,
    read_run_record,
    write_json,
)
from mlx_align.training.metrics import Progress

PAGE_EVERY_SECONDS = 30.0
# At most 1/50 of the time of a run is spent on its page. A page with 10 charts takes 0.25 s of a
# core, one with 20 charts 0.5 s (Linux x86-64).
PAGE_COST_FACTOR = 50.0


class Callback:
    """Base class of callbacks; the methods do nothing unless they are overridden.

    A step is one optimizer update, or one rollout batch of ppo and grpo; steps count from 1.
    `on_step_end` and `on_evaluate` may return True to stop the run after this step.
    """

    def on_train_begin(self, progress: Progress, total_steps: int) -> None:
        """Training begins, or continues at `progress`, which is updated in place."""

    def on_step_end(self, step: int, metrics: Mapping[str, float]) -> bool | None:
        """A step is done; `metrics` are those of the step, empty if its update was skipped."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row of training metrics was written: means over the steps since the last row."""

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> bool | None:
        """Held-out metrics were written; step 0 is the start of the run."""

    def on_save(self, step: int, folder: Path) -> None:
        """A checkpoint was written to `folder`."""

    def on_train_end(self, error: BaseException | None) -> None:
        """Training has ended; `error` is the exception that ended it early, or None."""

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """The run folder is complete; `summary` is the content of summary.json."""


class Callbacks:
    """Calls several callbacks in their order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)

    @contextmanager
    def training(self, progress: Progress, total_steps: int) -> Iterator[None]:
        """Call `on_train_begin` at the start of the block and `on_train_end` at its end."""
        for one in self._callbacks:
            one.on_train_begin(progress, total_steps)
        try:
            yield
        except BaseException as error:
            for one in self._callbacks:
                # The error that ended the run is the one to raise, also if a callback fails now.
                with suppress(Exception):
                    one.on_train_end(error)
            raise
        for one in self._callbacks:
            one.on_train_end(None)

    def on_step_end(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether a callback asks to stop."""
        answers = [one.on_step_end(step, metrics) for one in self._callbacks]
        return any(answers)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Call all."""
        for one in self._callbacks:
            one.on_log(step, metrics)

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether a callback asks to stop."""
        answers = [one.on_evaluate(step, metrics) for one in self._callbacks]
        return any(answers)

    def on_save(self, step: int, folder: Path) -> None:
        """Call all."""
        for one in self._callbacks:
            one.on_save(step, folder)

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Call all."""
        for one in self._callbacks:
            one.on_run_end(summary)


class RunPage(Callback):
    """Keeps status.json and the run page up to date."""

    def __init__(
        self,
        run: Path,
        command: str,
        facts: Mapping[str, Any],
        eval_examples: int,
        health: HealthMonitor,
        console: Console,
    ) -> None:
        """Prepare the status; the page is first written when training begins.

        Args:
            run: The run folder, which exists.
            command: Name of the command.
            facts: Facts of the data, JSON-serialisable.
            eval_examples: Number of held-out examples in an evaluation.
            health: The run's health checks, whose serious findings are written.
            console: Shows failures.
        """
        self._health = health
        self._run, self._failures = run, _Failures(console)
        self._written_at, self._cost = -math.inf, 0.0
        self._progress = Progress()
        self._status: dict[str, Any] = {
            "command": command,
            "state": "running",
            "step": 0,
            "total": None,
            "seconds": 0.0,
            "began": _now(),
            "written": None,
            "error": None,
            "eval_examples": eval_examples,
            "findings": [],
            "data_facts": dict(facts),
            "versions": package_versions(),
        }

    def on_train_begin(self, progress: Progress, total_steps: int) -> None:
        """Write the first page."""
        self._progress = progress
        self._status["total"] = total_steps
        if progress.step:
            self._status["began"] = self._read_began() or self._status["began"]
        self._write()

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the page if it is due."""
        self._write_if_due(PAGE_EVERY_SECONDS)

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the page, unless that would take too much time."""
        if step:  # the first page shows the start
            self._write_if_due(0.0)

    def on_train_end(self, error: BaseException | None) -> None:
        """Write the page of a run that ended early."""
        if error is None:
            return
        if isinstance(error, Interrupted | KeyboardInterrupt):
            self._status["state"] = "interrupted"
        else:
            known = isinstance(error, MlxAlignError)
            self._status["state"] = "failed"
            self._status["error"] = str(error) if known else f"{type(error).__name__}: {error}"
        self._write()

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Answers and reports after the last step: a run that ends early here is not running."""
        try:
            yield
        except BaseException as error:
            self.on_train_end(error)
            raise

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Write the last page, with the summary."""
        self._status["state"] = "finished"
        self._write()

    def _write_if_due(self, every: float) -> None:
        wait = max(every, PAGE_COST_FACTOR * self._cost)
        if time.monotonic() - self._written_at >= wait:
            self._write()

    def _read_began(self) -> str | None:
        try:
            content = json.loads((self._run / STATUS_FILE).read_text(encoding="utf-8"))
            return str(content["began"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # a run from before there was a status file

    def _write(self) -> None:
        began = time.monotonic()
        self._status.update(
            step=self._progress.step,
            seconds=self._progress.seconds,
            findings=self._health.recorded,
        )
        try:
            self._status["written"] = _now()
            write_json(self._run / STATUS_FILE, self._status)
            write_text(self._run / PAGE_FILE, self._page())
        except Exception as error:
            self._failures.show("the run page could not be written", error)
        self._written_at = time.monotonic()
        self._cost = self._written_at - began

    def _page(self) -> str:
        return render_run(read_run_record(self._run))


class Trackers(Callback):
    """Sends every row of metrics.jsonl to wandb or swanlab, through mlx-lm's callbacks.

    Rows are read from the file, so that file and trackers have the same content.
    """

    def __init__(self, config: TrainConfig, run: Path, console: Console) -> None:
        """Start the trackers that the options name; `run` exists.

        Raises:
            ConfigError: A tracker can't be started.
        """
        self._file, self._failures = run / METRICS_FILE, _Failures(console)
        self._sent = 0
        self._callback = None
        if not config.report_to:
            return
        try:
            self._callback = _mlx_lm_callbacks().get_reporting_callbacks(
                ",".join(config.report_to),
                project_name=config.project_name,
                log_dir=str(run),
                config=dataclasses.asdict(config),
            )
        except Exception as error:
            names, reason = ",".join(config.report_to), " ".join(str(error).split())
            raise ConfigError(f"--report-to {names}: can't be started ({reason})") from error

    def on_train_begin(self, progress: Progress, total_steps: int) -> None:
        """Skip the rows that an earlier part of the run has sent; send the others."""
        if progress.step:
            self._sent = self._file.stat().st_size if self._file.exists() else 0
        self._send()

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send new rows."""
        self._send()

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send new rows."""
        self._send()

    def on_train_end(self, error: BaseException | None) -> None:
        """Send new rows."""
        self._send()

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Send new rows."""
        self._send()

    def _send(self) -> None:
        try:
            self._send_new_rows()
        except Exception as error:
            self._failures.show("--report-to failed", error)

    def _send_new_rows(self) -> None:
        if self._callback is None or not self._file.exists():
            return
        with self._file.open("rb") as stream:
            stream.seek(self._sent)
            lines = stream.readlines()
        for line in lines:
            self._sent += len(line)
            row = json.loads(line)
            info = {"iteration": row.pop("step"), **row}
            if all(key.startswith("eval/") for key in row):
                self._callback.on_val_loss_report(info)
            else:
                self._callback.on_train_loss_report(info)


def check_trackers(config: TrainConfig) -> None:
    """Check that the trackers can be used; called before the model is loaded.

    Raises:
        ConfigError: A tracker is unknown or not installed, or a project is named without one.
    """
    if not config.report_to:
        if config.project_name is not None:
            raise ConfigError("--project-name needs --report-to; add that, or leave it out")
        return
    callbacks = _mlx_lm_callbacks()
    for name in config.report_to:
        if name not in callbacks.SUPPORT_CALLBACK:
            choices = ", ".join(callbacks.SUPPORT_CALLBACK)
            raise ConfigError(f"--report-to: {name} is unknown; choose from {choices}")
        if getattr(callbacks, name, None) is None:
            raise ConfigError(f"--report-to: {name} is not installed; pip install {name}")


def _mlx_lm_callbacks() -> Any:
    # Imported late, because it imports all installed trackers.
    from mlx_lm.tuner import callbacks

    return callbacks


class _Failures:
    """Shows each kind of failure once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: set[str] = set()

    def show(self, what: str, error: Exception) -> None:
        if what not in self._shown:
            self._shown.add(what)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._console.note(f"! {what}, but training continues: {reason[:300]}")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
