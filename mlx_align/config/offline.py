"""Options common to all training commands, and those of dpo, kto, sft and reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mlx_align.config.schema import (
    ADVANCED,
    EVALUATION,
    LORA,
    LOSS,
    MODEL,
    OPTIMISATION,
    Options,
    option,
    override,
)
from mlx_align.errors import ConfigError
from mlx_align.losses.registry import LOSS_ALIASES, PAIRWISE_LOSSES

DEFAULT_BATCH_SIZE = 1
# Annotation of --data in Python; keywords.py defines it.
DATA = "Data"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """Options common to all training commands. Defaults suit a 4-bit 7B model on a 16 GB laptop."""

    # Paths of model, data and init adapter may change on resume; their contents may not.
    model: str | None = option(
        None,
        "Model folder or hub name (owner/name).",
        MODEL,
        metavar="PATH_OR_NAME",
        change_on_resume=True,
        python_type="str | Path",
        aliases=("base_model", "model_name_or_path"),
    )
    data: str | None = option(
        None,
        "Folder with train/valid.jsonl, a data file, or a hub name.",
        MODEL,
        metavar="PATH_OR_NAME",
        change_on_resume=True,
        python_type=DATA,
        aliases=("dataset", "dataset_name"),
    )
    output: str | None = option(
        None,
        "Run folder to create.",
        MODEL,
        default_text="runs/<command>-<date>-<time>",
        metavar="PATH",
        change_on_resume=True,
        python_type="str | Path",
        aliases=("output_dir",),
    )
    init_adapter: str | None = option(
        None,
        "Adapter folder that the policy and its reference start from.",
        MODEL,
        metavar="PATH",
        change_on_resume=True,
        python_type="str | PathLike[str]",
    )
    format: str | None = option(
        None, "Data format, if it isn't detected correctly.", MODEL, metavar="NAME"
    )
    columns: dict[str, Any] = option(
        {},
        "Columns of --data for prompt, chosen, rejected … (repeatable), as prompt=question.text.",
        MODEL,
        metavar="FIELD=COLUMN",
        multiple=True,
    )
    thinking: Literal["auto", "on", "off"] = option(
        "auto",
        "Thinking of the chat template; auto: off for completions without reasoning.",
        MODEL,
    )
    # 7.4 GB at peak for a 7B 4-bit pair of 1024 tokens with checkpointing (computed).
    max_seq_length: int = option(
        1024,
        "Longest row in tokens; drops longer ones.",
        MODEL,
        at_least=2,
        aliases=("max_length", "sequence_len"),
    )
    max_completion_length: int | None = option(
        None, "Truncate completions to N tokens, rather than drop rows.", MODEL, at_least=1
    )
    allow_circular: bool = option(
        False,
        "Train on labels by a judge that is, or came from, this model.",
        MODEL,
    )
    valid_fraction: float | None = option(
        None,
        "Fraction to hold out without a valid split.",
        MODEL,
        default_text="0.05 or more",
        at_least=0,
        below=1,
        aliases=("val_set_size",),
    )
    fine_tune_type: Literal["lora", "dora", "full"] | None = option(
        None,
        "Adapters, or all weights.",
        LORA,
        default_text="lora or --init-adapter's",
    )
    # r 16 and alpha 32 are TRL's. All linear layers, because adapting attention alone learns less:
    # the choice of layers matters more than the rank (Biderman et al. 2024, "LoRA learns less and
    # forgets less").
    lora_rank: int | None = option(
        None,
        "Adapter rank.",
        LORA,
        default_text="16 or --init-adapter's",
        at_least=1,
        aliases=("lora_r",),
    )
    lora_alpha: float | None = option(
        None,
        "Scale is alpha / rank.",
        LORA,
        default_text="2 x rank or --init-adapter's",
        above=0,
    )
    # 0, because the reference has no dropout: it would only add noise to the policy's log-probs.
    lora_dropout: float = option(0.0, "Dropout on the adapters' input.", LORA, at_least=0, below=1)
    lora_keys: tuple[str, ...] | None = option(
        None,
        "Layers to adapt, as self_attn.q_proj.",
        LORA,
        default_text="all linear",
        metavar="KEYS",
    )
    num_layers: int | None = option(
        None,
        "Last blocks to train; -1: all.",
        LORA,
        default_text="-1 or --init-adapter's",
    )
    iters: int | None = option(
        None,
        "Number of optimizer updates.",
        OPTIMISATION,
        default_text="chosen from the data",
        at_least=1,
        aliases=("max_steps",),
        change_on_resume=True,
        evidence="defaults.md",
    )
    epochs: float | None = option(
        None,
        "Passes over the data, instead of --iters.",
        OPTIMISATION,
        default_text="1 or more",
        above=0,
        below=1e6,
        aliases=("num_epochs", "num_train_epochs"),
        change_on_resume=True,
        evidence="defaults.md",
    )
    batch_size: int | None = option(
        None,
        "Prompts (with their completions) per microbatch.",
        OPTIMISATION,
        default_text="see --batch-tokens",
        at_least=1,
        aliases=("micro_batch_size", "per_device_train_batch_size"),
    )
    # 768 tokens take about the memory of one long pair. Short rows one by one use a processor
    # badly: packed, they train 3 times as fast (docs/verified/speed-and-memory.md).
    batch_tokens: int | None = option(
        None,
        "Instead of --batch-size: tokens per microbatch.",
        OPTIMISATION,
        default_text="up to 768",
        at_least=1,
        evidence="speed-and-memory.md#packed-rows",
    )
    grad_accumulation_steps: int | None = option(
        None,
        "Microbatches per update; exact.",
        OPTIMISATION,
        default_text="4 to 16 rows",
        at_least=1,
        aliases=("gradient_accumulation_steps",),
        evidence="defaults.md",
    )
    learning_rate: float | None = option(
        None,
        "Peak learning rate of AdamW.",
        OPTIMISATION,
        default_text="5e-5 and less",
        above=0,
        aliases=("lr",),
        evidence="defaults.md",
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = option(
        "linear",
        "Learning rate schedule after warm-up.",
        OPTIMISATION,
        aliases=("lr_scheduler", "lr_scheduler_type"),
    )
    # Adam's second moment is unreliable in the first steps; a tenth of the run is common.
    warmup: float = option(
        0.1,
        "Warm-up updates; below 1, a fraction of them.",
        OPTIMISATION,
        at_least=0,
        aliases=("warmup_ratio", "warmup_steps"),
    )
    # Without it a 7B pair of 1024 tokens needs 18 GB of activations, with it 2 (computed), and a
    # step takes a third longer.
    grad_checkpoint: bool | None = option(
        None,
        "Recompute activations: slower, less memory.",
        OPTIMISATION,
        default_text="if needed",
        aliases=("gradient_checkpointing",),
        evidence="speed-and-memory.md#packed-rows",
    )
    seed: int = option(
        0, "Random seed for adapters, data order and samples.", OPTIMISATION, at_least=0
    )
    steps_per_report: int = option(
        10,
        "Updates between reports.",
        EVALUATION,
        at_least=1,
        change_on_resume=True,
        aliases=("logging_steps",),
    )
    steps_per_eval: int | None = option(
        None,
        "Updates between evaluations; 0: only at the end.",
        EVALUATION,
        default_text="8 evaluations",
        at_least=0,
        aliases=("eval_steps",),
    )
    val_batches: int | None = option(
        None,
        "Microbatches per evaluation; -1 for all.",
        EVALUATION,
        default_text="all, if cheap",
        at_least=-1,
    )
    save_every: int = option(
        100,
        "Updates between checkpoints; 0: only the final one.",
        EVALUATION,
        at_least=0,
        change_on_resume=True,
        aliases=("save_steps",),
    )
    keep: Literal["best", "last"] = option(
        "best",
        "Keep the best on held-out data, or the last.",
        EVALUATION,
        change_on_resume=True,
    )
    samples: int = option(8, "Held-out prompts to answer before and after.", EVALUATION, at_least=0)
    sample_tokens: int = option(128, "Longest sample in tokens.", EVALUATION, at_least=1)
    report_to: tuple[str, ...] | None = option(
        None,
        "Trackers for metrics: wandb, swanlab, or both (comma-separated).",
        EVALUATION,
        metavar="NAMES",
        change_on_resume=True,
    )
    project_name: str | None = option(
        None,
        "Project name for --report-to.",
        EVALUATION,
        metavar="NAME",
        change_on_resume=True,
        aliases=("wandb_project",),
    )
    # bfloat16 keeps a bf16 model's activations at 2 bytes; float32 keeps full precision.
    adapter_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "Compute dtype of LoRA; weights stay float32.",
        ADVANCED,
    )
    weight_decay: float = option(0.0, "Weight decay of AdamW.", ADVANCED, at_least=0)
    max_grad_norm: float = option(1.0, "Clip gradients to this norm.", ADVANCED, above=0)
    on_non_finite: Literal["stop", "skip"] = option(
        "stop",
        "On a non-finite loss or gradient; skip at most 5 in a row.",
        ADVANCED,
        change_on_resume=True,
    )
    force: bool = option(
        False,
        "Start even if the memory estimate exceeds this machine.",
        ADVANCED,
        change_on_resume=True,
    )

    @property
    def accumulation(self) -> int:
        """Microbatches per update; 8 if it was neither given nor chosen yet."""
        return self.grad_accumulation_steps or 8

    @property
    def rate(self) -> float:
        """The peak learning rate, once it was given or chosen."""
        assert self.learning_rate is not None
        return self.learning_rate


@dataclass(frozen=True, kw_only=True)
class LabelOptions(Options):
    """How the labels of pairs are read, for dpo, kto, reward and the data commands."""

    # InstructGPT leaves ties out.
    ties: Literal["skip", "half"] = option(
        "skip", "Ties: skip the pair, or count half a win for each.", MODEL
    )
    strength: Literal["ignore", "margin", "soft-label"] = option(
        "ignore",
        "Use the strength of a preference as margin (reward) or soft label, 1 / (1 + e^-strength).",
        MODEL,
    )
    # (votes + 1/2) / (n + 1): three of three votes are no certainty.
    votes: Literal["soft-label", "ignore"] = option(
        "soft-label", "Votes as soft label, or only for the order.", MODEL
    )
    min_agreement: float | None = option(
        None,
        "Leave out pairs on which fewer raters (or votes) agree.",
        MODEL,
        above=0.5,
        at_most=1,
    )


@dataclass(frozen=True, kw_only=True)
class LossConfig(TrainConfig):
    """Options common to dpo and kto: a loss with hyperparameters, and a reference."""

    # Hyperparameters that have a separate option.
    shortcuts: ClassVar[tuple[str, ...]] = ("beta",)

    loss: str = option(
        "",
        "The loss.",
        LOSS,
        metavar="LOSS",
        aliases=("loss_type",),
    )
    loss_option: dict[str, Any] = option(
        {},
        "Hyperparameter of the loss (repeatable), such as gamma=0.5.",
        LOSS,
        metavar="NAME=VALUE",
        multiple=True,
    )
    beta: float | None = option(
        None,
        "KL penalty's strength (a --loss-option).",
        LOSS,
        default_text="the loss's",
        above=0,
        aliases=("rl_beta",),
    )
    reference_cache: str | None = option(
        None,
        "Folder for reference log-probs.",
        ADVANCED,
        default_text="in the user's cache folder",
        metavar="PATH",
        change_on_resume=True,
        python_type="str | Path",
    )
    # Beyond it, a learned preference only moves the policy away from its start: 1,500 easy pairs of
    # SmolLM2 went 26 nats at a margin of 1.6, and 72 at 4.3 (docs/verified/defaults.md).
    target_margin: float | None = option(
        None,
        "Held-out margin to stop at if 90% are right; 0: never.",
        EVALUATION,
        default_text="0.5 without --iters",
        at_least=0,
        change_on_resume=True,
        evidence="defaults.md#1500-pairs",
    )

    def loss_options(self) -> dict[str, Any]:
        """Hyperparameters given, from `loss_option` and its short forms.

        Raises:
            ConfigError: One was given both ways.
        """
        options = dict(self.loss_option)
        for name in self.shortcuts:
            value = getattr(self, name)
            if value is None:
                continue
            if name in options:
                raise ConfigError(
                    f"--{name.replace('_', '-')} and --loss-option {name} set the same "
                    "hyperparameter twice; give one"
                )
            options[name] = value
        return options


@dataclass(frozen=True, kw_only=True)
class DPOConfig(LabelOptions, LossConfig):
    """Options of `mlx-align dpo`."""

    shortcuts: ClassVar[tuple[str, ...]] = ("beta", "label_smoothing")

    loss: str = option(
        "sigmoid",
        "Loss, or a weighted sum such as sigmoid=1,sft=0.2.",
        LOSS,
        names=tuple(PAIRWISE_LOSSES),
        metavar="LOSS",
        python_type="str | Callable[..., Any]",
        aliases=("loss_type",),
    )
    label_smoothing: float | None = option(
        None,
        "Probability that a label is flipped.",
        LOSS,
        default_text="the loss's",
        at_least=0,
        below=0.5,
    )
    wpo: bool = option(False, "Weight pairs by their probability (WPO).", LOSS)
    # At 1 it would be plain DPO.
    ld_alpha: float | None = option(
        None,
        "LD-DPO: weight of tokens past the shorter length.",
        LOSS,
        default_text="off",
        at_least=0,
        below=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "loss", LOSS_ALIASES.get(self.loss, self.loss))


@dataclass(frozen=True, kw_only=True)
class KTOConfig(LabelOptions, LossConfig):
    """Options of `mlx-align kto`."""

    shortcuts: ClassVar[tuple[str, ...]] = ("beta", "desirable_weight", "undesirable_weight")

    loss: Literal["kto", "apo_zero_unpaired"] = option(
        "kto",
        "Loss of a completion.",
        LOSS,
        aliases=("loss_type",),
    )
    desirable_weight: float | None = option(
        None,
        "Weight of desirable completions.",
        LOSS,
        default_text="the loss's",
        above=0,
    )
    undesirable_weight: float | None = option(
        None,
        "Weight of undesirable completions.",
        LOSS,
        default_text="the loss's",
        above=0,
    )


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """Options of `mlx-align sft`."""

    # 10 x TRL's rate for full fine-tuning, as TRL advises for LoRA.
    learning_rate: float | None = override(TrainConfig, "learning_rate", default_text="2e-4")
    loss: Literal["nll", "dft"] = option(
        "nll", "Token loss: nll, or dft, which weights unlikely tokens less.", LOSS
    )
    loss_on: Literal["completion", "assistant"] = option(
        "completion",
        "Train on the last assistant turn (completion) or on all of them (assistant).",
        LOSS,
    )
    min_agreement: float | None = override(LabelOptions, "min_agreement")


@dataclass(frozen=True, kw_only=True)
class RewardConfig(LabelOptions, TrainConfig):
    """Options of `mlx-align reward`."""

    # TRL's default: a reward model starts from a random head, and learns only a scalar.
    learning_rate: float | None = override(TrainConfig, "learning_rate", default_text="1e-4")
    members: int = option(
        1,
        "Heads of an ensemble, each trained without another fold of the data.",
        LOSS,
        at_least=1,
    )
    # Bradley-Terry leaves the mean of the scores free; this weight keeps it near 0.
    center_rewards_coefficient: float = option(
        0.01, "Weight of (r_chosen + r_rejected)^2.", LOSS, at_least=0
    )
    label_smoothing: float = option(
        0.0, "Probability that a label is flipped.", LOSS, at_least=0, below=0.5
    )
    rating_margin: float = option(
        0.0, "Margin per point of difference between two ratings.", LOSS, at_least=0
    )
    samples: int = override(
        TrainConfig, "samples", help="Held-out groups to write to samples.jsonl, with scores."
    )
    sample_tokens: int = override(
        TrainConfig,
        "sample_tokens",
        help="Longest prompt (its end) and completion of those, in tokens.",
    )
