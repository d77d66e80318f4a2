"""Preference pairs: DPO and its family of pairwise losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_align.algorithms.base import (
    Algorithm,
    CompletionLogps,
    MetricSums,
    Objective,
    held_out_means,
    weighted_metrics,
)
from mlx_align.config import DPOConfig
from mlx_align.data.batching import Microbatch, collate_pairs, completion_mask
from mlx_align.data.formats import ReadReport, read_preferences
from mlx_align.data.readers import Data
from mlx_align.data.statistics import TokenizedDataset
from mlx_align.data.transforms import to_pairs
from mlx_align.errors import ConfigError
from mlx_align.inference.scoring import Scorer
from mlx_align.losses.masking import (
    ld_mask,
    pair_logps,
    shared_lengths,
    weighted_sum,
    wpo_weight,
)
from mlx_align.losses.pairwise import linear_loss, loss_and_logps_gradient
from mlx_align.losses.registry import PAIRWISE_LOSSES, CombinedLoss, combine, parse_losses
from mlx_align.models.loading import LanguageModel
from mlx_align.models.policy import Policy
from mlx_align.models.weights import AdapterWeights
from mlx_align.types import PairBatch, PairLogps, PromptGroup, TokenizedGroup


class DPO(Algorithm):
    """Direct preference optimisation, and every other loss of preference pairs.

    Source: Rafailov et al. 2023, "Direct Preference Optimization"; for other losses see
    `losses/pairwise.py`.

    Args:
        config: The options.
        loss: A function of `PairLogps` to use in place of `config.loss`.

    Raises:
        ConfigError: The loss is unknown, or an option has no effect on it.
    """

    command: ClassVar[str] = "dpo"

    def __init__(self, config: DPOConfig, *, loss: Callable[..., mx.array] | None = None) -> None:
        self._config = config
        named: Any = config.loss if loss is None else loss
        self.loss = combine(parse_losses(named), config.loss_options())
        _check_loss_options(config, self.loss)
        self.title = f"DPO ({config.loss})" if config.loss != "sigmoid" else "DPO"
        self.needs_reference = self.loss.needs_reference

    def read(
        self, data: Data, split: str, format: str | None
    ) -> tuple[list[PromptGroup], ReadReport]:
        """Read pairs; see `read_pairs`."""
        return read_pairs(data, split, format)

    def check(self, data: TokenizedDataset) -> list[str]:
        """Check that the loss uses the data's soft labels; warn about discopop.

        Raises:
            ConfigError: The data has soft labels, which the loss ignores.
        """
        if not self.loss.soft_labels and any(g.soft_label is not None for g in data.train):
            known = ", ".join(name for name, loss in PAIRWISE_LOSSES.items() if loss.soft_labels)
            raise ConfigError(
                f"--loss {self._config.loss}: ignores soft labels, which the data has; remove "
                f"them (those made of votes: --votes ignore), or choose one of {known}"
            )
        if self._config.strength == "margin":
            raise ConfigError(
                "--strength margin: margins are for reward models; use --strength soft-label"
            )
        return [_DISCOPOP_WARNING] if "discopop" in dict(self.loss.parts) else []

    def objective(
        self,
        policy: Policy,
        groups: Sequence[TokenizedGroup],
        reference: CompletionLogps | None,
        scorer: Scorer,
    ) -> PreferenceObjective:
        """The objective of the pairs `groups`."""
        return PreferenceObjective(
            policy.model,
            self.loss,
            groups,
            reference,
            scorer,
            grad_checkpoint=self._config.grad_checkpoint,
            wpo=self._config.wpo,
            ld_alpha=self._config.ld_alpha,
        )

    def evaluate(
        self,
        logps: CompletionLogps,
        reference: CompletionLogps,
        groups: Sequence[TokenizedGroup],
    ) -> dict[str, float]:
        """Loss and metrics, means over pairs; see `evaluate_pairs`."""
        return evaluate_pairs(logps, reference, groups, self.loss, self._config.ld_alpha)


class PairTotals(NamedTuple):
    """Denominators of an update, computed from its masks before any forward pass."""

    pairs: mx.array
    mean_chosen_length: mx.array


class CoupledBatch(NamedTuple):
    """A microbatch of a loss that sorts over the whole update.

    Attributes:
        pairs: The microbatch.
        gradient: Gradient of the update's loss with respect to the log-probs; 0 for fillers.
        contribution: This microbatch's contribution to the update's loss, scalar.
    """

    pairs: PairBatch
    gradient: PairLogps
    contribution: mx.array


class PreferenceObjective(Objective):
    """The objective of preference pairs under a loss.

    Args:
        model: The base model, with adapters installed.
        pair_loss: The loss, as `losses.registry.combine` returns it.
        groups: The training pairs.
        reference: The reference's token log-probs of each pair; None if the loss needs no
            reference.
        scorer: Computes log-probs without gradient, for losses that couple the pairs of an update.
        grad_checkpoint: Recompute activations in the backward pass.
        wpo: Weight each pair by its probability under the policy (WPO).
        ld_alpha: Weight of tokens beyond the shorter completion's length (LD-DPO); None for 1.
    """

    def __init__(
        self,
        model: LanguageModel,
        pair_loss: CombinedLoss,
        groups: Sequence[TokenizedGroup],
        reference: CompletionLogps | None,
        scorer: Scorer,
        *,
        grad_checkpoint: bool,
        wpo: bool = False,
        ld_alpha: float | None = None,
    ) -> None:
        super().__init__(groups)
        self._model, self._pair_loss, self._scorer = model, pair_loss, scorer
        self._reference = reference
        self._grad_checkpoint, self._wpo, self._ld_alpha = grad_checkpoint, wpo, ld_alpha

    def collate(self, microbatch: Microbatch) -> PairBatch:
        """Pairs as arrays, with the reference's log-probs."""
        members = [self.groups[i] for i in microbatch.indices]
        reference = self._reference
        logps = None if reference is None else [reference[i] for i in microbatch.indices]
        return collate_pairs(members, logps, microbatch.shape)

    def totals(self, batches: Sequence[PairBatch]) -> PairTotals:
        """The number of pairs, and the mean length of their chosen completions."""
        pairs = sum(batch.weight.sum() for batch in batches)
        chosen_tokens = sum(batch.groups.completion_mask[0::2].sum() for batch in batches)
        return PairTotals(mx.array(pairs), chosen_tokens / mx.array(pairs))

    def prepare(
        self, weights: AdapterWeights, batches: Sequence[PairBatch], totals: PairTotals
    ) -> list[Any]:
        """For losses that couple pairs: add the gradient of the update's loss to each batch."""
        if not self._pair_loss.couples_batch:
            return list(batches)
        logps = [self._pairs(self._scorer(weights, b.groups), b) for b in batches]
        return _couple_batches(self._pair_loss, logps, batches, totals)

    def loss(
        self, weights: AdapterWeights, batch: Any, totals: PairTotals
    ) -> tuple[mx.array, MetricSums]:
        """Mean loss over the update's pairs: this microbatch's contribution."""
        if self._pair_loss.couples_batch:
            return self._coupled_loss(weights, batch)
        if self._wpo:
            return self._wpo_loss(weights, batch, totals)
        token_logps = self._model.token_logprobs(
            weights, batch.groups, grad_checkpoint=self._grad_checkpoint
        )
        logps = self._pairs(token_logps, batch)
        values = self._pair_loss(logps, totals.mean_chosen_length)
        sums = weighted_metrics(self._metrics(logps), batch.weight)
        return weighted_sum(values, batch.weight) / totals.pairs, sums

    def _wpo_loss(
        self, weights: AdapterWeights, batch: PairBatch, totals: PairTotals
    ) -> tuple[mx.array, MetricSums]:
        token_logps, log_squares = self._model.token_logprobs_and_square_sums(
            weights, batch.groups, grad_checkpoint=self._grad_checkpoint
        )
        logps = self._pairs(token_logps, batch)
        rows = wpo_weight(token_logps, log_squares, batch.groups.completion_mask)
        pairs = rows[0::2] * rows[1::2]
        values = self._pair_loss(logps, totals.mean_chosen_length) * pairs
        sums = weighted_metrics({**self._metrics(logps), "wpo/weight": pairs}, batch.weight)
        return weighted_sum(values, batch.weight) / totals.pairs, sums

    def _coupled_loss(
        self, weights: AdapterWeights, batch: CoupledBatch
    ) -> tuple[mx.array, MetricSums]:
        pairs = batch.pairs
        token_logps = self._model.token_logprobs(
            weights, pairs.groups, grad_checkpoint=self._grad_checkpoint
        )
        logps = self._pairs(token_logps, pairs)
        linear = linear_loss(logps, batch.gradient)
        sums = weighted_metrics(self._metrics(logps), pairs.weight)
        # The gradient is that of the linear loss, the value that of the true loss.
        return linear - mx.stop_gradient(linear) + batch.contribution, sums

    def _pairs(self, token_logps: mx.array, batch: PairBatch) -> PairLogps:
        mask, alpha = batch.groups.completion_mask, self._ld_alpha
        weight = None if alpha is None else ld_mask(mask, shared_lengths(mask), alpha)
        return pair_logps(token_logps, batch.reference_logps, mask, batch.soft_label, weight)

    def _metrics(self, logps: PairLogps) -> dict[str, mx.array]:
        metrics = logp_metrics(logps)
        if self._reference is None:
            # Without the reference's log-probs there are no implicit rewards. β times the policy's
            # own log-probs, which TRL logs for these losses, are another quantity than the rewards
            # of held-out pairs, and `logps/*` tell the same.
            return metrics
        return {**reward_metrics(logps, self._pair_loss.beta or 1.0), **metrics}


def reward_metrics(logps: PairLogps, beta: float) -> dict[str, mx.array]:
    """Per-pair metrics (B,) of implicit rewards, β·log-ratio, in nats, under TRL's names."""
    chosen, rejected = beta * logps.chosen_logratio, beta * logps.rejected_logratio
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(mx.float32),
        "rewards/margins": chosen - rejected,
    }


def logp_metrics(logps: PairLogps) -> dict[str, mx.array]:
    """Per-pair metrics (B,) of the policy's own log-probs, in nats, under TRL's names."""
    return {
        "logps/chosen": logps.chosen,
        "logps/rejected": logps.rejected,
        "logps/accuracies": (logps.chosen > logps.rejected).astype(mx.float32),
        "logps/margins": logps.chosen - logps.rejected,
    }


def evaluate_pairs(
    logps: CompletionLogps,
    reference: CompletionLogps,
    groups: Sequence[TokenizedGroup],
    loss: CombinedLoss,
    ld_alpha: float | None = None,
) -> dict[str, float]:
    """Loss and metrics, means over pairs, from token log-probs of policy and reference.

    WPO's weights are left out: they need the whole distribution at every token.
    """
    masks = [[completion_mask(group, k) for k in range(2)] for group in groups]
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
    values |= reward_metrics(pairs, loss.beta or 1.0) | logp_metrics(pairs)
    return held_out_means(values, groups)


def read_pairs(data: Data, split: str, format: str | None) -> tuple[list[PromptGroup], ReadReport]:
    """Preference data as pairs; a ranked list becomes all its strictly ordered pairs."""
    groups, reading = read_preferences(data, split, format)
    return to_pairs(groups), reading


def _couple_batches(
    loss: CombinedLoss,
    logps: Sequence[PairLogps],
    batches: Sequence[PairBatch],
    totals: PairTotals,
) -> list[CoupledBatch]:
    """Compute the loss on all pairs of the update at once, and split it among the microbatches."""
    weight = mx.concatenate([batch.weight for batch in batches])
    real = mx.array(np.flatnonzero(np.array(weight)))
    columns = zip(*logps, strict=True)
    all_pairs = PairLogps(*(mx.concatenate(list(column))[real] for column in columns))
    values, gradient = loss_and_logps_gradient(loss, all_pairs, totals.mean_chosen_length)

    def scatter(column: mx.array) -> mx.array:
        # Back to all rows; filler rows are 0.
        return mx.zeros(weight.shape).at[real].add(column)

    values, gradients = scatter(values), [scatter(column) for column in gradient]
    coupled, start = [], 0
    for batch in batches:
        rows = slice(start, start + len(batch.weight))
        start = rows.stop
        part = PairLogps(*(column[rows] for column in gradients))
        coupled.append(CoupledBatch(batch, part, values[rows].sum() / totals.pairs))
    mx.eval(coupled)
    return coupled


def _token_weights(masks: Sequence[np.ndarray], ld_alpha: float | None) -> list[np.ndarray]:
    """The weight of each token of a pair's completions (see `losses.masking.ld_mask`)."""
    if ld_alpha is None:
        return [mask.astype(np.float32) for mask in masks]
    shared = min(mask.sum() for mask in masks)
    return [mask * np.where(mask.cumsum() <= shared, 1.0, ld_alpha) for mask in masks]


# Measured on the starter model: at the start of a run it lowered the reward margin.
_DISCOPOP_WARNING = (
    "! discopop, as published, is not monotone: while policy and reference still agree, as at the "
    "start of every run, its gradient lowers margins. Watch the reward margin."
)


def _check_loss_options(config: DPOConfig, loss: CombinedLoss) -> None:
    """Raise a ConfigError for WPO or LD-DPO with losses for which the papers don't define them."""
    for name, _ in loss.parts:
        part = PAIRWISE_LOSSES.get(name)
        if part is None:  # the caller's own function
            continue
        if config.wpo and part.couples_batch:
            raise ConfigError(
                f"--wpo can't be combined with --loss {name}: WPO weights single pairs, {name} "
                "compares all pairs of an update; leave one out"
            )
        if config.wpo and part.mean_over_tokens:
            raise ConfigError(
                f"--wpo can't be combined with --loss {name}: WPO weights pairs, {name} is a mean "
                "over tokens; leave one out"
            )
        if config.ld_alpha is not None and not part.needs_reference:
            raise ConfigError(
                f"--ld-alpha can't be combined with --loss {name}: it is defined for losses of "
                "log-ratios; leave one out"
            )
