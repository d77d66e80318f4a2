"""Reward models from the hub: transformers' sequence classifiers with one label.

Such a folder holds a language model with a linear layer `score` in place of the vocabulary head.
The score is read at the last token that is not padding. transformers finds that token by its id, so
it skips the end token too where pad and end token are the same. Rows are shortened accordingly
before they run, so that scores can be read by length.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_model
from transformers import AutoConfig

from mlx_align.errors import ModelError
from mlx_align.models.heads import REWARD_HEAD, RewardHead
from mlx_align.models.model_config import activation_of, loading_options
from mlx_align.models.patches import use_activation

SUFFIX = "ForSequenceClassification"
SCORE = "score.weight"
# First parts of the names of heads that are not one linear layer.
_VALUE_HEADS = ("v_head.", "value_head.")
_OTHER_HEADS = ("score.", "reward_head.", "regression_head.", "classifier.", "head.")
VOCABULARY, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Key and value in the config.json that `mlx-align reward export` writes: scores are read at the end
# token, without the tokens that the chat template appends to it.
READS_AT = "mlx_align_reads_at"
AT_END_TOKEN = "end_token"


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a model's configuration is that of a sequence classifier."""
    return any(str(name).endswith(SUFFIX) for name in config.get("architectures") or ())


def load_classifier(path: Path, config: Mapping[str, Any]) -> nn.Module:
    """Load a classifier as a language model with a reward head, in evaluation mode.

    The folder has no vocabulary head. The model gets the embedding in its place, which scores
    don't use.

    Raises:
        ModelError: It has more than one label, no `score` or another head than a linear layer, or
            tensors are missing or unknown.
    """
    labels = config.get("num_labels") or len(config.get("id2label") or {"LABEL_0": 0})
    if labels != 1:
        raise ModelError(
            f"{path}: a classifier with {labels} labels; a reward model has one, so use a model "
            "trained with num_labels=1"
        )
    reason = head_problem(path)
    if reason:
        raise ModelError(f"{path}: {reason}")
    head: dict[str, mx.array] = {}
    try:
        model, _ = load_model(
            path,
            model_config={**loading_options(config), "tie_word_embeddings": True},
            get_model_classes=lambda config: _without_score(config, head),
        )
    except Exception as error:  # mlx-lm raises KeyError, ValueError, TypeError … for bad folders
        raise ModelError(f"{path}: mlx-lm can't load this model ({first_line(error)})") from error
    weight = head.get(SCORE)
    if weight is None or weight.ndim != 2 or weight.shape[0] != 1:
        found = "no such tensor" if weight is None else f"shape {weight.shape}"
        raise ModelError(f"{path}: {SCORE}: {found}, expected one row of the hidden size")
    module = RewardHead(weight.shape[1])
    module.weight = weight.astype(mx.float32)
    mx.eval(module.parameters())
    model[REWARD_HEAD] = module
    if activation := activation_of(config):
        use_activation(model, activation)
    model.eval()
    return model


def head_problem(path: Path) -> str:
    """Why the head in a folder's weights can't be read, naming its tensors; "" if it can."""
    names: set[str] = set()
    for file in sorted(path.glob("model*.safetensors")):
        try:
            tensors: Any = mx.load(str(file))  # lazy: only the header is read
            names.update(tensors)
        except Exception:  # damaged: refused with its own words when it is loaded
            return ""
    value = sorted(name for name in names if name.startswith(_VALUE_HEADS))
    if value:
        return (
            f"it has a value head ({', '.join(value[:3])}), as TRL saves policies of PPO; a model "
            "is read without one: remove these tensors, or save the policy alone"
        )
    head = sorted(name for name in names if name.startswith(_OTHER_HEADS) and name != SCORE)
    if head == ["score.bias"]:
        return (
            "score.bias: its head has a bias, which is not read; scores without it differ by a "
            "constant only, so the tensor can be removed"
        )
    if head:
        return (
            f"its head is no single linear layer ({', '.join(head[:3])}); only {SCORE} with one "
            "row is read"
        )
    return ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the first of a list that follows it."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].rstrip().endswith(":"):
        # mlx-lm lists parameters, one a line, after such a line.
        lines[0] = f"{lines[0].rstrip()} {lines[1].strip().rstrip(',.')} …"
    return lines[0][:200] if lines else type(error).__name__


def padding_id(path: Path, config: Mapping[str, Any]) -> int | None:
    """The token id that transformers treats as padding with this model.

    If config.json does not say, it is the default of the configuration's class (0 for Gemma).
    """
    pad = config.get("pad_token_id")
    if "pad_token_id" not in config:
        try:
            pad = AutoConfig.from_pretrained(path).get_text_config().pad_token_id
        except Exception:  # a family that transformers does not know: no padding id
            pad = None
    return pad if isinstance(pad, int) else None


def _without_score(config: dict[str, Any], head: dict[str, mx.array]) -> tuple[type, type]:
    """mlx-lm's classes for `config`; the model's moves `score` from its weights into `head`."""
    model_class, arguments = _get_classes(config)

    class WithoutScore(model_class):  # type: ignore[misc, valid-type]
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            rest = dict(weights)
            if SCORE in rest:
                head[SCORE] = rest.pop(SCORE)
            if hasattr(model_class, "sanitize"):
                rest = super().sanitize(rest)
            own = {name for name, _ in tree_flatten(self.parameters())}
            if VOCABULARY in own and VOCABULARY not in rest and EMBEDDING in rest:
                rest[VOCABULARY] = rest[EMBEDDING]
            return rest

    return WithoutScore, arguments
