"""The objective of labelled rows (KTO): each answer against where the policy stands in general.

KTO values an answer by how far its log-ratio lies from a reference point, an estimate of
KL(policy‖reference) made from mismatched answers: each prompt with another prompt's answer. Which
one is a function of (seed, data), so the reference's log-probs of mismatched answers are cached
like all others. A training group then has two completions, its own and the mismatched one. Before
the gradient of an update the second ones are run without gradient, and their mean over the whole
update is its reference point: 8 microbatches of 1 row give what 1 of 8 gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_align.config import KtoConfig
from mlx_align.data.batching import Microbatch, collate_labelled, groups_per_batch
from mlx_align.data.formats import read_unpaired
from mlx_align.data.mismatched import MISMATCHED, OWN, with_mismatched
from mlx_align.data.shapes import batch_limit
from mlx_align.errors import DataError
from mlx_align.inference.score import Scorer
from mlx_align.losses.masking import masked_sum, weighted_sum
from mlx_align.losses.options import OptionValue
from mlx_align.losses.registry import UNPAIRED_LOSSES, UnpairedLoss, resolve_options
from mlx_align.losses.unpaired import kto_kl
from mlx_align.models.loading import LanguageModel
from mlx_align.models.roles import Tree
from mlx_align.train.loop import Objective
from mlx_align.train.setup import Policy, PreparedData
from mlx_align.train.shares import role_logps, size_of, weighted_metrics
from mlx_align.train.task import GroupLogps, Task
from mlx_align.train.update import Sums
from mlx_align.types import LabelledBatch, TokenizedGroup

# What good answers should weigh in all, as a multiple of bad ones (Ethayarajh et al. 2024).
BALANCE = (1.0, 4 / 3)
# A split and a few dropped rows move it by so much without meaning anything.
SLACK = 0.05
# Rows per update below which the reference point is mostly noise.
FEW_ROWS = 8


class KtoLoss(NamedTuple):
    """A loss of labelled rows with its hyperparameters."""

    name: str
    loss: UnpairedLoss
    options: dict[str, OptionValue]

    def __call__(self, logratio: mx.array, desirable: mx.array, kl: mx.array) -> mx.array:
        """Values (B,); `kl` is left out where the loss has no such point."""
        point = (kl,) if self.loss.needs_kl else ()
        return self.loss.function(logratio, desirable, *point, **self.options)

    @property
    def beta(self) -> float:
        """Temperature, for implicit rewards."""
        return float(self.options["beta"])


class WithMismatched(NamedTuple):
    """A microbatch before its update's reference point is known."""

    rows: LabelledBatch
    mismatched: LabelledBatch


class WithPoint(NamedTuple):
    """A microbatch ready for its gradient."""

    rows: LabelledBatch
    kl: mx.array  # scalar, nats: the reference point of the whole update


class Totals(NamedTuple):
    """What an update's microbatches divide by."""

    rows: mx.array


def unpaired_objective(
    model: LanguageModel,
    loss: KtoLoss,
    groups: Sequence[TokenizedGroup],
    reference: GroupLogps,
    scorer: Scorer,
    *,
    grad_checkpoint: bool,
) -> Objective:
    """The objective of labelled rows under `loss`.

    Args:
        model: The base, with adapters installed.
        loss: The loss and its hyperparameters.
        groups: The training rows, as `with_mismatched` gives them where the loss needs a KL.
        reference: Per row and completion the reference's token log-probs.
        scorer: Runs the mismatched completions.
        grad_checkpoint: Recompute activations in the backward pass.
    """

    def rows(micro: Microbatch, completion: int) -> LabelledBatch:
        members = [groups[i] for i in micro.indices]
        logps = [reference[i] for i in micro.indices]
        return collate_labelled(members, logps, micro.shape, completion)

    def collate(micro: Microbatch) -> WithMismatched | WithPoint:
        if loss.loss.needs_kl:
            return WithMismatched(rows(micro, OWN), rows(micro, MISMATCHED))
        return WithPoint(rows(micro, OWN), mx.array(0.0))

    def totals(batches: Sequence[WithMismatched | WithPoint]) -> Totals:
        return Totals(mx.array(sum(batch.rows.weight.sum() for batch in batches)))

    def find_point(
        tree: Tree, batches: Sequence[WithMismatched], _totals: Totals
    ) -> list[WithPoint]:
        logratios = []
        for batch in batches:
            logratios.append(_logratio(scorer(tree, batch.mismatched.groups), batch.mismatched))
            mx.eval(logratios[-1])  # one microbatch in memory at a time
        weight = mx.concatenate([batch.mismatched.weight for batch in batches])
        kl = kto_kl(mx.concatenate(logratios), weight)
        return [WithPoint(batch.rows, kl) for batch in batches]

    def share(tree: Tree, batch: WithPoint, totals: Totals) -> tuple[mx.array, Sums]:
        rows, kl = batch
        logps = role_logps(model, tree, rows.groups, grad_checkpoint=grad_checkpoint)
        logratio = _logratio(logps, rows)
        values = loss(logratio, rows.desirable, kl)
        total = masked_sum(logps, rows.groups.completion_mask)
        metrics = row_metrics(total, logratio, rows.desirable, kl, loss.beta)
        sums = weighted_metrics(metrics, rows.weight)
        return weighted_sum(values, rows.weight) / totals.rows, sums

    return Objective(
        collate=collate,
        totals=totals,
        loss=share,
        prepare=find_point if loss.loss.needs_kl else None,
        size=lambda micro: size_of(groups, micro, completions=1),
        sources=lambda micro: [groups[i].source for i in micro.indices],
    )


def _logratio(token_logps: mx.array, batch: LabelledBatch) -> mx.array:
    """Policy − reference, (B,) nats: the sum of per-token differences."""
    return masked_sum(token_logps - batch.reference_logps, batch.groups.completion_mask)


def row_metrics(
    logps: mx.array, logratio: mx.array, desirable: mx.array, kl: mx.array, beta: float
) -> dict[str, mx.array]:
    """Per-row metrics (B,): what concerns one kind of row is 0 on the others (see `refined`).

    A row counts as accurate if its log-ratio is on its label's side of the reference point.
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


def refined(row: dict[str, float]) -> dict[str, float]:
    """A row of means over all rows with its means of good and of bad rows made such.

    Where the rows since the last report were all of one kind, the other's means and the margin
    are left out, and the accuracy, which would only say which kind it was.
    """
    share = {"chosen": row["frac_desirable"], "rejected": 1 - row["frac_desirable"]}
    refined = {}
    for name, value in row.items():
        part = share.get(name.rpartition("/")[2])
        if part is None:
            refined[name] = value
        elif part > 1e-6:
            refined[name] = value / part
    if "rewards/chosen" in refined and "rewards/rejected" in refined:
        refined["rewards/margins"] = refined["rewards/chosen"] - refined["rewards/rejected"]
    else:
        del refined["rewards/accuracies"]
    return refined


def evaluate_rows(
    logps: GroupLogps, reference: GroupLogps, groups: Sequence[TokenizedGroup], loss: KtoLoss
) -> dict[str, float]:
    """Loss and metrics from per-token log-probs of policy and reference.

    Beside the metrics of training: `rewards/auc`, the chance that a good answer has a higher
    implicit reward than a bad one (ties count half), which needs no reference point.
    """

    def logratios(completion: int) -> np.ndarray:
        pairs = zip(logps, reference, strict=True)
        sums = [(p[completion] - r[completion]).sum(dtype=np.float64) for p, r in pairs]
        return np.array(sums)

    own = logratios(OWN)
    good = np.array([bool(group.label) for group in groups])
    kl = max(0.0, float(logratios(MISMATCHED).mean())) if loss.loss.needs_kl else 0.0
    values = loss(mx.array(own.astype(np.float32)), mx.array(good), mx.array(kl))
    metrics = {"loss": float(np.array(values).mean()), "kl": kl}
    metrics |= {"count/chosen": float(good.sum()), "count/rejected": float((~good).sum())}
    total = np.array([p[OWN].sum(dtype=np.float64) for p in logps])
    for name, kind in (("chosen", good), ("rejected", ~good)):
        if kind.any():
            metrics[f"rewards/{name}"] = float(loss.beta * own[kind].mean())
            metrics[f"logps/{name}"] = float(total[kind].mean())
    if good.any() and not good.all():
        metrics["rewards/accuracies"] = float(np.where(good, own > kl, own < kl).mean())
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        metrics["rewards/auc"] = _auc(own[good], own[~good])
    return metrics


def _auc(high: np.ndarray, low: np.ndarray) -> float:
    """The chance that a value of `high` exceeds one of `low`; ties count half."""
    ordered = np.sort(low)
    below = np.searchsorted(ordered, high, "left") + np.searchsorted(ordered, high, "right")
    return float(below.mean() / (2 * len(low)))


def kto_task(config: KtoConfig) -> Task:
    """What `mlx-align kto` trains and measures.

    Raises:
        ConfigError: An option has no effect on the loss, or is out of range.
    """
    options = resolve_options(config.loss, config.loss_options())
    loss = KtoLoss(config.loss, UNPAIRED_LOSSES[config.loss], options)

    def arrange(groups: Sequence[TokenizedGroup]) -> list[TokenizedGroup]:
        return with_mismatched(groups, config.seed) if loss.loss.needs_kl else list(groups)

    def objective(
        policy: Policy,
        groups: Sequence[TokenizedGroup],
        reference: GroupLogps | None,
        scorer: Scorer,
    ) -> Objective:
        assert reference is not None
        return unpaired_objective(
            policy.model,
            loss,
            groups,
            reference,
            scorer,
            grad_checkpoint=config.grad_checkpoint,
        )

    return Task(
        unit="rows",
        command="kto",
        title="KTO" if config.loss == "kto" else f"KTO ({config.loss})",
        read=read_unpaired,
        check=lambda data: check_rows(data, config, loss),
        needs_reference=True,
        objective=objective,
        measure=lambda logps, reference, groups: evaluate_rows(logps, reference, groups, loss),
        arrange=arrange,
        refine=refined,
        packs=False,  # own and mismatched completions run apart, in shapes that hold one of them
    )


def check_rows(data: PreparedData, config: KtoConfig, loss: KtoLoss) -> list[str]:
    """Lines on the labels and their weights.

    Raises:
        DataError: There are no good or no bad answers.
    """
    good = sum(bool(group.label) for group in data.train)
    bad = len(data.train) - good
    if not good or not bad:
        missing, label = ("good", "true") if not good else ("bad", "false")
        raise DataError(
            f"the training rows hold no {missing} answers (label {label}); kto needs both kinds"
        )
    lines = [f"{good:,} good and {bad:,} bad answers to train on"]
    held_out = {bool(group.label) for group in data.valid}
    if len(held_out) == 1:
        only = "good" if True in held_out else "bad"
        lines.append(f"! all held-out answers are {only}: no accuracy, no margin")
    weights = [float(loss.options[f"{kind}_weight"]) for kind in ("desirable", "undesirable")]
    ratio = weights[0] * good / (weights[1] * bad)
    low, high = BALANCE
    if loss.name == "kto" and not low - SLACK <= ratio <= high + SLACK:
        fitting = weights[1] * bad / good
        lines.append(
            f"! good answers weigh {ratio:.2g} times as much as bad ones in all; KTO's authors "
            f"advise 1 to 1.33: --desirable-weight {fitting:.3g} to {high * fitting:.3g}"
        )
    if not loss.loss.needs_kl:
        return lines
    per_batch = groups_per_batch(with_mismatched(data.train, config.seed), batch_limit(config))
    rows = round(per_batch * config.grad_accumulation_steps)
    if rows < FEW_ROWS:
        lines.append(
            f"! an update has {rows} row{'s' * (rows > 1)}: a noisy KL point; raise "
            "--grad-accumulation-steps"
        )
    return lines
