"""Collect rollout batches: sample completions, reward them, compute log-probs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_align.config import DEFAULT_BATCH_SIZE, OnPolicyConfig
from mlx_align.data.batching import Microbatch, collate_groups
from mlx_align.data.buckets import AnyShape, Shape
from mlx_align.errors import TrainingError
from mlx_align.inference.scoring import compile_forward, make_logprob_scorer
from mlx_align.models.forward import token_logprobs_and_entropies
from mlx_align.models.policy import Policy
from mlx_align.models.weights import AdapterWeights
from mlx_align.rollout.advantages import zero_variance_share
from mlx_align.rollout.reward_functions import RewardTable, combine
from mlx_align.rollout.rewards import Rewards
from mlx_align.rollout.sampler import (
    Completions,
    Floats,
    Prompt,
    evaluate_tokens,
    microbatch_array,
    sample_completions,
)
from mlx_align.system.memory_limit import MemoryLimit
from mlx_align.types import PolicyBatch, PolicySample, TokenizedGroup

# Mean absolute difference of a token's log-prob between sampler and trainer, in nats. Above
# CORRECT_ABOVE, tokens are weighted by their probability ratio. Above REFUSE_ABOVE, the
# completions are those of a different policy.
CORRECT_ABOVE, REFUSE_ABOVE = 0.02, 0.5
# Maximum rounds of sampling for one batch under dynamic sampling.
MAX_DYNAMIC_ROUNDS = 4


@dataclass(frozen=True)
class RolloutBatch:
    """N completions with their rewards, log-probs and advantages.

    Attributes:
        completions: The completions, B prompts with G each.
        rewards: The reward of each completion.
        old_logps: (N, C) nats, the sampling policy's, by teacher forcing.
        reference_logps: (N, C) nats.
        entropies: (N, C) nats, of the sampling policy at each token.
        correction: (N, C) importance weights, trainer over sampler; usually ones.
        advantages: (N, C); zeros until `with_advantages` sets them.
        loss_mask: (N, C) float32, 1 where a token counts in the loss.
        sampler_gap: Mean |trainer − sampler| log-prob, nats per token.
        prompts_drawn: Prompts taken from the data, including those that dynamic sampling dropped.
    """

    completions: Completions
    rewards: RewardTable
    old_logps: Floats
    reference_logps: Floats
    entropies: Floats
    correction: Floats
    advantages: npt.NDArray[Any]
    loss_mask: Floats
    sampler_gap: float
    prompts_drawn: int

    def with_advantages(
        self, advantages: npt.NDArray[Any], loss_mask: Floats | None = None
    ) -> RolloutBatch:
        """The batch with these advantages (N, C), and with another loss mask if one is given."""
        mask = self.loss_mask if loss_mask is None else loss_mask
        return replace(self, advantages=advantages, loss_mask=mask)

    def collate(self, micro: Microbatch) -> PolicyBatch:
        """The arrays of one microbatch, for the policy-gradient loss."""
        completions, shape = self.completions, micro.shape
        assert isinstance(shape, Shape)
        padded = partial(
            microbatch_array,
            rows=completions.rows(micro.indices),
            shape=shape,
            group_size=completions.group_size,
        )
        old = padded(self.old_logps)
        return PolicyBatch(
            groups=collate_groups([completions.groups[i] for i in micro.indices], shape),
            sample=PolicySample(
                logps=old,
                old_logps=old,
                reference_logps=padded(self.reference_logps),
                advantages=padded(self.advantages),
                mask=padded(self.loss_mask),
                correction=padded(self.correction),
            ),
        )

    @property
    def dropped(self) -> float:
        """The fraction of the prompts drawn that dynamic sampling dropped."""
        return 1 - len(self.completions.groups) / self.prompts_drawn

    @property
    def kl_by_completion(self) -> Floats:
        """(N,) nats: the k1 estimate of KL(policy‖reference), summed over tokens."""
        summed: Floats = (self.old_logps - self.reference_logps).sum(axis=1)
        return summed

    @property
    def kl(self) -> float:
        """KL(policy‖reference), nats per completion, estimated by k1."""
        return float(self.kl_by_completion.mean())

    def metrics(self) -> dict[str, float]:
        """Metrics of the batch, under the names of the report."""
        completions, total = self.completions, self.rewards.total
        given = total[~np.isnan(total)]
        lengths = completions.lengths
        tokens = max(int(lengths.sum()), 1)
        return {
            "reward": float(given.mean()) if len(given) else float("nan"),
            "reward_std": float(given.std(ddof=1)) if len(given) > 1 else 0.0,
            **self.rewards.metrics(),
            "objective/kl": self.kl,
            "objective/entropy": float(self.entropies.sum() / tokens),
            "sampler/gap": self.sampler_gap,
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": float(lengths.min()),
            "completions/max_length": float(lengths.max()),
            "completions/ended": float(completions.finished.mean()),
        }


@dataclass(frozen=True)
class RolloutCollector:
    """Collects rollout batches from the prompts of a run.

    Attributes:
        config: The options.
        policy: The base model, its adapter layout, and the weights at which policy and reference
            start.
        reward_adapter: The reward model, if it is an adapter on the policy's base; else None.
        prompts: Training prompts.
        shapes: Shapes of the microbatches.
        memory: The memory limit.
        rewards: Rewards completions.
        demonstrations: Demonstrations that PPO-ptx trains on too; else empty.
    """

    config: OnPolicyConfig
    policy: Policy
    reward_adapter: AdapterWeights | None
    prompts: Sequence[Prompt]
    shapes: Sequence[AnyShape]
    memory: MemoryLimit
    rewards: Rewards
    demonstrations: Sequence[TokenizedGroup] = ()

    @property
    def prompts_per_batch(self) -> int:
        """Prompts per rollout batch."""
        config = self.config
        size = config.batch_size or DEFAULT_BATCH_SIZE
        return size * config.accumulation * config.minibatches

    def collect(
        self,
        weights: AdapterWeights,
        start: int,
        step: int,
        raise_if_interrupted: Callable[[], None],
        *,
        dynamic_sampling: bool,
    ) -> RolloutBatch:
        """Sample, reward and score one rollout batch.

        Args:
            weights: The policy.
            start: Number of prompts drawn in earlier steps: the position in the data.
            step: The index of the batch, from 0; part of the random seed.
            raise_if_interrupted: Called between tokens and stages; may raise to stop early.
            dynamic_sampling: Replace prompts whose completions all have the same reward.

        Raises:
            TrainingError: A reward failed, or the sampler's policy is not the trainer's.
        """
        sampled = self.sample_and_reward(
            weights,
            self.stream(start),
            step,
            raise_if_interrupted,
            dynamic_sampling=dynamic_sampling,
        )
        raise_if_interrupted()
        batch = self.add_logprobs(weights, *sampled)
        raise_if_interrupted()
        return batch

    def stream(self, start: int) -> Iterator[Prompt]:
        """Yield prompts forever from position `start`, reshuffled for every epoch."""
        epoch, skip = divmod(start, len(self.prompts))
        while True:
            order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.prompts))
            for index in order[skip:]:
                yield self.prompts[index]
            epoch, skip = epoch + 1, 0

    def sample(
        self,
        weights: AdapterWeights,
        prompts: Sequence[Prompt],
        seed: tuple[int, ...],
        on_token: Callable[[], None] | None = None,
        *,
        group_size: int | None = None,
    ) -> Completions:
        """Sample completions; the same seed gives the same completions."""
        config = self.config
        entropy = np.random.SeedSequence((config.seed, *seed))
        with self.memory.suspended():
            return sample_completions(
                self.policy.model,
                weights,
                prompts,
                group_size=group_size or config.group_size,
                max_tokens=config.max_completion_length,
                temperature=config.temperature,
                seed=int(entropy.generate_state(1, np.uint64)[0]),
                on_token=on_token,
            )

    def sample_and_reward(
        self,
        weights: AdapterWeights,
        stream: Iterator[Prompt],
        step: int,
        raise_if_interrupted: Callable[[], None],
        *,
        dynamic_sampling: bool,
    ) -> tuple[Completions, RewardTable, int]:
        """The completions of a rollout batch, their rewards, and the number of prompts drawn.

        Under dynamic sampling, prompts whose completions all have the same reward are replaced.

        Source: Yu et al. 2025 (DAPO), section 3.2.
        """
        wanted, drawn = self.prompts_per_batch, 0
        kept: list[Completions] = []
        kept_values: list[npt.NDArray[np.float64]] = []
        for attempt in range(MAX_DYNAMIC_ROUNDS if dynamic_sampling else 1):
            missing = wanted - sum(len(part.groups) for part in kept)
            prompts = list(islice(stream, missing))
            completions = self.sample(weights, prompts, (1, step, attempt), raise_if_interrupted)
            rewards = self.rewards(completions)
            drawn += missing
            if not dynamic_sampling:
                break
            table = rewards.total.reshape(-1, completions.group_size)
            varied = [i for i in range(len(table)) if zero_variance_share(table[i : i + 1]) < 1]
            if varied:
                kept.append(completions.select(varied))
                kept_values.append(rewards.values[completions.rows(varied)])
            if len(varied) == missing:
                break
        if kept:
            values = np.concatenate(kept_values)
            rewards = combine(rewards.names, values, rewards.weights.tolist())
            completions = Completions.concatenate(kept)
        return completions, rewards, drawn

    def add_logprobs(
        self,
        weights: AdapterWeights,
        completions: Completions,
        rewards: RewardTable,
        prompts_drawn: int,
    ) -> RolloutBatch:
        """Compute the log-probs under policy and reference by teacher forcing, and make the batch.

        Completions without a reward are masked out of the loss.

        Raises:
            TrainingError: The sampler's log-probs are those of a different policy.
        """
        old, entropies = evaluate_tokens(self._entropies, weights, completions, self.shapes)
        reference = self.token_logprobs(self.policy.start, completions)
        mask = completions.mask
        difference = np.where(mask, old - completions.sampler_logps, 0.0)
        gap = float(np.abs(difference).sum() / max(int(mask.sum()), 1))
        if gap > REFUSE_ABOVE:
            raise TrainingError(
                f"the sampler's log-probs differ from the trainer's by {gap:.2f} nats per token "
                f"(limit {REFUSE_ABOVE}), so this model can't be trained on its own completions; "
                "please report it, with the model's name"
            )
        correction = np.ones_like(old)
        if gap > CORRECT_ABOVE:
            cap = self.config.importance_cap
            correction = np.minimum(np.exp(np.minimum(difference, 20.0)), cap).astype(np.float32)
        loss_mask = mask.astype(np.float32)
        loss_mask[np.isnan(rewards.total)] = 0.0
        return RolloutBatch(
            completions=completions,
            rewards=rewards,
            old_logps=old,
            reference_logps=reference,
            entropies=entropies,
            correction=correction,
            advantages=np.zeros_like(old),
            loss_mask=loss_mask,
            sampler_gap=gap,
            prompts_drawn=prompts_drawn,
        )

    def token_logprobs(self, weights: AdapterWeights, completions: Completions) -> Floats:
        """(N, C) nats: log-probs of the completions' tokens."""
        (logps,) = evaluate_tokens(self._logprobs, weights, completions, self.shapes)
        return logps

    def reference_rollouts(
        self, completions: int
    ) -> Iterator[tuple[Completions, npt.NDArray[np.float64]]]:
        """At least this many completions sampled from the reference, in parts, with rewards."""
        size, per_batch = self.config.group_size, self.prompts_per_batch
        wanted = -(-completions // size)
        stream = self.stream(0)
        for part in range(-(-wanted // per_batch)):
            prompts = list(islice(stream, min(per_batch, wanted - part * per_batch)))
            sampled = self.sample(self.policy.start, prompts, (0, part))
            yield sampled, self.rewards(sampled).total

    @cached_property
    def _logprobs(self) -> Callable[..., Any]:
        return make_logprob_scorer(self.policy.model)

    @cached_property
    def _entropies(self) -> Callable[..., Any]:
        run = partial(token_logprobs_and_entropies, entropy_gradient=False)
        return compile_forward(self.policy.model, run)
