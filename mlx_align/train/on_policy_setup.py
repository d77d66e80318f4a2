"""From options to what an on-policy run works with: prompts, roles on one base, rewards."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_align.config import DEFAULT_BATCH_SIZE, OnPolicyConfig, PpoConfig
from mlx_align.data.formats import read_prompts
from mlx_align.data.groups import split_validation
from mlx_align.data.prompts import PromptReport, tokenize_prompts
from mlx_align.data.shapes import AnyShape, rollout_shapes
from mlx_align.data.sources import has_split
from mlx_align.errors import ConfigError
from mlx_align.models.adapters import AdapterLayout, read_layout
from mlx_align.models.heads import has_head
from mlx_align.models.loading import ModelFolder
from mlx_align.models.roles import Tree
from mlx_align.rollout.experience import Prompt
from mlx_align.train.demonstrations import read_demonstrations
from mlx_align.train.display import Display
from mlx_align.train.fingerprints import fingerprints
from mlx_align.train.heldout_rewards import HeldOut
from mlx_align.train.judging import (
    Judge,
    ScoreModel,
    Wanted,
    apart,
    fingerprint_rewards,
    open_second_model,
    require_rewards,
    reward_tree,
    same_base,
    swapped,
    wanted_rewards,
)
from mlx_align.train.planned import check_memory
from mlx_align.train.run_ahead import RunAhead
from mlx_align.train.setup import Policy, make_roles, resolve_layout, say_policy
from mlx_align.train.workplace import Workplace
from mlx_align.types import TokenizedGroup


@dataclass(frozen=True)
class Prepared:
    """What is known before the weights are loaded.

    Attributes:
        train: Prompts to train on.
        valid: Held-out prompts.
        layout: What is trained.
        rewards: What is optimised.
        looked_at: What is only looked at; None for nothing.
        shapes: Of microbatches.
        lines: To show.
        facts: For the summary.
        made_of: Fingerprints, by which a run is known again.
        demonstrations: To learn from beside the prompts; as a rule none.
    """

    train: list[Prompt]
    valid: list[Prompt]
    layout: AdapterLayout
    rewards: Wanted
    looked_at: Wanted | None
    shapes: list[AnyShape]
    lines: list[str]
    facts: dict[str, Any]
    made_of: dict[str, Any]
    demonstrations: list[TokenizedGroup]


def prepare_on_policy(command: str, config: OnPolicyConfig, folder: ModelFolder) -> Prepared:
    """Check options, read and tokenise the prompts.

    Raises:
        ConfigError: An option is missing, wrong, or without effect.
        DataError: The prompts can't be used; the text names file and line.
    """
    check_shared_options(config)
    layout = resolve_layout(config)
    rewards = require_rewards(
        wanted_rewards(
            config.reward, config.reward_model, config.reward_model_weight, config.reward_timeout
        )
    )
    looked_at = wanted_rewards(
        config.eval_reward, config.eval_reward_model, 1.0, config.reward_timeout
    )
    train, valid, report, title = read_run_prompts(config, folder)
    shown = [prompt.tokens for prompt in (*train, *valid)]
    size = config.batch_size or DEFAULT_BATCH_SIZE
    data = {"prompts": [p.tokens for p in train], "held-out prompts": [p.tokens for p in valid]}
    shown_to_learn: list[TokenizedGroup] = []
    if isinstance(config, PpoConfig) and config.ptx_data is not None:
        shown_to_learn = read_demonstrations(config, folder.tokenizer)
        data["demonstrations"] = shown_to_learn
    judges = fingerprint_rewards(rewards, "reward model", folder)
    if looked_at is not None:
        judges |= fingerprint_rewards(looked_at, "held-out reward model", folder)
    made_of = fingerprints(command, config, folder.path, data, judges)
    lines, facts = _say_prompts(report, title, train, valid)
    parts = [p.tokens for p in train], [p.tokens for p in valid]
    lines.append(check_memory(config, folder, layout, *parts))
    return Prepared(
        train,
        valid,
        layout,
        rewards,
        looked_at,
        rollout_shapes(shown, config.max_completion_length, size),
        lines,
        facts,
        made_of,
        shown_to_learn,
    )


def check_shared_options(config: OnPolicyConfig) -> None:
    """Refuse what has no effect on a run that trains on its own samples, or breaks it.

    Raises:
        ConfigError: Such an option was given.
    """
    if config.batch_tokens is not None:
        raise ConfigError(
            "--batch-tokens: completions are not there yet when a rollout batch is made up; give "
            "--batch-size"
        )
    if config.lora_dropout:
        raise ConfigError(
            f"--lora-dropout {config.lora_dropout:g}: the policy that learns would not be the one "
            "that sampled; leave it out"
        )
    if config.reward_model is None and config.reward_model_weight != 1.0:
        raise ConfigError(
            f"--reward-model-weight {config.reward_model_weight:g}: there is no --reward-model"
        )
    longest = config.max_seq_length - config.max_completion_length
    if config.max_prompt_length is None and longest < 1:
        raise ConfigError(
            f"--max-completion-length {config.max_completion_length}: leaves no room for a prompt "
            f"in --max-seq-length {config.max_seq_length}; make one longer or the other shorter"
        )


def read_run_prompts(
    config: OnPolicyConfig, folder: ModelFolder
) -> tuple[list[Prompt], list[Prompt], PromptReport, str]:
    """Prompts to train on and held-out ones, what became of the former, how they were read."""
    assert config.data is not None
    groups, reading = read_prompts(config.data, "train", config.format)
    if has_split(config.data, "valid"):
        held_out, _ = read_prompts(config.data, "valid", config.format)
    elif config.valid_fraction > 0:
        groups, held_out = split_validation(groups, config.valid_fraction, config.seed)
    else:
        held_out = []
    longest = config.max_prompt_length or config.max_seq_length - config.max_completion_length
    tokens, report = tokenize_prompts(groups, folder.tokenizer, longest)
    train = [Prompt(groups[i], one) for i, one in zip(report.places, tokens, strict=True)]
    valid: list[Prompt] = []
    if held_out:
        tokens, seen = tokenize_prompts(held_out, folder.tokenizer, longest)
        valid = [Prompt(held_out[i], one) for i, one in zip(seen.places, tokens, strict=True)]
    wanted = config.val_batches * (config.batch_size or DEFAULT_BATCH_SIZE)
    if config.val_batches >= 0 and wanted < len(valid):
        order = np.random.default_rng(config.seed).permutation(len(valid))
        valid = [valid[i] for i in sorted(order[:wanted])]
    return train, valid, report, reading.title


def _say_prompts(
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
        lines.append("! nothing is held out: whether the run goes well will not be known")
    lines += [f"! {note}" for note in report.notes]
    facts = {
        "read_as": title,
        "prompts": len(train),
        "held_out": len(valid),
        "dropped": dict(report.dropped),
        "prompt_lengths": dict(at),
    }
    return lines, facts


def set_up(
    config: OnPolicyConfig,
    folder: ModelFolder,
    prepared: Prepared,
    stack: ExitStack,
    display: Display,
) -> tuple[Workplace, HeldOut]:
    """Load the model, give it its roles, and open the rewards.

    Args:
        config: The options.
        folder: The base.
        prepared: What is known of the run.
        stack: Closes what has to be closed at its end.
        display: Told what plays which role.

    Raises:
        ModelError: A model, adapter or run can't be used.
        ConfigError: A reward can't be opened, or the data lacks what it needs.
    """
    swaps = [
        Path(wanted.model).expanduser()
        for wanted in (prepared.rewards, prepared.looked_at)
        if wanted is not None and wanted.model is not None and _swaps(wanted, folder, prepared)
    ]
    roles = make_roles(config, folder, prepared.layout, [read_layout(run) for run in swaps])
    model = roles.policy.model
    # Log-probs are those of what is sampled, at its temperature.
    model = replace(model, anatomy=replace(model.anatomy, temperature=config.temperature))
    policy = Policy(model, prepared.layout, roles.policy.start)
    display.note(say_policy(policy, prepared.layout))
    display.note("The reference is the policy as it starts; both share one base.")

    def opened(wanted: Wanted, option: str) -> tuple[Judge, Tree | None]:
        score, tree = _score_model(wanted, policy, roles.fresh, roles.layout, prepared, option)
        if wanted.model is not None:
            where = (
                "swapped into the same base"
                if tree is not None
                else ("another base: a second model in memory")
            )
            display.note(f"{option} {wanted.model}: {where}.")
        judge = stack.enter_context(Judge(wanted, score))
        judge.check([prompt.text for prompt in (*prepared.train, *prepared.valid)])
        return judge, tree

    judge, tree = opened(prepared.rewards, "--reward-model")
    looked_at = None
    if prepared.looked_at is not None:
        looked_at = opened(prepared.looked_at, "--eval-reward-model")[0]
    place = Workplace(
        config,
        policy,
        tree,
        prepared.train,
        prepared.shapes,
        RunAhead(),
        judge,
        prepared.demonstrations,
    )
    return place, HeldOut(place, prepared.valid, looked_at)


def _swaps(wanted: Wanted, folder: ModelFolder, prepared: Prepared) -> bool:
    run = Path(wanted.model or "").expanduser()
    return has_head(run) and same_base(run, folder, prepared.layout)


def _score_model(
    wanted: Wanted,
    policy: Policy,
    fresh: Tree,
    layout: AdapterLayout,
    prepared: Prepared,
    option: str,
) -> tuple[ScoreModel | None, Tree | None]:
    """What scores by the reward model, and the model as a tree if it is one on the same base."""
    if wanted.model is None:
        return None, None
    run = Path(wanted.model).expanduser()
    if not _swaps(wanted, policy.model.folder, prepared):
        return apart(open_second_model(wanted.model)), None
    tree = reward_tree(run, policy.model, fresh, layout)
    return swapped(policy.model, tree, prepared.shapes), tree
