"""Options that all training commands share, and those of dpo, kto, sft and reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from mlx_align.errors import ConfigError
from mlx_align.settings import option

DEFAULT_BATCH_SIZE = 1


@dataclass(frozen=True)
class TrainConfig:
    """What all training commands share. Defaults are for a 4-bit 7B model on a 16 GB laptop."""

    # Where model, data and init adapter are may change on resume; what they hold may not.
    model: str | None = option(None, "Model folder, or a hub name (owner/name).", training=False)
    data: str | None = option(
        None,
        "Folder with train/valid.jsonl, a .jsonl, .json or .parquet file, or a hub name.",
        training=False,
    )
    output: str | None = option(
        None, "Run folder to write; default runs/<command>-<date>-<time>.", training=False
    )
    init_adapter: str | None = option(
        None,
        "Adapter folder from which the policy, and its reference, start (after SFT, say).",
        training=False,
    )
    format: str | None = option(None, "Force a data format instead of recognising it.")
    fine_tune_type: str | None = option(
        None,
        "lora, dora, or full (all weights of the chosen blocks). Default: lora, or the init "
        "adapter's.",
        choices=("lora", "dora", "full"),
    )
    # r 16, alpha 32 are TRL's; all linear layers: adapting attention alone learns less (Biderman
    # et al. 2024, "LoRA learns less and forgets less", find targets to matter more than rank).
    lora_rank: int | None = option(
        None, "Rank of the adapters. Default: 16, or the init adapter's.", at_least=1
    )
    lora_alpha: float | None = option(
        None,
        "Update is scaled by alpha / rank. Default: 2 x rank, or the init adapter's.",
        above=0,
    )
    # A reference has no dropout; with it on, the policy's log-probs are noisy ones.
    lora_dropout: float = option(0.0, "Dropout on the adapters' input.", at_least=0, below=1)
    lora_keys: tuple[str, ...] | None = option(
        None,
        "Layers of a block to adapt, by name, comma-separated (self_attn.q_proj,mlp.up_proj). "
        "Default: all linear ones.",
        metavar="KEYS",
    )
    # bfloat16 keeps a bf16 model's activations at 2 bytes; float32, its whole precision.
    adapter_dtype: str = option(
        "float32",
        "What LoRA adapters compute in: bfloat16 takes less memory beside a bf16 model. They are "
        "trained and saved in float32 either way.",
        choices=("float32", "bfloat16"),
    )
    num_layers: int | None = option(
        None, "Blocks to train, from the last; -1 for all. Default: -1, or the init adapter's."
    )
    iters: int | None = option(
        None, "Optimizer updates (mlx-lm counts microbatches). Default: one epoch.", at_least=1
    )
    epochs: float | None = option(
        None, "Passes over the data, instead of --iters. Default: 1.", above=0, below=1e6
    )
    # One pair at a time is what fits 16 GB; 8 accumulated steady the gradient. None here, so that
    # it can be told from one that was given beside --batch-tokens.
    batch_size: int | None = option(
        None,
        f"Prompts (with their completions) per microbatch. Default: {DEFAULT_BATCH_SIZE}.",
        at_least=1,
    )
    batch_tokens: int | None = option(
        None,
        "Instead of --batch-size: as many prompts per microbatch as fit so many tokens, with "
        "their completions and padding; at least one.",
        at_least=1,
    )
    grad_accumulation_steps: int = option(
        8, "Microbatches per update; exactly as if they were one batch.", at_least=1
    )
    # 10 x TRL's rate for full fine-tuning, as TRL advises for LoRA.
    learning_rate: float = option(1e-5, "Peak learning rate of AdamW.", above=0)
    lr_schedule: str = option(
        "linear",
        "Course of the learning rate after warm-up.",
        choices=("constant", "linear", "cosine"),
    )
    # Adam's first steps have no second moment to speak of; a tenth of the run is usual.
    warmup: float = option(
        0.1, "Warm-up: a share of the updates if below 1, else updates.", at_least=0
    )
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay.", at_least=0)
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.", above=0)
    # 7.4 GB at peak for a 7B 4-bit pair of 1024 tokens with checkpointing (computed).
    max_seq_length: int = option(
        1024, "Tokens of prompt and completion; longer rows are dropped and counted.", at_least=2
    )
    max_completion_length: int | None = option(
        None, "Cut completions to this many tokens instead of dropping the row.", at_least=1
    )
    # Without it a 7B pair of 1024 tokens needs 18 GB of activations, with it 2 (computed).
    grad_checkpoint: bool = option(
        True, "Recompute activations in the backward pass: a third slower, far less memory."
    )
    steps_per_report: int = option(10, "Updates between reports.", at_least=1, training=False)
    steps_per_eval: int = option(
        100, "Updates between evaluations on held-out data; 0 for none but the last.", at_least=0
    )
    save_every: int = option(
        100, "Updates between checkpoints; 0 for none but the last.", at_least=0, training=False
    )
    val_batches: int = option(
        25, "Microbatches of an evaluation; -1 for all held-out data.", at_least=-1
    )
    on_non_finite: str = option(
        "stop",
        "When a loss or gradient is not finite: stop, keeping what was trained before, or skip the "
        "update and count it (stops all the same after 5 in a row).",
        choices=("stop", "skip"),
        training=False,
    )
    valid_fraction: float = option(
        0.05, "Share of the data held out where it has no valid split.", at_least=0, below=1
    )
    samples: int = option(
        8,
        "Held-out prompts answered before and after, for the table and the KL estimate.",
        at_least=0,
    )
    sample_tokens: int = option(128, "Longest answer among those samples, tokens.", at_least=1)
    seed: int = option(0, "Seed of adapters, order and samples.", at_least=0)
    report_to: tuple[str, ...] | None = option(
        None,
        "Trackers to send metrics to: wandb, swanlab, or both, comma-separated.",
        metavar="NAMES",
        training=False,
    )
    project_name: str | None = option(
        None, "The project they go into, with --report-to.", training=False
    )
    force: bool = option(
        False, "Run although the plan says that memory will not do.", training=False
    )


@dataclass(frozen=True)
class LossConfig(TrainConfig):
    """What dpo and kto share: a loss with hyperparameters, and a reference."""

    # Hyperparameters common enough to have an option of their own.
    shortcuts: ClassVar[tuple[str, ...]] = ("beta",)

    loss: str = option("", "The loss.")
    loss_option: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Hyperparameter of the loss, name=value; may be given several times.",
            "metavar": "NAME=VALUE",
            "training": True,
        },
    )
    beta: float | None = option(
        None, "Short for --loss-option beta=...; how strongly the reference holds.", above=0
    )
    reference_cache: str | None = option(
        None,
        "Folder that keeps the reference's log-probs; default in the user's cache directory.",
        training=False,
    )

    def loss_options(self) -> dict[str, Any]:
        """Hyperparameters given, from `--loss-option` and its short forms.

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
                    f"--{name.replace('_', '-')} and --loss-option {name}: the same twice; give one"
                )
            options[name] = value
        return options


@dataclass(frozen=True)
class DpoConfig(LossConfig):
    """Options of `mlx-align dpo`."""

    shortcuts: ClassVar[tuple[str, ...]] = ("beta", "label_smoothing")

    loss: str = option("sigmoid", "Loss, or several with weights: sigmoid=1,sft=0.2.")
    label_smoothing: float | None = option(
        None, "Short for --loss-option label_smoothing=...", at_least=0, below=0.5
    )
    wpo: bool = option(
        False, "Weigh each pair by how likely the policy would have written it itself (WPO)."
    )
    # At 1 it would be plain DPO.
    ld_alpha: float | None = option(
        None,
        "What tokens past the shorter completion's length count (LD-DPO); default: all in full.",
        at_least=0,
        below=1,
    )


@dataclass(frozen=True)
class KtoConfig(LossConfig):
    """Options of `mlx-align kto`."""

    shortcuts: ClassVar[tuple[str, ...]] = ("beta", "desirable_weight", "undesirable_weight")

    loss: str = option("kto", "Loss of an answer.", choices=("kto", "apo_zero_unpaired"))
    desirable_weight: float | None = option(
        None, "Short for --loss-option desirable_weight=...; weight of good answers.", above=0
    )
    undesirable_weight: float | None = option(
        None, "Short for --loss-option undesirable_weight=...; weight of bad answers.", above=0
    )


@dataclass(frozen=True)
class SftConfig(TrainConfig):
    """Options of `mlx-align sft`."""

    # 10 x TRL's rate for full fine-tuning, as TRL advises for LoRA.
    learning_rate: float = option(2e-4, "Peak learning rate of AdamW.", above=0)
    loss: str = option(
        "nll",
        "Loss of a token: nll, or dft, by which unlikely tokens pull less.",
        choices=("nll", "dft"),
    )
    loss_on: str = option(
        "completion",
        "What is learned of a conversation: its last answer (completion) or every turn of the "
        "assistant.",
        choices=("completion", "assistant"),
    )


@dataclass(frozen=True)
class RewardConfig(TrainConfig):
    """Options of `mlx-align reward`."""

    # TRL's; a reward model starts from a random head and has one scalar to learn.
    learning_rate: float = option(1e-4, "Peak learning rate of AdamW.", above=0)
    members: int = option(
        1,
        "Heads on the one adapted model, each leaving another fold of the data out: an ensemble, "
        "whose members' disagreement says where not to trust it.",
        at_least=1,
    )
    # Bradley-Terry leaves the mean of the scores free; this much of a pull holds it near 0.
    center_rewards_coefficient: float = option(
        0.01, "Weight of (r_chosen + r_rejected)^2, which keeps scores near 0.", at_least=0
    )
    label_smoothing: float = option(
        0.0, "Probability that a label is wrong, whatever the data says.", at_least=0, below=0.5
    )
    rating_margin: float = option(
        0.0,
        "Margin asked for per point by which two ratings differ; 0 for none.",
        at_least=0,
    )
    # InstructGPT leaves ties out.
    ties: str = option(
        "skip",
        "Two equal ratings in a list: not compared (skip), or each wins half of the time (half).",
        choices=("skip", "half"),
    )
    samples: int = option(
        8, "Held-out groups written to samples.jsonl with their scores.", at_least=0
    )
    sample_tokens: int = option(
        128, "Longest prompt (its end) and completion among those samples, tokens.", at_least=1
    )
