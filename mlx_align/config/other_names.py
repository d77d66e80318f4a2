"""Options of mlx-lm, TRL and axolotl that have no counterpart of the same value, and what to do.

Names with the same value are aliases of an option (`aliases=` in its declaration). The names here
need a sentence: another option does it in another way, or nothing has to be done.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from mlx_align.losses.policy import POLICY_METHODS
from mlx_align.losses.registry import LOSS_ALIASES, PAIRWISE_LOSSES, UNPAIRED_LOSSES

_ADAMW = "AdamW is the only optimizer; leave it out"
_DTYPE = "adapters are float32, and the base keeps its dtype; leave it out"
_LORA = "LoRA is the default; leave it out (--fine-tune-type full trains all weights)"
_KEYS = "use --lora-keys, with layers as self_attn.q_proj; the default is all linear layers"
_PROMPTS = "prompts are never trained on; leave it out"
_TRAINS = "the command trains; leave it out"
_TEST = "mlx-align eval measures on a test split; leave it out"
_BY_LENGTH = "rows are packed and batched by length; leave it out"
_ONE_DEVICE = "one process trains on one device; leave it out"
_ATTENTION = "attention is mlx's; leave it out"
_SAMPLING = "completions are drawn from the policy itself, at --temperature; leave it out"
_NEW_RUN = "use --output for the run folder to create, --init-adapter for the adapter to start from"
_QUANTISED = "name a quantised model as --model (mlx_lm.convert -q makes one)"
_EVALUATED = "held-out rows are evaluated in any case; leave it out"
_EVAL_BATCH = "evaluations use --batch-size or --batch-tokens; leave it out"
_SPLITS = "splits are found by their names; leave it out"
_HUB = "uploading is not part of training; leave it out"
_BEST = "use --keep best (the default) or --keep last"
_REFERENCE = "the reference is the model as it starts; leave it out"

# Advice by name. The first of a name's sentences whose options the command has is shown; one
# without options is for the training commands.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    # mlx-lm
    "train": (_TRAINS,),
    "test": (_TEST,),
    "test_batches": (_TEST,),
    "mask_prompt": (_PROMPTS,),
    "optimizer": (_ADAMW,),
    "optimizer_config": (_ADAMW,),
    "adapter_path": (_NEW_RUN,),
    "adapter_file": (_NEW_RUN,),
    "resume_adapter_file": ("use --init-adapter, which takes the adapter's folder",),
    "lora_layers": ("use --num-layers",),
    "lora_parameters": ("use --lora-rank, --lora-alpha (scale x rank) and --lora-keys",),
    "rank": ("use --lora-rank",),
    "scale": ("use --lora-alpha, which is scale x rank",),
    "wandb": ("use --report-to wandb, and --project-name for the project",),
    "hf_dataset": ("use --data, which takes hub names too",),
    "prompt_feature": ("use --columns prompt=NAME",),
    "completion_feature": ("use --columns completion=NAME",),
    "chat_feature": ("use --columns messages=NAME",),
    "clear_cache_threshold": ("mlx's cache has a limit already; leave it out",),
    # TRL and transformers
    "max_tokens": ("use --sample-tokens for samples, --max-completion-length for the data",),
    "max_new_tokens": ("use --sample-tokens for samples, --max-completion-length for the data",),
    "max_prompt_length": ("use --max-seq-length, for prompt and completion together",),
    "max_target_length": ("use --max-completion-length",),
    "do_train": (_TRAINS,),
    "do_eval": (_EVALUATED,),
    "use_peft": (_LORA,),
    "adapter": (_LORA,),
    "lora_target_modules": (_KEYS,),
    "target_modules": (_KEYS,),
    "lora_target_linear": ("all linear layers are the default; leave it out",),
    "use_dora": ("use --fine-tune-type dora",),
    "peft_use_dora": ("use --fine-tune-type dora",),
    "use_rslora": ("use --lora-alpha; the scale is alpha / rank",),
    "load_in_4bit": (_QUANTISED,),
    "load_in_8bit": (_QUANTISED,),
    "bf16": (_DTYPE,),
    "fp16": (_DTYPE,),
    "tf32": (_DTYPE,),
    "dtype": (_DTYPE,),
    "torch_dtype": (_DTYPE,),
    "optim": (_ADAMW,),
    "adam_beta1": ("it is 0.9; leave it out",),
    "adam_beta2": ("it is 0.999; leave it out",),
    "adam_epsilon": ("it is 1e-8; leave it out",),
    "wd": ("use --weight-decay",),
    "grad_clip": ("use --max-grad-norm",),
    "eval_strategy": ("use --steps-per-eval",),
    "evaluation_strategy": ("use --steps-per-eval",),
    "evals_per_epoch": ("use --steps-per-eval",),
    "save_strategy": ("use --save-every",),
    "saves_per_epoch": ("use --save-every",),
    "logging_strategy": ("use --steps-per-report",),
    "logging_dir": ("metrics are in the folder of --output; leave it out",),
    "run_name": ("a run is named by its --output; leave it out",),
    "per_device_eval_batch_size": (_EVAL_BATCH,),
    "eval_batch_size": (_EVAL_BATCH,),
    "load_best_model_at_end": (_BEST,),
    "metric_for_best_model": (_BEST,),
    "overwrite_output_dir": ("a run is never overwritten; name a new --output",),
    "resume_from_checkpoint": ("use --resume RUN", "the command line continues runs; leave it out"),
    "ref_model": (_REFERENCE,),
    "precompute_ref_log_probs": ("they are always computed in advance; leave it out",),
    "reference_free": ("use --loss simpo, or another loss without a reference",),
    "rpo_alpha": ("use --loss sigmoid=1,sft=0.2",),
    "simpo_gamma": ("use --loss simpo --loss-option gamma=0.5",),
    "dpo_beta": ("use --beta",),
    "init_kl_coef": ("use --kl-coef",),
    "response_length": ("use --max-completion-length",),
    "num_mini_batches": ("use --minibatches",),
    "reward_weights": ("write a weight after the reward: --reward length=0.2",),
    "scale_rewards": ("use --loss dr_grpo, which doesn't divide by the deviation",),
    "mask_truncated_completions": ("use --overlong mask",),
    "top_p": (_SAMPLING,),
    "top_k": (_SAMPLING,),
    "min_p": (_SAMPLING,),
    "use_vllm": ("completions are sampled with mlx; leave it out",),
    "assistant_only_loss": ("use --loss-on assistant",),
    "completion_only_loss": (_PROMPTS,),
    "packing": (_BY_LENGTH,),
    "padding_free": (_BY_LENGTH,),
    "group_by_length": (_BY_LENGTH,),
    "attn_implementation": (_ATTENTION,),
    "torch_compile": ("updates are always compiled; leave it out",),
    "deepspeed": (_ONE_DEVICE,),
    "fsdp": (_ONE_DEVICE,),
    "push_to_hub": (_HUB,),
    "hub_model_id": (_HUB,),
    "dataset_train_split": (_SPLITS,),
    "dataset_test_split": (_SPLITS,),
    "dataset_config": ("use --data owner/name:config",),
    # axolotl
    "datasets": ("use --data, for one file, folder or hub name",),
    "rl": ("the method is the command, such as mlx-align dpo; leave it out",),
    "lora_model_dir": ("use --init-adapter",),
    "train_on_inputs": (_PROMPTS,),
    "sample_packing": (_BY_LENGTH,),
    "pad_to_sequence_len": (_BY_LENGTH,),
    "flash_attention": (_ATTENTION,),
    "chat_template": ("the model's chat template is used; leave it out",),
}

_FLAG = re.compile(r"--([a-z][a-z0-9-]*)")

# The command that has a loss, by the loss's name.
LOSS_COMMANDS: dict[str, str] = {
    **{name: f"mlx-align dpo --loss {name}" for name in PAIRWISE_LOSSES},
    **{name: f"mlx-align dpo --loss {loss}" for name, loss in LOSS_ALIASES.items()},
    **{name: f"mlx-align grpo --loss {name}" for name in POLICY_METHODS if name != "ppo"},
    **{name: f"mlx-align kto --loss {name}" for name in UNPAIRED_LOSSES},
    "online_dpo": "mlx-align grpo --loss online_dpo",
    "ppo": "mlx-align ppo",
}


def options_in(advice: str) -> list[str]:
    """The options that a sentence names, with underscores."""
    return [name.replace("-", "_") for name in _FLAG.findall(advice)]


def advice_on(name: str, known: Collection[str], *, flags: bool) -> str | None:
    """What to do instead of an option of another library; None if there is nothing to say.

    Args:
        name: The option, with underscores.
        known: The options of the command, with underscores.
        flags: Whether to write options as on the command line.
    """
    for advice in OTHER_NAMES.get(name, ()):
        named = options_in(advice)
        if all(one in known for one in named) and (named or "iters" in known):
            return advice if flags else _FLAG.sub(lambda f: f[1].replace("-", "_"), advice)
    return None
