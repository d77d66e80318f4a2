"""Fusing an adapter into its base model without losing the change to quantisation.

Re-quantising a fused weight rounds it to the quantisation grid, which can undo a small change: "the
merged model equals the base". Here the loss is measured for each layer, and a layer that would lose
more than `LOSS_ALLOWED` of its change stays dequantised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.utils import save

from mlx_align.errors import ConfigError, ModelError
from mlx_align.models.adapters import install_adapters, load_adapter, read_layout
from mlx_align.models.backbone import split_backbone
from mlx_align.models.forward import token_logprobs
from mlx_align.models.heads import has_reward_head
from mlx_align.models.loading import LanguageModel, ModelFolder, load_language_model
from mlx_align.models.verification import random_batch
from mlx_align.system.atomic_io import atomic_folder, wrap_write_errors

# Largest part of a layer's change that re-quantising may lose; otherwise it stays dequantised.
LOSS_ALLOWED = 0.1


@dataclass(frozen=True)
class FusedLayer:
    """Result of fusing one adapted layer.

    Attributes:
        name: Its path in the model.
        quantized: Whether the base model's layer is quantised.
        change: ‖Δ‖ / ‖W‖, the relative size of the adapter's change.
        lost: ‖(requantised − W) − Δ‖ / ‖Δ‖; 0 if the layer is not quantised.
        kept_quantized: Whether the layer is quantised in the fused model.
    """

    name: str
    quantized: bool
    change: float
    lost: float
    kept_quantized: bool


@dataclass(frozen=True)
class FuseReport:
    """Result of fusing an adapter.

    Attributes:
        layers: One entry per adapted layer.
        logps_gap: Largest difference of token log-probs, nats, between the base with the adapter
            and the fused model, on random tokens.
        logps_change: The same between the base without and with the adapter.
    """

    layers: tuple[FusedLayer, ...]
    logps_gap: float
    logps_change: float


def fuse_adapter(
    folder: ModelFolder,
    adapter: Path,
    output: Path,
    *,
    dequantize: bool = False,
    on_layer: Callable[[], None] = lambda: None,
) -> FuseReport:
    """Write the model of `folder` with `adapter` fused into its weights.

    Args:
        folder: The base model.
        adapter: A run folder, or any adapter folder of mlx-lm.
        output: Folder to write; must be empty or not exist.
        dequantize: Leave all adapted layers dequantised.
        on_layer: Called after each layer.

    Raises:
        ConfigError: The output folder is not empty, or the adapter is a reward model's.
        ModelError: The adapter does not fit the model.
    """
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"--output {output}: is not empty; choose a new folder")
    if has_reward_head(adapter):
        raise ConfigError(
            f"--adapter-path {adapter}: fusing a reward model would drop its head; use "
            "mlx-align reward export"
        )
    layout = read_layout(adapter)
    model = load_language_model(folder)
    tokens = random_batch(folder.vocab_size, pad=0)
    base = token_logprobs(model.backbone, tokens, shared=False)
    mx.eval(base)
    start = install_adapters(model.module, replace(layout, dropout=0.0))
    model.module.update(load_adapter(adapter, start, layout))
    adapted = token_logprobs(model.backbone, tokens, shared=False)
    mx.eval(adapted)
    layers = fuse_layers(model, dequantize, on_layer)
    fused = token_logprobs(split_backbone(model.module), tokens, shared=False)
    gap = _largest_difference(fused, adapted)
    config = dict(folder.config)
    for layer in layers:
        if layer.quantized and not layer.kept_quantized:
            for key in ("quantization", "quantization_config"):
                if key in config:
                    config[key] = {**config[key], layer.name: False}
    with atomic_folder(output) as partial, wrap_write_errors(output):
        save(partial, str(folder.path), model.module, folder.tokenizer, config, donate_model=False)
    change = _largest_difference(adapted, base)
    return FuseReport(tuple(layers), gap, change)


def fuse_layers(
    model: LanguageModel, dequantize: bool, on_layer: Callable[[], None]
) -> list[FusedLayer]:
    """Replace each adapted layer of the model by a plain layer, in place.

    Raises:
        ModelError: mlx-lm can't fuse the adapters of this model.
    """
    fused, reports = [], []
    for name, module in model.module.named_modules():
        if "lora_a" not in module or not hasattr(module, "fuse"):
            continue
        inner = module["linear"] if "linear" in module else module["embedding"]
        layer, report = _fuse_layer(name, module, inner, dequantize)
        fused.append((name, layer))
        reports.append(report)
        on_layer()
    if not reports and any("lora_a" in module for module in model.module.modules()):
        raise ModelError("mlx-lm can't fuse the adapters of this model")
    if fused:
        model.module.update_modules(tree_unflatten(fused))
    return reports


def _fuse_layer(
    name: str, module: nn.Module, base: nn.Module, dequantize: bool
) -> tuple[nn.Module, FusedLayer]:
    exact = module.fuse(dequantize=True)
    before = _weight(base)
    size = _norm(_weight(exact) - before)
    change = size / max(_norm(before), 1e-30)
    if not hasattr(base, "bits"):
        return exact, FusedLayer(name, False, change, 0.0, False)
    rounded = module.fuse(dequantize=False)
    lost = _norm(_weight(rounded) - _weight(exact)) / size if size else 0.0
    keep = not dequantize and lost <= LOSS_ALLOWED
    return (rounded if keep else exact), FusedLayer(name, True, change, lost, keep)


def _norm(array: mx.array) -> float:
    return float(np.linalg.norm(np.array(array)))


def _largest_difference(a: mx.array, b: mx.array) -> float:
    return float(np.abs(np.array(a) - np.array(b)).max())


def _weight(layer: nn.Module) -> mx.array:
    """A layer's weight, dequantised, in float32."""
    if not hasattr(layer, "bits"):
        weight: mx.array = layer.weight.astype(mx.float32)
        return weight
    return mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    ).astype(mx.float32)
