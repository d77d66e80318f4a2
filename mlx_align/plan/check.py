"""The plan of a run from its options, and the refusal of one that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_align.config import KtoConfig, RewardConfig, SftConfig, TrainConfig
from mlx_align.data.shapes import AnyShape, BatchLimit, Shape, batch_limit, plan_shapes
from mlx_align.errors import ConfigError, ModelError
from mlx_align.models.adapters import AdapterLayout, compute_dtype
from mlx_align.models.loading import ModelFolder
from mlx_align.plan.advice import ShapesWithin, Step, advise
from mlx_align.plan.headers import ModelShape, read_shape
from mlx_align.plan.machine import Machine, this_machine
from mlx_align.plan.memory import MemoryPlan, plan_memory
from mlx_align.plan.workload import ADAPTER_BYTES, Workload
from mlx_align.types import TokenizedGroup

# A run that needs less is never refused: the plan's error is larger than what it could spare.
ALWAYS_FITS_BYTES = 1_000_000_000
# Families whose caches can't be shared: their completions run as whole rows.
WHOLE_ROWS = ("rwkv7", "gemma3n", "deepseek_v32", "llama4", "mamba", "mamba2", "nemotron_h")
# Families that can't be packed though they have no sliding window.
PADDED_ROWS = (
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
    """What a run will need, whether that fits, and what to do if not.

    Attributes:
        machine: Where it would run.
        model: What is known of the model.
        work: What the run does with it.
        memory: At the peak.
        fits: Whether it fits the machine's working set.
        steps: What makes it fit, cheapest first; [] where it fits.
    """

    machine: Machine
    model: ModelShape
    work: Workload
    memory: MemoryPlan
    fits: bool
    steps: list[Step]


def make_plan(
    config: TrainConfig,
    layout: AdapterLayout,
    folder: ModelFolder,
    groups: Sequence[TokenizedGroup] | None,
    machine: Machine,
) -> Plan:
    """Plan a run from its options, the headers of its model and its tokenised data.

    Args:
        config: The options.
        layout: What is trained.
        folder: The model; its weights stay on disk.
        groups: The training data; None for rows of `max_seq_length`, half of each a prompt.
        machine: Where it would run.

    Raises:
        ModelError: The model's files can't be read.
        ConfigError: Its adapters can't compute as asked.
    """
    model = read_shape(folder.path, folder.config)
    within, limit = _shapes_within(groups), batch_limit(config, packs=_packs(config, folder))
    rows = 2 if not groups else max(len(group.completions) for group in groups)
    if isinstance(config, KtoConfig | SftConfig):
        rows = 1  # of KTO's two completions the mismatched one runs by itself, without gradient
    work = replace(
        workload(config, layout, folder, model),
        shapes=tuple(within(config.max_seq_length, limit)),
        limit=limit,
        rows=rows,
        vocabulary=not isinstance(config, RewardConfig),
    )
    return plan_of(machine, model, work, config.max_seq_length, within)


def workload(
    config: TrainConfig, layout: AdapterLayout, folder: ModelFolder, model: ModelShape
) -> Workload:
    """What the options say of a workload, whatever the command; it has no shapes yet.

    Raises:
        ConfigError: The adapters can't compute as asked.
    """
    dtypes = [mx.bfloat16] if model.activation_dtype == "BF16" else []
    computed = compute_dtype(config.adapter_dtype, dtypes)
    return Workload(
        shapes=(),
        accumulation=config.grad_accumulation_steps,
        fine_tune_type=layout.fine_tune_type,
        rank=layout.rank,
        num_layers=layout.num_layers,
        keys=layout.keys,
        dropout=layout.dropout > 0,
        grad_checkpoint=config.grad_checkpoint,
        adapter_bytes=ADAPTER_BYTES if computed is None else computed.size,
        shared=folder.config.get("model_type") not in WHOLE_ROWS,
    )


def plan_of(
    machine: Machine,
    model: ModelShape,
    work: Workload,
    max_seq_length: int | None,
    within: ShapesWithin,
) -> Plan:
    """The plan of a workload; the last two arguments as `advise` has them."""
    memory = plan_memory(model, work)
    available = max(machine.working_set_bytes, ALWAYS_FITS_BYTES if machine.here else 0)
    fits = memory.peak_bytes <= available
    steps = [] if fits else advise(model, work, max_seq_length, within, available)
    return Plan(machine, model, work, memory, fits, steps)


def _packs(config: TrainConfig, folder: ModelFolder) -> bool:
    """Whether the run's groups will stand in packed rows, as far as the configuration tells."""
    own = folder.config
    windows = own.get("sliding_window") and own.get("use_sliding_window", True)
    padded = own.get("model_type") in WHOLE_ROWS + PADDED_ROWS or windows
    return not padded and not isinstance(config, KtoConfig)


def check_fits(
    config: TrainConfig,
    layout: AdapterLayout,
    folder: ModelFolder,
    groups: Sequence[TokenizedGroup],
) -> str:
    """The line that says what a run will need; refuses one that does not fit this machine.

    Raises:
        ConfigError: It does not fit, and --force was not given.
    """
    return said_or_refused(
        lambda: make_plan(config, layout, folder, groups, this_machine()), force=config.force
    )


def said_or_refused(make: Callable[[], Plan], *, force: bool) -> str:
    """The line that says what the plan that `make` makes says; refuses a run that does not fit.

    Raises:
        ConfigError: It does not fit, and nothing forces it.
    """
    try:
        plan = make()
    except ModelError as error:
        # A family that names its sizes otherwise may train all the same; a damaged file is refused
        # when it is loaded.
        return f"! Memory can't be planned: {error}."
    if plan.fits or force:
        but = "" if plan.fits else ", which does not fit: --force runs it all the same"
        return f"Memory: about {say_verdict(plan)}{but}."
    raise ConfigError(
        f"this run needs about {say_verdict(plan)}; {say_steps(plan)}; or --force to try"
    )


def say_verdict(plan: Plan) -> str:
    """What is needed, and what there is."""
    return (
        f"{say_bytes(plan.memory.peak_bytes)} at its peak, "
        f"{plan.machine.name} has {say_bytes(plan.machine.working_set_bytes)} for it"
    )


def say_steps(plan: Plan) -> str:
    """What makes it fit, on one line."""
    if not plan.steps:
        return "no option makes it fit: take a smaller model"
    steps = ", then ".join(f"{s.options} ({say_bytes(s.peak_bytes)})" for s in plan.steps)
    if plan.steps[-1].fits:
        return f"what makes it fit, cheapest first: {steps}"
    return f"even all of these do not make it fit: {steps}; take a smaller model"


def say_bytes(count: float) -> str:
    """Bytes as a person reads them."""
    if count < 0.1e9:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e9:.2f} GB" if count < 10e9 else f"{count / 1e9:.1f} GB"


def _shapes_within(
    groups: Sequence[TokenizedGroup] | None,
) -> Callable[[int, BatchLimit], list[AnyShape]]:
    """The batch shapes of the rows of at most so many tokens; [] where none is left."""

    def within(length: int, limit: BatchLimit) -> list[AnyShape]:
        if groups is None:
            half = -(-length // 16) * 8
            return [Shape(half, half, limit.of(3 * half))]  # of equal lengths, none is padded
        short = [
            group
            for group in groups
            if len(group.prompt) + max(map(len, group.completions)) <= length
        ]
        return plan_shapes(short, limit) if short else []

    return within
