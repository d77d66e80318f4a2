"""The course of an on-policy run: rollout batch after rollout batch, looked at now and then.

A step is one rollout batch: completions are sampled, rewarded, looked at by policy and reference,
and learned from. Checkpoints lie between steps; one that is cut short is done again from its
start, and comes out the same.
"""

from __future__ import annotations

import time
from pathlib import Path

from mlx_align.config import OnPolicyConfig
from mlx_align.errors import ModelError, TrainingError
from mlx_align.models.roles import Tree
from mlx_align.train import runlog
from mlx_align.train.checkpoint import State, load_checkpoint, save_checkpoint
from mlx_align.train.display import Display
from mlx_align.train.health import Finding, Health, text_metrics
from mlx_align.train.heldout_rewards import HeldOut
from mlx_align.train.learner import Learner
from mlx_align.train.loop import Progress, make_schedule
from mlx_align.train.publish import Publication
from mlx_align.train.rollout_log import RolloutLog
from mlx_align.train.signals import Interrupted, deferring
from mlx_align.train.workplace import Workplace

# By how much the first update's ratios may differ from 1: the policy has not moved yet.
RATIO_TOLERANCE = 1e-3


class Course:
    """A run from its first to its last step.

    Attributes:
        progress: How far it is.
        total: Its rollout batches.
        log: What it writes of them.
    """

    def __init__(
        self,
        config: OnPolicyConfig,
        run: Path,
        display: Display,
        workplace: Workplace,
        watched: HeldOut,
        learner: Learner,
        publication: Publication,
    ) -> None:
        self._config, self._run, self._display = config, run, display
        self._place, self._watched = workplace, watched
        self._learner, self._publication = learner, publication
        self._health = Health()
        self.progress = Progress()
        # Whether the run's health ended it: a run that goes on after that has nothing left to do.
        self._stopped = False
        # Whether a rollout batch is being learned from.
        self._halfway = False
        epochs = (config.epochs or 1.0) * len(workplace.prompts)
        self.total = config.iters or max(1, round(epochs / workplace.prompts_per_batch))
        self._rate = make_schedule(
            config.lr_schedule, config.learning_rate, self.total, config.warmup
        )
        self.log = RolloutLog(config, run, self.total, workplace.memory, display, publication)

    @property
    def _policy(self) -> Tree:
        return self._learner.trees["policy"]

    def begin(self, resume: bool) -> None:
        """Look at where the run starts, or go on where it stopped."""
        found = None
        if resume:
            found = load_checkpoint(
                self._run, self._learner.trees, self._learner.optimizers, self._display.note
            )
        if found is not None:
            self._restore(found)
            runlog.drop_rows_after(self._run, self.progress.step)
            runlog.drop_samples_after(self._run, self.progress.step)
            self._display.note(
                f"Going on after rollout batch {self.progress.step} of {self.total}."
            )
        else:
            if resume:
                self._display.note("No checkpoint yet: from the start.")
            runlog.drop_rows_after(self._run, -1)
            runlog.drop_samples_after(self._run, -1)
            if line := self._learner.begin():
                self._display.note(line)
            self._evaluate()

    def _restore(self, found: State) -> None:
        self.progress = found.progress
        self._learner.trees = dict(found.trees)
        try:
            self._learner.restore(found.extra["learner"])
            self._health = Health.restored(found.extra["health"])
            self._watched.restore(found.extra["held_out"])
            self.log.rows = [dict(row) for row in found.extra["rows"]]
            self._stopped = bool(found.extra["stopped"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ModelError(
                f"{self._run}: its last checkpoint is not one of this command"
            ) from error

    def train(self) -> None:
        """All steps that are left; ends early where the run's health asks for it.

        Raises:
            Interrupted: A signal came; a checkpoint was written.
            TrainingError: A loss is not finite, a reward failed, or the first ratios are not 1.
        """
        total, memory = self.total, self._place.memory
        title = self._learner.title
        with (
            self._display.bar(title, total, self.progress.step) as bar,
            deferring() as pending,
            memory,
            self._publication.training(self.progress.step, total, self.progress.seconds),
        ):
            while self.progress.step < total and not self._stopped:
                try:
                    stops = self._step(pending)
                except _Abandoned:
                    self._save()
                    raise Interrupted(pending[0]) from None
                except TrainingError:
                    # Half of a batch's updates are none to keep, and to hold what was before
                    # them would take another optimizer's memory.
                    if self.progress.step and not self._halfway:
                        self._save()
                    raise
                bar.advance()
                step = self.progress.step
                last = step == total or stops
                best = False
                if last or _due(step, self._config.steps_per_eval):
                    best, found = self._evaluate()
                    stops = self._act_on(found) or stops
                if stops:
                    self.log.flush(self.progress)
                self._stopped = stops
                if pending or best or last or _due(step, self._config.save_every):
                    self._save()
                if pending:
                    raise Interrupted(pending[0])
                if step == total:
                    self._check_learned()

    def _step(self, pending: list[int]) -> bool:
        """One rollout batch with its updates; whether the run has to stop."""
        began = time.perf_counter()
        step = self.progress.step

        def heed() -> None:
            # Nothing has been learned from this batch: it can be drawn again.
            if pending:
                raise _Abandoned

        place, stream = self._place, self._place.stream(self.progress.microbatches)
        rollouts, rewards, taken = place.collect(
            self._policy, stream, step, heed, dynamic=self._learner.dynamic
        )
        heed()
        experience = place.experience(self._policy, rollouts, rewards, taken)
        heed()
        rate = self._rate(step) * self._health.rate_scale
        self._halfway = True
        learned = self._learner.learn(experience, step, rate)
        self._check_ratio(learned.first_deviation)
        self._halfway = False
        self.progress.step += 1
        self.progress.skipped += len(learned.skipped)
        for reason in learned.skipped:
            self._display.note(f"! an update of rollout batch {step + 1} skipped: {reason}")
        self.progress.microbatches += taken
        self.progress.groups += taken
        self.progress.tokens += rollouts.tokens
        self.progress.seconds += time.perf_counter() - began
        row = {
            **experience.metrics(),
            **learned.metrics,
            **text_metrics([ids.tolist() for ids in rollouts.completions()]),
            "learning_rate": rate,
        }
        if self._learner.dynamic:
            row["dynamic/replaced"] = experience.dropped
        self.log.add(experience, row, self.progress, time.perf_counter() - began)
        return self._act_on(self._health.look(row, self.progress.step))

    def _check_learned(self) -> None:
        """Refuse to call it a run where updates were skipped and none was made."""
        optimizers = self._learner.optimizers.values()
        if self.progress.skipped and not any(one.step.item() for one in optimizers):
            raise TrainingError(
                f"every update was skipped, all {self.progress.skipped}: no loss was finite; "
                "lower --learning-rate, and look at the rewards"
            )

    def _check_ratio(self, deviation: float | None) -> None:
        if deviation is not None and not deviation <= RATIO_TOLERANCE:
            raise TrainingError(
                f"in the first update the ratios of new to old policy differ from 1 by "
                f"{deviation:.1e} on average, although nothing was learned yet: a bug, or a model "
                "whose outputs depend on its batch; please report it, with the model's name"
            )

    def _act_on(self, found: list[Finding]) -> bool:
        """Say what is wrong; whether to stop."""
        for finding in found:
            self._display.note(f"! {finding.text}")
        return self._config.guard and any(finding.level == "stop" for finding in found)

    def _evaluate(self) -> tuple[bool, list[Finding]]:
        """Look at held-out prompts: whether they were never answered better, and what is wrong."""
        metrics = self._watched.look(self._policy)
        if metrics is None:
            return False, []
        self.log.evaluated(metrics, self.progress)
        best = self._watched.best_so_far(metrics, self.progress.step)
        proxy_and_held_out = self._watched.deviations(metrics)
        if proxy_and_held_out is None:
            return best, []
        return best, self._health.look_at_evaluation(*proxy_and_held_out)

    def _save(self) -> None:
        extra = {
            "learner": self._learner.state(),
            "health": self._health.state(),
            "held_out": self._watched.state(),
            "rows": self.log.rows,
            "stopped": self._stopped,
        }
        trees, optimizers = self._learner.trees, self._learner.optimizers
        policy = self._place.policy
        save_checkpoint(
            self._run,
            State(self.progress, trees, optimizers, extra),
            policy.layout,
            str(policy.model.folder.path),
            best=self._watched.best_step,
        )


class _Abandoned(Exception):
    """A rollout batch was cut short before anything was learned from it."""


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
