"""The gate of an MLP, silu(gate) · x, with a gradient that keeps its two inputs only.

mlx's own gradient also keeps the SiLU: one of the five arrays of an MLP's width that a block holds
for its backward pass. Here it is made again, in the kernel that needs it. (The sigmoid would be
too, but mlx's compiler sees that both passes make the same one, and keeps it.)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations

from mlx_align.models.exponential import sigmoid

_custom_function: Any = mx.custom_function  # the stubs lose the signature of what it wraps


@_custom_function
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) · x, elementwise."""
    return gate * sigmoid(gate) * x


@swiglu.vjp
def _backward(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _output: mx.array
) -> tuple[mx.array, mx.array]:
    gate, x = primals
    share = sigmoid(gate)
    silu = gate * share
    return cotangent * x * (share + silu * (1 - share)), cotangent * silu


@contextmanager
def lean_gates(model: nn.Module) -> Iterator[None]:
    """Within the block, the modules of `model` that call mlx-lm's `swiglu` call this one."""
    theirs = activations.swiglu
    code: set[Any] = {sys.modules[type(module).__module__] for module in model.modules()}
    callers = [module for module in code if getattr(module, "swiglu", None) is theirs]
    for module in callers:
        module.swiglu = swiglu
    try:
        yield
    finally:
        for module in callers:
            module.swiglu = theirs
