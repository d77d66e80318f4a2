"""The policy: a model with adapters and the weights that training starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_align.config import RewardConfig, TrainConfig
from mlx_align.errors import ConfigError, ModelError
from mlx_align.models.adapters import (
    AdapterLayout,
    covering_layout,
    install_adapters,
    load_adapter,
    resolve_adapter_dtype,
    select_weights,
    trained_dtypes,
)
from mlx_align.models.heads import (
    REWARD_HEAD,
    add_reward_head,
    has_reward_head,
    read_reward_head,
)
from mlx_align.models.loading import LanguageModel, ModelFolder, load_language_model
from mlx_align.models.verification import verify_adapters, verify_gradient
from mlx_align.models.weights import AdapterWeights


class Policy(NamedTuple):
    """The model that is trained.

    Attributes:
        model: The base model with adapters installed.
        layout: The layout to train.
        start: The initial weights, which are also those of the reference model.
    """

    model: LanguageModel
    layout: AdapterLayout
    start: AdapterWeights


class Roles(NamedTuple):
    """A policy on a base model that has adapters for other roles too (reward model, critic).

    Attributes:
        policy: The policy.
        layout: The layout of the base model's adapters: all layers that any role adapts.
        fresh: The weights of those adapters as they were installed; they change nothing.
    """

    policy: Policy
    layout: AdapterLayout
    fresh: AdapterWeights


def make_policy(config: TrainConfig, folder: ModelFolder, layout: AdapterLayout) -> Policy:
    """Load the model and install adapters, with the weights of `--init-adapter` if given.

    Args:
        config: Options of the run.
        folder: The base model.
        layout: The layout to train.

    Raises:
        ModelError: The model or the init adapter can't be used.
        ConfigError: The layout does not fit the model.
    """
    return make_roles(config, folder, layout, []).policy


def make_roles(
    config: TrainConfig,
    folder: ModelFolder,
    layout: AdapterLayout,
    others: Sequence[AdapterLayout],
) -> Roles:
    """Like `make_policy`, for a base model that needs adapters for other roles too.

    Args:
        config: Options of the run.
        folder: The base model.
        layout: The layout to train.
        others: Layouts of the other roles.

    Raises:
        ModelError: The model or the init adapter can't be used.
        ConfigError: The layout does not fit the model.
    """
    init = None if config.init_adapter is None else Path(config.init_adapter)
    if init is not None and has_reward_head(init) and not isinstance(config, RewardConfig):
        raise ModelError(
            f"--init-adapter {init}: is a reward model, which generates no text; it can only start "
            "mlx-align reward"
        )
    model = load_language_model(folder)
    dtypes = {array.dtype for _, array in tree_flatten(model.module.parameters())}
    model = replace(model, adapter_dtype=resolve_adapter_dtype(config.adapter_dtype, dtypes))
    mx.random.seed(config.seed)
    covering = covering_layout(layout, others)
    fresh = install_adapters(model.module, covering)
    model = replace(model, trained_dtypes=trained_dtypes(model.module, covering))
    if mx.float16 in model.trained_dtypes.values():
        raise ConfigError(
            "--fine-tune-type full: the model is in float16, in which gradients below 6e-8 vanish "
            "and above 65,504 overflow; use lora or dora, or a bf16 model (mlx_lm.convert --dtype "
            "bfloat16)"
        )
    start = fresh if covering == layout else select_weights(fresh, layout)
    verify_adapters(model.backbone, folder.vocab_size)
    model = replace(model, backbone=verify_gradient(model.backbone, folder.vocab_size))
    if init is not None:
        start = load_adapter(init, start, layout)
        model.hold(start)
    if isinstance(config, RewardConfig):
        start = {**start, REWARD_HEAD: _initial_head(config, model)}
    elif REWARD_HEAD in model.module:
        raise ModelError(
            f"--model {folder.name}: is a sequence classifier, which generates no text; use it "
            "with mlx-align reward or mlx-align score"
        )
    return Roles(Policy(model, layout, start), covering, fresh)


def _initial_head(config: RewardConfig, model: LanguageModel) -> AdapterWeights:
    """Add a reward head: that of the init adapter or the base model, or a fresh one.

    Raises:
        ConfigError: Its number of members is not `--members`.
        ModelError: It does not fit the model.
    """
    weight, source = None, ""
    if REWARD_HEAD in model.module:
        weight, source = model.module[REWARD_HEAD].weight, f"--model {config.model}"
    if config.init_adapter is not None and has_reward_head(Path(config.init_adapter)):
        source = f"--init-adapter {config.init_adapter}"
        weight = read_reward_head(Path(config.init_adapter))
    if weight is not None and weight.shape[0] != config.members:
        raise ConfigError(
            f"--members {config.members}: {source} has a head with {weight.shape[0]} members; "
            f"give --members {weight.shape[0]}"
        )
    head: AdapterWeights = add_reward_head(
        model.backbone, weight, members=config.members
    ).parameters()
    return head
