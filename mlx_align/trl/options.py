"""Convert TRL's arguments to the options of the commands."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_align.errors import ConfigError
from mlx_align.losses.registry import PAIRWISE_LOSSES
from mlx_align.trl.configs import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    RewardConfig,
    RLOOConfig,
    SFTConfig,
    TrainingArguments,
)

# Options -> their names in messages, which are TRL's.
NAMES = {
    "model": "model",
    "data": "train_dataset",
    "output": "output_dir",
    "batch_size": "per_device_train_batch_size",
    "batch_tokens": "per_device_train_batch_size",
    "grad_accumulation_steps": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "iters": "max_steps",
    "lr_schedule": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "grad_checkpoint": "gradient_checkpointing",
    "steps_per_report": "logging_steps",
    "steps_per_eval": "eval_steps",
    "save_every": "save_steps",
    "max_seq_length": "max_length",
    "loss": "loss_type",
    "wpo": "use_weighting",
    "lora_rank": "peft_config.r",
    "lora_alpha": "peft_config.lora_alpha",
    "lora_dropout": "peft_config.lora_dropout",
    "lora_keys": "peft_config.target_modules",
    "group_size": "num_generations",
    "update_epochs": "num_iterations",
    "kl_coef": "beta",
    "clip_eps": "epsilon",
    "clip_eps_high": "epsilon_high",
    "overlong": "mask_truncated_completions",
    "reward": "reward_funcs",
    "reward_model": "reward_funcs",
    "reward_model_weight": "reward_weights",
    "resume": "resume_from_checkpoint",
}
# No limit on the length of rows or prompts: longer than any context.
_UNLIMITED = 10_000_000
_TRACKERS = ("wandb", "swanlab")
_DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}
# (loss_type, scale_rewards, importance_sampling_level) -> method.
_METHODS = {
    ("grpo", "group", "token"): "grpo",
    ("dapo", "group", "token"): "dapo",
    ("dr_grpo", "none", "token"): "dr_grpo",
    ("grpo", "group", "sequence"): "gspo",
    ("cispo", "group", "token"): "cispo",
    ("sapo", "group", "token"): "sapo",
    ("vespo", "none", "token"): "vespo",
    ("luspo", "group", "sequence"): "luspo",
}


def training_options(
    args: TrainingArguments, rows: int | None, *, has_eval: bool, updates_per_step: int = 1
) -> dict[str, Any]:
    """The options that follow from the arguments of all trainers.

    Args:
        args: The trainer's config.
        rows: Rows that make an epoch of `per_device_train_batch_size` rows per microbatch; None if
            unknown.
        has_eval: Whether there is an eval_dataset.
        updates_per_step: Updates in a step of the run, which is what the options count.

    Raises:
        ConfigError: A value is not possible here.
    """
    accumulation = args.gradient_accumulation_steps
    epoch = None
    if rows is not None:
        per_update = max(1, args.per_device_train_batch_size * accumulation)
        epoch = max(1, round(rows / per_update))

    def steps(name: str, strategy: str, value: float | None) -> int:
        """Steps of the run between two events, from updates; 0 for none in between."""
        kind = _text(getattr(args, strategy))
        if kind == "no":
            return 0
        if kind == "epoch":
            if epoch is None:
                raise _error(args, strategy, f"the length of the data is unknown; give {name}")
            return max(1, round(epoch / updates_per_step))
        if kind != "steps":
            raise _error(args, strategy, "choose from no, steps, epoch")
        if value is None or value < 1 or value != int(value):
            raise _error(args, name, "expected a whole number of updates")
        return max(1, round(value / updates_per_step))

    if _text(args.eval_strategy) != "no" and not has_eval:
        raise _error(args, "eval_strategy", "there is no eval_dataset; give one to the trainer")
    eval_steps = args.logging_steps if args.eval_steps is None else args.eval_steps
    found: dict[str, Any] = {
        "batch_size": args.per_device_train_batch_size,
        "grad_accumulation_steps": accumulation,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        # 0 is TRL's word for no clipping.
        "max_grad_norm": args.max_grad_norm or 1e9,
        "grad_checkpoint": args.gradient_checkpointing,
        "seed": args.seed,
        "steps_per_eval": steps("eval_steps", "eval_strategy", eval_steps),
        "save_every": steps("save_steps", "save_strategy", args.save_steps),
        # 0 would be no report at all, so a number that no run reaches.
        "steps_per_report": steps("logging_steps", "logging_strategy", args.logging_steps)
        or _UNLIMITED,
        "val_batches": -1,
        **_schedule(args, updates_per_step),
        **_trackers(args),
    }
    if args.max_steps > 0:
        found["iters"] = math.ceil(args.max_steps / updates_per_step)
    else:
        found["epochs"] = args.num_train_epochs
    _check_model_init(args)
    return found


def _schedule(args: TrainingArguments, updates_per_step: int) -> dict[str, Any]:
    name = _text(args.lr_scheduler_type)
    warmup = args.warmup_steps or args.warmup_ratio or 0
    if name == "constant" and warmup:
        raise _error(args, "lr_scheduler_type", "it has no warm-up; use constant_with_warmup")
    name = "constant" if name == "constant_with_warmup" else name
    if name not in ("linear", "cosine", "constant"):
        raise _error(
            args, "lr_scheduler_type", "choose from linear, cosine, constant, constant_with_warmup"
        )
    return {"lr_schedule": name, "warmup": warmup if warmup < 1 else warmup / updates_per_step}


def _trackers(args: TrainingArguments) -> dict[str, Any]:
    given = args.report_to
    names = [given] if isinstance(given, str) else list(given or [])
    names = [name for name in names if name != "none"]
    for name in names:
        if name not in _TRACKERS:
            raise _error(
                args,
                "report_to",
                "choose from none, wandb, swanlab; metrics.jsonl and report.html are always "
                "written",
            )
    if not names:
        return {}
    project = {} if args.project == "huggingface" else {"project_name": args.project}
    return {"report_to": names, **project}


def _check_model_init(args: TrainingArguments) -> None:
    for name, value in (args.model_init_kwargs or {}).items():
        if name in ("attn_implementation", "device_map", "use_cache", "low_cpu_mem_usage"):
            continue
        if name in ("dtype", "torch_dtype") and value == "auto":
            continue
        raise _error(
            args,
            "model_init_kwargs",
            f"{name} can't be set: a model is loaded as it is stored; convert it with "
            "mlx_lm.convert, or pass a quantised model",
        )


def pairs_options(args: DPOConfig) -> dict[str, Any]:
    """The options of dpo that follow from TRL's arguments of its loss.

    Raises:
        ConfigError: A value is not possible here.
    """
    names = list(args.loss_type)
    weights = args.loss_weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise _error(args, "loss_weights", f"expected {len(names)} weights, one per loss_type")
    for name in names:
        if name not in PAIRWISE_LOSSES:
            raise _error(args, "loss_type", f"choose from {', '.join(PAIRWISE_LOSSES)}")
    loss = names[0]
    if len(names) > 1 or weights[0] != 1:
        loss = ",".join(f"{name}={weight!r}" for name, weight in zip(names, weights, strict=True))
    divergence = _DIVERGENCES.get(_text(args.f_divergence_type))
    if divergence is None:
        raise _error(args, "f_divergence_type", f"choose from {', '.join(_DIVERGENCES)}")
    # TRL's defaults belong to the losses that have the hyperparameter.
    known = {key for name in names for key in PAIRWISE_LOSSES[name].options}
    found: dict[str, Any] = {"loss": loss}
    given: dict[str, Any] = {}
    if "beta" in known:
        found["beta"] = args.beta
    elif args.beta != 0.1:
        raise _error(args, "beta", f"has no effect on loss_type {loss}; leave it out")
    # The exo_pair loss is not defined at 0, and has the default that TRL falls back to.
    if args.label_smoothing or ("label_smoothing" in known and "exo_pair" not in names):
        found["label_smoothing"] = args.label_smoothing
    if "tau" in known:
        given["tau"] = args.discopop_tau
    if divergence != "reverse_kl":
        given["f_divergence"] = divergence
    if divergence == "alpha":
        given["f_alpha"] = args.f_alpha_divergence_coef
    return {
        **found,
        "loss_option": given,
        "wpo": args.use_weighting,
        # At 1 it is plain DPO.
        "ld_alpha": None if args.ld_alpha == 1 else args.ld_alpha,
        **_length(args),
    }


def unpaired_options(args: KTOConfig) -> dict[str, Any]:
    """The options of kto that follow from TRL's arguments of its loss."""
    return {
        "loss": args.loss_type,
        "beta": args.beta,
        "desirable_weight": args.desirable_weight,
        "undesirable_weight": args.undesirable_weight,
        **_length(args),
    }


def supervised_options(args: SFTConfig, columns: Sequence[str]) -> dict[str, Any]:
    """The options of sft that follow from TRL's arguments of its loss.

    Args:
        args: The trainer's config.
        columns: Names of the columns of the data.

    Raises:
        ConfigError: A value is not possible here.
    """
    has_completion = "completion" in columns
    if args.completion_only_loss is False and has_completion:
        raise _error(args, "completion_only_loss", "prompts never have a loss here; leave it out")
    if args.completion_only_loss and not has_completion:
        raise _error(args, "completion_only_loss", "the data has no column completion")
    losses = {None: "nll", "nll": "nll", "chunked_nll": "nll", "dft": "dft"}
    if args.loss_type not in losses:
        raise _error(args, "loss_type", "choose from nll, chunked_nll, dft")
    conversations = "messages" in columns or "conversations" in columns
    found: dict[str, Any] = {
        "loss": losses[args.loss_type],
        "loss_on": "assistant" if conversations or args.assistant_only_loss else "completion",
        **_length(args),
    }
    if args.packing:
        found["batch_size"] = None
        found["batch_tokens"] = args.per_device_train_batch_size * found["max_seq_length"]
    return found


def reward_options(args: RewardConfig) -> dict[str, Any]:
    """The options of reward that follow from TRL's arguments of its loss."""
    return {"center_rewards_coefficient": args.center_rewards_coefficient or 0.0, **_length(args)}


def _length(args: Any) -> dict[str, Any]:
    return {"max_seq_length": args.max_length or _UNLIMITED}


@dataclasses.dataclass(frozen=True)
class RolloutSizes:
    """Sizes of a rollout batch, from TRL's counts of completions.

    Attributes:
        batch_size: Prompts per microbatch.
        accumulation: Microbatches per update.
        minibatches: Updates per pass over a rollout batch.
        passes: Passes over a rollout batch.
    """

    batch_size: int
    accumulation: int
    minibatches: int
    passes: int

    @property
    def updates(self) -> int:
        """Updates per rollout batch."""
        return self.minibatches * self.passes


def rollout_sizes(args: GRPOConfig | RLOOConfig) -> RolloutSizes:
    """Convert TRL's batch sizes, which count completions, to numbers of prompts.

    Raises:
        ConfigError: The completions of a prompt would not be in one update.
    """
    size, group = args.per_device_train_batch_size, args.num_generations
    accumulation = args.gradient_accumulation_steps
    if args.generation_batch_size is not None and args.steps_per_generation is not None:
        raise _error(args, "generation_batch_size", "give it or steps_per_generation, not both")
    steps = args.steps_per_generation or accumulation
    if args.generation_batch_size is not None:
        if args.generation_batch_size % size:
            raise _error(
                args, "generation_batch_size", f"expected a multiple of the batch size, {size}"
            )
        steps = args.generation_batch_size // size
    if steps % accumulation:
        raise _error(
            args,
            "steps_per_generation",
            f"expected a multiple of gradient_accumulation_steps, {accumulation}",
        )
    if (size * accumulation) % group:
        raise _error(
            args,
            "per_device_train_batch_size",
            f"an update has {size * accumulation} completions (x gradient_accumulation_steps); "
            f"expected a multiple of num_generations, {group}",
        )
    prompts = size * accumulation // group
    # As many prompts at once as completions fit into TRL's microbatch.
    batch = max(
        n for n in range(1, prompts + 1) if prompts % n == 0 and n * group <= max(size, group)
    )
    return RolloutSizes(batch, prompts // batch, steps // accumulation, args.num_iterations)


def rollout_options(args: GRPOConfig | RLOOConfig, sizes: RolloutSizes) -> dict[str, Any]:
    """The options of grpo that are common to GRPOConfig and RLOOConfig."""
    return {
        "batch_size": sizes.batch_size,
        "grad_accumulation_steps": sizes.accumulation,
        "minibatches": sizes.minibatches,
        "update_epochs": sizes.passes,
        "group_size": args.num_generations,
        "max_completion_length": args.max_completion_length,
        "max_prompt_length": _UNLIMITED,
        "max_seq_length": _UNLIMITED + args.max_completion_length,
        "temperature": args.temperature,
        "kl_coef": args.beta,
        "overlong": "mask" if args.mask_truncated_completions else "keep",
    }


def grpo_options(args: GRPOConfig, rewards: int) -> dict[str, Any]:
    """The options of grpo that follow from TRL's arguments of its method.

    Args:
        args: The trainer's config.
        rewards: Number of rewards.

    Raises:
        ConfigError: There is no such method here.
    """
    key = args.loss_type, _text(args.scale_rewards), args.importance_sampling_level
    if key not in _METHODS:
        combinations = "; ".join(", ".join(one) for one in _METHODS)
        raise ConfigError(
            f"GRPOConfig(loss_type={key[0]!r}, scale_rewards={key[1]!r}, "
            f"importance_sampling_level={key[2]!r}): not available together; choose from "
            f"{combinations}"
        )
    method = _METHODS[key]
    found: dict[str, Any] = {"loss": method, "dynamic_sampling": False}
    if method == "cispo":
        # TRL's upper bound is epsilon_high, or else epsilon.
        bound = args.epsilon if args.epsilon_high is None else args.epsilon_high
        found["clip_eps_high"] = bound
    elif method not in ("sapo", "vespo"):
        found["clip_eps"], found["clip_eps_high"] = args.epsilon, args.epsilon_high
    if args.beta:
        found["kl"] = "k3"
    if args.entropy_coef:
        found["entropy_coef"] = args.entropy_coef
    if rewards > 1:
        found["multi_objective_aggregation"] = args.multi_objective_aggregation
    return found


def rloo_options() -> dict[str, Any]:
    """The options of grpo that make it TRL's RLOO."""
    return {"loss": "rloo"}


def lora_options(peft_config: Any, layers: Sequence[str]) -> dict[str, Any]:
    """The options of LoRA that follow from a `peft.LoraConfig`, or a dict of its arguments.

    Args:
        peft_config: The object; None for this package's defaults.
        layers: Names of the linear layers in a block of the model, such as `self_attn.q_proj`.

    Raises:
        ConfigError: It has a setting that is not possible here.
    """
    if peft_config is None:
        return {}
    given = _lora_settings(peft_config)
    rank = int(given.pop("r", 8))
    alpha = float(given.pop("lora_alpha", 8))
    targets = given.pop("target_modules", None)
    found: dict[str, Any] = {
        "fine_tune_type": "dora" if given.pop("use_dora", False) else "lora",
        "lora_rank": rank,
        # Rank-stabilised LoRA scales by alpha / sqrt(rank).
        "lora_alpha": alpha * math.sqrt(rank) if given.pop("use_rslora", False) else alpha,
        "lora_dropout": float(given.pop("lora_dropout", 0.0)),
    }
    for name, value in given.items():
        allowed = _LORA_FIXED.get(name, _MISSING)
        if allowed is _ANY or (isinstance(allowed, tuple) and value in allowed):
            continue
        why = "not an argument of LoraConfig" if allowed is _MISSING else "not available here"
        raise ConfigError(f"peft_config({name}={value!r}): {why}; leave it out")
    if targets != "all-linear":
        found["lora_keys"] = _lora_keys(targets, layers)
    return found


_ANY, _MISSING = object(), object()
# Accepted values of the other arguments of peft.LoraConfig.
_LORA_FIXED: dict[str, Any] = {
    "bias": ("none",),
    "modules_to_save": (None, [], ["score"]),
    "init_lora_weights": (True,),
    "layers_to_transform": (None,),
    "layers_pattern": (None,),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "exclude_modules": (None, []),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_qalora": (False,),
    "inference_mode": (False,),
    "task_type": _ANY,
    "peft_type": _ANY,
    "peft_version": _ANY,
    "auto_mapping": _ANY,
    "base_model_name_or_path": _ANY,
    "revision": _ANY,
    "megatron_config": (None,),
    "megatron_core": _ANY,
    "qalora_group_size": _ANY,
    "loftq_config": (None, {}),
    "eva_config": (None,),
    "corda_config": (None,),
    "runtime_config": _ANY,
}


def _lora_settings(peft_config: Any) -> dict[str, Any]:
    if isinstance(peft_config, Mapping):
        return dict(peft_config)
    if dataclasses.is_dataclass(peft_config) and not isinstance(peft_config, type):
        # A set is how LoraConfig stores a list of modules.
        names = [field.name for field in dataclasses.fields(peft_config)]
        settings = {name: getattr(peft_config, name) for name in names}
        unknown = [name for name in settings if name not in _LORA_FIXED and name not in _LORA_USED]
        for name in unknown:  # of another version of peft: fine as long as it is off
            if not settings[name]:
                del settings[name]
        return settings
    raise ConfigError(
        f"peft_config: {type(peft_config).__name__}; expected a peft.LoraConfig, or a dict such as "
        '{"r": 16, "lora_alpha": 32}'
    )


_LORA_USED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "use_dora",
)


def _lora_keys(targets: Any, layers: Sequence[str]) -> list[str]:
    """Full names of the layers that `target_modules` names; peft's default is q_proj, v_proj."""
    wanted = ["q_proj", "v_proj"] if targets is None else targets
    if isinstance(wanted, str):
        raise ConfigError(
            f"peft_config(target_modules={wanted!r}): expected a list of names, or 'all-linear'"
        )
    found = []
    for target in sorted(wanted):
        matching = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not matching:
            raise ConfigError(
                f"peft_config(target_modules=…): the model has no layer {target}; it has "
                f"{', '.join(layers)}"
            )
        found += [name for name in matching if name not in found]
    return found


def _text(value: Any) -> str:
    """The name of a choice, which may be a member of an enumeration."""
    return str(getattr(value, "value", value))


def _error(args: Any, name: str, text: str) -> ConfigError:
    return ConfigError(f"{type(args).__name__}({name}={getattr(args, name)!r}): {text}")
