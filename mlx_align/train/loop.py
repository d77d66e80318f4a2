"""The training loop: microbatches accumulate to an update, exactly as one batch would.

It knows nothing of losses: an `Objective` gives the share each microbatch adds to the update's
loss, and `update.py` makes the update.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim

from mlx_align.data.batching import Microbatch
from mlx_align.errors import TrainingError
from mlx_align.models.loading import LanguageModel
from mlx_align.models.roles import Tree
from mlx_align.train.run_ahead import RunAhead
from mlx_align.train.update import Loss, Ready, Updater


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
    """

    step: int = 0
    microbatches: int = 0
    groups: int = 0
    tokens: int = 0
    seconds: float = 0.0


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


@dataclass
class LoopHooks:
    """What happens beside the updates; each is told the progress.

    Attributes:
        report: A row of training metrics.
        evaluate: Time for an evaluation of the tree.
        save: Time for a checkpoint; also called before the loop gives up on a signal.
        tick: After every update.
    """

    report: Callable[[Progress, dict[str, float]], None]
    evaluate: Callable[[Progress, Tree], None]
    save: Callable[[Progress, Tree, optim.Optimizer], None]
    tick: Callable[[Progress], None] = field(default=lambda _: None)


class Interrupted(Exception):
    """A signal ended the run after its checkpoint was written; `signum` says which."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


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

    Raises:
        TrainingError: A loss or gradient is not finite; the tree is the last good one, saved.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    window = _Window()
    memory = RunAhead()
    update = Updater(model, optimizer, objective.loss, settings.max_grad_norm, memory)
    with _signals() as pending, memory:
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
                    hooks.save(progress, tree, optimizer)
                raise
            tree = done.tree
            _advance(progress, micro, objective, time.perf_counter() - began)
            window.add(done.loss, done.sums, done.norm, rate)
            hooks.tick(progress)
            last = progress.step == settings.total_steps
            if progress.step == 1 or progress.step % settings.steps_per_report == 0 or last:
                hooks.report(progress, window.row(progress, memory.peak_bytes))
                window = _Window(progress)
            if last or _due(progress.step, settings.steps_per_eval):
                hooks.evaluate(progress, tree)
            if pending or last or _due(progress.step, settings.save_every):
                hooks.save(progress, tree, optimizer)
            if pending and not last:
                raise Interrupted(pending[0])
    return tree


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


class _Window:
    """Means over the updates since the last report."""

    def __init__(self, since: Progress | None = None) -> None:
        self.updates = 0
        self.loss = self.norm = self.rate = 0.0
        self.sums: dict[str, float] = {}
        self.tokens = since.tokens if since else 0
        self.seconds = since.seconds if since else 0.0

    def add(self, loss: float, sums: Mapping[str, float], norm: float, rate: float) -> None:
        self.updates += 1
        self.loss += loss
        self.norm += norm
        self.rate = rate
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def row(self, progress: Progress, peak_bytes: int) -> dict[str, float]:
        weight = self.sums.get("weight", 1.0) or 1.0
        means = {name: value / weight for name, value in self.sums.items() if name != "weight"}
        tokens = progress.tokens - self.tokens
        seconds = progress.seconds - self.seconds
        return {
            "step": progress.step,
            "loss": self.loss / self.updates,
            **means,
            "learning_rate": self.rate,
            "grad_norm": self.norm / self.updates,
            "num_tokens": progress.tokens,
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "peak_memory_bytes": peak_bytes,
        }


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is put into; a second one interrupts at once."""
    pending: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return

    def note(signum: int, _frame: FrameType | None) -> None:
        if pending:
            raise KeyboardInterrupt
        pending.append(signum)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pending
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
