"""The run folder: file names, lock, and reading and writing its rows.

A folder can be read while its run is still training, or after the run was killed: an incomplete
last line is skipped, and a missing file counts as empty.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from mlx_align.errors import ConfigError
from mlx_align.system.atomic_io import check_can_create, wrap_write_errors, write_text
from mlx_align.system.intervals import AUC
from mlx_align.system.json_text import to_json
from mlx_align.system.regular_files import NOT_UTF8, is_utf8

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
STATUS_FILE = "status.json"
SUMMARY_FILE = "summary.json"
PAGE_FILE = "report.html"
FINGERPRINTS_FILE = "fingerprints.json"
# Of a run with a reference: the number of microbatches, the rows whose log-probs were missing at
# the start, and a hash of all log-probs.
REFERENCE_FILE = "reference.json"
# One row per resume: when, after which step, with which versions, and what had changed.
RESUMES_FILE = "resumes.jsonl"
LOCK_FILE = ".lock"
# The folder of the checkpoints.
CHECKPOINTS = "checkpoints"
# The name of the init adapter among the hashes in FINGERPRINTS_FILE.
INIT_ADAPTER = "init adapter"

# A long on-policy run writes many rollouts. The page shows the last batch, at the end of the file.
SAMPLES_TAIL_BYTES = 1 << 20
# A run of a million steps that reports each has about this much.
MAX_ROWS_BYTES = 1 << 30

Row = Mapping[str, float]


def new_run_dir(output: str | None, command: str) -> Path:
    """Choose the folder that a run will write to. The folder is not created yet.

    Args:
        output: The folder the user named, or None for `runs/COMMAND-TIME`.
        command: Name of the training command.

    Raises:
        ConfigError: The folder holds another run, a model or an adapter, or can't be created or
            written.
    """
    if output is None:
        output = f"runs/{command}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(output).expanduser()
    if (folder / METRICS_FILE).exists() or (folder / CONFIG_FILE).exists():
        raise ConfigError(
            f"--output {output}: already contains another run; name a new folder, or add --resume "
            "to continue that run"
        )
    # A run's files would become part of the model (whose hash is checked on --resume), and its
    # adapter would replace the one that is there.
    for found in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        if found.exists():
            raise ConfigError(
                f"--output {output}: holds a model or an adapter ({found.name}); name a new folder"
            )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {output}: is a file; name a new folder")
    if not is_utf8(folder):
        raise ConfigError(f"--output {output}: {NOT_UTF8}")
    check_can_create(output)
    return folder


@contextmanager
def lock_run_dir(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, so that no other process trains in it.

    The lock is the process's own (`flock`): it is released when the process ends, even by SIGKILL.

    Raises:
        ConfigError: Another process holds the lock; the message names it.
        WriteError: The folder can't be written to.
    """
    file = folder / LOCK_FILE
    with wrap_write_errors(file):
        # No O_TRUNC: a process that fails to get the lock reads the holder's process id.
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(descriptor, 32).decode("ascii", "replace").strip()
            raise ConfigError(
                f"{folder}: another process trains in it (pid {pid or 'unknown'}); wait for it, "
                "stop it, or name another --output"
            ) from None
        except OSError:
            pass  # a network drive without locks: train unprotected
        os.ftruncate(descriptor, 0)
        with wrap_write_errors(file):
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # releases the lock


# Writing


def append_metrics(folder: Path, row: Mapping[str, Any]) -> None:
    """Append one row to metrics.jsonl."""
    file = folder / METRICS_FILE
    with wrap_write_errors(file), file.open("a", encoding="utf-8") as stream:
        stream.write(to_json(row) + "\n")


def append_samples(folder: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to samples.jsonl."""
    file = folder / SAMPLES_FILE
    with wrap_write_errors(file), file.open("a", encoding="utf-8") as stream:
        stream.write(_sample_lines(samples))


def append_resume(folder: Path, row: Mapping[str, Any]) -> None:
    """Append one row to resumes.jsonl."""
    file = folder / RESUMES_FILE
    with wrap_write_errors(file), file.open("a", encoding="utf-8") as stream:
        stream.write(to_json(row, ascii=False) + "\n")


def write_samples(folder: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Write samples.jsonl, replacing its content."""
    write_text(folder / SAMPLES_FILE, _sample_lines(samples))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write an object as a JSON file, atomically. NaN and infinity become null."""
    write_text(file, to_json(content, indent=2) + "\n")


def truncate_metrics(folder: Path, step: int) -> None:
    """Remove the metrics of steps after `step`, which a resumed run will repeat."""
    if (folder / METRICS_FILE).exists():
        kept = [row for row in read_metrics(folder) if row["step"] <= step]
        write_text(folder / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in kept))


def replace_held_out_metrics(folder: Path, start: Row | None) -> Path | None:
    """Move the held-out rows of metrics.jsonl to a new file, and begin with another row.

    For a run whose held-out data or rewards changed: rows before and after can't be compared.

    Args:
        folder: The run folder.
        start: The new first row, of the start of the run; None for none.

    Returns:
        The new file; None if there were no held-out rows.
    """
    rows = read_metrics(folder)
    held_out = [row for row in rows if _is_held_out(row)]
    others = [row for row in rows if not _is_held_out(row)]
    number = 1
    while (file := folder / f"metrics-held-out-{number}.jsonl").exists():
        number += 1
    if held_out:
        write_text(file, "".join(json.dumps(row) + "\n" for row in held_out))
    begin = [] if start is None else [start]
    write_text(folder / METRICS_FILE, "".join(to_json(row) + "\n" for row in [*begin, *others]))
    return file if held_out else None


def truncate_samples(folder: Path, step: int) -> None:
    """Remove the rollouts of steps after `step`, and the samples of a finished run."""
    file = folder / SAMPLES_FILE
    if not file.exists():
        return
    kept = []
    # Not splitlines: texts may hold other line separators than a newline.
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # an incomplete last line, or a sample without a step
    write_text(file, "".join(line + "\n" for line in kept))


def package_versions() -> dict[str, str]:
    """Versions of this package and of the packages that its numbers depend on."""
    found = {}
    for name in ("mlx-align", "mlx", "mlx-lm", "numpy", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _sample_lines(samples: Sequence[Mapping[str, Any]]) -> str:
    return "".join(to_json(s, ascii=False) + "\n" for s in samples)


# Reading


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl: an integer `step` and numbers, null where one was not finite.

    Any other line is skipped, such as the incomplete last line of a killed run.
    """
    return [
        row
        for row in _json_lines(folder / METRICS_FILE)
        if type(row.get("step")) is int and all(map(_is_metric, row.values()))
    ]


def read_resumes(folder: Path) -> list[dict[str, Any]]:
    """All rows of resumes.jsonl."""
    return _json_lines(folder / RESUMES_FILE)


def read_eval_metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """Held-out metrics of every evaluation so far by step, without the prefix `eval/`."""
    return {
        int(row["step"]): {k.removeprefix("eval/"): v for k, v in row.items() if k != "step"}
        for row in read_metrics(folder)
        if any(key.startswith("eval/") for key in row)
    }


def read_training_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every row of training metrics so far."""
    return [row for row in read_metrics(folder) if "loss" in row]


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder's files.

    Attributes:
        name: Name of the folder.
        config: The options in config.yaml.
        training: Rows of training metrics in order of steps, finite numbers only.
        held_out: Rows of held-out metrics, with keys that begin with `eval/`.
        status: Content of status.json: command, state, step, total, seconds, began, written.
        summary: Content of summary.json; empty until the run is finished.
        samples: Rows of samples.jsonl of a finished run that are not rollouts.
        rollouts: Rows of the last rollout batch in samples.jsonl.
        resumes: Rows of resumes.jsonl.
    """

    name: str
    config: Mapping[str, Any]
    training: Sequence[Row]
    held_out: Sequence[Row]
    status: Mapping[str, Any]
    summary: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    rollouts: Sequence[Mapping[str, Any]]
    resumes: Sequence[Mapping[str, Any]] = ()

    @property
    def command(self) -> str:
        """The training command, or "run" if no file names it."""
        return str(self.summary.get("command") or self.status.get("command") or "run")

    @property
    def rate_key(self) -> str:
        """The held-out rate that the run is judged by, if it learns preferences."""
        # KTO's accuracy is a sign against an estimated zero, which may be off for all completions.
        return f"eval/{AUC}" if self.command == "kto" else "eval/rewards/accuracies"

    @property
    def finished(self) -> bool:
        """Whether the run completed."""
        return bool(self.summary)

    @property
    def step(self) -> int:
        """Steps done, according to the files."""
        rows = [int(row["step"]) for row in (*self.training[-1:], *self.held_out[-1:])]
        return max([*rows, int(_finite(self.status.get("step")) or 0)])

    @property
    def data_statistics(self) -> Mapping[str, Any]:
        """Statistics of the data, as summary.json or status.json have them under `data_facts`."""
        return _data_statistics(self.summary, self.status)

    @cached_property
    def training_keys(self) -> frozenset[str]:
        """Names of all training metrics."""
        return frozenset(key for row in self.training for key in row)

    @cached_property
    def held_out_keys(self) -> frozenset[str]:
        """Names of all held-out metrics."""
        return frozenset(key for row in self.held_out for key in row)

    @property
    def kept_step(self) -> int | None:
        """The step whose adapter the run kept; None if it is not finished, or of an old version."""
        step = self.summary.get("kept_step")
        return step if isinstance(step, int) else None

    @property
    def kept_evaluation(self) -> Row:
        """Held-out metrics of the adapter that was kept, else the last ones; may be {}.

        Keys begin with `eval/`.
        """
        last = self.held_out[-1] if self.held_out else {}
        return next((row for row in self.held_out if row["step"] == self.kept_step), last)

    def values(self, key: str) -> list[float]:
        """All values of a metric, in order."""
        rows = self.held_out if key.startswith("eval/") else self.training
        return [row[key] for row in rows if key in row]

    def last(self, key: str) -> float | None:
        """The last value of a metric, or None."""
        rows = self.held_out if key.startswith("eval/") else self.training
        return next((row[key] for row in reversed(rows) if key in row), None)

    def recent_mean(self, key: str, rows: int = 3) -> float | None:
        """The mean of the last `rows` values of a metric, or None if there are fewer."""
        values = self.values(key)[-rows:]
        return sum(values) / rows if len(values) == rows else None


def held_out_examples(record: RunRecord) -> int | None:
    """Number of held-out examples in each evaluation; None if the files don't tell.

    Runs write it as `eval_examples`. For runs of older versions it follows from the size of the
    held-out data and from --val-batches.
    """
    for source in (record.summary, record.status):
        count = source.get("eval_examples")
        if isinstance(count, int) and count > 0:
            return count
    kl = record.summary.get("kl")
    if record.command in ("ppo", "grpo"):
        return kl.get("samples") if isinstance(kl, Mapping) else None
    available = record.data_statistics.get("valid_groups")
    batches, size = record.config.get("val_batches"), record.config.get("batch_size")
    if not isinstance(available, int) or available < 1:
        return None
    if batches == -1:
        return available
    if isinstance(batches, int | float) and isinstance(size, int):
        return max(1, min(available, round(batches * size)))
    return None


def read_run_record(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        ConfigError: It is not a run folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the --output folder of a run")
    if not any((folder / n).is_file() for n in (CONFIG_FILE, METRICS_FILE, STATUS_FILE)):
        raise ConfigError(
            f"{folder}: has neither {CONFIG_FILE} nor {METRICS_FILE}; give the --output folder of "
            "a run"
        )
    rows = [
        {key: value for key, value in row.items() if _finite(value) is not None}
        for row in read_metrics(folder)
    ]
    samples = _json_lines(folder / SAMPLES_FILE, SAMPLES_TAIL_BYTES)
    status = _json_object(folder / STATUS_FILE)
    # While a run is resumed or repeated, the summary of its earlier part is out of date.
    over = status.get("state", "finished") == "finished"
    rollouts = [row for row in samples if "completion" in row]
    return RunRecord(
        name=folder.resolve().name,
        config=_read_config(folder / CONFIG_FILE),
        training=[row for row in rows if not _is_held_out(row)],
        held_out=[row for row in rows if _is_held_out(row)],
        status=status,
        summary=_json_object(folder / SUMMARY_FILE) if over else {},
        samples=[row for row in samples if "completion" not in row] if over else [],
        rollouts=[row for row in rollouts if row.get("step") == rollouts[-1].get("step")],
        resumes=read_resumes(folder),
    )


def read_data_statistics(folder: Path) -> Mapping[str, Any]:
    """Statistics of a run's training data; {} if its files have none."""
    return _data_statistics(_json_object(folder / SUMMARY_FILE), _json_object(folder / STATUS_FILE))


def _data_statistics(summary: Mapping[str, Any], status: Mapping[str, Any]) -> Mapping[str, Any]:
    found = summary.get("data_facts") or status.get("data_facts")
    return found if isinstance(found, Mapping) else {}


def _is_held_out(row: Row) -> bool:
    return any(key.startswith("eval/") for key in row)


def _is_metric(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _finite(value: Any) -> float | None:
    if value is None or not _is_metric(value) or not -math.inf < value < math.inf:
        return None
    number: float = value
    return number


def _read_text(file: Path, tail: int | None = None) -> str:
    try:
        if not file.is_file():  # missing, or a pipe
            return ""
        with file.open("rb") as stream:
            size = file.stat().st_size
            # A stranger's folder may have any size; of rows, the last are read.
            stream.seek(max(0, size - (MAX_ROWS_BYTES if tail is None else tail)))
            return stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _json_lines(file: Path, tail: int | None = None) -> list[dict[str, Any]]:
    """The objects of a JSONL file, or those in its last `tail` bytes."""
    found = []
    # Not splitlines: texts may hold other line separators than a newline.
    for line in _read_text(file, tail).split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # an incomplete last line, or the first line of a tail
        if isinstance(row, dict):
            found.append(row)
    return found


def _json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(file))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(_read_text(file))
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}
