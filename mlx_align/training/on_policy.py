"""Training on the policy's own completions: from options to a run that is ready to train.

`prepare_on_policy` does everything that needs no weights: it checks options, reads prompts, and
finds the reward models. `OnPolicySetup.load` loads the model with the weights of all roles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_align.algorithms.base import OnPolicyMethod, chat_command
from mlx_align.config import DEFAULT_BATCH_SIZE, OnPolicyConfig, PPOConfig
from mlx_align.data.buckets import AnyShape, rollout_shapes
from mlx_align.data.columns import configure_data
from mlx_align.data.formats import read_prompts
from mlx_align.data.provenance import Lineage
from mlx_align.data.readers import Data, has_split
from mlx_align.data.splits import default_valid_fraction
from mlx_align.data.tokenization import PromptReport, tokenize_prompts
from mlx_align.data.transforms import split_validation
from mlx_align.errors import ConfigError
from mlx_align.inference.reward_model import (
    RewardModelSource,
    find_reward_model,
    load_reward_weights,
    open_reward_model,
)
from mlx_align.models.adapters import AdapterLayout, read_layout
from mlx_align.models.loading import ModelFolder
from mlx_align.models.policy import Policy, make_roles
from mlx_align.models.row_limits import check_rows
from mlx_align.models.weights import AdapterWeights
from mlx_align.planning.plan import RewardModelMemory, check_on_policy_fits
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
from mlx_align.tracking.run_dir import SUMMARY_FILE, append_samples, read_run_record
from mlx_align.training.defaults import describe_evaluated, resolve_on_policy
from mlx_align.training.on_policy_trainer import OnPolicyTrainer, RolloutEvaluation
from mlx_align.training.resume import fingerprints
from mlx_align.training.setup import (
    Setup,
    check_circular_run,
    describe_policy,
    describe_test_split,
    resolve_layout,
)
from mlx_align.types import PromptGroup, TokenizedGroup


@dataclass(frozen=True, kw_only=True)
class OnPolicySetup(Setup):
    """An on-policy run before its weights are loaded.

    Attributes:
        method: Makes the algorithm.
        config: The options, all resolved.
        train: Prompts to train on.
        valid: Held-out prompts.
        rewards: The rewards to train on, opened.
        held_out_rewards: Rewards that are only measured on held-out prompts; None for none.
        reward_models: The reward models, by the option that names them.
        shapes: Shapes of microbatches.
        demonstrations: Demonstrations for PPO-ptx; else empty.
    """

    method: OnPolicyMethod
    config: OnPolicyConfig
    train: list[Prompt]
    valid: list[Prompt]
    rewards: Rewards
    held_out_rewards: Rewards | None
    reward_models: Mapping[str, RewardModelSource]
    shapes: list[AnyShape]
    demonstrations: list[TokenizedGroup]

    def load(self, run: Path, console: Console) -> OnPolicyJob:
        """Load the model with the weights of all roles."""
        return OnPolicyJob(self, run, console)


def prepare_on_policy(
    method: OnPolicyMethod,
    config: OnPolicyConfig,
    folder: ModelFolder,
    stack: ExitStack,
    data: Data | None = None,
    rewards: Sequence[RewardSource] = (),
    eval_rewards: Sequence[RewardSource] = (),
    *,
    resume: bool = False,
) -> OnPolicySetup:
    """Check options, read and tokenise the prompts, import the rewards, and check the memory.

    Args:
        method: Makes the algorithm.
        config: The options as given; defaults that depend on the data are chosen here.
        folder: The base model.
        stack: Closes the rewards at the end of the run.
        data: The prompts, if they are not `config.data`.
        rewards: Reward functions in addition to `config.reward`.
        eval_rewards: Reward functions in addition to `config.eval_reward`.
        resume: Whether the options are those of an earlier run, in which all was chosen.

    Raises:
        ConfigError: An option is missing, wrong, or without effect; a reward can't be imported, or
            the data lacks a column that it needs.
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
    train, valid, report, title, fraction = read_prompt_splits(config, folder, data)
    chosen: list[str] = []
    val_batches, everyone = config.val_batches, len(valid)
    if not resume:
        config, chosen = resolve_on_policy(
            config, layout, len(train), len(valid), fraction, width=folder.hidden_size
        )
    valid = limit_held_out(valid, config)
    if val_batches is None:
        chosen += describe_evaluated(len(valid), everyone, "prompt")
    parts: dict[str, Sequence[TokenizedGroup]] = {
        "prompts": [prompt.tokens for prompt in train],
        "held-out prompts": [prompt.tokens for prompt in valid],
    }
    shown = [*parts["prompts"], *parts["held-out prompts"]]
    demonstrations: list[TokenizedGroup] = []
    if isinstance(config, PPOConfig) and config.ptx_data is not None:
        from mlx_align.algorithms.ppo import read_demonstrations

        demonstrations = read_demonstrations(config, folder.tokenizer)
        check_rows(folder, demonstrations)
        parts["demonstrations"] = demonstrations
    models = find_reward_models(config, folder)
    hashes = fingerprint_rewards(wanted, models.get("--reward-model"), "reward model", folder)
    if held_out is not None:
        hashes |= fingerprint_rewards(
            held_out, models.get("--eval-reward-model"), "held-out reward model", folder
        )
    lines, facts = describe_prompts(report, title, train, valid)
    lines += [*describe_test_split(config, data), *chosen]
    prompts = parts["prompts"], parts["held-out prompts"]
    memory = reward_model_memory(models.values(), folder, layout)
    fit = check_on_policy_fits(config, layout, folder, prompts, memory)
    config = replace(config, grad_checkpoint=fit.grad_checkpoint)
    made_of = fingerprints(method.command, config, folder.path, parts, hashes)
    judges = check_circular_run(config, made_of, recorded_judges(models.get("--reward-model")))
    facts |= judges
    if "circular" in judges:
        lines.append(f"! Circular: {judges['circular']}.")
    lines.append(fit.line)
    size = config.batch_size or DEFAULT_BATCH_SIZE
    texts = [prompt.text for prompt in (*train, *valid)]

    def opened(settings: RewardSettings) -> Rewards:
        one = stack.enter_context(Rewards(settings))
        one.check(texts)
        return one

    return OnPolicySetup(
        layout=layout,
        folder=folder,
        eval_examples=len(valid),
        method=method,
        config=config,
        train=train,
        valid=valid,
        rewards=opened(wanted),
        held_out_rewards=None if held_out is None else opened(held_out),
        reward_models=models,
        shapes=rollout_shapes(shown, config.max_completion_length, size),
        demonstrations=demonstrations,
        lines=["\n".join(lines)],
        facts=facts,
        made_of=made_of,
    )


def recorded_judges(reward: RewardModelSource | None) -> dict[str, Lineage]:
    """The judges that labelled the data of a reward model's run; {} if unknown."""
    if reward is None or reward.run is None or not (reward.run / SUMMARY_FILE).is_file():
        return {}
    found = read_run_record(reward.run).data_statistics.get("judges")
    if not isinstance(found, Mapping):
        return {}
    return {str(name): tuple(lineage) for name, lineage in found.items()}


def check_on_policy_options(config: OnPolicyConfig) -> None:
    """Check options that have no effect on, or break, training on the policy's own samples.

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
) -> tuple[list[Prompt], list[Prompt], PromptReport, str, float | None]:
    """Read training and held-out prompts.

    Returns:
        Training prompts, held-out prompts, a report on the training prompts, the description of
        the data's format, and the fraction that was held out (None with a valid split).
    """
    named: Any = config.data if data is None else data
    assert named is not None
    named = configure_data(named, config)
    groups, reading = read_prompts(named, "train", config.format)
    held_out: list[PromptGroup] = []
    fraction = None
    if has_split(named, "valid"):
        held_out, _ = read_prompts(named, "valid", config.format)
    else:
        fraction = config.valid_fraction
        fraction = default_valid_fraction(len(groups)) if fraction is None else fraction
        if fraction > 0:
            groups, held_out = split_validation(groups, fraction, config.seed)
    longest = config.max_prompt_length or config.max_seq_length - config.max_completion_length
    tokens, report = tokenize_prompts(groups, folder.tokenizer, longest, config.thinking)
    train = [Prompt(groups[i], one) for i, one in zip(report.indices, tokens, strict=True)]
    valid: list[Prompt] = []
    if held_out:
        tokens, seen = tokenize_prompts(held_out, folder.tokenizer, longest, config.thinking)
        valid = [
            Prompt(held_out[i], replace(one, text=held_out[i].prompt))
            for i, one in zip(seen.indices, tokens, strict=True)
        ]
    remarks = check_rows(
        folder,
        [prompt.tokens for prompt in (*train, *valid)],
        config.max_completion_length,
        source="the longest prompt with --max-completion-length",
    )
    report = replace(report, notes=(*report.notes, *remarks))
    return train, valid, report, reading.title, fraction


def limit_held_out(valid: list[Prompt], config: OnPolicyConfig) -> list[Prompt]:
    """The held-out prompts of an evaluation; the same ones every time."""
    if config.val_batches in (None, -1):
        return valid
    assert config.val_batches is not None
    wanted = config.val_batches * (config.batch_size or DEFAULT_BATCH_SIZE)
    if wanted >= len(valid):
        return valid
    order = np.random.default_rng(config.seed).permutation(len(valid))
    return [valid[i] for i in sorted(order[:wanted])]


def describe_prompts(
    report: PromptReport, title: str, train: Sequence[Prompt], valid: Sequence[Prompt]
) -> tuple[list[str], dict[str, Any]]:
    """Statistics of the prompts, as lines to show and as facts for the summary."""
    lengths = report.lengths
    lines = [
        f"Prompts read as {title}: {len(train):,} to train on, {len(valid):,} held out; tokens: "
        f"median {lengths['50']}, longest {lengths['100']}"
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
        "prompt_lengths": dict(lengths),
    }
    return lines, facts


def find_reward_models(config: OnPolicyConfig, folder: ModelFolder) -> dict[str, RewardModelSource]:
    """The run's reward models, by the option that names them.

    Raises:
        ModelError: A reward model doesn't exist, or can't be read.
    """
    named = {
        "--reward-model": config.reward_model,
        "--eval-reward-model": config.eval_reward_model,
    }
    return {
        option: find_reward_model(name, folder, option=option)
        for option, name in named.items()
        if name is not None
    }


def reward_model_memory(
    models: Iterable[RewardModelSource], folder: ModelFolder, layout: AdapterLayout
) -> RewardModelMemory:
    """What the reward models add to memory: adapters on the policy's base, or other bases.

    Args:
        models: The reward models.
        folder: The policy's base.
        layout: The policy's layout.
    """
    on_base, own_base = [], []
    for source in models:
        if source.run is not None and source.shares_base(folder, layout):
            on_base.append(read_layout(source.run))
        else:
            own_base.append(source.base.path)
    return RewardModelMemory(tuple(on_base), tuple(own_base))


class OnPolicyJob:
    """An on-policy run with its weights; see `setup.Job`."""

    def __init__(self, setup: OnPolicySetup, run: Path, console: Console) -> None:
        config = setup.config
        self._config, self._run, self._console = config, run, console
        collector, evaluation = load_collector(setup, console)
        self.policy = collector.policy
        algorithm = setup.method.make(config, collector)
        self.trainer = OnPolicyTrainer(algorithm, collector, evaluation, config, run)
        self.prompts = evaluation.groups[: config.samples]
        self.next_command = chat_command(setup.folder, run, config.thinking)

    def finish(
        self, weights: AdapterWeights, kept: int, samples: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Add the samples to those of training.

        Returns:
            The samples, and entries of the summary.
        """
        append_samples(self._run, samples)
        trainer, evaluation = self.trainer, self.trainer.evaluation
        return samples, {
            "shapes": [list(shape) for shape in trainer.collector.shapes],
            "best_step": 0 if trainer.start_is_best else trainer.best_step,
            "kl": evaluation.best_kl if kept == trainer.best_step else evaluation.last_kl,
            "learner": trainer.algorithm.state(),
        }

    def counts(self, groups: int) -> dict[str, int]:
        """Counts of the training data, for the summary."""
        return {"prompts": groups, "completions": groups * self._config.group_size}


def load_collector(
    setup: OnPolicySetup, console: Console
) -> tuple[RolloutCollector, RolloutEvaluation]:
    """Load the model with the weights of all roles, and the reward models.

    Args:
        setup: The run before its weights are loaded.
        console: Shows which models are loaded.

    Raises:
        ModelError: A model, adapter or run can't be used.
    """
    config, folder, layout = setup.config, setup.folder, setup.layout
    memory = reward_model_memory(setup.reward_models.values(), folder, layout)
    roles = make_roles(config, folder, layout, memory.adapters)
    model = roles.policy.model
    # Log-probs are those of the sampling distribution, at its temperature.
    model = replace(model, backbone=replace(model.backbone, temperature=config.temperature))
    policy = Policy(model, layout, roles.policy.start)
    console.note(describe_policy(policy))
    console.note("The reference is the policy as it starts; both share one base model.")

    def load_one(rewards: Rewards, option: str) -> AdapterWeights | None:
        source = setup.reward_models.get(option)
        score: CompletionScorer | None = None
        weights = None
        if source is not None:
            if source.run is not None and source.shares_base(folder, layout):
                weights = load_reward_weights(source.run, model, roles.fresh, roles.layout)
                score = AdapterRewardModel(model, weights, setup.shapes)
                where = "an adapter on the same base model"
            else:
                score = SeparateRewardModel(open_reward_model(source))
                where = "a second model in memory, with another base"
            console.note(f"{option} {source.name}: {where}.")
        rewards.score_model, rewards.note = score, console.note
        return weights

    reward_weights = load_one(setup.rewards, "--reward-model")
    if setup.held_out_rewards is not None:
        load_one(setup.held_out_rewards, "--eval-reward-model")
    collector = RolloutCollector(
        config,
        policy,
        reward_weights,
        setup.train,
        setup.shapes,
        MemoryLimit(),
        setup.rewards,
        setup.demonstrations,
    )
    return collector, RolloutEvaluation(collector, setup.valid, setup.held_out_rewards)
