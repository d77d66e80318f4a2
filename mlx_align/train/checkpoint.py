"""Checkpoints: all that a run needs to go on as if it had never stopped.

One folder per checkpoint, written beside its final name, synced, and renamed, so a torn one is
never mistaken for a whole one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_align.errors import ConfigError, ModelError
from mlx_align.models.adapters import ADAPTER_WEIGHTS, AdapterLayout, save_adapter
from mlx_align.models.compat import random_key, restore_random_key
from mlx_align.models.heads import HEAD_WEIGHTS, has_head
from mlx_align.models.roles import Tree
from mlx_align.train.loop import Progress

FOLDER = "checkpoints"
KEPT = 2


def save_checkpoint(
    run: Path,
    progress: Progress,
    tree: Tree,
    optimizer: optim.Optimizer,
    layout: AdapterLayout,
    model: str,
) -> None:
    """Write `run`/checkpoints/<step> and forget all but the last `KEPT`."""
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    final = folder / f"{progress.step:07d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_adapter(partial, tree, layout, model)
    state = dict(sorted(tree_flatten(optimizer.state)))
    mx.save_safetensors(str(partial / "optimizer.safetensors"), state)
    content = {
        "progress": dataclasses.asdict(progress),
        "random_key": list(random_key()),
    }
    (partial / "state.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        _sync(file)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(folder)
    for old in _checkpoints(run)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(run: Path, fresh: Tree, optimizer: optim.Optimizer) -> tuple[Progress, Tree]:
    """Restore the last checkpoint of `run`: optimizer and generator in place, tree returned.

    Raises:
        ConfigError: The run has no checkpoint.
        ModelError: The checkpoint is damaged or of another model.
    """
    found = _checkpoints(run)
    if not found:
        raise ConfigError(f"--resume {run}: no checkpoint in it; start anew without --resume")
    folder = found[-1]
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        progress = Progress(**content["progress"])
        high, low = content["random_key"]
        weights: Any = mx.load(str(folder / ADAPTER_WEIGHTS))
        if has_head(folder):
            weights.update(mx.load(str(folder / HEAD_WEIGHTS)))
        state: Any = mx.load(str(folder / "optimizer.safetensors"))
        mx.eval(weights, state)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{folder}: damaged ({str(error).splitlines()[0][:120]})") from error
    shapes = {name: array.shape for name, array in tree_flatten(fresh)}
    if {name: array.shape for name, array in weights.items()} != shapes:
        raise ModelError(f"{folder}: its adapters do not fit this model; was --model changed?")
    optimizer.state = tree_unflatten(list(state.items()))
    restore_random_key(high, low)
    tree: Tree = tree_unflatten(list(weights.items()))
    return progress, tree


def has_checkpoint(run: Path) -> bool:
    """Whether `run` can be resumed."""
    return bool(_checkpoints(run))


def _checkpoints(run: Path) -> list[Path]:
    folder = run / FOLDER
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
