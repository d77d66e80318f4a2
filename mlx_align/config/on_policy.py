"""Options of the commands that train on the policy's own completions: ppo and grpo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlx_align.config.offline import DEFAULT_BATCH_SIZE, TrainConfig
from mlx_align.config.schema import (
    ADVANCED,
    CRITIC,
    LOSS,
    REWARD,
    ROLLOUT,
    option,
    override,
)
from mlx_align.losses.policy import POLICY_METHODS

ONLINE_DPO = "online_dpo"
# Annotation of --reward in Python; keywords.py defines it.
REWARDS = "Rewards"


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(TrainConfig):
    """Options common to ppo and grpo: sampling, rewards and the KL penalty.

    A rollout batch is `batch_size` x `grad_accumulation_steps` x `minibatches` prompts with
    `group_size` completions each; --iters and all other counts of updates count rollout batches.
    """

    data: str | None = override(
        TrainConfig,
        "data",
        help="Prompts: folder with train/valid.jsonl, a data file, or a hub name.",
        change_on_resume=False,
    )
    reward: tuple[str, ...] | None = option(
        None,
        "Built-in reward, module:function or file.py:function, with =WEIGHT if not 1; repeatable.",
        REWARD,
        metavar="REWARD",
        multiple=True,
        python_type=REWARDS,
        aliases=("reward_funcs",),
    )
    reward_model: str | None = option(
        None,
        "Run of mlx-align reward, or a sequence classification model.",
        REWARD,
        metavar="RUN_OR_NAME",
        change_on_resume=True,
        python_type="str | PathLike[str]",
        aliases=("reward_model_path", "reward_model_name_or_path"),
    )
    reward_model_weight: float = option(1.0, "Weight of the reward model.", REWARD, above=0)
    reward_timeout: float = option(
        60.0,
        "Seconds a reward function may take per rollout batch.",
        ADVANCED,
        above=0,
        change_on_resume=True,
    )
    # A reward that the policy isn't trained on distinguishes progress from over-optimisation.
    eval_reward: tuple[str, ...] | None = option(
        None,
        "Like --reward, but only evaluated on held-out prompts; selects the best checkpoint.",
        REWARD,
        default_text="the training reward",
        metavar="REWARD",
        multiple=True,
        python_type=REWARDS,
    )
    eval_reward_model: str | None = override(
        TrainConfig,
        "model",
        help="Reward model used like --eval-reward.",
        group=REWARD,
        metavar="RUN_OR_NAME",
        python_type="str | PathLike[str]",
    )
    group_size: int = option(
        8,
        "Completions per prompt.",
        ROLLOUT,
        at_least=1,
        aliases=("num_generations",),
    )
    minibatches: int = option(
        1, "Minibatches (updates) per pass over a rollout batch.", ROLLOUT, at_least=1
    )
    update_epochs: int = option(
        1,
        "Passes over each rollout batch.",
        ROLLOUT,
        at_least=1,
        aliases=("num_iterations", "num_ppo_epochs"),
    )
    # The logits of policy and reference are both divided by it, so that ratios and KL are those of
    # the distribution that was sampled from.
    temperature: float = option(
        1.0,
        "Sampling temperature (no top-p or top-k).",
        ROLLOUT,
        above=0,
        aliases=("temp",),
    )
    max_completion_length: int = override(
        TrainConfig,
        "max_completion_length",
        256,
        help="Longest completion in tokens.",
        group=ROLLOUT,
        aliases=("max_tokens", "max_new_tokens"),
    )
    max_seq_length: int = override(
        TrainConfig,
        "max_seq_length",
        help="Longest prompt plus completion in tokens.",
        group=ROLLOUT,
    )
    max_prompt_length: int | None = option(
        None,
        "Longest prompt in tokens; drops longer ones.",
        ROLLOUT,
        default_text="--max-seq-length minus --max-completion-length",
        at_least=1,
    )
    steps_per_report: int = override(
        TrainConfig, "steps_per_report", 1, help="Rollout batches between reports."
    )
    steps_per_eval: int | None = override(
        TrainConfig,
        "steps_per_eval",
        10,
        default_text=None,
        help="Rollout batches between evaluations; 0: only the final one.",
    )
    save_every: int = override(
        TrainConfig,
        "save_every",
        10,
        help="Rollout batches between checkpoints; 0: only the final one.",
    )
    iters: int | None = override(
        TrainConfig,
        "iters",
        help="Number of rollout batches.",
        default_text="one pass, at least 60 of few prompts",
    )
    epochs: float | None = override(TrainConfig, "epochs", default_text="as --iters")
    batch_size: int | None = override(
        TrainConfig, "batch_size", default_text=str(DEFAULT_BATCH_SIZE)
    )
    batch_tokens: int | None = override(
        TrainConfig, "batch_tokens", default_text=None, evidence=None
    )
    grad_accumulation_steps: int | None = override(
        TrainConfig, "grad_accumulation_steps", default_text="8 prompts"
    )
    learning_rate: float | None = override(
        TrainConfig, "learning_rate", default_text="5e-5 and less"
    )
    warmup: float = override(
        TrainConfig,
        "warmup",
        0.0,
        help="Warm-up: a fraction of the rollout batches if below 1, else rollout batches.",
    )
    kl_coef: float = option(
        0.0, "Weight of the KL penalty towards the reference.", LOSS, at_least=0
    )
    importance_cap: float = option(
        2.0,
        "Cap of the importance weights used if sampler and model disagree by over 0.02 nats/token.",
        ADVANCED,
        above=0,
    )
    guard: bool = option(
        True,
        "Stop a run that degrades (KL, entropy, length, repetition, held-out reward) and keep its "
        "best checkpoint.",
        ADVANCED,
    )


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OnPolicyConfig):
    """Options of `mlx-align ppo`. Defaults from TRL, OpenRLHF and Huang et al. 2024 (N+)."""

    group_size: int = override(OnPolicyConfig, "group_size", 4)
    # 16 prompts x 4 = 64 episodes a rollout batch.
    grad_accumulation_steps: int | None = override(
        TrainConfig, "grad_accumulation_steps", default_text="16 prompts"
    )
    learning_rate: float | None = override(
        TrainConfig, "learning_rate", default_text="3e-5 and less"
    )
    update_epochs: int = override(OnPolicyConfig, "update_epochs", 2)
    kl_coef: float = override(
        OnPolicyConfig, "kl_coef", 0.05, help="Initial weight of the per-token KL penalty."
    )
    target_kl: float | None = option(
        None,
        "Adapt --kl-coef towards this KL per completion, in nats.",
        LOSS,
        default_text="off",
        above=0,
    )
    kl_horizon: float = option(
        10000.0, "Completions over which --kl-coef adapts.", ADVANCED, above=0
    )
    clip_eps: float = option(
        0.2,
        "Clip ratios to [1 - X, 1 + X].",
        LOSS,
        above=0,
        below=1,
        aliases=("epsilon", "cliprange"),
    )
    value_clip: float | None = option(
        0.2,
        "Clip values to within X of the old ones; needs --reward-rollouts.",
        CRITIC,
        above=0,
    )
    gamma: float = option(1.0, "Discount per token.", CRITIC, above=0)
    gae_lambda: float = option(
        0.95,
        "Lambda of GAE; use 1 for long completions.",
        CRITIC,
        at_least=0,
        aliases=("lam",),
    )
    # Sharing layers between actor and critic loses quality for little memory (Santacroce et al.
    # 2023, Hydra-RLHF: 46.5 against 55.5% wins, 5% memory).
    critic: Literal["own", "shared"] = option(
        "own", "Give the critic its own adapter, or share the policy's.", CRITIC
    )
    critic_learning_rate: float = option(
        3e-5, "Learning rate of the critic's adapter.", CRITIC, above=0
    )
    critic_warmup: int | None = option(
        None,
        "First rollout batches, which train only the critic.",
        CRITIC,
        default_text="10, a sixth of short runs",
        at_least=0,
    )
    value_coef: float = option(
        0.1,
        "Weight of the value loss, with --critic shared.",
        CRITIC,
        above=0,
        aliases=("vf_coef",),
    )
    # Ziegler et al. 2019 and OpenRLHF standardise, which gives the other constants a scale.
    reward_rollouts: int = option(
        256,
        "Reference completions used to standardise rewards; 0 for raw rewards.",
        REWARD,
        at_least=0,
    )
    reward_clip: float = option(5.0, "Clip standardised rewards to [-X, X].", REWARD, above=0)
    missing_eos_penalty: float = option(
        1.0, "Subtracted from the reward of unfinished completions.", REWARD, at_least=0
    )
    whiten_advantages: bool = option(True, "Normalise advantages over each rollout batch.", LOSS)
    ptx_coef: float = option(
        0.0, "Weight of the loss on demonstrations (PPO-ptx).", LOSS, at_least=0
    )
    ptx_data: str | None = override(
        TrainConfig,
        "data",
        help="Demonstrations for --ptx-coef, as for sft.",
        group=LOSS,
        python_type="str | Path",
    )

    @property
    def accumulation(self) -> int:
        """Microbatches per update; 16 if it was neither given nor chosen yet."""
        return self.grad_accumulation_steps or 16

    @property
    def critic_batches(self) -> int:
        """Rollout batches that train only the critic, once their number was given or chosen."""
        assert self.critic_warmup is not None
        return self.critic_warmup


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(OnPolicyConfig):
    """Options of `mlx-align grpo`."""

    loss: str = option(
        "grpo",
        "Method: its advantages, clipping and averaging.",
        LOSS,
        names=(*(name for name in POLICY_METHODS if name != "ppo"), ONLINE_DPO),
        metavar="METHOD",
        aliases=("loss_type",),
    )
    clip_eps: float | None = option(
        None,
        "Clip ratios at 1 - X.",
        LOSS,
        default_text="the method's",
        above=0,
        aliases=("epsilon",),
    )
    clip_eps_high: float | None = option(
        None,
        "Clip ratios at 1 + X.",
        LOSS,
        default_text="the method's, or --clip-eps",
        above=0,
        aliases=("epsilon_high",),
    )
    kl: Literal["k1", "k2", "k3"] | None = option(
        None,
        "Where --kl-coef acts: in the reward (k1) or in the loss (k2; k3 has another optimum).",
        LOSS,
        default_text="the method's",
    )
    beta: float | None = option(
        None, "Temperature of --loss online_dpo.", LOSS, default_text="0.1", above=0
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] | None = (
        option(
            None,
            "Several rewards: sum, then normalise in the group, or normalise each first (GDPO).",
            REWARD,
            default_text="sum_then_normalize",
        )
    )
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.", LOSS, at_least=0)
    overlong: Literal["keep", "mask"] | None = option(
        None,
        "Truncated completions: train on them (keep) or not (mask).",
        ROLLOUT,
        default_text="keep",
    )
    dynamic_sampling: bool | None = option(
        None,
        "Replace prompts whose completions all get the same reward.",
        ROLLOUT,
        default_text="on for dapo, else off",
    )
