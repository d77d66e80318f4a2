"""What a run lets others see while it goes: status.json, the run page, and trackers.

None of it ever ends a run: what fails is said once, and training goes on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_align.config import TrainConfig
from mlx_align.errors import MlxAlignError
from mlx_align.files import write_text
from mlx_align.report.page import PAGE_FILE, render_run
from mlx_align.report.runs import STATUS_FILE, read_run
from mlx_align.train import runlog
from mlx_align.train.display import Display
from mlx_align.train.signals import Interrupted
from mlx_align.train.trackers import Trackers

EVERY_SECONDS = 30.0
# A page of 10 charts takes 0.25 s of a core, of 20 charts 0.5 s (Linux x86-64): whatever the
# machine, at most a fiftieth of a run goes into its page.
TIMES_ITS_COST = 50.0


class Publication:
    """Keeps the page of a run up to date, and tells trackers."""

    def __init__(
        self,
        run: Path,
        command: str,
        config: TrainConfig,
        facts: Mapping[str, Any],
        display: Display,
    ) -> None:
        """Start the trackers.

        Args:
            run: The run folder, which exists.
            command: What trains.
            config: Its options, seen by `check_trackers`.
            facts: What is known of the data, plain values.
            display: Where a failure is said.

        Raises:
            ConfigError: A tracker can't be started.
        """
        self._run, self._display = run, display
        self._failed: set[str] = set()
        self._charts = True
        self._shown, self._cost = -math.inf, 0.0
        self._status: dict[str, Any] = {
            "command": command,
            "state": "running",
            "step": 0,
            "total": None,
            "seconds": 0.0,
            "began": _now(),
            "written": None,
            "error": None,
            "data_facts": dict(facts),
            "versions": runlog.versions(),
        }
        self._trackers = Trackers(config, run)

    @contextmanager
    def training(self, step: int, total: int, seconds: float = 0.0) -> Iterator[None]:
        """The time of training: the first page at its start, and at its end if it is cut short.

        Args:
            step: Updates done before, of a resumed run.
            total: Updates of the whole run.
            seconds: Time that the updates before took.
        """
        self._status.update(step=step, total=total, seconds=seconds)
        if step:
            self._status["began"] = self._began_before() or self._status["began"]
            self._trackers.pass_over()
        self._forward()
        self._write()
        try:
            yield
        except BaseException as error:
            self._cut_short(error)
            raise

    def tell(self, step: int, seconds: float, *, evaluated: bool = False) -> None:
        """Rows were written. The page is, if it is due: after an evaluation, else now and then.

        Args:
            step: Updates done.
            seconds: Time they took.
            evaluated: Whether held-out data was measured.
        """
        self._status.update(step=step, seconds=seconds)
        self._forward()
        wait = max(0.0 if evaluated else EVERY_SECONDS, TIMES_ITS_COST * self._cost)
        if time.monotonic() - self._shown >= wait:
            self._write()

    def finish(self) -> None:
        """The run is done and its summary written."""
        self._status["state"] = "finished"
        self._forward()
        self._write()

    def _cut_short(self, error: BaseException) -> None:
        if isinstance(error, Interrupted | KeyboardInterrupt):
            self._status["state"] = "interrupted"
        else:
            known = isinstance(error, MlxAlignError)
            self._status["state"] = "failed"
            self._status["error"] = str(error) if known else f"{type(error).__name__}: {error}"
        self._forward()
        self._write()

    def _began_before(self) -> str | None:
        try:
            content = json.loads((self._run / STATUS_FILE).read_text(encoding="utf-8"))
            return str(content["began"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # it was begun before there was such a file

    def _write(self) -> None:
        began = time.monotonic()
        try:
            self._status["written"] = _now()
            runlog.write_json(self._run / STATUS_FILE, self._status)
            write_text(self._run / PAGE_FILE, self._page())
        except Exception as error:
            self._say_once("the run page could not be written", error)
        self._shown = time.monotonic()
        self._cost = self._shown - began

    def _page(self) -> str:
        facts = read_run(self._run)
        if self._charts:
            try:
                return render_run(facts)
            except Exception as error:  # a broken matplotlib, say
                self._charts = False
                self._say_once("the page's charts could not be drawn", error)
        return render_run(facts, charts=False)

    def _forward(self) -> None:
        try:
            self._trackers.forward()
        except Exception as error:
            self._say_once("--report-to failed", error)

    def _say_once(self, what: str, error: Exception) -> None:
        if what not in self._failed:
            self._failed.add(what)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._display.note(f"! {what}, and training goes on: {reason[:300]}")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
