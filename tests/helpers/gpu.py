"""A CPU that answers like a Mac's GPU: which kernels a training step would call there.

`as_on_a_mac` makes mlx and mlx-lm believe that the device is a GPU with Metal. Fused attention and
custom kernels are recorded and give arrays of the right shape, under the rules of mlx 0.32.4's
Metal backend; nothing is computed on a GPU. `trace_gradient` lists every array in the graph of a
gradient.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

# Head sizes (queries and keys, values) of mlx 0.32.4's attention kernels for more than 8 queries.
FUSED_SIZES = {(size, size) for size in (64, 72, 80, 96, 128, 192, 256)} | {(96, 64)}
# With at most this many queries, the kernel for decoding is chosen, which fails under a gradient.
DECODING_QUERIES = 8


class FusedCall(NamedTuple):
    """A call of mlx's attention that runs as one kernel, forward and backward."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]


class Traced(NamedTuple):
    """An array of a graph: the operation that makes it, and its shape."""

    operation: str
    shape: tuple[int, ...]


@dataclass
class Spy:
    """What was called, and how.

    Attributes:
        fused: Calls of mlx's attention that run as one kernel.
        unfused: Calls of mlx's attention that compute a matrix of scores, with the reason.
        kernels: Names of the custom kernels called.
    """

    fused: list[FusedCall] = field(default_factory=list)
    unfused: list[tuple[FusedCall, str]] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)


class _Opaque:
    """A custom function as exporting accepts it: its backward pass is traced like an output.

    Gradients pass through it as zeros of the right shapes.
    """

    pending: list[Callable[[], list[mx.array]]]

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.backward: Callable[..., Any] | None = None

    def vjp(self, backward: Callable[..., Any]) -> _Opaque:
        self.backward = backward
        return self

    def __call__(self, *primals: Any) -> Any:
        primals = tree_map(mx.stop_gradient, kept := primals)
        outputs = tree_map(mx.stop_gradient, self.function(*primals))
        if self.backward is not None:
            backward, given = self.backward, primals if len(primals) > 1 else primals[0]
            _Opaque.pending.append(
                lambda: [
                    leaf
                    for _, leaf in tree_flatten(
                        backward(given, tree_map(mx.ones_like, outputs), outputs)
                    )
                ]
            )
        floats = [a for _, a in tree_flatten(kept) if mx.issubdtype(a.dtype, mx.floating)]
        zero = sum((a.sum().astype(mx.float32) for a in floats), mx.array(0.0)) * 0
        return tree_map(lambda out: out + zero.astype(out.dtype), outputs)


def _fused_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Something of the shape of attention's output that depends on all inputs, without scores."""
    rest = (k.sum() + v.sum()).astype(q.dtype)
    out = q[..., :1] + rest
    return mx.broadcast_to(out, (*q.shape[:-1], v.shape[-1]))


def fused_on_metal(
    q: mx.array, k: mx.array, v: mx.array, mask: Any, sinks: Any, gradient: bool
) -> str:
    """Why mlx 0.32.4 computes this call in several kernels on Metal; "" if in one.

    Raises:
        RuntimeError: mlx would choose a kernel that fails when it is evaluated.
    """
    if isinstance(mask, mx.array) and gradient:
        return "an array as mask"
    sizes = q.shape[-1], v.shape[-1]
    if q.shape[2] > k.shape[2] or sizes not in FUSED_SIZES:
        return f"head sizes {sizes}, {q.shape[2]} queries, {k.shape[2]} keys"
    if gradient and q.shape[2] <= DECODING_QUERIES:
        raise RuntimeError("the vector kernels do not produce a logsumexp")
    if gradient and sinks is not None:
        raise RuntimeError("[ScaledDotProductAttentionVJP] NYI: attention sinks")
    return ""


@contextmanager
def as_on_a_mac(monkeypatch: Any, *, gradient: bool) -> Iterator[Spy]:
    """Within the block, the package and mlx-lm take the paths that they take on a Mac.

    Args:
        monkeypatch: pytest's.
        gradient: Whether gradients are taken: mlx then chooses other kernels.
    """
    spy = Spy()
    attention = mx.fast.scaled_dot_product_attention

    def fused(q: mx.array, k: mx.array, v: mx.array, **others: Any) -> mx.array:
        call = FusedCall(q.shape, k.shape)
        reason = fused_on_metal(q, k, v, others.get("mask"), others.get("sinks"), gradient)
        if reason:
            spy.unfused.append((call, reason))
            return attention(q, k, v, **others)
        spy.fused.append(call)
        return _fused_attention(q, k, v)

    def has_fused_backward(
        _heads: int, _groups: int, size: int, value_size: int, _length: int, _dtype: mx.Dtype
    ) -> bool:
        return (size, value_size) in FUSED_SIZES

    def metal_kernel(name: str, **_others: Any) -> Callable[..., list[mx.array]]:
        def kernel(
            *, inputs: Sequence[mx.array], output_shapes: Any, output_dtypes: Any, **_others: Any
        ) -> list[mx.array]:
            spy.kernels.append(name)
            # Made of operations that have no gradient either.
            if gradient:
                raise ValueError("[Primitive::vjp] Not implemented for CustomKernel.")
            return [
                mx.zeros(shape, dtype)
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]

        return kernel

    with monkeypatch.context() as patch:
        patch.setattr("mlx_align.models.gpu_attention.has_fused_backward", has_fused_backward)
        patch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        patch.setattr(mx.metal, "is_available", lambda: True)
        patch.setattr(mx.fast, "metal_kernel", metal_kernel)
        patch.setattr(mx.fast, "scaled_dot_product_attention", fused)
        for module, kernel, make in _KERNELS:
            file = importlib.import_module(f"mlx_lm.models.{module}")
            patch.setattr(file, kernel, getattr(file, make)())
        yield spy


# Kernels that mlx-lm makes on import, where there is Metal: file, variable, and how it is made.
_KERNELS = (
    ("rwkv7", "_wkv7_kernel", "_make_wkv7_kernel"),
    ("ssm", "_ssm_kernel", "make_ssm_kernel"),
)


def _opaque_copy(monkeypatch: Any) -> Any:
    """A copy of `gated_delta.py`, whose custom functions are made when it is imported."""
    spec: Any = importlib.util.find_spec("mlx_align.models.gated_delta")
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(mx, "custom_function", _Opaque)
        spec.loader.exec_module(module)
    return module


def trace_gradient(
    monkeypatch: Any, scalar: Callable[..., mx.array], arrays: Sequence[mx.array]
) -> list[Traced]:
    """All arrays in the graph of `scalar`'s gradient by the floating-point ones of `arrays`.

    Checkpoints are left out: they compute the same arrays again.
    """
    trained = tuple(i for i, a in enumerate(arrays) if mx.issubdtype(a.dtype, mx.floating))
    found: list[Traced] = []

    def note(event: dict[str, Any]) -> None:
        # Views take no memory.
        if event["type"] == "primitive" and event["name"] != "Broadcast":
            found.extend(Traced(event["name"], shape) for _, shape, _ in event["outputs"])

    def step(*arrays: mx.array) -> list[mx.array]:
        _Opaque.pending = []
        gradients = mx.grad(scalar, argnums=trained)(*arrays)
        backward = [array for run in _Opaque.pending for array in run()]
        return [*gradients, *backward]

    with monkeypatch.context() as patch:
        for name in ("attention", "gpu_attention", "forward", "patches"):
            patch.setattr(sys.modules[f"mlx_align.models.{name}"], "_custom_function", _Opaque)
        swiglu = _Opaque(lambda gate, x: gate * mx.sigmoid(gate) * x)
        patch.setattr("mlx_align.models.patches.swiglu", swiglu)
        patch.setattr(mx, "checkpoint", lambda function: function)
        patch.setattr("mlx_align.models.gated_delta._chunkwise", _opaque_copy(patch)._chunkwise)
        # The gradient of a product with experts can't be exported.
        product = mx.gather_mm
        patch.setattr(
            mx, "gather_mm", lambda a, b, **others: _Opaque(partial(product, **others))(a, b)
        )
        mx.export_function(note, step, *arrays)
    return found


def largest(traced: Sequence[Traced]) -> int:
    """Elements of the largest array."""
    return max(math.prod(array.shape) for array in traced)
