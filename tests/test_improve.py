"""`mlx-align improve`: rounds of sampling, comparing, training and evaluation."""

import json

import pytest
from helpers.data import assistant, read_rows, user, write_rows
from helpers.paths import STARTER
from helpers.runs import mlx_align

from mlx_align.preferences.lineage import model_lineage

RULES = """
def short(prompts, completions):
    return [-len(text) for text in completions]

def same(prompts, completions):
    return [0.0 for text in completions]
"""
TRAIN = """
batch_size: 2
valid_fraction: 0
samples: 0
val_batches: 1
learning_rate: 0.002
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text(RULES)
    (tmp_path / "train.yaml").write_text(TRAIN)
    rows = read_rows(STARTER / "train.jsonl")[:5]
    write_rows("data/train.jsonl", [{"prompt": row["prompt"]} for row in rows])
    rows = read_rows(STARTER / "valid.jsonl")[:2]
    write_rows("data/valid.jsonl", [{"prompt": row["prompt"]} for row in rows])
    return tmp_path


def improve(*options, output="out", judge=("--reward", "rules.py:short", "--allow-unproven")):
    where = ("--model", STARTER / "model", "--data", "data", "--output", output)
    short = ("--train-config", "train.yaml", "--iters", 1, "--max-completion-length", 30)
    return mlx_align("improve", *where, *short, *judge, *options)


def test_rounds_build_on_each_other_and_continue(folder, capsys):
    held_out = ("--eval-reward", "length(target=4)", "--no-guard")
    assert improve(*held_out, "--rounds", 1) == 0
    first = json.loads((folder / "out" / "improve.json").read_text())
    assert first["stopped"] == "all 1 rounds are done"
    run = folder / "out" / "round-1" / "run"
    assert (run / "adapters.safetensors").exists()
    # Answers of a round are those of the policy it started from, judged by the rule.
    for row in read_rows("out/round-1/judged.jsonl"):
        assert len(row["chosen"][0]["content"]) < len(row["rejected"][0]["content"])
    # Two held-out prompts are too few to believe in an improvement.
    unsure = "can't be told apart from ½" in capsys.readouterr().out
    assert unsure == (first["best_round"] is not None)
    kept = (folder / "out" / "round-1" / "judged.jsonl").read_bytes()
    adapter = (run / "adapters.safetensors").read_bytes()
    capsys.readouterr()
    assert improve(*held_out, "--rounds", 2) == 0
    assert (folder / "out" / "round-1" / "judged.jsonl").read_bytes() == kept
    assert (run / "adapters.safetensors").read_bytes() == adapter
    found = json.loads((folder / "out" / "improve.json").read_text())
    assert found["rounds"][0]["win_rate"] == first["rounds"][0]["win_rate"]
    assert len(found["rounds"]) == 2
    # The second round starts from the first, which is its reference.
    second = folder / "out" / "round-2" / "run"
    base = model_lineage(STARTER / "model")
    assert model_lineage(STARTER / "model", second)[1:] == model_lineage(STARTER / "model", run)
    assert model_lineage(STARTER / "model", run)[1:] == base
    writers = {name for row in read_rows("out/round-2/answers.jsonl") for name in row["models"]}
    assert all("round-1" in name for name in writers)
    rate = found["rounds"][1]["win_rate"]
    assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
    # Other options would be another experiment.
    assert improve(*held_out, "--seed", 5) == 1
    assert "was started with another --seed" in capsys.readouterr().err


def test_the_guard_stops_when_the_held_out_judge_no_longer_rises(folder, capsys):
    assert improve("--eval-reward", "rules.py:same", "--rounds", 3) == 0
    found = json.loads((folder / "out" / "improve.json").read_text())
    assert len(found["rounds"]) == 1
    assert found["rounds"][0]["win_rate"]["value"] == 0.5
    assert found["best_round"] is None
    out = capsys.readouterr().out
    assert "Stopped: the held-out judge prefers round 1 no more than what was before" in out
    assert "No round beats the start" in out


def test_people_can_label_instead(folder, capsys):
    people = ("--labels-by", "people")
    held_out = ("--eval-reward", "rules.py:short", "--rounds", 1)
    assert improve(*held_out, judge=people) == 0
    assert "Round 1 waits for labels" in capsys.readouterr().out
    answers = read_rows("out/round-1/answers.jsonl")
    assert {len(row["completions"]) for row in answers} == {2}
    write_rows(
        "out/round-1/labels.jsonl",
        [
            {
                "prompt": row["prompt"],
                "chosen": assistant(row["completions"][0]),
                "rejected": assistant(row["completions"][1]),
            }
            for row in answers
        ],
    )
    assert improve(*held_out, judge=people) == 0
    (found,) = json.loads((folder / "out" / "improve.json").read_text())["rounds"]
    assert found["pairs"] > 0


def test_wrong_options_are_named_before_anything_is_sampled(folder, capsys):
    held_out = ("--eval-reward", "rules.py:same")
    starter = STARTER / "model"
    for judge, options, message in [
        ((), held_out, "no judge; give --judge-model"),
        (("--reward", "rules.py:short"), (), "no held-out judge; give --eval-judge-model"),
        (("--reward", "rules.py:same"), held_out, "the held-out judge is the one that labels"),
        (
            ("--reward", "rules.py:short", "--reward-model", "rm"),
            held_out,
            "--reward-model and --reward name several judges",
        ),
        (("--labels-by", "people", "--reward", "rules.py:short"), held_out, "--reward: has no"),
        (("--judge-model", starter), held_out, "which is the model to train"),
    ]:
        assert improve(*options, judge=judge, output="refused") == 1
        assert message in capsys.readouterr().err
    write_rows("data/train.jsonl", [{"prompt": user("?")}])
    assert not list(folder.glob("refused/round-*"))
