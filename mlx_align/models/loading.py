"""Loading models: from a folder or the hub, with their tokenizer and adapters.

`open_model` finds the folder and loads the tokenizer, `load_language_model` loads the weights and
verifies the forward pass, `load_adapters` adds several adapters that take turns on one base model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as _load_tokenizer
from mlx_lm.utils import (
    _download,
    _get_classes,
    load_config,
    load_model,
    maybe_set_recommended_wired_limit,
)

from mlx_align.errors import ConfigError, ModelError
from mlx_align.models import forward, heads
from mlx_align.models.adapters import (
    cast_adapters,
    common_layout,
    install_adapters,
    load_adapter,
    read_layout,
    trained_dtypes,
)
from mlx_align.models.backbone import Backbone, split_backbone
from mlx_align.models.classifiers import first_line, head_problem, is_classifier, load_classifier
from mlx_align.models.model_config import (
    activation_of,
    block_count,
    check_config,
    hidden_size,
    length_limits,
    loading_options,
    normalize_config,
    unsupported_reason,
)
from mlx_align.models.patches import use_activation
from mlx_align.models.rotary import correct_rotations
from mlx_align.models.templates import limit_patterns, limit_template
from mlx_align.models.verification import verify_forward
from mlx_align.models.weights import AdapterWeights, tensor_shapes, use_adapter
from mlx_align.system.regular_files import irregular_file
from mlx_align.types import GroupBatch

# Freed buffers kept for reuse. Without a limit, every new padded length leaves its own behind.
CACHE_LIMIT_BYTES = 1 << 30


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder, configuration and tokenizer: all that data preparation needs.

    Attributes:
        name: The path or hub name as the user gave it.
        path: The local folder.
        config: The content of its config.json, under the names that mlx-lm reads too.
        tokenizer: mlx-lm's `TokenizerWrapper`.
    """

    name: str
    path: Path
    config: dict[str, Any]
    tokenizer: Any

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary (of the text part of multimodal models)."""
        config = self.config.get("text_config", self.config)
        return int(config.get("vocab_size", self.config.get("vocab_size", 0)))

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream (of the text part); 0 if it is not in the config."""
        return hidden_size(self.config)

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model was made for, tokens; None if not in its config."""
        config = self.config.get("text_config", self.config)
        found = config.get("max_position_embeddings")
        return found if isinstance(found, int) and found > 0 else None


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model, and what it computes for a batch with given adapter weights.

    The methods take the adapter weights as an argument. So policy, reference, reward model and
    critic are the same function of different weights, and gradients with respect to the weights
    can be computed. All methods take `grad_checkpoint`: keep only each block's inputs and recompute
    it in the backward pass. Shape letters: N completions, C completion positions.

    Attributes:
        folder: The folder of the model.
        backbone: The model, split into backbone and head.
        shared: Whether completions share their prompt's keys and values. Decided by the
            verification at load; False for families that can't.
        check: The verification's findings, one sentence for the user.
        adapter_dtype: Dtype that adapters compute in; None for the dtype they are stored in.
        trained_dtypes: Dtypes that the float32 masters of full fine-tuning compute in, by name; {}
            for adapters and for float32 models.
    """

    folder: ModelFolder
    backbone: Backbone
    shared: bool
    check: str
    adapter_dtype: mx.Dtype | None = None
    trained_dtypes: Mapping[str, mx.Dtype] = field(default_factory=dict)

    @property
    def packs(self) -> bool:
        """Whether several groups may be packed into one row; decided at load."""
        return self.backbone.packs

    @property
    def module(self) -> nn.Module:
        """The mlx-lm model."""
        return self.backbone.model

    def use_adapter(self, weights: AdapterWeights) -> AbstractContextManager[None]:
        """Within the block, the model holds `weights`, cast to `adapter_dtype`."""
        cast = cast_adapters(self._computing(weights), self.adapter_dtype)
        return use_adapter(self.module, cast)

    def hold(self, weights: AdapterWeights) -> None:
        """Put `weights` into the model permanently, cast to the dtypes they compute in."""
        self.module.update(self._computing(weights))

    def _computing(self, weights: AdapterWeights) -> AdapterWeights:
        if not self.trained_dtypes:
            return weights

        def cast(name: str, weight: mx.array) -> mx.array:
            return weight.astype(self.trained_dtypes.get(name, weight.dtype))

        result: AdapterWeights = tree_map_with_path(cast, weights)
        return result

    def token_logprobs(
        self, weights: AdapterWeights, batch: GroupBatch, *, grad_checkpoint: bool = False
    ) -> mx.array:
        """Log-probs (N, C) of the completions' tokens, float32 nats; 0 where the mask is false."""
        with self.use_adapter(weights):
            return forward.token_logprobs(
                self.backbone, batch, shared=self.shared, grad_checkpoint=grad_checkpoint
            )

    def token_logprobs_and_square_sums(
        self, weights: AdapterWeights, batch: GroupBatch, *, grad_checkpoint: bool = False
    ) -> tuple[mx.array, mx.array]:
        """Log-probs (N, C), and log Σ_v p_v² (N, C) at every token, without gradient; nats."""
        with self.use_adapter(weights):
            return forward.token_logprobs_and_square_sums(
                self.backbone, batch, shared=self.shared, grad_checkpoint=grad_checkpoint
            )

    def token_logprobs_and_entropies(
        self,
        weights: AdapterWeights,
        batch: GroupBatch,
        *,
        grad_checkpoint: bool = False,
        entropy_gradient: bool = True,
    ) -> tuple[mx.array, mx.array]:
        """Log-probs (N, C), and the entropy (N, C) at every token; nats.

        Without `entropy_gradient` the entropy has no gradient and costs less.
        """
        with self.use_adapter(weights):
            return forward.token_logprobs_and_entropies(
                self.backbone,
                batch,
                shared=self.shared,
                grad_checkpoint=grad_checkpoint,
                entropy_gradient=entropy_gradient,
            )

    def scores(
        self, weights: AdapterWeights, batch: GroupBatch, *, grad_checkpoint: bool = False
    ) -> mx.array:
        """Scores (N, members) float32 of the completions by the model's reward head."""
        with self.use_adapter(weights):
            return heads.completion_scores(
                self.backbone, batch, shared=self.shared, grad_checkpoint=grad_checkpoint
            )

    def values(
        self, weights: AdapterWeights, batch: GroupBatch, *, grad_checkpoint: bool = False
    ) -> mx.array:
        """Values (N, C) float32 before each completion token, by the model's value head."""
        with self.use_adapter(weights):
            return heads.token_values(
                self.backbone, batch, shared=self.shared, grad_checkpoint=grad_checkpoint
            )

    def token_logprobs_and_values(
        self,
        weights: AdapterWeights,
        batch: GroupBatch,
        *,
        value_gradient: mx.array,
        grad_checkpoint: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Log-probs and values (N, C) of a policy and a critic on one backbone, in one pass.

        The values' gradient reaches the backbone multiplied by `value_gradient`, 0 or 1.
        """
        with self.use_adapter(weights):
            return heads.token_logprobs_and_values(
                self.backbone,
                batch,
                value_gradient=value_gradient,
                shared=self.shared,
                grad_checkpoint=grad_checkpoint,
            )


# A model, without and with its weights


def open_model(path_or_name: str) -> ModelFolder:
    """Find a model and load its tokenizer, but not its weights.

    Args:
        path_or_name: A local folder, or a hub name (owner/name), which is downloaded.

    Raises:
        ModelError: There is no such model, or its configuration or tokenizer is broken.
    """
    path = resolve_model_path(path_or_name)
    if problem := irregular_file(path):
        raise ModelError(f"{path}: {problem}")
    config = read_model_config(path)
    return ModelFolder(path_or_name, path, config, load_tokenizer(path, config))


def load_language_model(folder: ModelFolder) -> LanguageModel:
    """Load a model's weights and verify its forward pass on random tokens.

    A sequence classifier with one label gets its reward head too.

    Raises:
        ModelError: mlx-lm can't load the model, or its forward pass can't be verified.
    """
    set_memory_limits()
    reason = unsupported_reason(folder.config)
    if reason:
        raise ModelError(f"{folder.path}: mlx-lm can't compute this model: {reason}")
    if is_classifier(folder.config):
        module = load_classifier(folder.path, folder.config)
    else:
        module = load_module(folder.path)
    try:
        notes = correct_rotations(module, folder.config)
    except ModelError as error:
        raise ModelError(f"{folder.path}: {error}") from error
    backbone, shared, check = verify_forward(split_backbone(module), folder.vocab_size)
    return LanguageModel(folder, backbone, shared, "; ".join([check, *notes]))


def resolve_model_path(path_or_name: str) -> Path:
    """The local folder of a model: the path itself, or a snapshot downloaded from the hub.

    Raises:
        ModelError: There is no such folder or hub model, or the download failed.
    """
    path = Path(path_or_name).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"--model {path_or_name}: has no config.json; expected the folder of a model"
            )
        return path
    looks_local = path_or_name.startswith((".", "/", "~")) or path_or_name.count("/") != 1
    if looks_local:
        raise ModelError(
            f"--model {path_or_name}: no such folder (a hub model is named owner/name)"
        )
    try:
        return Path(_download(path_or_name))
    except Exception as error:  # a dozen types, which all mean that the model is not available
        raise ModelError(
            f"--model {path_or_name}: no such folder, and it can't be downloaded from the hub "
            f"({first_line(error)})"
        ) from error


def read_model_config(path: Path) -> dict[str, Any]:
    """Read a model's config.json, with the end tokens of its generation config.

    Options are added under the names that mlx-lm reads (`normalize_config`).

    Raises:
        ModelError: It is missing, or not a JSON object with a `model_type`.
    """
    try:
        config: dict[str, Any] = load_config(path)
        if not isinstance(config, dict) or "model_type" not in config:
            raise ValueError("no model_type in it")
        check_config(config)
        config = normalize_config(config)
        # What reads nested values is tried once, so that a wrong type is found here.
        is_classifier(config), unsupported_reason(config), length_limits(config)
        return config
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        # Nested values of a wrong type are found when they are read.
        raise ModelError(
            f"{path / 'config.json'}, or generation_config.json: {first_line(error)}"
        ) from error


def load_tokenizer(path: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """Load the tokenizer of a model folder as mlx-lm wraps it. Never runs code from the folder.

    Its chat template, which is a program too, runs with limits; see `templates.py`.

    Raises:
        ModelError: It can't be loaded.
    """
    eos = config.get("eos_token_id")
    try:
        tokenizer = _load_tokenizer(
            path,
            # Explicit, because transformers would ask on a terminal.
            tokenizer_config_extra={"trust_remote_code": False},
            eos_token_ids=[eos] if isinstance(eos, int) else eos,
        )
        limit_template(tokenizer._tokenizer, path)
        limit_patterns(tokenizer._tokenizer, path)
        return tokenizer
    except Exception as error:  # transformers passes on the exceptions of several parsers
        raise ModelError(f"{path}: its tokenizer can't be loaded ({first_line(error)})") from error


def load_module(path: Path) -> nn.Module:
    """Load the mlx-lm model of a folder, with its weights in memory, in evaluation mode.

    Raises:
        ModelError: mlx-lm can't load it.
    """
    config = read_model_config(path)
    _check_blocks(path, config)
    try:
        model, _ = load_model(
            path, model_config=loading_options(config), get_model_classes=_model_classes
        )
    except (Exception, SystemExit) as error:  # mlx-lm raises KeyError, ValueError, … or exits
        reason = head_problem(path) or f"mlx-lm can't load this model ({first_line(error)})"
        raise ModelError(f"{path}: {reason}") from error
    if activation := activation_of(config):
        use_activation(model, activation)
    model.eval()
    return model


def _model_classes(config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's classes for `config`; the model's also reads tensors under transformers' names."""
    model_class, arguments = _get_classes(config)
    if (family := config.get("model_type")) not in _RENAMED:
        return model_class, arguments
    rename = _RENAMED[family]

    class Renamed(model_class):  # type: ignore[misc, valid-type]
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            found: dict[str, mx.array] = super().sanitize(rename(weights, config))
            return found

    return Renamed, arguments


def _gpt2_tensors(weights: dict[str, mx.array], config: Mapping[str, Any]) -> dict[str, mx.array]:
    """OpenAI's files have no prefix; what transformers saves has one, and may repeat the head."""
    plain = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    if config.get("tie_word_embeddings", True):
        plain.pop("lm_head.weight", None)
    return plain


def _gpt_oss_tensors(
    weights: dict[str, mx.array], _config: Mapping[str, Any]
) -> dict[str, mx.array]:
    """Experts in 16 or 32 bits, which transformers stores as (experts, inputs, outputs)."""
    found = {}
    for name, weight in weights.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[f"{name}.weight"] = weight.swapaxes(-1, -2)
        else:
            found[name] = weight
    return found


_RENAMED: dict[str, Callable[[dict[str, mx.array], Mapping[str, Any]], dict[str, mx.array]]] = {
    "gpt2": _gpt2_tensors,
    "gpt_oss": _gpt_oss_tensors,
}


def _check_blocks(path: Path, config: Mapping[str, Any]) -> None:
    """Compare the number of blocks with the weights; mlx-lm would build any number of them.

    Raises:
        ModelError: The weights have fewer, or a file of them is damaged.
    """
    names = [name for file in path.glob("model*.safetensors") for name in tensor_shapes(file)]
    numbers = [int(part) for name in names for part in name.split(".") if part.isdecimal()]
    claimed = block_count(config)
    if claimed is not None and names and claimed > max(numbers, default=-1) + 1:
        raise ModelError(
            f"{path / 'config.json'}: has {claimed} layers, but the weights have "
            f"{max(numbers, default=-1) + 1}"
        )


def set_memory_limits() -> None:
    """Limit mlx's buffer cache and, on Metal, keep the recommended working set resident."""
    mx.set_cache_limit(CACHE_LIMIT_BYTES)
    maybe_set_recommended_wired_limit()


# Several adapters on one model


def load_adapters(
    folder: ModelFolder, adapters: Sequence[Path | None]
) -> tuple[LanguageModel, list[AdapterWeights]]:
    """Load a model that generates text, and the weights of several adapters for it.

    Args:
        folder: The base model.
        adapters: Adapter folders; None for the base model without an adapter.

    Returns:
        The model, which holds no adapter, and the weights for `LanguageModel.use_adapter`.

    Raises:
        ModelError: The base can't be loaded or is a classifier, or an adapter does not belong to
            it or has no layout in common with the others.
    """
    layouts = [read_layout(path) for path in adapters if path is not None]
    layout = common_layout(layouts) if layouts else None
    if layouts and layout is None:
        names = " and ".join(str(path) for path in adapters if path is not None)
        raise ModelError(f"{names}: adapters of different types can't be used on one model")
    model = load_language_model(folder)
    if heads.REWARD_HEAD in model.module:
        raise ModelError(
            f"--model {folder.name}: is a sequence classifier, which generates no text; use the "
            "language model that it was made from"
        )
    if layout is None:
        model.module.freeze()
        return model, [{} for _ in adapters]
    loaded = []
    base: AdapterWeights | None = None
    for path in adapters:
        try:
            if base is None:
                base = install_adapters(model.module, layout)
                model = replace(model, trained_dtypes=trained_dtypes(model.module, layout))
            loaded.append(base if path is None else load_adapter(path, base, layout))
        except (ModelError, ConfigError) as error:
            raise ModelError(
                f"{path}: can't be used with --model {folder.name}; is that its base model? {error}"
            ) from error
    # Nothing is trained: the vocabulary head then runs as a frozen one, even if it has an adapter.
    model.module.freeze()
    model.module.eval()
    mx.eval(model.module.parameters(), loaded)
    return model, loaded
