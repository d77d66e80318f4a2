"""Fusing an adapter into its base model without losing the change to rounding.

A fused weight that is stored like the base's (in 4 bits, or bfloat16) is rounded to that grid,
which can undo a small change: "the merged model equals the base". So the sum is computed in
float32, the lost part of the change is measured for each layer, and a layer that would lose more
than `MAX_LOST_CHANGE` of it is stored in the next finer form: 8 bits, then 16 bits, then float32.
At most the same part of the change of the log-probs is lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.utils import save

from mlx_align.errors import ConfigError, ModelError
from mlx_align.models.adapters import install_adapters, load_adapter, read_layout
from mlx_align.models.backbone import split_backbone
from mlx_align.models.forward import token_logprobs
from mlx_align.models.heads import has_reward_head
from mlx_align.models.loading import LanguageModel, ModelFolder, load_language_model
from mlx_align.models.verification import random_batch
from mlx_align.models.weights import use_adapter
from mlx_align.system.atomic_io import atomic_folder, check_new_folder, wrap_write_errors
from mlx_align.types import GroupBatch

# Largest part of a layer's change that rounding may lose; otherwise it is stored more finely.
MAX_LOST_CHANGE = 0.05

# Layers that choose experts are never quantised again: they are small, and a small error in them
# sends tokens to other experts.
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")
_16_BIT = (mx.bfloat16, mx.float16)


@dataclass(frozen=True)
class FusedLayer:
    """Result of fusing one adapted layer, or one tensor of full fine-tuning.

    Attributes:
        name: Its path in the model.
        quantized: Whether the base model's layer is quantised.
        change: ‖Δ‖ / ‖W‖, the relative size of the adapter's change.
        lost: Part of the change that would be lost if the sum were stored like the base's weight:
            ‖(stored − W) − Δ‖ / ‖Δ‖, where W + Δ is computed in float32.
        kept_quantized: Whether the layer is quantised in the fused model.
        stored: Its form in the fused model: `4 bits`, `8 bits`, `bfloat16`, `float32` …
        lost_stored: Part of the change that is lost in that form.
    """

    name: str
    quantized: bool
    change: float
    lost: float
    kept_quantized: bool
    stored: str
    lost_stored: float


@dataclass(frozen=True)
class FuseReport:
    """Result of fusing an adapter.

    Attributes:
        output: The folder of the fused model.
        layers: One entry per adapted layer.
        logps_gap: Largest difference of token log-probs, nats, between the base with the adapter
            and the fused model, on random tokens, with float32 activations.
        logps_change: The same between the base without and with the adapter.
        logps_lost: Root mean square of the former difference over that of the latter: the part of
            the change of log-probs that fusing loses.
        bytes_before: Bytes of the base model's weights.
        bytes_after: Bytes of the fused model's weights.
        fine_tune_type: lora, dora or full.
    """

    output: str
    layers: tuple[FusedLayer, ...]
    logps_gap: float
    logps_change: float
    logps_lost: float
    bytes_before: int
    bytes_after: int
    fine_tune_type: str


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
        dequantize: Dequantise the whole model, so that transformers can load it.
        on_layer: Called after each layer.

    Raises:
        ConfigError: The output folder is not empty, or the adapter is a reward model's.
        ModelError: The adapter does not fit the model.
    """
    check_new_folder(output)
    if has_reward_head(adapter):
        raise ConfigError(
            f"--adapter-path {adapter}: fusing a reward model would drop its head; use "
            "mlx-align reward export"
        )
    layout = read_layout(adapter)
    model = load_language_model(folder)
    module = model.module
    before = _nbytes(module)
    tokens = random_batch(folder.vocab_size, pad=0)
    base = _float32_logprobs(module, tokens)
    weights = dict(tree_flatten(module.parameters())) if layout.fine_tune_type == "full" else {}
    start = install_adapters(module, replace(layout, dropout=0.0))
    trained = load_adapter(adapter, start, layout)
    module.update(trained)
    adapted = _float32_logprobs(module, tokens)
    adapters = [pair for pair in module.named_modules() if "lora_a" in pair[1]]
    # Most often the first is enough. Errors of layers can add up, and then the log-probs decide.
    for allowed in (MAX_LOST_CHANGE, MAX_LOST_CHANGE / 4, 0.0):
        if adapters:
            module.update_modules(tree_unflatten(adapters))
        if layout.fine_tune_type == "full":
            layers = _round_tensors(module, weights, dict(tree_flatten(trained)), allowed)
        else:
            layers = fuse_layers(model, dequantize, on_layer, allowed)
        fused = _float32_logprobs(module, tokens)
        if _part_lost(base, adapted, fused) <= MAX_LOST_CHANGE:
            break
    del weights, adapters
    config = _fused_config(folder.config, module, layers)
    float32 = any(layer.stored == "float32" for layer in layers)
    if dequantize:
        # What reads the folder casts it to one dtype: where a layer needs float32, all have it.
        _dequantize_rest(module, mx.float32 if float32 else _model_dtype(module))
        config = {key: value for key, value in config.items() if not key.startswith("quantization")}
    if float32 and "quantization" not in config:
        # transformers casts all weights to the dtype named here, or else to that of the first.
        config.update(dtype="float32", torch_dtype="float32")
    fused = _float32_logprobs(module, tokens)
    with atomic_folder(output) as partial, wrap_write_errors(output):
        save(partial, str(folder.path), module, folder.tokenizer, config, donate_model=False)
    return FuseReport(
        output=str(output),
        layers=tuple(layers),
        logps_gap=_max_difference(fused, adapted),
        logps_change=_max_difference(adapted, base),
        logps_lost=_part_lost(base, adapted, fused),
        bytes_before=before,
        bytes_after=_nbytes(module),
        fine_tune_type=layout.fine_tune_type,
    )


def _part_lost(base: mx.array, adapted: mx.array, fused: mx.array) -> float:
    """The part of the change from `base` to `adapted` that `fused` misses, root mean square."""
    change = _norm(adapted - base)
    return _norm(fused - adapted) / change if change else 0.0


def fuse_layers(
    model: LanguageModel,
    dequantize: bool,
    on_layer: Callable[[], None],
    allowed: float = MAX_LOST_CHANGE,
) -> list[FusedLayer]:
    """Replace each adapted layer of the model by a plain layer, in place.

    Args:
        model: The model, with adapters.
        dequantize: Whether no layer is quantised again.
        on_layer: Called after each layer.
        allowed: Largest part of a layer's change that may be lost.

    Raises:
        ModelError: mlx-lm can't fuse the adapters of this model.
    """
    fused, reports = [], []
    dtype = _model_dtype(model.module)
    for name, module in model.module.named_modules():
        if "lora_a" not in module or not hasattr(module, "fuse"):
            continue
        layer, report = _fuse_layer(name, module, dtype, dequantize, allowed)
        fused.append((name, layer))
        reports.append(report)
        on_layer()
    if not reports and any("lora_a" in module for module in model.module.modules()):
        raise ModelError(
            "mlx-lm can't fuse the adapters of this model; use the base model with --adapter-path"
        )
    if fused:
        model.module.update_modules(tree_unflatten(fused))
    return reports


def _fuse_layer(
    name: str, module: nn.Module, dtype: mx.Dtype, dequantize: bool, allowed: float
) -> tuple[nn.Module, FusedLayer]:
    key = "linear" if "linear" in module else "embedding"
    base = module[key]
    plain = _float32_layer(base)
    before = plain.weight
    # With a float32 layer in its place, mlx-lm's own formula sums without rounding.
    module[key] = plain
    exact = module.fuse(dequantize=True)
    module[key] = base
    change = _norm(exact.weight - before)
    quantized = hasattr(base, "bits")
    coarse = not (dequantize or _ROUTER.search(name))
    found: list[tuple[str, nn.Module, float]] = []
    for form, layer in _stored_forms(exact, base, dtype):
        lost = _norm(_float32_layer(layer).weight - exact.weight) / change if change else 0.0
        found.append((form, layer, lost))
        if lost <= allowed and (coarse or not hasattr(layer, "bits")):
            break
    form, layer, lost = found[-1]
    report = FusedLayer(
        name=name,
        quantized=quantized,
        change=change / max(_norm(before), 1e-30),
        lost=found[0][2],
        kept_quantized=hasattr(layer, "bits"),
        stored=form,
        lost_stored=lost,
    )
    return layer, report


def _stored_forms(
    exact: nn.Module, base: nn.Module, dtype: mx.Dtype
) -> Iterator[tuple[str, nn.Module]]:
    """The forms in which a layer can be stored, from the base's to float32, each with its name."""
    if hasattr(base, "bits"):
        size, bits, mode = base.group_size, base.bits, base.mode
        yield f"{bits} bits", _quantized(exact, size, bits, mode, base)
        size = size if size in (32, 64, 128) else 64
        if bits < 8 and exact.weight.shape[-1] % size == 0:
            yield "8 bits", _quantized(exact, size, 8, "affine", base)
    else:
        dtype = base.weight.dtype
    if dtype in _16_BIT:
        yield str(dtype).removeprefix("mlx.core."), _with_weight(exact, exact.weight.astype(dtype))
    yield "float32", exact


def _quantized(
    exact: nn.Module, group_size: int | None, bits: int, mode: str, base: nn.Module
) -> nn.Module:
    # Affine scales are rounded like the base's, before the weights are quantised with them.
    dtype = base.scales.dtype if mx.issubdtype(base.scales.dtype, mx.floating) else mx.float32
    weight = exact.weight.astype(dtype) if mode == "affine" else exact.weight
    layer = _with_weight(exact, weight)
    quantized: nn.Module = layer.to_quantized(group_size=group_size, bits=bits, mode=mode)
    return quantized


def _with_weight(layer: nn.Module, weight: mx.array) -> nn.Module:
    """A layer like `layer` with another weight."""
    if isinstance(layer, SwitchLinear):
        other: nn.Module = SwitchLinear(1, 1, 1, bias="bias" in layer)
    elif isinstance(layer, nn.Embedding):
        other = nn.Embedding(1, 1)
    else:
        other = nn.Linear(1, 1, bias="bias" in layer)
    other.weight = weight
    if "bias" in layer:
        other.bias = layer.bias
    return other


def _float32_layer(layer: nn.Module) -> nn.Module:
    """A plain layer that holds the weight in float32, dequantised."""
    plain: nn.Module
    if isinstance(layer, SwitchLinear | QuantizedSwitchLinear):
        plain = SwitchLinear(1, 1, 1, bias="bias" in layer)
    elif isinstance(layer, nn.Embedding | nn.QuantizedEmbedding):
        plain = nn.Embedding(1, 1)
    else:
        plain = nn.Linear(1, 1, bias="bias" in layer)
    plain.weight = _weight(layer)
    if "bias" in layer:
        plain.bias = layer.bias
    return plain


def _weight(layer: nn.Module) -> mx.array:
    """A layer's weight, dequantised, in float32."""
    if not hasattr(layer, "bits"):
        weight: mx.array = layer.weight.astype(mx.float32)
        return weight
    scales, biases = layer.scales, layer.get("biases")
    if layer.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    options: dict[str, Any] = {}
    if "global_scale" in layer:
        options["global_scale"] = layer.global_scale
    return mx.dequantize(
        layer.weight,
        scales,
        biases,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=mx.float32,
        **options,
    )


def _round_tensors(
    module: nn.Module, base: dict[str, mx.array], trained: dict[str, mx.array], allowed: float
) -> list[FusedLayer]:
    """Store fully trained tensors in the base's dtype where that keeps the change, in place."""
    reports, rounded = [], []
    for name, weight in trained.items():
        dtype = base[name].dtype
        change = _norm(weight.astype(mx.float32) - base[name].astype(mx.float32))
        if not change:
            rounded.append((name, weight.astype(dtype)))
            continue
        lost = _norm(weight.astype(dtype).astype(mx.float32) - weight) / change
        stored = dtype if lost <= allowed else weight.dtype
        rounded.append((name, weight.astype(stored)))
        reports.append(
            FusedLayer(
                name=name,
                quantized=False,
                change=change / max(_norm(base[name].astype(mx.float32)), 1e-30),
                lost=lost,
                kept_quantized=False,
                stored=str(stored).removeprefix("mlx.core."),
                lost_stored=lost if stored == dtype else 0.0,
            )
        )
    module.update(tree_unflatten(rounded))
    return reports


def _fused_config(
    base: dict[str, Any], module: nn.Module, layers: list[FusedLayer]
) -> dict[str, Any]:
    """The base's configuration, updated with the forms in which the fused layers are stored."""
    config = dict(base)
    modules = dict(module.named_modules())
    changed: dict[str, Any] = {}
    for layer in layers:
        if layer.quantized:
            now = modules[layer.name]
            changed[layer.name] = layer.kept_quantized and {
                "group_size": now.group_size,
                "bits": now.bits,
                "mode": now.mode,
            }
    kept = next((one for one in modules.values() if hasattr(one, "bits")), None)
    if "quantization" in config:
        for key in ("quantization", "quantization_config"):
            if key in config:
                config[key] = {**config[key], **changed}
    elif kept is not None:
        # Quantised by another library (mxfp4, AWQ): what is saved is in mlx's format.
        whole = {"group_size": kept.group_size, "bits": kept.bits, "mode": kept.mode, **changed}
        config.update(quantization=whole, quantization_config=whole)
    else:
        config.pop("quantization_config", None)
    return config


def _dequantize_rest(module: nn.Module, dtype: mx.Dtype) -> None:
    """Replace the quantised layers by plain ones of that dtype, in place."""
    found = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding | QuantizedSwitchLinear):
            plain = _float32_layer(layer)
            plain.weight = plain.weight.astype(dtype)
            found.append((name, plain))
    if found:
        module.update_modules(tree_unflatten(found))


def _float32_logprobs(module: nn.Module, tokens: GroupBatch) -> mx.array:
    """Token log-probs (N, C) with float32 activations, nats.

    In 16 bits, rounding of the activations moves them by as much as an adapter does (0.15 nats on a
    4-bit model, where the adapter's change was 0.15). Matrices stay as they are.
    """
    wide = {}
    for name, layer in module.named_modules():
        embedding = isinstance(layer, nn.Embedding | nn.QuantizedEmbedding)
        for leaf, array in layer.items():
            if not isinstance(array, mx.array) or array.dtype not in _16_BIT:
                continue
            if embedding or array.ndim < 2 or leaf in ("scales", "biases"):
                wide[f"{name}.{leaf}" if name else leaf] = array.astype(mx.float32)
    try:
        with use_adapter(module, tree_unflatten(list(wide.items())) if wide else {}):
            found = token_logprobs(split_backbone(module), tokens, shared=False)
            mx.eval(found)
    except (TypeError, ValueError, RuntimeError):  # a family's code that mixes no dtypes
        found = token_logprobs(split_backbone(module), tokens, shared=False)
        mx.eval(found)
    return found


def _model_dtype(module: nn.Module) -> mx.Dtype:
    """The dtype of the model's hidden states: that of most of its tensors that are not quantised.

    Norms and biases count; packed weights and adapters do not.
    """
    counts: dict[mx.Dtype, int] = {}
    for name, array in tree_flatten(module.parameters()):
        leaf = name.rpartition(".")[2]
        if mx.issubdtype(array.dtype, mx.floating) and leaf in ("weight", "scales", "bias"):
            counts[array.dtype] = counts.get(array.dtype, 0) + 1
    return max(counts, key=lambda dtype: counts[dtype], default=mx.float32)


def _nbytes(module: nn.Module) -> int:
    return sum(int(array.nbytes) for _, array in tree_flatten(module.parameters()))


def _norm(array: mx.array) -> float:
    return float(np.linalg.norm(np.array(array)))


def _max_difference(a: mx.array, b: mx.array) -> float:
    return float(np.abs(np.array(a) - np.array(b)).max())
