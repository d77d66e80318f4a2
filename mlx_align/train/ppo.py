"""PPO as published: a critic, per-token KL in the reward, clipped ratios and values.

Policy, reference, reward model and critic are adapter trees on one base. Policy and critic are
updated one after the other, so that one set of activations is in memory at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_align.config import PpoConfig
from mlx_align.data.batching import Microbatch
from mlx_align.errors import ConfigError
from mlx_align.inference.score import compiled_scorer
from mlx_align.losses.policy import POLICY_METHODS
from mlx_align.losses.value import explained_variance
from mlx_align.models.heads import (
    HEAD_NAME,
    VALUE_NAME,
    hidden_width,
    put_value_head,
    token_values,
    value_tree,
)
from mlx_align.models.roles import Tree
from mlx_align.rollout.advantages import AdaptiveKL, gae, token_rewards, whiten
from mlx_align.rollout.experience import by_role, rows_of
from mlx_align.train.critic import (
    SharedBatch,
    SharedTotals,
    ValueTotals,
    shared_share,
    value_batch,
    value_share,
)
from mlx_align.train.demonstrations import (
    Demonstrations,
    WithDemonstrations,
    check_demonstrations,
    joined,
)
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
from mlx_align.train.update import Loss, Ready, Updated, Updater
from mlx_align.train.workplace import Experience, Workplace


def check_ppo_options(config: PpoConfig) -> None:
    """Refuse what has no effect or can't be.

    Raises:
        ConfigError: Such an option was given.
    """
    if config.target_kl is not None and config.kl_coef == 0:
        raise ConfigError(
            f"--target-kl {config.target_kl:g}: adapts --kl-coef, which is 0; give it a start"
        )
    for name in ("gamma", "gae_lambda"):
        if (value := getattr(config, name)) > 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: must be at most 1")
    shared = config.critic == "shared"
    for name, acts, why in (
        ("value_clip", config.reward_rollouts, "is in units of standardised rewards"),
        ("reward_clip", config.reward_rollouts, "clips standardised rewards"),
        ("kl_horizon", config.target_kl, "adapts --kl-coef to --target-kl, which is not given"),
        ("value_coef", shared, "weighs the losses of --critic shared"),
        ("critic_learning_rate", not shared, "is of --critic own"),
    ):
        if not acts and getattr(config, name) != getattr(PpoConfig, name):
            raise ConfigError(f"--{name.replace('_', '-')}: {why}, so it has no effect here")
    check_demonstrations(config)


class PpoLearner:
    """Policy and critic, and what they learn from a rollout batch."""

    title = "PPO"
    dynamic = False

    def __init__(self, config: PpoConfig, workplace: Workplace) -> None:
        self._config, self._place = config, workplace
        model = workplace.policy.model
        put_value_head(model.anatomy)
        self._method = dataclasses.replace(
            POLICY_METHODS["ppo"], clip_low=config.clip_eps, clip_high=config.clip_eps
        )
        self._shared = config.critic == "shared"
        self._kl_coef = config.kl_coef
        # What rewards are shifted by and divided by; known once the reference was looked at.
        self._mean, self._deviation = 0.0, 1.0
        self._values = compiled_scorer(model, token_values)
        self._demonstrations = (
            None if config.ptx_data is None else Demonstrations(config, workplace.demonstrations)
        )
        start, critic = workplace.policy.start, self._fresh_critic()
        self.trees: dict[str, Tree] = {"policy": start, "critic": critic}
        if self._shared:
            self.optimizers = {"policy": make_optimizer({**start, **critic}, config.weight_decay)}
            loss = shared_share(model, self._method, config)
            self._update = self._updater("policy", self._with_demonstrations(loss))
            return
        self.optimizers = {
            "policy": make_optimizer(start, config.weight_decay),
            "critic": make_optimizer(critic, config.weight_decay),
        }
        loss = policy_share(model, self._method, grad_checkpoint=config.grad_checkpoint)
        self._update = self._updater("policy", self._with_demonstrations(loss))
        self._update_critic = self._updater("critic", value_share(model, config))

    def _updater(self, name: str, loss: Loss) -> Updater:
        return Updater(
            self._place.policy.model,
            self.optimizers[name],
            loss,
            self._config.max_grad_norm,
            self._place.memory,
            skip=self._config.on_non_finite == "skip",
        )

    def _with_demonstrations(self, loss: Loss) -> Loss:
        if self._demonstrations is None:
            return loss
        model = self._place.policy.model
        return joined(loss, model, grad_checkpoint=self._config.grad_checkpoint)

    def _learn(self, tree: Tree, micro: list[Ready], totals: Any, rate: float) -> Updated:
        """An update of the policy, on demonstrations too where there are some."""
        if self._demonstrations is not None:
            shown, scale = self._demonstrations.take()
            micro, totals = [*micro, *shown], WithDemonstrations(totals, scale)
        return self._update(tree, micro, totals, rate)

    def _fresh_critic(self) -> Tree:
        """The critic: what the reward model would say of an unfinished completion, else zero."""
        place = self._place
        width, reward = hidden_width(place.policy.model.anatomy), place.reward
        if self._shared or reward is None:
            head = value_tree(width, None, 0.0, 1.0)
            return {VALUE_NAME: head} if self._shared else {**place.policy.start, VALUE_NAME: head}
        adapters = {name: part for name, part in reward.items() if name != HEAD_NAME}
        weight = reward[HEAD_NAME]["weight"]
        return {**adapters, VALUE_NAME: value_tree(width, weight, self._mean, self._deviation)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold beside trees and optimizers."""
        return {
            "kl_coef": self._kl_coef,
            "reward_mean": self._mean,
            "reward_deviation": self._deviation,
            "demonstrations": 0 if self._demonstrations is None else self._demonstrations.taken,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""
        self._kl_coef = float(state["kl_coef"])
        self._mean = float(state["reward_mean"])
        self._deviation = float(state["reward_deviation"])
        if self._demonstrations is not None:
            self._demonstrations.taken = int(state["demonstrations"])

    def begin(self) -> str:
        """Look at the reference's rewards, which then have mean 0 and deviation 1.

        Source: Ziegler et al. 2019, section 2.3.
        """
        wanted = self._config.reward_rollouts
        if wanted == 0:
            return ""
        rewards = self._place.look_at_reference(wanted)
        given = rewards[~np.isnan(rewards)]
        line = f"Rewards of {len(given)} completions of the reference: "
        if len(given) < 2 or given.std() < 1e-8:
            return line + "all alike, so they are left as they are."
        self._mean, self._deviation = float(given.mean()), float(given.std(ddof=1))
        self.trees["critic"] = self._fresh_critic()
        if not self._shared:
            self.optimizers["critic"].init(self.trees["critic"])
        return line + f"mean {self._mean:+.3f}, deviation {self._deviation:.3f}; they get 0 and 1."

    def learn(self, experience: Experience, step: int, rate: float) -> Learned:
        """The updates of one rollout batch; the first ones of a run are the critic's alone."""
        config, rollouts = self._config, experience.rollouts
        trunk = self.trees["policy"] if self._shared else {}
        critic = {**trunk, **self.trees["critic"]}
        (values,) = by_role(self._values, critic, rollouts, self._place.shapes)
        mask = rollouts.mask.astype(np.float32)
        mask[experience.unrewarded] = 0.0
        by_token = token_rewards(
            self._scores(experience),
            experience.old_logps,
            experience.reference_logps,
            mask,
            self._kl_coef,
        )
        advantages, returns = gae(by_token, values, mask, config.gamma, config.gae_lambda)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        lesson = Lesson(
            rollouts,
            experience.old_logps,
            experience.reference_logps,
            advantages,
            mask,
            experience.correction,
            experience.entropies,
        )
        learned = self._updates(lesson, values, returns, step, rate)
        metrics = {
            **learned.metrics,
            "value/explained_variance": float(
                explained_variance(mx.array(values), mx.array(returns), mx.array(mask))
            ),
            "value/mean": float(values[mask > 0].mean()) if mask.any() else 0.0,
            "kl_coef": self._kl_coef,
        }
        if config.target_kl is not None:
            control = AdaptiveKL(config.target_kl, config.kl_horizon)
            self._kl_coef = control.next(self._kl_coef, experience.kl, len(rollouts.texts))
        return learned._replace(metrics=metrics)

    def _scores(self, experience: Experience) -> Array:
        """(N,) rewards of whole completions as PPO takes them."""
        config = self._config
        scores = (experience.rewards.total - self._mean) / self._deviation
        if config.reward_rollouts:
            scores = np.clip(scores, -config.reward_clip, config.reward_clip)
        return np.asarray(scores - config.missing_eos_penalty * ~experience.rollouts.ended)

    def _updates(
        self, lesson: Lesson, values: Array, returns: Array, step: int, rate: float
    ) -> Learned:
        config, rollouts = self._config, lesson.rollouts
        acts = step >= config.critic_warmup
        tally, critic, first = Tally(), Tally(), None
        size = rollouts.group_size
        useful = teaching_prompts(lesson.mask, size)
        to_value = partial(value_batch, rollouts, values, returns, lesson.mask)
        for part in passes(len(rollouts.groups), config, step):
            for chosen in part:
                chosen = [index for index in chosen if index in useful]
                if not chosen:
                    continue
                tokens = float(lesson.mask[rows_of(chosen, size)].sum())
                below = ValueTotals(mx.array(tokens))
                above = policy_denominators(lesson, chosen, self._method, config)
                if self._shared:
                    both = SharedTotals(above, below, mx.array(float(acts)))

                    def arrays(micro: Microbatch) -> SharedBatch:
                        return SharedBatch(policy_batch(lesson, micro), to_value(micro))

                    micro = ready(rollouts, chosen, self._place.shapes, arrays)
                    joint = {**self.trees["policy"], **self.trees["critic"]}
                    done = self._learn(joint, micro, both, rate)
                    head = done.tree.pop(VALUE_NAME)
                    self.trees = {"policy": done.tree, "critic": {VALUE_NAME: head}}
                    value_loss = done.sums.pop("value_loss", 0.0) / tokens
                    critic.add(done._replace(loss=value_loss))
                    if acts:
                        tally.add(done)
                else:
                    micro = ready(rollouts, chosen, self._place.shapes, to_value)
                    rate_critic = config.critic_learning_rate * rate / config.learning_rate
                    done = self._update_critic(self.trees["critic"], micro, below, rate_critic)
                    self.trees["critic"] = done.tree
                    critic.add(done)
                    if not acts:
                        continue
                    micro = ready(
                        rollouts, chosen, self._place.shapes, partial(policy_batch, lesson)
                    )
                    done = self._learn(self.trees["policy"], micro, above, rate)
                    self.trees["policy"] = done.tree
                    tally.add(done)
                first = tally.last("ratio/deviation") if first is None else first
            if acts and too_far(tally):
                break
        metrics = {
            **policy_metrics(tally),
            **critic.means("value/loss", "value/grad_norm"),
        }
        # With one trunk an update is one of both, and is left out once.
        skipped = critic.skipped if self._shared else [*critic.skipped, *tally.skipped]
        return Learned(metrics, first, skipped)
