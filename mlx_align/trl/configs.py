"""TRL's config classes: every argument, its default, and what happens with it here."""

from __future__ import annotations

from typing import Any

from mlx_align.trl.arguments import Arguments, arguments, fixed, ignored, used

_LEAVE_OUT = "leave it out"
_ONE_DEVICE = "one process trains on one device"
_CUDA = f"a CUDA kernel; {_LEAVE_OUT}"
_HUB = "uploading is not part of training; use `huggingface-cli upload` on the run folder"
_VLLM = "the policy samples with mlx; leave out use_vllm"
_SAMPLER = (
    "completions are sampled from the policy itself, without truncating its distribution, because "
    "importance ratios need the probabilities that were sampled from; use temperature"
)
_SYNC_REF = (
    "the reference is the model as it starts; to move it, start a second run with init_adapter"
)
_RATE = "Peak learning rate. The default is one for LoRA, not TRL's."
_WITH_VLLM = "Only has an effect with use_vllm."


# Peak learning rates for LoRA, ten times TRL's for full fine-tuning or about that.
_RATES = {"dpo": 1e-5, "kto": 1e-5, "sft": 2e-4, "reward": 1e-4, "grpo": 1e-5}


@arguments
class TrainingArguments(Arguments):
    """Arguments common to all trainers: those of transformers' TrainingArguments."""

    output_dir: str | None = used(
        "Run folder to create. Default: named after the model.", default=None
    )
    # --- batches and steps
    per_device_train_batch_size: int = used("Rows per microbatch.", default=8)
    gradient_accumulation_steps: int = used("Microbatches per update.", default=1)
    num_train_epochs: float = used("Passes over the data.", default=3.0)
    max_steps: int = used("Number of updates, instead of num_train_epochs, if above 0.", default=-1)
    auto_find_batch_size: bool = fixed(
        "memory is estimated before the run; see plan", default=False
    )
    per_device_eval_batch_size: int = ignored(
        "The batch size of evaluation changes no metric.", default=8
    )
    eval_accumulation_steps: int | None = ignored("Changes no metric.", default=None)
    # --- optimizer
    learning_rate: float = used("Peak learning rate.", default=1e-5)
    lr_scheduler_type: Any = used(
        "linear, cosine, constant, or constant_with_warmup; others are refused.", default="linear"
    )
    lr_scheduler_kwargs: Any = fixed(
        "schedules have no options; leave it out", default=None, accepted=({},)
    )
    warmup_steps: float = used("Updates of warm-up; below 1, a fraction of all updates.", default=0)
    warmup_ratio: float | None = used("Fraction of the updates for warm-up.", default=None)
    optim: Any = fixed(
        "AdamW is the only optimizer",
        default="adamw_torch",
        accepted=(
            "adamw_torch_fused",
            "adamw",
            "adamw_hf",
            "adamw_anyprecision",
        ),
    )
    optim_args: str | None = fixed(_LEAVE_OUT, default=None)
    optim_target_modules: Any = fixed(_LEAVE_OUT, default=None)
    weight_decay: float = used("Weight decay.", default=0.0)
    adam_beta1: float = fixed("it is 0.9", default=0.9)
    adam_beta2: float = fixed("it is 0.999", default=0.999)
    adam_epsilon: float = fixed("it is 1e-8", default=1e-8)
    max_grad_norm: float = used("Clip gradients to this norm; 0 for no clipping.", default=1.0)
    label_smoothing_factor: float = fixed(
        "use label_smoothing of DPOConfig", default=0.0, accepted=(0,)
    )
    average_tokens_across_devices: bool = ignored(_ONE_DEVICE, default=True)
    neftune_noise_alpha: float | None = fixed("there is no NEFTune", default=None)
    # --- precision and memory
    bf16: bool | None = ignored(
        "The model computes in the dtype that its files have.", default=None
    )
    fp16: bool = fixed(
        "the model computes in the dtype that its files have; leave it out", default=False
    )
    bf16_full_eval: bool = ignored("Evaluation computes as training does.", default=False)
    fp16_full_eval: bool = fixed(_LEAVE_OUT, default=False)
    tf32: bool | None = ignored("There is no TF32 on Apple silicon.", default=None)
    gradient_checkpointing: bool = used(
        "Recompute activations: slower, far less memory.", default=True
    )
    gradient_checkpointing_kwargs: Any = ignored("There is one way of checkpointing.", default=None)
    activation_checkpointing: bool | None = fixed(
        "use gradient_checkpointing", default=None, accepted=(False,)
    )
    activation_checkpointing_kwargs: Any = fixed("use gradient_checkpointing", default=None)
    torch_compile: bool = fixed(f"updates are always compiled; {_LEAVE_OUT}", default=False)
    torch_compile_backend: str | None = fixed(_LEAVE_OUT, default=None)
    torch_compile_mode: str | None = fixed(_LEAVE_OUT, default=None)
    use_liger_kernel: bool = fixed(_CUDA, default=False)
    liger_kernel_config: Any = fixed(_CUDA, default=None)
    use_cache: bool = ignored("Training uses no key-value cache.", default=False)
    torch_empty_cache_steps: int | None = ignored("mlx frees memory automatically.", default=None)
    use_cpu: bool = fixed("call mlx.core.set_default_device(mlx.core.cpu) first", default=False)
    # --- logging
    logging_strategy: Any = used(
        "steps, or no (only the first and the last update).", default="steps"
    )
    logging_steps: float = used("Updates between rows of metrics, as a whole number.", default=10)
    logging_first_step: bool = ignored("The first update is always logged.", default=False)
    logging_nan_inf_filter: bool = ignored("A loss that is not finite stops the run.", default=True)
    log_level: str = ignored("Messages are shown, or not with disable_tqdm.", default="passive")
    log_level_replica: str = ignored(_ONE_DEVICE, default="warning")
    log_on_each_node: bool = ignored(_ONE_DEVICE, default=True)
    disable_tqdm: bool | None = used("True turns off progress and notes.", default=None)
    report_to: Any = used("none, wandb or swanlab; other trackers are refused.", default="none")
    run_name: str | None = ignored("The run is named after its folder.", default=None)
    project: str = used("Project of the tracker, if report_to names one.", default="huggingface")
    trackio_space_id: str | None = fixed("use report_to='wandb' or 'swanlab'", default=None)
    trackio_bucket_id: str | None = fixed("use report_to='wandb' or 'swanlab'", default=None)
    trackio_static_space_id: Any = fixed("use report_to='wandb' or 'swanlab'", default=None)
    include_num_input_tokens_seen: Any = ignored("Metrics always have num_tokens.", default="no")
    skip_memory_metrics: bool = ignored("Metrics always have peak_memory_bytes.", default=True)
    # --- evaluation
    eval_strategy: Any = used(
        "no, steps or epoch. With eval_dataset, the end of the run is always evaluated.",
        default="no",
    )
    eval_steps: float | None = used(
        "Updates between evaluations. Default: logging_steps.", default=None
    )
    eval_delay: float = fixed(_LEAVE_OUT, default=0, accepted=(0.0,))
    eval_on_start: bool = used(
        "Whether callbacks see the evaluation before training.", default=False
    )
    prediction_loss_only: bool = ignored("Changes no metric.", default=False)
    eval_do_concat_batches: bool = ignored("Changes no metric.", default=True)
    eval_use_gather_object: bool = ignored(_ONE_DEVICE, default=False)
    include_for_metrics: list[str] = fixed("there is no compute_metrics; use callbacks", default=[])
    batch_eval_metrics: bool = fixed("there is no compute_metrics; use callbacks", default=False)
    metric_for_best_model: str | None = ignored("For callbacks that read it.", default=None)
    greater_is_better: bool | None = ignored("For callbacks that read it.", default=None)
    load_best_model_at_end: bool = fixed(
        "the last weights are kept; the best checkpoint is in checkpoints/, and summary['best'] "
        "names it",
        default=False,
    )
    # --- checkpoints
    save_strategy: Any = used("steps, epoch, or no (only at the end).", default="steps")
    save_steps: float = used("Updates between checkpoints, as a whole number.", default=500)
    save_total_limit: int | None = ignored(
        "The last two checkpoints and the best are kept.", default=None
    )
    save_only_model: bool = ignored(
        "Checkpoints always hold all that resuming needs.", default=False
    )
    save_on_each_node: bool = ignored(_ONE_DEVICE, default=False)
    enable_jit_checkpoint: bool = ignored("Signals always write a checkpoint.", default=False)
    resume_from_checkpoint: Any = fixed("pass it to train()", default=None)
    ignore_data_skip: bool = fixed(_LEAVE_OUT, default=False)
    restore_callback_states_from_checkpoint: bool = fixed(_LEAVE_OUT, default=False)
    # --- hub
    push_to_hub: bool = fixed(_HUB, default=False)
    hub_model_id: str | None = ignored("Only has an effect with push_to_hub.", default=None)
    hub_strategy: Any = ignored("Only has an effect with push_to_hub.", default="every_save")
    hub_token: str | None = ignored("Only has an effect with push_to_hub.", default=None)
    hub_private_repo: bool | None = ignored("Only has an effect with push_to_hub.", default=None)
    hub_always_push: bool = ignored("Only has an effect with push_to_hub.", default=False)
    hub_revision: str | None = ignored("Only has an effect with push_to_hub.", default=None)
    # --- data and randomness
    seed: int = used("Random seed for adapters, data order and samples.", default=42)
    data_seed: int | None = fixed("one seed is for all; use seed", default=None)
    full_determinism: bool = ignored("The same seed always gives the same numbers.", default=False)
    train_sampling_strategy: str = fixed("the order is random, by seed", default="random")
    remove_unused_columns: bool | None = ignored(
        "Columns that are not needed are not read.", default=True
    )
    label_names: Any = fixed(_LEAVE_OUT, default=None)
    length_column_name: str = ignored("Lengths are counted.", default="length")
    dataloader_drop_last: bool = fixed("every row is used", default=False)
    dataloader_num_workers: int = ignored("Data is tokenised once, before training.", default=0)
    dataloader_pin_memory: bool = ignored("Memory is shared on Apple silicon.", default=True)
    dataloader_persistent_workers: bool = ignored("There are no data workers.", default=False)
    dataloader_prefetch_factor: int | None = ignored("There are no data workers.", default=None)
    dataloader_multiprocessing_context: Any = ignored("There are no data workers.", default=None)
    dataloader_in_order: bool = ignored("There are no data workers.", default=True)
    # --- several devices
    local_rank: int = fixed(_ONE_DEVICE, default=-1, accepted=(0,))
    accelerator_config: Any = fixed(_ONE_DEVICE, default=None)
    parallelism_config: Any = fixed(_ONE_DEVICE, default=None)
    deepspeed: Any = fixed(_ONE_DEVICE, default=None)
    fsdp: Any = fixed(
        _ONE_DEVICE,
        default=None,
        accepted=(
            "",
            [],
            False,
        ),
    )
    fsdp_config: Any = fixed(_ONE_DEVICE, default=None)
    ddp_backend: str | None = ignored(_ONE_DEVICE, default=None)
    ddp_timeout: int = ignored(_ONE_DEVICE, default=1800)
    ddp_find_unused_parameters: bool | None = ignored(_ONE_DEVICE, default=None)
    ddp_bucket_cap_mb: int | None = ignored(_ONE_DEVICE, default=None)
    ddp_broadcast_buffers: bool | None = ignored(_ONE_DEVICE, default=None)
    ddp_static_graph: bool | None = ignored(_ONE_DEVICE, default=None)
    debug: Any = fixed(
        _LEAVE_OUT,
        default="",
        accepted=(
            [],
            None,
        ),
    )
    # --- only read by example scripts
    do_train: bool = ignored("Only read by scripts.", default=False)
    do_eval: bool = ignored("Only read by scripts.", default=False)
    do_predict: bool = ignored("Only read by scripts.", default=False)
    # --- what all of TRL's configs add
    model_init_kwargs: Any = used(
        "Only dtype='auto', attn_implementation and device_map are accepted, and ignored.",
        default=None,
    )
    trust_remote_code: bool = fixed("models run on mlx-lm's own code", default=False)
    router_aux_loss_coef: float = fixed(
        "there is no auxiliary loss of routers", default=0.001, accepted=(0.0,)
    )
    disable_dropout: bool = ignored("Base models have no dropout here.", default=True)
    dataset_num_proc: int | None = ignored("Data is tokenised in this process.", default=None)
    pad_to_multiple_of: int | None = ignored("Padding changes no number.", default=None)
    activation_offloading: bool = ignored("Memory is shared on Apple silicon.", default=False)


@arguments
class DPOConfig(TrainingArguments):
    """Arguments of `DPOTrainer`."""

    learning_rate: float = used(_RATE, default=_RATES["dpo"])
    max_length: int | None = used("Longest row in tokens; longer ones are dropped.", default=1024)
    truncation_mode: str = fixed("rows longer than max_length are dropped", default="keep_start")
    padding_free: bool = ignored("Rows are packed where the model allows it.", default=False)
    pad_token: str | None = ignored("Padding is masked.", default=None)
    precompute_ref_log_probs: bool = ignored("They are always computed once.", default=False)
    precompute_ref_batch_size: int | None = ignored("Changes no number.", default=None)
    beta: float = used("Strength of the KL penalty.", default=0.1)
    loss_type: str | list[str] = used("The loss, or several to add.", default="sigmoid")
    loss_weights: list[float] | None = used("Weights of several losses.", default=None)
    label_smoothing: float = used("Probability that a label is flipped.", default=0.0)
    f_divergence_type: Any = used(
        "reverse_kl, forward_kl, js_divergence or alpha_divergence.", default="reverse_kl"
    )
    f_alpha_divergence_coef: float = used("Alpha of the alpha divergence.", default=0.5)
    ld_alpha: float | None = used(
        "LD-DPO's weight of tokens beyond the shorter completion.", default=None
    )
    use_weighting: bool = used("Weight each pair by its probability (WPO).", default=False)
    discopop_tau: float = used("Temperature of the discopop loss.", default=0.05)
    sync_ref_model: bool = fixed(_SYNC_REF, default=False)
    ref_model_mixup_alpha: float = ignored("Only has an effect with sync_ref_model.", default=0.6)
    ref_model_sync_steps: int = ignored("Only has an effect with sync_ref_model.", default=512)

    def __post_init__(self) -> None:
        """Check the arguments; `loss_type` becomes a list, as in TRL."""
        super().__post_init__()
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]


@arguments
class KTOConfig(TrainingArguments):
    """Arguments of `KTOTrainer`."""

    learning_rate: float = used(_RATE, default=_RATES["kto"])
    train_sampling_strategy: str = ignored(
        "The order is random: mismatched completions are paired without it.", default="sequential"
    )
    max_length: int | None = used("Longest row in tokens; longer ones are dropped.", default=1024)
    precompute_ref_log_probs: bool = ignored("They are always computed once.", default=False)
    precompute_ref_batch_size: int | None = ignored("Changes no number.", default=None)
    loss_type: str = used("kto or apo_zero_unpaired.", default="kto")
    beta: float = used("Strength of the KL penalty.", default=0.1)
    desirable_weight: float = used("Weight of desirable completions.", default=1.0)
    undesirable_weight: float = used("Weight of undesirable completions.", default=1.0)
    sync_ref_model: bool = fixed(_SYNC_REF, default=False)
    ref_model_mixup_alpha: float = ignored("Only has an effect with sync_ref_model.", default=0.6)
    ref_model_sync_steps: int = ignored("Only has an effect with sync_ref_model.", default=512)


@arguments
class SFTConfig(TrainingArguments):
    """Arguments of `SFTTrainer`."""

    learning_rate: float = used(_RATE, default=_RATES["sft"])
    max_length: int | None = used("Longest row in tokens; longer ones are dropped.", default=1024)
    truncation_mode: str = fixed("rows longer than max_length are dropped", default="keep_start")
    dataset_text_field: str = used("Name of the column with text.", default="text")
    dataset_kwargs: Any = fixed(_LEAVE_OUT, default=None, accepted=({},))
    shuffle_dataset: bool = ignored("Rows are drawn in random order.", default=False)
    packing: bool = used(
        "Fill microbatches up to max_length x per_device_train_batch_size tokens.", default=False
    )
    packing_strategy: str = fixed("rows are never split or joined", default="bfd")
    eval_packing: bool | None = ignored("Packing changes no metric.", default=None)
    padding_free: bool = ignored("Rows are packed where the model allows it.", default=False)
    completion_only_loss: bool | None = used(
        "True for rows of prompt and completion, of which the prompt never has a loss.",
        default=None,
    )
    assistant_only_loss: bool = used(
        "Conversations have a loss on every assistant turn, whether it is set or not.",
        default=False,
    )
    loss_type: str | None = used("nll, chunked_nll (the same) or dft.", default=None)
    chat_template_path: str | None = fixed(
        "save the tokenizer with its template into the model folder", default=None
    )
    eos_token: str | None = fixed("the end token is the tokenizer's", default=None)
    pad_token: str | None = ignored("Padding is masked.", default=None)


@arguments
class RewardConfig(TrainingArguments):
    """Arguments of `RewardTrainer`."""

    learning_rate: float = used(_RATE, default=_RATES["reward"])
    max_length: int | None = used("Longest row in tokens; longer ones are dropped.", default=1024)
    center_rewards_coefficient: float | None = used(
        "Weight of (r_chosen + r_rejected)^2; None for 0.", default=None
    )
    chat_template_path: str | None = fixed(
        "save the tokenizer with its template into the model folder", default=None
    )
    eos_token: str | None = fixed("the end token is the tokenizer's", default=None)
    pad_token: str | None = ignored("Padding is masked.", default=None)


@arguments
class _RolloutArguments(TrainingArguments):
    """Arguments common to GRPOConfig and RLOOConfig."""

    remove_unused_columns: bool | None = ignored("Reward functions get all columns.", default=False)
    disable_dropout: bool = ignored("Base models have no dropout here.", default=False)
    num_generations: int = used("Completions per prompt.", default=8)
    num_generations_eval: int | None = fixed("it is num_generations", default=None)
    max_completion_length: int = used("Longest completion in tokens.", default=512)
    shuffle_dataset: bool | None = fixed("prompts are drawn in random order", default=True)
    generation_batch_size: int | None = used("Completions per rollout batch.", default=None)
    steps_per_generation: int | None = used(
        "Microbatches per rollout batch. Default: gradient_accumulation_steps.", default=None
    )
    num_iterations: int = used("Passes over each rollout batch.", default=1)
    temperature: float = used("Sampling temperature.", default=1.0)
    top_p: float = fixed(_SAMPLER, default=1.0)
    top_k: int | None = fixed(_SAMPLER, default=0, accepted=(None,))
    min_p: float | None = fixed(_SAMPLER, default=None, accepted=(0.0,))
    repetition_penalty: float = fixed(_SAMPLER, default=1.0)
    generation_kwargs: Any = fixed(_SAMPLER, default=None, accepted=({},))
    chat_template_kwargs: Any = fixed(
        "chat templates get no arguments", default=None, accepted=({},)
    )
    cache_implementation: str | None = ignored("There is one key-value cache.", default=None)
    reward_weights: list[float] | None = used("A weight for each of reward_funcs.", default=None)
    mask_truncated_completions: bool = used(
        "Don't train on completions that reached max_completion_length.", default=False
    )
    sync_ref_model: bool = fixed(_SYNC_REF, default=False)
    ref_model_mixup_alpha: float = ignored("Only has an effect with sync_ref_model.", default=0.6)
    ref_model_sync_steps: int = ignored("Only has an effect with sync_ref_model.", default=512)
    log_completions: bool = ignored(
        "samples.jsonl and the run page show completions.", default=False
    )
    log_multimodal: bool = ignored("Only text is trained on.", default=True)
    num_completions_to_print: int | None = ignored("The run page shows completions.", default=None)
    log_unique_prompts: bool = ignored("The run page shows completions.", default=False)
    use_vllm: bool = fixed(_VLLM, default=False)
    vllm_mode: str = ignored(_WITH_VLLM, default="colocate")
    vllm_model_impl: str = ignored(_WITH_VLLM, default="vllm")
    vllm_enable_sleep_mode: bool = ignored(_WITH_VLLM, default=False)
    vllm_structured_outputs_regex: str | None = fixed(_VLLM, default=None)
    vllm_server_base_url: str | None = ignored(_WITH_VLLM, default=None)
    vllm_server_host: str = ignored(_WITH_VLLM, default="0.0.0.0")
    vllm_server_port: int = ignored(_WITH_VLLM, default=8000)
    vllm_server_timeout: float = ignored(_WITH_VLLM, default=240.0)
    vllm_group_port: int = ignored(_WITH_VLLM, default=51216)
    vllm_gpu_memory_utilization: float = ignored(_WITH_VLLM, default=0.3)
    vllm_max_model_length: int | None = ignored(_WITH_VLLM, default=None)
    vllm_tensor_parallel_size: int = ignored(_WITH_VLLM, default=1)
    ds3_gather_for_generation: bool = ignored(_ONE_DEVICE, default=True)
    use_transformers_continuous_batching: bool = ignored(
        "Completions of a rollout batch are always sampled together.", default=False
    )
    transformers_continuous_batching_config: Any = ignored(
        "Completions of a rollout batch are always sampled together.", default=None
    )
    use_transformers_paged: bool = ignored(
        "Completions of a rollout batch are always sampled together.", default=False
    )


@arguments
class GRPOConfig(_RolloutArguments):
    """Arguments of `GRPOTrainer`."""

    learning_rate: float = used(_RATE, default=_RATES["grpo"])
    beta: float = used("Weight of the KL penalty in the loss (k3, as in TRL).", default=0.0)
    epsilon: float = used("Clip ratios at 1 - epsilon.", default=0.2)
    epsilon_high: float | None = used(
        "Clip ratios at 1 + epsilon_high; of cispo, the bound itself. Default: epsilon.",
        default=None,
    )
    delta: float | None = fixed("there is no two-sided clipping", default=None)
    loss_type: str = used(
        "With scale_rewards and importance_sampling_level: the method.", default="dapo"
    )
    scale_rewards: Any = used("group (or True), or none (or False).", default="group")
    importance_sampling_level: str = used("token, or sequence (GSPO, LUSPO).", default="token")
    multi_objective_aggregation: str = used(
        "sum_then_normalize, or normalize_then_sum (GDPO).", default="sum_then_normalize"
    )
    entropy_coef: float = used("Weight of the entropy bonus.", default=0.0)
    use_adaptive_entropy: bool = fixed("entropy_coef is constant", default=False)
    entropy_coef_min: float = ignored("Only has an effect with use_adaptive_entropy.", default=0.0)
    entropy_coef_max: float = ignored("Only has an effect with use_adaptive_entropy.", default=1.0)
    entropy_coef_delta: float = ignored(
        "Only has an effect with use_adaptive_entropy.", default=0.005
    )
    entropy_target: float = ignored("Only has an effect with use_adaptive_entropy.", default=0.2)
    top_entropy_quantile: float = fixed("all tokens have a loss", default=1.0)
    sapo_temperature_neg: float = fixed("it is 1.05", default=1.05)
    sapo_temperature_pos: float = fixed("it is 1.0", default=1.0)
    vespo_k_pos: float = fixed("it is 2.0", default=2.0)
    vespo_lambda_pos: float = fixed("it is 3.0", default=3.0)
    vespo_k_neg: float = fixed("it is 3.0", default=3.0)
    vespo_lambda_neg: float = fixed("it is 2.0", default=2.0)
    use_bias_correction_kl: bool = fixed(_LEAVE_OUT, default=False)
    off_policy_mask_threshold: float | None = fixed(_LEAVE_OUT, default=None)
    max_tool_calling_iterations: int | None = fixed("there are no tools", default=None)
    cast_lm_head_to_fp32: bool = ignored("Log-probs are always computed in float32.", default=False)
    vllm_importance_sampling_correction: bool = ignored(_WITH_VLLM, default=True)
    vllm_importance_sampling_mode: str = ignored(_WITH_VLLM, default="sequence_mask")
    vllm_importance_sampling_clip_max: float | None = ignored(_WITH_VLLM, default=3.0)
    vllm_importance_sampling_clip_min: float | None = ignored(_WITH_VLLM, default=None)
    vllm_importance_sampling_cap: float | None = ignored(_WITH_VLLM, default=None)
    log_completions_hub_repo: str | None = fixed(_HUB, default=None)

    def __post_init__(self) -> None:
        """Check the arguments; `scale_rewards` becomes a name, as in TRL."""
        super().__post_init__()
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"


@arguments
class RLOOConfig(_RolloutArguments):
    """Arguments of `RLOOTrainer`."""

    learning_rate: float = used(_RATE, default=_RATES["grpo"])
    num_generations: int = used("Completions per prompt.", default=2)
    beta: float = used("Weight of the KL penalty in the reward.", default=0.05)
    num_iterations: int = fixed("each rollout batch is used for one update", default=1)
    steps_per_generation: int | None = fixed(
        "each rollout batch is used for one update", default=None
    )
    generation_batch_size: int | None = fixed(
        "each rollout batch is used for one update", default=None
    )
    epsilon: float = ignored("With one update per rollout batch, ratios are 1.", default=0.2)
    epsilon_high: float | None = ignored(
        "With one update per rollout batch, ratios are 1.", default=None
    )
    normalize_advantages: bool = fixed("advantages are not normalised", default=False)
    reward_clip_range: Any = fixed("clip rewards in the reward function", default=None)
