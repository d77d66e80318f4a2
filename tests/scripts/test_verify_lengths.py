"""`scripts/verify_lengths.py` on small data: memory is constant once every shape has occurred."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.paths import TINY_MODEL
from helpers.scripts import load_script

from mlx_align.config import DPOConfig
from mlx_align.data.batching import padding_fraction
from mlx_align.data.buckets import Shape
from mlx_align.types import TokenizedGroup


@pytest.fixture(scope="module")
def script():
    return load_script("verify_lengths")


@pytest.fixture(scope="module")
def groups():
    """Pairs of a few lengths: few shapes, which all occur within a few steps."""
    random = np.random.default_rng(0)

    def ids(length):
        return random.integers(1, 60, length).astype(np.int32)

    lengths = [(8, 8), (8, 24), (32, 8), (32, 24)] * 8
    return [TokenizedGroup(ids(p), (ids(c), ids(c - 4)), "") for p, c in lengths]


@pytest.mark.parametrize("batch", [{"batch_size": 2}, {"batch_tokens": 160}])
def test_memory_is_constant_once_every_shape_has_occurred(script, groups, batch):
    config = DPOConfig(model=str(TINY_MODEL), grad_accumulation_steps=1, lora_rank=2, **batch)
    found = script.measure(config, groups, steps=60, every=20)
    assert found.used > (2 if "batch_size" in batch else 0)
    # Peaks of 3 MB vary by tens of kilobytes, depending on when mlx frees memory.
    assert script.violations(found, 0.4, tolerance=0.05) == []
    assert found.unavoidable == pytest.approx(
        4 * 32 / sum(len(group.prompt) + 2 * len(group.completions[0]) for group in groups)
    )
    if "batch_size" in batch:  # packed, completions of different length cost nothing
        assert found.lines[-1].padding >= found.unavoidable
    assert script.violations(found, 0.01)[0].endswith("padding, 1.0% allowed")


def test_growth_is_reported(script, groups, monkeypatch):
    kept = []
    original = script.padding_fraction
    # Simulate a leak: at every line, hold another fifth of the memory in use.
    monkeypatch.setattr(
        script,
        "padding_fraction",
        lambda *a: kept.append(_held(mx.get_active_memory() // 5)) or original(*a),
    )
    config = DPOConfig(model=str(TINY_MODEL), grad_accumulation_steps=1, lora_rank=2, batch_size=2)
    found = script.measure(config, groups, steps=60, every=20)
    assert any(
        text.startswith("active memory grew") for text in script.violations(found, 1.0, 0.05)
    )
    assert padding_fraction is original


def _held(nbytes):
    array = mx.zeros((nbytes,), mx.uint8)
    mx.eval(array)
    return array


def test_violated_limits_are_reported(script):
    lines = [script.Line(s, 2, 0.3, 1000, 5000) for s in (50, 100, 150)]
    found = script.Measurements(lines, [Shape(8, 8, 1)] * 2, 2, 0.1)
    assert script.violations(found, 0.3) == []
    ahead = script.headroom_bytes(5000)  # what mlx may schedule ahead
    near = [*lines[:2], lines[2]._replace(peak=5000 + ahead)]
    assert script.violations(script.Measurements(near, found.planned, 2, 0.1), 0.3) == []
    grown = [*lines[:2], lines[2]._replace(peak=5001 + ahead)]
    assert script.violations(script.Measurements(grown, found.planned, 2, 0.1), 0.3) == [
        f"peak memory grew from 5,000 to {5001 + ahead:,} bytes"
    ]
    many = script.Measurements(lines, [Shape(8, 8, 1)] * 13, 2, 0.1)
    assert script.violations(many, 0.3) == ["13 shapes, 12 allowed"]
    late = script.Measurements([lines[0]._replace(shapes=1), *lines[1:2]], found.planned, 2, 0.1)
    assert "more --steps" in script.violations(late, 0.3)[0]
