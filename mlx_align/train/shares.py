"""What the offline objectives have in common: log-probs under a role, sums of metrics, counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from mlx_align.data.batching import Microbatch
from mlx_align.losses.masking import weighted_sum
from mlx_align.models.heads import VALUE_NAME, completion_scores, token_values
from mlx_align.models.loading import LanguageModel
from mlx_align.models.logps import (
    batch_token_entropies,
    batch_token_logps,
    batch_token_statistics,
    token_logps,
)
from mlx_align.models.roles import Tree
from mlx_align.models.trunk import completion_hidden
from mlx_align.train.update import Sums
from mlx_align.types import GroupBatch, TokenizedGroup


def role_logps(
    model: LanguageModel, tree: Tree, batch: GroupBatch, *, grad_checkpoint: bool
) -> mx.array:
    """Log-probs (N, C) of the completions' tokens under the role `tree`, with gradient, nats."""
    with model.acting_as(tree):
        return batch_token_logps(
            model.anatomy, batch, shared=model.shared, grad_checkpoint=grad_checkpoint
        )


def role_statistics(
    model: LanguageModel, tree: Tree, batch: GroupBatch, *, grad_checkpoint: bool
) -> tuple[mx.array, mx.array]:
    """As above, and log Σ_v p_v² (N, C) at every token, without gradient."""
    with model.acting_as(tree):
        return batch_token_statistics(
            model.anatomy, batch, shared=model.shared, grad_checkpoint=grad_checkpoint
        )


def role_scores(
    model: LanguageModel, tree: Tree, batch: GroupBatch, *, grad_checkpoint: bool
) -> mx.array:
    """Scores (N, members) of the completions under the reward model `tree`, with gradient."""
    with model.acting_as(tree):
        return completion_scores(
            model.anatomy, batch, shared=model.shared, grad_checkpoint=grad_checkpoint
        )


def role_entropies(
    model: LanguageModel, tree: Tree, batch: GroupBatch, *, grad_checkpoint: bool
) -> tuple[mx.array, mx.array]:
    """Log-probs, and the entropy (N, C) of the policy at every token, nats, with gradients."""
    with model.acting_as(tree):
        return batch_token_entropies(
            model.anatomy, batch, shared=model.shared, grad_checkpoint=grad_checkpoint
        )


def role_values(
    model: LanguageModel, tree: Tree, batch: GroupBatch, *, grad_checkpoint: bool
) -> mx.array:
    """Values (N, C) of the critic `tree` before each completion token, with gradient."""
    with model.acting_as(tree):
        return token_values(
            model.anatomy, batch, shared=model.shared, grad_checkpoint=grad_checkpoint
        )


def role_logps_and_values(
    model: LanguageModel,
    tree: Tree,
    batch: GroupBatch,
    through_trunk: mx.array,
    *,
    grad_checkpoint: bool,
) -> tuple[mx.array, mx.array]:
    """Log-probs and values (N, C) of actor and critic on one trunk, from one pass through it.

    The values' gradient reaches the trunk times `through_trunk`, 0 or 1.
    """
    with model.acting_as(tree):
        hidden = completion_hidden(
            model.anatomy, batch, shared=model.shared, grad_checkpoint=grad_checkpoint
        )
        logps = token_logps(model.anatomy, hidden, batch.completion_tokens)
        held = mx.stop_gradient(hidden)
        values = model.module[VALUE_NAME](
            held + through_trunk.astype(hidden.dtype) * (hidden - held)
        )
    mask = batch.completion_mask
    return mx.where(mask, logps, 0), mx.where(mask, values, 0)


def weighted_metrics(metrics: Mapping[str, mx.array], weight: mx.array) -> Sums:
    """Sums of per-row metrics (B,) over rows that count, and the sum of their weights."""
    sums = {name: weighted_sum(mx.stop_gradient(v), weight) for name, v in metrics.items()}
    return {**sums, "weight": weight.sum()}


def size_of(
    groups: Sequence[TokenizedGroup], micro: Microbatch, completions: int | None = None
) -> tuple[int, int]:
    """Groups of a microbatch and their tokens, counting the first `completions` of each."""
    chosen = [groups[i] for i in micro.indices]
    tokens = sum(len(g.prompt) + sum(map(len, g.completions[:completions])) for g in chosen)
    return len(chosen), tokens
