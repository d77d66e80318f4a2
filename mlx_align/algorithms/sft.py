"""Supervised fine-tuning on demonstrations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_align.algorithms.base import (
    Algorithm,
    CompletionLogps,
    HeldOutReport,
    MetricSums,
    Objective,
    TrainedPolicy,
)
from mlx_align.config import SFTConfig
from mlx_align.data.batching import Microbatch, collate_groups, completion_mask
from mlx_align.data.buckets import plan_shapes
from mlx_align.data.formats import ReadReport, read_supervised
from mlx_align.data.readers import Data
from mlx_align.data.transforms import keep_last_completion
from mlx_align.errors import ConfigError
from mlx_align.evaluation.metrics import perplexity_change
from mlx_align.inference.scoring import Scorer, score_groups
from mlx_align.losses.masking import masked_sum
from mlx_align.losses.registry import TOKEN_LOSSES
from mlx_align.models.loading import LanguageModel
from mlx_align.models.policy import Policy
from mlx_align.models.weights import AdapterWeights
from mlx_align.types import GroupBatch, PromptGroup, TokenizedGroup

# Exponents are clamped here, so that the perplexity stays a finite float32.
MAX_NATS = 80.0


class SFT(Algorithm):
    """Supervised fine-tuning on prompts with completions, conversations or text."""

    command: ClassVar[str] = "sft"
    unit: ClassVar[str] = "rows"
    has_reference: ClassVar[bool] = False

    def __init__(self, config: SFTConfig) -> None:
        self._config = config
        self.title = "SFT" if config.loss == "nll" else f"SFT ({config.loss})"

    def read(
        self, data: Data, split: str, format: str | None
    ) -> tuple[list[PromptGroup], ReadReport]:
        """Read demonstrations; `loss_on` decides if the last or every assistant turn is trained on.

        Raises:
            ConfigError: `loss_on` is `assistant`, and the data has no conversations.
        """
        groups, reading = read_supervised(data, split, format)
        if self._config.loss_on == "completion":
            title = reading.title.replace("every assistant turn", "the last assistant turn")
            return keep_last_completion(groups), replace(reading, title=title)
        if isinstance(groups[0].prompt, str):
            raise ConfigError(
                f"--loss-on assistant: {data} has text, not conversations with assistant turns; "
                "leave it out"
            )
        return groups, reading

    def objective(
        self,
        policy: Policy,
        groups: Sequence[TokenizedGroup],
        reference: CompletionLogps | None,
        scorer: Scorer,
    ) -> SupervisedObjective:
        """The objective of the demonstrations `groups`."""
        return SupervisedObjective(
            policy.model, self._config.loss, groups, grad_checkpoint=self._config.grad_checkpoint
        )

    def evaluate(
        self,
        logps: CompletionLogps,
        reference: CompletionLogps,
        groups: Sequence[TokenizedGroup],
    ) -> dict[str, float]:
        """Loss and perplexity; see `evaluate_demonstrations`."""
        return evaluate_demonstrations(logps, groups, self._config.loss)

    def report(self, row: dict[str, float]) -> dict[str, float]:
        """The row with the perplexity; see `with_perplexity`."""
        return with_perplexity(row)

    def report_held_out(self, trained: TrainedPolicy) -> HeldOutReport:
        """The change of the perplexity, from the difference of every row."""
        groups = trained.groups
        shapes = plan_shapes(groups, trained.limit)
        before, after = (
            score_groups(trained.scorer, weights, groups, shapes, per_token=True)
            for weights in (trained.start, trained.weights)
        )
        masks = [completion_mask(group, 0) for group in groups]
        sums = [
            np.array(
                [p[0][mask].sum(dtype=np.float64) for p, mask in zip(logps, masks, strict=True)]
            )
            for logps in (before, after)
        ]
        tokens = np.array([mask.sum() for mask in masks], np.float64)
        found = perplexity_change(
            sums[0], sums[1] - sums[0], tokens, np.arange(len(groups)), seed=self._config.seed
        )
        return HeldOutReport({"perplexity": asdict(found)}, None, "")


class TokenTotals(NamedTuple):
    """The denominator of an update: its number of tokens in the loss."""

    tokens: mx.array


class SupervisedObjective(Objective):
    """The objective of demonstrations.

    Args:
        model: The base model, with adapters installed.
        token_loss: A name of `TOKEN_LOSSES`.
        groups: The training rows, one completion each.
        grad_checkpoint: Recompute activations in the backward pass.
    """

    def __init__(
        self,
        model: LanguageModel,
        token_loss: str,
        groups: Sequence[TokenizedGroup],
        *,
        grad_checkpoint: bool,
    ) -> None:
        super().__init__(groups)
        self._model, self._grad_checkpoint = model, grad_checkpoint
        self._token_loss = TOKEN_LOSSES[token_loss]

    def collate(self, microbatch: Microbatch) -> GroupBatch:
        """Rows as arrays."""
        return collate_groups([self.groups[i] for i in microbatch.indices], microbatch.shape)

    def totals(self, batches: Sequence[GroupBatch]) -> TokenTotals:
        """The number of tokens in the loss."""
        return TokenTotals(mx.array(sum(batch.completion_mask.sum() for batch in batches)))

    def loss(
        self, weights: AdapterWeights, batch: GroupBatch, totals: TokenTotals
    ) -> tuple[mx.array, MetricSums]:
        """Mean loss over the update's tokens: this microbatch's contribution."""
        logps = self._model.token_logprobs(weights, batch, grad_checkpoint=self._grad_checkpoint)
        total = masked_sum(self._token_loss(logps), batch.completion_mask, axis=None)
        # Means over tokens, not rows: a metric's weight is its number of tokens.
        sums = {
            "nll": mx.stop_gradient(-masked_sum(logps, batch.completion_mask, axis=None)),
            "weight": batch.completion_mask.sum().astype(mx.float32),
        }
        return total / totals.tokens, sums


def with_perplexity(row: dict[str, float]) -> dict[str, float]:
    """The row with the perplexity e^nll in place of `nll`, the mean negative log-likelihood."""
    result = dict(row)
    result["perplexity"] = math.exp(min(result.pop("nll"), MAX_NATS))
    return result


def evaluate_demonstrations(
    logps: CompletionLogps, groups: Sequence[TokenizedGroup], loss: str
) -> dict[str, float]:
    """Loss and perplexity, means over the tokens in the loss, from token log-probs."""
    rows = [p[0][completion_mask(group, 0)] for p, group in zip(logps, groups, strict=True)]
    tokens = np.concatenate(rows).astype(np.float64)
    values = np.array(TOKEN_LOSSES[loss](mx.array(tokens.astype(np.float32))), np.float64)
    metrics = with_perplexity({"loss": float(values.mean()), "nll": float(-tokens.mean())})
    if len(rows) > 1:
        # Tokens of a row depend on each other, so the row is the unit: the linearised standard
        # error of a ratio of sums (Cochran 1977, "Sampling Techniques", section 2.11).
        rest = np.array([(-row - (-tokens.mean())).sum(dtype=np.float64) for row in rows])
        deviation = len(rows) / len(tokens) * math.sqrt((rest**2).sum() / (len(rows) - 1))
        metrics["perplexity_std"] = metrics["perplexity"] * deviation
    return metrics
