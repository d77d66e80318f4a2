"""The run folder: what a run writes while it goes and when it ends."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlx_align.errors import ConfigError
from mlx_align.files import write_text, writing

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
SAMPLES_FILE = "samples.jsonl"


def new_run_folder(output: str | None, command: str) -> Path:
    """The folder a run will write to, free and writable; it is not made yet.

    Raises:
        ConfigError: It holds another run, or can't be made or written.
    """
    if output is None:
        output = f"runs/{command}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(output).expanduser()
    if (folder / METRICS_FILE).exists() or (folder / CONFIG_FILE).exists():
        raise ConfigError(
            f"--output {output}: holds another run; name a new folder, or add --resume to go on"
        )
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"--output {output}: {nearest} is no folder that can be written to")
    return folder


def append_row(folder: Path, row: Mapping[str, Any]) -> None:
    """Add one row to metrics.jsonl."""
    file = folder / METRICS_FILE
    with writing(file), file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(_plain(row)) + "\n")


def eval_rows(folder: Path) -> list[dict[str, float]]:
    """Held-out metrics of every evaluation so far, without their `eval/`."""
    return [
        {key.removeprefix("eval/"): value for key, value in row.items() if key != "step"}
        for row in _rows(folder)
        if any(key.startswith("eval/") for key in row)
    ]


def training_rows(folder: Path) -> list[dict[str, float]]:
    """Every report of training so far."""
    return [row for row in _rows(folder) if "loss" in row]


def _rows(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl; the torn last line of a killed run is none of them."""
    file = folder / METRICS_FILE
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [row for row in map(_row, lines) if row is not None]


def _row(line: str) -> dict[str, float] | None:
    """A line as a row of numbers (null where one is not finite); None if it is anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return row if all(value is None or _is_number(value) for value in row.values()) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def say_metrics(row: Mapping[str, float]) -> str:
    """A row of metrics as a person reads it."""
    parts = []
    if "reward" in row:
        parts += _say_rewards(row)
    elif "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if "rewards/accuracies" in row:
        parts.append(f"accuracy {row['rewards/accuracies']:.0%}")
        parts.append(f"margin {row['rewards/margins']:+.3f}")
    if "perplexity" in row:
        parts.append(f"perplexity {row['perplexity']:.3f}")
    if row.get("tokens_per_second"):
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{row['peak_memory_bytes'] / 1e9:.2f} GB")
    return ", ".join(parts)


def _say_rewards(row: Mapping[str, float]) -> list[str]:
    parts = [f"reward {row['reward']:+.3f}"]
    if "held_out" in row:
        parts.append(f"held-out reward {row['held_out']:+.3f}")
    if "objective/kl" in row:
        parts.append(f"KL {row['objective/kl']:.2f}")
    if "value/explained_variance" in row:
        parts.append(f"critic explains {row['value/explained_variance']:.0%}")
    if "completions/mean_length" in row:
        parts.append(f"{row['completions/mean_length']:.0f} tokens each")
        parts.append(f"{row['completions/ended']:.0%} ended")
    return parts


def say_seconds(seconds: float) -> str:
    """A duration as a person reads it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def drop_rows_after(folder: Path, step: int) -> None:
    """Forget metrics of updates that a resumed run will do again."""
    if (folder / METRICS_FILE).exists():
        kept = [row for row in _rows(folder) if row["step"] <= step]
        write_text(folder / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in kept))


def drop_samples_after(folder: Path, step: int) -> None:
    """Forget rollouts that a resumed run will do again, and what was said at an end."""
    file = folder / SAMPLES_FILE
    if not file.exists():
        return
    kept = []
    # Not splitlines: texts may hold other ends of lines than a newline.
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # the torn last line of a killed run; or no rollout
    write_text(file, "".join(line + "\n" for line in kept))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON, whole or not at all."""
    write_text(file, json.dumps(_plain(content), indent=2) + "\n")


def append_samples(folder: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to samples.jsonl."""
    lines = "".join(json.dumps(_plain(s), ensure_ascii=False) + "\n" for s in samples)
    file = folder / SAMPLES_FILE
    with writing(file), file.open("a", encoding="utf-8") as stream:
        stream.write(lines)


def write_samples(folder: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Write samples.jsonl."""
    lines = "".join(json.dumps(_plain(s), ensure_ascii=False) + "\n" for s in samples)
    write_text(folder / SAMPLES_FILE, lines)


def versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on."""
    found = {}
    for name in ("mlx-align", "mlx", "mlx-lm", "numpy", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _plain(value: Any) -> Any:
    """The value as JSON has it: no NaN or infinity, which other programs refuse to read."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
