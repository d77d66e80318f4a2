"""Steps use little more memory than they need, even if mlx could schedule far memory."""

import mlx.core as mx

from mlx_align.data.batching import Microbatch
from mlx_align.data.buckets import Shape
from mlx_align.system import memory_limit
from mlx_align.system.memory_limit import MemoryLimit

SMALL, LARGE = (Microbatch((0,), Shape(width, 1, 1)) for width in (250_000, 1_000_000))


def step(micro):
    """A chain that needs two arrays of the shape's width at a time, and keeps none."""
    total = mx.array(0.0)
    for i in range(60):
        start = mx.depends([mx.zeros(micro.shape.prompt)], [total])[0]
        total = total + mx.sort(start + i)[0]
    mx.eval(total)


def test_steps_stay_within_the_limit(monkeypatch):
    monkeypatch.setattr(memory_limit, "MIN_HEADROOM_BYTES", 1 << 20)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    step(LARGE)
    free = mx.get_peak_memory() - before
    limit = mx.set_memory_limit(1 << 40)
    mx.reset_peak_memory()
    with MemoryLimit() as memory:
        with memory.bounded([LARGE.shape]):
            step(LARGE)
        first = memory.peak_bytes
        for _ in range(3):
            with memory.bounded([LARGE.shape]):
                step(LARGE)
        bounded = memory.peak_bytes - before
        needed = first - before
        # A new shape resets mlx's counter, but not the reported peak.
        with memory.bounded([SMALL.shape]):
            step(SMALL)
        assert mx.get_peak_memory() < memory.peak_bytes
        assert memory.peak_bytes - before == bounded
    array = 4 * LARGE.shape.prompt
    # mlx compares what is in use with the limit before it allocates, so one array may exceed it.
    assert bounded <= needed + memory_limit.headroom_bytes(needed) + array
    assert needed <= 4 * array + 4096  # and small arrays
    assert free >= 2 * bounded
    assert mx.set_memory_limit(limit) == 1 << 40  # the previous limit is restored
