"""A run's speed: what is timed, and that `mlx-align plan` finds it."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import TINY_MODEL

from mlx_align.cli.main import run
from mlx_align.config import KTOConfig
from mlx_align.data.buckets import Shape, batch_limit
from mlx_align.planning import duration
from mlx_align.training.metrics import Throughput
from mlx_align.types import TokenizedGroup

SMALL, LARGE = Shape(8, 8, 2), Shape(16, 16, 1)


def timed(updates):
    """The rate of updates of (shapes, tokens, seconds)."""
    throughput = Throughput()
    for shapes, tokens, seconds in updates:
        throughput.add(shapes, tokens, seconds)
    return throughput.rate()


def test_updates_that_compile_are_not_timed():
    both = (SMALL, LARGE)
    steady = [(both, 10, 1.0), (both, 20, 1.0), ((SMALL,), 30, 2.0)]
    assert timed([((SMALL,), 10, 9.0), (both, 10, 9.0), *steady]) == pytest.approx(15.0)
    # Two are too few.
    assert timed([(both, 10, 9.0), *steady[:2]]) is None
    assert timed([]) is None


def plan(command, *options):
    """The time that `mlx-align plan` tells."""
    where = ["--model", str(TINY_MODEL), "--data", "pairs.jsonl", "--json", "--command", command]
    assert run(["plan", *where, *options]) == 0


def test_plan_knows_the_time_after_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = {"chosen": " yes", "rejected": " no"}
    lines = [json.dumps({"prompt": f"Say yes {i}.", **row}) for i in range(20)]
    Path("pairs.jsonl").write_text("\n".join(lines) + "\n")
    chosen = ["--batch-tokens", "64", "--grad-accumulation-steps", "2"]

    def train(output, iters):
        command = ["dpo", "--model", str(TINY_MODEL), "--data", "pairs.jsonl", "--output", output]
        command += ["--reference-cache", "cache", "--samples", "0", "--iters", iters]
        assert run([*command, *chosen]) == 0
        capsys.readouterr()

    def time(*options):
        plan("dpo", *chosen, *options)
        return json.loads(capsys.readouterr().out)["time"]

    train("short", "2")
    assert time() is None
    assert not duration.rates_file().exists()
    train("long", "8")
    [rate] = json.loads(duration.rates_file().read_text()).values()
    assert rate > 0
    found = time()
    assert found["tokens_per_second"] == rate
    assert found["source"] == "measured earlier, by a run or --measure"
    # What makes a step faster or slower asks for a measurement of its own.
    assert time("--grad-checkpoint") is None
    assert time("--max-seq-length", "512") is None
    plan("dpo", "--batch-size", "2", *chosen[2:])
    assert json.loads(capsys.readouterr().out)["time"] is None


def test_speed_of_kto_does_not_count_mismatched_completions():
    """A run counts a row's answer, not the mismatched one: so does the time."""
    ids = np.ones(10, np.int32)
    groups = [TokenizedGroup(ids, (ids, ids), "")] * 12
    found = duration.expected_duration(
        KTOConfig(), groups, 5.0, "here", has_reference=True, limit=batch_limit(KTOConfig())
    )
    assert found.training_seconds == 12 * 20 / 5
    assert found.reference_seconds == pytest.approx(12 * 30 / 5 / 3)
    iters = KTOConfig(iters=2, batch_tokens=80, grad_accumulation_steps=3)
    # 16 + 2 x 16 tokens padded: one row in 80.
    assert duration.expected_duration(
        iters, groups, 5.0, "", has_reference=False, limit=batch_limit(iters)
    ).training_seconds == (pytest.approx(2 * 3 * 20 / 5))
