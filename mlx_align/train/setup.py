"""From options to what a run works with: tokenised data, and a policy with its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_align.config import RewardConfig, TrainConfig
from mlx_align.data.checks import DataFacts, describe
from mlx_align.data.splits import Reader, read_splits
from mlx_align.data.tokenize import tokenize_groups
from mlx_align.errors import ConfigError, ModelError
from mlx_align.models.adapters import (
    AdapterLayout,
    compute_dtype,
    covering,
    install,
    load_tree,
    part_within,
    read_layout,
)
from mlx_align.models.heads import HEAD_NAME, has_head, put_head, read_head
from mlx_align.models.loading import LanguageModel, ModelFolder, load_language_model
from mlx_align.models.roles import Tree
from mlx_align.models.selfcheck import check_adapted
from mlx_align.types import TokenizedGroup


class PreparedData(NamedTuple):
    """Tokenised data of a run, and what is to be known about it."""

    train: list[TokenizedGroup]
    valid: list[TokenizedGroup]
    facts: DataFacts


class Policy(NamedTuple):
    """A model with adapters in it, and the tree they start from, which is the reference."""

    model: LanguageModel
    layout: AdapterLayout
    start: Tree


def prepare_data(config: TrainConfig, folder: ModelFolder, read: Reader) -> PreparedData:
    """Read, split where the data has no valid split, tokenise, and count.

    Args:
        config: Names the data and its limits.
        folder: Whose tokenizer to use.
        read: (data, split, format) -> groups and how they were read.

    Raises:
        DataError: The data can't be used; the text names file and line.
    """
    groups, held_out, reading = read_splits(config, read)
    tokenize = partial(
        tokenize_groups,
        tokenizer=folder.tokenizer,
        max_seq_length=config.max_seq_length,
        max_completion_length=config.max_completion_length,
    )
    train, report = tokenize(groups)
    valid = tokenize(held_out)[0] if held_out else []
    facts = describe(groups, train, report, folder.tokenizer, reading=reading, valid=held_out)
    return PreparedData(train, valid, facts)


def resolve_layout(config: TrainConfig) -> AdapterLayout:
    """What is trained: as asked, else as the init adapter has it, else the defaults.

    Raises:
        ConfigError: What was asked can't hold the init adapter.
        ModelError: The init adapter can't be read.
    """
    init = None if config.init_adapter is None else read_layout(Path(config.init_adapter))
    layout = init or AdapterLayout()
    if config.fine_tune_type is not None:
        layout = replace(layout, fine_tune_type=config.fine_tune_type)
    _refuse_without_effect(config, layout)
    rank = config.lora_rank or layout.rank
    if init is not None and rank < init.rank:
        raise ConfigError(
            f"--lora-rank {rank}: the init adapter has rank {init.rank}; give that or more"
        )
    if config.lora_alpha is not None:
        scale = config.lora_alpha / rank
    else:
        scale = layout.scale if init is not None else AdapterLayout().scale
    return AdapterLayout(
        fine_tune_type=layout.fine_tune_type,
        rank=rank,
        scale=scale,
        dropout=config.lora_dropout,
        num_layers=layout.num_layers if config.num_layers is None else config.num_layers,
        keys=layout.keys if config.lora_keys is None else config.lora_keys,
    )


def _refuse_without_effect(config: TrainConfig, layout: AdapterLayout) -> None:
    if layout.fine_tune_type != "lora" and config.adapter_dtype != "float32":
        why = "trains no adapters" if layout.fine_tune_type == "full" else "needs float32 norms"
        raise ConfigError(
            f"--adapter-dtype {config.adapter_dtype}: --fine-tune-type {layout.fine_tune_type} "
            f"{why}; leave it out"
        )
    if layout.fine_tune_type != "full":
        return
    for name in ("lora_rank", "lora_alpha", "lora_keys", "lora_dropout"):
        if getattr(config, name):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag}: has no effect on --fine-tune-type full; leave it out")


class Roles(NamedTuple):
    """A policy, and what other roles on its base are made from.

    Attributes:
        policy: The policy.
        layout: Where the base has adapters: wherever one of the roles has some.
        fresh: Those adapters as they were made, the identity.
    """

    policy: Policy
    layout: AdapterLayout
    fresh: Tree


def make_policy(config: TrainConfig, folder: ModelFolder, layout: AdapterLayout) -> Policy:
    """Load the model, put adapters in, and fill them from the init adapter if there is one.

    Raises as `make_roles` does.
    """
    return make_roles(config, folder, layout, []).policy


def make_roles(
    config: TrainConfig,
    folder: ModelFolder,
    layout: AdapterLayout,
    others: Sequence[AdapterLayout],
) -> Roles:
    """A policy, on a base with adapters also wherever the layouts of other roles have some.

    Raises:
        ModelError: The model or the init adapter can't be used.
        ConfigError: The layout does not fit the model.
    """
    init = None if config.init_adapter is None else Path(config.init_adapter)
    if init is not None and has_head(init) and not isinstance(config, RewardConfig):
        raise ModelError(
            f"--init-adapter {init}: a reward model's, which writes no text; it can start "
            "mlx-align reward"
        )
    model = load_language_model(folder)
    dtypes = {array.dtype for _, array in tree_flatten(model.module.parameters())}
    model = replace(model, adapter_dtype=compute_dtype(config.adapter_dtype, dtypes))
    mx.random.seed(config.seed)
    everywhere = covering(layout, others)
    fresh = install(model.module, everywhere)
    start = fresh if everywhere == layout else part_within(model.module, fresh, layout)
    check_adapted(model.anatomy, folder.vocab_size)
    if init is not None:
        start = load_tree(init, start, layout)
        model.module.update(start)
    if isinstance(config, RewardConfig):
        start = {**start, HEAD_NAME: _start_head(config, model)}
    elif HEAD_NAME in model.module:
        raise ModelError(
            f"--model {folder.name}: a sequence classifier, which writes no text; it can be the "
            "model of mlx-align reward and of mlx-align score"
        )
    return Roles(Policy(model, layout, start), everywhere, fresh)


def say_policy(policy: Policy, layout: AdapterLayout) -> str:
    """What is trained, in words."""
    trained = sum(array.size for _, array in tree_flatten(policy.start))
    kind = {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}[layout.fine_tune_type]
    rank = (
        "" if layout.fine_tune_type == "full" else f" rank {layout.rank}, scale {layout.scale:g},"
    )
    return f"{kind},{rank} {trained:,} parameters; {policy.model.check}."


def _start_head(config: RewardConfig, model: LanguageModel) -> Tree:
    """The head a reward model starts from: that of its init adapter or base, or a fresh one.

    Raises:
        ConfigError: It has another number of members than was asked for.
        ModelError: It does not fit the model.
    """
    weight, where = None, ""
    if HEAD_NAME in model.module:
        weight, where = model.module[HEAD_NAME].weight, f"--model {config.model}"
    if config.init_adapter is not None and has_head(Path(config.init_adapter)):
        where = f"--init-adapter {config.init_adapter}"
        weight = read_head(Path(config.init_adapter))
    if weight is not None and weight.shape[0] != config.members:
        raise ConfigError(
            f"--members {config.members}: {where} has a head of {weight.shape[0]}; give that"
        )
    head: Tree = put_head(model.anatomy, weight, members=config.members).parameters()
    return head
