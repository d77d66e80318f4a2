"""The plan of a run that is trained on its own samples: updates, sampling, and roles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_align.config import DEFAULT_BATCH_SIZE, GrpoConfig, OnPolicyConfig, PpoConfig
from mlx_align.data.shapes import AnyShape, BatchLimit, rollout_shapes
from mlx_align.models.adapters import AdapterLayout
from mlx_align.models.loading import ModelFolder
from mlx_align.plan.check import Plan, plan_of, said_or_refused, workload
from mlx_align.plan.headers import ModelShape, read_header, read_shape
from mlx_align.plan.machine import Machine, this_machine
from mlx_align.plan.memory import trained_parameters
from mlx_align.plan.workload import ADAPTER_BYTES, Sampling, Workload
from mlx_align.types import TokenizedGroup


class RewardModels(NamedTuple):
    """What judges beside functions.

    Attributes:
        swapped: Layouts of those that are adapters on the policy's base.
        apart: Model folders of those that have a base of their own.
    """

    swapped: tuple[AdapterLayout, ...] = ()
    apart: tuple[Path, ...] = ()


def make_on_policy_plan(
    config: OnPolicyConfig,
    layout: AdapterLayout,
    folder: ModelFolder,
    prompts: tuple[Sequence[TokenizedGroup], Sequence[TokenizedGroup]] | None,
    rewards: RewardModels,
    machine: Machine,
) -> Plan:
    """Plan a run from its options, the headers of its models and its tokenised prompts.

    Args:
        config: The options.
        layout: What is trained.
        folder: The model; its weights stay on disk.
        prompts: Those to train on, and those held out; None for the longest there may be.
        rewards: The reward models.
        machine: Where it would run.

    Raises:
        ModelError: A model's files can't be read.
        ConfigError: The adapters can't compute as asked.
    """
    model = read_shape(folder.path, folder.config)
    longest = config.max_prompt_length or config.max_seq_length - config.max_completion_length
    if prompts is None:
        prompts = [TokenizedGroup(np.zeros(longest, np.int32), (), "")], []
    train, held_out = prompts
    shown = [*train, *held_out]
    size = config.batch_size or DEFAULT_BATCH_SIZE

    def within(completion: int, limit: BatchLimit) -> list[AnyShape]:
        return rollout_shapes(shown, completion, limit.groups)

    grouped = isinstance(config, GrpoConfig)
    work = workload(config, layout, folder, model)
    work = replace(
        work,
        shapes=tuple(within(config.max_completion_length, BatchLimit(size))),
        limit=BatchLimit(size),
        rows=_learned_from(config),
        sampling=Sampling(
            prompts=size * config.grad_accumulation_steps * config.minibatches,
            held_out=len(held_out),
            group_size=config.group_size,
            prompt=max(len(group.prompt) for group in shown),
            completion=config.max_completion_length,
            least_group=2 if grouped else 1,
        ),
        critic=isinstance(config, PpoConfig) and config.critic == "own",
        further_bytes=_reward_bytes(model, work, rewards),
    )
    limited = config.max_seq_length if config.max_prompt_length is None else None
    return plan_of(machine, model, work, limited, within)


def check_on_policy_fits(
    config: OnPolicyConfig,
    layout: AdapterLayout,
    folder: ModelFolder,
    prompts: tuple[Sequence[TokenizedGroup], Sequence[TokenizedGroup]],
    rewards: RewardModels,
) -> str:
    """The line that says what a run will need; refuses one that does not fit this machine.

    Raises:
        ConfigError: It does not fit, and --force was not given.
    """
    return said_or_refused(
        lambda: make_on_policy_plan(config, layout, folder, prompts, rewards, this_machine()),
        force=config.force,
    )


def _learned_from(config: OnPolicyConfig) -> int:
    """Completions of a prompt that one update learns from."""
    if isinstance(config, GrpoConfig) and config.loss == "online_dpo":
        return 2  # the best and the worst
    return config.group_size


def _reward_bytes(model: ModelShape, work: Workload, rewards: RewardModels) -> int:
    """A tree for each that is swapped in, all weights of those that are not."""
    total = 0
    for layout in rewards.swapped:
        own = replace(
            work,
            fine_tune_type=layout.fine_tune_type,
            rank=layout.rank,
            num_layers=layout.num_layers,
            keys=layout.keys,
        )
        size = model.activation_bytes if layout.fine_tune_type == "full" else ADAPTER_BYTES
        total += trained_parameters(model, own) * size
    for path in rewards.apart:
        for file in sorted(path.glob("model*.safetensors")):
            total += sum(tensor.nbytes for tensor in read_header(file).values())
    return total
