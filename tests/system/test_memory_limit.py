"""Steps take what they need and a little more, however much mlx could plan ahead."""

import mlx.core as mx

from mlx_align.data.batching import Microbatch
from mlx_align.data.buckets import Shape
from mlx_align.system import memory_limit
from mlx_align.system.memory_limit import MemoryLimit

SMALL, LARGE = (Microbatch((0,), Shape(width, 1, 1)) for width in (250_000, 1_000_000))


def step(micro):
    """A chain that needs two arrays of the shape's width at a time, and leaves none behind."""
    total = mx.array(0.0)
    for i in range(60):
        start = mx.depends([mx.zeros(micro.shape.prompt)], [total])[0]
        total = total + mx.sort(start + i)[0]
    mx.eval(total)


def test_steps_stay_within_their_room(monkeypatch):
    monkeypatch.setattr(memory_limit, "MIN_HEADROOM_BYTES", 1 << 20)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    step(LARGE)
    free = mx.get_peak_memory() - before
    limit = mx.set_memory_limit(1 << 40)
    mx.reset_peak_memory()
    with MemoryLimit() as ahead:
        for _ in range(4):
            with ahead.bounded([LARGE.shape]):
                step(LARGE)
        bounded = ahead.peak_bytes - before
        # A new shape starts mlx's counter again; what was seen stays seen.
        with ahead.bounded([SMALL.shape]):
            step(SMALL)
        assert mx.get_peak_memory() < ahead.peak_bytes
        assert ahead.peak_bytes - before == bounded
    array = 4 * LARGE.shape.prompt
    assert bounded <= 4 * array + 4096  # and what stands beside them
    assert free >= 2 * bounded
    assert mx.set_memory_limit(limit) == 1 << 40  # mlx's own limit is back
