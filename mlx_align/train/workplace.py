"""What on-policy learners work with: the roles, the prompts, and what a rollout batch is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_align.config import DEFAULT_BATCH_SIZE, OnPolicyConfig
from mlx_align.data.shapes import AnyShape
from mlx_align.errors import TrainingError
from mlx_align.inference.score import compiled_scorer, make_scorer
from mlx_align.models.logps import batch_token_entropies
from mlx_align.models.roles import Tree
from mlx_align.rollout.advantages import zero_variance_share
from mlx_align.rollout.experience import (
    Floats,
    Prompt,
    Rollouts,
    by_role,
    join,
    roll_out,
    rows_of,
    select,
)
from mlx_align.rollout.rewards import RewardTable, combine
from mlx_align.train.judging import Judge
from mlx_align.train.run_ahead import RunAhead
from mlx_align.train.setup import Policy
from mlx_align.types import TokenizedGroup

# Mean difference of a token's log-prob between sampler and learner, nats: above the first tokens
# are weighed by their probability ratio, above the second what was sampled is another policy's.
GAP_CORRECTED, GAP_REFUSED = 0.02, 0.5
# Rollout batches that dynamic sampling draws at most in the place of one.
DYNAMIC_TRIES = 4


@dataclass(frozen=True)
class Experience:
    """A rollout batch, what it earned, and what the roles make of it.

    Attributes:
        rollouts: N completions.
        rewards: What they earned.
        old_logps: (N, C) nats, the policy that sampled, by teacher forcing.
        reference_logps: (N, C) nats.
        entropies: (N, C) nats, of the policy that sampled.
        correction: (N, C) importance of a token for the learner over the sampler.
        gap: Mean difference of sampler and learner, nats a token.
        dropped: Share of prompts that dynamic sampling replaced.
    """

    rollouts: Rollouts
    rewards: RewardTable
    old_logps: Floats
    reference_logps: Floats
    entropies: Floats
    correction: Floats
    gap: float
    dropped: float = 0.0

    @property
    def unrewarded(self) -> npt.NDArray[np.bool_]:
        """(N,) completions without a reward: they teach nothing."""
        missing: npt.NDArray[np.bool_] = np.isnan(self.rewards.total)
        return missing

    @property
    def kl_by_completion(self) -> Floats:
        """(N,) nats: k1 of KL(policy‖reference), summed over tokens."""
        summed: Floats = (self.old_logps - self.reference_logps).sum(axis=1)
        return summed

    @property
    def kl(self) -> float:
        """KL(policy‖reference) in nats per completion, estimated by k1."""
        return float(self.kl_by_completion.mean())

    def metrics(self) -> dict[str, float]:
        """What the batch says, under the names that reports give it."""
        rollouts, total = self.rollouts, self.rewards.total
        given = total[~np.isnan(total)]
        lengths = rollouts.lengths
        tokens = max(int(lengths.sum()), 1)
        return {
            "reward": float(given.mean()) if len(given) else float("nan"),
            "reward_std": float(given.std(ddof=1)) if len(given) > 1 else 0.0,
            **self.rewards.metrics(),
            "objective/kl": self.kl,
            "objective/entropy": float(self.entropies.sum() / tokens),
            "sampler/gap": self.gap,
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": float(lengths.min()),
            "completions/max_length": float(lengths.max()),
            "completions/ended": float(rollouts.ended.mean()),
        }


@dataclass(frozen=True)
class Workplace:
    """A run's roles and prompts.

    Attributes:
        config: The options.
        policy: Base, layout, and the tree where policy and reference start.
        reward: The reward model as a tree on the same base; None where there is no such one.
        prompts: To train on.
        shapes: Of microbatches.
        memory: Bounds how far mlx runs ahead.
        judge: What completions earn.
        demonstrations: To learn from beside the prompts; as a rule none.
    """

    config: OnPolicyConfig
    policy: Policy
    reward: Tree | None
    prompts: Sequence[Prompt]
    shapes: Sequence[AnyShape]
    memory: RunAhead
    judge: Judge
    demonstrations: Sequence[TokenizedGroup] = ()

    @property
    def prompts_per_batch(self) -> int:
        """Prompts of a rollout batch."""
        config = self.config
        size = config.batch_size or DEFAULT_BATCH_SIZE
        return size * config.grad_accumulation_steps * config.minibatches

    def logps(self, tree: Tree, rollouts: Rollouts) -> Floats:
        """(N, C) nats, of the role `tree`."""
        (logps,) = by_role(self._logps, tree, rollouts, self.shapes)
        return logps

    @cached_property
    def _logps(self) -> Callable[..., Any]:
        return make_scorer(self.policy.model)

    @cached_property
    def _entropies(self) -> Callable[..., Any]:
        run = partial(batch_token_entropies, entropy_gradient=False)
        return compiled_scorer(self.policy.model, run)

    def stream(self, start: int) -> Iterator[Prompt]:
        """The prompts without end, shuffled anew for every pass, from the `start`-th on."""
        epoch, skip = divmod(start, len(self.prompts))
        while True:
            order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.prompts))
            for index in order[skip:]:
                yield self.prompts[index]
            epoch, skip = epoch + 1, 0

    def sample(
        self,
        tree: Tree,
        prompts: Sequence[Prompt],
        seed: tuple[int, ...],
        on_token: Callable[[], None] | None = None,
        *,
        group_size: int | None = None,
    ) -> Rollouts:
        """Completions by the role `tree`; the same for the same seed."""
        config = self.config
        entropy = np.random.SeedSequence((config.seed, *seed))
        return roll_out(
            self.policy.model,
            tree,
            prompts,
            group_size=group_size or config.group_size,
            max_tokens=config.max_completion_length,
            temperature=config.temperature,
            seed=int(entropy.generate_state(1, np.uint64)[0]),
            on_token=on_token,
        )

    def collect(
        self,
        tree: Tree,
        stream: Iterator[Prompt],
        step: int,
        on_token: Callable[[], None],
        *,
        dynamic: bool,
    ) -> tuple[Rollouts, RewardTable, int]:
        """A rollout batch, its rewards, and how many prompts were taken for it.

        With `dynamic`, prompts whose completions all earn the same are replaced by others.

        Source: Yu et al. 2025 (DAPO), section 3.2.
        """
        wanted, taken = self.prompts_per_batch, 0
        kept: list[Rollouts] = []
        earned: list[npt.NDArray[np.float64]] = []
        for attempt in range(DYNAMIC_TRIES if dynamic else 1):
            missing = wanted - sum(len(part.groups) for part in kept)
            drawn = self.sample(tree, list(islice(stream, missing)), (1, step, attempt), on_token)
            rewards = self.judge(drawn)
            taken += missing
            if not dynamic:
                break
            size = drawn.group_size
            table = rewards.total.reshape(-1, size)
            useful = [i for i in range(len(table)) if zero_variance_share(table[i : i + 1]) < 1]
            if useful:
                kept.append(select(drawn, useful))
                earned.append(rewards.values[rows_of(useful, size)])
            if len(useful) == missing:
                break
        if kept:
            rewards = combine(rewards.names, np.concatenate(earned), rewards.weights.tolist())
        return join(kept) if kept else drawn, rewards, taken

    def experience(
        self, tree: Tree, rollouts: Rollouts, rewards: RewardTable, taken: int
    ) -> Experience:
        """What policy and reference make of a rollout batch.

        Raises:
            TrainingError: The sampler drew from another policy than the learner's.
        """
        old, entropies = by_role(self._entropies, tree, rollouts, self.shapes)
        reference = self.logps(self.policy.start, rollouts)
        mask = rollouts.mask
        apart = np.where(mask, old - rollouts.sampler_logps, 0.0)
        gap = float(np.abs(apart).sum() / max(int(mask.sum()), 1))
        if gap > GAP_REFUSED:
            raise TrainingError(
                f"the sampler's log-probs differ from the learner's by {gap:.2f} nats a token, so "
                "what was sampled is another policy's: this model can't be trained on its own "
                "samples; please report it, with the model's name"
            )
        correction = np.ones_like(old)
        if gap > GAP_CORRECTED:
            cap = self.config.importance_cap
            correction = np.minimum(np.exp(np.minimum(apart, 20.0)), cap).astype(np.float32)
        return Experience(
            rollouts,
            rewards,
            old,
            reference,
            entropies,
            correction,
            gap,
            dropped=1 - len(rollouts.groups) / taken,
        )

    def look_at_reference(self, completions: int) -> npt.NDArray[np.float64]:
        """Rewards of so many completions of the reference, or a few more."""
        size, per_batch = self.config.group_size, self.prompts_per_batch
        wanted = -(-completions // size)
        stream, found = self.stream(0), []
        for part in range(-(-wanted // per_batch)):
            prompts = list(islice(stream, min(per_batch, wanted - part * per_batch)))
            found.append(self.judge(self.sample(self.policy.start, prompts, (0, part))).total)
        return np.concatenate(found)
