"""Group-relative policy gradients (GRPO, RLOO, DAPO, GSPO …): a prompt's completions, compared.

No critic: what a completion is worth follows from the rewards of the others of its prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from mlx_align.config import GrpoConfig
from mlx_align.errors import ConfigError
from mlx_align.losses.policy import POLICY_METHODS, PolicyMethod
from mlx_align.rollout.advantages import (
    GROUP_ADVANTAGES,
    normalised_rewards,
    returns_to_go,
    token_rewards,
    whiten,
    zero_variance_share,
)
from mlx_align.rollout.rewards import parse_rewards
from mlx_align.train.learner import Learned
from mlx_align.train.lessons import (
    Array,
    Lesson,
    Tally,
    passes,
    policy_batch,
    policy_denominators,
    policy_metrics,
    policy_share,
    ready,
    teaching_prompts,
    too_far,
)
from mlx_align.train.loop import make_optimizer
from mlx_align.train.update import Updater
from mlx_align.train.workplace import Experience, Workplace

# Their estimator in the loss, by the names of --kl.
KL_IN_LOSS = {"k1": "k1_reward", "k2": "k2", "k3": "k3"}
# Methods that change what is sampled or learned from beside their loss (Yu et al. 2025, DAPO).
DYNAMIC = ("dapo",)


def resolve_method(config: GrpoConfig) -> PolicyMethod:
    """The method, with the parts that options replace.

    Raises:
        ConfigError: There is no such method, or an option has no effect on it.
    """
    methods = {name: method for name, method in POLICY_METHODS.items() if name != "ppo"}
    if config.loss not in methods:
        known = ", ".join([*methods, "online_dpo"])
        raise ConfigError(f"--loss {config.loss}: unknown; choose from {known}")
    method = methods[config.loss]
    changes: dict[str, Any] = {}
    if config.kl is not None:
        if config.kl_coef == 0:
            raise ConfigError(f"--kl {config.kl}: has no effect with --kl-coef 0; give --kl-coef")
        changes["kl"] = KL_IN_LOSS[config.kl]
    elif config.kl_coef > 0 and method.kl == "none":
        changes["kl"] = "k2"  # as a loss, k3 has another optimum
    for name, value in (("clip_eps", config.clip_eps), ("clip_eps_high", config.clip_eps_high)):
        if value is not None and method.surrogate not in ("clip", "cispo"):
            raise ConfigError(
                f"--{name.replace('_', '-')} {value:g}: --loss {config.loss} does not clip; "
                "leave it out"
            )
    if config.clip_eps is not None:
        if method.surrogate == "cispo":
            raise ConfigError(
                f"--clip-eps {config.clip_eps:g}: cispo has no lower bound; give --clip-eps-high"
            )
        if config.clip_eps >= 1:
            raise ConfigError(f"--clip-eps {config.clip_eps:g}: must be below 1")
        changes["clip_low"] = changes["clip_high"] = config.clip_eps
    if config.clip_eps_high is not None:
        changes["clip_high"] = config.clip_eps_high
    return dataclasses.replace(method, **changes)


def check_group_options(config: GrpoConfig) -> None:
    """Refuse what has no effect or can't be.

    Raises:
        ConfigError: Such an option was given.
    """
    method = resolve_method(config)
    if config.beta is not None:
        raise ConfigError(f"--beta {config.beta:g}: of --loss online_dpo alone; leave it out")
    if config.group_size < 2 and method.advantage != "whitened":
        raise ConfigError(
            f"--group-size {config.group_size}: --loss {config.loss} compares a prompt's "
            "completions; give 2 or more"
        )
    if config.multi_objective_aggregation is not None:
        _check_aggregation(config, method)


def _check_aggregation(config: GrpoConfig, method: PolicyMethod) -> None:
    given = f"--multi-objective-aggregation {config.multi_objective_aggregation}"
    counted = [spec for spec in parse_rewards(config.reward or ()) if spec.weight != 0]
    if len(counted) + (config.reward_model is not None) < 2:
        raise ConfigError(f"{given}: has no effect on one reward; give another, or leave it out")
    if not _apart(config):
        return
    if method.advantage != "group_std":
        fitting = [name for name, m in POLICY_METHODS.items() if m.advantage == "group_std"]
        raise ConfigError(
            f"{given}: --loss {config.loss} does not divide by a group's deviation; choose from "
            f"{', '.join(fitting)}"
        )
    if method.kl == "k1_reward":
        raise ConfigError(f"{given}: --kl k1 adds to the sum of the rewards; give --kl k2 or k3")


def _apart(config: GrpoConfig) -> bool:
    """Whether each reward is normalised by itself."""
    return config.multi_objective_aggregation == "normalize_then_sum"


class GroupLearner:
    """Learns from groups of completions; `run_on_policy` tells it when."""

    title = "GRPO"

    def __init__(self, config: GrpoConfig, workplace: Workplace) -> None:
        self._config, self._place = config, workplace
        self.method = resolve_method(config)
        asked = config.dynamic_sampling
        self.dynamic = config.loss in DYNAMIC if asked is None else asked
        self.trees = {"policy": workplace.policy.start}
        self.optimizers = {"policy": make_optimizer(workplace.policy.start, config.weight_decay)}
        self._kl_in_loss = config.kl_coef > 0 and self.method.kl != "k1_reward"
        self._entropies = config.entropy_coef > 0 or self.method.entropy_quantile > 0
        self._update = Updater(
            workplace.policy.model,
            self.optimizers["policy"],
            policy_share(
                workplace.policy.model,
                self.method,
                grad_checkpoint=config.grad_checkpoint,
                in_loss=self._kl_in_loss,
                entropies=self._entropies,
            ),
            config.max_grad_norm,
            workplace.memory,
            skip=config.on_non_finite == "skip",
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold beside trees and optimizers: nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""

    def begin(self) -> str:
        """What happens before the first rollout batch: nothing."""
        return ""

    def learn(self, experience: Experience, step: int, rate: float) -> Learned:
        """The updates of one rollout batch."""
        config, rollouts = self._config, experience.rollouts
        rewards = experience.rewards.total.reshape(-1, config.group_size)
        lesson = self._lesson(experience, rewards)
        # What all have alike teaches nothing, unless the KL or the entropy does.
        teaching = lesson.mask if self._kl_in_loss or self._entropies else lesson.advantages
        useful = teaching_prompts(teaching, config.group_size)
        tally, first = Tally(), None
        for part in passes(len(rollouts.groups), config, step):
            for chosen in part:
                taught = [index for index in chosen if index in useful]
                if not taught:
                    continue
                totals = policy_denominators(
                    lesson,
                    chosen,
                    self.method,
                    config,
                    kl_coef=config.kl_coef,
                    entropy_coef=config.entropy_coef,
                )
                micro = ready(rollouts, taught, self._place.shapes, partial(policy_batch, lesson))
                done = self._update(self.trees["policy"], micro, totals, rate)
                self.trees["policy"] = done.tree
                tally.add(done)
                first = tally.last("ratio/deviation") if first is None else first
            if too_far(tally):
                break
        metrics = policy_metrics(tally)
        metrics["frac_reward_zero_std"] = zero_variance_share(rewards)
        return Learned(metrics, first, tally.skipped)

    def _lesson(self, experience: Experience, rewards: Array) -> Lesson:
        """Advantages of a rollout batch, and which of its tokens count."""
        config, rollouts = self._config, experience.rollouts
        mask = rollouts.mask.astype(np.float32)
        mask[experience.unrewarded] = 0.0
        if config.overlong == "mask":
            mask[~rollouts.ended] = 0.0
        penalised = self.method.kl == "k1_reward" and config.kl_coef > 0
        if penalised and self.method.advantage == "whitened":
            by_token = token_rewards(
                experience.rewards.total,
                experience.old_logps,
                experience.reference_logps,
                mask,
                config.kl_coef,
            )
            advantages = whiten(returns_to_go(by_token, mask), mask)
        else:
            if penalised:
                k1 = np.where(rollouts.mask, experience.old_logps - experience.reference_logps, 0)
                rewards = rewards - config.kl_coef * k1.sum(axis=1).reshape(rewards.shape)
            if _apart(config):
                by_group = normalised_rewards(*experience.rewards.by_group(config.group_size))
            else:
                by_group = GROUP_ADVANTAGES[self.method.advantage](rewards)
            advantages = by_group.reshape(-1, 1) * mask
        return Lesson(
            rollouts,
            experience.old_logps,
            experience.reference_logps,
            advantages,
            mask,
            experience.correction,
            experience.entropies,
        )
