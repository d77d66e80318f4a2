"""From options to everything a run needs before the weights are loaded, and the policy after it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from mlx_align.algorithms.base import Algorithm
from mlx_align.algorithms.ppo import read_demonstrations
from mlx_align.config import DEFAULT_BATCH_SIZE, OnPolicyConfig, PPOConfig, TrainConfig
from mlx_align.data.buckets import AnyShape, rollout_shapes
from mlx_align.data.formats import read_prompts
from mlx_align.data.readers import Data, has_split
from mlx_align.data.splits import GroupReader, read_splits
from mlx_align.data.statistics import TokenizedDataset, compute_statistics, render_statistics
from mlx_align.data.tokenization import PromptReport, tokenize_groups, tokenize_prompts
from mlx_align.data.transforms import split_validation
from mlx_align.errors import ConfigError, ModelError
from mlx_align.inference.reward_model import (
    find_reward_model,
    load_reward_weights,
    open_reward_model,
)
from mlx_align.models.adapters import AdapterLayout, read_layout
from mlx_align.models.heads import has_reward_head
from mlx_align.models.loading import ModelFolder, resolve_model_path
from mlx_align.models.policy import Policy, make_roles
from mlx_align.models.row_limits import check_rows
from mlx_align.models.weights import AdapterWeights
from mlx_align.planning.plan import RewardModelMemory, check_fits, check_on_policy_fits
from mlx_align.rollout.collector import RolloutCollector
from mlx_align.rollout.reward_functions import RewardSource
from mlx_align.rollout.reward_models import (
    AdapterRewardModel,
    CompletionScorer,
    SeparateRewardModel,
)
from mlx_align.rollout.rewards import (
    Rewards,
    RewardSettings,
    fingerprint_rewards,
    require_rewards,
    reward_settings,
)
from mlx_align.rollout.sampler import Prompt
from mlx_align.system.memory_limit import MemoryLimit
from mlx_align.system.progress import Console
from mlx_align.training.evaluation import RolloutEvaluation, held_out_groups
from mlx_align.training.resume import fingerprints
from mlx_align.types import TokenizedGroup


@dataclass(frozen=True)
class OfflineSetup:
    """An offline run before its weights are loaded.

    Attributes:
        layout: What is trained.
        folder: The base model.
        train: Groups to train on.
        valid: Held-out groups.
        held_out: The held-out groups of an evaluation.
        lines: To show.
        facts: Of the data, for the summary.
        made_of: Fingerprints of the run.
    """

    layout: AdapterLayout
    folder: ModelFolder
    train: list[TokenizedGroup]
    valid: list[TokenizedGroup]
    held_out: list[TokenizedGroup]
    lines: list[str]
    facts: dict[str, Any]
    made_of: dict[str, Any]


@dataclass(frozen=True)
class OnPolicySetup:
    """An on-policy run before its weights are loaded.

    Attributes:
        layout: What is trained.
        folder: The base model.
        train: Prompts to train on.
        valid: Held-out prompts.
        rewards: The rewards to train on.
        held_out_rewards: Rewards that are only measured on held-out prompts; None for none.
        shapes: Shapes of microbatches.
        demonstrations: For PPO-ptx; usually none.
        lines: To show.
        facts: Of the prompts, for the summary.
        made_of: Fingerprints of the run.
    """

    layout: AdapterLayout
    folder: ModelFolder
    train: list[Prompt]
    valid: list[Prompt]
    rewards: RewardSettings
    held_out_rewards: RewardSettings | None
    shapes: list[AnyShape]
    demonstrations: list[TokenizedGroup]
    lines: list[str]
    facts: dict[str, Any]
    made_of: dict[str, Any]


def prepare_offline(
    algorithm: Algorithm, config: TrainConfig, folder: ModelFolder, data: Data | None = None
) -> OfflineSetup:
    """Check options, read and tokenise the data, and check that the run fits the machine.

    Args:
        algorithm: Reads and checks the data.
        config: The resolved options.
        folder: The base model.
        data: The data, if it is not `config.data`.

    Raises:
        MlxAlignError: An option, the data or the memory doesn't fit.
    """
    layout = resolve_layout(config)
    dataset = prepare_data(config, folder, algorithm.read, data)
    remarks = algorithm.check(dataset)
    train, valid = algorithm.arrange(dataset.train), algorithm.arrange(dataset.valid)
    lines = ["\n".join([render_statistics(dataset.statistics), *remarks])]
    lines.append(check_fits(config, layout, folder, train))
    parts = {"training data": train, "held-out data": valid}
    return OfflineSetup(
        layout=layout,
        folder=folder,
        train=train,
        valid=valid,
        held_out=held_out_groups(valid, config),
        lines=lines,
        facts=asdict(dataset.statistics),
        made_of=fingerprints(algorithm.command, config, folder.path, parts),
    )


def prepare_data(
    config: TrainConfig, folder: ModelFolder, read: GroupReader, data: Data | None = None
) -> TokenizedDataset:
    """Read the data, split it if it has no valid split, tokenise it, and compute statistics.

    Args:
        config: Names the data and its limits.
        folder: Its tokenizer is used.
        read: (data, split, format) -> groups and how they were read.
        data: The data, if it is not `config.data`.

    Raises:
        DataError: The data can't be used; the message names file and line.
    """
    groups, held_out, reading = read_splits(config, read, data)
    tokenize = partial(
        tokenize_groups,
        tokenizer=folder.tokenizer,
        max_seq_length=config.max_seq_length,
        max_completion_length=config.max_completion_length,
    )
    train, report = tokenize(groups)
    valid = tokenize(held_out)[0] if held_out else []
    remarks = check_rows(folder, (*train, *valid))
    facts = compute_statistics(
        groups, train, report, folder.tokenizer, read_report=reading, valid=held_out
    )
    return TokenizedDataset(train, valid, replace(facts, notes=(*facts.notes, *remarks)))


def resolve_layout(config: TrainConfig) -> AdapterLayout:
    """What is trained: the options, else the init adapter's layout, else the defaults.

    Raises:
        ConfigError: The options leave no room for the init adapter.
        ModelError: The init adapter can't be read.
    """
    init = None if config.init_adapter is None else read_layout(Path(config.init_adapter))
    layout = init or AdapterLayout()
    if config.fine_tune_type is not None:
        layout = replace(layout, fine_tune_type=config.fine_tune_type)
    _refuse_without_effect(config, layout)
    if config.num_layers == 0:
        raise ConfigError("--num-layers 0: nothing would be trained; give 1 or more, or -1 for all")
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


def describe_policy(policy: Policy) -> str:
    """One line on what is trained."""
    layout = policy.layout
    trained = sum(array.size for _, array in tree_flatten(policy.start))
    kind = {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}[layout.fine_tune_type]
    rank = (
        "" if layout.fine_tune_type == "full" else f" rank {layout.rank}, scale {layout.scale:g},"
    )
    return f"{kind},{rank} {trained:,} parameters; {policy.model.check}."


def prepare_on_policy(
    command: str,
    config: OnPolicyConfig,
    folder: ModelFolder,
    data: Data | None = None,
    rewards: Sequence[RewardSource] = (),
    eval_rewards: Sequence[RewardSource] = (),
) -> OnPolicySetup:
    """Check options, read and tokenise the prompts, and check that the run fits the machine.

    Args:
        command: `ppo` or `grpo`.
        config: The resolved options.
        folder: The base model.
        data: The prompts, if they are not `config.data`.
        rewards: Reward functions in addition to `config.reward`.
        eval_rewards: Reward functions in addition to `config.eval_reward`.

    Raises:
        ConfigError: An option is missing, wrong, or without effect.
        DataError: The prompts can't be used; the message names file and line.
    """
    check_on_policy_options(config)
    layout = resolve_layout(config)
    functions = (*(config.reward or ()), *rewards)
    wanted = require_rewards(
        reward_settings(
            functions, config.reward_model, config.reward_model_weight, config.reward_timeout
        )
    )
    eval_functions = (*(config.eval_reward or ()), *eval_rewards)
    held_out = reward_settings(eval_functions, config.eval_reward_model, 1.0, config.reward_timeout)
    train, valid, report, title = read_prompt_splits(config, folder, data)
    parts: dict[str, Sequence[TokenizedGroup]] = {
        "prompts": [prompt.tokens for prompt in train],
        "held-out prompts": [prompt.tokens for prompt in valid],
    }
    shown = [*parts["prompts"], *parts["held-out prompts"]]
    demonstrations: list[TokenizedGroup] = []
    if isinstance(config, PPOConfig) and config.ptx_data is not None:
        demonstrations = read_demonstrations(config, folder.tokenizer)
        check_rows(folder, demonstrations)
        parts["demonstrations"] = demonstrations
    hashes = fingerprint_rewards(wanted, "reward model", folder)
    if held_out is not None:
        hashes |= fingerprint_rewards(held_out, "held-out reward model", folder)
    lines, facts = _describe_prompts(report, title, train, valid)
    made_of = fingerprints(command, config, folder.path, parts, hashes)
    prompts = parts["prompts"], parts["held-out prompts"]
    models = find_reward_models(config, folder, layout)
    lines.append(check_on_policy_fits(config, layout, folder, prompts, models))
    size = config.batch_size or DEFAULT_BATCH_SIZE
    return OnPolicySetup(
        layout=layout,
        folder=folder,
        train=train,
        valid=valid,
        rewards=wanted,
        held_out_rewards=held_out,
        shapes=rollout_shapes(shown, config.max_completion_length, size),
        demonstrations=demonstrations,
        lines=["\n".join(lines)],
        facts=facts,
        made_of=made_of,
    )


def check_on_policy_options(config: OnPolicyConfig) -> None:
    """Refuse options that have no effect on, or break, training on the policy's own samples.

    Raises:
        ConfigError: Such an option was given.
    """
    if config.batch_tokens is not None:
        raise ConfigError(
            "--batch-tokens can't be used here: a rollout batch is formed before its completions "
            "are sampled; give --batch-size"
        )
    if config.lora_dropout:
        raise ConfigError(
            f"--lora-dropout {config.lora_dropout:g}: the policy that is trained would differ from "
            "the one that sampled; leave it out"
        )
    if config.reward_model is None and config.reward_model_weight != 1.0:
        raise ConfigError(
            f"--reward-model-weight {config.reward_model_weight:g} needs --reward-model"
        )
    longest = config.max_seq_length - config.max_completion_length
    if config.max_prompt_length is None and longest < 1:
        raise ConfigError(
            f"--max-completion-length {config.max_completion_length}: leaves no room for a prompt "
            f"in --max-seq-length {config.max_seq_length}; lower one or raise the other"
        )


def read_prompt_splits(
    config: OnPolicyConfig, folder: ModelFolder, data: Data | None = None
) -> tuple[list[Prompt], list[Prompt], PromptReport, str]:
    """Training and held-out prompts, a report on the former, and how they were read."""
    named: Any = config.data if data is None else data
    assert named is not None
    groups, reading = read_prompts(named, "train", config.format)
    if has_split(named, "valid"):
        held_out, _ = read_prompts(named, "valid", config.format)
    elif config.valid_fraction > 0:
        groups, held_out = split_validation(groups, config.valid_fraction, config.seed)
    else:
        held_out = []
    longest = config.max_prompt_length or config.max_seq_length - config.max_completion_length
    tokens, report = tokenize_prompts(groups, folder.tokenizer, longest)
    train = [Prompt(groups[i], one) for i, one in zip(report.indices, tokens, strict=True)]
    valid: list[Prompt] = []
    if held_out:
        tokens, seen = tokenize_prompts(held_out, folder.tokenizer, longest)
        valid = [Prompt(held_out[i], one) for i, one in zip(seen.indices, tokens, strict=True)]
    every = [prompt.tokens for prompt in (*train, *valid)]
    remarks = check_rows(
        folder,
        every,
        config.max_completion_length,
        source="the longest prompt with --max-completion-length",
    )
    report = replace(report, notes=(*report.notes, *remarks))
    wanted = config.val_batches * (config.batch_size or DEFAULT_BATCH_SIZE)
    if config.val_batches >= 0 and wanted < len(valid):
        order = np.random.default_rng(config.seed).permutation(len(valid))
        valid = [valid[i] for i in sorted(order[:wanted])]
    return train, valid, report, reading.title


def _describe_prompts(
    report: PromptReport, title: str, train: Sequence[Prompt], valid: Sequence[Prompt]
) -> tuple[list[str], dict[str, Any]]:
    """Lines on the prompts, and the same as facts."""
    at = report.lengths
    lines = [
        f"Prompts read as {title}: {len(train):,} to train on, {len(valid):,} held out; tokens: "
        f"median {at['50']}, longest {at['100']}"
    ]
    dropped = sum(report.dropped.values())
    if dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        lines.append(f"! {dropped:,} prompts dropped: {reasons}")
    if not valid:
        lines.append("! nothing is held out: progress on new prompts will not be measured")
    lines += [f"! {note}" for note in report.notes]
    facts = {
        "read_as": title,
        "prompts": len(train),
        "held_out": len(valid),
        "dropped": dict(report.dropped),
        "prompt_lengths": dict(at),
    }
    return lines, facts


def find_reward_models(
    config: OnPolicyConfig, folder: ModelFolder, layout: AdapterLayout
) -> RewardModelMemory:
    """The run's reward models: on the policy's base, or on a base of their own.

    Raises:
        ModelError: A reward model doesn't exist, or can't be read.
    """
    on_base, own_base = [], []
    for option in ("reward_model", "eval_reward_model"):
        name = getattr(config, option)
        if name is None:
            continue
        run = Path(name).expanduser()
        try:
            if not has_reward_head(run):
                own_base.append(resolve_model_path(name))
                continue
            source = find_reward_model(run, folder)
            if source.shares_base(folder, layout):
                on_base.append(read_layout(run))
            else:
                own_base.append(source.base.path)
        except ModelError as error:
            flag = "--" + option.replace("_", "-")
            raise ModelError(
                f"{flag} {name}: neither a run of mlx-align reward whose base exists, nor a model"
            ) from error
    return RewardModelMemory(tuple(on_base), tuple(own_base))


def load_collector(
    config: OnPolicyConfig, setup: OnPolicySetup, stack: ExitStack, console: Console
) -> tuple[RolloutCollector, RolloutEvaluation]:
    """Load the model with the weights of all roles, and open the rewards.

    Args:
        config: The options.
        setup: The run before its weights are loaded.
        stack: Closes the rewards at the end of the run.
        console: Shows which model plays which role.

    Raises:
        ModelError: A model, adapter or run can't be used.
        ConfigError: A reward can't be opened, or the data lacks a field it needs.
    """
    folder = setup.folder
    others = [
        Path(wanted.model).expanduser()
        for wanted in (setup.rewards, setup.held_out_rewards)
        if wanted is not None and wanted.model is not None and _is_on_base(wanted, setup)
    ]
    roles = make_roles(config, folder, setup.layout, [read_layout(run) for run in others])
    model = roles.policy.model
    # Log-probs are those of the sampling distribution, at its temperature.
    model = replace(model, backbone=replace(model.backbone, temperature=config.temperature))
    policy = Policy(model, setup.layout, roles.policy.start)
    console.note(describe_policy(policy))
    console.note("The reference is the policy as it starts; both share one base model.")

    def open_one(wanted: RewardSettings, option: str) -> tuple[Rewards, AdapterWeights | None]:
        score, weights = _score_model(wanted, policy, roles.fresh, roles.layout, setup)
        if wanted.model is not None:
            where = (
                "an adapter on the same base model"
                if weights is not None
                else "a second model in memory, with a base of its own"
            )
            console.note(f"{option} {wanted.model}: {where}.")
        rewards = stack.enter_context(Rewards(wanted, score))
        rewards.check([prompt.text for prompt in (*setup.train, *setup.valid)])
        return rewards, weights

    rewards, reward_weights = open_one(setup.rewards, "--reward-model")
    held_out = None
    if setup.held_out_rewards is not None:
        held_out = open_one(setup.held_out_rewards, "--eval-reward-model")[0]
    collector = RolloutCollector(
        config,
        policy,
        reward_weights,
        setup.train,
        setup.shapes,
        MemoryLimit(),
        rewards,
        setup.demonstrations,
    )
    return collector, RolloutEvaluation(collector, setup.valid, held_out)


def _is_on_base(wanted: RewardSettings, setup: OnPolicySetup) -> bool:
    run = Path(wanted.model or "").expanduser()
    if not has_reward_head(run):
        return False
    return find_reward_model(run, setup.folder).shares_base(setup.folder, setup.layout)


def _score_model(
    wanted: RewardSettings,
    policy: Policy,
    fresh: AdapterWeights,
    layout: AdapterLayout,
    setup: OnPolicySetup,
) -> tuple[CompletionScorer | None, AdapterWeights | None]:
    """A function that scores by the reward model, and its weights if it is on the same base."""
    if wanted.model is None:
        return None, None
    run = Path(wanted.model).expanduser()
    if not _is_on_base(wanted, setup):
        return SeparateRewardModel(open_reward_model(wanted.model)), None
    weights = load_reward_weights(run, policy.model, fresh, layout)
    return AdapterRewardModel(policy.model, weights, setup.shapes), weights
