"""PPO with a critic, a per-token KL penalty in the reward, and clipped ratios and values.

Policy, reference, reward model and critic are adapters on one base. Policy and critic are updated
in turn, so that the activations of only one of them are in memory. With `--critic shared` the
critic is a value head on the policy's own hidden states, and both are updated together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_align.algorithms.base import Loss, MetricSums, UpdateResult
from mlx_align.algorithms.policy_gradient import (
    Array,
    PolicyDenominators,
    PolicyObjective,
    UpdateMetrics,
    minibatch_epochs,
    prompts_with_signal,
    split_microbatches,
)
from mlx_align.algorithms.update import CollatedMicrobatch, OptimizerStep, Updater, make_optimizer
from mlx_align.config import DEFAULT_BATCH_SIZE, PPOConfig
from mlx_align.data.batching import Microbatch, collate_groups, microbatch_stream
from mlx_align.data.buckets import BatchLimit, Shape, plan_shapes
from mlx_align.data.formats import read_supervised
from mlx_align.data.tokenization import tokenize_groups
from mlx_align.data.transforms import keep_last_completion
from mlx_align.errors import ConfigError
from mlx_align.inference.scoring import compile_forward
from mlx_align.losses.masking import masked_sum
from mlx_align.losses.policy import POLICY_METHODS, PolicyMethod, policy_loss
from mlx_align.losses.value import explained_variance, value_loss
from mlx_align.models.heads import (
    REWARD_HEAD,
    VALUE_HEAD,
    add_value_head,
    hidden_width,
    token_values,
    value_head_weights,
)
from mlx_align.models.loading import LanguageModel
from mlx_align.models.weights import AdapterWeights
from mlx_align.rollout.advantages import (
    AdaptiveKL,
    fit_line,
    gae,
    returns_to_go,
    token_rewards,
    whiten,
)
from mlx_align.rollout.collector import RolloutBatch, RolloutCollector
from mlx_align.rollout.sampler import Completions, evaluate_tokens, microbatch_array
from mlx_align.system.progress import Console
from mlx_align.types import GroupBatch, PolicyBatch, TokenizedGroup, ValueBatch

# Compiled shapes of demonstrations, in addition to those of the rollouts.
DEMONSTRATION_SHAPES = 4


def check_ppo_options(config: PPOConfig) -> None:
    """Check that all given options have an effect and can be combined.

    Raises:
        ConfigError: An option has no effect, or two can't be combined.
    """
    if config.target_kl is not None and config.kl_coef == 0:
        raise ConfigError(
            f"--target-kl {config.target_kl:g}: adapts --kl-coef, which is 0; give an initial "
            "--kl-coef above 0"
        )
    for name in ("gamma", "gae_lambda"):
        if (value := getattr(config, name)) > 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: must be at most 1")
    shared = config.critic == "shared"
    for name, has_effect, reason in (
        ("value_clip", config.reward_rollouts, "is in units of standardised rewards"),
        ("reward_clip", config.reward_rollouts, "clips standardised rewards"),
        ("kl_horizon", config.target_kl, "adapts --kl-coef to --target-kl, which is not given"),
        ("value_coef", shared, "weights the value loss of --critic shared"),
        ("critic_learning_rate", not shared, "is for --critic own"),
    ):
        if not has_effect and getattr(config, name) != getattr(PPOConfig, name):
            raise ConfigError(f"--{name.replace('_', '-')}: {reason}, so it has no effect here")
    if config.ptx_coef > 0 and config.ptx_data is None:
        raise ConfigError(
            f"--ptx-coef {config.ptx_coef:g} needs --ptx-data (a file of demonstrations)"
        )
    if config.ptx_data is not None and config.ptx_coef == 0:
        raise ConfigError(f"--ptx-data {config.ptx_data}: has no effect without --ptx-coef")


class PPO:
    """Trains policy and critic on rollout batches.

    Attributes:
        title: Label of the progress bar.
        dynamic_sampling: False: no prompt is replaced.
        weights: The trained weights: `policy` and `critic`.
        optimizers: Their optimizers; only `policy` with --critic shared.
    """

    title = "PPO"
    dynamic_sampling = False

    def __init__(self, config: PPOConfig, collector: RolloutCollector) -> None:
        self._config, self._collector = config, collector
        model = collector.policy.model
        add_value_head(model.backbone)
        method = dataclasses.replace(
            POLICY_METHODS["ppo"], clip_low=config.clip_eps, clip_high=config.clip_eps
        )
        self._shared = config.critic == "shared"
        self._kl_coef = config.kl_coef
        # Rewards are shifted and scaled by these, after `prepare` has measured them.
        self._reward_mean, self._reward_std = 0.0, 1.0
        self._value_scorer = compile_forward(model, token_values)
        self._demonstrations = (
            None if config.ptx_data is None else Demonstrations(config, collector.demonstrations)
        )
        self._policy_objective = PolicyObjective(model, method, config)
        start, critic = collector.policy.start, self._initial_critic()
        self.weights: dict[str, AdapterWeights] = {"policy": start, "critic": critic}
        if self._shared:
            self.optimizers = {"policy": make_optimizer({**start, **critic}, config.weight_decay)}
            joint = ActorCriticObjective(model, method, config)
            self._policy_updater = self._updater("policy", self._with_demonstrations(joint.loss))
            return
        self.optimizers = {
            "policy": make_optimizer(start, config.weight_decay),
            "critic": make_optimizer(critic, config.weight_decay),
        }
        loss = self._with_demonstrations(self._policy_objective.loss)
        self._policy_updater = self._updater("policy", loss)
        self._critic_updater = self._updater("critic", ValueObjective(model, config).loss)

    def _updater(self, name: str, loss: Loss) -> Updater:
        return Updater(
            self._collector.policy.model,
            self.optimizers[name],
            loss,
            self._config.max_grad_norm,
            self._collector.memory,
            skip=self._config.on_non_finite == "skip",
        )

    def _with_demonstrations(self, loss: Loss) -> Loss:
        if self._demonstrations is None:
            return loss
        model, grad_checkpoint = self._collector.policy.model, bool(self._config.grad_checkpoint)
        return PtxObjective(loss, model, grad_checkpoint=grad_checkpoint).loss

    def _initial_critic(self) -> AdapterWeights:
        """The initial critic: the reward model if that is an adapter, else a head of zeros.

        With the reward model, the value of an unfinished completion is its score, until `prepare`
        scales it.
        """
        collector = self._collector
        width, reward = hidden_width(collector.policy.model.backbone), collector.reward_adapter
        if self._shared or reward is None:
            head = value_head_weights(width, None)
            start = {} if self._shared else collector.policy.start
            return {**start, VALUE_HEAD: head}
        adapter = {name: part for name, part in reward.items() if name != REWARD_HEAD}
        head = value_head_weights(width, reward[REWARD_HEAD]["weight"])
        return {**adapter, VALUE_HEAD: head}

    def prepare(self, console: Console) -> str:
        """Measure the reference's rewards; later rewards are standardised by them.

        A critic that starts as the reward model is scaled to the returns of the same completions.

        Returns:
            A line to show.

        Source: Ziegler et al. 2019, section 2.3.
        """
        count = self._config.reward_rollouts
        if count == 0:
            return ""
        rollouts = []
        with console.bar("Completions of the reference", count) as bar:
            for completions, rewards in self._collector.reference_rollouts(count):
                rollouts.append((completions, rewards))
                bar.advance(len(rewards))
        rewards = np.concatenate([rewards for _, rewards in rollouts])
        given = rewards[~np.isnan(rewards)]
        line = f"Rewards of {len(given)} completions of the reference: "
        if len(given) < 2 or given.std() < 1e-8:
            return line + "all equal, so rewards are not standardised."
        self._reward_mean, self._reward_std = float(given.mean()), float(given.std(ddof=1))
        if not self._shared and self._collector.reward_adapter is not None:
            slope, intercept = self._fitted_values(rollouts)
            head = self.weights["critic"][VALUE_HEAD]
            head["weight"], head["bias"] = slope * head["weight"], slope * head["bias"] + intercept
        return (
            f"{line}mean {self._reward_mean:+.3f}, deviation {self._reward_std:.3f}; rewards are "
            "standardised by these."
        )

    def _fitted_values(self, rollouts: Sequence[tuple[Completions, Array]]) -> tuple[float, float]:
        """Slope and intercept that map the critic's values to the returns, by least squares.

        A reward model has learned to score whole completions. Its scores of their beginnings can be
        far off: SmolLM2-135M's were 2 to 5 deviations too high, and 20 rollout batches did not
        correct that.
        """
        values, returns = [], []
        for completions, rewards in rollouts:
            mask = completions.mask & ~np.isnan(rewards)[:, None]
            (found,) = evaluate_tokens(
                self._value_scorer, self.weights["critic"], completions, self._collector.shapes
            )
            scores = self._scores(rewards, completions.finished)
            by_token = token_rewards(scores, found, found, mask, 0.0)
            values.append(found[mask])
            returns.append(returns_to_go(by_token, mask, self._config.gamma)[mask])
        return fit_line(np.concatenate(values), np.concatenate(returns))

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint besides weights and optimizers."""
        demonstrations = self._demonstrations
        return {
            "kl_coef": self._kl_coef,
            "reward_mean": self._reward_mean,
            "reward_deviation": self._reward_std,
            "demonstrations": 0 if demonstrations is None else demonstrations.microbatches_taken,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state` returned."""
        self._kl_coef = float(state["kl_coef"])
        self._reward_mean = float(state["reward_mean"])
        self._reward_std = float(state["reward_deviation"])
        if self._demonstrations is not None:
            self._demonstrations.microbatches_taken = int(state["demonstrations"])

    def update(self, batch: RolloutBatch, step: int, learning_rate: float) -> UpdateResult:
        """Make the updates on one rollout batch; at the start of a run, of the critic only."""
        config = self._config
        shared_part = self.weights["policy"] if self._shared else {}
        (values,) = evaluate_tokens(
            self._value_scorer,
            {**shared_part, **self.weights["critic"]},
            batch.completions,
            self._collector.shapes,
        )
        mask = batch.loss_mask
        by_token = token_rewards(
            self._scores(batch.rewards.total, batch.completions.finished),
            batch.old_logps,
            batch.reference_logps,
            mask,
            self._kl_coef,
        )
        advantages, returns = gae(by_token, values, mask, config.gamma, config.gae_lambda)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        targets = ValueTargets(batch.with_advantages(advantages), values, returns)
        policy, critic, first_deviation = self._run_updates(targets, step, learning_rate)
        metrics = {
            **policy.policy(),
            **critic.means("value/loss", "value/grad_norm"),
            "value/explained_variance": float(
                explained_variance(mx.array(values), mx.array(returns), mx.array(mask))
            ),
            "value/mean": float(values[mask > 0].mean()) if mask.any() else 0.0,
            "kl_coef": self._kl_coef,
        }
        if config.target_kl is not None:
            control = AdaptiveKL(config.target_kl, config.kl_horizon)
            count = len(batch.completions.texts)
            self._kl_coef = control.next(self._kl_coef, batch.kl, count)
        # With a shared critic, an update trains both, so a skipped one counts once.
        skipped = critic.skipped if self._shared else [*critic.skipped, *policy.skipped]
        return UpdateResult(metrics, first_deviation, skipped)

    def _scores(self, rewards: Array, finished: Array) -> Array:
        """(N,) rewards of completions: standardised, clipped, minus the EOS penalty."""
        config = self._config
        scores = (rewards - self._reward_mean) / self._reward_std
        if config.reward_rollouts:
            scores = np.clip(scores, -config.reward_clip, config.reward_clip)
        return np.asarray(scores - config.missing_eos_penalty * ~finished)

    def _run_updates(
        self, targets: ValueTargets, step: int, rate: float
    ) -> tuple[UpdateMetrics, UpdateMetrics, float | None]:
        """Make all updates on a batch.

        Returns:
            Metrics of the policy and of the critic, and the first update's mean |ratio − 1|.
        """
        batch = targets.batch
        with_policy = step >= self._config.critic_batches
        policy, critic, first_deviation = UpdateMetrics(), UpdateMetrics(), None
        with_signal = prompts_with_signal(batch.loss_mask, batch.completions.group_size)
        update = self._update_jointly if self._shared else self._update_separately
        prompts = len(batch.completions.groups)
        for minibatches in minibatch_epochs(prompts, self._config, step):
            for minibatch in minibatches:
                selected = [index for index in minibatch if index in with_signal]
                if not selected:
                    continue
                done = update(targets, selected, rate, with_policy=with_policy)
                critic.add(done.critic)
                if done.policy is not None:
                    policy.add(done.policy)
                if first_deviation is None:
                    first_deviation = policy.last("ratio/deviation")
            if with_policy and policy.exceeds_kl():
                break
        return policy, critic, first_deviation

    def _update_separately(
        self, targets: ValueTargets, selected: list[int], rate: float, *, with_policy: bool
    ) -> _Updates:
        """One update of the critic, then one of the policy."""
        config, batch, shapes = self._config, targets.batch, self._collector.shapes
        critic = self._critic_updater(
            self.weights["critic"],
            split_microbatches(batch.completions, selected, shapes, targets.collate),
            targets.denominators(selected),
            config.critic_learning_rate * rate / config.rate,
        )
        self.weights["critic"] = critic.weights
        if not with_policy:
            return _Updates(critic, None)
        policy = self._update_policy(
            self.weights["policy"],
            split_microbatches(batch.completions, selected, shapes, batch.collate),
            self._policy_objective.denominators(batch, selected),
            rate,
        )
        self.weights["policy"] = policy.weights
        return _Updates(critic, policy)

    def _update_jointly(
        self, targets: ValueTargets, selected: list[int], rate: float, *, with_policy: bool
    ) -> _Updates:
        """One update of policy and value head by the joint loss."""
        batch = targets.batch

        def collate(micro: Microbatch) -> ActorCriticBatch:
            return ActorCriticBatch(batch.collate(micro), targets.collate(micro))

        denominators = ActorCriticDenominators(
            self._policy_objective.denominators(batch, selected),
            targets.denominators(selected),
            mx.array(float(with_policy)),
        )
        both = self._update_policy(
            {**self.weights["policy"], **self.weights["critic"]},
            split_microbatches(batch.completions, selected, self._collector.shapes, collate),
            denominators,
            rate,
        )
        head = both.weights.pop(VALUE_HEAD)
        self.weights = {"policy": both.weights, "critic": {VALUE_HEAD: head}}
        mean_loss = both.sums.pop("value_loss", 0.0) / targets.tokens(selected)
        return _Updates(both._replace(loss=mean_loss), both if with_policy else None)

    def _update_policy(
        self,
        weights: AdapterWeights,
        micro: list[CollatedMicrobatch],
        denominators: Any,
        rate: float,
    ) -> OptimizerStep:
        """One update of the policy, also on demonstrations if there are any."""
        if self._demonstrations is not None:
            demonstrations, scale = self._demonstrations.next_microbatches()
            micro = [*micro, *demonstrations]
            denominators = PtxDenominators(denominators, scale)
        return self._policy_updater(weights, micro, denominators, rate)


class _Updates(NamedTuple):
    critic: OptimizerStep
    policy: OptimizerStep | None  # None while only the critic is trained


# --- the critic ---


class ValueDenominators(NamedTuple):
    """The denominator of an update of the critic."""

    tokens: mx.array


class ActorCriticBatch(NamedTuple):
    """A microbatch of policy and value head on the same hidden states."""

    policy: PolicyBatch
    value: ValueBatch


class ActorCriticDenominators(NamedTuple):
    """The denominators of a joint update."""

    policy: PolicyDenominators
    value: ValueDenominators
    with_policy: mx.array  # 1, or 0 while only the critic is trained


class ValueTargets(NamedTuple):
    """The training data of the critic.

    Attributes:
        batch: The rollout batch, with advantages.
        values: (N, C) before the first update.
        returns: (N, C).
    """

    batch: RolloutBatch
    values: Array
    returns: Array

    def collate(self, micro: Microbatch) -> ValueBatch:
        """The arrays of one microbatch of the critic."""
        completions, shape = self.batch.completions, micro.shape
        assert isinstance(shape, Shape)
        rows, size = completions.rows(micro.indices), completions.group_size
        values, returns, mask = (
            microbatch_array(part, rows, shape, size)
            for part in (self.values, self.returns, self.batch.loss_mask)
        )
        groups = collate_groups([completions.groups[i] for i in micro.indices], shape)
        return ValueBatch(groups, values, returns, mask)

    def tokens(self, prompts: Sequence[int]) -> float:
        """Tokens of these prompts' completions that count."""
        return float(self.batch.loss_mask[self.batch.completions.rows(prompts)].sum())

    def denominators(self, prompts: Sequence[int]) -> ValueDenominators:
        """The denominators of an update on these prompts."""
        return ValueDenominators(mx.array(self.tokens(prompts)))


class ValueObjective:
    """The value loss: the mean over tokens of ½·max((V − R)², (V_clip − R)²)."""

    def __init__(self, model: LanguageModel, config: PPOConfig) -> None:
        self._model, self._config = model, config

    def loss(
        self, weights: AdapterWeights, batch: ValueBatch, denominators: ValueDenominators
    ) -> tuple[mx.array, MetricSums]:
        """The loss contribution of a microbatch, and its metric sums."""
        values = self._model.values(
            weights, batch.groups, grad_checkpoint=bool(self._config.grad_checkpoint)
        )
        loss = value_loss_sum(values, batch, self._config) / mx.maximum(denominators.tokens, 1.0)
        return loss, {"weight": batch.mask.sum()}


class ActorCriticObjective:
    """Policy loss + value_coef · value loss, from one pass through the backbone.

    While only the critic is trained, the policy loss is omitted, and only the value head gets a
    gradient.

    Source: Schulman et al. 2017 (PPO), eq. 9.
    """

    def __init__(self, model: LanguageModel, method: PolicyMethod, config: PPOConfig) -> None:
        self._model, self._method, self._config = model, method, config

    def loss(
        self,
        weights: AdapterWeights,
        batch: ActorCriticBatch,
        denominators: ActorCriticDenominators,
    ) -> tuple[mx.array, MetricSums]:
        """The loss contribution of a microbatch, and its metric sums."""
        logps, values = self._model.token_logprobs_and_values(
            weights,
            batch.policy.groups,
            value_gradient=denominators.with_policy,
            grad_checkpoint=bool(self._config.grad_checkpoint),
        )
        sample = batch.policy.sample._replace(logps=logps)
        policy, sums = policy_loss(self._method, sample, denominators.policy.policy, kl_coef=0.0)
        value = value_loss_sum(values, batch.value, self._config)
        loss = denominators.with_policy * policy
        loss = loss + self._config.value_coef * value / mx.maximum(denominators.value.tokens, 1.0)
        return loss, {**sums, "value_loss": mx.stop_gradient(value)}


def value_loss_sum(values: mx.array, batch: ValueBatch, config: PPOConfig) -> mx.array:
    """The sum of the value losses of a microbatch's tokens."""
    # The clip range is in units of standardised rewards.
    clip = config.value_clip if config.reward_rollouts else None
    losses = value_loss(values, batch.old_values, batch.returns, batch.mask, clip=clip)
    return masked_sum(losses, batch.mask, axis=None)


# --- demonstrations (PPO-ptx) ---


class PtxDenominators(NamedTuple):
    """The denominators of an update with demonstrations."""

    policy: Any  # denominators of the policy's loss
    scale: mx.array  # ptx_coef divided by the demonstrations' tokens in the update


class PtxObjective:
    """The policy's loss + ptx_coef · the mean log-loss of the demonstrations' tokens.

    It keeps the policy from forgetting the demonstrations.

    Source: Ouyang et al. 2022 (InstructGPT), eq. 2.

    Args:
        policy_loss: The policy's loss.
        model: The base model.
        grad_checkpoint: Recompute activations in the backward pass.
    """

    def __init__(self, policy_loss: Loss, model: LanguageModel, *, grad_checkpoint: bool) -> None:
        self._policy_loss, self._model = policy_loss, model
        self._grad_checkpoint = grad_checkpoint

    def loss(
        self, weights: AdapterWeights, batch: Any, denominators: PtxDenominators
    ) -> tuple[mx.array, MetricSums]:
        """The loss contribution of a microbatch, and its metric sums.

        A microbatch of demonstrations is a `GroupBatch`.
        """
        if not isinstance(batch, GroupBatch):
            return self._policy_loss(weights, batch, denominators.policy)
        logps = self._model.token_logprobs(weights, batch, grad_checkpoint=self._grad_checkpoint)
        nll = -masked_sum(logps, batch.completion_mask, axis=None)
        sums = {
            "ptx/nll": mx.stop_gradient(nll),
            "ptx/tokens": batch.completion_mask.sum().astype(mx.float32),
        }
        return denominators.scale * nll, sums


def read_demonstrations(config: PPOConfig, tokenizer: Any) -> list[TokenizedGroup]:
    """The demonstrations of --ptx-data, tokenised.

    Raises:
        DataError: They can't be used; the message names file and line.
    """
    assert config.ptx_data is not None
    groups, _ = read_supervised(config.ptx_data, "train")
    return tokenize_groups(
        keep_last_completion(groups),
        tokenizer=tokenizer,
        max_seq_length=config.max_seq_length,
        thinking=config.thinking,
    )[0]


class Demonstrations:
    """The demonstrations of a run, in microbatches for its updates.

    Args:
        config: The options.
        groups: The demonstrations, from `read_demonstrations`.

    Attributes:
        microbatches_taken: Microbatches taken so far: the position in the data.
    """

    def __init__(self, config: PPOConfig, groups: Sequence[TokenizedGroup]) -> None:
        self._config, self._groups = config, groups
        size = config.batch_size or DEFAULT_BATCH_SIZE
        self._shapes = plan_shapes(self._groups, BatchLimit(size), DEMONSTRATION_SHAPES)
        self.microbatches_taken = 0

    def next_microbatches(self) -> tuple[list[CollatedMicrobatch], mx.array]:
        """The next `grad_accumulation_steps` microbatches, and the scale of their log-losses."""
        count = self._config.accumulation
        stream: Iterator[Microbatch] = microbatch_stream(
            self._groups, self._shapes, seed=self._config.seed, start=self.microbatches_taken
        )
        self.microbatches_taken += count
        batches = [
            CollatedMicrobatch(
                collate_groups([self._groups[i] for i in micro.indices], micro.shape),
                micro.shape,
                partial(self._sources, micro),
            )
            for micro in islice(stream, count)
        ]
        tokens = sum((batch.arrays.completion_mask.sum() for batch in batches), mx.array(0))
        return batches, self._config.ptx_coef / mx.maximum(tokens.astype(mx.float32), 1.0)

    def _sources(self, micro: Microbatch) -> list[str]:
        return [self._groups[i].source for i in micro.indices]
