"""Progress of a run, the rows of its metrics, and its speed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mlx_align.data.buckets import AnyShape

# Minimum number of timed steps to report a speed.
MIN_TIMED_STEPS = 3


class StepResult(NamedTuple):
    """The result of a step.

    Attributes:
        metrics: Metrics of this step; empty if its update was skipped.
        microbatches: Number of microbatches used, or of prompts drawn.
        groups: Prompts trained on.
        tokens: Tokens trained on, without padding.
        seconds: The time it took.
        skipped: One line per update that was skipped.
    """

    metrics: dict[str, float]
    microbatches: int
    groups: int
    tokens: int
    seconds: float
    skipped: list[str]


@dataclass
class Progress:
    """The progress of a run. Part of every checkpoint.

    A step is one optimizer update (dpo, kto, sft, reward) or one rollout batch (ppo, grpo).

    Attributes:
        step: Steps done.
        microbatches: Number of microbatches used, or of prompts drawn: the position in the data.
        groups: Prompts (with completions) trained on.
        tokens: Tokens of prompts and completions trained on, without padding.
        seconds: Time spent in steps.
        skipped: Updates skipped because a loss or gradient was not finite.
    """

    step: int = 0
    microbatches: int = 0
    groups: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0

    def add(self, result: StepResult) -> None:
        """Count a step."""
        self.step += 1
        self.microbatches += result.microbatches
        self.groups += result.groups
        self.tokens += result.tokens
        self.seconds += result.seconds
        self.skipped += len(result.skipped)


@dataclass
class MetricsWindow:
    """Sums over the updates since the last report. Part of offline checkpoints.

    Attributes:
        updates: Number of updates.
        loss: Sum of their losses.
        norm: Sum of their gradient norms, before clipping.
        rate: Learning rate of the last one.
        sums: Sums of metrics, and of the `weight` that they are means over.
        tokens: The run's tokens when the window began.
        seconds: The run's seconds when the window began.
    """

    updates: int = 0
    loss: float = 0.0
    norm: float = 0.0
    rate: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    def add(self, loss: float, sums: Mapping[str, float], norm: float, rate: float) -> None:
        """Add an update."""
        self.updates += 1
        self.loss += loss
        self.norm += norm
        self.rate = rate
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def row(self, progress: Progress, peak_bytes: int) -> dict[str, float]:
        """Means over the window's updates, of which there must be at least one.

        Args:
            progress: The progress of the run.
            peak_bytes: Peak memory of the run so far.
        """
        weight = self.sums.get("weight", 1.0) or 1.0
        means = {name: value / weight for name, value in self.sums.items() if name != "weight"}
        seconds = progress.seconds - self.seconds
        return {
            "step": progress.step,
            "loss": self.loss / self.updates,
            **means,
            "learning_rate": self.rate,
            "grad_norm": self.norm / self.updates,
            "num_tokens": progress.tokens,
            "tokens_per_second": (progress.tokens - self.tokens) / seconds if seconds else 0.0,
            "peak_memory_bytes": peak_bytes,
        }

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return asdict(self)

    @classmethod
    def restored(cls, state: Any) -> MetricsWindow:
        """A window from its `state`.

        Raises:
            KeyError, TypeError, ValueError: It is not such a state.
        """
        return cls(
            updates=int(state["updates"]),
            sums={str(name): float(value) for name, value in dict(state["sums"]).items()},
            **{name: float(state[name]) for name in ("loss", "norm", "rate", "seconds")},
            tokens=int(state["tokens"]),
        )


def mean_row(
    rows: Iterable[Mapping[str, float]], progress: Progress, peak_bytes: int
) -> dict[str, float]:
    """Means over rows of rollout batches; a metric that some rows lack is averaged over the rest.

    Args:
        rows: At least one.
        progress: The progress of the run.
        peak_bytes: Peak memory of the run so far.
    """
    kept = list(rows)
    names = dict.fromkeys(name for row in kept for name in row)
    means = {name: float(np.mean([row[name] for row in kept if name in row])) for name in names}
    # Every row has a loss; if all updates were skipped, it is null.
    means.setdefault("loss", math.nan)
    memory = {"peak_memory_bytes": peak_bytes, "num_tokens": progress.tokens}
    return {"step": progress.step, **means, **memory}


class Throughput:
    """Tokens per second of updates without new batch shapes.

    A new shape is compiled at its first use, which takes most of the time of a short run.
    """

    def __init__(self) -> None:
        self._seen: set[AnyShape] = set()
        self._updates, self._tokens, self._seconds = 0, 0, 0.0

    def add(self, shapes: Iterable[AnyShape], tokens: int, seconds: float) -> None:
        """Add an update.

        Args:
            shapes: Shapes of its microbatches.
            tokens: Its tokens, without padding.
            seconds: The time it took.
        """
        new = set(shapes) - self._seen
        self._seen |= new
        if not new:
            self._updates += 1
            self._tokens += tokens
            self._seconds += seconds

    def rate(self) -> float | None:
        """Tokens per second, without padding; None after fewer than `MIN_TIMED_STEPS` updates."""
        if self._updates < MIN_TIMED_STEPS or self._seconds <= 0:
            return None
        return self._tokens / self._seconds
