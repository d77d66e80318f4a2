"""Adapters of the packages that train mlx-lm's LoRA layers: where they start, what they write."""

from pathlib import Path
from typing import Any

import mlx.core as mx
from common import Job
from mlx.utils import tree_flatten, tree_unflatten


def set_start(model: Any, job: Job) -> None:
    """Give the LoRA layers the matrices that the job starts from, if it names them.

    Raises:
        SystemExit: The package trains other layers.
    """
    if not job.start:
        return
    start, own = mx.load(job.start), dict(tree_flatten(model.trainable_parameters()))
    if {name: one.shape for name, one in own.items()} != {n: one.shape for n, one in start.items()}:
        other = sorted(set(own) ^ set(start)) or ["their shapes"]
        raise SystemExit(f"it trains other layers than {job.start}: {other[0]}")
    model.update(tree_unflatten(list(start.items())))
    mx.eval(model.parameters())


def save(model: Any, job: Job) -> None:
    """Write the adapter in mlx-lm's format to the folder `adapter` of the job."""
    folder = Path(job.out) / "adapter"
    folder.mkdir(exist_ok=True)
    job.write_adapter_config(folder)
    tensors = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
