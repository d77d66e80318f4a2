"""An on-policy run from options to run folder: what ppo and grpo have in common.

A step is one rollout batch: completions are sampled, rewarded, looked at by policy and reference,
and learned from. Checkpoints lie between steps; one that is cut short is done again from its
start, and comes out the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_align.config import OnPolicyConfig
from mlx_align.errors import ModelError, TrainingError
from mlx_align.models.adapters import ADAPTER_WEIGHTS, save_adapter
from mlx_align.models.compat import read_tensors
from mlx_align.models.loading import open_model
from mlx_align.models.roles import Tree
from mlx_align.plan.machine import this_machine
from mlx_align.plan.timing import rate_key, store_rate
from mlx_align.rollout.rewards import as_data
from mlx_align.train import runlog
from mlx_align.train.checkpoint import FOLDER, State, load_checkpoint, save_checkpoint
from mlx_align.train.display import Display
from mlx_align.train.health import Finding, Health, text_metrics
from mlx_align.train.heldout import answers, prompt_texts
from mlx_align.train.heldout_rewards import HeldOut
from mlx_align.train.loop import Progress, make_schedule
from mlx_align.train.on_policy_setup import Prepared, prepare_on_policy, set_up
from mlx_align.train.opening import opened
from mlx_align.train.pace import ENOUGH
from mlx_align.train.publish import Publication
from mlx_align.train.signals import Interrupted, deferring
from mlx_align.train.task import how_to_talk
from mlx_align.train.trackers import check_trackers
from mlx_align.train.workplace import Experience, Learned, Workplace

# By how much the first update's ratios may differ from 1: the policy has not moved yet.
RATIO_TOLERANCE = 1e-3


class Learner(Protocol):
    """What makes ppo and grpo differ from another.

    Attributes:
        title: What the progress bar says.
        dynamic: Whether prompts whose completions all earn the same are replaced by others.
        trees: What is trained, by name; `policy` first.
        optimizers: By name.
    """

    title: str
    dynamic: bool
    trees: dict[str, Tree]
    optimizers: dict[str, optim.Optimizer]

    def begin(self) -> str:
        """Before the first rollout batch of a new run; a line to show."""

    def learn(self, experience: Experience, step: int, rate: float) -> Learned:
        """The updates of the rollout batch `step` (from 0 on)."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold beside trees and optimizers, as JSON has it."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""


MakeLearner = Callable[[Any, Workplace], Learner]


def run_on_policy(
    make_learner: MakeLearner,
    command: str,
    config: OnPolicyConfig,
    run: Path,
    display: Display,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Train and write the run folder; the content of its summary.json, and the samples.

    What can be wrong with options, data and tokenizer is found before the weights are loaded.

    Args:
        make_learner: (options, workplace) -> the learner.
        command: Its name.
        config: Resolved options; `model` and `data` are set.
        run: The run folder; made once data and options are found good.
        display: Where the run speaks.
        resume: Go on from the folder's last checkpoint.

    Raises:
        MlxAlignError: Something is the user's to mend.
        Interrupted: A signal ended the run, after a checkpoint.
    """
    assert config.model is not None
    began = time.perf_counter()
    check_trackers(config)
    folder = open_model(config.model)
    prepared = prepare_on_policy(command, config, folder)
    display.note("\n".join(prepared.lines))
    with ExitStack() as stack:
        stack.enter_context(opened(run, config, prepared.made_of, display.note, resume=resume))
        publication = Publication(run, command, config, prepared.facts, display)
        workplace, watched = set_up(config, folder, prepared, stack, display)
        learner = make_learner(config, workplace)
        course = _Course(
            command,
            config,
            run,
            display,
            workplace,
            prepared,
            watched,
            learner,
            publication,
        )
        before = course.begin(resume)
        course.train()
        summary = course.finish(before)
    summary = {
        "command": command,
        **summary,
        "seconds_in_all": time.perf_counter() - began,
        "talk": how_to_talk(folder, run),
    }
    runlog.write_json(run / runlog.SUMMARY_FILE, summary)
    publication.finish()
    return {**summary, "samples": course.samples}


class _Course:
    """A run from its first to its last step."""

    def __init__(
        self,
        command: str,
        config: OnPolicyConfig,
        run: Path,
        display: Display,
        workplace: Workplace,
        prepared: Prepared,
        watched: HeldOut,
        learner: Learner,
        publication: Publication,
    ) -> None:
        self._command, self._config, self._run, self._display = command, config, run, display
        self._place, self._prepared, self._watched = workplace, prepared, watched
        self._learner, self._publication = learner, publication
        self._health = Health()
        self._progress = Progress()
        self._rows: list[dict[str, float]] = []
        # Completions and seconds of the rollout batches of this process.
        self._paces: list[tuple[int, float]] = []
        # Whether the run's health ended it: a run that goes on after that has nothing left to do.
        self._stopped = False
        self.samples: list[dict[str, Any]] = []
        per_batch = workplace.prompts_per_batch
        epochs = (config.epochs or 1.0) * len(workplace.prompts)
        self._total = config.iters or max(1, round(epochs / per_batch))
        self._rate = make_schedule(
            config.lr_schedule, config.learning_rate, self._total, config.warmup
        )

    @property
    def _policy(self) -> Tree:
        return self._learner.trees["policy"]

    def begin(self, resume: bool) -> list[str]:
        """Look at where the run starts, or go on where it stopped; the first answers."""
        found = None
        if resume:
            found = load_checkpoint(
                self._run, self._learner.trees, self._learner.optimizers, self._display.note
            )
        if found is not None:
            self._restore(found)
            runlog.drop_rows_after(self._run, self._progress.step)
            runlog.drop_samples_after(self._run, self._progress.step)
            self._display.note(
                f"Going on after rollout batch {self._progress.step} of {self._total}."
            )
        else:
            if resume:
                self._display.note("No checkpoint yet: from the start.")
            runlog.drop_rows_after(self._run, -1)
            runlog.drop_samples_after(self._run, -1)
            if line := self._learner.begin():
                self._display.note(line)
            self._evaluate()
        return self._answers(self._place.policy.start)

    def _restore(self, found: State) -> None:
        self._progress = found.progress
        self._learner.trees = dict(found.trees)
        try:
            self._learner.restore(found.extra["learner"])
            self._health = Health.restored(found.extra["health"])
            self._watched.restore(found.extra["held_out"])
            self._rows = [dict(row) for row in found.extra["rows"]]
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
        total, memory = self._total, self._place.memory
        title = self._learner.title
        with (
            self._display.bar(title, total, self._progress.step) as bar,
            deferring() as pending,
            memory,
            self._publication.training(self._progress.step, total, self._progress.seconds),
        ):
            while self._progress.step < total and not self._stopped:
                undo = self._restorer()
                try:
                    stops = self._step(pending)
                except _Abandoned:
                    self._save()
                    raise Interrupted(pending[0]) from None
                except TrainingError:
                    undo()  # some of the batch's updates may have been made
                    self._save()
                    raise
                bar.advance()
                step = self._progress.step
                last = step == total or stops
                best = False
                if last or _due(step, self._config.steps_per_eval):
                    best, found = self._evaluate()
                    stops = self._act_on(found) or stops
                if stops:
                    self._report_rows()
                self._stopped = stops
                if pending or best or last or _due(step, self._config.save_every):
                    self._save()
                if pending:
                    raise Interrupted(pending[0])
                if step == total:
                    self._check_learned()

    def _restorer(self) -> Callable[[], None]:
        """A function that puts what is trained back to where it is now."""
        learner = self._learner
        trees, state = dict(learner.trees), learner.state()
        # Updates put new arrays into an optimizer's state, so its structure has to be copied.
        kept = {name: tree_map(lambda a: a, one.state) for name, one in learner.optimizers.items()}

        def undo() -> None:
            learner.trees = trees
            learner.restore(state)
            for name, optimizer in learner.optimizers.items():
                optimizer.state = kept[name]

        return undo

    def _step(self, pending: list[int]) -> bool:
        """One rollout batch with its updates; whether the run has to stop."""
        began = time.perf_counter()
        step = self._progress.step

        def heed() -> None:
            # Nothing has been learned from this batch: it can be drawn again.
            if pending:
                raise _Abandoned

        place, stream = self._place, self._place.stream(self._progress.microbatches)
        rollouts, rewards, taken = place.collect(
            self._policy, stream, step, heed, dynamic=self._learner.dynamic
        )
        heed()
        experience = place.experience(self._policy, rollouts, rewards, taken)
        heed()
        rate = self._rate(step) * self._health.rate_scale
        learned = self._learner.learn(experience, step, rate)
        self._check_ratio(learned.first_deviation)
        self._progress.step += 1
        self._progress.skipped += len(learned.skipped)
        for reason in learned.skipped:
            self._display.note(f"! an update of rollout batch {step + 1} skipped: {reason}")
        self._progress.microbatches += taken
        self._progress.groups += taken
        self._progress.tokens += rollouts.tokens
        self._progress.seconds += time.perf_counter() - began
        self._paces.append((len(rollouts.texts), time.perf_counter() - began))
        row = {
            **experience.metrics(),
            **learned.metrics,
            **text_metrics([ids.tolist() for ids in rollouts.completions()]),
            "learning_rate": rate,
        }
        if self._learner.dynamic:
            row["dynamic/replaced"] = experience.dropped
        runlog.append_samples(self._run, _sampled(experience, self._progress.step))
        self._report(row, rollouts.tokens, time.perf_counter() - began)
        return self._act_on(self._health.look(row, self._progress.step))

    def _check_learned(self) -> None:
        """Refuse to call it a run where updates were skipped and none was made."""
        optimizers = self._learner.optimizers.values()
        if self._progress.skipped and not any(one.step.item() for one in optimizers):
            raise TrainingError(
                f"every update was skipped, all {self._progress.skipped}: no loss was finite; "
                "lower --learning-rate, and look at the rewards"
            )

    def _check_ratio(self, deviation: float | None) -> None:
        if deviation is not None and not deviation <= RATIO_TOLERANCE:
            raise TrainingError(
                f"in the first update the ratios of new to old policy differ from 1 by "
                f"{deviation:.1e} on average, although nothing was learned yet: a bug, or a model "
                "whose outputs depend on its batch; please report it, with the model's name"
            )

    def _report(self, row: dict[str, float], tokens: int, seconds: float) -> None:
        """Keep a row; write and say the means where one is due."""
        self._rows.append({**row, "tokens_per_second": tokens / seconds})
        step = self._progress.step
        if step in (1, self._total) or step % self._config.steps_per_report == 0:
            self._report_rows()

    def _report_rows(self) -> None:
        """Write and say the means of the rows since the last report, if there are any."""
        at = self._progress
        if not self._rows:
            return
        names = dict.fromkeys(name for kept in self._rows for name in kept)
        means = {
            name: float(np.mean([kept[name] for kept in self._rows if name in kept]))
            for name in names
        }
        self._rows = []
        # Where all updates were skipped, the loss is null: a row has one.
        means.setdefault("loss", math.nan)
        memory = {"peak_memory_bytes": self._place.memory.peak_bytes, "num_tokens": at.tokens}
        skipped = {"skipped": at.skipped} if at.skipped else {}
        runlog.append_row(self._run, {"step": at.step, **means, **memory, **skipped})
        left = runlog.say_seconds((self._total - at.step) * at.seconds / at.step)
        said = runlog.say_metrics({**means, **memory})
        self._display.note(f"  batch {at.step}/{self._total}: {said}, {left} left")
        self._publication.tell(at.step, at.seconds)

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
        step = self._progress.step
        row = {f"eval/{name}": value for name, value in metrics.items()}
        runlog.append_row(self._run, {"step": step, **row})
        if step:
            self._display.note(f"  held-out after {step}: {runlog.say_metrics(metrics)}")
            self._publication.tell(step, self._progress.seconds, evaluated=True)
        best = self._watched.best_so_far(metrics, step)
        proxy_and_held_out = self._watched.deviations(metrics)
        if proxy_and_held_out is None:
            return best, []
        return best, self._health.look_at_evaluation(*proxy_and_held_out)

    def _save(self) -> None:
        extra = {
            "learner": self._learner.state(),
            "health": self._health.state(),
            "held_out": self._watched.state(),
            "rows": self._rows,
            "stopped": self._stopped,
        }
        trees, optimizers = self._learner.trees, self._learner.optimizers
        policy = self._place.policy
        save_checkpoint(
            self._run,
            State(self._progress, trees, optimizers, extra),
            policy.layout,
            str(policy.model.folder.path),
            best=self._watched.best_step,
        )

    def finish(self, before: list[str]) -> dict[str, Any]:
        """Write the adapter, and the summary of the run."""
        at, place, watched = self._progress, self._place, self._watched
        stopped = at.step < self._total
        tree = self._policy
        if stopped and watched.best_step is not None and watched.best_step < at.step:
            tree = self._checkpoint_of(watched.best_step)
            self._display.note(
                f"! stopped after rollout batch {at.step} of {self._total}; what is kept is the "
                f"policy after {watched.best_step}, the best on held-out prompts"
            )
        policy = place.policy
        save_adapter(self._run, tree, policy.layout, str(policy.model.folder.path))
        self._store_rate()
        prompts = watched.groups[: self._config.samples]
        self.samples = [
            {"source": group.source, "prompt": prompt, "before": old, "after": new}
            for group, prompt, old, new in zip(
                prompts,
                prompt_texts(policy.model.folder, prompts),
                before,
                self._answers(tree),
                strict=True,
            )
        ]
        runlog.append_samples(self._run, self.samples)
        evaluations = runlog.eval_rows(self._run)
        last = runlog.training_rows(self._run)[-1]
        return {
            "model": self._config.model,
            "data": self._config.data,
            "steps": at.step,
            "skipped": at.skipped,
            "prompts": at.groups,
            "completions": at.groups * self._config.group_size,
            "tokens": at.tokens,
            "seconds": at.seconds,
            "tokens_per_second": at.tokens / max(at.seconds, 1e-9),
            "peak_memory_bytes": last["peak_memory_bytes"],
            "trained_parameters": sum(array.size for _, array in tree_flatten(policy.start)),
            "prompts_shared": policy.model.shared,
            "shapes": [list(shape) for shape in place.shapes],
            "stopped_early": stopped,
            "best_step": watched.best_step,
            "train": last,
            "eval_before": next(iter(evaluations), {}),
            "eval": evaluations[-1] if evaluations else {},
            "kl": watched.last_kl,
            "learner": self._learner.state(),
            "data_facts": self._prepared.facts,
            "versions": runlog.versions(),
            "seed": self._config.seed,
        }

    def _store_rate(self) -> None:
        """Keep the run's speed for later plans: the median, as early batches also compile."""
        if len(self._paces) < ENOUGH:
            return
        policy, machine = self._place.policy, this_machine().name
        path = policy.model.folder.path
        key = rate_key(self._command, path, self._config, policy.layout, machine)
        store_rate(key, float(np.median([count / seconds for count, seconds in self._paces])))

    def _answers(self, tree: Tree) -> list[str]:
        prompts = self._watched.groups[: self._config.samples]
        return answers(self._place.policy, tree, prompts, self._config).texts

    def _checkpoint_of(self, step: int) -> Tree:
        """The policy as it was after a step whose checkpoint is kept."""
        if step == 0:
            return self._place.policy.start
        weights = read_tensors(self._run / FOLDER / f"{step:07d}" / ADAPTER_WEIGHTS)
        tree: Tree = tree_unflatten(list(weights.items()))
        return tree


class _Abandoned(Exception):
    """A rollout batch was cut short before anything was learned from it."""


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _sampled(experience: Experience, step: int) -> list[dict[str, Any]]:
    """Rows of samples.jsonl: what was said, and what it earned."""
    rollouts, rewards = experience.rollouts, experience.rewards
    size = rollouts.group_size
    return [
        {
            "step": step,
            "source": rollouts.groups[n // size].source,
            "prompt": as_data(rollouts.prompts[n // size].text.prompt),
            "completion": text,
            "ended": bool(rollouts.ended[n]),
            "tokens": int(rollouts.lengths[n]),
            "reward": float(rewards.total[n]),
            "rewards": dict(zip(rewards.names, map(float, rewards.values[n]), strict=True)),
            "kl": float(experience.kl_by_completion[n]),
        }
        for n, text in enumerate(rollouts.texts)
    ]
