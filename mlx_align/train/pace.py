"""How fast a run's updates are once everything is compiled."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_align.data.batching import Microbatch
from mlx_align.data.shapes import AnyShape
from mlx_align.train.loop import Progress

# Fewer updates are no measurement.
ENOUGH = 3


class Pace:
    """Tokens per second of the updates in which every shape had run before.

    An update with a new shape compiles it: on a short run that would be most of its time. The loop
    takes an update's microbatches from `watched` and then calls `tick`.
    """

    def __init__(self, progress: Progress) -> None:
        self._tokens, self._seconds = progress.tokens, progress.seconds
        self._seen: set[AnyShape] = set()
        self._compiled = False
        self._timed_updates, self._timed_tokens, self._timed_seconds = 0, 0, 0.0

    def watched(self, stream: Iterator[Microbatch]) -> Iterator[Microbatch]:
        """The same stream, its shapes noted."""
        for micro in stream:
            self._compiled |= micro.shape not in self._seen
            self._seen.add(micro.shape)
            yield micro

    def tick(self, progress: Progress) -> None:
        """An update is done."""
        if not self._compiled:
            self._timed_updates += 1
            self._timed_tokens += progress.tokens - self._tokens
            self._timed_seconds += progress.seconds - self._seconds
        self._tokens, self._seconds = progress.tokens, progress.seconds
        self._compiled = False

    def rate(self) -> float | None:
        """Tokens per second, padding not counted; None of too few updates."""
        if self._timed_updates < ENOUGH or self._timed_seconds <= 0:
            return None
        return self._timed_tokens / self._timed_seconds
