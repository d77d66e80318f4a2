"""Group-relative policy gradients: GRPO, RLOO, DAPO, GSPO and others.

There is no critic: the advantage of a completion comes from the rewards of the other completions
of its prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_align.algorithms.base import UpdateResult
from mlx_align.algorithms.policy_gradient import (
    PolicyObjective,
    UpdateMetrics,
    minibatch_epochs,
    prompts_with_signal,
    split_microbatches,
)
from mlx_align.algorithms.update import Updater, make_optimizer
from mlx_align.config import GRPOConfig
from mlx_align.errors import ConfigError
from mlx_align.losses.policy import POLICY_METHODS, PolicyMethod
from mlx_align.losses.registry import LOSS_ALIASES, PAIRWISE_LOSSES
from mlx_align.models.weights import AdapterWeights
from mlx_align.rollout.advantages import (
    GROUP_ADVANTAGES,
    WHITENED_OVER_TOKENS,
    normalize_then_sum,
    returns_to_go,
    token_rewards,
    whiten,
    zero_variance_share,
)
from mlx_align.rollout.collector import RolloutBatch, RolloutCollector
from mlx_align.rollout.reward_functions import RewardSource, parse_rewards
from mlx_align.system.progress import Console

# Values of --kl -> values of `PolicyMethod.kl`.
KL_PLACES = {"k1": "k1_reward", "k2": "k2", "k3": "k3"}
# Methods that use dynamic sampling by default (Yu et al. 2025, DAPO).
DYNAMIC_SAMPLING = ("dapo",)


def resolve_method(config: GRPOConfig) -> PolicyMethod:
    """The method of --loss, with the changes that other options make.

    Raises:
        ConfigError: There is no such method, or an option has no effect on it.
    """
    methods = {name: method for name, method in POLICY_METHODS.items() if name != "ppo"}
    if config.loss in PAIRWISE_LOSSES or config.loss in LOSS_ALIASES:
        raise ConfigError(
            f"--loss {config.loss}: is a loss of preference pairs; use mlx-align dpo, or --loss "
            "online_dpo for pairs of the policy's own completions"
        )
    if config.loss not in methods:
        known = ", ".join([*methods, "online_dpo"])
        raise ConfigError(f"--loss {config.loss}: unknown; choose from {known}")
    method = methods[config.loss]
    changes: dict[str, Any] = {}
    if config.kl is not None:
        if config.kl_coef == 0:
            raise ConfigError(f"--kl {config.kl}: has no effect with --kl-coef 0; give --kl-coef")
        changes["kl"] = KL_PLACES[config.kl]
    elif config.kl_coef > 0 and method.kl == "none":
        changes["kl"] = "k2"  # as a loss, k3 has a different optimum
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


def check_grpo_options(config: GRPOConfig, rewards: Sequence[RewardSource] = ()) -> None:
    """Check that all given options have an effect and can be combined.

    Args:
        config: The options.
        rewards: Reward functions in addition to `config.reward`.

    Raises:
        ConfigError: An option has no effect, or two can't be combined.
    """
    method = resolve_method(config)
    if config.beta is not None:
        raise ConfigError(
            f"--beta {config.beta:g}: is the temperature of --loss online_dpo; the KL penalty of "
            f"--loss {config.loss} is --kl-coef {config.beta:g}"
        )
    if config.group_size < 2 and method.advantage != "whitened":
        raise ConfigError(
            f"--group-size {config.group_size}: --loss {config.loss} compares the completions of "
            "a prompt; give 2 or more"
        )
    if config.multi_objective_aggregation is not None:
        _check_aggregation(config, method, rewards)


def _check_aggregation(
    config: GRPOConfig, method: PolicyMethod, rewards: Sequence[RewardSource]
) -> None:
    option = f"--multi-objective-aggregation {config.multi_objective_aggregation}"
    specs = parse_rewards([*(config.reward or ()), *rewards])
    counted = [spec for spec in specs if spec.weight != 0]
    if len(counted) + (config.reward_model is not None) < 2:
        raise ConfigError(f"{option}: has no effect on one reward; add a reward, or leave it out")
    if not _normalizes_each_reward(config):
        return
    if method.advantage != "group_std":
        fitting = [name for name, m in POLICY_METHODS.items() if m.advantage == "group_std"]
        raise ConfigError(
            f"{option}: --loss {config.loss} does not divide by the deviation of a group; choose "
            f"from {', '.join(fitting)}"
        )
    if method.kl == "k1_reward":
        raise ConfigError(
            f"{option}: --kl k1 is added to the sum of the rewards; give --kl k2 or k3"
        )


def _normalizes_each_reward(config: GRPOConfig) -> bool:
    return config.multi_objective_aggregation == "normalize_then_sum"


class GRPO:
    """Trains on groups of completions by a group-relative policy gradient.

    Attributes:
        title: Label of the progress bar.
        dynamic_sampling: Whether prompts whose completions all have the same reward are replaced.
        weights: The trained weights, by name.
        optimizers: Their optimizers, by name.
        method: The method.
    """

    title = "GRPO"

    def __init__(self, config: GRPOConfig, collector: RolloutCollector) -> None:
        self._config, self._collector = config, collector
        self.method = resolve_method(config)
        given = config.dynamic_sampling
        self.dynamic_sampling = config.loss in DYNAMIC_SAMPLING if given is None else given
        model, start = collector.policy.model, collector.policy.start
        self.weights: dict[str, AdapterWeights] = {"policy": start}
        self.optimizers = {"policy": make_optimizer(start, config.weight_decay)}
        self._kl_in_loss = config.kl_coef > 0 and self.method.kl != "k1_reward"
        self._with_entropy = config.entropy_coef > 0 or self.method.entropy_quantile > 0
        self._objective = PolicyObjective(
            model,
            self.method,
            config,
            kl_coef=config.kl_coef if self._kl_in_loss else 0.0,
            entropy_coef=config.entropy_coef,
            with_entropy=self._with_entropy,
        )
        self._updater = Updater(
            model,
            self.optimizers["policy"],
            self._objective.loss,
            config.max_grad_norm,
            collector.memory,
            skip=config.on_non_finite == "skip",
        )

    def prepare(self, console: Console) -> str:
        """Nothing to do before the first rollout batch."""
        return ""

    def state(self) -> dict[str, Any]:
        """No state besides weights and optimizers."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """No state to restore."""

    def update(self, batch: RolloutBatch, step: int, learning_rate: float) -> UpdateResult:
        """Make the updates on one rollout batch."""
        config, completions = self._config, batch.completions
        batch = self.with_advantages(batch)
        # A prompt whose advantages are all 0 has no gradient, except of the KL or the entropy.
        signal = batch.loss_mask if self._kl_in_loss or self._with_entropy else batch.advantages
        with_signal = prompts_with_signal(signal, config.group_size)
        metrics, first_deviation = UpdateMetrics(), None
        for minibatches in minibatch_epochs(len(completions.groups), config, step):
            for minibatch in minibatches:
                selected = [index for index in minibatch if index in with_signal]
                if not selected:
                    continue
                update = self._updater(
                    self.weights["policy"],
                    split_microbatches(
                        completions, selected, self._collector.shapes, batch.collate
                    ),
                    self._objective.denominators(batch, minibatch),
                    learning_rate,
                )
                self.weights["policy"] = update.weights
                metrics.add(update)
                if first_deviation is None:
                    first_deviation = metrics.last("ratio/deviation")
            if metrics.exceeds_kl():
                break
        row = metrics.policy()
        rewards = batch.rewards.total.reshape(-1, config.group_size)
        row["frac_reward_zero_std"] = zero_variance_share(rewards)
        return UpdateResult(row, first_deviation, metrics.skipped)

    def with_advantages(self, batch: RolloutBatch) -> RolloutBatch:
        """The batch with advantages; --overlong mask also masks truncated completions."""
        config, rewards = self._config, batch.rewards
        mask = batch.loss_mask
        if config.overlong == "mask":
            mask = np.where(batch.completions.finished[:, None], mask, np.float32(0.0))
        kl_in_reward = self.method.kl == "k1_reward" and config.kl_coef > 0
        if kl_in_reward and self.method.advantage == "whitened":
            by_token = token_rewards(
                rewards.total, batch.old_logps, batch.reference_logps, mask, config.kl_coef
            )
            return batch.with_advantages(whiten(returns_to_go(by_token, mask), mask), mask)
        total = rewards.total.reshape(-1, config.group_size)
        if kl_in_reward:
            difference = batch.old_logps - batch.reference_logps
            k1 = np.where(batch.completions.mask, difference, 0)
            total = total - config.kl_coef * k1.sum(axis=1).reshape(total.shape)
        if _normalizes_each_reward(config):
            advantages = normalize_then_sum(*rewards.by_group(config.group_size))
        elif self.method.advantage in WHITENED_OVER_TOKENS:
            tokens = (mask > 0).sum(axis=1).reshape(total.shape)
            advantages = WHITENED_OVER_TOKENS[self.method.advantage](total, tokens)
        else:
            advantages = GROUP_ADVANTAGES[self.method.advantage](total)
        return batch.with_advantages(advantages.reshape(-1, 1) * mask, mask)
