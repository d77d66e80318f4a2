"""Rows that a model can't compute are refused in every command; inexact ones are said."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from mlx_align import RewardModel
from mlx_align.cli.main import run
from mlx_align.errors import DataError
from mlx_align.inference.generate import TextGenerator
from mlx_align.inference.implicit_reward import load_logprob_scorer
from mlx_align.models.loading import open_model
from mlx_align.models.row_limits import check_lengths, check_rows
from mlx_align.types import TokenizedGroup

ORACLE = Path(__file__).parent.parent / "oracle"
POLICY = ORACLE / "models" / "policy"
TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def extended(tmp_path):
    """Models whose tokenizer has three tokens more than their embedding has rows."""

    def make(source):
        folder = tmp_path / source.name
        shutil.copytree(source, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        names = ["<|user|>", "<|assistant|>", "<|end|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": names})
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}? what"}],
            "chosen": [{"role": "assistant", "content": f"yes {i}"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for i in range(12)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


COMMANDS = {
    "data check": ["data", "check"],
    "dpo": ["dpo", "--iters", "1", "--output", "{out}"],
    "sft": ["sft", "--iters", "1", "--output", "{out}"],
    "reward": ["reward", "--iters", "1", "--output", "{out}"],
    "grpo": ["grpo", "--iters", "1", "--reward", "length(target=4)", "--output", "{out}"],
    "plan": ["plan"],
    "score": ["score", "--logps", "--output", "{out}"],
    "data sample": ["data", "sample", "--reward", "length(target=4)", "--output", "{out}"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_tokens_outside_the_embedding_are_refused(command, extended, pairs, tmp_path, capsys):
    out = tmp_path / "out"
    given = [word.format(out=out) for word in COMMANDS[command]]
    assert run([*given, "--model", str(extended(POLICY)), "--data", str(pairs)]) == 1
    error = capsys.readouterr().err
    assert "has 400 rows (ids 0 to 399); 3 of the tokenizer's 403 tokens are outside" in error
    assert "'<|user|>' (400), '<|assistant|>' (401), '<|end|>' (402)" in error
    assert "model.resize_token_embeddings(403)" in error
    assert "pairs.jsonl:1: token '<|" in error
    assert not list(tmp_path.glob("out/adapters*"))


def test_tokens_outside_the_embedding_of_a_reward_model(extended):
    model = RewardModel.load(str(extended(ORACLE / "classifiers" / "llama")))
    with pytest.raises(DataError, match=r"token '<\|end\|>' has id 402"):
        model.score([{"role": "user", "content": "what"}], ["yes"])


@pytest.mark.parametrize("token", [-1, 400, 2**31 - 1])
def test_ids_that_are_no_tokens_are_refused(token):
    def group(*completion):
        completions = (np.array(completion, np.int32),)
        return TokenizedGroup(np.array([5, 6], np.int32), completions, "row")

    folder = open_model(str(POLICY))
    assert check_rows(folder, [group(0), group(399)]) == []
    words = rf"row: token id {token}, but the embedding of .* has 400 rows \(ids 0 to 399\)"
    with pytest.raises(DataError, match=words):
        check_rows(folder, [group(7), group(7, token)])
    with pytest.raises(DataError, match=words):
        load_logprob_scorer(str(POLICY)).score_tokens([group(7, token)])
    prompt = TokenizedGroup(np.array([5, token], np.int32), (), "row")
    with pytest.raises(DataError, match=words):
        TextGenerator.load(str(POLICY)).sample([prompt], 1, max_tokens=1)


def rewritten(tmp_path, **changes):
    folder = tmp_path / "model"
    shutil.copytree(POLICY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_rows_longer_than_a_window_are_said(tmp_path, capsys):
    model = rewritten(tmp_path, model_type="mistral", sliding_window=16)
    data = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"Say {i}", "chosen": " yes" * (1 + 9 * i), "rejected": " no"} for i in (0, 1)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    assert run(["data", "check", "--model", str(model), "--data", str(data)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "! 8 of 16 rows are longer than 16 tokens" in shown
    assert "a sliding window of 16 tokens, which mlx-lm's mistral does not compute" in shown
    output = tmp_path / "scores.jsonl"
    where = ["--model", str(model), "--data", str(data), "--output", str(output)]
    assert run(["score", "--logps", *where]) == 0
    assert "! 8 of 16 rows are longer than 16 tokens" in " ".join(capsys.readouterr().out.split())


def test_rows_that_can_not_be_computed_are_refused(tmp_path):
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = rewritten(tmp_path, rope_parameters=dynamic, max_position_embeddings=32)
    folder = open_model(str(model))
    assert check_lengths(folder, [32, 10]) == []
    with pytest.raises(DataError, match=r"longest row: 33 tokens, .* up to 32: .*\(dynamic\)"):
        check_lengths(folder, [10, 33])


def test_positions_that_were_not_trained_are_said():
    (remark,) = check_lengths(open_model(str(POLICY)), [512, 513, 600])
    assert remark.startswith("2 of 3 rows are longer than 512 tokens (longest 600): ")
    assert "max_position_embeddings" in remark
