"""Labelled completions: KTO and its relatives.

KTO compares a completion's log-ratio with a reference point, an estimate of KL(policy‖reference)
from mismatched completions: each prompt paired with another prompt's completion. The pairing is a
function of (seed, data), so the reference's log-probs of mismatched completions are cached like all
others. A training group therefore has two completions, its own and the mismatched one. Before the
gradient of an update, the mismatched ones are run without a gradient, and their mean over the whole
update is its reference point: 8 microbatches of 1 row give the same update as 1 of 8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_align.algorithms.base import (
    Algorithm,
    CompletionLogps,
    MetricSums,
    Objective,
    count_tokens,
    held_out_means,
    weighted_metrics,
)
from mlx_align.config import KTOConfig
from mlx_align.data.batching import (
    Microbatch,
    collate_labelled,
    desirable_probability,
    groups_per_batch,
)
from mlx_align.data.buckets import batch_limit
from mlx_align.data.formats import ReadReport, read_unpaired
from mlx_align.data.readers import Data
from mlx_align.data.statistics import TokenizedDataset
from mlx_align.data.transforms import MISMATCHED, OWN, add_mismatched
from mlx_align.errors import ConfigError, DataError
from mlx_align.inference.scoring import Scorer
from mlx_align.losses.hyperparameters import HyperparameterValue
from mlx_align.losses.masking import masked_sum, weighted_sum
from mlx_align.losses.registry import UNPAIRED_LOSSES, UnpairedLoss, resolve_options
from mlx_align.losses.unpaired import kto_kl
from mlx_align.models.loading import LanguageModel
from mlx_align.models.policy import Policy
from mlx_align.models.weights import AdapterWeights
from mlx_align.types import LabelledBatch, PromptGroup, TokenizedGroup

# Recommended total weight of desirable completions, as a multiple of undesirable ones
# (Ethayarajh et al. 2024).
BALANCE = (1.0, 4 / 3)
# Deviation from the balance that is tolerated without a warning: a split and dropped rows cause it.
BALANCE_TOLERANCE = 0.05
# With fewer rows per update, the reference point is mostly noise.
MIN_ROWS_PER_UPDATE = 8


class KtoLoss(NamedTuple):
    """A loss of labelled rows with its hyperparameters."""

    name: str
    loss: UnpairedLoss
    options: dict[str, HyperparameterValue]

    def __call__(self, logratio: mx.array, probability: mx.array, kl: mx.array) -> mx.array:
        """Expected loss values (B,) of completions that are desirable with these probabilities.

        `kl` is ignored by losses without a reference point.
        """
        point = (kl,) if self.loss.needs_kl else ()
        good, bad = (
            self.loss.function(logratio, mx.array(label), *point, **self.options)
            for label in (True, False)
        )
        return probability * good + (1 - probability) * bad

    @property
    def beta(self) -> float:
        """The temperature of implicit rewards."""
        return float(self.options["beta"])


class KTO(Algorithm):
    """Kahneman-Tversky optimisation of desirable and undesirable completions.

    Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization".

    Raises:
        ConfigError: An option has no effect on the loss, or is out of range.
    """

    command: ClassVar[str] = "kto"
    unit: ClassVar[str] = "rows"
    # Own and mismatched completions run separately, in shapes that hold one of them.
    packs: ClassVar[bool] = False
    needs_reference = True

    def __init__(self, config: KTOConfig) -> None:
        self._config = config
        options = resolve_options(config.loss, config.loss_options())
        self.loss = KtoLoss(config.loss, UNPAIRED_LOSSES[config.loss], options)
        self.title = "KTO" if config.loss == "kto" else f"KTO ({config.loss})"

    def read(
        self, data: Data, split: str, format: str | None
    ) -> tuple[list[PromptGroup], ReadReport]:
        """Read labelled completions; a pair becomes two of them."""
        return read_unpaired(data, split, format)

    def check(self, data: TokenizedDataset) -> list[str]:
        """Lines on labels and their weights; see `check_rows`.

        Raises:
            ConfigError: The strength is to be a margin, which only reward models use.
            DataError: There are no desirable or no undesirable completions.
        """
        if self._config.strength == "margin":
            raise ConfigError(
                "--strength margin: margins are for reward models; use --strength soft-label"
            )
        return check_rows(data, self._config, self.loss)

    def arrange(self, groups: Sequence[TokenizedGroup]) -> list[TokenizedGroup]:
        """Add a mismatched completion to each group, if the loss has a reference point."""
        if self.loss.loss.needs_kl:
            return add_mismatched(groups, self._config.seed)
        return list(groups)

    def objective(
        self,
        policy: Policy,
        groups: Sequence[TokenizedGroup],
        reference: CompletionLogps | None,
        scorer: Scorer,
    ) -> UnpairedObjective:
        """The objective of the labelled rows `groups`."""
        assert reference is not None
        return UnpairedObjective(
            policy.model,
            self.loss,
            groups,
            reference,
            scorer,
            grad_checkpoint=self._config.grad_checkpoint,
        )

    def evaluate(
        self,
        logps: CompletionLogps,
        reference: CompletionLogps,
        groups: Sequence[TokenizedGroup],
    ) -> dict[str, float]:
        """Loss and metrics; see `evaluate_rows`."""
        return evaluate_rows(logps, reference, groups, self.loss)

    def report(self, row: dict[str, float]) -> dict[str, float]:
        """Means over desirable and undesirable rows; see `means_by_label`."""
        return means_by_label(row)


class MismatchedBatch(NamedTuple):
    """A microbatch before the reference point of its update is known."""

    rows: LabelledBatch
    mismatched: LabelledBatch


class KtoBatch(NamedTuple):
    """A microbatch ready for its gradient.

    Attributes:
        rows: The microbatch.
        kl: The update's reference point, scalar, nats.
    """

    rows: LabelledBatch
    kl: mx.array


class RowTotals(NamedTuple):
    """The denominator of an update: its number of rows."""

    rows: mx.array


class UnpairedObjective(Objective):
    """The objective of labelled rows under a loss.

    Args:
        model: The base model, with adapters installed.
        row_loss: The loss and its hyperparameters.
        groups: The training rows, from `add_mismatched` if the loss has a reference point.
        reference: The reference's token log-probs of each row's completions.
        scorer: Computes log-probs of the mismatched completions, without gradient.
        grad_checkpoint: Recompute activations in the backward pass.
    """

    def __init__(
        self,
        model: LanguageModel,
        row_loss: KtoLoss,
        groups: Sequence[TokenizedGroup],
        reference: CompletionLogps,
        scorer: Scorer,
        *,
        grad_checkpoint: bool,
    ) -> None:
        super().__init__(groups)
        self._model, self._row_loss, self._scorer = model, row_loss, scorer
        self._reference, self._grad_checkpoint = reference, grad_checkpoint

    def _rows(self, microbatch: Microbatch, completion: int) -> LabelledBatch:
        members = [self.groups[i] for i in microbatch.indices]
        logps = [self._reference[i] for i in microbatch.indices]
        return collate_labelled(members, logps, microbatch.shape, completion)

    def collate(self, microbatch: Microbatch) -> MismatchedBatch | KtoBatch:
        """Rows as arrays, with their mismatched completions if the loss needs them."""
        if self._row_loss.loss.needs_kl:
            return MismatchedBatch(self._rows(microbatch, OWN), self._rows(microbatch, MISMATCHED))
        return KtoBatch(self._rows(microbatch, OWN), mx.array(0.0))

    def totals(self, batches: Sequence[MismatchedBatch | KtoBatch]) -> RowTotals:
        """The number of rows."""
        return RowTotals(mx.array(sum(batch.rows.weight.sum() for batch in batches)))

    def prepare(
        self, weights: AdapterWeights, batches: Sequence[Any], totals: RowTotals
    ) -> list[KtoBatch]:
        """Estimate the update's reference point from its mismatched completions."""
        if not self._row_loss.loss.needs_kl:
            return list(batches)
        logratios = []
        for batch in batches:
            token_logps = self._scorer(weights, batch.mismatched.groups)
            logratios.append(_logratio(token_logps, batch.mismatched))
            mx.eval(logratios[-1])  # one microbatch in memory at a time
        weight = mx.concatenate([batch.mismatched.weight for batch in batches])
        kl = kto_kl(mx.concatenate(logratios), weight)
        return [KtoBatch(batch.rows, kl) for batch in batches]

    def loss(
        self, weights: AdapterWeights, batch: KtoBatch, totals: RowTotals
    ) -> tuple[mx.array, MetricSums]:
        """Mean loss over the update's rows: this microbatch's contribution."""
        rows, kl = batch
        logps = self._model.token_logprobs(
            weights, rows.groups, grad_checkpoint=self._grad_checkpoint
        )
        logratio = _logratio(logps, rows)
        values = self._row_loss(logratio, rows.probability, kl)
        total = masked_sum(logps, rows.groups.completion_mask)
        metrics = row_metrics(total, logratio, rows.desirable, kl, self._row_loss.beta)
        sums = weighted_metrics(metrics, rows.weight)
        return weighted_sum(values, rows.weight) / totals.rows, sums

    def size(self, microbatch: Microbatch) -> tuple[int, int]:
        """Groups and tokens; the mismatched completions are not counted."""
        return count_tokens(self.groups, microbatch, completions=1)


def _logratio(token_logps: mx.array, batch: LabelledBatch) -> mx.array:
    """Policy − reference, (B,) nats: the sum of per-token differences."""
    return masked_sum(token_logps - batch.reference_logps, batch.groups.completion_mask)


def row_metrics(
    logps: mx.array, logratio: mx.array, desirable: mx.array, kl: mx.array, beta: float
) -> dict[str, mx.array]:
    """Per-row metrics (B,). Metrics of one label are 0 on the rows of the other.

    `means_by_label` turns their means over all rows into means over the rows of a label. A row
    counts as accurate if its log-ratio is on its label's side of the reference point.
    """
    good = desirable.astype(mx.float32)
    right = mx.where(desirable, logratio > kl, logratio < kl)
    return {
        "frac_desirable": good,
        "rewards/chosen": good * beta * logratio,
        "rewards/rejected": (1 - good) * beta * logratio,
        "rewards/accuracies": right.astype(mx.float32),
        "logps/chosen": good * logps,
        "logps/rejected": (1 - good) * logps,
        "kl": mx.broadcast_to(kl, good.shape),
    }


def means_by_label(row: dict[str, float]) -> dict[str, float]:
    """Turn means over all rows of `row_metrics` into means over the rows of each label.

    If all rows since the last report have the same label, the means of the other label, the margin
    and the accuracy are left out: the accuracy would depend on the label alone.
    """
    fraction = {"chosen": row["frac_desirable"], "rejected": 1 - row["frac_desirable"]}
    means = {}
    for name, value in row.items():
        part = fraction.get(name.rpartition("/")[2])
        if part is None:
            means[name] = value
        elif part > 1e-6:
            means[name] = value / part
    if "rewards/chosen" in means and "rewards/rejected" in means:
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    else:
        del means["rewards/accuracies"]
    return means


def evaluate_rows(
    logps: CompletionLogps,
    reference: CompletionLogps,
    groups: Sequence[TokenizedGroup],
    loss: KtoLoss,
) -> dict[str, float]:
    """Loss and metrics from token log-probs of policy and reference.

    In addition to the metrics of training: `rewards/auc`, the probability that a desirable
    completion has a higher implicit reward than an undesirable one (ties count half). It needs no
    reference point.
    """

    def logratios(completion: int) -> np.ndarray:
        pairs = zip(logps, reference, strict=True)
        sums = [(p[completion] - r[completion]).sum(dtype=np.float64) for p, r in pairs]
        return np.array(sums)

    own = logratios(OWN)
    good = np.array([bool(group.label) for group in groups])
    kl = max(0.0, float(logratios(MISMATCHED).mean())) if loss.loss.needs_kl else 0.0
    probability = mx.array([desirable_probability(group) for group in groups])
    values = loss(mx.array(own.astype(np.float32)), probability, mx.array(kl))
    metrics = {**held_out_means({"loss": values}, groups), "kl": kl}
    metrics |= {"count/chosen": float(good.sum()), "count/rejected": float((~good).sum())}
    total = np.array([p[OWN].sum(dtype=np.float64) for p in logps])
    for name, kind in (("chosen", good), ("rejected", ~good)):
        if kind.any():
            metrics[f"rewards/{name}"] = float(loss.beta * own[kind].mean())
            metrics[f"logps/{name}"] = float(total[kind].mean())
    if good.any() and not good.all():
        right = np.where(good, own > kl, own < kl)
        metrics["rewards/accuracies"] = float(right.mean())
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        if good.sum() > 1 and (~good).sum() > 1:
            # The margin is a difference of two means, not a mean of n values: this is the standard
            # deviation that gives its standard error.
            variance = sum(own[kind].var(ddof=1) / kind.sum() for kind in (good, ~good))
            metrics["rewards/margins_std"] = float(loss.beta * math.sqrt(variance * len(own)))
        above = _ranks(own, good)
        metrics["rewards/auc"] = float(above[good].mean())
        if "prompts" in metrics:
            columns = {
                "rewards/accuracies": right,
                "rewards/margins": _influence(loss.beta * own, good, -1),
                "rewards/auc": _influence(above, good, 1),
            }
            found = held_out_means(columns, groups)
            metrics |= {name: one for name, one in found.items() if name.endswith("_std")}
    return metrics


def _influence(values: np.ndarray, good: np.ndarray, sign: int) -> np.ndarray:
    """Each row's influence (n,) on mean(good values) + sign · mean(bad values), whose mean is 0."""
    share = np.where(good, len(good) / good.sum(), sign * len(good) / (~good).sum())
    centre: np.ndarray = np.where(good, values[good].mean(), values[~good].mean())
    return share * (values - centre)


def _ranks(values: np.ndarray, good: np.ndarray) -> np.ndarray:
    """The share (n,) of rows of the other kind that each row is on the right side of.

    Good rows should be above bad ones; ties count half. The mean of either kind is the AUC, and
    their variances give its variance.

    Source: DeLong et al. 1988, "Comparing the Areas under Two or More Correlated Receiver Operating
    Characteristic Curves".
    """

    def below(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
        ordered = np.sort(others)
        least, most = (np.searchsorted(ordered, ones, side) for side in ("left", "right"))
        return (least + most) / (2 * len(others))

    found = np.empty(len(values))
    found[good] = below(values[good], values[~good])
    found[~good] = 1 - below(values[~good], values[good])
    return found


def check_rows(data: TokenizedDataset, config: KTOConfig, loss: KtoLoss) -> list[str]:
    """Lines on the labels and their weights.

    Raises:
        DataError: There are no desirable or no undesirable completions.
    """
    good = sum(bool(group.label) for group in data.train)
    bad = len(data.train) - good
    if not good or not bad:
        missing, label = ("good", "true") if not good else ("bad", "false")
        raise DataError(
            f"the training rows have no {missing} answers (label {label}); kto needs both kinds"
        )
    soft = sum(group.soft_label is not None for group in data.train)
    lines = [
        f"{good:,} good and {bad:,} bad answers to train on"
        + (f", {soft:,} with soft labels" if soft else "")
    ]
    held_out = {bool(group.label) for group in data.valid}
    if len(held_out) == 1:
        only = "good" if True in held_out else "bad"
        lines.append(f"! all held-out answers are {only}: no accuracy, no margin")
    weights = [float(loss.options[f"{kind}_weight"]) for kind in ("desirable", "undesirable")]
    # A soft label counts for both kinds.
    good_weight = sum(desirable_probability(group) for group in data.train)
    bad_weight = len(data.train) - good_weight
    ratio = weights[0] * good_weight / (weights[1] * bad_weight)
    low, high = BALANCE
    balanced = low - BALANCE_TOLERANCE <= ratio <= high + BALANCE_TOLERANCE
    if loss.name == "kto" and not balanced:
        fitting = weights[1] * bad_weight / good_weight
        lines.append(
            f"! good answers weigh {ratio:.2g} times as much as bad ones in total; KTO's authors "
            f"recommend 1 to 1.33: --desirable-weight {fitting:.3g} to {high * fitting:.3g}"
        )
    if not loss.loss.needs_kl:
        return lines
    per_batch = groups_per_batch(add_mismatched(data.train, config.seed), batch_limit(config))
    rows = round(per_batch * config.accumulation)
    if rows < MIN_ROWS_PER_UPDATE:
        lines.append(
            f"! an update has {rows} row{'s' * (rows > 1)}: a noisy KL estimate; raise "
            "--grad-accumulation-steps"
        )
    return lines
