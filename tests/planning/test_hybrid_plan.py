"""The memory plan of hybrid models, whose blocks have linear attention or attention."""

from dataclasses import replace

import pytest
from helpers.scripts import load_script

from mlx_align.data.buckets import Shape
from mlx_align.planning.memory import Workload, plan_memory
from mlx_align.planning.model_shape import LinearAttention, read_model_shape


@pytest.fixture(scope="module")
def script():
    return load_script("verify_plan")


@pytest.fixture(scope="module")
def shapes(script, tmp_path_factory):
    """The shapes read from a folder of each family."""
    found = {}
    for case in script.HYBRIDS:
        if case.family not in found:
            folder = tmp_path_factory.mktemp(case.family)
            found[case.family] = read_model_shape(folder, script.write_model(case, folder))
    return found


def test_linear_attention_is_read_from_the_folder(shapes):
    three = frozenset({0, 1, 2})
    qwen = LinearAttention(three, 4 * 64, 8 * 64, 8 * 64 * 64, gate_per_key=False)
    assert shapes["qwen3_5"].linear_attention == shapes["qwen3_next"].linear_attention == qwen
    kimi = LinearAttention(three, 8 * 32, 8 * 32, 8 * 32 * 32, gate_per_key=True)
    assert shapes["kimi_linear"].linear_attention == kimi
    experts = {family: shape.active_experts for family, shape in shapes.items()}
    assert experts == {"qwen3_5": 0, "qwen3_next": 4, "kimi_linear": 4}


def test_only_trained_blocks_count(shapes):
    work = Workload((Shape(256, 256, 1),), grad_checkpoint=False)

    def held(blocks):
        plan = plan_memory(shapes["qwen3_5"], replace(work, num_layers=blocks))
        return plan.parts["activations"]

    # The last block has attention. The others are alike, and hold more.
    assert held(3) - held(2) == pytest.approx(held(4) - held(3), abs=2)
    assert held(4) - held(3) > 1.5 * held(1)
    assert held(-1) == held(4)


def test_memory_grows_with_the_length(shapes):
    for shape in shapes.values():
        for attention in ("kernel", "blocks"):
            peaks = [
                plan_memory(shape, Workload((Shape(n, n, 1),), attention=attention)).peak_bytes
                for n in (4096, 8192)
            ]
            assert peaks[1] < 2.1 * peaks[0]


def test_a_hybrid_needs_what_is_planned(script):
    case = next(case for case in script.HYBRIDS if case.family == "qwen3_5")
    found = script.in_own_process(replace(case, hidden=128, intermediate=256, heads=2, kv_heads=1))
    assert found["planned"] == pytest.approx(found["measured"], rel=script.ALLOWED)
