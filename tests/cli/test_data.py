"""`mlx-align data check` and what `dpo` says of the same data."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.data import write_rows

from mlx_align.cli.main import run

STARTER = Path(__file__).parents[2] / "data" / "starter"
ROWS = [
    json.loads(line)
    for line in (STARTER / "train.jsonl").read_text(encoding="utf-8").splitlines()[:24]
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model that reads 30 positions, and data whose valid split repeats a prompt of train."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(STARTER / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["max_position_embeddings"] = 30
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "data").mkdir()
    reply = {"role": "assistant", "content": "Another reply, <b>bold</b>."}
    repeated = [{**ROWS[0], "chosen": [reply]}, *ROWS[20:]]
    for name, rows in (("train", ROWS[:20]), ("valid", repeated)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / f"{name}.jsonl").write_text(text)
    return tmp_path


def lines_of(capsys):
    out = " ".join(capsys.readouterr().out.split())
    return [text for text in SAID if text in out]


SAID = (
    "validation rows whose prompt is also in train: 2 of 5",
    "rows longer than the model's max_position_embeddings (30):",
)


def test_dpo_says_what_data_check_says(folder, capsys):
    named = ["--model", "model", "--data", "data"]
    assert run(["data", "check", *named]) == 0
    assert lines_of(capsys) == list(SAID)
    command = ["dpo", *named, "--iters", "1", "--grad-accumulation-steps", "1", "--samples", "0"]
    assert run([*command, "--reference-cache", "cache", "--output", "run"]) == 0
    assert lines_of(capsys) == list(SAID)


def test_dpo_says_how_many_held_out_prompts_are_nearly_in_train(folder, capsys):
    for name, end in (("train", "."), ("valid", "!")):
        rows = [
            {
                "prompt": f"Which of the {i} towns by the river has the older bridge{end}",
                "chosen": "a",
                "rejected": "b",
            }
            for i in range(4)
        ]
        (folder / "near").mkdir(exist_ok=True)
        write_rows(folder / "near" / f"{name}.jsonl", rows)
    command = ["dpo", "--model", "model", "--data", "near", "--iters", "1", "--samples", "0"]
    assert run([*command, "--reference-cache", "cache", "--output", "near-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "! validation rows with a prompt nearly equal to one in train: 4 of 4" in out


def test_check_describes_the_text_as_json(folder, capsys):
    assert run(["data", "check", "--model", "model", "--data", "data", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == found["quality"]["pairs"] == 20
    assert 0 <= found["quality"]["longer_right"] <= 1
    what = [finding["what"] for finding in found["quality"]["findings"]]
    assert "validation rows with a prompt nearly equal to one in train" in what


def test_tools_are_never_dropped_silently(folder, capsys):
    tool = {"type": "function", "function": {"name": "capital", "parameters": {}}}
    prompts = {"prompt": ROWS[0]["prompt"]}
    for name, row, command in (
        ("pairs", ROWS[0], "dpo"),
        ("answers", {**prompts, "completion": ROWS[0]["chosen"]}, "sft"),
        ("chats", {"messages": ROWS[0]["prompt"] + ROWS[0]["chosen"]}, "sft"),
        ("prompts", prompts, "grpo"),
    ):
        rows = (json.dumps({**row, "tools": [tool]}) + "\n" for _ in range(3))
        Path(f"{name}.jsonl").write_text("".join(rows))
        options = ["--reward", "length"] if command == "grpo" else []
        options += ["--valid-fraction", "0", "--output", f"run-{name}"]
        named = ["--model", "model", "--data", f"{name}.jsonl"]
        assert run([command, *named, *options]) == 1
        error = capsys.readouterr().err
        assert "3 with tools or tool calls, which the chat template leaves out" in error


QUESTIONS = [f"How do I {verb} a {thing}?" for verb in ("mend", "wash") for thing in "abcde"]
GOOD, BAD = "Slowly, and with care.", "I can't say."
FILES = {
    "pairs": [{"prompt": q, "chosen": GOOD, "rejected": BAD} for q in QUESTIONS],
    "prompts": [{"prompt": q, "answer": "x"} for q in QUESTIONS],
    "labels": [{"prompt": q, "completion": GOOD, "label": i < 4} for i, q in enumerate(QUESTIONS)],
    "chats": [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": GOOD}]}
        for q in QUESTIONS
    ],
    "scores": [
        {"prompt": q, "response": text, "score": score}
        for q in QUESTIONS
        for text, score in ((GOOD, 3), (BAD, 1), ("Ask the shop.", 2))
    ],
    "text": [{"text": f"{q} {GOOD}"} for q in QUESTIONS],
}
USES = {
    "pairs": {"dpo": 10, "reward": 10, "kto": 20, "sft": 10, "ppo": 10, "grpo": 10},
    "prompts": {"ppo": 10, "grpo": 10},
    "labels": {"kto": 10, "sft": 4, "ppo": 10, "grpo": 10},
    "chats": {"sft": 10, "ppo": 10, "grpo": 10},
    "scores": {"dpo": 30, "reward": 10, "kto": 60, "sft": 10, "ppo": 30, "grpo": 30},
    "text": {"sft": 10},
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("model", [[], ["--model", STARTER / "model"]], ids=["alone", "model"])
def test_check_says_which_commands_can_use_a_file(name, model, tmp_path, capsys):
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in FILES[name]))
    command = ["data", "check", str(file), *map(str, model)]
    assert run([*command, "--json"]) == 0
    uses = json.loads(capsys.readouterr().out)["uses"]
    assert {use: one["rows"] for use, one in uses.items() if one["rows"]} == USES[name]
    assert all(bool(one["reason"]) == (not one["rows"]) for one in uses.values())
    assert run(command) == 0
    out = capsys.readouterr().out
    assert "Can be used by" in out
    assert ("median" in out) == bool(model)
    assert "rejected in another" not in out


def test_check_needs_one_file_and_data_that_something_can_use(tmp_path, capsys):
    file = tmp_path / "odd.jsonl"
    file.write_text('{"q": "a", "a": "b"}\n')
    assert run(["data", "check", str(file)]) == 1
    assert "odd.jsonl:1: not recognised" in capsys.readouterr().err
    assert run(["data", "check", str(file), "--data", "other.jsonl"]) == 1
    assert "give one of them" in capsys.readouterr().err
    assert run(["data", "check"]) == 1
    assert "--data is missing" in capsys.readouterr().err


def test_text_for_a_chat_model_is_named_and_converted(tmp_path, capsys):
    file, converted = tmp_path / "pairs.jsonl", tmp_path / "messages.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in FILES["pairs"]))
    model = ["--model", str(STARTER / "model")]
    assert run(["data", "check", str(file), *model]) == 0
    assert "data convert --as-messages writes them" in capsys.readouterr().out
    assert run(["data", "convert", str(file), "--as-messages", "--output", str(converted)]) == 0
    capsys.readouterr()
    assert run(["data", "check", str(converted), *model]) == 0
    out = capsys.readouterr().out
    assert "--as-messages" not in out
    assert f"<|user|>{QUESTIONS[0]}<|end|><|assistant|>" in out


def test_rows_of_one_prompt_are_checked_too(tmp_path, capsys):
    rows = [{"prompt": "Hi", "chosen": f"Hello {i}", "rejected": f"No {i}"} for i in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["data", "check", str(tmp_path / "p.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "3 rows. To train on them: can't make a validation split" in out
    assert "dpo, reward  3 pairs" in out
