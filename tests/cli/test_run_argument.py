"""A run folder is enough: its base model and data are found in it."""

import json
import shutil

import pytest
from helpers.data import read_rows
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
        ("score", ("--output", "out")),
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


def test_outputs_without_a_name_are_in_the_run_folder(run, pairs, tmp_path, capsys):
    """Nothing is overwritten, and what is said to be written is there."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (checkpoint,) = (folder / "checkpoints").iterdir()
    held_out = [row["prompt"] for row in read_rows(pairs / "valid.jsonl")]
    for name in ("scores.jsonl", "scores-2.jsonl"):
        assert mlx_align("score", folder) == 0
        out = capsys.readouterr().out
        assert f"read as: {pairs}, valid split, pairs" in out
        assert f"Wrote 24 scores to {folder / name}\n" in out
        assert "trained on" not in out
        assert [row["prompt"] for row in read_rows(folder / name)] == held_out
    for adapter, name in ((folder, "fused"), (checkpoint, f"fused-{checkpoint.name}")):
        assert mlx_align("fuse", adapter, "--json") == 0
        assert json.loads(capsys.readouterr().out)["output"] == str(folder / name)
        assert (folder / name / "model.safetensors").exists()
    assert mlx_align("fuse", folder) == 1
    assert f"--output {folder / 'fused'}: is not empty" in capsys.readouterr().err
    assert mlx_align("export", folder) == 0
    assert (folder / "peft" / "adapter_model.safetensors").exists()


def test_a_part_of_one_file_is_held_out_and_scored(pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--iters", 1, "--batch-size", 1, "--samples", 0, "--reference-cache", "cache"]
    file = pairs / "train.jsonl"
    for command in ("dpo", "sft"):
        given = options if command == "dpo" else options[:-2]
        assert (
            mlx_align(command, "--model", TINY_MODEL, "--data", file, "--output", "run", *given)
            == 0
        )
        assert mlx_align("score", "run", *(["--logps"] if command == "sft" else [])) == 0
        out = capsys.readouterr().out
        assert f"read as: {file}, the part that the run held out, pairs" in out
        assert "Wrote 16 scores to run/scores.jsonl" in out  # a fifth of 40 pairs
        shutil.rmtree("run")


def test_scores_of_training_rows_are_called_that(run, pairs, tmp_path, capsys):
    mixed = tmp_path / "mixed.jsonl"
    lines = (pairs / "train.jsonl").read_text().splitlines(keepends=True)[:3]
    lines += (pairs / "valid.jsonl").read_text().splitlines(keepends=True)[:2]
    mixed.write_text("".join(lines))
    for data, known, of, said in (
        (mixed, 3, 5, "on 5 pairs (trained on: 3 of the prompts)\n"),
        (pairs, 40, 40, "on 40 pairs (trained on: all of the prompts)\n"),
    ):
        output = ("--data", data, "--output", tmp_path / f"{known}.jsonl")
        assert mlx_align("score", run, *output) == 0
        out = capsys.readouterr().out
        assert said in out
        assert f"! {known} of the {of} prompts are in the run's training data" in out
    output = ("--split", "train", "--output", tmp_path / "own.jsonl")
    assert mlx_align("score", run, *output, "--json") == 0
    assert json.loads(capsys.readouterr().out)["trained_prompts"] == 40


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
        ((run, "--format", "pairs"), "--format: has no effect without --data"),
        (("--adapter-path", tmp_path / "no"), "--adapter-path /"),
    ):
        assert mlx_align("eval", *arguments) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["eval", "score", "rerank", "fuse", "export", "chat"])
def test_a_command_without_a_run_asks_for_one(command, capsys):
    alone = command in ("score", "rerank", "chat")
    assert mlx_align(command) == 1
    other = ", or --model (a model folder or a hub name)" if alone else ""
    said = (
        f"give a run (a folder that mlx-align wrote), as in mlx-align {command} runs/first{other}"
    )
    assert capsys.readouterr().err == f"error: {said}\n"
    if not alone:
        assert mlx_align(command, "--model", TINY_MODEL) == 1
        assert capsys.readouterr().err == f"error: {said}\n"


def test_an_adapter_path_names_its_base_model_too(run, pairs, tmp_path, capsys):
    output = ("--data", pairs / "valid.jsonl", "--output", tmp_path / "scores.jsonl")
    assert mlx_align("score", "--adapter-path", run, *output) == 0
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    capsys.readouterr()
    assert mlx_align("score", adapter, *output) == 1
    assert f"{adapter} doesn't name its base model" in capsys.readouterr().err


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
