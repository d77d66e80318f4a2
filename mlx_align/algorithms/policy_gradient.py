"""Parts common to the policy-gradient algorithms: minibatches, microbatches, loss and metrics.

Advantages, returns and denominators are those of the whole rollout batch or minibatch, so they
don't depend on the split into microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_align.algorithms.base import MetricSums
from mlx_align.algorithms.update import CollatedMicrobatch, OptimizerStep
from mlx_align.config import OnPolicyConfig
from mlx_align.data.batching import Microbatch, epoch_order
from mlx_align.data.buckets import AnyShape
from mlx_align.losses.policy import PolicyMethod, PolicyTotals, policy_loss, policy_totals
from mlx_align.models.loading import LanguageModel
from mlx_align.models.weights import AdapterWeights
from mlx_align.rollout.collector import RolloutBatch
from mlx_align.rollout.sampler import Completions
from mlx_align.tracking.diagnostics import STOP_EPOCHS_ABOVE_KL
from mlx_align.types import PolicyBatch

Array = npt.NDArray[Any]

# Metrics of `policy_loss` -> their names in reports.
REPORTED = {
    "ratio": "policy/ratio",
    "approx_kl": "policy/approx_kl",
    "clip_ratio/region_mean": "policy/clip_ratio",
    "clip_ratio/low_mean": "policy/clip_ratio_low",
    "clip_ratio/high_mean": "policy/clip_ratio_high",
}


# --- minibatches ---


def minibatch_epochs(prompts: int, config: OnPolicyConfig, step: int) -> Iterator[list[list[int]]]:
    """Yield the minibatches of every epoch over a rollout batch, as lists of prompt indices.

    A minibatch is one optimizer update. Its prompts depend only on (seed, step, epoch).

    Args:
        prompts: Prompts in the rollout batch.
        config: The options.
        step: The index of the rollout batch.
    """
    for epoch in range(config.update_epochs):
        order = np.random.default_rng((config.seed, step, epoch)).permutation(prompts)
        parts = np.array_split(order, min(config.minibatches, prompts))
        yield [sorted(int(index) for index in part) for part in parts]


def prompts_with_signal(values: Array, group_size: int) -> set[int]:
    """The prompts that have a nonzero value at any token, given values (N, C)."""
    by_prompt = values.reshape(len(values) // group_size, -1)
    return {index for index, row in enumerate(by_prompt) if np.any(row)}


def split_microbatches(
    completions: Completions,
    prompts: Sequence[int],
    shapes: Sequence[AnyShape],
    collate: Callable[[Microbatch], Any],
) -> list[CollatedMicrobatch]:
    """The microbatches of an update on these prompts.

    Args:
        completions: The completions of the rollout batch.
        prompts: Indices of the prompts to train on.
        shapes: Shapes of microbatches.
        collate: Makes the arrays of a microbatch.
    """
    groups = [completions.groups[index] for index in prompts]
    found = []
    for part in epoch_order(groups, shapes, seed=None) if groups else []:
        micro = Microbatch(tuple(prompts[index] for index in part.indices), part.shape)
        found.append(
            CollatedMicrobatch(collate(micro), micro.shape, partial(_sources, completions, micro))
        )
    return found


def _sources(completions: Completions, micro: Microbatch) -> list[str]:
    return [completions.groups[index].source for index in micro.indices]


# --- the loss ---


class PolicyDenominators(NamedTuple):
    """The denominators and coefficients of an update, scalars."""

    policy: PolicyTotals
    kl_coef: mx.array
    entropy_coef: mx.array


class PolicyObjective:
    """The policy-gradient loss of one method.

    Args:
        model: The base model.
        method: The method.
        config: The options.
        kl_coef: Weight of the KL from the reference in the loss; 0 leaves it out.
        entropy_coef: Weight of the entropy bonus.
        with_entropy: Whether the loss needs the entropies of the current policy.
    """

    def __init__(
        self,
        model: LanguageModel,
        method: PolicyMethod,
        config: OnPolicyConfig,
        *,
        kl_coef: float = 0.0,
        entropy_coef: float = 0.0,
        with_entropy: bool = False,
    ) -> None:
        self._model, self._method, self._config = model, method, config
        self._kl_coef, self._entropy_coef = kl_coef, entropy_coef
        self._with_entropy = with_entropy

    def denominators(self, batch: RolloutBatch, minibatch: Sequence[int]) -> PolicyDenominators:
        """The denominators of an update on a minibatch, including prompts without a signal."""
        rows = batch.completions.rows(minibatch)
        totals = policy_totals(
            [mx.array(batch.loss_mask[rows])],
            self._method,
            self._config.max_completion_length,
            [mx.array(batch.entropies[rows])],
        )
        return PolicyDenominators(totals, mx.array(self._kl_coef), mx.array(self._entropy_coef))

    def loss(
        self, weights: AdapterWeights, batch: PolicyBatch, denominators: PolicyDenominators
    ) -> tuple[mx.array, MetricSums]:
        """The loss contribution of a microbatch, and its metric sums."""
        grad_checkpoint = bool(self._config.grad_checkpoint)
        sample = batch.sample
        if self._with_entropy:
            logps, entropies = self._model.token_logprobs_and_entropies(
                weights, batch.groups, grad_checkpoint=grad_checkpoint
            )
            sample = sample._replace(logps=logps, entropies=entropies)
        else:
            logps = self._model.token_logprobs(
                weights, batch.groups, grad_checkpoint=grad_checkpoint
            )
            sample = sample._replace(logps=logps)
        return policy_loss(
            self._method,
            sample,
            denominators.policy,
            kl_coef=denominators.kl_coef if self._kl_coef > 0 else 0.0,
            entropy_coef=denominators.entropy_coef if self._with_entropy else 0.0,
        )


# --- metrics ---


class UpdateMetrics:
    """Metrics over the updates of one rollout batch, as means over tokens.

    Attributes:
        updates: Updates made.
        loss: The sum of their losses.
        grad_norm: The sum of their gradient norms.
        skipped: One reason per skipped update, whose loss or gradient was not finite.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self.updates = 0
        self.loss = self.grad_norm = 0.0
        self.skipped: list[str] = []

    def add(self, update: OptimizerStep) -> None:
        """Add an update."""
        if update.skipped is not None:
            self.skipped.append(update.skipped)
            return
        self.updates += 1
        self.loss += update.loss
        self.grad_norm += update.norm
        self._last = update.sums
        for name, value in update.sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def means(self, loss: str, grad_norm: str) -> dict[str, float]:
        """Mean loss and gradient norm, under these names; empty if all updates were skipped."""
        if self.skipped and not self.updates:
            return {}
        count = max(self.updates, 1)
        return {loss: self.loss / count, grad_norm: self.grad_norm / count}

    def last(self, name: str) -> float | None:
        """A metric of the last update; None without one."""
        weight = self._last.get("weight", 0.0)
        return self._last[name] / weight if weight and name in self._last else None

    def named(self, names: Mapping[str, str], weight_name: str = "weight") -> dict[str, float]:
        """Means of the metrics that exist, under the names of the report."""
        weight = self._sums.get(weight_name, 0.0)
        return {
            shown: self._sums[name] / weight
            for name, shown in names.items()
            if name in self._sums and weight
        }

    def policy(self) -> dict[str, float]:
        """The metrics of the policy's updates."""
        return {
            **self.means("loss", "grad_norm"),
            **self.named(REPORTED),
            **self.named({"ptx/nll": "ptx/nll"}, "ptx/tokens"),
        }

    def exceeds_kl(self) -> bool:
        """Whether the policy has moved too far from the one that sampled to train another epoch."""
        kl = self.last("approx_kl")
        return kl is not None and kl > STOP_EPOCHS_ABOVE_KL
