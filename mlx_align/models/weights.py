"""Adapter weights: reading them, and swapping them in and out of a model.

Policy, reference, reward model and critic are one base model with different adapter weights, so
switching between them means replacing those weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from safetensors import SafetensorError, safe_open

from mlx_align.errors import ModelError

# The nested dictionary of a model's trainable parameters, as `nn.Module.trainable_parameters`
# returns it. All weights of a run have the same layout (see `adapters.py`).
AdapterWeights = dict[str, Any]


@contextmanager
def use_adapter(module: nn.Module, weights: AdapterWeights) -> Iterator[None]:
    """Within the block, `module` holds `weights`; afterwards, the weights it had before."""
    before = _current_weights(module, weights)
    module.update(weights)
    try:
        yield
    finally:
        module.update(before)


def _current_weights(module: nn.Module, weights: AdapterWeights) -> AdapterWeights:
    """The values that `module` holds now under the names in `weights`."""
    # A loop, because it takes a sixth of the time of mlx's tree_map.
    current: AdapterWeights = {}
    waiting: list[tuple[Any, Any, Any]] = [(module, weights, current)]
    while waiting:
        own, wanted, found = waiting.pop()
        for key, value in wanted.items() if isinstance(wanted, dict) else enumerate(wanted):
            if isinstance(value, dict | list):
                found[key] = {} if isinstance(value, dict) else [None] * len(value)
                waiting.append((own[key], value, found[key]))
            else:
                found[key] = own[key]
    return current


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, by name, from its header.

    The header is checked first, because mlx believes it: sizes that contradict the offsets are read
    from memory that is not the file's.

    Raises:
        ModelError: The file is damaged, or not a regular file.
    """
    try:
        if not file.is_file():
            raise ValueError("not a regular file")
        with safe_open(file, framework="numpy") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{file}: damaged ({reason[:120]})") from error


def read_tensors(file: Path) -> dict[str, mx.array]:
    """Read all tensors of a safetensors file into memory.

    Raises:
        ModelError: The file is damaged.
    """
    tensor_shapes(file)
    try:
        tensors = mx.load(str(file))
        mx.eval(tensors)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{file}: damaged ({str(error).splitlines()[0][:120]})") from error
    assert isinstance(tensors, dict)
    return tensors
