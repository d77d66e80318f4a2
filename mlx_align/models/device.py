"""The device that mlx computes on, also where `patches.without_custom_kernels` hides it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


def on_gpu() -> bool:
    """Whether the default device is a GPU."""
    ask: Any = getattr(mx.default_device, "hidden", mx.default_device)
    return ask() == mx.gpu


def has_metal() -> bool:
    """Whether mlx has Metal here."""
    ask: Any = getattr(mx.metal.is_available, "hidden", mx.metal.is_available)
    return ask()
