"""The objective of demonstrations (SFT): the mean loss per scored token of the whole update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_align.config import SftConfig
from mlx_align.data.batching import Microbatch, collate_groups, scored
from mlx_align.data.formats import Reading, read_supervised
from mlx_align.data.groups import last_answers
from mlx_align.errors import ConfigError
from mlx_align.inference.score import Scorer
from mlx_align.losses.masking import masked_sum
from mlx_align.losses.registry import TOKEN_LOSSES
from mlx_align.models.loading import LanguageModel
from mlx_align.models.roles import Tree
from mlx_align.train.loop import Objective
from mlx_align.train.setup import Policy
from mlx_align.train.shares import role_logps, size_of
from mlx_align.train.task import GroupLogps, Task
from mlx_align.train.update import Sums
from mlx_align.types import GroupBatch, PromptGroup, TokenizedGroup

# e to this is still a float32.
MAX_NATS = 80.0


class Totals(NamedTuple):
    """What an update's microbatches divide by."""

    tokens: mx.array


def supervised_objective(
    model: LanguageModel,
    loss: str,
    groups: Sequence[TokenizedGroup],
    *,
    grad_checkpoint: bool,
) -> Objective:
    """The objective of demonstrations.

    Args:
        model: The base, with adapters installed.
        loss: A name of `TOKEN_LOSSES`.
        groups: The training rows, one completion each.
        grad_checkpoint: Recompute activations in the backward pass.
    """

    def collate(micro: Microbatch) -> GroupBatch:
        return collate_groups([groups[i] for i in micro.indices], micro.shape)

    def totals(batches: Sequence[GroupBatch]) -> Totals:
        return Totals(mx.array(sum(batch.completion_mask.sum() for batch in batches)))

    def share(tree: Tree, batch: GroupBatch, totals: Totals) -> tuple[mx.array, Sums]:
        logps = role_logps(model, tree, batch, grad_checkpoint=grad_checkpoint)
        total = masked_sum(TOKEN_LOSSES[loss](logps), batch.completion_mask, axis=None)
        # Means over tokens, not over rows: the weight of a metric is the number of its tokens.
        sums = {
            "nll": mx.stop_gradient(-masked_sum(logps, batch.completion_mask, axis=None)),
            "weight": batch.completion_mask.sum().astype(mx.float32),
        }
        return total / totals.tokens, sums

    return Objective(
        collate=collate,
        totals=totals,
        loss=share,
        size=lambda micro: size_of(groups, micro),
        sources=lambda micro: [groups[i].source for i in micro.indices],
    )


def with_perplexity(row: dict[str, float]) -> dict[str, float]:
    """A row of metrics with the perplexity, e^nll, in place of the mean log-loss per token."""
    refined = dict(row)
    refined["perplexity"] = math.exp(min(refined.pop("nll"), MAX_NATS))
    return refined


def evaluate_demonstrations(
    logps: GroupLogps, groups: Sequence[TokenizedGroup], loss: str
) -> dict[str, float]:
    """Loss and perplexity, means over scored tokens, from per-token log-probs."""
    rows = [p[0][scored(group, 0)] for p, group in zip(logps, groups, strict=True)]
    tokens = np.concatenate(rows).astype(np.float64)
    values = np.array(TOKEN_LOSSES[loss](mx.array(tokens.astype(np.float32))), np.float64)
    return with_perplexity({"loss": float(values.mean()), "nll": float(-tokens.mean())})


def _read_last_answers(
    data: str, split: str, format: str | None
) -> tuple[list[PromptGroup], Reading]:
    groups, reading = read_supervised(data, split, format)
    title = reading.title.replace("every answer counting", "the last answer counting")
    return last_answers(groups), replace(reading, title=title)


def _read_all_answers(
    data: str, split: str, format: str | None
) -> tuple[list[PromptGroup], Reading]:
    groups, reading = read_supervised(data, split, format)
    if isinstance(groups[0].prompt, str):
        raise ConfigError(
            f"--loss-on assistant: {data} holds text, not conversations, so there are no turns to "
            "tell apart; leave it out"
        )
    return groups, reading


def sft_task(config: SftConfig) -> Task:
    """What `mlx-align sft` trains and measures."""

    def objective(
        policy: Policy,
        groups: Sequence[TokenizedGroup],
        _reference: GroupLogps | None,
        _scorer: Scorer,
    ) -> Objective:
        return supervised_objective(
            policy.model,
            config.loss,
            groups,
            grad_checkpoint=config.grad_checkpoint,
        )

    return Task(
        command="sft",
        title="SFT" if config.loss == "nll" else f"SFT ({config.loss})",
        read=_read_last_answers if config.loss_on == "completion" else _read_all_answers,
        check=lambda _: [],
        needs_reference=False,
        objective=objective,
        measure=lambda logps, _, groups: evaluate_demonstrations(logps, groups, config.loss),
        refine=with_perplexity,
        has_reference=False,
        unit="rows",
    )
