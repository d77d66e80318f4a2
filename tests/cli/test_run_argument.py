"""A run folder is enough: its base model and data are found in it."""

import json
import shutil

import pytest
from helpers.paths import TINY_MODEL
from helpers.runs import mlx_align

from mlx_align.config import TrainConfig
from mlx_align.training.setup import describe_test_split


@pytest.fixture(scope="module")
def run(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dpo"
    cache = ["--reference-cache", folder.parent / "cache"]
    options = ["--iters", 1, "--batch-size", 1, "--samples", 0, *cache]
    assert (
        mlx_align("dpo", "--model", TINY_MODEL, "--data", pairs, "--output", folder, *options) == 0
    )
    return folder


QUICK = ("--samples", 2, "-n", 1, "--max-completion-length", 4)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("eval", (*QUICK, "--output", "out")),
        ("score", ("--data", "pairs", "--output", "out")),
        ("rerank", ("--prompt", "Is rain good?", "-n", 2, "--max-completion-length", 4)),
        ("fuse", ("--output", "out")),
        ("export", ("--output", "out")),
    ],
)
def test_run_alone(run, pairs, tmp_path, monkeypatch, capsys, command, options):
    monkeypatch.chdir(tmp_path)
    given = [pairs / "valid.jsonl" if option == "pairs" else option for option in options]
    assert mlx_align(command, run, *given) == 0
    if "--output" in options:
        assert (tmp_path / "out").exists()
    else:
        assert capsys.readouterr().out


def test_eval_shows_answers_turn_by_turn(run, pairs, tmp_path, capsys):
    rows = [json.loads(line) for line in (pairs / "valid.jsonl").read_text().splitlines()[:2]]
    for row in rows:
        row["prompt"] = [{"role": "system", "content": "Be brief."}, *row["prompt"]]
    data = tmp_path / "turns.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert mlx_align("eval", run, "--data", data, *QUICK) == 0
    out = capsys.readouterr().out
    assert out.count("  system  Be brief.\n    user  valid ") == 2
    assert out.count("\n  policy  ") == 2


def test_errors_are_one_line(run, tmp_path, capsys):
    for arguments, said in (
        ((tmp_path,), "has no adapter_config.json; expected the --output folder of a run"),
        ((run, "--adapter-path", run), "give one of them"),
    ):
        assert mlx_align("eval", *arguments) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_another_base_model_may_be_named(run, tmp_path, capsys):
    config = tmp_path / "copy" / "adapter_config.json"
    config.parent.mkdir()
    for name in ("adapter_config.json", "adapters.safetensors"):
        (config.parent / name).write_bytes((run / name).read_bytes())
    config.write_text(json.dumps({**json.loads(config.read_text()), "model": "gone"}))
    options = ["--output", tmp_path / "fused"]
    assert mlx_align("fuse", config.parent, *options) == 1
    assert "gone" in capsys.readouterr().err
    assert mlx_align("fuse", config.parent, "--model", TINY_MODEL, *options) == 0


def test_the_test_split_is_named_in_training_and_measured_on_request(run, pairs, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    rows = (pairs / "valid.jsonl").read_text().splitlines(keepends=True)[:3]
    (data / "test.jsonl").write_text("".join(rows).replace("valid", "test"))
    assert "--split test" in describe_test_split(TrainConfig(data=str(data)), None)[0]
    assert describe_test_split(TrainConfig(data=str(pairs)), None) == []
    for split, count in (("test", 3), ("valid", 12)):
        assert mlx_align("eval", run, "--data", data, "--split", split, *QUICK, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["preferences"]["pairs"] == count
        assert f"{split} split" in found["data"]
    assert mlx_align("eval", run, "--split", "test", *QUICK) == 1
    assert "has no test split" in capsys.readouterr().err
