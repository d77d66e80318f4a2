"""Training on given completions (dpo, kto, sft, reward): preparation, steps, and evaluation.

A step is one optimizer update. `prepare_offline` does everything that needs no weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.optimizers as optim
import numpy as np

from mlx_align.algorithms.base import (
    Algorithm,
    CompletionLogps,
    Objective,
    TrainedPolicy,
)
from mlx_align.algorithms.update import Updater, collate_microbatches, make_optimizer
from mlx_align.config import TrainConfig
from mlx_align.data.batching import (
    Microbatch,
    epoch_order,
    groups_per_batch,
    microbatch_stream,
    padding_fraction,
    prompt_numbers,
)
from mlx_align.data.buckets import AnyShape, BatchLimit, batch_limit, plan_shapes
from mlx_align.data.readers import Data
from mlx_align.data.statistics import render_statistics, trained_thinking
from mlx_align.errors import TrainingError
from mlx_align.inference.scoring import Scorer, score_groups
from mlx_align.models.loading import LanguageModel, ModelFolder
from mlx_align.models.policy import make_policy
from mlx_align.models.weights import AdapterWeights
from mlx_align.planning.plan import can_pack, check_fits
from mlx_align.system.memory_limit import MemoryLimit
from mlx_align.system.progress import Console
from mlx_align.tracking.run_dir import write_samples
from mlx_align.training.defaults import describe_evaluated, resolve_offline
from mlx_align.training.evaluation import EvaluationResult, kl_from_reference
from mlx_align.training.metrics import MetricsWindow, Progress, StepResult, Throughput
from mlx_align.training.reference import References, reference_logprobs
from mlx_align.training.resume import fingerprints
from mlx_align.training.setup import (
    Setup,
    check_circular_run,
    describe_policy,
    describe_test_split,
    prepare_data,
    resolve_layout,
)
from mlx_align.types import TokenizedGroup

# Epochs whose microbatches are counted one by one. Packing 3,000 rows takes about half a second.
COUNTED_EPOCHS = 32


@dataclass(frozen=True, kw_only=True)
class OfflineSetup(Setup):
    """An offline run before its weights are loaded.

    Attributes:
        algorithm: What trains.
        train: Groups to train on.
        valid: Held-out groups.
        held_out: The held-out groups of an evaluation.
    """

    algorithm: Algorithm
    train: list[TokenizedGroup]
    valid: list[TokenizedGroup]
    held_out: list[TokenizedGroup]

    def load(self, run: Path, console: Console) -> OfflineJob:
        """Load the model, and compute or look up the reference's log-probs."""
        return OfflineJob(self, run, console)


def prepare_offline(
    algorithm: Algorithm,
    config: TrainConfig,
    folder: ModelFolder,
    data: Data | None = None,
    *,
    resume: bool = False,
) -> OfflineSetup:
    """Check options, read and tokenise the data, and check that the run fits the machine.

    Args:
        algorithm: Reads and checks the data.
        config: The options as given; defaults that depend on the data are chosen here.
        folder: The base model.
        data: The data, if it is not `config.data`.
        resume: Whether the options are those of an earlier run, in which all was chosen.

    Raises:
        MlxAlignError: An option, the data or the memory doesn't fit.
    """
    layout = resolve_layout(config)
    dataset = prepare_data(config, folder, algorithm.read, data)
    remarks = algorithm.check(dataset)
    train, valid = algorithm.arrange(dataset.train), algorithm.arrange(dataset.valid)
    lines = ["\n".join([render_statistics(dataset.statistics), *remarks])]
    lines += describe_test_split(config, data)
    val_batches = config.val_batches
    if not resume:
        packs = algorithm.packs and can_pack(folder)
        config, chosen = resolve_offline(
            config,
            layout,
            train,
            len(valid),
            dataset.valid_fraction,
            packs=packs,
            width=folder.hidden_size,
        )
        lines += chosen
    held_out = held_out_groups(valid, config)
    if val_batches is None:
        lines += describe_evaluated(len(held_out), len(valid))
    fit = check_fits(config, layout, folder, train)
    lines.append(fit.line)
    config = replace(config, grad_checkpoint=fit.grad_checkpoint)
    parts = {"training data": train, "held-out data": valid}
    made_of = fingerprints(algorithm.command, config, folder.path, parts)
    judges = check_circular_run(config, made_of, dataset.statistics.judges)
    if "circular" in judges:
        lines.append(f"! Circular: {judges['circular']}.")
    return OfflineSetup(
        layout=layout,
        folder=folder,
        eval_examples=len(held_out),
        algorithm=algorithm.with_options(config),
        config=config,
        train=train,
        valid=valid,
        held_out=held_out,
        lines=lines,
        facts={**asdict(dataset.statistics), **judges},
        made_of=made_of,
    )


class OfflineJob:
    """An offline run with its weights; see `setup.Job`."""

    def __init__(self, setup: OfflineSetup, run: Path, console: Console) -> None:
        self._setup, self._run, self._console = setup, run, console
        algorithm, config = setup.algorithm, setup.config
        self.policy = make_policy(config, setup.folder, setup.layout)
        console.note(describe_policy(self.policy))
        self._scorer = algorithm.make_scorer(self.policy.model)
        self._limit = batch_limit(config, packs=self.policy.model.packs and algorithm.packs)
        self._shapes = plan_shapes(setup.train, self._limit)
        accumulation = config.accumulation
        microbatches = total_microbatches(config, setup.train, self._shapes)
        references = References(None, [])
        if algorithm.has_reference:
            references = reference_logprobs(
                self.policy,
                self._scorer,
                config,
                run,
                (setup.train, self._shapes),
                setup.held_out,
                self._limit,
                microbatches if algorithm.needs_reference else 0,
                console,
            )
        self.trainer = OfflineTrainer(
            self.policy.model,
            algorithm.objective(self.policy, setup.train, references.train, self._scorer),
            self._microbatches,
            self.policy.start,
            make_optimizer(self.policy.start, config.weight_decay),
            accumulation=accumulation,
            updates=config.iters,
            max_grad_norm=config.max_grad_norm,
            skip_non_finite=config.on_non_finite == "skip",
            total_microbatches=microbatches,
            title=algorithm.title,
            evaluation=Evaluation(
                algorithm, setup.held_out, self._scorer, references.valid, self._limit
            ),
            report=algorithm.report,
        )
        _, first = np.unique(prompt_numbers(setup.held_out), return_index=True)
        wanted = config.samples if algorithm.samples_answers else 0
        self.prompts = [setup.held_out[index] for index in first[:wanted]]
        self.next_command = algorithm.next_command(
            setup.folder, run, trained_thinking(config.thinking, setup.facts)
        )

    def _microbatches(self, start: int) -> Any:
        return microbatch_stream(
            self._setup.train, self._shapes, seed=self._setup.config.seed, start=start
        )

    def finish(
        self, weights: AdapterWeights, kept: int, samples: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Report on held-out data and write the samples.

        Returns:
            The samples, and entries of the summary.
        """
        setup, algorithm, config = self._setup, self._setup.algorithm, self._setup.config
        held_out: dict[str, Any] = {}
        if setup.valid:
            report = algorithm.report_held_out(
                TrainedPolicy(
                    self._scorer,
                    self.policy.start,
                    weights,
                    setup.folder,
                    setup.valid if algorithm.reports_all else setup.held_out,
                    self._limit,
                    self._console,
                )
            )
            if report is not None:
                held_out = {"held_out": report.facts}
                samples = samples if report.samples is None else report.samples
                if report.text:
                    self._console.note(report.text)
        write_samples(self._run, samples)
        kl = None
        if algorithm.has_reference:
            kl = kl_from_reference(
                self._scorer, self.policy, weights, self.prompts, config, self._limit
            )
        order = epoch_order(setup.train, self._shapes, seed=config.seed)
        evaluation = self.trainer.evaluation
        best = None if evaluation is None else evaluation.best
        return samples, {
            "shapes": [list(shape) for shape in self._shapes],
            "padding_share": padding_fraction(order, setup.train),
            "best": best,
            "kl": kl,
            **held_out,
        }

    def counts(self, groups: int) -> dict[str, int]:
        """Counts of the training data, for the summary."""
        return {self._setup.algorithm.unit: groups}


def total_microbatches(
    config: TrainConfig, groups: Sequence[TokenizedGroup], shapes: Sequence[AnyShape]
) -> int:
    """Microbatches of the whole run: `iters` full updates, or every row once per epoch.

    Epochs may differ in length, because the order decides which rows are packed together. Epochs
    after the first `COUNTED_EPOCHS` are taken to be as long as those on average.
    """
    if config.iters is not None:
        return config.iters * config.accumulation
    epochs = config.epochs or 1.0
    whole = min(int(epochs), COUNTED_EPOCHS)
    lengths = [
        len(epoch_order(groups, shapes, seed=config.seed, epoch=epoch))
        for epoch in range(max(whole, 1))
    ]
    rest = (epochs - whole) * sum(lengths) / len(lengths)
    return max(1, sum(lengths[:whole]) + round(rest))


class OfflineTrainer:
    """Steps that are one optimizer update on given completions.

    Accumulating microbatches gives the gradient of one large batch.

    Args:
        model: The base model; it holds the current weights between steps.
        objective: The objective to minimise.
        microbatches: (position) -> the microbatches from that position of the data on.
        weights: The weights to start from.
        optimizer: Initialised for them.
        accumulation: Microbatches per update.
        updates: Updates of the whole run; None if it is as long as its microbatches.
        max_grad_norm: Gradients with a larger norm are scaled down to it.
        skip_non_finite: Skip updates whose loss or gradient is not finite.
        total_microbatches: Microbatches of the whole run; the last update may have fewer. 0 for
            no end.
        title: Label of the progress bar.
        evaluation: Measures held-out data; None to measure nothing.
        report: Turns means over the updates of a report into its row.
    """

    step_name = "update"
    on_policy = False
    mid_step = False

    def __init__(
        self,
        model: LanguageModel,
        objective: Objective,
        microbatches: Callable[[int], Iterator[Microbatch]],
        weights: AdapterWeights,
        optimizer: optim.Optimizer,
        *,
        accumulation: int,
        max_grad_norm: float,
        updates: int | None = None,
        skip_non_finite: bool = False,
        total_microbatches: int = 0,
        title: str = "",
        evaluation: Evaluation | None = None,
        report: Callable[[dict[str, float]], dict[str, float]] = dict,
    ) -> None:
        self.title, self.total_steps = title, -(-total_microbatches // accumulation)
        self._total_microbatches, self._updates = total_microbatches, updates
        self.weights: dict[str, AdapterWeights] = {"policy": weights}
        self.optimizers = {"policy": optimizer}
        self.memory = MemoryLimit()
        self.throughput = Throughput()
        self._model, self._objective = model, objective
        self._microbatches, self._accumulation = microbatches, accumulation
        self._stream: Iterator[Microbatch] | None = None
        self._update = Updater(
            model, optimizer, objective.loss, max_grad_norm, self.memory, skip=skip_non_finite
        )
        self.evaluation, self._to_row = evaluation, report
        self._window = MetricsWindow()
        self._last_skip: str | None = None

    @property
    def best_step(self) -> int | None:
        """The update with the lowest held-out loss."""
        best = None if self.evaluation is None else self.evaluation.best
        return None if best is None else int(best["step"])

    @property
    def start_is_best(self) -> bool:
        """False: the loss at the start is not compared."""
        return False

    def prepare(self, console: Console) -> str:
        """Nothing to do before the first update."""
        return ""

    def step(
        self,
        progress: Progress,
        learning_rate: float,
        raise_if_interrupted: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Make one update; it is never abandoned.

        Raises:
            TrainingError: The loss or gradient is not finite; nothing was updated.
        """
        began = time.perf_counter()
        if self._stream is None:
            self._stream = self._microbatches(progress.microbatches)
        objective, weights = self._objective, self.weights["policy"]
        # The last update may be smaller, so that every row is visited once per epoch.
        left = self._total_microbatches - progress.microbatches
        count = min(self._accumulation, left) if left > 0 else self._accumulation
        micro = [next(self._stream) for _ in range(count)]
        batches = [objective.collate(one) for one in micro]
        totals = objective.totals(batches)
        batches = objective.prepare(weights, batches, totals)
        collated = collate_microbatches(objective, batches, micro)
        done = self._update(weights, collated, totals, learning_rate)
        self.weights["policy"] = done.weights
        seconds = time.perf_counter() - began

        sizes = [objective.size(one) for one in micro]
        tokens = sum(size for _, size in sizes)
        self.throughput.add([one.shape for one in micro], tokens, seconds)
        metrics, skipped = {}, []
        if done.skipped is None:
            self._window.add(done.loss, done.sums, done.norm, learning_rate)
            weight = done.sums.get("weight", 1.0) or 1.0
            means = {name: v / weight for name, v in done.sums.items() if name != "weight"}
            metrics = {"loss": done.loss, **means, "grad_norm": done.norm}
            metrics["learning_rate"] = learning_rate
        else:
            self._last_skip = done.skipped
            skipped = [f"update {progress.step + 1} skipped: {done.skipped}"]
        return StepResult(
            metrics=metrics,
            microbatches=len(micro),
            groups=sum(groups for groups, _ in sizes),
            tokens=tokens,
            seconds=seconds,
            skipped=skipped,
        )

    def report(self, progress: Progress) -> dict[str, float] | None:
        """Means over the updates since the last report; None if all of them were skipped."""
        if not self._window.updates:
            return None
        row = self._window.row(progress, self.memory.peak_bytes)
        self._window = MetricsWindow(tokens=progress.tokens, seconds=progress.seconds)
        return self._to_row(row)

    def evaluate(self, step: int) -> EvaluationResult | None:
        """Metrics on the held-out groups."""
        if self.evaluation is None:
            return None
        return self.evaluation.evaluate(step, self.weights["policy"])

    def check_trained(self, progress: Progress) -> None:
        """Check that at least one update was made.

        Raises:
            TrainingError: Every update was skipped.
        """
        if progress.skipped == progress.step:
            raise TrainingError(f"every update was skipped: {self._last_skip}")

    def state(self) -> dict[str, Any]:
        """The updates not reported yet, and the best evaluation."""
        best = None if self.evaluation is None else self.evaluation.best
        return {"window": self._window.state(), "best": best}

    def restore(
        self, weights: Mapping[str, AdapterWeights], state: Mapping[str, Any], progress: Progress
    ) -> None:
        """Continue from a checkpoint.

        The last update of an epoch may have been smaller, so the number of updates of a run that is
        made longer follows from its progress.
        """
        self.weights = dict(weights)
        self._window = MetricsWindow.restored(state["window"])
        if self.evaluation is not None:
            self.evaluation.restore_best(state["best"])
        self._model.hold(self.weights["policy"])
        if self._updates is not None:
            left = max(0, self._updates - progress.step) * self._accumulation
            self._total_microbatches = progress.microbatches + left
        else:
            left = max(0, self._total_microbatches - progress.microbatches)
        self.total_steps = progress.step + -(-left // self._accumulation)

    def rate(self) -> float | None:
        """Tokens per second; None if too few updates were timed."""
        return self.throughput.rate()


class Evaluation:
    """Held-out metrics of an offline run. The best result is the lowest loss after an update.

    Args:
        algorithm: Computes the metrics.
        groups: The held-out groups, the same for every evaluation.
        scorer: Runs them.
        reference: Token log-probs of the reference; empty without a reference.
        limit: The limit of batches.

    Attributes:
        best: `step` and `loss` of the best result; None before the first update.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        groups: Sequence[TokenizedGroup],
        scorer: Scorer,
        reference: CompletionLogps,
        limit: BatchLimit,
    ) -> None:
        self._algorithm, self._scorer = algorithm, scorer
        self._groups, self._reference = groups, reference
        self._shapes = plan_shapes(groups, limit) if groups else []
        self.best: dict[str, float] | None = None

    def evaluate(self, step: int, weights: AdapterWeights) -> EvaluationResult | None:
        """Metrics of `weights` after update `step`; None without held-out groups."""
        if not self._groups:
            return None
        if step == 0 and self._algorithm.has_reference:
            # The policy starts as the reference, whose log-probs are known.
            logps = self._reference
        else:
            logps = score_groups(
                self._scorer,
                weights,
                self._groups,
                self._shapes,
                per_token=self._algorithm.per_token,
            )
        metrics = self._algorithm.evaluate(logps, self._reference, self._groups)
        lowest = math.inf if self.best is None else self.best["loss"]
        is_best = step > 0 and metrics["loss"] < lowest
        if is_best:
            self.best = {"step": step, "loss": metrics["loss"]}
        return EvaluationResult(metrics, len(self._groups), is_best)

    def restore_best(self, best: Any) -> None:
        """Restore `best` from a checkpoint.

        Raises:
            KeyError, TypeError, ValueError: It is not a value of `best`.
        """
        if best is not None:
            best = {"step": int(best["step"]), "loss": float(best["loss"])}
        self.best = best


def held_out_groups(valid: Sequence[TokenizedGroup], config: TrainConfig) -> list[TokenizedGroup]:
    """The held-out groups of an evaluation; the same ones every time."""
    if config.val_batches in (None, -1) or not valid:
        return list(valid)
    assert config.val_batches is not None
    wanted = round(config.val_batches * groups_per_batch(valid, batch_limit(config)))
    order = np.random.default_rng(config.seed).permutation(len(valid))
    return [valid[i] for i in sorted(order[:wanted])]
