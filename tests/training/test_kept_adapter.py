"""Which adapter a run keeps, and that its folder has one from the first checkpoint on."""

import json

import mlx.core as mx
import numpy as np
import pytest
from helpers.paths import TINY_MODEL
from helpers.runs import adapter_of, interrupt, metric_rows, mlx_align, stop_after, summary_of
from mlx_lm import load

from mlx_align.algorithms import dpo
from mlx_align.tracking.run_dir import read_run_record
from mlx_align.training.checkpoint import publish_adapter, read_adapter


@pytest.fixture
def train(pairs, tmp_path, monkeypatch):
    """Train with planted held-out losses, one per evaluation, the first before training."""

    def run(losses, *options, name="run", command="dpo"):
        planted = iter(losses)
        original = dpo.evaluate_pairs
        monkeypatch.setattr(
            dpo,
            "evaluate_pairs",
            lambda *args: {**original(*args), "loss": next(planted)},
        )
        folder = tmp_path / name
        fixed = ["--iters", 4, "--batch-size", 2, "--grad-accumulation-steps", 1, "--samples", 0]
        where = ["--model", TINY_MODEL, "--data", pairs, "--output", folder]
        code = mlx_align(command, *where, *fixed, "--steps-per-eval", 1, *options)
        monkeypatch.setattr(dpo, "evaluate_pairs", original)
        return code, folder

    return run


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one | other)


LOSSES = (0.69, 0.6, 0.5, 0.55, 0.7)


def test_the_best_adapter_is_kept_and_the_last_on_demand(train, capsys):
    code, folder = train(LOSSES)
    assert code == 0
    summary = summary_of(folder)
    assert summary["kept_step"] == 2
    assert summary["eval"]["loss"] == 0.5
    assert same(adapter_of(folder), adapter_of(folder / "checkpoints" / "0000002"))
    assert "Keeping the adapter of update 2, the best on held-out data" in capsys.readouterr().out
    assert read_run_record(folder).kept_evaluation["eval/loss"] == 0.5

    code, folder = train(LOSSES, "--keep", "last", name="last")
    assert code == 0
    assert summary_of(folder)["kept_step"] == 4
    assert same(adapter_of(folder), adapter_of(folder / "checkpoints" / "0000004"))
    assert "Keeping the adapter" not in capsys.readouterr().out


def test_a_damaged_best_checkpoint_leaves_the_last(train, monkeypatch, capsys):
    monkeypatch.setattr("mlx_align.training.loop.read_adapter", lambda run, step: None)
    code, folder = train(LOSSES)
    assert code == 0
    assert summary_of(folder)["kept_step"] == 4
    assert "0000002 is damaged: the last adapter is kept" in capsys.readouterr().out


@pytest.mark.parametrize(("keep", "step"), [("best", 1), ("last", 2)])
def test_an_interrupted_run_has_an_adapter_that_mlx_lm_loads(train, monkeypatch, keep, step):
    stop_after(monkeypatch, 2, interrupt)
    code, folder = train((0.69, 0.5, 0.6), "--keep", keep)
    assert code == 130
    assert same(adapter_of(folder), adapter_of(folder / "checkpoints" / f"{step:07d}"))
    model, _ = load(str(TINY_MODEL), adapter_path=str(folder))
    loaded = dict(model.named_modules())
    name, tensor = next(iter(adapter_of(folder).items()))
    module, _, parameter = name.rpartition(".")
    assert mx.array_equal(loaded[module][parameter], mx.array(tensor))


def test_the_adapter_is_replaced_whole(train, tmp_path, monkeypatch):
    code, folder = train(LOSSES)
    assert code == 0
    for file in ("adapters.safetensors", "adapter_config.json"):
        (folder / file).unlink()
    publish_adapter(folder, 4)
    assert same(adapter_of(folder), adapter_of(folder / "checkpoints" / "0000004"))
    # On a drive without links it is copied.
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    publish_adapter(folder, 2)
    assert same(adapter_of(folder), adapter_of(folder / "checkpoints" / "0000002"))
    assert not list(folder.glob(".*.partial"))
    # A checkpoint that was changed is not used.
    (folder / "checkpoints" / "0000002" / "adapters.safetensors").write_bytes(b"")
    assert read_adapter(folder, 2) is None


def test_held_out_numbers_have_intervals(train, capsys):
    code, folder = train(LOSSES)
    assert code == 0
    shown = capsys.readouterr().out
    assert "held-out after 1: loss 0.6000, accuracy" in shown
    assert "n = 12" in shown
    assert "Held-out data, n = 12" in shown
    assert "95% interval" in shown
    found = summary_of(folder)["eval_intervals"]
    row = metric_rows(folder, "eval/loss")[2]
    for name in ("rewards/accuracies", "rewards/margins", "logps/chosen"):
        ends = found[name]
        assert ends["n"] == 12
        assert ends["low"] <= row[f"eval/{name}"] <= ends["high"]
    verdict = summary_of(folder)["verdict"]
    assert verdict["n"] == 12
    assert verdict["estimate"]["low"] < verdict["estimate"]["high"]
    json.dumps(verdict)
