"""What one step of a run is: an update on given completions, or a rollout batch with its updates.

Both classes implement `loop.Trainer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.optimizers as optim
import numpy as np

from mlx_align.algorithms.base import Objective, OnPolicyAlgorithm
from mlx_align.algorithms.update import Updater, collate_microbatches
from mlx_align.config import OnPolicyConfig
from mlx_align.data.batching import Microbatch
from mlx_align.errors import TrainingError
from mlx_align.models.loading import LanguageModel
from mlx_align.models.weights import AdapterWeights
from mlx_align.rollout.collector import RolloutBatch, RolloutCollector
from mlx_align.rollout.reward_functions import as_data
from mlx_align.system.memory_limit import MemoryLimit
from mlx_align.tracking.diagnostics import text_metrics
from mlx_align.tracking.run_dir import append_samples
from mlx_align.training.evaluation import Evaluation, EvaluationResult, RolloutEvaluation
from mlx_align.training.metrics import (
    MIN_TIMED_STEPS,
    MetricsWindow,
    Progress,
    StepResult,
    Throughput,
    mean_row,
)

# Largest mean |ratio − 1| in the first update of a rollout batch: the policy has not changed yet.
RATIO_TOLERANCE = 1e-3


class OfflineTrainer:
    """Steps that are one optimizer update on given completions.

    Accumulating microbatches gives the gradient of one large batch.

    Args:
        model: The base model; it holds the current weights between steps.
        objective: What to minimise.
        microbatches: (position) -> the microbatches from that position of the data on.
        weights: The weights to start from.
        optimizer: Initialised for them.
        accumulation: Microbatches per update.
        max_grad_norm: Gradients with a larger norm are scaled down to it.
        skip_non_finite: Skip updates whose loss or gradient is not finite.
        total_microbatches: Microbatches of the whole run; the last update may have fewer. 0 for
            no end.
        title: Label of the progress bar.
        evaluation: Measures held-out data; None for none.
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
        skip_non_finite: bool = False,
        total_microbatches: int = 0,
        title: str = "",
        evaluation: Evaluation | None = None,
        report: Callable[[dict[str, float]], dict[str, float]] = dict,
    ) -> None:
        self.title, self.total_steps = title, -(-total_microbatches // accumulation)
        self._total_microbatches = total_microbatches
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

    def prepare(self) -> str:
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
        """Refuse a run in which every update was skipped.

        Raises:
            TrainingError: Every update was skipped.
        """
        if progress.skipped == progress.step:
            raise TrainingError(f"every update was skipped: {self._last_skip}")

    def state(self) -> dict[str, Any]:
        """The updates not reported yet, and the best evaluation."""
        best = None if self.evaluation is None else self.evaluation.best
        return {"window": self._window.state(), "best": best}

    def restore(self, weights: Mapping[str, AdapterWeights], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.weights = dict(weights)
        self._window = MetricsWindow.restored(state["window"])
        if self.evaluation is not None:
            self.evaluation.restore_best(state["best"])
        self._model.hold(self.weights["policy"])

    def rate(self) -> float | None:
        """Tokens per second; None if too few updates were timed."""
        return self.throughput.rate()


class OnPolicyTrainer:
    """Steps that are one rollout batch: sample, reward, compute log-probs, update.

    Args:
        algorithm: Makes the updates.
        collector: Samples and rewards completions.
        evaluation: Measures held-out prompts.
        config: The options.
        run: The run folder; completions are added to its samples.jsonl.
    """

    step_name = "batch"
    on_policy = True

    def __init__(
        self,
        algorithm: OnPolicyAlgorithm,
        collector: RolloutCollector,
        evaluation: RolloutEvaluation,
        config: OnPolicyConfig,
        run: Path,
    ) -> None:
        self.algorithm, self.title = algorithm, algorithm.title
        self.collector, self.evaluation = collector, evaluation
        self.memory = collector.memory
        self.mid_step = False
        epochs = (config.epochs or 1.0) * len(collector.prompts)
        self.total_steps = config.iters or max(1, round(epochs / collector.prompts_per_batch))
        self._run = run
        # Metrics of the rollout batches since the last report.
        self._rows: list[dict[str, float]] = []
        # Completions per second of the rollout batches of this process.
        self._rates: list[float] = []

    @property
    def weights(self) -> dict[str, AdapterWeights]:
        """The algorithm's weights, by name."""
        return self.algorithm.weights

    @property
    def optimizers(self) -> dict[str, optim.Optimizer]:
        """The algorithm's optimizers, by name."""
        return self.algorithm.optimizers

    @property
    def best_step(self) -> int | None:
        """The rollout batch after which the held-out reward was highest; 0 is the start."""
        return self.evaluation.best_step

    def prepare(self) -> str:
        """Run the algorithm's preparation."""
        return self.algorithm.prepare()

    def step(
        self,
        progress: Progress,
        learning_rate: float,
        raise_if_interrupted: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Collect a rollout batch and make its updates.

        Until the first update, nothing has changed: an abandoned batch is sampled again and comes
        out the same.

        Raises:
            TrainingError: A loss is not finite, a reward failed, or the ratios of the first update
                are not 1.
        """
        began = time.perf_counter()
        step, algorithm = progress.step, self.algorithm
        batch = self.collector.collect(
            self.weights["policy"],
            progress.microbatches,
            step,
            raise_if_interrupted,
            dynamic_sampling=algorithm.dynamic_sampling,
        )
        self.mid_step = True
        result = algorithm.update(batch, step, learning_rate)
        _check_ratio(result.first_ratio_deviation)
        self.mid_step = False
        completions = batch.completions
        metrics = {
            **batch.metrics(),
            **result.metrics,
            **text_metrics([ids.tolist() for ids in completions.token_ids()]),
            "learning_rate": learning_rate,
        }
        if algorithm.dynamic_sampling:
            metrics["dynamic/replaced"] = batch.dropped
        seconds = time.perf_counter() - began
        append_samples(self._run, sample_rows(batch, step + 1))
        self._rates.append(len(completions.texts) / seconds)
        self._rows.append({**metrics, "tokens_per_second": completions.num_tokens / seconds})
        return StepResult(
            metrics=metrics,
            microbatches=batch.prompts_drawn,
            groups=batch.prompts_drawn,
            tokens=completions.num_tokens,
            seconds=seconds,
            skipped=[
                f"an update of rollout batch {step + 1} skipped: {reason}"
                for reason in result.skipped
            ],
        )

    def report(self, progress: Progress) -> dict[str, float] | None:
        """Means over the rollout batches since the last report."""
        if not self._rows:
            return None
        row = mean_row(self._rows, progress, self.memory.peak_bytes)
        self._rows = []
        return row

    def evaluate(self, step: int) -> EvaluationResult | None:
        """Metrics on the held-out prompts."""
        return self.evaluation.evaluate(step, self.weights["policy"])

    def check_trained(self, progress: Progress) -> None:
        """Refuse a run in which every update was skipped.

        Raises:
            TrainingError: No optimizer made an update.
        """
        made = any(one.step.item() for one in self.optimizers.values())
        if progress.skipped and not made:
            raise TrainingError(
                f"every update was skipped, all {progress.skipped}: no loss was finite; lower "
                "--learning-rate, and check the rewards"
            )

    def state(self) -> dict[str, Any]:
        """State of algorithm and evaluation, and the batches not reported yet."""
        return {
            "learner": self.algorithm.state(),
            "held_out": self.evaluation.state(),
            "rows": self._rows,
        }

    def restore(self, weights: Mapping[str, AdapterWeights], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.algorithm.weights = dict(weights)
        self.algorithm.restore(state["learner"])
        self.evaluation.restore(state["held_out"])
        self._rows = [dict(row) for row in state["rows"]]

    def rate(self) -> float | None:
        """Completions per second, the median, because early batches also compile.

        None if too few rollout batches were timed.
        """
        if len(self._rates) < MIN_TIMED_STEPS:
            return None
        return float(np.median(self._rates))


def sample_rows(batch: RolloutBatch, step: int) -> list[dict[str, Any]]:
    """Rows of samples.jsonl: the completions of a rollout batch and their rewards."""
    completions, rewards = batch.completions, batch.rewards
    size = completions.group_size
    return [
        {
            "step": step,
            "source": completions.groups[n // size].source,
            "prompt": as_data(completions.prompts[n // size].text.prompt),
            "completion": text,
            "ended": bool(completions.finished[n]),
            "tokens": int(completions.lengths[n]),
            "reward": float(rewards.total[n]),
            "rewards": dict(zip(rewards.names, map(float, rewards.values[n]), strict=True)),
            "kl": float(batch.kl_by_completion[n]),
        }
        for n, text in enumerate(completions.texts)
    ]


def _check_ratio(deviation: float | None) -> None:
    if deviation is not None and not deviation <= RATIO_TOLERANCE:
        raise TrainingError(
            "in the first update of a rollout batch, the probability ratios of new to old policy "
            f"differ from 1 by {deviation:.1e} on average, before anything was updated: a bug, or "
            "a model whose outputs depend on its batch; please report it, with the model's name"
        )
