"""The objective of preference pairs: from a microbatch to its share of the update's loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_align.config import DpoConfig
from mlx_align.data.batching import Microbatch, collate_pairs, scored
from mlx_align.data.formats import Reading, read_preferences
from mlx_align.data.groups import to_pairs
from mlx_align.errors import ConfigError
from mlx_align.inference.score import Scorer
from mlx_align.losses.coupled import linear_loss, loss_and_logps_gradient
from mlx_align.losses.masking import (
    ld_mask,
    pair_logps,
    shared_lengths,
    weighted_sum,
    wpo_weight,
)
from mlx_align.losses.registry import PAIRWISE_LOSSES, CombinedLoss, combine, parse_losses
from mlx_align.models.loading import LanguageModel
from mlx_align.models.roles import Tree
from mlx_align.train.loop import Objective
from mlx_align.train.setup import Policy, PreparedData
from mlx_align.train.shares import role_logps, role_statistics, size_of, weighted_metrics
from mlx_align.train.task import GroupLogps, Task
from mlx_align.train.update import Sums
from mlx_align.types import PairBatch, PairLogps, PromptGroup, TokenizedGroup


class Totals(NamedTuple):
    """Denominators of an update, known from its masks before anything is computed."""

    pairs: mx.array
    mean_chosen_length: mx.array


def pair_metrics(logps: PairLogps, beta: float) -> dict[str, mx.array]:
    """Per-pair metrics (B,) under TRL's names; rewards are implicit, β·log-ratio, in nats."""
    chosen, rejected = beta * logps.chosen_logratio, beta * logps.rejected_logratio
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(mx.float32),
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps.chosen,
        "logps/rejected": logps.rejected,
        "logps/accuracies": (logps.chosen > logps.rejected).astype(mx.float32),
        "logps/margins": logps.chosen - logps.rejected,
    }


def preference_objective(
    model: LanguageModel,
    loss: CombinedLoss,
    groups: Sequence[TokenizedGroup],
    reference: GroupLogps | None,
    scorer: Scorer,
    *,
    grad_checkpoint: bool,
    wpo: bool = False,
    ld_alpha: float | None = None,
) -> Objective:
    """The objective of pairs under `loss`.

    Args:
        model: The base, with adapters installed.
        loss: What `registry.combine` gave.
        groups: The training pairs.
        reference: Per pair and completion the reference's token log-probs; None where the loss
            needs none.
        scorer: For losses that couple the pairs of an update.
        grad_checkpoint: Recompute activations in the backward pass.
        wpo: Weigh each pair by how likely the policy would have written its completions.
        ld_alpha: What tokens past the shorter completion's length count; None for all in full.
    """

    def collate(micro: Microbatch) -> PairBatch:
        chosen = [groups[i] for i in micro.indices]
        logps = None if reference is None else [reference[i] for i in micro.indices]
        return collate_pairs(chosen, logps, micro.shape)

    def totals(batches: Sequence[PairBatch]) -> Totals:
        pairs = sum(batch.weight.sum() for batch in batches)
        chosen_tokens = sum(batch.groups.completion_mask[0::2].sum() for batch in batches)
        return Totals(mx.array(pairs), chosen_tokens / mx.array(pairs))

    def share(tree: Tree, batch: PairBatch, totals: Totals) -> tuple[mx.array, Sums]:
        token_logps = role_logps(model, tree, batch.groups, grad_checkpoint=grad_checkpoint)
        logps = _pair_logps(token_logps, batch, ld_alpha)
        values = loss(logps, totals.mean_chosen_length)
        sums = weighted_metrics(pair_metrics(logps, loss.beta or 1.0), batch.weight)
        return weighted_sum(values, batch.weight) / totals.pairs, sums

    def wpo_share(tree: Tree, batch: PairBatch, totals: Totals) -> tuple[mx.array, Sums]:
        token_logps, log_squares = role_statistics(
            model, tree, batch.groups, grad_checkpoint=grad_checkpoint
        )
        logps = _pair_logps(token_logps, batch, ld_alpha)
        rows = wpo_weight(token_logps, log_squares, batch.groups.completion_mask)
        pairs = rows[0::2] * rows[1::2]
        values = loss(logps, totals.mean_chosen_length) * pairs
        metrics = {**pair_metrics(logps, loss.beta or 1.0), "wpo/weight": pairs}
        sums = weighted_metrics(metrics, batch.weight)
        return weighted_sum(values, batch.weight) / totals.pairs, sums

    def coupled_share(tree: Tree, batch: CoupledBatch, _totals: Totals) -> tuple[mx.array, Sums]:
        pairs = batch.pairs
        token_logps = role_logps(model, tree, pairs.groups, grad_checkpoint=grad_checkpoint)
        logps = _pair_logps(token_logps, pairs, ld_alpha)
        linear = linear_loss(logps, batch.gradient)
        sums = weighted_metrics(pair_metrics(logps, loss.beta or 1.0), pairs.weight)
        # The gradient is the linear loss's, the value the true one's.
        return linear - mx.stop_gradient(linear) + batch.share, sums

    def couple(tree: Tree, batches: Sequence[PairBatch], totals: Totals) -> list[CoupledBatch]:
        logps = [_pair_logps(scorer(tree, batch.groups), batch, ld_alpha) for batch in batches]
        return _couple(loss, logps, batches, totals)

    plain = wpo_share if wpo else share
    return Objective(
        collate=collate,
        totals=totals,
        loss=coupled_share if loss.couples_batch else plain,
        prepare=couple if loss.couples_batch else None,
        size=lambda micro: size_of(groups, micro),
        sources=lambda micro: [groups[i].source for i in micro.indices],
    )


class CoupledBatch(NamedTuple):
    """A microbatch of a loss that sorts over the update, with what the update said of it."""

    pairs: PairBatch
    gradient: PairLogps  # of the update's loss by this microbatch's log-probs; 0 for fillers
    share: mx.array  # of the update's loss, scalar


def _couple(
    loss: CombinedLoss,
    logps: Sequence[PairLogps],
    batches: Sequence[PairBatch],
    totals: Totals,
) -> list[CoupledBatch]:
    """The update's loss on all its pairs at once, handed back to its microbatches."""
    weight = mx.concatenate([batch.weight for batch in batches])
    real = mx.array(np.flatnonzero(np.array(weight)))
    columns = zip(*logps, strict=True)
    every = PairLogps(*(mx.concatenate(list(column))[real] for column in columns))
    values, gradient = loss_and_logps_gradient(loss, every, totals.mean_chosen_length)

    def spread(column: mx.array) -> mx.array:
        # An explicit scatter: rows of fillers stay 0.
        return mx.zeros(weight.shape).at[real].add(column)

    values, factors = spread(values), [spread(column) for column in gradient]
    coupled, start = [], 0
    for batch in batches:
        rows = slice(start, start + len(batch.weight))
        start = rows.stop
        part = PairLogps(*(column[rows] for column in factors))
        coupled.append(CoupledBatch(batch, part, values[rows].sum() / totals.pairs))
    mx.eval(coupled)
    return coupled


def _pair_logps(token_logps: mx.array, batch: PairBatch, ld_alpha: float | None) -> PairLogps:
    mask = batch.groups.completion_mask
    weight = None if ld_alpha is None else ld_mask(mask, shared_lengths(mask), ld_alpha)
    return pair_logps(token_logps, batch.reference_logps, mask, batch.soft_label, weight)


def evaluate_pairs(
    logps: GroupLogps,
    reference: GroupLogps,
    groups: Sequence[TokenizedGroup],
    loss: CombinedLoss,
    ld_alpha: float | None = None,
) -> dict[str, float]:
    """Loss and metrics, means over pairs, from per-token log-probs of policy and reference.

    Without WPO's weights, which need whole distributions.
    """
    masks = [[scored(group, k) for k in range(2)] for group in groups]
    weights = [_token_weights(pair, ld_alpha) for pair in masks]

    def total(k: int) -> np.ndarray:
        rows = zip(logps, weights, strict=True)
        return np.array([(w[k] * p[k]).sum(dtype=np.float64) for p, w in rows], np.float32)

    def logratio(k: int) -> np.ndarray:
        rows = zip(logps, reference, weights, strict=True)
        sums = [(w[k] * (p[k] - r[k])).sum(dtype=np.float64) for p, r, w in rows]
        return np.array(sums, np.float32)

    def length(k: int) -> np.ndarray:
        return np.array([pair[k].sum() for pair in masks], np.float32)

    soft = [1.0 if group.soft_label is None else group.soft_label for group in groups]
    pairs = PairLogps(
        chosen=mx.array(total(0)),
        rejected=mx.array(total(1)),
        chosen_logratio=mx.array(logratio(0)),
        rejected_logratio=mx.array(logratio(1)),
        chosen_length=mx.array(length(0)),
        rejected_length=mx.array(length(1)),
        soft_label=mx.array(np.array(soft, np.float32)),
    )
    values = {"loss": loss(pairs, pairs.chosen_length.mean())}
    values.update(pair_metrics(pairs, loss.beta or 1.0))
    return {name: float(np.array(value).mean()) for name, value in values.items()}


def _token_weights(masks: Sequence[np.ndarray], ld_alpha: float | None) -> list[np.ndarray]:
    """What each token of a pair's completions counts in their sums (see `masking.ld_mask`)."""
    if ld_alpha is None:
        return [mask.astype(np.float32) for mask in masks]
    shared = min(mask.sum() for mask in masks)
    return [mask * np.where(mask.cumsum() <= shared, 1.0, ld_alpha) for mask in masks]


def read_pairs(data: str, split: str, format: str | None) -> tuple[list[PromptGroup], Reading]:
    """Preference data as pairs; ranked lists become every strictly ordered pair."""
    groups, reading = read_preferences(data, split, format)
    return to_pairs(groups), reading


def dpo_task(config: DpoConfig) -> Task:
    """What `mlx-align dpo` trains and measures.

    Raises:
        ConfigError: The loss is unknown, or an option has no effect on it.
    """
    loss = combine(parse_losses(config.loss), config.loss_options())
    _refuse_without_effect(config, loss)

    def check(data: PreparedData) -> list[str]:
        if not loss.soft_labels and any(g.soft_label is not None for g in data.train):
            raise ConfigError(f"--loss {config.loss}: takes no soft labels, which the data has")
        return [_DISCOPOP_REMARK] if "discopop" in dict(loss.parts) else []

    def objective(
        policy: Policy,
        groups: Sequence[TokenizedGroup],
        reference: GroupLogps | None,
        scorer: Scorer,
    ) -> Objective:
        return preference_objective(
            policy.model,
            loss,
            groups,
            reference,
            scorer,
            grad_checkpoint=config.grad_checkpoint,
            wpo=config.wpo,
            ld_alpha=config.ld_alpha,
        )

    def measure(
        logps: GroupLogps,
        reference: GroupLogps,
        groups: Sequence[TokenizedGroup],
    ) -> dict[str, float]:
        return evaluate_pairs(logps, reference, groups, loss, config.ld_alpha)

    return Task(
        command="dpo",
        title=f"DPO ({config.loss})" if config.loss != "sigmoid" else "DPO",
        read=read_pairs,
        check=check,
        needs_reference=loss.needs_reference,
        objective=objective,
        measure=measure,
    )


# Measured: from a fresh start on the starter model it lowered the reward margin.
_DISCOPOP_REMARK = (
    "! discopop, as published, is not monotone: where policy and reference still agree, as at the "
    "start of every run, its slope pushes margins down. Watch the reward margin."
)


def _refuse_without_effect(config: DpoConfig, loss: CombinedLoss) -> None:
    """Refuse WPO and LD-DPO where they would not be what their papers define."""
    for name, _ in loss.parts:
        part = PAIRWISE_LOSSES[name]
        if config.wpo and part.couples_batch:
            raise ConfigError(
                f"--wpo: it weighs single pairs, and --loss {name} sorts over all of an update's"
            )
        if config.wpo and part.mean_over_tokens:
            raise ConfigError(
                f"--wpo: it weighs pairs, and --loss {name} holds a mean over tokens; leave one out"
            )
        if config.ld_alpha is not None and not part.needs_reference:
            raise ConfigError(
                f"--ld-alpha: defined for losses of log-ratios, and --loss {name} has none; leave "
                "one out"
            )
