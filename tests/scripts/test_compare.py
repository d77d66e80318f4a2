"""scripts/real/compare.py: the order that all packages follow, and the page from stored results."""

import json

import numpy as np
import pytest
from helpers.scripts import load_script

from mlx_align.data.batching import epoch_order, microbatch_stream
from mlx_align.data.buckets import BatchLimit, plan_shapes
from mlx_align.types import TokenizedGroup


@pytest.fixture(scope="module")
def compare():
    return load_script("real/compare")


@pytest.fixture(scope="module")
def model():
    return load_script("real/comparison_model")


@pytest.fixture(scope="module")
def groups():
    random = np.random.default_rng(0)

    def ids(longest):
        return np.zeros(random.integers(4, longest), np.int32)

    return [TokenizedGroup(ids(40), (ids(60), ids(90)), f"{i}") for i in range(24)]


def test_others_follow_the_order_of_single_pairs(model, groups):
    order = model.order_of_pairs(groups, seed=3)
    assert sorted(order) == list(range(24)) != order
    # What a run of `--batch-size 1` trains on, one microbatch after the other.
    stream = microbatch_stream(groups, plan_shapes(groups, BatchLimit(1)), seed=3)
    assert [next(stream).indices for _ in order] == [(index,) for index in order]
    assert order != model.order_of_pairs(groups, seed=4)


def test_packed_microbatches_make_as_many_updates(model, groups):
    tokens = model.packed_tokens(groups, 3, 6)
    shapes = plan_shapes(groups, BatchLimit(tokens=tokens, packed=True))
    assert len(epoch_order(groups, shapes, seed=3)) == 6
    assert model.packed_tokens(groups, 3, 25) is None


def test_every_run_is_planned_once(compare):
    runs = compare.planned_runs(480, default_checkpoint=False)
    names = [run.name for run in runs]
    assert len(set(names)) == len(names) == 17
    assert names[0] == "mlx-align"
    assert "mlx-align-checkpointed" in names
    assert "mlx-tune-1" not in names
    # Without options: whatever its defaults are.
    assert runs[0].options == {}
    assert not any("packed" in run.name for run in compare.planned_runs(None, False))
    assert [run.name for run in compare.chosen(runs, "mlx-tune,trl-1")] == [
        "trl-1",
        "mlx-tune-4",
        "mlx-tune-4-checkpointed",
    ]
    with pytest.raises(SystemExit, match="mlx-toon"):
        compare.chosen(runs, "mlx-toon")


def result(package, steps, losses, peak, reference=0.0):
    return {
        "package": package,
        "steps": steps,
        "cpu": steps,
        "losses": losses,
        "pairs": [4, 4, 4],
        "peak_bytes": peak,
        "resident_peak_bytes": 2 * peak,
        "tokens": 1200,
        "shapes": 1,
        "reference_seconds": reference,
        "reference_pairs": 12 if reference else 0,
        "config": {"batch_tokens": 480} if package == "mlx-align 0.1.0" else {},
        "note": "",
    }


LOSSES = [0.6931, 0.66, 0.64]
# Two rounds: the median of 3 and 5 s per update is 4, a second per pair.
STORED = {
    "mlx-align-0": result("mlx-align 0.1.0", [50.0, 3.0, 3.0], [0.7, 0.6, 0.5], 10**9, 6.0),
    "mlx-align-1-0": result("mlx-align 0.1.0", [50.0, 8.0, 8.0], LOSSES, 10**9, 6.0),
    "trl-1-0": result("trl 1.16.0", [9.0, 8.0, 16.0], [0.6931, 0.66003, 0.64], 4 * 10**9, 18.0),
    "mlx-tune-4-0": result("mlx-tune 0.6.0", [9.0, 16.0, 16.0], LOSSES, 2 * 10**9),
    "mlx-align-1": result("mlx-align 0.1.0", [50.0, 5.0, 5.0], [0.7, 0.6, 0.5], 10**9, 6.0),
}


@pytest.fixture
def comparison(compare, tmp_path):
    settings = {"model": "/models/m", "data_name": "pairs", "updates": 3}
    (tmp_path / "settings.json").write_text(json.dumps({**settings, "options": compare.OPTIONS}))
    prepared = {"pairs": [[[1] * 20, [1] * 20, [1] * 40]] * 12, "packed_tokens": 480}
    (tmp_path / "prepared.json").write_text(json.dumps({**prepared, "grad_checkpoint": False}))
    common = {"seconds": 100.0, "date": "2026-11-28", "machine": "Linux, 2 cores"}
    (tmp_path / "results").mkdir()
    for name, content in STORED.items():
        stored = {**common, "result": content}
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(stored))
        adapter = tmp_path / "runs" / name / "adapter"
        adapter.mkdir(parents=True)
        found = {"loss": [0.65, 0.64, 0.66], "rewards/accuracies": [0.9, 0.8, 0.95]}
        (adapter / "evaluation.json").write_text(json.dumps(found))
    failed = {**common, "error": "out of memory"}
    (tmp_path / "results" / "unsloth_zoo-1-0.json").write_text(json.dumps(failed))
    return compare.Comparison(tmp_path, tmp_path, 3)


def test_page_of_stored_results(comparison):
    finished = [run.name for run in comparison.runs if comparison.is_finished(run, 0)]
    assert finished == ["mlx-align", "mlx-align-1", "trl-1", "mlx-tune-4"]
    comparison.evaluate(2)  # nothing is missing, so nothing is run
    page = comparison.page(2)

    def row(table, start):
        lines = page.partition(f"\n## {table}\n")[2].partition("\n## ")[0].splitlines()
        return [line for line in lines if line.startswith(f"| {start}")]

    # Training 4 s / 4 pairs, reference 6 s / 12 pairs; mlx's peak, the process's, tokens per pair.
    assert row("Time and memory", "**mlx-align 0.1.0, default batches (defaults)**") == [
        "| **mlx-align 0.1.0, default batches (defaults)** | off | 1.00 | 0.50 | 1.50 | 1.00 | 100 "
        "| 1.00 | 2.00 | 100 |"
    ]
    # torch has no peak of mlx. Training 24 s / 8 pairs, reference 18 s / 12: three times ours.
    assert row("Time and memory", "trl")[0].endswith(
        "| off | 3.00 | 1.50 | 4.50 | 3.00 | 100 | – | 8.00 | 100 |"
    )
    assert row("Ours against the others", "trl")[0].endswith("| off | 3.00 | 3.00 | – | 0.25 |")
    assert row("Ours against the others", "mlx-tune")[0].endswith("| 2.67 | 4.00 | 0.50 | 0.50 |")
    assert "The fastest other run on mlx is mlx-tune 0.6.0, 4 pairs at once, without" in page
    assert "checkpointing: 4.00 s per pair. Ours with its defaults takes 1.50 s: 2.67" in page
    assert "2.67 times as fast, at 0.50 of its peak in mlx and 0.50 of its process's peak" in page
    assert "The fastest run on torch is trl 1.16.0, 1 pair at a time" in page
    assert "1.50 s: 3.00 times as fast, at 0.25 of its process's peak" in page
    assert "trl 1.16.0, 1 pair at a time | off | 3 | 0.6931 → 0.6400 | 3.0e-05" in page
    # Its updates hold other pairs.
    assert "default batches | off | 3 | 0.7000 → 0.5000 | – | 0.6500 (0.6400 to 0.6600)" in page
    assert "default batches (`--batch-tokens 480`) | off | 80 | 20% | 1 | 1.00 | 3 |" in page
    assert "- Failed: unsloth_zoo-1 (out of memory)." in page
    assert "12 preference pairs of `pairs` by every package: one pass, 3 updates of 4" in page


def test_without_results_there_is_no_page(comparison, tmp_path):
    for file in (tmp_path / "results").iterdir():
        file.unlink()
    assert comparison.page(1) == ""
