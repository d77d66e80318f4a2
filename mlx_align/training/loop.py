"""The training loop shared by all algorithms: step, log, evaluate, checkpoint, stop on signals.

A `Trainer` makes the steps: optimizer updates on given completions, or rollout batches with their
updates. Checkpoints are written between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.optimizers as optim

from mlx_align.algorithms.update import make_schedule
from mlx_align.config import LossConfig, OnPolicyConfig, TrainConfig
from mlx_align.errors import ConfigError, ModelError, TrainingError
from mlx_align.models.policy import Policy
from mlx_align.models.weights import AdapterWeights
from mlx_align.system.formatting import format_duration, format_metrics
from mlx_align.system.interrupts import Interrupted, defer_signals
from mlx_align.system.intervals import AUC, metric_interval
from mlx_align.system.memory_limit import MemoryLimit
from mlx_align.system.progress import Console
from mlx_align.tracking.diagnostics import Finding, HealthMonitor
from mlx_align.tracking.run_dir import (
    append_metrics,
    replace_held_out_metrics,
    truncate_metrics,
    truncate_samples,
)
from mlx_align.training.callbacks import Callbacks
from mlx_align.training.checkpoint import (
    State,
    checkpoint_folder,
    has_checkpoint,
    load_checkpoint,
    publish_adapter,
    read_adapter,
    save_checkpoint,
)
from mlx_align.training.defaults import TARGET_ACCURACY
from mlx_align.training.evaluation import EvaluationResult
from mlx_align.training.metrics import Progress, StepResult

# The entries of a trainer's state that hold results on held-out data.
HELD_OUT_STATE = ("best", "held_out")
# Of the state of an algorithm, what `prepare` measured on rewards.
MEASURED_REWARDS = ("reward_mean", "reward_deviation")


class StepAbandoned(Exception):
    """A step was stopped by a signal, before it changed anything."""


@dataclass(frozen=True)
class Changes:
    """What differs when a run is resumed, as far as the loop has to act on it.

    Attributes:
        length: Whether the run is to have another number of steps.
        held_out: Whether held-out metrics can't be compared with earlier ones: the start of the run
            is measured again.
        rewards: Whether rewards differ: what is derived from them is measured again.
    """

    length: bool = False
    held_out: bool = False
    rewards: bool = False


class Trainer(Protocol):
    """The steps of one kind of run, and the state they share.

    Attributes:
        title: Label of the progress bar.
        step_name: The name of a step in messages: "update" or "batch".
        on_policy: Whether steps sample completions.
        total_steps: Steps of the whole run; known for sure once the run has begun.
        memory: Bounds how far mlx runs ahead, and knows the peak.
        mid_step: Whether some but not all updates of a step were made. Such a state is not saved.
    """

    title: str
    step_name: str
    on_policy: bool
    total_steps: int
    memory: MemoryLimit
    mid_step: bool

    @property
    def weights(self) -> Mapping[str, AdapterWeights]:
        """The trained weights, by name; `policy` comes first."""

    @property
    def optimizers(self) -> Mapping[str, optim.Optimizer]:
        """The optimizers, by name."""

    @property
    def best_step(self) -> int | None:
        """The step with the best held-out result so far, of those after the start."""

    @property
    def start_is_best(self) -> bool:
        """Whether no held-out result is better than that of the start."""

    def prepare(self, console: Console) -> str:
        """Called before the first step of a new run; returns a line to show, or ""."""

    def step(
        self, progress: Progress, learning_rate: float, raise_if_interrupted: Callable[[], None]
    ) -> StepResult:
        """Make the next step.

        Args:
            progress: The progress of the run.
            learning_rate: The learning rate of this step.
            raise_if_interrupted: Raises `StepAbandoned` after a signal. Called as long as the step
                can still be abandoned.

        Raises:
            TrainingError: A loss or gradient is not finite, or a reward failed.
        """

    def report(self, progress: Progress) -> dict[str, float] | None:
        """A row of metrics over the steps since the last report; None if there is nothing new."""

    def evaluate(self, step: int) -> EvaluationResult | None:
        """Held-out metrics of the current weights; None without held-out data."""

    def check_trained(self, progress: Progress) -> None:
        """Called after the last step.

        Raises:
            TrainingError: Every update of the run was skipped.
        """

    def rate(self) -> float | None:
        """Tokens or completions per second; None if too few steps were timed."""

    def state(self) -> dict[str, Any]:
        """State for a checkpoint besides weights, optimizers and progress; JSON-serialisable."""

    def restore(
        self, weights: Mapping[str, AdapterWeights], state: Mapping[str, Any], progress: Progress
    ) -> None:
        """Continue from a checkpoint; the optimizers are restored already.

        Args:
            weights: The trained weights.
            state: What `state` returned.
            progress: The progress of the run, from which the remaining steps follow.

        Raises:
            KeyError, TypeError, ValueError: The state is not one of this trainer.
        """


class TrainingLoop:
    """Runs a trainer from its first, or last saved, step to its last.

    Attributes:
        progress: The progress of the run.
        stopped: Whether a callback or a failed health check ended the run early.
    """

    def __init__(
        self,
        trainer: Trainer,
        policy: Policy,
        config: TrainConfig,
        run: Path,
        console: Console,
        callbacks: Callbacks,
        health: HealthMonitor,
    ) -> None:
        self._trainer, self._policy, self._config = trainer, policy, config
        self._run, self._console, self._callbacks = run, console, callbacks
        self._health = health
        self._guard = isinstance(config, OnPolicyConfig) and config.guard
        self.progress = Progress()
        self.stopped = False
        # Held-out metrics before training; callbacks get them when training begins.
        self._start_metrics: dict[str, float] | None = None

    def begin(self, *, resume: bool, changes: Changes | None = None) -> None:
        """Evaluate a new run before training, or restore the last checkpoint.

        Args:
            resume: Whether to restore the last checkpoint, if there is one.
            changes: What is different from the earlier part of the run.

        Raises:
            ModelError: The checkpoints are damaged, or not of this run.
            ConfigError: The run is already as long as it is to become.
        """
        trainer, changes = self._trainer, changes or Changes()
        baseline = None
        if resume and has_checkpoint(self._run):
            if changes.rewards and (line := trainer.prepare(self._console)):
                self._console.note(line)
            if changes.held_out:
                # Before the checkpoint is restored, the weights are those of the start.
                baseline = trainer.evaluate(0)
        fresh = trainer.state()
        found = None
        if resume:
            found = load_checkpoint(
                self._run, trainer.weights, trainer.optimizers, self._console.note
            )
        if found is not None:
            self._restore(found, fresh, changes)
        done = -1 if found is None else self.progress.step
        truncate_metrics(self._run, done)
        truncate_samples(self._run, done)
        if found is not None:
            if changes.held_out:
                self._replace_baseline(baseline)
            self._console.note(
                f"Resuming after {trainer.step_name} {done} of {trainer.total_steps}."
            )
            if changes.length:
                self._announce_length()
            return
        if resume:
            self._console.note("No checkpoint yet: starting from the beginning.")
        if line := trainer.prepare(self._console):
            self._console.note(line)
        self._evaluate()

    def _replace_baseline(self, baseline: EvaluationResult | None) -> None:
        """Put new metrics of the start in the place of held-out metrics so far."""
        row = None
        if baseline is not None:
            row = {"step": 0, **{f"eval/{name}": v for name, v in baseline.metrics.items()}}
        kept = replace_held_out_metrics(self._run, row)
        self._health.forget_evaluations()
        if kept is not None:
            self._console.note(
                f"Earlier held-out metrics are in {kept}; the start is measured again."
            )
        if baseline is not None:
            self._health.observe_evaluation(baseline.metrics, 0, baseline.deviations)

    def _announce_length(self) -> None:
        """Say what the new number of steps means for the learning rate.

        Raises:
            ConfigError: The run has as many steps already.
        """
        trainer, config, done = self._trainer, self._config, self.progress.step
        name = trainer.step_name
        option = "--iters" if config.epochs is None else f"--epochs {config.epochs:g}"
        if trainer.total_steps <= done:
            raise ConfigError(
                f"{option}: the run is after {name} {done} already; give a larger number"
            )
        if self.stopped:
            raise ConfigError(
                f"{option}: a health check ended the run after {name} {done}, so it is not "
                f"continued; start a new run from it with --init-adapter {self._run}"
            )
        self._console.note(
            f"Training to {name} {trainer.total_steps}. The learning rate continues as in a run "
            f"begun with this length ({config.lr_schedule} schedule): {self._rate(done):.3g} at "
            f"{name} {done + 1}."
        )

    def _rate(self, step: int) -> float:
        """The learning rate of step 0, 1, …, without the reductions of the health checks."""
        config = self._config
        total = self._trainer.total_steps
        return make_schedule(config.lr_schedule, config.rate, total, config.warmup)(step)

    def run(self) -> None:
        """Make all remaining steps.

        Raises:
            Interrupted: A signal came. A checkpoint was written, unless it was the second signal.
            TrainingError: A loss is not finite, or a reward failed. The last good state is saved.
        """
        trainer, total = self._trainer, self._trainer.total_steps
        mx.reset_peak_memory()
        with (
            self._console.bar(trainer.title, total, self.progress.step) as bar,
            defer_signals() as pending,
            trainer.memory,
            self._callbacks.training(self.progress, total),
        ):

            def raise_if_interrupted() -> None:
                if pending:
                    raise StepAbandoned

            if self._start_metrics is not None:
                self._callbacks.on_evaluate(0, self._start_metrics)
            while self.progress.step < total and not self.stopped:
                stop = self._step(raise_if_interrupted, pending)
                bar.advance()
                step, best = self.progress.step, False
                last = stop or step == total
                if last or _due(step, self._config.steps_per_eval or 0):
                    best, stop_now = self._evaluate()
                    stop = stop or stop_now
                if stop:
                    self._report(last=True)
                self.stopped = stop
                if pending or best or last or _due(step, self._config.save_every):
                    self._save()
                if pending:
                    raise Interrupted(pending[0])
            self._act_on(self._health.finish())

    def kept_adapter(self) -> tuple[int, AdapterWeights]:
        """The step whose adapter the run keeps, and its weights.

        That is the best one on held-out data with `--keep best`, and in an on-policy run that was
        ended early, because its last policy has failed a health check.
        """
        trainer, config, last = self._trainer, self._config, self.progress.step
        weights = next(iter(trainer.weights.values()))
        early = trainer.on_policy and last < trainer.total_steps
        if early and trainer.start_is_best:
            self._note_kept(0)
            return 0, self._policy.start
        best = trainer.best_step
        if best in (None, last) or not (early or config.keep == "best"):
            return last, weights
        found = read_adapter(self._run, best)
        if found is None:
            where = checkpoint_folder(self._run, best)
            self._console.note(f"! {where} is damaged: the last adapter is kept, not the best.")
            return last, weights
        self._note_kept(best)
        return best, found

    def _note_kept(self, step: int) -> None:
        trainer, last = self._trainer, self.progress.step
        name = trainer.step_name
        which = f"of {name} {step}" if step else "of the start"
        stopped = f" The run ended early, after {name} {last} of {trainer.total_steps}."
        self._console.note(
            f"Keeping the adapter {which}, the best on held-out data; the last is in "
            f"{checkpoint_folder(self._run, last)}."
            + (stopped if last < trainer.total_steps else "")
        )

    def _step(self, raise_if_interrupted: Callable[[], None], pending: list[int]) -> bool:
        """Make a step and report it. Returns whether the run has to stop."""
        trainer, progress = self._trainer, self.progress
        rate = self._rate(progress.step) * self._health.lr_scale
        try:
            result = trainer.step(progress, rate, raise_if_interrupted)
        except StepAbandoned:
            self._save()
            raise Interrupted(pending[0]) from None
        except TrainingError:
            # Between the updates of a rollout batch there is no complete state to save. Keeping the
            # state before them would take the memory of another optimizer.
            if progress.step and not trainer.mid_step:
                self._save()
            raise
        progress.add(result)
        for line in result.skipped:
            self._console.note(f"! {line}")
        if progress.step == trainer.total_steps:
            trainer.check_trained(progress)
        stop = self._callbacks.on_step_end(progress.step, result.metrics)
        due = _due(progress.step, self._config.steps_per_report)
        row = None
        if progress.step in (1, trainer.total_steps) or due:
            row = self._report()
        # Rollout batches are checked one by one: they are large, and a policy can degrade within a
        # few. Offline updates are noisy, so the means of a report are checked.
        checked = result.metrics if trainer.on_policy else row
        if checked:
            stop = self._act_on(self._health.observe(checked, progress.step)) or stop
        return stop

    def _report(self, *, last: bool = False) -> dict[str, float] | None:
        """Write and show the metrics since the last report. Returns the row, or None if empty.

        Args:
            last: Whether the run ends here, so that no time is left.
        """
        row = self._trainer.report(self.progress)
        if row is None:
            return None
        progress, total = self.progress, self._trainer.total_steps
        if progress.skipped:
            row["skipped"] = progress.skipped
        append_metrics(self._run, row)
        steps = 0 if last else total - progress.step
        left = format_duration(steps * progress.seconds / progress.step)
        where = f"{self._trainer.step_name} {progress.step}/{total}"
        self._console.note(f"  {where}: {format_metrics(row)}, {left} left")
        self._callbacks.on_log(progress.step, row)
        return row

    def _evaluate(self) -> tuple[bool, bool]:
        """Evaluate held-out data. Returns whether the result is the best, and whether to stop."""
        step = self.progress.step
        result = self._trainer.evaluate(step)
        if result is None:
            return False, False
        row = {f"eval/{name}": value for name, value in result.metrics.items()}
        append_metrics(self._run, {"step": step, **row})
        stop = False
        if step:
            self._console.note(
                f"  held-out after {step}: {format_metrics(result.metrics, result.examples)}"
            )
            stop = self._callbacks.on_evaluate(step, result.metrics)
            stop = self._reached_target(result) or stop
        else:
            self._start_metrics = result.metrics
        findings = self._health.observe_evaluation(result.metrics, step, result.deviations)
        stop = self._act_on(findings) or stop
        return result.is_best, stop

    def _reached_target(self, result: EvaluationResult) -> bool:
        """Whether the preference is learned, as `target_margin` defines it; says so."""
        target = self._config.target_margin if isinstance(self._config, LossConfig) else None
        step, total = self.progress.step, self._trainer.total_steps
        if not target or step == total:
            return False
        metrics = result.metrics
        margin = metric_interval(metrics, "rewards/margins", result.examples)
        rate = metrics.get(AUC, metrics.get("rewards/accuracies", 0.0))
        if margin is None or margin.low <= target or rate < TARGET_ACCURACY:
            return False
        ranked = (
            f"a good held-out completion ranks above a bad one in {rate:.0%}, and the"
            if AUC in metrics
            else f"{rate:.0%} of the held-out pairs are right, and their"
        )
        self._console.note(
            f"The preference is learned: {ranked} margin is above {target:g} (95% interval). "
            f"Ending after {step} of {total} updates; --resume with --epochs trains on. "
            "(--target-margin)"
        )
        return True

    def _act_on(self, findings: list[Finding]) -> bool:
        """Show new findings. Returns whether the run has to stop."""
        for finding in findings:
            self._console.note(f"! {finding.text}")
        return self._guard and self._health.stop is not None

    def _restore(self, found: State, fresh: Mapping[str, Any], changes: Changes) -> None:
        """Restore a checkpoint, but what depends on changed inputs from `fresh`, a new state."""
        extra = dict(found.extra)
        if changes.held_out:
            extra.update({name: fresh[name] for name in HELD_OUT_STATE if name in fresh})
        if changes.rewards and "learner" in fresh:
            measured = {k: v for k, v in fresh["learner"].items() if k in MEASURED_REWARDS}
            extra["learner"] = {**extra.get("learner", {}), **measured}
        try:
            self._trainer.restore(found.weights, extra, found.progress)
            if "health" in extra:
                self._health.restore(extra["health"])
            self.stopped = bool(extra.get("stopped", False))
            # More steps replace the decision of a callback to stop, but not that of the guard.
            if changes.length and not (self._guard and self._health.stopped_run):
                self.stopped = False
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ModelError(
                f"{self._run}: its last checkpoint is not one of this command"
            ) from error
        self.progress = found.progress

    def _save(self) -> None:
        trainer = self._trainer
        extra = {
            **trainer.state(),
            "health": self._health.state(),
            "stopped": self.stopped,
        }
        save_checkpoint(
            self._run,
            State(self.progress, trainer.weights, trainer.optimizers, extra),
            self._policy.layout,
            str(self._policy.model.folder.path),
            best=trainer.best_step,
        )
        best = trainer.best_step if self._config.keep == "best" else None
        publish_adapter(self._run, self.progress.step if best is None else best)
        self._callbacks.on_save(
            self.progress.step, checkpoint_folder(self._run, self.progress.step)
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
