"""What a row of metrics is made of: means over the updates since the row before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Window:
    """Sums over the updates since the last report. Saved with every checkpoint.

    Attributes:
        updates: How many there were.
        loss: Sum of their losses.
        norm: Sum of their gradients' norms, before clipping.
        rate: The last one's learning rate.
        sums: Sums of metrics, and of the `weight` they are means over.
        tokens: The run's tokens when the window began.
        seconds: The run's seconds when it began.
    """

    updates: int = 0
    loss: float = 0.0
    norm: float = 0.0
    rate: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    def add(self, loss: float, sums: Mapping[str, float], norm: float, rate: float) -> None:
        """Take an update in."""
        self.updates += 1
        self.loss += loss
        self.norm += norm
        self.rate = rate
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def row(self, step: int, tokens: int, seconds: float, peak_bytes: int) -> dict[str, float]:
        """The row of a report after update `step`, of at least one update.

        Args:
            step: Updates of the run so far.
            tokens: Its tokens so far.
            seconds: Its seconds so far.
            peak_bytes: The most memory in use so far.
        """
        weight = self.sums.get("weight", 1.0) or 1.0
        means = {name: value / weight for name, value in self.sums.items() if name != "weight"}
        took = seconds - self.seconds
        return {
            "step": step,
            "loss": self.loss / self.updates,
            **means,
            "learning_rate": self.rate,
            "grad_norm": self.norm / self.updates,
            "num_tokens": tokens,
            "tokens_per_second": (tokens - self.tokens) / took if took else 0.0,
            "peak_memory_bytes": peak_bytes,
        }

    def as_json(self) -> dict[str, Any]:
        """What a checkpoint keeps; `window_of` takes it back."""
        return asdict(self)


def window_of(content: Any) -> Window:
    """The window that `as_json` gave.

    Raises:
        KeyError: An entry is missing.
        TypeError: It is none.
        ValueError: An entry is none.
    """
    return Window(
        updates=int(content["updates"]),
        sums={str(name): float(value) for name, value in dict(content["sums"]).items()},
        **{name: float(content[name]) for name in ("loss", "norm", "rate", "seconds")},
        tokens=int(content["tokens"]),
    )
