"""One model out of base and adapter, without losing the change to quantisation.

Re-quantising a fused weight rounds it to the base's grid, and a small change can vanish in the
rounding: "the merged model equals the base". Here each layer's loss is measured, and a layer that
would lose more than `LOSS_ALLOWED` of its change stays dequantised.
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
from mlx_align.files import writing, writing_folder
from mlx_align.models.adapters import install, load_tree, read_layout
from mlx_align.models.compat import dissect
from mlx_align.models.heads import has_head
from mlx_align.models.loading import LanguageModel, ModelFolder, load_language_model
from mlx_align.models.logps import batch_token_logps
from mlx_align.models.selfcheck import random_batch

# Share of a layer's change that re-quantising may lose before the layer is left dequantised.
LOSS_ALLOWED = 0.1


@dataclass(frozen=True)
class FusedLayer:
    """What became of one adapted layer.

    Attributes:
        name: Its path in the model.
        quantized: Whether the base's layer was.
        change: ‖Δ‖ / ‖W‖, how far the adapter moved it.
        lost: ‖(requantised − W) − Δ‖ / ‖Δ‖, 0 where nothing was quantised.
        kept_quantized: Whether it is quantised in the fused model.
    """

    name: str
    quantized: bool
    change: float
    lost: float
    kept_quantized: bool


@dataclass(frozen=True)
class FuseReport:
    """What fusing did.

    Attributes:
        layers: One entry per adapted layer.
        logps_gap: Largest difference, nats, of token log-probs between base with adapter and the
            fused model, on random tokens.
        logps_change: The same between the base and base with adapter: what there is to lose.
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
        adapter: A run folder, or any adapter folder of mlx-lm's.
        output: Folder to write; must not hold a model yet.
        dequantize: Leave no adapted layer quantised.
        on_layer: Called after each layer.

    Raises:
        ConfigError: The output folder holds something, or the run is a reward model's.
        ModelError: The adapter does not fit the model.
    """
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"--output {output}: is not empty; name a new folder")
    if has_head(adapter):
        raise ConfigError(
            f"--adapter-path {adapter}: a reward model's, whose head would be lost; "
            "mlx-align reward export keeps it"
        )
    layout = read_layout(adapter)
    model = load_language_model(folder)
    tokens = random_batch(folder.vocab_size, pad=0)
    base = batch_token_logps(model.anatomy, tokens, shared=False)
    mx.eval(base)
    start = install(model.module, replace(layout, dropout=0.0))
    model.module.update(load_tree(adapter, start, layout))
    adapted = batch_token_logps(model.anatomy, tokens, shared=False)
    mx.eval(adapted)
    layers = fuse_layers(model, dequantize, on_layer)
    fused = batch_token_logps(dissect(model.module), tokens, shared=False)
    gap = _furthest(fused, adapted)
    config = dict(folder.config)
    for layer in layers:
        if layer.quantized and not layer.kept_quantized:
            for key in ("quantization", "quantization_config"):
                if key in config:
                    config[key] = {**config[key], layer.name: False}
    with writing_folder(output) as partial, writing(output):
        save(partial, str(folder.path), model.module, folder.tokenizer, config, donate_model=False)
    change = _furthest(adapted, base)
    return FuseReport(tuple(layers), gap, change)


def fuse_layers(
    model: LanguageModel, dequantize: bool, on_layer: Callable[[], None]
) -> list[FusedLayer]:
    """Replace each adapted layer of the model by one plain layer, and say what that lost.

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


def _furthest(a: mx.array, b: mx.array) -> float:
    return float(np.abs(np.array(a) - np.array(b)).max())


def _weight(layer: nn.Module) -> mx.array:
    """A layer's weight in float32."""
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
