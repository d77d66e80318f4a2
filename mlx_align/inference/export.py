"""A trained reward model as one folder that transformers loads: base, adapter and head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model, save

from mlx_align.data.rendering import ChatStyle, chat_style
from mlx_align.errors import ConfigError, ModelError
from mlx_align.files import writing, writing_folder
from mlx_align.inference.reward_model import put_run
from mlx_align.models.classifiers import AT_END_TOKEN, MARK, SUFFIX
from mlx_align.models.compat import dissect
from mlx_align.models.fusing import fuse_layers
from mlx_align.models.heads import HEAD_NAME, completion_scores
from mlx_align.models.loading import ModelFolder, load_language_model
from mlx_align.models.selfcheck import random_batch

# Families whose tensors mlx-lm names and shapes as transformers does, and transformers' names for
# them; of each a tiny model was exported, loaded in transformers and scored the same to 1e-5
# (scripts/verify_classifiers.py). Gemma is not among them: mlx-lm runs its GELU by another formula.
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
    """What was written.

    Attributes:
        architecture: transformers' name of it.
        members: Heads that the one written is the mean of.
        score_gap: Largest difference, on random tokens, between the scores of the run and those
            of the fused weights.
        pad_token: What rows are padded with: a token that no row ends with, because transformers
            looks for the last token that is another one.
        reads_at: A sentence on where rows have to end.
    """

    architecture: str
    members: int
    score_gap: float
    pad_token: str
    reads_at: str


def export_reward_model(folder: ModelFolder, run: Path, output: Path) -> ExportReport:
    """Write the reward model of `run` in transformers' layout.

    Args:
        folder: The run's base model.
        run: Its run folder.
        output: Folder to write; must not hold a model yet.

    Raises:
        ConfigError: The output folder holds something.
        ModelError: The family has no such class in transformers, or the run does not fit.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output}: is not empty; name a new folder")
    family = FAMILIES.get(str(folder.config.get("model_type")))
    if family is None:
        raise ModelError(
            f"--model {folder.name}: {folder.config.get('model_type')} models can't be exported "
            f"(those can: {', '.join(FAMILIES)}); mlx-align score runs it here"
        )
    style = chat_style(folder.tokenizer)
    pad = _pad_token(folder, style)
    model = load_language_model(folder)
    put_run(model, run)
    tokens = random_batch(folder.vocab_size, pad=0)
    before = np.array(completion_scores(model.anatomy, tokens, shared=False)).mean(axis=1)
    fuse_layers(model, dequantize=True, on_layer=lambda: None)
    module = dequantize_model(model.module)
    after = np.array(completion_scores(dissect(module), tokens, shared=False)).mean(axis=1)

    weight = module.pop(HEAD_NAME).weight
    module.pop("lm_head", None)
    module["score"] = nn.Linear(weight.shape[1], 1, bias=False)
    module["score"].weight = weight.mean(axis=0, keepdims=True)
    config = _config(folder.config, module, f"{family}{SUFFIX}", pad)
    tokenizer = getattr(folder.tokenizer, "_tokenizer", folder.tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    with writing_folder(output) as partial, writing(output):
        save(partial, str(folder.path), module, folder.tokenizer, config, donate_model=False)
    return ExportReport(
        architecture=f"{family}{SUFFIX}",
        members=int(weight.shape[0]),
        score_gap=float(np.abs(after - before).max()),
        pad_token=str(tokenizer.pad_token),
        reads_at=_reads_at(style),
    )


def _config(base: dict[str, Any], module: nn.Module, architecture: str, pad: int) -> dict[str, Any]:
    quantized = ("quantization", "quantization_config")
    config = {key: value for key, value in base.items() if key not in quantized}
    # The head is float32 whatever the rest is.
    trunk = [w for name, w in tree_flatten(module.parameters()) if not name.startswith("score.")]
    dtype = next(str(w.dtype) for w in trunk if mx.issubdtype(w.dtype, mx.floating))
    rope = config.get("rope_parameters")
    theta = getattr(getattr(module, "args", None), "rope_theta", None)
    if isinstance(rope, dict) and "rope_theta" in rope and theta is not None:
        # What mlx-lm ran it with, which overlooks this entry in some families.
        config["rope_parameters"] = {**rope, "rope_theta": theta}
    return {
        **config,
        "architectures": [architecture],
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad,
        "torch_dtype": dtype.removeprefix("mlx.core."),
        "dtype": dtype.removeprefix("mlx.core."),
        MARK: AT_END_TOKEN,
    }


def _pad_token(folder: ModelFolder, style: ChatStyle) -> int:
    """A token to pad with that no row ends with.

    Raises:
        ModelError: There is none.
    """
    tokenizer = folder.tokenizer
    ends = {style.eos, *style.ending[:1], *tokenizer.eos_token_ids}
    for token in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id):
        if token is not None and token not in ends and token < folder.vocab_size:
            return int(token)
    raise ModelError(
        f"--model {folder.name}: its tokenizer has no token beside its end token that rows could "
        "be padded with; give it a pad token"
    )


def _reads_at(style: ChatStyle) -> str:
    if style.ending[1:]:
        behind = style.tokenizer.decode(list(style.ending[1:]))
        end = style.tokenizer.decode(list(style.ending[:1]))
        return (
            f"A row has to end at {end}: cut {behind!r}, which the chat template writes behind it, "
            "or the score is read there."
        )
    if style.ending:
        return "A row ends where the chat template ends."
    return "A row is prompt, completion and the end token, which has to be appended."
