"""A model ready for work: loaded, taken apart, and checked."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_align.models.adapters import cast_adapters
from mlx_align.models.classifiers import is_classifier, load_classifier
from mlx_align.models.compat import (
    Anatomy,
    dissect,
    load_tokenizer,
    load_weights,
    read_model_config,
    resolve_model_path,
    set_memory_limits,
)
from mlx_align.models.roles import Tree, acting_as
from mlx_align.models.selfcheck import check_paths


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder, its configuration and tokenizer: all that data preparation needs."""

    name: str
    path: Path
    config: dict[str, Any]
    tokenizer: Any

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary (text part of multimodal models)."""
        config = self.config.get("text_config", self.config)
        return int(config.get("vocab_size", self.config.get("vocab_size", 0)))


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model and the way its rows are run.

    Attributes:
        folder: Where it came from.
        anatomy: Trunk and head.
        shared: Whether completions share their prompt's keys and values; decided by the check
            at load, False for families that can't.
        check: What the check found, one line for people.
        adapter_dtype: What adapters are cast to where they compute; None for their own dtype.
    """

    folder: ModelFolder
    anatomy: Anatomy
    shared: bool
    check: str
    adapter_dtype: mx.Dtype | None = None

    @property
    def packs(self) -> bool:
        """Whether several groups may run in one row; decided by the check at load."""
        return self.anatomy.packs

    @property
    def module(self) -> nn.Module:
        """The mlx-lm model."""
        return self.anatomy.model

    def acting_as(self, tree: Tree) -> AbstractContextManager[None]:
        """Within the block, the model plays the role `tree`, computing in `adapter_dtype`.

        The one way to play a role: policy, reference and samples are then the same function of
        their trees.
        """
        return acting_as(self.module, cast_adapters(tree, self.adapter_dtype))


def open_model(path_or_name: str) -> ModelFolder:
    """Find a model and load its tokenizer, not its weights.

    Raises:
        ModelError: There is no such model, or its configuration or tokenizer is broken.
    """
    path = resolve_model_path(path_or_name)
    config = read_model_config(path)
    return ModelFolder(path_or_name, path, config, load_tokenizer(path, config))


def load_language_model(folder: ModelFolder) -> LanguageModel:
    """Load the weights and check the way through the model on random tokens.

    A sequence classifier with one label comes with its reward head.

    Raises:
        ModelError: mlx-lm can't load it, or no correct way through it was found.
    """
    set_memory_limits()
    if is_classifier(folder.config):
        dissected = dissect(load_classifier(folder.path, folder.config))
    else:
        dissected = dissect(load_weights(folder.path))
    anatomy, shared, check = check_paths(dissected, folder.vocab_size)
    return LanguageModel(folder, anatomy, shared, check)
