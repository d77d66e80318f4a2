"""`mlx-align data check` and what `dpo` says of the same data."""

import json
import shutil
from pathlib import Path

import pytest

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
