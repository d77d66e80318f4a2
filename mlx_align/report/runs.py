"""A run folder as its files tell it; nothing of the run itself is needed, and no file but one.

A folder is read while it is written, or after its run was killed: a torn last line is passed
over, and what is not there yet is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlx_align.errors import ConfigError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
SAMPLES_FILE = "samples.jsonl"
# Rollouts of a long run are many; the end of the file has the last ones.
SAMPLES_TAIL_BYTES = 1 << 20
STATUS_FILE = "status.json"

Row = Mapping[str, float]


@dataclass(frozen=True)
class RunFacts:
    """What a run folder holds.

    Attributes:
        name: The folder's name.
        config: Its options, as config.yaml has them.
        training: Rows of training metrics, in order of steps, finite numbers only.
        held_out: Rows of held-out metrics, their keys with `eval/`.
        status: state, step, total, seconds, began, written: where the run was when it last said so.
        summary: Of a finished run; empty before that.
        samples: Rows of samples.jsonl of a finished run.
        rollouts: Those of what a policy said in its last rollout batch, and what that earned.
    """

    name: str
    config: Mapping[str, Any]
    training: Sequence[Row]
    held_out: Sequence[Row]
    status: Mapping[str, Any]
    summary: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    rollouts: Sequence[Mapping[str, Any]]

    @property
    def command(self) -> str:
        """The command that made the run, or "run" where no file says it."""
        return str(self.summary.get("command") or self.status.get("command") or "run")

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return bool(self.summary)

    @property
    def step(self) -> int:
        """Updates done, as far as is known."""
        rows = [int(row["step"]) for row in (*self.training[-1:], *self.held_out[-1:])]
        return max([*rows, int(_number(self.status.get("step")) or 0)])

    def last(self, key: str) -> float | None:
        """The last value of a metric, or None."""
        values = self.values(key)
        return values[-1] if values else None

    def values(self, key: str) -> list[float]:
        """All values of a metric, in order."""
        rows = self.held_out if key.startswith("eval/") else self.training
        return [row[key] for row in rows if key in row]

    def lately(self, key: str, rows: int = 3) -> float | None:
        """The mean of a metric's last few values, or None where there are not so many."""
        values = self.values(key)[-rows:]
        return sum(values) / rows if len(values) == rows else None


def read_run(folder: Path) -> RunFacts:
    """Read a run folder.

    Raises:
        ConfigError: It is none.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name the run folder that --output named")
    if not any((folder / n).is_file() for n in (CONFIG_FILE, METRICS_FILE, STATUS_FILE)):
        raise ConfigError(
            f"{folder}: neither {CONFIG_FILE} nor {METRICS_FILE} in it; name a run folder, which "
            "training wrote"
        )
    rows = [_finite(row) for row in _lines(folder / METRICS_FILE)]
    rows = [row for row in rows if "step" in row]
    said = _lines(folder / SAMPLES_FILE, SAMPLES_TAIL_BYTES)
    status = _object(folder / STATUS_FILE)
    # A run that goes on, or began again, is not what an earlier summary says of it.
    over = status.get("state", "finished") == "finished"
    return RunFacts(
        name=folder.resolve().name,
        config=_config(folder / CONFIG_FILE),
        training=[row for row in rows if not _is_held_out(row)],
        held_out=[row for row in rows if _is_held_out(row)],
        status=status,
        summary=_object(folder / SUMMARY_FILE) if over else {},
        samples=[row for row in said if "completion" not in row] if over else [],
        rollouts=_last_step([row for row in said if "completion" in row]),
    )


def _last_step(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the last rollout batch."""
    return [row for row in rows if row.get("step") == rows[-1].get("step")]


def _is_held_out(row: Row) -> bool:
    return all(key == "step" or key.startswith("eval/") for key in row)


def _finite(row: Mapping[str, Any]) -> dict[str, float]:
    numbers = {str(key): _number(value) for key, value in row.items()}
    return {key: value for key, value in numbers.items() if value is not None}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _text(file: Path, tail: int | None = None) -> str:
    try:
        with file.open("rb") as stream:
            if tail is not None:
                stream.seek(max(0, file.stat().st_size - tail))
            return stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _lines(file: Path, tail: int | None = None) -> list[dict[str, Any]]:
    """The rows of a JSONL file, or those in its last `tail` bytes."""
    found = []
    # Not splitlines: texts may hold other ends of lines than a newline.
    for line in _text(file, tail).split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the torn last line of a run that writes, or was killed; a tail's first
        if isinstance(row, dict):
            found.append(row)
    return found


def _object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(file))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _config(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(_text(file))
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}
