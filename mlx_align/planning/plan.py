"""Plan a run from its options: peak memory, whether it fits, and what to change if it doesn't."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_align.config import (
    DEFAULT_BATCH_SIZE,
    GRPOConfig,
    KTOConfig,
    OnPolicyConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    TrainConfig,
)
from mlx_align.data.buckets import (
    AnyShape,
    BatchLimit,
    Shape,
    batch_limit,
    plan_shapes,
    rollout_shapes,
)
from mlx_align.errors import ConfigError, ModelError
from mlx_align.models.adapters import AdapterLayout, resolve_adapter_dtype
from mlx_align.models.gpu_attention import KERNEL_HEAD_SIZES
from mlx_align.models.loading import ModelFolder
from mlx_align.planning.advice import ShapesWithin, Suggestion, advise
from mlx_align.planning.machine import Machine, this_machine
from mlx_align.planning.memory import (
    ADAPTER_BYTES,
    Attention,
    MemoryPlan,
    Sampling,
    Workload,
    plan_memory,
    trained_parameters,
)
from mlx_align.planning.model_shape import ModelShape, read_header, read_model_shape
from mlx_align.types import TokenizedGroup

# Without --grad-checkpoint or its opposite, activations are recomputed if the run would need more
# than this share of the memory otherwise: the rest is for the user's other programs.
FREE_SHARE = 0.5
# Runs that need less are never refused: the error of the estimate is larger than the savings.
ALWAYS_FITS_BYTES = 1_000_000_000
# Families whose caches can't be shared: prompt and completion run as one row.
UNSHARED_FAMILIES = (
    "rwkv7",
    "gemma3n",
    "deepseek_v32",
    "llama4",
    "mamba",
    "mamba2",
    "nemotron_h",
)
# Families whose own code computes a score for every query and key on a GPU too.
SCORE_FAMILIES = ("deepseek_v32",)
# Families with attention sinks.
SINK_FAMILIES = ("gpt_oss",)
# Families that can't be packed although they have no sliding window.
UNPACKED_FAMILIES = (
    "gemma2",
    "deepseek_v3",
    "stablelm",
    "gpt2",
    "mamba2",
    "lfm2",
    "qwen3_next",
    "qwen3_5",
)


@dataclass(frozen=True)
class Plan:
    """The memory that a run needs, whether it fits, and what to change if it does not.

    Attributes:
        machine: The machine it is planned for.
        model: Sizes of the model.
        workload: The computation of the run.
        memory: Peak memory.
        fits: Whether that fits the machine's working set.
        steps: Changes that make it fit, cheapest first; empty if it fits.
    """

    machine: Machine
    model: ModelShape
    workload: Workload
    memory: MemoryPlan
    fits: bool
    steps: list[Suggestion]


class Fit(NamedTuple):
    """A run that fits this machine.

    Attributes:
        line: The memory it needs, in words.
        grad_checkpoint: Whether activations are recomputed, as given or as chosen.
    """

    line: str
    grad_checkpoint: bool


class RewardModelMemory(NamedTuple):
    """The reward models that an on-policy run holds in memory.

    Attributes:
        adapters: Layouts of those that are adapters on the policy's base.
        models: Model folders of those with another base.
    """

    adapters: tuple[AdapterLayout, ...] = ()
    models: tuple[Path, ...] = ()


def make_plan(
    config: TrainConfig,
    layout: AdapterLayout,
    folder: ModelFolder,
    groups: Sequence[TokenizedGroup] | None,
    machine: Machine,
) -> Plan:
    """Plan an offline run from its options, the headers of its model, and its tokenized data.

    Args:
        config: The run's options.
        layout: The layout to train.
        folder: The model; its weights are not loaded.
        groups: The training data; None for rows of `max_seq_length` tokens, half of them prompt.
        machine: The machine to plan for.

    Raises:
        ModelError: The model's files can't be read.
        ConfigError: The model can't compute in the given adapter dtype.
    """
    if config.grad_checkpoint is None:
        return _with_chosen_checkpointing(
            lambda checkpoint: make_plan(
                replace(config, grad_checkpoint=checkpoint), layout, folder, groups, machine
            )
        )
    model = read_model_shape(folder.path, folder.config)
    packs = can_pack(folder) and not isinstance(config, KTOConfig)
    within, limit = _shapes_within(groups), batch_limit(config, packs=packs)
    rows = 2 if not groups else max(len(group.completions) for group in groups)
    if isinstance(config, KTOConfig | SFTConfig):
        rows = 1  # KTO runs its second, mismatched completion separately and without gradient
    workload = replace(
        _workload(config, layout, folder, model, machine),
        shapes=tuple(within(config.max_seq_length, limit)),
        limit=limit,
        rows=rows,
        vocabulary=not isinstance(config, RewardConfig),
    )
    return _plan(machine, model, workload, config.max_seq_length, within)


def make_on_policy_plan(
    config: OnPolicyConfig,
    layout: AdapterLayout,
    folder: ModelFolder,
    prompts: tuple[Sequence[TokenizedGroup], Sequence[TokenizedGroup]] | None,
    rewards: RewardModelMemory,
    machine: Machine,
) -> Plan:
    """Plan an on-policy run from its options, the headers of its models, and its prompts.

    Args:
        config: The run's options.
        layout: The layout to train.
        folder: The model; its weights are not loaded.
        prompts: Training and held-out prompts; None for one prompt of the maximum length.
        rewards: The reward models.
        machine: The machine to plan for.

    Raises:
        ModelError: A model's files can't be read.
        ConfigError: The model can't compute in the given adapter dtype.
    """
    if config.grad_checkpoint is None:
        return _with_chosen_checkpointing(
            lambda checkpoint: make_on_policy_plan(
                replace(config, grad_checkpoint=checkpoint),
                layout,
                folder,
                prompts,
                rewards,
                machine,
            )
        )
    model = read_model_shape(folder.path, folder.config)
    longest = config.max_prompt_length or config.max_seq_length - config.max_completion_length
    if prompts is None:
        prompts = [TokenizedGroup(np.zeros(longest, np.int32), (), "")], []
    train, held_out = prompts
    every_prompt = [*train, *held_out]
    size = config.batch_size or DEFAULT_BATCH_SIZE

    def within(completion: int, limit: BatchLimit) -> list[AnyShape]:
        return rollout_shapes(every_prompt, completion, limit.groups)

    workload = _workload(config, layout, folder, model, machine)
    workload = replace(
        workload,
        shapes=tuple(within(config.max_completion_length, BatchLimit(size))),
        limit=BatchLimit(size),
        rows=_completions_per_update(config),
        sampling=Sampling(
            prompts=size * config.accumulation * config.minibatches,
            held_out=len(held_out),
            group_size=config.group_size,
            prompt=max(len(group.prompt) for group in every_prompt),
            completion=config.max_completion_length,
            min_group_size=2 if isinstance(config, GRPOConfig) else 1,
        ),
        critic=isinstance(config, PPOConfig) and config.critic == "own",
        reward_model_bytes=_reward_model_bytes(model, workload, rewards),
    )
    limited = config.max_seq_length if config.max_prompt_length is None else None
    return _plan(machine, model, workload, limited, within)


def check_fits(
    config: TrainConfig,
    layout: AdapterLayout,
    folder: ModelFolder,
    groups: Sequence[TokenizedGroup],
) -> Fit:
    """Check that an offline run fits this machine.

    Raises:
        ConfigError: The run does not fit, and --force was not given.
    """
    return _describe_or_raise(
        lambda: make_plan(config, layout, folder, groups, this_machine()), config
    )


def check_on_policy_fits(
    config: OnPolicyConfig,
    layout: AdapterLayout,
    folder: ModelFolder,
    prompts: tuple[Sequence[TokenizedGroup], Sequence[TokenizedGroup]],
    rewards: RewardModelMemory,
) -> Fit:
    """Check that an on-policy run fits this machine.

    Raises:
        ConfigError: The run does not fit, and --force was not given.
    """
    return _describe_or_raise(
        lambda: make_on_policy_plan(config, layout, folder, prompts, rewards, this_machine()),
        config,
    )


def format_requirement(plan: Plan) -> str:
    """The peak and the memory available, in words."""
    return (
        f"{format_bytes(plan.memory.peak_bytes)} at its peak; {plan.machine.name}: "
        f"{format_bytes(plan.machine.working_set_bytes)} available"
    )


def format_suggestions(plan: Plan) -> str:
    """The changes that make a run fit, on one line."""
    if not plan.steps:
        return "no option makes it fit: use a smaller model"
    steps = ", then ".join(f"{s.options} ({format_bytes(s.peak_bytes)})" for s in plan.steps)
    if plan.steps[-1].fits:
        return f"to make it fit, cheapest first: {steps}"
    return f"all of these together are not enough: {steps}; use a smaller model"


def format_bytes(count: float) -> str:
    """A number of bytes in MB or GB."""
    if count < 0.1e9:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e9:.2f} GB" if count < 10e9 else f"{count / 1e9:.1f} GB"


def _workload(
    config: TrainConfig,
    layout: AdapterLayout,
    folder: ModelFolder,
    model: ModelShape,
    machine: Machine,
) -> Workload:
    """The part of a workload that follows from the common options; it has no shapes yet."""
    dtypes = [mx.bfloat16] if model.activation_dtype == "BF16" else []
    computed = resolve_adapter_dtype(config.adapter_dtype, dtypes)
    return Workload(
        shapes=(),
        accumulation=config.accumulation,
        fine_tune_type=layout.fine_tune_type,
        rank=layout.rank,
        num_layers=layout.num_layers,
        keys=layout.keys,
        dropout=layout.dropout > 0,
        grad_checkpoint=bool(config.grad_checkpoint),
        adapter_bytes=ADAPTER_BYTES if computed is None else computed.size,
        shared=folder.config.get("model_type") not in UNSHARED_FAMILIES,
        attention=attention_on(machine, model, folder.config),
    )


def attention_on(machine: Machine, model: ModelShape, config: Mapping[str, Any]) -> Attention:
    """How a model's attention is computed on a machine, according to its configuration."""
    if not machine.metal or config.get("model_type") in SCORE_FAMILIES:
        return "scores"
    text = {**config, **(config.get("text_config") or {})}
    special = (
        text.get("model_type") in SINK_FAMILIES
        or text.get("attn_logit_softcapping")
        or "qk_nope_head_dim" in text  # other sizes of queries than of values
        or (text.get("sliding_window") and text.get("use_sliding_window", True))
        or model.query_width // model.heads not in KERNEL_HEAD_SIZES
    )
    return "blocks" if special else "kernel"


def _plan(
    machine: Machine,
    model: ModelShape,
    workload: Workload,
    max_seq_length: int | None,
    within: ShapesWithin,
) -> Plan:
    memory = plan_memory(model, workload)
    available = max(machine.working_set_bytes, ALWAYS_FITS_BYTES if machine.here else 0)
    fits = memory.peak_bytes <= available
    steps = [] if fits else advise(model, workload, max_seq_length, within, available)
    return Plan(machine, model, workload, memory, fits, steps)


def _with_chosen_checkpointing(make: Callable[[bool], Plan]) -> Plan:
    """The plan without recomputed activations if that leaves enough memory free, else with them."""
    plan = make(False)
    enough = max(
        FREE_SHARE * plan.machine.working_set_bytes, ALWAYS_FITS_BYTES if plan.machine.here else 0
    )
    return plan if plan.memory.peak_bytes <= enough else make(True)


def _describe_or_raise(make: Callable[[], Plan], config: TrainConfig) -> Fit:
    try:
        plan = make()
    except ModelError as error:
        # A model whose sizes have unknown names in config.json can still be trained. A damaged file
        # is an error when it is loaded.
        line = f"! Memory can't be estimated: {error}."
        return Fit(line, config.grad_checkpoint is not False)
    if plan.fits or config.force:
        warning = "" if plan.fits else "; it does not fit, --force starts it anyway"
        line = f"Memory: about {format_requirement(plan)}{warning}."
        if config.grad_checkpoint is None and plan.workload.grad_checkpoint:
            line += " Activations are recomputed to save memory (--no-grad-checkpoint is faster)."
        return Fit(line, plan.workload.grad_checkpoint)
    raise ConfigError(
        f"this run needs about {format_requirement(plan)}; {format_suggestions(plan)}; "
        "or start it anyway with --force"
    )


def can_pack(folder: ModelFolder) -> bool:
    """Whether rows can be packed, according to the model's configuration."""
    windows = folder.config.get("sliding_window") and folder.config.get("use_sliding_window", True)
    padded = folder.config.get("model_type") in UNSHARED_FAMILIES + UNPACKED_FAMILIES or windows
    return not padded


def _shapes_within(
    groups: Sequence[TokenizedGroup] | None,
) -> Callable[[int, BatchLimit], list[AnyShape]]:
    """A function that plans the batch shapes of the rows up to a length; [] without rows."""

    def within(length: int, limit: BatchLimit) -> list[AnyShape]:
        if groups is None:
            half = -(-length // 16) * 8  # rows of one length need no padding
            return [Shape(half, half, limit.groups_per_microbatch(3 * half))]
        short = [
            group
            for group in groups
            if len(group.prompt) + max(map(len, group.completions)) <= length
        ]
        return plan_shapes(short, limit) if short else []

    return within


def _completions_per_update(config: OnPolicyConfig) -> int:
    """Completions per prompt that one update uses."""
    if isinstance(config, GRPOConfig) and config.loss == "online_dpo":
        return 2  # the best and the worst
    return config.group_size


def _reward_model_bytes(model: ModelShape, workload: Workload, rewards: RewardModelMemory) -> int:
    """Bytes of the weights of adapters on the policy's base, and of all other reward models."""
    total = 0
    for layout in rewards.adapters:
        own = replace(
            workload,
            fine_tune_type=layout.fine_tune_type,
            rank=layout.rank,
            num_layers=layout.num_layers,
            keys=layout.keys,
        )
        size = model.activation_bytes if layout.fine_tune_type == "full" else ADAPTER_BYTES
        total += trained_parameters(model, own) * size
    for path in rewards.models:
        for file in sorted(path.glob("model*.safetensors")):
            total += sum(tensor.nbytes for tensor in read_header(file).values())
    return total
