"""The keyword arguments of the Python functions, as types for editors and mypy.

Generated from the config classes by scripts/make_reference.py; don't edit. Use them as
`def dpo(**options: Unpack[DPOOptions]) -> Run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Required, TypeAlias, TypedDict

if TYPE_CHECKING:
    from datasets import Dataset
else:
    Dataset = Any

# Rows of data: a list of dicts, or a datasets.Dataset.
Rows: TypeAlias = Iterable[Mapping[str, Any]] | Dataset
# A file, folder or hub name; rows; or rows by split name (train, valid).
Data: TypeAlias = str | Path | Rows | Mapping[str, Rows]
# A reward: a spec as on the command line, a function, or a function with its weight.
RewardSource: TypeAlias = str | Callable[..., Any] | tuple[Callable[..., Any], float]
# One or several rewards.
Rewards: TypeAlias = RewardSource | Sequence[RewardSource]


class AdapterExportOptions(TypedDict, total=False):
    """Keyword arguments checked by `AdapterExportConfig`."""

    model: Required[str | Path]
    adapter_path: Required[str | PathLike[str]]
    output: str | Path | None
    format: Literal["peft"]


class AgreementOptions(TypedDict, total=False):
    """Keyword arguments checked by `AgreementConfig`."""

    input: Required[str | Sequence[str]]
    output: str | Path | None
    ties: Literal["skip", "half"]
    min_agreement: float | None
    seed: int


class CacheOptions(TypedDict, total=False):
    """Keyword arguments checked by `CacheConfig`."""

    reference_cache: str | Path | None
    purge: bool


class ChatOptions(TypedDict, total=False):
    """Keyword arguments checked by `ChatConfig`."""

    model: str | Path | None
    adapter_path: str | PathLike[str] | None
    compare: bool
    system: str | None
    thinking: Literal["auto", "on", "off"] | None
    max_completion_length: int
    max_seq_length: int | None
    temperature: float
    seed: int


class CheckDataOptions(TypedDict, total=False):
    """Keyword arguments checked by `CheckDataConfig`."""

    model: str | Path | None
    data: Data | None
    format: str | None
    columns: Mapping[str, float | str]
    thinking: Literal["auto", "on", "off"]
    ties: Literal["skip", "half"]
    strength: Literal["ignore", "margin", "soft-label"]
    votes: Literal["soft-label", "ignore"]
    min_agreement: float | None
    max_seq_length: int
    max_completion_length: int | None


class ConstitutionOptions(TypedDict, total=False):
    """Keyword arguments checked by `ConstitutionConfig`."""

    model: Required[str | Path]
    adapter_path: str | PathLike[str] | None
    url: str | None
    api_key_variable: str | None
    data: Required[Data]
    format: str | None
    columns: Mapping[str, float | str]
    output: Required[str | Path]
    constitution: str | Path | None
    judge_model: str | Path | None
    judge_adapter_path: str | PathLike[str] | None
    judge_url: str | None
    min_verdict_mass: float | None
    human: str | Path | None
    pairs: bool
    allow_unproven: bool
    ties: Literal["skip", "half"]
    min_confidence: float
    labels: Literal["soft", "hard"]
    rounds: int
    answers: int
    max_completion_length: int
    temperature: float
    seed: int
    samples: int


class ConvertDataOptions(TypedDict, total=False):
    """Keyword arguments checked by `ConvertDataConfig`."""

    input: Required[str | Sequence[str]]
    output: Required[str | Path]
    resume: bool
    format: str | None
    columns: Mapping[str, float | str]
    ties: Literal["skip", "half"]
    strength: Literal["ignore", "margin", "soft-label"]
    votes: Literal["soft-label", "ignore"]
    min_agreement: float | None
    split: str
    as_messages: bool
    dedup: bool
    max_rows: int | None


class DPOOptions(TypedDict, total=False):
    """Keyword arguments checked by `DPOConfig`."""

    model: str | Path | None
    data: Data | None
    output: str | Path | None
    init_adapter: str | PathLike[str] | None
    format: str | None
    columns: Mapping[str, float | str]
    thinking: Literal["auto", "on", "off"]
    max_seq_length: int
    max_completion_length: int | None
    allow_circular: bool
    valid_fraction: float | None
    ties: Literal["skip", "half"]
    strength: Literal["ignore", "margin", "soft-label"]
    votes: Literal["soft-label", "ignore"]
    min_agreement: float | None
    fine_tune_type: Literal["lora", "dora", "full"] | None
    lora_rank: int | None
    lora_alpha: float | None
    lora_dropout: float
    lora_keys: str | Sequence[str] | None
    num_layers: int | None
    iters: int | None
    epochs: float | None
    batch_size: int | None
    batch_tokens: int | None
    grad_accumulation_steps: int | None
    learning_rate: float | None
    lr_schedule: Literal["constant", "linear", "cosine"]
    warmup: float
    grad_checkpoint: bool | None
    seed: int
    loss: str | Callable[..., Any]
    loss_option: Mapping[str, float | str]
    beta: float | None
    label_smoothing: float | None
    wpo: bool
    ld_alpha: float | None
    steps_per_report: int
    steps_per_eval: int | None
    val_batches: int | None
    save_every: int
    keep: Literal["best", "last"]
    samples: int
    sample_tokens: int
    report_to: str | Sequence[str] | None
    project_name: str | None
    target_margin: float | None
    adapter_dtype: Literal["float32", "bfloat16"]
    weight_decay: float
    max_grad_norm: float
    on_non_finite: Literal["stop", "skip"]
    force: bool
    reference_cache: str | Path | None


class EvalOptions(TypedDict, total=False):
    """Keyword arguments checked by `EvalConfig`."""

    model: str | Path | None
    adapter_path: str | PathLike[str] | None
    data: Data | None
    split: Literal["train", "valid", "test"] | None
    format: str | None
    columns: Mapping[str, float | str]
    max_seq_length: int | None
    output: str | Path | None
    resume: bool
    samples: int
    n: int
    max_completion_length: int
    seed: int
    reward_model: str | PathLike[str] | None
    perplexity_data: str | Path | None


class ExportOptions(TypedDict, total=False):
    """Keyword arguments checked by `ExportConfig`."""

    model: Required[str | Path]
    adapter_path: Required[str | PathLike[str]]
    output: str | Path | None


class FuseOptions(TypedDict, total=False):
    """Keyword arguments checked by `FuseConfig`."""

    model: Required[str | Path]
    adapter_path: Required[str | PathLike[str]]
    output: str | Path | None
    dequantize: bool


class GRPOOptions(TypedDict, total=False):
    """Keyword arguments checked by `GRPOConfig`."""

    model: str | Path | None
    data: Data | None
    output: str | Path | None
    init_adapter: str | PathLike[str] | None
    format: str | None
    columns: Mapping[str, float | str]
    thinking: Literal["auto", "on", "off"]
    allow_circular: bool
    valid_fraction: float | None
    fine_tune_type: Literal["lora", "dora", "full"] | None
    lora_rank: int | None
    lora_alpha: float | None
    lora_dropout: float
    lora_keys: str | Sequence[str] | None
    num_layers: int | None
    reward: Rewards | None
    reward_model: str | PathLike[str] | None
    reward_model_weight: float
    eval_reward: Rewards | None
    eval_reward_model: str | PathLike[str] | None
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] | None
    max_seq_length: int
    max_completion_length: int
    group_size: int
    minibatches: int
    update_epochs: int
    temperature: float
    max_prompt_length: int | None
    overlong: Literal["keep", "mask"] | None
    dynamic_sampling: bool | None
    iters: int | None
    epochs: float | None
    batch_size: int | None
    batch_tokens: int | None
    grad_accumulation_steps: int | None
    learning_rate: float | None
    lr_schedule: Literal["constant", "linear", "cosine"]
    warmup: float
    grad_checkpoint: bool | None
    seed: int
    kl_coef: float
    loss: str
    clip_eps: float | None
    clip_eps_high: float | None
    kl: Literal["k1", "k2", "k3"] | None
    beta: float | None
    entropy_coef: float
    steps_per_report: int
    steps_per_eval: int
    val_batches: int | None
    save_every: int
    keep: Literal["best", "last"]
    samples: int
    sample_tokens: int
    report_to: str | Sequence[str] | None
    project_name: str | None
    adapter_dtype: Literal["float32", "bfloat16"]
    weight_decay: float
    max_grad_norm: float
    on_non_finite: Literal["stop", "skip"]
    force: bool
    reward_timeout: float
    importance_cap: float
    guard: bool


class ImproveOptions(TypedDict, total=False):
    """Keyword arguments checked by `ImproveConfig`."""

    model: Required[str | Path]
    init_adapter: str | PathLike[str] | None
    data: Required[Data]
    format: str | None
    columns: Mapping[str, float | str]
    output: Required[str | Path]
    valid_fraction: float
    rounds: int
    train_config: str | Path | None
    iters: int | None
    learning_rate: float | None
    beta: float | None
    judge_model: str | Path | None
    judge_adapter_path: str | PathLike[str] | None
    judge_url: str | None
    api_key_variable: str | None
    reward_model: str | PathLike[str] | None
    reward: Rewards | None
    rubric: str | Path | None
    human: str | Path | None
    labels_by: Literal["judge", "people"]
    allow_unproven: bool
    allow_circular: bool
    min_confidence: float
    prompts_per_round: int | None
    answers: int
    max_completion_length: int
    temperature: float
    seed: int
    eval_judge_model: str | Path | None
    eval_judge_url: str | None
    eval_reward_model: str | PathLike[str] | None
    eval_reward: Rewards | None
    eval_prompts: int
    guard: bool


class JudgeOptions(TypedDict, total=False):
    """Keyword arguments checked by `JudgeConfig`."""

    data: Required[Data]
    split: str
    format: str | None
    columns: Mapping[str, float | str]
    output: Required[str | Path]
    human: str | Path | None
    model: str | Path | None
    adapter_path: str | PathLike[str] | None
    reward_model: str | PathLike[str] | None
    reward: Rewards | None
    url: str | None
    api_key_variable: str | None
    concurrency: int | None
    rubric: str | Path | None
    by_criterion: bool
    min_verdict_mass: float | None
    own_name: str | Sequence[str] | None
    max_seq_length: int | None
    batch_size: int | None
    allow_unproven: bool
    pairs_per_prompt: int | None
    ties: Literal["skip", "half"]
    min_confidence: float
    labels: Literal["soft", "hard"]
    seed: int


class KTOOptions(TypedDict, total=False):
    """Keyword arguments checked by `KTOConfig`."""

    model: str | Path | None
    data: Data | None
    output: str | Path | None
    init_adapter: str | PathLike[str] | None
    format: str | None
    columns: Mapping[str, float | str]
    thinking: Literal["auto", "on", "off"]
    max_seq_length: int
    max_completion_length: int | None
    allow_circular: bool
    valid_fraction: float | None
    ties: Literal["skip", "half"]
    strength: Literal["ignore", "margin", "soft-label"]
    votes: Literal["soft-label", "ignore"]
    min_agreement: float | None
    fine_tune_type: Literal["lora", "dora", "full"] | None
    lora_rank: int | None
    lora_alpha: float | None
    lora_dropout: float
    lora_keys: str | Sequence[str] | None
    num_layers: int | None
    iters: int | None
    epochs: float | None
    batch_size: int | None
    batch_tokens: int | None
    grad_accumulation_steps: int | None
    learning_rate: float | None
    lr_schedule: Literal["constant", "linear", "cosine"]
    warmup: float
    grad_checkpoint: bool | None
    seed: int
    loss: Literal["kto", "apo_zero_unpaired"]
    loss_option: Mapping[str, float | str]
    beta: float | None
    desirable_weight: float | None
    undesirable_weight: float | None
    steps_per_report: int
    steps_per_eval: int | None
    val_batches: int | None
    save_every: int
    keep: Literal["best", "last"]
    samples: int
    sample_tokens: int
    report_to: str | Sequence[str] | None
    project_name: str | None
    target_margin: float | None
    adapter_dtype: Literal["float32", "bfloat16"]
    weight_decay: float
    max_grad_norm: float
    on_non_finite: Literal["stop", "skip"]
    force: bool
    reference_cache: str | Path | None


class LabelOptions(TypedDict, total=False):
    """Keyword arguments checked by `LabelConfig`."""

    input: Required[str | Sequence[str]]
    output: Required[str | Path]
    format: str | None
    columns: Mapping[str, float | str]
    model: str | Path | None
    rater: str | None
    web: bool
    port: int | None
    open: bool
    rubric: str | Path | None
    by_criterion: bool
    pairs_per_prompt: int
    max_pairs: int | None
    spot_check: float | None
    ask_by: Literal["random", "disagreement"]
    reward_model: str | PathLike[str] | None
    seed: int
    adapter_path: str | PathLike[str] | None
    arms: str | Path | None
    temperatures: str | Sequence[str] | None
    n: int | None
    max_completion_length: int | None
    thinking: Literal["auto", "on", "off"] | None


class PPOOptions(TypedDict, total=False):
    """Keyword arguments checked by `PPOConfig`."""

    model: str | Path | None
    data: Data | None
    output: str | Path | None
    init_adapter: str | PathLike[str] | None
    format: str | None
    columns: Mapping[str, float | str]
    thinking: Literal["auto", "on", "off"]
    allow_circular: bool
    valid_fraction: float | None
    fine_tune_type: Literal["lora", "dora", "full"] | None
    lora_rank: int | None
    lora_alpha: float | None
    lora_dropout: float
    lora_keys: str | Sequence[str] | None
    num_layers: int | None
    reward: Rewards | None
    reward_model: str | PathLike[str] | None
    reward_model_weight: float
    eval_reward: Rewards | None
    eval_reward_model: str | PathLike[str] | None
    reward_rollouts: int
    reward_clip: float
    missing_eos_penalty: float
    max_seq_length: int
    max_completion_length: int
    group_size: int
    minibatches: int
    update_epochs: int
    temperature: float
    max_prompt_length: int | None
    iters: int | None
    epochs: float | None
    batch_size: int | None
    batch_tokens: int | None
    grad_accumulation_steps: int | None
    learning_rate: float | None
    lr_schedule: Literal["constant", "linear", "cosine"]
    warmup: float
    grad_checkpoint: bool | None
    seed: int
    kl_coef: float
    target_kl: float | None
    clip_eps: float
    whiten_advantages: bool
    ptx_coef: float
    ptx_data: str | Path | None
    value_clip: float
    gamma: float
    gae_lambda: float
    critic: Literal["own", "shared"]
    critic_learning_rate: float
    critic_warmup: int | None
    value_coef: float
    steps_per_report: int
    steps_per_eval: int
    val_batches: int | None
    save_every: int
    keep: Literal["best", "last"]
    samples: int
    sample_tokens: int
    report_to: str | Sequence[str] | None
    project_name: str | None
    adapter_dtype: Literal["float32", "bfloat16"]
    weight_decay: float
    max_grad_norm: float
    on_non_finite: Literal["stop", "skip"]
    force: bool
    reward_timeout: float
    importance_cap: float
    guard: bool
    kl_horizon: float


class PlanOptions(TypedDict, total=False):
    """Keyword arguments checked by `PlanConfig`."""

    command: Literal["dpo", "kto", "sft", "reward", "ppo", "grpo"]
    machine: str | None
    measure: bool
    run: str | Path | None


class ReportOptions(TypedDict, total=False):
    """Keyword arguments checked by `ReportConfig`."""

    runs: Required[str | Sequence[str]]
    output: str | Path | None
    open: bool


class RerankOptions(TypedDict, total=False):
    """Keyword arguments checked by `RerankConfig`."""

    model: Required[str | Path]
    adapter_path: str | PathLike[str] | None
    reward_model: str | PathLike[str] | None
    prompt: str | None
    input: str | Path | None
    output: str | Path | None
    resume: bool
    ignore_chat_template: bool
    beta: float | None
    reference_adapter: str | PathLike[str] | None
    per_token: bool | None
    thinking: Literal["auto", "on", "off"] | None
    batch_size: int
    max_seq_length: int
    n: int | None
    max_completion_length: int | None
    temperature: float | None
    seed: int | None


class RewardOptions(TypedDict, total=False):
    """Keyword arguments checked by `RewardConfig`."""

    model: str | Path | None
    data: Data | None
    output: str | Path | None
    init_adapter: str | PathLike[str] | None
    format: str | None
    columns: Mapping[str, float | str]
    thinking: Literal["auto", "on", "off"]
    max_seq_length: int
    max_completion_length: int | None
    allow_circular: bool
    valid_fraction: float | None
    ties: Literal["skip", "half"]
    strength: Literal["ignore", "margin", "soft-label"]
    votes: Literal["soft-label", "ignore"]
    min_agreement: float | None
    fine_tune_type: Literal["lora", "dora", "full"] | None
    lora_rank: int | None
    lora_alpha: float | None
    lora_dropout: float
    lora_keys: str | Sequence[str] | None
    num_layers: int | None
    iters: int | None
    epochs: float | None
    batch_size: int | None
    batch_tokens: int | None
    grad_accumulation_steps: int | None
    learning_rate: float | None
    lr_schedule: Literal["constant", "linear", "cosine"]
    warmup: float
    grad_checkpoint: bool | None
    seed: int
    members: int
    center_rewards_coefficient: float
    label_smoothing: float
    rating_margin: float
    steps_per_report: int
    steps_per_eval: int | None
    val_batches: int | None
    save_every: int
    keep: Literal["best", "last"]
    samples: int
    sample_tokens: int
    report_to: str | Sequence[str] | None
    project_name: str | None
    adapter_dtype: Literal["float32", "bfloat16"]
    weight_decay: float
    max_grad_norm: float
    on_non_finite: Literal["stop", "skip"]
    force: bool


class SFTOptions(TypedDict, total=False):
    """Keyword arguments checked by `SFTConfig`."""

    model: str | Path | None
    data: Data | None
    output: str | Path | None
    init_adapter: str | PathLike[str] | None
    format: str | None
    columns: Mapping[str, float | str]
    thinking: Literal["auto", "on", "off"]
    max_seq_length: int
    max_completion_length: int | None
    allow_circular: bool
    valid_fraction: float | None
    min_agreement: float | None
    fine_tune_type: Literal["lora", "dora", "full"] | None
    lora_rank: int | None
    lora_alpha: float | None
    lora_dropout: float
    lora_keys: str | Sequence[str] | None
    num_layers: int | None
    iters: int | None
    epochs: float | None
    batch_size: int | None
    batch_tokens: int | None
    grad_accumulation_steps: int | None
    learning_rate: float | None
    lr_schedule: Literal["constant", "linear", "cosine"]
    warmup: float
    grad_checkpoint: bool | None
    seed: int
    loss: Literal["nll", "dft"]
    loss_on: Literal["completion", "assistant"]
    steps_per_report: int
    steps_per_eval: int | None
    val_batches: int | None
    save_every: int
    keep: Literal["best", "last"]
    samples: int
    sample_tokens: int
    report_to: str | Sequence[str] | None
    project_name: str | None
    adapter_dtype: Literal["float32", "bfloat16"]
    weight_decay: float
    max_grad_norm: float
    on_non_finite: Literal["stop", "skip"]
    force: bool


class SampleOptions(TypedDict, total=False):
    """Keyword arguments checked by `SampleConfig`."""

    model: Required[str | Path]
    adapter_path: str | PathLike[str] | None
    data: Required[Data]
    format: str | None
    columns: Mapping[str, float | str]
    thinking: Literal["auto", "on", "off"]
    output: Required[str | Path]
    resume: bool
    max_prompt_length: int
    reward: Rewards | None
    reward_model: str | PathLike[str] | None
    reward_model_weight: float | None
    reward_timeout: float
    threshold: float | None
    n: int
    keep: int | None
    pairs: bool
    max_completion_length: int
    temperature: float
    temperatures: str | Sequence[str] | None
    arms: str | Path | None
    seed: int


class ScoreOptions(TypedDict, total=False):
    """Keyword arguments checked by `ScoreConfig`."""

    model: Required[str | Path]
    adapter_path: str | PathLike[str] | None
    data: Data | None
    split: str | None
    output: str | Path | None
    resume: bool
    format: str | None
    columns: Mapping[str, float | str]
    beta: float | None
    reference_adapter: str | PathLike[str] | None
    per_token: bool | None
    thinking: Literal["auto", "on", "off"] | None
    batch_size: int
    max_seq_length: int
    logps: bool
    combine: Literal["mean", "min", "mean-variance"]
    variance_penalty: float | None


class SelectOptions(TypedDict, total=False):
    """Keyword arguments checked by `SelectConfig`."""

    data: Required[Data]
    split: str
    format: str | None
    columns: Mapping[str, float | str]
    output: Required[str | Path]
    by: Literal["random", "disagreement"]
    count: int | None
    share: float | None
    reward_model: str | PathLike[str] | None
    seed: int


class SelftestOptions(TypedDict, total=False):
    """Keyword arguments checked by `SelftestConfig`."""

    size: Literal["small", "full"] | None
    minutes: float
    output: str | Path
