"""Defaults that depend on the data: updates, batch, learning rate, held-out rows, evaluations.

Options that were not given are chosen here, once the number of rows is known, and written to
config.yaml. A resumed run reads them from there. Measurements: docs/verified/defaults.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from mlx_align.algorithms.grpo import DYNAMIC_SAMPLING, KL_PLACES, resolve_method
from mlx_align.config import (
    DEFAULT_BATCH_SIZE,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    LossConfig,
    OnPolicyConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    TrainConfig,
)
from mlx_align.config.on_policy import ONLINE_DPO
from mlx_align.data.batching import groups_per_batch
from mlx_align.data.buckets import (
    LENGTH_MULTIPLE,
    Shape,
    batch_limit,
    group_lengths,
    group_tokens,
    packed_lengths,
)
from mlx_align.errors import ConfigError
from mlx_align.losses.registry import (
    PAIRWISE_LOSSES,
    combine,
    parse_losses,
    resolve_options,
)
from mlx_align.models.adapters import AdapterLayout
from mlx_align.system.formatting import counted
from mlx_align.tracking.diagnostics import MIN_EXAMPLES
from mlx_align.types import TokenizedGroup

Config = TypeVar("Config", bound=TrainConfig)

# Rows that a run visits at least, as long as that takes no more than the passes below.
ROWS_VISITED = 300
# Passes over few rows. A reward model overfits after few; demonstrations are learned by heart.
MAX_PASSES = {"dpo": 8, "kto": 8, "sft": 5, "reward": 4}
# Rows per update for fewer than this many rows of data.
ROWS_PER_UPDATE = ((100, 4), (1000, 8), (math.inf, 16))
# Tokens of a microbatch at most, and the share of them that stays empty when rows are packed. Rows
# of which no two fit are trained one by one: packing gains nothing there.
MAX_BATCH_TOKENS, PACKING_LOSS = 768, 0.1
# KTO estimates a KL from the rows of an update.
MIN_KTO_ROWS = 8
# Rollout batches of an on-policy run at least, and passes over few prompts at most.
MIN_ROLLOUT_BATCHES, MAX_PROMPT_PASSES = 60, 20
# PPO's first rollout batches train only the critic: this many, or this share of a shorter run.
CRITIC_BATCHES, CRITIC_SHARE = 10, 1 / 6
# Peak learning rates for LoRA. Preference and policy methods move further from the reference the
# longer they train, so that their rate falls with the square root of the updates beyond
# FULL_RATE_UPDATES. Losses without a reference have nothing that holds them.
PREFERENCE_RATE, REFERENCE_FREE_RATE = 5e-5, 2e-5
SFT_RATE, REWARD_RATE, GRPO_RATE, PPO_RATE = 2e-4, 1e-4, 5e-5, 3e-5
FULL_RATE_UPDATES = 100
# They were measured on a model of this width. Narrower ones need higher rates: at a width of 128,
# 48 updates on 30 pairs give a held-out margin of 0.33 at 5e-5, and of 2.6 at 2.2e-4.
MEASURED_WIDTH, MOST_TIMES_RATE = 576, 5
# A preference is learned if this share of the held-out pairs is right, which people's preferences
# hardly ever reach, and their reward margin is above this.
TARGET_ACCURACY, TARGET_MARGIN = 0.9, 0.5
# Full fine-tuning takes 1/10 to 1/20 of the rate of LoRA.
FULL_FINE_TUNING = 1 / 20
# Evaluations after the start, evenly spaced, and the bounds of the updates between two of them.
EVALUATIONS, MIN_UPDATES_BETWEEN = 8, 10
MAX_UPDATES_BETWEEN = 100
# All evaluations together may cost this share of a run, but this many rows are always evaluated.
EVALUATION_SHARE, MIN_EVALUATED = 0.1, 100
# A forward pass costs a third of a training step: its backward pass costs twice as much.
FORWARD_SHARE = 1 / 3


def resolve_offline(
    config: Config,
    layout: AdapterLayout,
    train: Sequence[TokenizedGroup],
    valid: int,
    fraction: float | None = None,
    *,
    packs: bool = False,
    width: int = 0,
) -> tuple[Config, list[str]]:
    """The config with every default resolved, and lines that say what was chosen.

    Args:
        config: The options of dpo, kto, sft or reward, as given.
        layout: What is trained.
        train: The training rows.
        valid: Number of held-out rows.
        fraction: The fraction that was held out; None if the data has a valid split.
        packs: Whether the rows of a microbatch can be packed.
        width: The model's hidden size; 0 if unknown.
    """
    command = _command(config)
    rows = len(train)
    chosen: dict[str, Any] = {}
    if config.valid_fraction is None:
        chosen["valid_fraction"] = fraction
    wanted = next(count for below, count in ROWS_PER_UPDATE if rows < below)
    wanted = max(wanted, MIN_KTO_ROWS) if command == "kto" else wanted
    if config.batch_size is None and config.batch_tokens is None:
        size = _mean_tokens(train, packs=packs)
        if config.grad_accumulation_steps is None and 2 * size <= MAX_BATCH_TOKENS:
            chosen["batch_tokens"] = min(MAX_BATCH_TOKENS, _round_up(wanted * size))
        else:
            chosen["batch_size"] = DEFAULT_BATCH_SIZE
        config = replace(config, **chosen)
    per_microbatch = groups_per_batch(train, batch_limit(config, packs=packs))
    if config.grad_accumulation_steps is None:
        chosen["grad_accumulation_steps"] = max(1, round(wanted / per_microbatch))
    accumulation = chosen.get("grad_accumulation_steps", config.accumulation)
    per_update = per_microbatch * accumulation
    if config.iters is None and config.epochs is None:
        chosen["epochs"] = float(min(MAX_PASSES[command], max(1, math.ceil(ROWS_VISITED / rows))))
    if isinstance(config, LossConfig) and config.target_margin is None:
        held = not isinstance(config, DPOConfig) or _has_reference(config)
        by_default = "epochs" in chosen and held
        chosen["target_margin"] = TARGET_MARGIN if by_default else 0.0
    epochs: float = chosen.get("epochs", config.epochs or 1.0)
    updates = config.iters or max(1, math.ceil(epochs * rows / per_update))
    if config.learning_rate is None:
        chosen["learning_rate"] = _offline_rate(config, layout, updates, width)
    chosen |= _evaluation(config, valid, updates, updates * per_update, per_microbatch)
    lines = []
    if {"grad_accumulation_steps", "epochs", "learning_rate"} & chosen.keys():
        lead, flags = _chosen_by_default(chosen)
        passes = updates * per_update / rows
        rate = chosen.get("learning_rate", config.learning_rate)
        about = "" if config.batch_tokens is None else "about "
        reason = (
            f"so few rows take {passes:.2g} passes to change the model"
            if "epochs" in chosen and epochs > 1
            else "one pass is enough"
            if "epochs" in chosen
            else f"{passes:.2g} passes"
        )
        lines.append(
            f"{lead} {rows:,} rows: {updates:,} updates of {about}{per_update:.0f} rows at "
            f"learning rate {rate:.2g}; {reason}. ({flags})"
        )
    if chosen.get("target_margin") and valid:
        kto = isinstance(config, KTOConfig)
        unit, right = ("completions", "ranked right") if kto else ("pairs", "right")
        lines.append(
            f"Training ends earlier if the held-out {unit} are learned: {TARGET_ACCURACY:.0%} "
            f"{right}, and a reward margin above {TARGET_MARGIN:g}. (--target-margin)"
        )
    lines += _held_out_lines(valid)
    return _complete(replace(config, **chosen), layout), lines


def _mean_tokens(train: Sequence[TokenizedGroup], *, packs: bool) -> float:
    """Mean tokens that a row takes in a microbatch, with what stays empty."""
    if packs:
        sizes = [(1 + PACKING_LOSS) * sum(packed_lengths(group)) for group in train]
    else:
        sizes = [
            group_tokens(Shape(_round_up(prompt), _round_up(completion), 1), len(group.completions))
            for group in train
            for prompt, completion in [group_lengths(group)]
        ]
    return sum(sizes) / len(sizes)


def _round_up(tokens: float) -> int:
    return math.ceil(tokens / LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def resolve_on_policy(
    config: Config,
    layout: AdapterLayout,
    prompts: int,
    valid: int,
    fraction: float | None = None,
    *,
    width: int = 0,
) -> tuple[Config, list[str]]:
    """The config of ppo or grpo with every default resolved, and lines that say what was chosen.

    Args:
        config: The options, as given.
        layout: What is trained.
        prompts: Number of training prompts.
        valid: Number of held-out prompts.
        fraction: The fraction that was held out; None if the data has a valid split.
        width: The model's hidden size; 0 if unknown.
    """
    assert isinstance(config, OnPolicyConfig)
    chosen: dict[str, Any] = {}
    if config.valid_fraction is None:
        chosen["valid_fraction"] = fraction
    size = (config.batch_size or DEFAULT_BATCH_SIZE) * config.minibatches
    if config.grad_accumulation_steps is None:
        chosen["grad_accumulation_steps"] = max(1, min(config.accumulation, prompts) // size)
    per_batch = size * chosen.get("grad_accumulation_steps", config.accumulation)
    if config.iters is None and config.epochs is None:
        one_pass = math.ceil(prompts / per_batch)
        most = math.ceil(MAX_PROMPT_PASSES * prompts / per_batch)
        chosen["iters"] = max(one_pass, min(MIN_ROLLOUT_BATCHES, most))
    batches = chosen.get("iters", config.iters)
    if batches is None:
        assert config.epochs is not None
        batches = max(1, math.ceil(round(config.epochs * prompts) / per_batch))
    if config.learning_rate is None:
        peak = PPO_RATE if isinstance(config, PPOConfig) else GRPO_RATE
        chosen["learning_rate"] = _rate(peak, layout, width, batches)
    chosen |= _critic_warmup(config, batches)
    # A rollout batch samples and trains on group_size completions of each prompt, an evaluation
    # samples one.
    trained = batches * per_batch * config.group_size
    if config.val_batches is None:
        evaluations = 2 + batches // config.steps_per_eval if config.steps_per_eval else 2
        fitting = int(EVALUATION_SHARE * trained / evaluations)
        limit = max(MIN_EVALUATED, fitting)
        chosen["val_batches"] = -1 if valid <= limit else max(1, limit // max(1, size))
    lines = []
    if {"grad_accumulation_steps", "iters", "learning_rate"} & chosen.keys():
        lead, flags = _chosen_by_default(chosen)
        passes = batches * per_batch / prompts
        rate = chosen.get("learning_rate", config.learning_rate)
        lines.append(
            f"{lead} {prompts:,} prompts: {batches:,} rollout batches of {per_batch:,} "
            f"prompts ({passes:.2g} passes) at learning rate {rate:.2g}. ({flags})"
        )
    if chosen.get("critic_warmup"):
        first = chosen["critic_warmup"]
        only = f"{first} rollout batches train" if first > 1 else "rollout batch trains"
        lines.append(f"The first {only} only the critic. (--critic-warmup)")
    lines += _held_out_lines(valid, "prompt")
    return _complete(replace(config, **chosen), layout), lines


def _critic_warmup(config: OnPolicyConfig, batches: int) -> dict[str, Any]:
    if not isinstance(config, PPOConfig) or config.critic_warmup is not None:
        return {}
    return {"critic_warmup": min(CRITIC_BATCHES, int(CRITIC_SHARE * batches))}


def _chosen_by_default(chosen: Mapping[str, Any]) -> tuple[str, str]:
    """The first words of the line on length, rows per update and rate, and the options to show.

    If some were given, these are the others.
    """
    names = ("epochs", "iters", "grad_accumulation_steps", "learning_rate")
    flags = [f"--{name.replace('_', '-')}" for name in names if name in chosen]
    if len(flags) == 3:
        return "Defaults for", ", ".join(flags)
    return "For", f"chosen by default: {', '.join(flags)}"


def _command(config: TrainConfig) -> str:
    kinds = {DPOConfig: "dpo", KTOConfig: "kto", SFTConfig: "sft", RewardConfig: "reward"}
    return next((name for kind, name in kinds.items() if isinstance(config, kind)), "dpo")


def _offline_rate(config: TrainConfig, layout: AdapterLayout, updates: int, width: int) -> float:
    if isinstance(config, SFTConfig):
        return _rate(SFT_RATE, layout, width)
    if isinstance(config, RewardConfig):
        return _rate(REWARD_RATE, layout, width)
    held = not isinstance(config, DPOConfig) or _has_reference(config)
    return _rate(PREFERENCE_RATE if held else REFERENCE_FREE_RATE, layout, width, updates)


def _has_reference(config: DPOConfig) -> bool:
    """Whether a loss compares the policy with the reference, so that rewards are implicit ones."""
    try:
        names = [name for name, _ in parse_losses(config.loss)]
    except ConfigError:  # a loss function that was passed from Python
        return True
    return any(PAIRWISE_LOSSES[name].needs_reference for name in names)


def _rate(peak: float, layout: AdapterLayout, width: int, updates: int = 0) -> float:
    """The learning rate, rounded to two digits."""
    rate = peak * min(1.0, math.sqrt(FULL_RATE_UPDATES / max(updates, 1)))
    if 0 < width < MEASURED_WIDTH:
        rate *= min(MEASURED_WIDTH / width, MOST_TIMES_RATE)
    if layout.fine_tune_type == "full":
        rate *= FULL_FINE_TUNING
    return float(f"{rate:.2g}")


def _evaluation(
    config: TrainConfig, valid: int, updates: int, visited: float, per_microbatch: float
) -> dict[str, Any]:
    """How often to evaluate, and how many microbatches, if that was not given."""
    chosen: dict[str, Any] = {}
    every = config.steps_per_eval
    if every is None:
        count = min(EVALUATIONS, updates // MIN_UPDATES_BETWEEN)
        # As often as a tenth of the run pays for, but once at the end in any case.
        affordable = EVALUATION_SHARE * visited / (FORWARD_SHARE * max(valid, 1))
        every = math.ceil(updates / max(1, min(count, int(affordable))))
        every = chosen["steps_per_eval"] = min(every, MAX_UPDATES_BETWEEN)
    if config.val_batches is None:
        evaluations = 2 + (updates - 1) // every if every else 2
        limit = max(MIN_EVALUATED, EVALUATION_SHARE * visited / (FORWARD_SHARE * evaluations))
        fits = valid <= limit
        chosen["val_batches"] = -1 if fits else max(1, math.ceil(limit / per_microbatch))
    return chosen


def describe_evaluated(evaluated: int, valid: int, unit: str = "row") -> list[str]:
    """A line if a default makes evaluations use fewer than all held-out rows."""
    if evaluated == valid:
        return []
    return [
        f"Evaluations use {evaluated:,} of {valid:,} held-out {unit}s, because all of them would "
        "cost more than a tenth of the run (--val-batches -1 for all)."
    ]


def _held_out_lines(valid: int, unit: str = "row") -> list[str]:
    if not 0 < valid < MIN_EXAMPLES:
        return []
    return [
        f"! {counted(valid, f'held-out {unit}')} {'is' if valid == 1 else 'are'} too few to tell "
        f"an improvement from chance ({MIN_EXAMPLES} at least)."
    ]


def _complete(config: Config, layout: AdapterLayout) -> Config:
    """The config with the defaults that don't depend on the data in it."""
    found: dict[str, Any] = {"fine_tune_type": layout.fine_tune_type}
    found["num_layers"] = layout.num_layers
    if config.batch_size is None and config.batch_tokens is None:  # an on-policy run
        found["batch_size"] = DEFAULT_BATCH_SIZE
    if layout.fine_tune_type != "full":
        found["lora_rank"] = layout.rank
        alpha = layout.scale * layout.rank
        # A resumed run computes the scale from it, and must get the same bits.
        if alpha / layout.rank == layout.scale:
            found["lora_alpha"] = alpha
    for name, value in _loss_defaults(config).items():
        if getattr(config, name) is None and name not in getattr(config, "loss_option", {}):
            found[name] = value
    return replace(config, **found)


def _loss_defaults(config: TrainConfig) -> dict[str, Any]:
    """β, label smoothing and the weights of labels, if they are options of the config's loss."""
    if isinstance(config, KTOConfig):
        options = resolve_options(config.loss, config.loss_options())
        names = ("beta", "desirable_weight", "undesirable_weight")
        return {name: float(options[name]) for name in names if name in options}
    if isinstance(config, DPOConfig):
        try:
            combined = combine(parse_losses(config.loss), config.loss_options())
        except ConfigError:  # a loss function that was passed from Python
            return {}
        found = {}
        for name in ("beta", "label_smoothing"):
            values = {one[name] for one in combined.options.values() if name in one}
            # Without smoothing it stays unset, so that the file serves losses that have none too.
            if len(values) == 1 and (value := float(values.pop())):
                found[name] = value
        return found
    return _method_defaults(config) if isinstance(config, GRPOConfig) else {}


def _method_defaults(config: GRPOConfig) -> dict[str, Any]:
    """What the method of a grpo run sets: clipping, KL, truncated completions, replaced prompts."""
    if config.loss == ONLINE_DPO:
        return {}
    method = resolve_method(config)
    found: dict[str, Any] = {
        "overlong": "keep",
        "dynamic_sampling": config.loss in DYNAMIC_SAMPLING,
    }
    if method.surrogate == "clip":
        found["clip_eps"] = method.clip_low
    if method.surrogate in ("clip", "cispo"):
        found["clip_eps_high"] = method.clip_high
    if config.kl_coef > 0:
        found["kl"] = next((name for name, place in KL_PLACES.items() if place == method.kl), None)
    return found
