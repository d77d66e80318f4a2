"""The training loop: microbatches accumulate to an update, exactly as one batch would.

It knows nothing of losses: an `Objective` gives the share each microbatch adds to the update's
loss, and `update.py` makes the update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim

from mlx_align.data.batching import Microbatch
from mlx_align.errors import TrainingError
from mlx_align.models.loading import LanguageModel
from mlx_align.models.roles import Tree
from mlx_align.train.run_ahead import RunAhead
from mlx_align.train.signals import Interrupted, deferring
from mlx_align.train.update import Loss, Ready, Updater
from mlx_align.train.window import Window


class Objective(NamedTuple):
    """What a run optimises, in terms of microbatches.

    Attributes:
        collate: The arrays of a microbatch.
        totals: Of all microbatches of an update, the denominators that its losses share.
        loss: (tree, batch, totals) -> this microbatch's share of the update's loss, and sums of
            metrics; shares add up to the loss of one big batch.
        prepare: For losses that couple the pairs of an update: (tree, batches, totals) ->
            batches with what the coupling needs in them; None as a rule.
        size: (microbatch) -> its groups and their tokens, padding not counted.
        sources: Where the rows of a microbatch stand in the data, for messages.
    """

    collate: Callable[[Microbatch], Any]
    totals: Callable[[Sequence[Any]], Any]
    loss: Loss
    size: Callable[[Microbatch], tuple[int, int]]
    sources: Callable[[Microbatch], list[str]]
    prepare: Callable[[Tree, Sequence[Any], Any], list[Any]] | None = None


@dataclass
class Progress:
    """How far a run is. Saved with every checkpoint.

    Attributes:
        step: Updates done.
        microbatches: Microbatches consumed, which is the place in the data.
        groups: Prompts (with completions) trained on.
        tokens: Tokens of prompts and completions trained on, padding not counted.
        seconds: Time spent in updates.
        skipped: Updates that were skipped because a loss or gradient was not finite.
    """

    step: int = 0
    microbatches: int = 0
    groups: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0


@dataclass(frozen=True)
class LoopSettings:
    """What the loop itself needs to know."""

    total_steps: int
    accumulation: int
    learning_rate: Callable[[int], float]
    max_grad_norm: float
    steps_per_report: int
    steps_per_eval: int
    save_every: int
    skip_non_finite: bool = False


@dataclass
class LoopHooks:
    """What happens beside the updates; each is told the progress.

    Attributes:
        report: A row of training metrics.
        evaluate: Time for an evaluation of the tree; whether it is the best so far, which gets a
            checkpoint.
        save: Time for a checkpoint of the tree, and of the window of updates not yet reported;
            also called before the loop gives up on a signal.
        tick: After every update.
        note: A line about something out of the ordinary.
    """

    report: Callable[[Progress, dict[str, float]], None]
    evaluate: Callable[[Progress, Tree], bool]
    save: Callable[[Progress, Tree, Window], None]
    tick: Callable[[Progress], None] = field(default=lambda _: None)
    note: Callable[[str], None] = field(default=lambda _: None)


def make_schedule(name: str, peak: float, total: int, warmup: float) -> Callable[[int], float]:
    """Learning rate of update 0, 1, … `total` − 1.

    Warm-up rises linearly and reaches `peak` on its last update; linear and cosine then fall
    towards 0, which the update after the last would have.
    """
    warm = min(math.ceil(warmup * total) if warmup < 1 else int(warmup), max(total - 1, 0))

    def rate(step: int) -> float:
        if step < warm:
            return peak * (step + 1) / (warm + 1)
        share = (step - warm) / max(1, total - warm)
        if name == "linear":
            return peak * (1 - share)
        if name == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * share))
        return peak

    return rate


def make_optimizer(tree: Tree, weight_decay: float) -> optim.Optimizer:
    """AdamW with state for `tree`. Bias correction is on: without it early steps are too long."""
    optimizer = optim.AdamW(learning_rate=0.0, weight_decay=weight_decay, bias_correction=True)
    optimizer.init(tree)
    mx.eval(optimizer.state)
    return optimizer


def train(
    model: LanguageModel,
    tree: Tree,
    optimizer: optim.Optimizer,
    objective: Objective,
    stream: Iterator[Microbatch],
    settings: LoopSettings,
    hooks: LoopHooks,
    progress: Progress,
    *,
    window: Window | None = None,
) -> Tree:
    """Run updates until `settings.total_steps`; the trained tree.

    Args:
        model: The base; it holds the current tree between updates.
        tree: Where the policy stands now.
        optimizer: With its state.
        objective: What to optimise.
        stream: Microbatches from the current place in the data on.
        settings: Counts and rates.
        hooks: Reports, evaluations, checkpoints.
        progress: Where the run stands; counted up in place.
        window: The updates before it that were not reported yet; for a run that goes on.

    Raises:
        TrainingError: A loss or gradient is not finite; the tree is the last good one, saved.
        Interrupted: A signal came; a checkpoint was written, unless it was the second.
    """
    window = window or Window(tokens=progress.tokens, seconds=progress.seconds)
    memory = RunAhead()
    skip, most = settings.skip_non_finite, settings.max_grad_norm
    update = Updater(model, optimizer, objective.loss, most, memory, skip=skip)
    with deferring() as pending, memory:
        while progress.step < settings.total_steps:
            began = time.perf_counter()
            micro = [next(stream) for _ in range(settings.accumulation)]
            batches = [objective.collate(m) for m in micro]
            totals = objective.totals(batches)
            if objective.prepare is not None:
                batches = objective.prepare(tree, batches, totals)
            rate = settings.learning_rate(progress.step)
            try:
                done = update(tree, ready(objective, batches, micro), totals, rate)
            except TrainingError:
                if progress.step:
                    hooks.save(progress, tree, window)
                raise
            tree = done.tree
            _advance(progress, micro, objective, time.perf_counter() - began)
            if done.skipped is None:
                window.add(done.loss, done.sums, done.norm, rate)
            else:
                progress.skipped += 1
                hooks.note(f"! update {progress.step} skipped: {done.skipped}")
            hooks.tick(progress)
            last = progress.step == settings.total_steps
            if last and progress.skipped == progress.step:
                raise TrainingError(f"every update was skipped: {done.skipped}")
            if progress.step == 1 or _due(progress.step, settings.steps_per_report) or last:
                window = _reported(window, progress, memory.peak_bytes, hooks)
            best = False
            if last or _due(progress.step, settings.steps_per_eval):
                best = hooks.evaluate(progress, tree)
            if pending or best or last or _due(progress.step, settings.save_every):
                hooks.save(progress, tree, window)
            if pending:
                raise Interrupted(pending[0])
    return tree


def _reported(window: Window, progress: Progress, peak_bytes: int, hooks: LoopHooks) -> Window:
    """Report a window; the next one. Where all of its updates were skipped, it waits for more."""
    if not window.updates:
        return window
    row = window.row(progress.step, progress.tokens, progress.seconds, peak_bytes)
    hooks.report(progress, {**row, "skipped": progress.skipped} if progress.skipped else row)
    return Window(tokens=progress.tokens, seconds=progress.seconds)


def ready(objective: Objective, batches: Sequence[Any], micro: Sequence[Microbatch]) -> list[Ready]:
    """Collated microbatches as an update takes them."""
    return [
        Ready(arrays, members.shape, partial(objective.sources, members))
        for arrays, members in zip(batches, micro, strict=True)
    ]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _advance(
    progress: Progress, micro: Sequence[Microbatch], objective: Objective, seconds: float
) -> None:
    progress.step += 1
    progress.microbatches += len(micro)
    progress.seconds += seconds
    for members in micro:
        groups, tokens = objective.size(members)
        progress.groups += groups
        progress.tokens += tokens
