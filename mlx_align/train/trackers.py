"""Trackers that people already use, through mlx-lm's own callbacks: every row of metrics.jsonl.

Rows are read from the file that they were written to, so that whatever trains need not know.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mlx_align.config import TrainConfig
from mlx_align.errors import ConfigError
from mlx_align.train import runlog


def check_trackers(config: TrainConfig) -> None:
    """Refuse what can't be reported to; called before the model is loaded.

    Raises:
        ConfigError: A tracker is unknown or not installed, or a project is named for none.
    """
    if not config.report_to:
        if config.project_name is not None:
            raise ConfigError("--project-name: it is for --report-to; add that, or leave it out")
        return
    callbacks = _callbacks()
    for name in config.report_to:
        if name not in callbacks.SUPPORT_CALLBACK:
            choices = ", ".join(callbacks.SUPPORT_CALLBACK)
            raise ConfigError(f"--report-to: {name} is unknown; choose from {choices}")
        if getattr(callbacks, name, None) is None:
            raise ConfigError(f"--report-to: {name} is not installed; pip install {name}")


def _callbacks() -> Any:
    # Imported late: it imports the trackers, whether they are wanted or not.
    from mlx_lm.tuner import callbacks

    return callbacks


class Trackers:
    """Sends on the rows that metrics.jsonl got since the last time."""

    def __init__(self, config: TrainConfig, run: Path) -> None:
        """Start the trackers that the options name; `run` exists.

        Raises:
            ConfigError: One of them can't be started.
        """
        self._file = run / runlog.METRICS_FILE
        self._sent = 0
        self._callback = None
        if not config.report_to:
            return
        try:
            self._callback = _callbacks().get_reporting_callbacks(
                ",".join(config.report_to),
                project_name=config.project_name,
                log_dir=str(run),
                config=dataclasses.asdict(config),
            )
        except Exception as error:
            names, reason = ",".join(config.report_to), " ".join(str(error).split())
            raise ConfigError(f"--report-to {names}: can't be started ({reason})") from error

    def pass_over(self) -> None:
        """Leave out the rows there are: what a resumed run wrote before, was sent before."""
        self._sent = self._file.stat().st_size if self._file.exists() else 0

    def forward(self) -> None:
        """Send new rows: training metrics as such, and `eval/` ones as validation."""
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
