"""What the critic learns: with an adapter of its own, or on the policy's trunk."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_align.config import PpoConfig
from mlx_align.data.batching import Microbatch, collate_groups
from mlx_align.data.shapes import Shape
from mlx_align.losses.masking import masked_sum
from mlx_align.losses.policy import PolicyMethod, policy_loss
from mlx_align.losses.value import value_loss
from mlx_align.models.loading import LanguageModel
from mlx_align.models.roles import Tree
from mlx_align.rollout.experience import Rollouts, laid_out, rows_of
from mlx_align.train.lessons import Array, PolicyDenominators
from mlx_align.train.shares import role_logps_and_values, role_values
from mlx_align.train.update import Loss, Sums
from mlx_align.types import PolicyBatch, ValueBatch


class ValueTotals(NamedTuple):
    """What the critic's microbatches of an update divide by."""

    tokens: mx.array


class SharedBatch(NamedTuple):
    """A microbatch of actor and critic on one trunk."""

    policy: PolicyBatch
    value: ValueBatch


class SharedTotals(NamedTuple):
    """What the microbatches of an update of both share."""

    policy: PolicyDenominators
    value: ValueTotals
    acts: mx.array  # 1, or 0 while only the critic is trained


def value_batch(
    rollouts: Rollouts, values: Array, returns: Array, mask: Array, micro: Microbatch
) -> ValueBatch:
    """The arrays of a microbatch of the critic, from those of the rollout batch (N, C)."""
    size, shape = rollouts.group_size, micro.shape
    assert isinstance(shape, Shape)
    rows = rows_of(micro.indices, size)
    old, wanted, counted = (laid_out(part, rows, shape, size) for part in (values, returns, mask))
    groups = collate_groups([rollouts.groups[i] for i in micro.indices], shape)
    return ValueBatch(groups, old, wanted, counted)


def value_share(model: LanguageModel, config: PpoConfig) -> Loss:
    """(critic's tree, ValueBatch, ValueTotals) -> a microbatch's share of the value loss.

    That is the mean over the update's tokens of ½·max((V − R)², (V_clip − R)²).
    """

    def share(tree: Tree, batch: ValueBatch, totals: ValueTotals) -> tuple[mx.array, Sums]:
        values = role_values(model, tree, batch.groups, grad_checkpoint=config.grad_checkpoint)
        loss = _value_sum(values, batch, config) / mx.maximum(totals.tokens, 1.0)
        return loss, {"weight": batch.mask.sum()}

    return share


def shared_share(model: LanguageModel, method: PolicyMethod, config: PpoConfig) -> Loss:
    """(tree of both, SharedBatch, SharedTotals) -> a microbatch's share of PPO's joint loss.

    Policy loss + value_coef · value loss. While only the critic is trained, the policy loss is
    left out and the head alone learns, on the trunk as it is.

    Source: Schulman et al. 2017 (PPO), eq. 9.
    """

    def share(tree: Tree, batch: SharedBatch, totals: SharedTotals) -> tuple[mx.array, Sums]:
        logps, values = role_logps_and_values(
            model,
            tree,
            batch.policy.groups,
            totals.acts,
            grad_checkpoint=config.grad_checkpoint,
        )
        sample = batch.policy.sample._replace(logps=logps)
        policy, sums = policy_loss(method, sample, totals.policy.policy, kl_coef=0.0)
        value = _value_sum(values, batch.value, config)
        loss = totals.acts * policy
        loss = loss + config.value_coef * value / mx.maximum(totals.value.tokens, 1.0)
        return loss, {**sums, "value_loss": mx.stop_gradient(value)}

    return share


def _value_sum(values: mx.array, batch: ValueBatch, config: PpoConfig) -> mx.array:
    # The clip is in units of standardised rewards.
    clip = config.value_clip if config.reward_rollouts else None
    losses = value_loss(values, batch.old_values, batch.returns, batch.mask, clip=clip)
    return masked_sum(losses, batch.mask, axis=None)
