"""Commands in this process, what their run folders contain, and ways to disturb a run."""

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from helpers.data import read_rows
from mlx_align.cli.main import run
from mlx_align.system import atomic_io
from mlx_align.training.callbacks import Callbacks

LN2 = 0.6931471805599453


def mlx_align(*arguments: Any) -> int:
    """Run `mlx-align ARGUMENTS` in this process; the exit code."""
    return run([str(argument) for argument in arguments])


def metric_rows(folder: Path | str, key: str | None = None) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; those that have `key`, if it is given."""
    rows = read_rows(Path(folder) / "metrics.jsonl")
    return [row for row in rows if key is None or key in row]


def summary_of(folder: Path | str) -> dict[str, Any]:
    """The content of a run's summary.json."""
    return json.loads((Path(folder) / "summary.json").read_text())


def adapter_of(folder: Path | str) -> dict[str, np.ndarray]:
    """The tensors of the adapter in a run folder or checkpoint."""
    tensors = mx.load(str(Path(folder) / "adapters.safetensors"))
    return {name: np.array(tensor) for name, tensor in tensors.items()}


def outcome(folder: Path | str) -> dict[str, Any]:
    """What runs with the same options have in common: everything but times and memory."""
    folder = Path(folder)
    rows = metric_rows(folder)
    for row in rows:
        row.pop("tokens_per_second", None)
        row.pop("peak_memory_bytes", None)
    last = max((folder / "checkpoints").iterdir())
    files = [*folder.glob("*.safetensors"), *folder.glob("samples.jsonl")]
    files += last.glob("*.safetensors")
    return {"metrics": rows, **{str(f.relative_to(folder)): f.read_bytes() for f in files}}


def fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of change of every file, to check that a command leaves a folder alone."""
    return {
        file.name: (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
    }


def interrupt() -> None:
    """Ctrl-C, as the terminal sends it."""
    signal.raise_signal(signal.SIGINT)


def interrupt_twice() -> None:
    """Ctrl-C, and again before the run has stopped."""
    interrupt()
    interrupt()


def stop_after(
    monkeypatch: pytest.MonkeyPatch, step: int, stop: Callable[[], None] = interrupt
) -> None:
    """Call `stop` as soon as this step of a run is done."""
    original = Callbacks.on_step_end

    def on_step_end(self: Callbacks, at: int, metrics: Any) -> bool:
        result = original(self, at, metrics)
        if at == step:
            stop()
        return result

    monkeypatch.setattr(Callbacks, "on_step_end", on_step_end)


def before_call(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, n: int, action: Callable[[], None]
) -> None:
    """Call `action` before the `n`-th call of `owner.name`, counted from 1."""
    original, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            action()
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)


def change_results(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    change: Callable[[Any], Any],
    which: Callable[[int], bool] = lambda _: True,
) -> None:
    """Change what `owner.name` returns in the calls, counted from 1, that `which` selects."""
    original, calls = getattr(owner, name), 0

    def changed(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*arguments, **options)
        return change(result) if which(calls) else result

    monkeypatch.setattr(owner, name, changed)


def with_nan(field: str) -> Callable[[Any], Any]:
    """A function that returns a batch with every value of this field NaN."""
    return lambda batch: batch._replace(**{field: getattr(batch, field) * mx.nan})


def disk_full_after(monkeypatch: pytest.MonkeyPatch, count: int, error: OSError) -> None:
    """Raise `error` for every file that is flushed to the disk after the first `count`."""
    original, left = atomic_io.flush_to_disk, count

    def full(path: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise error
        original(path)

    monkeypatch.setattr(atomic_io, "flush_to_disk", full)
