"""Options of the commands that train a policy on what it says itself: ppo and grpo."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_align.config.offline import TrainConfig
from mlx_align.settings import option


@dataclass(frozen=True)
class OnPolicyConfig(TrainConfig):
    """What ppo and grpo share: a policy that is trained on what it says itself.

    A rollout batch is `batch_size` x `grad_accumulation_steps` x `minibatches` prompts with
    `group_size` completions each; --iters and all other counts of updates count rollout batches.
    """

    data: str | None = option(
        None, "Prompts: folder with train/valid.jsonl, a .jsonl, .json or .parquet file, hub name."
    )
    reward: tuple[str, ...] | None = option(
        None,
        "Reward: a built-in, or module:function or file.py:function, with =WEIGHT if it is not 1; "
        "may be given several times.",
        metavar="REWARD",
        several=True,
    )
    reward_model: str | None = option(
        None,
        "Reward model: a run of mlx-align reward, or a *ForSequenceClassification model.",
        training=False,
    )
    reward_model_weight: float = option(1.0, "Weight of the reward model.", above=0)
    reward_timeout: float = option(
        60.0,
        "Seconds that a reward function may take for one rollout batch.",
        above=0,
        training=False,
    )
    # What the policy does not see can tell better from over-optimised.
    eval_reward: tuple[str, ...] | None = option(
        None,
        "Reward that is only looked at, on held-out prompts, and decides which checkpoint is best; "
        "as --reward. Default: the reward that is trained on.",
        metavar="REWARD",
        several=True,
    )
    eval_reward_model: str | None = option(
        None, "Reward model that is only looked at, as --eval-reward.", training=False
    )
    group_size: int = option(8, "Completions sampled for a prompt.", at_least=1)
    minibatches: int = option(
        1, "Updates in one pass over a rollout batch, each of another part of it.", at_least=1
    )
    update_epochs: int = option(1, "Passes over a rollout batch.", at_least=1)
    # At another temperature policy and reference are both divided by it, so that the ratio and
    # the KL are those of what was sampled.
    temperature: float = option(
        1.0, "Sampling temperature; top-p and top-k are never used.", above=0
    )
    max_completion_length: int = option(256, "Longest completion, tokens.", at_least=1)
    max_seq_length: int = option(
        1024,
        "Tokens of prompt and completion; prompts that leave no room for --max-completion-length "
        "are dropped and counted.",
        at_least=2,
    )
    max_prompt_length: int | None = option(
        None,
        "Longest prompt, tokens. Default: --max-seq-length less --max-completion-length.",
        at_least=1,
    )
    steps_per_report: int = option(
        1, "Rollout batches between reports.", at_least=1, training=False
    )
    steps_per_eval: int = option(
        10,
        "Rollout batches between evaluations on held-out prompts; 0 for none but the last.",
        at_least=0,
    )
    save_every: int = option(
        10,
        "Rollout batches between checkpoints; 0 for none but the last.",
        at_least=0,
        training=False,
    )
    grad_accumulation_steps: int = option(
        8, "Microbatches per update; exactly as if they were one batch.", at_least=1
    )
    lr_schedule: str = option(
        "linear",
        "Course of the learning rate after warm-up.",
        choices=("constant", "linear", "cosine"),
    )
    warmup: float = option(
        0.0, "Warm-up: a share of the rollout batches if below 1, else so many.", at_least=0
    )
    kl_coef: float = option(0.0, "Weight of the KL from the reference.", at_least=0)
    importance_cap: float = option(
        2.0,
        "Where sampler and learner disagree by more than 0.02 nats a token, tokens are weighed by "
        "their probability ratio, at most this.",
        above=0,
    )
    guard: bool = option(
        True,
        "Stop a run that goes wrong (KL, entropy, length, repetition, held-out reward) and keep "
        "its best evaluated checkpoint; off: only say so.",
    )


@dataclass(frozen=True)
class PpoConfig(OnPolicyConfig):
    """Options of `mlx-align ppo`. Defaults from TRL, OpenRLHF and Huang et al. 2024 (N+)."""

    group_size: int = option(4, "Completions sampled for a prompt.", at_least=1)
    # 16 prompts x 4 = 64 episodes a rollout batch.
    grad_accumulation_steps: int = option(
        16, "Microbatches per update; exactly as if they were one batch.", at_least=1
    )
    update_epochs: int = option(2, "Passes over a rollout batch.", at_least=1)
    kl_coef: float = option(
        0.05, "Weight of the per-token KL penalty in the reward, at the start.", at_least=0
    )
    target_kl: float | None = option(
        None,
        "KL per completion, nats, towards which --kl-coef is adapted. Default: it stays.",
        above=0,
    )
    kl_horizon: float = option(
        10000.0, "Completions over which the KL coefficient adapts.", above=0
    )
    clip_eps: float = option(0.2, "Ratios are clipped to 1 - this and 1 + this.", above=0, below=1)
    value_clip: float | None = option(
        0.2, "Values may move so far from the old ones; needs --reward-rollouts.", above=0
    )
    gamma: float = option(1.0, "Discount per token.", above=0)
    gae_lambda: float = option(
        0.95, "Lambda of generalised advantage estimation; 1 for long completions.", at_least=0
    )
    # A trunk shared by actor and critic loses quality for little memory (Santacroce et al. 2023,
    # Hydra-RLHF: 46.5 against 55.5% wins, 5% memory).
    critic: str = option(
        "own",
        "The critic's adapter: its own, or shared with the policy.",
        choices=("own", "shared"),
    )
    critic_learning_rate: float = option(3e-5, "Learning rate of the critic's adapter.", above=0)
    critic_warmup: int = option(
        10, "Rollout batches in which only the critic is trained.", at_least=0
    )
    value_coef: float = option(
        0.1, "Weight of the value loss beside the policy's, with --critic shared.", above=0
    )
    # Ziegler et al. 2019 and OpenRLHF standardise; it makes the other constants mean something.
    reward_rollouts: int = option(
        256,
        "Completions of the reference whose rewards set mean 0 and deviation 1; 0 leaves rewards "
        "as they are.",
        at_least=0,
    )
    reward_clip: float = option(5.0, "Standardised rewards are clipped to this.", above=0)
    missing_eos_penalty: float = option(
        1.0, "Subtracted from the reward of a completion that did not end.", at_least=0
    )
    whiten_advantages: bool = option(
        True, "Advantages of a rollout batch get mean 0 and deviation 1."
    )
    ptx_coef: float = option(
        0.0, "Weight of the loss on demonstrations, InstructGPT's PPO-ptx.", at_least=0
    )
    ptx_data: str | None = option(
        None, "Demonstrations for --ptx-coef, as sft reads them.", training=False
    )


@dataclass(frozen=True)
class GrpoConfig(OnPolicyConfig):
    """Options of `mlx-align grpo`."""

    loss: str = option(
        "grpo",
        "Method: how rewards become advantages, what is clipped, how tokens are averaged.",
    )
    clip_eps: float | None = option(
        None, "Ratios are clipped at 1 - this. Default: the method's.", above=0
    )
    clip_eps_high: float | None = option(
        None, "And at 1 + this. Default: the method's, or --clip-eps.", above=0
    )
    kl: str | None = option(
        None,
        "Where --kl-coef acts: in the loss (k2, or k3, whose optimum is another), or in the reward "
        "(k1). Default: the method's.",
        choices=("k1", "k2", "k3"),
    )
    beta: float | None = option(None, "Temperature of --loss online_dpo. Default: 0.1.", above=0)
    multi_objective_aggregation: str | None = option(
        None,
        "Several rewards: weighted, added up and then compared within the group "
        "(sum_then_normalize), or compared one by one, then weighted (normalize_then_sum, GDPO). "
        "Default: sum_then_normalize.",
        choices=("sum_then_normalize", "normalize_then_sum"),
    )
    entropy_coef: float = option(0.0, "Weight of an entropy bonus.", at_least=0)
    overlong: str | None = option(
        None,
        "Completions that did not end: learned from as they are (keep), or not at all (mask). "
        "Default: keep.",
        choices=("keep", "mask"),
    )
    dynamic_sampling: bool | None = option(
        None,
        "Sample further prompts in the place of those whose completions all have one reward. "
        "Default: as the method (dapo does).",
    )
