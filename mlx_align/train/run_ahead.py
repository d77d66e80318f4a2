"""How far mlx may run ahead of what it has computed: as far as memory allows, and no further.

mlx plans operations long before they run, and each takes its memory when it is planned: some 50
operations ahead on the CPU, some ten command buffers on a GPU. Planning waits while more memory is
in use than `mx.set_memory_limit` says. A limit below what a step cannot do without costs time (the
waiting thread turns without work); no limit costs memory: a step that needs 379 MB took 463. So the
first step of each shape, which is compiled anyway, runs with nothing ahead and shows what it needs;
all others may take a little more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import TracebackType

import mlx.core as mx

from mlx_align.data.shapes import AnyShape
from mlx_align.plan.memory import room_bytes


class RunAhead:
    """Bounds the memory of a run's steps; as a context, gives mlx its own limit back at the end.

    Attributes:
        peak_bytes: The most memory in use since the context was entered.
    """

    def __init__(self) -> None:
        self._needed: dict[AnyShape, int] = {}
        self._peak = 0
        self._before = 0

    def __enter__(self) -> RunAhead:
        self._before = mx.set_memory_limit(1)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        mx.set_memory_limit(self._before)

    @property
    def peak_bytes(self) -> int:
        """The most memory in use so far, bytes."""
        return max(self._peak, mx.get_peak_memory())

    @contextmanager
    def bounded(self, shapes: Collection[AnyShape]) -> Iterator[None]:
        """Within the block, gradients of microbatches of these shapes are computed."""
        new = set(shapes) - self._needed.keys()
        if not new:
            yield
            return
        self._peak = self.peak_bytes
        mx.reset_peak_memory()
        mx.set_memory_limit(1)
        yield
        needed = mx.get_peak_memory()
        self._needed.update(dict.fromkeys(new, needed))
        most = max(self._needed.values())
        mx.set_memory_limit(most + room_bytes(most))
