"""Steps use little more memory than they need, even if mlx could schedule far memory."""

import mlx.core as mx

from mlx_align.data.batching import Microbatch
from mlx_align.data.buckets import Shape
from mlx_align.system import memory_limit
from mlx_align.system.memory_limit import MemoryLimit

LARGE = Microbatch((0,), Shape(1_000_000, 1, 1))
# Narrower, but not smaller in every respect.
OTHER = Microbatch((0,), Shape(250_000, 2, 1))


def step(micro):
    """A chain that needs two arrays of the shape's width at a time, and keeps none."""
    total = mx.array(0.0)
    for i in range(40):
        start = mx.depends([mx.zeros(micro.shape.prompt)], [total])[0]
        total = total + mx.sort(start + i)[0]
    mx.eval(total)


def bounded_peak():
    """The peak of four bounded steps of the large shape, bytes."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with MemoryLimit() as memory:
        for _ in range(4):
            with memory.bounded([LARGE.shape]):
                step(LARGE)
        bounded = memory.peak_bytes - before
        # A new shape resets mlx's counter, but not the reported peak.
        with memory.bounded([OTHER.shape]):
            step(OTHER)
        assert mx.get_peak_memory() < memory.peak_bytes
        assert memory.peak_bytes - before == bounded
    return bounded


def test_steps_stay_within_the_limit(monkeypatch):
    monkeypatch.setattr(memory_limit, "MIN_HEADROOM_BYTES", 1 << 20)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    step(LARGE)
    free = mx.get_peak_memory() - before
    limit = mx.set_memory_limit(1 << 40)
    array = 4 * LARGE.shape.prompt
    allowed = 4 * array + 4096  # and small arrays
    # mlx counts an operation as done before it frees its inputs. On busy cores it may allocate
    # another array in between, so the best of a few tries counts.
    peaks: list[int] = []
    while not peaks or (peaks[-1] > allowed and len(peaks) < 5):
        peaks.append(bounded_peak())
    assert peaks[-1] <= allowed
    assert free >= 2 * max(peaks)
    assert mx.set_memory_limit(limit) == 1 << 40  # the previous limit is restored


def test_a_smaller_shape_is_not_measured():
    smaller, larger = Shape(10, 20, 1), Shape(10, 21, 2)
    with MemoryLimit() as memory:
        with memory.bounded([larger]):
            mx.eval(mx.zeros(1000))
        limit = mx.set_memory_limit(1)  # the one after the larger shape's step
        mx.set_memory_limit(limit)
        for shapes in ([smaller], [smaller, larger]):
            with memory.bounded(shapes):
                mx.eval(mx.zeros(100_000))
                assert mx.set_memory_limit(limit) == limit
        with memory.bounded([Shape(11, 1, 1)]):
            assert mx.set_memory_limit(1) == 1
