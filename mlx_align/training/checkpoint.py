"""Checkpoints: everything that a run needs to continue as if it had not stopped.

A checkpoint is a folder with named weights, named optimizers, the random generator's key, the
progress, and further state as JSON. It is written under a temporary name, synced to disk, and
renamed. A manifest has the size and checksum of every file, so that a damaged checkpoint is
detected and the one before it is used. Checkpoints are written between steps.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_align.errors import ModelError, TrainingError
from mlx_align.models.adapters import ADAPTER_CONFIG_FILE, ADAPTER_FILE, AdapterLayout, save_adapter
from mlx_align.models.heads import REWARD_HEAD_FILE, has_reward_head
from mlx_align.models.patches import random_key, restore_random_key
from mlx_align.models.weights import AdapterWeights, read_tensors
from mlx_align.system.atomic_io import flush_to_disk, wrap_write_errors, write_tensors, write_text
from mlx_align.tracking.run_dir import CHECKPOINTS, METRICS_FILE, SAMPLES_FILE
from mlx_align.training.metrics import Progress

STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
KEPT = 2


class State(NamedTuple):
    """The content of a checkpoint.

    Attributes:
        progress: The progress of the run.
        weights: The trained weights, by name. The first are the run's adapter, which stock mlx-lm
            loads from the checkpoint's folder.
        optimizers: The optimizers, by name.
        extra: Further state, JSON-serialisable.
    """

    progress: Progress
    weights: Mapping[str, AdapterWeights]
    optimizers: Mapping[str, optim.Optimizer]
    extra: Mapping[str, Any]


def save_checkpoint(
    run: Path, state: State, layout: AdapterLayout, model: str, *, best: int | None = None
) -> None:
    """Write `run`/checkpoints/<step>, and delete all others but the last `KEPT` and the best.

    Args:
        run: The run folder.
        state: The state to save; the random generator's key is added.
        layout: The layout of the first weights.
        model: Name or path of the base model, which is recorded.
        best: The step of the best checkpoint so far, which is kept too.

    Raises:
        TrainingError: The weights are not finite: an update has overflowed.
        WriteError: It can't be written; earlier checkpoints are unchanged.
    """
    _check_finite(state)
    folder = run / CHECKPOINTS
    step = state.progress.step
    final = checkpoint_folder(run, step)
    partial = folder / f".{final.name}.partial"
    with wrap_write_errors(final):
        folder.mkdir(exist_ok=True)
        # A later checkpoint was damaged, so its steps are being repeated.
        for other in _checkpoints(run):
            if int(other.name) > step:
                shutil.rmtree(other)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            _write(partial, state, layout, model)
            # A resumed run doesn't write these rows again, so they must survive a power cut.
            for rows in (run / METRICS_FILE, run / SAMPLES_FILE):
                if rows.is_file():
                    flush_to_disk(rows)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        flush_to_disk(folder)
    for old in _checkpoints(run)[:-KEPT]:
        if best is None or int(old.name) != best:
            shutil.rmtree(old, ignore_errors=True)


def _check_finite(state: State) -> None:
    sums = [mx.isfinite(a).all() for one in state.weights.values() for _, a in tree_flatten(one)]
    if not mx.stack(sums).all().item():
        raise TrainingError(
            f"the trained weights are not finite after step {state.progress.step}, so they are not "
            "saved; start a new run with a lower --learning-rate (or --weight-decay)"
        )


def _write(folder: Path, state: State, layout: AdapterLayout, model: str) -> None:
    main, *others = state.weights
    save_adapter(folder, state.weights[main], layout, model)
    for name in others:
        write_tensors(folder / f"{name}.safetensors", dict(tree_flatten(state.weights[name])))
    for name, optimizer in state.optimizers.items():
        write_tensors(_optimizer_file(folder, name), dict(tree_flatten(optimizer.state)))
    content = {
        "progress": dataclasses.asdict(state.progress),
        "random_key": list(random_key()),
        "extra": dict(state.extra),
    }
    write_text(folder / STATE_FILE, json.dumps(content, indent=2) + "\n")
    files = {
        file.name: {"bytes": file.stat().st_size, "blake2b": _checksum(file)}
        for file in sorted(folder.iterdir())
    }
    write_text(folder / MANIFEST_FILE, json.dumps({"files": files}, indent=2) + "\n")


def load_checkpoint(
    run: Path,
    fresh: Mapping[str, AdapterWeights],
    optimizers: Mapping[str, optim.Optimizer],
    note: Callable[[str], None],
) -> State | None:
    """The last undamaged checkpoint of `run`; None if there is no checkpoint yet.

    The optimizers and the random generator are restored in place, the weights are returned.

    Args:
        run: The run folder.
        fresh: The weights the run starts from, for their names and shapes.
        optimizers: The run's optimizers, by name, initialised; their state is replaced.
        note: Called with a line for every damaged checkpoint.

    Raises:
        ModelError: All checkpoints are damaged, or they belong to another model.
    """
    found = _checkpoints(run)
    for folder in reversed(found):
        try:
            return _read(folder, fresh, optimizers)
        except _Damaged as damage:
            note(f"! {folder}: {damage}; using the one before it.")
    if found:
        raise ModelError(
            f"{run / CHECKPOINTS}: damaged, all {len(found)} of them; start a new run"
            if len(found) > 1
            else f"{found[0]}: damaged, and the only checkpoint; start a new run"
        )
    return None


def read_adapter(run: Path, step: int) -> AdapterWeights | None:
    """The adapter (and reward head) of the checkpoint after `step`; None if it is damaged."""
    folder = checkpoint_folder(run, step)
    try:
        _verify(folder)
        tensors = read_tensors(folder / ADAPTER_FILE)
        if has_reward_head(folder):
            tensors.update(read_tensors(folder / REWARD_HEAD_FILE))
    except (_Damaged, OSError, ModelError):
        return None
    weights: AdapterWeights = tree_unflatten(list(tensors.items()))
    return weights


def publish_adapter(run: Path, step: int) -> None:
    """Put the adapter of a checkpoint into the run folder, where stock mlx-lm loads it.

    The files are linked, so that weights of full fine-tuning take no more room.

    Raises:
        WriteError: The folder can't be written to.
    """
    folder = checkpoint_folder(run, step)
    # As in `save_adapter`, the weights come last.
    for name in (ADAPTER_CONFIG_FILE, REWARD_HEAD_FILE, ADAPTER_FILE):
        source, target = folder / name, run / name
        if not source.is_file():
            continue
        link = run / f".{name}.partial"
        with wrap_write_errors(target):
            link.unlink(missing_ok=True)
            try:
                os.link(source, link)
            except OSError:  # a drive without links
                shutil.copyfile(source, link)
            os.replace(link, target)


class _Damaged(Exception):
    """A file of a checkpoint is missing or was changed."""


def _read(
    folder: Path, fresh: Mapping[str, AdapterWeights], optimizers: Mapping[str, optim.Optimizer]
) -> State:
    _verify(folder)
    main, *others = fresh
    try:
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        progress = _progress(content["progress"])
        high, low = (int(word) for word in content["random_key"])
        if not (0 <= high < 1 << 32 and 0 <= low < 1 << 32):
            raise ValueError(f"random_key {high}, {low}")
        extra = dict(content["extra"])
        flat = {main: read_tensors(folder / ADAPTER_FILE)}
        if has_reward_head(folder):
            flat[main].update(read_tensors(folder / REWARD_HEAD_FILE))
        for name in others:
            flat[name] = read_tensors(folder / f"{name}.safetensors")
        states = {name: read_tensors(_optimizer_file(folder, name)) for name in optimizers}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ModelError) as error:
        # The checksums are right, so another command or version wrote it.
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ModelError(f"{folder}: not a checkpoint of this command ({what})") from error
    weights: dict[str, AdapterWeights] = {}
    for name, start in fresh.items():
        flat[name] = _as_masters(flat[name], dict(tree_flatten(start)))
        if _kinds(flat[name]) != _kinds(dict(tree_flatten(start))):
            raise ModelError(
                f"{folder}: its adapters don't fit this model; give the --model of the run"
            )
        weights[name] = tree_unflatten(list(flat[name].items()))
    for name, optimizer in optimizers.items():
        states[name] = _as_masters(states[name], dict(tree_flatten(optimizer.state)))
        if _kinds(states[name]) != _kinds(dict(tree_flatten(optimizer.state))):
            raise ModelError(f"{folder}: its {name} optimizer is not one of this run")
        optimizer.state = tree_unflatten(list(states[name].items()))
    restore_random_key(high, low)
    return State(progress, weights, optimizers, extra)


def _as_masters(
    tensors: Mapping[str, mx.array], wanted: Mapping[str, mx.array]
) -> dict[str, mx.array]:
    """16-bit weights of full fine-tuning, as earlier versions wrote them, in float32."""
    masters = {name for name, one in wanted.items() if one.dtype == mx.float32}
    return {
        name: one.astype(mx.float32) if one.dtype == mx.bfloat16 and name in masters else one
        for name, one in tensors.items()
    }


def _kinds(tensors: Mapping[str, mx.array]) -> dict[str, tuple[Any, ...]]:
    return {name: (array.dtype, *array.shape) for name, array in tensors.items()}


def _progress(content: Any) -> Progress:
    """The progress, checked to be non-negative numbers."""
    numbers = {}
    for entry in dataclasses.fields(Progress):
        # A version that counted less wrote fewer numbers.
        value = content.get(entry.name, entry.default)
        if type(value) not in (type(entry.default), int) or not 0 <= value < math.inf:
            raise ValueError(f"{entry.name} {value!r}")
        numbers[entry.name] = value
    return Progress(**numbers)


def _verify(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        _Damaged: A file is missing or differs.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        expected = {str(name): (e["bytes"], e["blake2b"]) for name, e in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _Damaged(f"its {MANIFEST_FILE} can't be read") from None
    if STATE_FILE not in expected or ADAPTER_FILE not in expected:
        raise _Damaged(f"its {MANIFEST_FILE} can't be read")
    for name, (size, checksum) in expected.items():
        file = folder / name
        # Names from a damaged manifest must not lead out of this folder.
        if file.parent != folder or not file.is_file():
            raise _Damaged(f"{name} is missing")
        if file.stat().st_size != size or _checksum(file) != checksum:
            raise _Damaged(f"{name} was changed")


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def _optimizer_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.optimizer.safetensors"


def checkpoint_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint after step `step`; mlx-lm loads its adapter."""
    return run / CHECKPOINTS / f"{step:07d}"


def has_checkpoint(run: Path) -> bool:
    """Whether `run` has a checkpoint to resume from."""
    return bool(_checkpoints(run))


def last_step(run: Path) -> int:
    """The step of the last checkpoint; 0 without one."""
    found = _checkpoints(run)
    return int(found[-1].name) if found else 0


def _checkpoints(run: Path) -> list[Path]:
    """The folders of complete checkpoints, oldest first."""
    folders = [p for p in (run / CHECKPOINTS).glob("*") if p.name.isdecimal() and p.is_dir()]
    return sorted(folders, key=lambda path: int(path.name))
