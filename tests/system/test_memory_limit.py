"""The memory limits that steps run with, and the peak that is reported.

What mlx makes of a limit depends on how busy the cores are: it counts an operation as done before
it frees its inputs. So it is measured by `scripts/verify_lengths.py` and `scripts/bench.py`. Here
mlx's counters are simulated.
"""

import mlx.core as mx
import pytest

from mlx_align.data.buckets import PackedShape, Shape
from mlx_align.system.memory_limit import MIN_HEADROOM_BYTES, MemoryLimit, headroom_bytes

SMALL, LARGE, OTHER = Shape(10, 20, 1), Shape(10, 21, 2), Shape(40, 5, 1)
NEEDS = {SMALL: 300_000_000, LARGE: 800_000_000, OTHER: 900_000_000}
BEFORE = 1 << 40


class Counters:
    """mlx's memory limit and peak."""

    def __init__(self):
        self.limit, self.peak = BEFORE, 0

    def set_memory_limit(self, limit):
        before, self.limit = self.limit, limit
        return before

    def get_peak_memory(self):
        return self.peak

    def reset_peak_memory(self):
        self.peak = 0

    def run(self, memory, *shapes):
        """A step on these shapes; the limit that it runs with."""
        with memory.bounded(shapes):
            limit = self.limit
            # Runs ahead up to the limit, as mlx does.
            needed = max(NEEDS[shape] for shape in shapes)
            self.peak = max(self.peak, needed, min(limit, 2 * needed))
        return limit


@pytest.fixture
def counters(monkeypatch):
    found = Counters()
    for name in ("set_memory_limit", "get_peak_memory", "reset_peak_memory"):
        monkeypatch.setattr(mx, name, getattr(found, name))
    return found


def allowed(shape):
    return NEEDS[shape] + headroom_bytes(NEEDS[shape])


def test_a_new_shape_runs_nothing_ahead_and_later_steps_a_little(counters):
    with MemoryLimit() as memory:
        assert counters.run(memory, LARGE) == 1
        assert memory.peak_bytes == NEEDS[LARGE]
        assert counters.run(memory, LARGE) == allowed(LARGE)
        assert memory.peak_bytes == allowed(LARGE)
        # Wider prompts: not smaller in every respect. mlx's counter starts again.
        assert counters.run(memory, OTHER) == 1
        assert counters.run(memory, OTHER, LARGE) == allowed(OTHER)
    assert counters.limit == BEFORE  # the previous limit is restored


def test_a_shape_that_is_smaller_than_a_measured_one_is_not_measured(counters):
    with MemoryLimit() as memory:
        counters.run(memory, LARGE)
        assert counters.run(memory, SMALL) == allowed(LARGE)
        assert counters.run(memory, SMALL, LARGE) == allowed(LARGE)
        # The reported peak never falls, although a new shape resets mlx's counter.
        counters.run(memory, OTHER)
        assert memory.peak_bytes >= allowed(LARGE)
    with MemoryLimit() as memory:
        assert counters.run(memory, SMALL) == 1
        assert counters.run(memory, LARGE) == 1
        assert counters.run(memory, SMALL) == allowed(LARGE)


def test_packed_shapes_are_compared_too(counters, monkeypatch):
    wide, narrow = PackedShape(64, 64, 4, 16), PackedShape(64, 32, 4, 16)
    monkeypatch.setitem(NEEDS, wide, 1000)
    monkeypatch.setitem(NEEDS, narrow, 900)
    with MemoryLimit() as memory:
        assert counters.run(memory, wide) == 1
        assert counters.run(memory, narrow) == 1000 + MIN_HEADROOM_BYTES


def test_the_limit_is_restored_after_an_error(counters):
    with pytest.raises(RuntimeError), MemoryLimit() as memory, memory.bounded([LARGE]):
        raise RuntimeError
    assert counters.limit == BEFORE


def test_the_limit_is_suspended_for_sampling(counters):
    with MemoryLimit() as memory:
        counters.run(memory, LARGE)
        with memory.suspended():
            assert counters.limit == BEFORE
        assert counters.limit == allowed(LARGE)
    with memory.suspended():  # evaluations before training
        assert counters.limit == BEFORE
    assert counters.limit == BEFORE
