"""What a rollout batch teaches, cut into updates, microbatches and arrays.

Advantages, returns and denominators are those of the whole rollout batch or update, whatever
microbatches they are learned from in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_align.config import OnPolicyConfig
from mlx_align.data.batching import Microbatch, collate_groups, epoch_order
from mlx_align.data.shapes import AnyShape, Shape
from mlx_align.losses.policy import PolicyMethod, PolicyTotals, policy_loss, policy_totals
from mlx_align.models.loading import LanguageModel
from mlx_align.models.roles import Tree
from mlx_align.rollout.experience import Rollouts, laid_out, rows_of
from mlx_align.thresholds import KL_ENDS_EPOCHS
from mlx_align.train.shares import role_entropies, role_logps
from mlx_align.train.update import Loss, Ready, Sums, Updated
from mlx_align.types import PolicyBatch, PolicySample

Array = npt.NDArray[Any]

# What policy_loss calls its metrics -> what reports call them.
REPORTED = {
    "ratio": "policy/ratio",
    "approx_kl": "policy/approx_kl",
    "clip_ratio/region_mean": "policy/clip_ratio",
    "clip_ratio/low_mean": "policy/clip_ratio_low",
    "clip_ratio/high_mean": "policy/clip_ratio_high",
}


@dataclass(frozen=True)
class Lesson:
    """A rollout batch with what is to be learned from it, (N, C) each.

    Attributes:
        rollouts: The completions.
        old_logps: Nats, the policy that sampled, as the learner computes them.
        reference_logps: Nats.
        advantages: Of each token.
        mask: float32, 1 where a token is learned from.
        correction: Importance of a token for the learner over the sampler.
        entropies: Nats, of the policy that sampled, at each token.
    """

    rollouts: Rollouts
    old_logps: Array
    reference_logps: Array
    advantages: Array
    mask: Array
    correction: Array
    entropies: Array


class PolicyDenominators(NamedTuple):
    """What the policy's microbatches of an update share: scalars."""

    policy: PolicyTotals
    kl_coef: mx.array
    entropy_coef: mx.array


def passes(groups: int, config: OnPolicyConfig, step: int) -> Iterator[list[list[int]]]:
    """For each pass over a rollout batch of so many prompts, its updates, each some of them.

    Which prompts are learned from together is a function of (seed, step, pass) alone.
    """
    for epoch in range(config.update_epochs):
        order = np.random.default_rng((config.seed, step, epoch)).permutation(groups)
        parts = np.array_split(order, min(config.minibatches, groups))
        yield [sorted(int(index) for index in part) for part in parts]


def teaching_prompts(values: Array, size: int) -> set[int]:
    """Prompts of which a token has a number other than 0, of (N, C) and so many completions."""
    by_prompt = values.reshape(len(values) // size, -1)
    return {index for index, row in enumerate(by_prompt) if np.any(row)}


def ready(
    rollouts: Rollouts,
    chosen: Sequence[int],
    shapes: Sequence[AnyShape],
    arrays: Callable[[Microbatch], Any],
) -> list[Ready]:
    """Some prompts of a rollout batch as the microbatches of an update."""
    groups = [rollouts.groups[index] for index in chosen]
    found = []
    for part in epoch_order(groups, shapes, seed=None) if groups else []:
        micro = Microbatch(tuple(chosen[index] for index in part.indices), part.shape)
        found.append(Ready(arrays(micro), micro.shape, partial(_sources, rollouts, micro)))
    return found


def _sources(rollouts: Rollouts, micro: Microbatch) -> list[str]:
    return [rollouts.groups[index].source for index in micro.indices]


def policy_batch(lesson: Lesson, micro: Microbatch) -> PolicyBatch:
    """The arrays of a microbatch of the policy."""
    size, shape = lesson.rollouts.group_size, micro.shape
    assert isinstance(shape, Shape)
    rows = rows_of(micro.indices, size)
    lay = partial(laid_out, rows=rows, shape=shape, size=size)
    old = lay(lesson.old_logps)
    return PolicyBatch(
        groups=collate_groups([lesson.rollouts.groups[i] for i in micro.indices], shape),
        sample=PolicySample(
            logps=old,
            old_logps=old,
            reference_logps=lay(lesson.reference_logps),
            advantages=lay(lesson.advantages),
            mask=lay(lesson.mask),
            correction=lay(lesson.correction),
        ),
    )


def policy_denominators(
    lesson: Lesson,
    chosen: Sequence[int],
    method: PolicyMethod,
    config: OnPolicyConfig,
    *,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
) -> PolicyDenominators:
    """The denominators of an update by these prompts, whether they all are run or not."""
    rows = rows_of(chosen, lesson.rollouts.group_size)
    totals = policy_totals(
        [mx.array(lesson.mask[rows])],
        method,
        config.max_completion_length,
        [mx.array(lesson.entropies[rows])],
    )
    return PolicyDenominators(totals, mx.array(kl_coef), mx.array(entropy_coef))


def policy_share(
    model: LanguageModel,
    method: PolicyMethod,
    *,
    grad_checkpoint: bool,
    in_loss: bool = False,
    entropies: bool = False,
) -> Loss:
    """(tree, PolicyBatch, PolicyDenominators) -> a microbatch's share of the policy's loss.

    Args:
        model: The base.
        method: The loss.
        grad_checkpoint: Recompute activations in the backward pass.
        in_loss: Whether the KL from the reference has a weight in the loss.
        entropies: Whether the entropy is part of the loss.
    """

    def share(tree: Tree, batch: PolicyBatch, totals: PolicyDenominators) -> tuple[mx.array, Sums]:
        sample = batch.sample
        if entropies:
            logps, entropy = role_entropies(
                model, tree, batch.groups, grad_checkpoint=grad_checkpoint
            )
            sample = sample._replace(logps=logps, entropies=entropy)
        else:
            logps = role_logps(model, tree, batch.groups, grad_checkpoint=grad_checkpoint)
            sample = sample._replace(logps=logps)
        return policy_loss(
            method,
            sample,
            totals.policy,
            kl_coef=totals.kl_coef if in_loss else 0.0,
            entropy_coef=totals.entropy_coef if entropies else 0.0,
        )

    return share


class Tally:
    """Means over the tokens of several updates, from their sums of metrics.

    Attributes:
        updates: How many were made.
        skipped: Why others were not: a loss or gradient that is not finite.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self.updates = 0
        self.loss = self.norm = 0.0
        self.skipped: list[str] = []

    def add(self, done: Updated) -> None:
        """Another update."""
        if done.skipped is not None:
            self.skipped.append(done.skipped)
            return
        self.updates += 1
        self.loss += done.loss
        self.norm += done.norm
        self._last = done.sums
        for name, value in done.sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def means(self, loss: str, norm: str) -> dict[str, float]:
        """Mean loss and norm under these names; nothing where all updates were skipped."""
        if self.skipped and not self.updates:
            return {}
        count = max(self.updates, 1)
        return {loss: self.loss / count, norm: self.norm / count}

    def last(self, name: str) -> float | None:
        """A metric of the last update alone; None if there was none."""
        weight = self._last.get("weight", 0.0)
        return self._last[name] / weight if weight and name in self._last else None

    def row(self, names: Mapping[str, str], weight_name: str = "weight") -> dict[str, float]:
        """The metrics there are, under the names that reports give them."""
        weight = self._sums.get(weight_name, 0.0)
        return {
            shown: self._sums[name] / weight
            for name, shown in names.items()
            if name in self._sums and weight
        }


def policy_metrics(tally: Tally) -> dict[str, float]:
    """The metrics of a rollout batch's updates of the policy, as reports name them."""
    return {
        **tally.means("loss", "grad_norm"),
        **tally.row(REPORTED),
        **tally.row({"ptx/nll": "ptx/nll"}, "ptx/tokens"),
    }


def too_far(tally: Tally) -> bool:
    """Whether the policy has moved so far from where it sampled that no further pass is made."""
    moved = tally.last("approx_kl")
    return moved is not None and moved > KL_ENDS_EPOCHS
