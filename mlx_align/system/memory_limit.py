"""Limit how far mlx allocates ahead of what it has computed.

mlx schedules operations before they run (about 50 operations ahead on the CPU, about ten command
buffers on a GPU) and allocates their outputs when it schedules them. Scheduling waits while more
memory is in use than `mx.set_memory_limit` allows. A limit below the needs of a step costs time:
the waiting thread spins, and where other programs keep the cores busy, it takes turns from the
thread that computes (19 tokens/s instead of some 200). No limit costs memory: a step that needs
379 MB took 463 MB. So the first update of a batch shape, which is compiled anyway, runs with
nothing scheduled ahead and measures its needs, unless a larger shape has been measured. All later
updates may use slightly more than the largest needs. Sampling and evaluation have no limit: their
operations are small, and an update of a few completions may need less than sampling many.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import mlx.core as mx

# Memory that updates may use in addition to their needs: this fraction, at least this many bytes.
# With two pairs of 256 + 2×128 tokens, 34M parameters and 2 cores, a step took as long at 4% as
# without a limit (1.14 and 1.15 s).
HEADROOM = 0.05
MIN_HEADROOM_BYTES = 1 << 24


def headroom_bytes(needed: int) -> int:
    """Bytes that steps which need `needed` bytes may use in addition, to schedule ahead."""
    return max(MIN_HEADROOM_BYTES, int(HEADROOM * needed))


class MemoryLimit:
    """Limits the memory of updates.

    Attributes:
        peak_bytes: The peak memory since mlx's own counter was reset.
    """

    def __init__(self) -> None:
        self._needed: dict[tuple[int, ...], int] = {}
        self._peak = 0

    @property
    def peak_bytes(self) -> int:
        """The peak memory so far, bytes."""
        return max(self._peak, mx.get_peak_memory())

    @contextmanager
    def bounded(self, shapes: Collection[tuple[int, ...]]) -> Iterator[None]:
        """Run an update on microbatches of these shapes within the block."""
        new = {shape for shape in shapes if not self._measured(shape)}
        if new:
            self._peak = self.peak_bytes
            mx.reset_peak_memory()
            before = mx.set_memory_limit(1)
        else:
            largest = max(self._needed.values())
            before = mx.set_memory_limit(largest + headroom_bytes(largest))
        try:
            yield
            if new:
                self._needed.update(dict.fromkeys(new, mx.get_peak_memory()))
        finally:
            mx.set_memory_limit(before)

    def _measured(self, shape: tuple[int, ...]) -> bool:
        """Whether a shape was measured that is at least as large in every respect."""
        return any(
            all(size <= other for size, other in zip(shape, known, strict=True))
            for known in self._needed
        )
