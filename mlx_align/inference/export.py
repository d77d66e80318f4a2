"""Exports for transformers: reward models with adapter and head fused, and PEFT adapters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model, save
from safetensors import safe_open

from mlx_align.data.chat_template import ChatTemplate, inspect_chat_template
from mlx_align.errors import ConfigError, ModelError
from mlx_align.inference.reward_model import install_reward_model
from mlx_align.models.adapters import read_layout, read_weights
from mlx_align.models.backbone import split_backbone
from mlx_align.models.classifiers import AT_END_TOKEN, READS_AT, SUFFIX
from mlx_align.models.fuse import fuse_layers
from mlx_align.models.heads import REWARD_HEAD, completion_scores, has_reward_head
from mlx_align.models.loading import ModelFolder, load_language_model
from mlx_align.models.peft import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    in_block,
    is_peft,
    peft_config,
    peft_name,
)
from mlx_align.models.verification import random_batch
from mlx_align.system.atomic_io import (
    atomic_folder,
    check_new_folder,
    wrap_write_errors,
    write_tensors,
    write_text,
)

# Families (and their class prefix in transformers) whose tensors have the same names and shapes in
# mlx-lm and transformers. Of each family a tiny model was exported and loaded in transformers: the
# scores agree to 1e-5 (scripts/verify_classifiers.py). Gemma's export is not measured.
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "phi3": "Phi3",
    "olmo2": "Olmo2",
    "smollm3": "SmolLM3",
    "nemotron": "Nemotron",
    "seed_oss": "SeedOss",
    "ministral3": "Ministral3",
    "glm4": "Glm4",
    "helium": "Helium",
    "stablelm": "StableLm",
}


@dataclass(frozen=True)
class ExportReport:
    """Result of exporting a reward model.

    Attributes:
        architecture: Class name in transformers.
        members: Number of heads; the exported one is their mean.
        score_gap: Largest difference between the scores of the run and of the fused weights, on
            random tokens.
        pad_token: The padding token. No row ends with it, because transformers reads the score at
            the last token that is not padding.
        reads_at: A sentence about the required end of rows.
    """

    architecture: str
    members: int
    score_gap: float
    pad_token: str
    reads_at: str


def export_peft_adapter(folder: ModelFolder, run: Path, output: Path) -> int:
    """Write the adapter of `run` as PEFT does, for transformers, vLLM and others.

    Args:
        folder: The run's base model. transformers loads the adapter on the same model, or on the
            one that it was quantised from.
        run: A run folder, or any LoRA or DoRA adapter folder of mlx-lm.
        output: Folder to write; must be empty or not exist.

    Returns:
        The number of adapted layers.

    Raises:
        ConfigError: The output folder is not empty, or the run is a reward model's.
        ModelError: The adapter can't be expressed in PEFT's format; the message names the layer.
    """
    check_new_folder(output)
    if has_reward_head(run):
        raise ConfigError(
            f"--adapter-path {run}: PEFT's format would drop the head of a reward model; use "
            "mlx-align reward export"
        )
    if is_peft(run):
        raise ConfigError(f"--adapter-path {run}: is in PEFT's format already")
    layout = read_layout(run)
    if layout.fine_tune_type == "full":
        raise ModelError(
            f"--adapter-path {run}: the run trained full weights, not an adapter; use mlx-align "
            "fuse"
        )
    weights = read_weights(run)
    modules = sorted({name.rpartition(".")[0] for name in weights})
    shapes, blocks = _linear_shapes(folder)
    _check_modules(folder, run, weights, modules, shapes)
    tensors = {}
    for name, tensor in weights.items():
        module, _, leaf = name.rpartition(".")
        value = tensor.astype(mx.float32)
        tensors[peft_name(module, leaf)] = mx.contiguous(value if leaf == "m" else value.T)
    adapted = {in_block(module) for module in modules}
    inside = {name for _, name in adapted}
    in_all_blocks = all((block, name) in adapted for block in range(blocks) for name in inside)
    # PEFT applies names within a block to every block.
    targets = sorted(inside) if in_all_blocks else modules
    config = peft_config(
        base=folder.name,
        targets=targets,
        rank=layout.rank,
        scale=layout.scale,
        dropout=layout.dropout,
        dora=layout.fine_tune_type == "dora",
    )
    with atomic_folder(output) as partial, wrap_write_errors(output):
        write_text(partial / PEFT_CONFIG, json.dumps(config, indent=2) + "\n")
        write_tensors(partial / PEFT_WEIGHTS, tensors)
    return len(modules)


def _check_modules(
    folder: ModelFolder,
    run: Path,
    weights: dict[str, mx.array],
    modules: list[str],
    shapes: dict[str, tuple[int, int | None]],
) -> None:
    """Check that every adapted module is a linear layer in transformers too.

    Raises:
        ModelError: One is not, or its shape differs; the message names it.
    """
    for module in modules:
        a, b = weights.get(f"{module}.lora_a"), weights.get(f"{module}.lora_b")
        if a is None or b is None:
            raise ModelError(f"{run}: {module}: lora_a or lora_b is missing")
        if a.ndim != 2 or "embed" in module.rpartition(".")[2] or module not in shapes:
            raise ModelError(
                f"{run}: its adapter of {module} can't be exported: transformers has no linear "
                "layer of that name; train other layers with --lora-keys, or use mlx-align fuse"
            )
        outputs, inputs = shapes[module]
        if b.shape[1] != outputs or inputs not in (None, a.shape[0]):
            raise ModelError(
                f"{run}: its adapter of {module} has {a.shape[0]} inputs and {b.shape[1]} outputs, "
                f"but the layer in --model {folder.name} has {inputs} and {outputs}; check that "
                "it is the run's base model"
            )


def _linear_shapes(folder: ModelFolder) -> tuple[dict[str, tuple[int, int | None]], int]:
    """Outputs and inputs of the matrices in a model's files, by module, and its number of blocks.

    The inputs of quantised matrices, which are packed, are None.
    """
    found: dict[str, tuple[int, int | None]] = {}
    for file in sorted(folder.path.glob("model*.safetensors")):
        with safe_open(str(file), "np") as tensors:
            names = set(tensors.keys())
            for name in names:
                module, _, leaf = name.rpartition(".")
                shape = tensors.get_slice(name).get_shape()
                if leaf == "weight" and len(shape) == 2:
                    packed = f"{module}.scales" in names
                    found[module] = int(shape[0]), None if packed else int(shape[1])
    blocks = [block for block, _ in map(in_block, found) if block is not None]
    return found, 1 + max(blocks, default=-1)


def export_reward_model(folder: ModelFolder, run: Path, output: Path) -> ExportReport:
    """Export the reward model of `run` as a model that transformers can load.

    Args:
        folder: The run's base model.
        run: The run folder.
        output: Folder to write; must be empty or not exist.

    Raises:
        ConfigError: The output folder is not empty.
        ModelError: The model family is not supported, or the run does not fit the model.
    """
    check_new_folder(output)
    family = FAMILIES.get(str(folder.config.get("model_type")))
    if family is None:
        raise ModelError(
            f"--model {folder.name}: {folder.config.get('model_type')} models can't be exported "
            f"(supported: {', '.join(FAMILIES)}); use it with mlx-align score instead"
        )
    style = inspect_chat_template(folder.tokenizer)
    pad = _pad_token(folder, style)
    model = load_language_model(folder)
    install_reward_model(model, run)
    tokens = random_batch(folder.vocab_size, pad=0)
    before = np.array(completion_scores(model.backbone, tokens, shared=False)).mean(axis=1)
    fuse_layers(model, dequantize=True, on_layer=lambda: None)
    module = dequantize_model(model.module)
    after = np.array(completion_scores(split_backbone(module), tokens, shared=False)).mean(axis=1)

    weight = module.pop(REWARD_HEAD).weight
    module.pop("lm_head", None)
    module["score"] = nn.Linear(weight.shape[1], 1, bias=False)
    module["score"].weight = weight.mean(axis=0, keepdims=True)
    config = _config(folder.config, module, f"{family}{SUFFIX}", pad)
    tokenizer = getattr(folder.tokenizer, "_tokenizer", folder.tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    with atomic_folder(output) as partial, wrap_write_errors(output):
        save(partial, str(folder.path), module, folder.tokenizer, config, donate_model=False)
    return ExportReport(
        architecture=f"{family}{SUFFIX}",
        members=int(weight.shape[0]),
        score_gap=float(np.abs(after - before).max()),
        pad_token=str(tokenizer.pad_token),
        reads_at=_describe_row_end(style),
    )


def _config(base: dict[str, Any], module: nn.Module, architecture: str, pad: int) -> dict[str, Any]:
    quantized = ("quantization", "quantization_config")
    config = {key: value for key, value in base.items() if key not in quantized}
    # The head is always float32, so the other weights decide. transformers casts all weights to
    # this dtype, so it is the widest: fused float32 layers would be rounded.
    weights = [w for name, w in tree_flatten(module.parameters()) if not name.startswith("score.")]
    floating = [w.dtype for w in weights if mx.issubdtype(w.dtype, mx.floating)]
    dtype = str(max(floating, key=lambda one: one.size))
    return {
        **config,
        "architectures": [architecture],
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad,
        "torch_dtype": dtype.removeprefix("mlx.core."),
        "dtype": dtype.removeprefix("mlx.core."),
        READS_AT: AT_END_TOKEN,
    }


def _pad_token(folder: ModelFolder, style: ChatTemplate) -> int:
    """Find a padding token that no row ends with.

    Raises:
        ModelError: The tokenizer has none.
    """
    tokenizer = folder.tokenizer
    ends = {style.eos, *style.ending[:1], *tokenizer.eos_token_ids}
    for token in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id):
        if token is not None and token not in ends and token < folder.vocab_size:
            return int(token)
    raise ModelError(
        f"--model {folder.name}: its tokenizer has no padding token other than its end token; "
        "add a pad_token to tokenizer_config.json"
    )


def _describe_row_end(style: ChatTemplate) -> str:
    if style.ending[1:]:
        suffix = style.tokenizer.decode(list(style.ending[1:]))
        end = style.tokenizer.decode(list(style.ending[:1]))
        return (
            f"Rows must end with {end}: remove {suffix!r}, which the chat template adds after it, "
            "or the score is read there."
        )
    if style.ending:
        return "Rows end where the chat template ends."
    return "Rows are prompt, completion and end token; the end token has to be appended."
