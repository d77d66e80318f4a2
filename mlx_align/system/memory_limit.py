"""Limit how far mlx allocates ahead of what it has computed.

mlx schedules operations before they run (about 50 operations ahead on the CPU, about ten command
buffers on a GPU) and allocates their outputs when it schedules them. Scheduling waits while more
memory is in use than `mx.set_memory_limit` allows. A limit below the needs of a step costs time:
the waiting thread spins, and where other programs keep the cores busy, it takes turns from the
thread that computes (19 tokens/s instead of some 200). No limit costs memory: a step that needs
379 MB took 463 MB. So the first step of a batch shape, which is compiled anyway, runs with nothing
scheduled ahead and measures its needs, unless a larger shape has been measured. All later steps may
use slightly more than the largest needs. Sampling has no limit: its operations are small, and many
completions may need more than an update of a few.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import TracebackType

import mlx.core as mx

# Memory that steps may use in addition to their needs: this fraction, and at least this many bytes.
# With two pairs of 256 + 2×128 tokens, 34M parameters and 2 cores, a step took as long at 4% as
# without a limit (1.14 and 1.15 s).
HEADROOM = 0.05
MIN_HEADROOM_BYTES = 1 << 24


def headroom_bytes(needed: int) -> int:
    """Bytes that steps which need `needed` bytes may use in addition, to schedule ahead."""
    return max(MIN_HEADROOM_BYTES, int(HEADROOM * needed))


class MemoryLimit:
    """Limits the memory of training steps. On exit, restores the limit that mlx had before.

    Attributes:
        peak_bytes: The peak memory since the context was entered.
    """

    def __init__(self) -> None:
        self._needed: dict[tuple[int, ...], int] = {}
        self._peak = 0
        self._before: int | None = None  # mlx's own limit, within the context

    def __enter__(self) -> MemoryLimit:
        self._before = mx.set_memory_limit(1)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        assert self._before is not None
        mx.set_memory_limit(self._before)
        self._before = None

    @property
    def peak_bytes(self) -> int:
        """The peak memory so far, bytes."""
        return max(self._peak, mx.get_peak_memory())

    @contextmanager
    def bounded(self, shapes: Collection[tuple[int, ...]]) -> Iterator[None]:
        """Run a step on microbatches of these shapes within the block."""
        new = {shape for shape in shapes if not self._measured(shape)}
        if not new:
            yield
            return
        self._peak = self.peak_bytes
        mx.reset_peak_memory()
        mx.set_memory_limit(1)
        yield
        needed = mx.get_peak_memory()
        self._needed.update(dict.fromkeys(new, needed))
        largest = max(self._needed.values())
        mx.set_memory_limit(largest + headroom_bytes(largest))

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Set no limit within the block."""
        if self._before is None:
            yield
            return
        limit = mx.set_memory_limit(self._before)
        try:
            yield
        finally:
            mx.set_memory_limit(limit)

    def _measured(self, shape: tuple[int, ...]) -> bool:
        """Whether a shape was measured that is at least as large in every respect."""
        return any(
            all(size <= other for size, other in zip(shape, known, strict=True))
            for known in self._needed
        )
