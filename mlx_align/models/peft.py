"""Reading and writing the adapters of PEFT (transformers' ecosystem).

PEFT stores A (r, in) and B (out, r), and a scale per layer: alpha/r, or alpha/√r with rsLoRA;
patterns can give single layers another alpha and rank. When an adapter is read, A and B are
transposed, the adapter gets the largest rank of its layers, and differences in scale are folded
into B. Adapters that can't be expressed like this are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_align.errors import ModelError
from mlx_align.models.templates import SandboxError, matching_names
from mlx_align.models.weights import read_tensors
from mlx_align.system.regular_files import (
    finite_number,
    list_of_names,
    read_json,
    whole_number,
)

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

_PREFIX = "base_model.model."
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_"
    r"(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?"
)
_LEAVES = {"A": "lora_a", "B": "lora_b", "magnitude_vector": "m"}
# Options of PEFT that make an adapter more than a LoRA or DoRA update.
_UNSUPPORTED = (
    "modules_to_save",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "velora_config",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
# Initialisations that don't change the base model's weights.
_UNCHANGED_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT, and no adapter of mlx-lm."""
    return (folder / PEFT_WEIGHTS).is_file() and not (folder / "adapters.safetensors").is_file()


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Read PEFT's configuration of an adapter and check that the adapter can be mapped.

    Raises:
        ModelError: It can't be read, or the adapter can't be mapped; the message says why.
    """
    file = folder / PEFT_CONFIG
    try:
        config = read_json(file)
        if not isinstance(config, dict) or "peft_type" not in config:
            raise ValueError("no peft_type in it")
        config["r"] = whole_number(config, "r", 1, 1 << 16)
        config["lora_alpha"] = finite_number(config, "lora_alpha", -1e9, 1e9)
        if config["lora_alpha"] == 0:
            raise ValueError("lora_alpha is 0")
        finite_number(config, "lora_dropout", 0.0, 1.0, 0.0)
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or len(patterns) > 10_000:
            raise ValueError("alpha_pattern, expected an object")
        for name in patterns:
            finite_number(patterns, name, -1e9, 1e9)
        for name in ("target_modules", "exclude_modules"):
            if not isinstance(config.get(name), str):
                list_of_names(config, name, 1 << 16)
        blocks = config.get("layers_to_transform")
        whole = blocks if isinstance(blocks, list) else [] if blocks is None else [blocks]
        if not all(type(one) is int for one in whole):
            raise ValueError("layers_to_transform, expected whole numbers")
    except (OSError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ModelError(f"{file}: not the configuration of a LoRA adapter of PEFT ({what})") from (
            error
        )
    kind = config["peft_type"]
    if kind != "LORA":
        raise ModelError(f"{file}: peft_type {kind}; only LORA (with DoRA and rsLoRA) can be read")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{file}: bias {config['bias']!r}: trained biases can't be mapped")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise ModelError(f"{file}: {name} {config[name]!r:.100} can't be mapped")
    start = config.get("init_lora_weights", True)
    if start not in _UNCHANGED_BASE:
        raise ModelError(
            f"{file}: init_lora_weights {start!r} changes the base model's weights; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    return config


def read_peft_layout(folder: Path) -> dict[str, Any]:
    """Read the arguments of an `AdapterLayout` for a PEFT adapter.

    Raises:
        ModelError: It can't be mapped.
    """
    config, modules = read_peft_config(folder), _modules(folder)
    return {
        "fine_tune_type": "dora" if config.get("use_dora") else "lora",
        "rank": max(int(parts["A"].shape[0]) for parts in modules.values()),
        "scale": _scale(config, float(config["lora_alpha"]), int(config["r"])),
        "dropout": float(config.get("lora_dropout") or 0.0),
        "num_layers": -1,
        "keys": tuple(sorted({in_block(module)[1] for module in modules})),
    }


def read_peft_weights(folder: Path) -> dict[str, mx.array]:
    """Read the tensors of a PEFT adapter, under mlx-lm's names, in float32.

    Raises:
        ModelError: They are damaged, or can't be mapped.
    """
    config, modules = read_peft_config(folder), _modules(folder)
    whole = _scale(config, float(config["lora_alpha"]), int(config["r"]))
    alphas = _alphas(folder, config, modules)
    found = {}
    for module, parts in modules.items():
        rank = int(parts["A"].shape[0])
        for part, tensor in parts.items():
            value = tensor.astype(mx.float32).T
            if part == "B":
                value = value * (_scale(config, alphas[module], rank) / whole)
            elif part == "magnitude_vector":
                value = value.reshape(-1)
            found[f"{module}.{_LEAVES[part]}"] = value
    mx.eval(found)
    return found


def peft_name(module: str, leaf: str) -> str:
    """PEFT's name of a tensor of mlx-lm: `lora_a`, `lora_b` or `m` of a module."""
    part = next(part for part, own in _LEAVES.items() if own == leaf)
    return f"{_PREFIX}{module}.lora_{part}" + ("" if leaf == "m" else ".weight")


def peft_config(
    *, base: str, targets: Sequence[str], rank: int, scale: float, dropout: float, dora: bool
) -> dict[str, Any]:
    """The content of PEFT's adapter_config.json for a LoRA or DoRA adapter."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": dropout,
        "target_modules": list(targets),
        "bias": "none",
        "use_dora": dora,
        "use_rslora": False,
        "inference_mode": True,
    }


def match_names(tensors: Mapping[str, mx.array], names: Collection[str]) -> dict[str, mx.array]:
    """The tensors under the model's names, which may have another prefix before the blocks."""
    by_place = {in_block(name): name for name in names}
    return {
        name if name in names else by_place.get(in_block(name), name): tensor
        for name, tensor in tensors.items()
    }


def covered_names(folder: Path, tensors: Collection[str], names: Collection[str]) -> set[str]:
    """The names of the tensors that an adapter must have according to its configuration.

    Args:
        folder: The adapter.
        tensors: The names of its tensors, after `match_names`.
        names: The names of all adapter weights of the model.
    """
    config = read_peft_config(folder)
    target, wanted = config.get("target_modules"), config.get("layers_to_transform")
    skipped = config.get("exclude_modules")
    blocks = None if wanted is None else {wanted} if isinstance(wanted, int) else set(wanted)
    present = {name.rpartition(".")[0] for name in tensors}
    keys = {in_block(module)[1] for module in present}
    modules = {name.rpartition(".")[0] for name in names}
    excluded = _excluded(folder, skipped, modules)
    if target == "all-linear":
        targeted = modules
    elif isinstance(target, str):
        targeted = _matching(folder, target, modules)
    else:
        targeted = {module for module in modules if _matches(module, target or ())}
    found = set()
    for name in names:
        module = name.rpartition(".")[0]
        block, inside = in_block(module)
        listed = inside in keys and module in targeted
        listed = listed and (blocks is None or block in blocks)
        listed = listed and module not in excluded
        if module in present or listed:
            found.add(name)
    return found


def _matches(module: str, wanted: Collection[str]) -> bool:
    return any(module == one or module.endswith(f".{one}") for one in wanted)


def _excluded(folder: Path, skipped: Any, modules: Collection[str]) -> set[str]:
    """The modules that `exclude_modules` names, as a list or as a pattern."""
    if isinstance(skipped, str):
        return _matching(folder, skipped, modules)
    return {module for module in modules if _matches(module, skipped or ())}


def _matching(folder: Path, pattern: str, modules: Collection[str]) -> set[str]:
    try:
        return matching_names(pattern, list(modules))
    except SandboxError as error:
        raise ModelError(f"{folder / PEFT_CONFIG}: pattern {pattern!r:.100}: {error}") from None


def _modules(folder: Path) -> dict[str, dict[str, mx.array]]:
    """The tensors of each adapted module, by part (A, B, magnitude_vector).

    Raises:
        ModelError: A tensor is missing, or is not part of an adapter that can be mapped.
    """
    file = folder / PEFT_WEIGHTS
    found: dict[str, dict[str, mx.array]] = {}
    for name, tensor in read_tensors(file).items():
        if name.endswith(".base_layer.weight"):
            continue  # PEFT saves a copy of the base's vocabulary head with its adapter
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ModelError(f"{file}: {name} is not a LoRA matrix, so it can't be mapped")
        if match["part"] not in _LEAVES:
            raise ModelError(f"{file}: {name}: adapters of embeddings can't be mapped")
        if re.search(r"\.experts\.\d+\.", match["module"]) or tensor.ndim not in (1, 2):
            raise ModelError(f"{file}: {name}: adapters of single experts can't be mapped")
        found.setdefault(match["module"], {})[match["part"]] = tensor
    if not found:
        raise ModelError(f"{file}: holds no tensors")
    dora = any("magnitude_vector" in parts for parts in found.values())
    for module, parts in found.items():
        for part in ("A", "B", *(["magnitude_vector"] if dora else [])):
            if part not in parts:
                raise ModelError(f"{file}: {_PREFIX}{module}.lora_{part} is missing")
    return found


def _alphas(folder: Path, config: Mapping[str, Any], modules: Collection[str]) -> dict[str, float]:
    """Alpha of each module: that of the first pattern which ends the module's name."""
    found = dict.fromkeys(modules, float(config["lora_alpha"]))
    for pattern, own in reversed((config.get("alpha_pattern") or {}).items()):
        for module in _matching(folder, rf"(.*\.)?({pattern})", modules):
            found[module] = float(own)
    return found


def _scale(config: Mapping[str, Any], alpha: float, rank: int) -> float:
    """alpha/r, or alpha/√r with rsLoRA."""
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def in_block(name: str) -> tuple[int | None, str]:
    """Number of the block that holds a module or tensor, and its name there.

    (None, name) outside blocks.
    """
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return int(part), ".".join(parts[place + 1 :])
    return None, name
