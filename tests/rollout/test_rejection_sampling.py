"""`mlx-align data sample`: the best of several completions, as rows that sft and dpo read."""

import itertools
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from helpers.data import read_rows, write_rows
from helpers.paths import TINY_MODEL
from helpers.runs import mlx_align

from mlx_align.cli.main import run
from mlx_align.data.formats import read_preferences, read_supervised
from mlx_align.rollout import rejection_sampling
from mlx_align.rollout.rejection_sampling import RejectionSamplingConfig, select_rows
from mlx_align.rollout.sampler import Prompt
from mlx_align.types import Message, PromptGroup, TokenizedGroup

CONFIG = RejectionSamplingConfig(
    n=4, keep=1, threshold=None, pairs=False, max_tokens=8, temperature=1.0, seed=0
)


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """Run the command on 20 prompts; returns the exit code and the rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(
        "def letters(completions, **columns):\n"
        "    return [float(sum(c.isalpha() for c in text)) for text in completions]\n"
        "def even(completions, number, **columns):\n"
        "    return [None if n % 2 else float(len(c)) for c, n in zip(completions, number)]\n"
    )

    def call(*more, chat=True, output="out.jsonl", reward="rewards.py:letters"):
        rows = []
        for i in range(20):
            text = f"Say yes {i}." + " Please." * (i % 3)
            prompt = [{"role": "user", "content": text}] if chat else text
            rows.append({"prompt": prompt, "number": i, "text": "clashes"})
        write_rows("prompts.jsonl", rows)
        options = ("--model", TINY_MODEL, "--data", "prompts.jsonl", "--output", output)
        options += ("-n", 4, "--max-tokens", 6)
        if reward is not None:
            options += ("--reward", reward)
        code = mlx_align("data", "sample", *options, *more)
        file = Path(output)
        return code, read_rows(file) if file.exists() else []

    return call


def selected(**config):
    group = PromptGroup("Q", (), "f:1", columns={"id": 7, "messages": "clashes"})
    prompt = Prompt(group, TokenizedGroup(np.array([1], np.int32), (), "f:1"))
    texts = ["a", "b", " ", "b", "c", "d"]
    scores = np.array([1.0, 3.0, 9.0, 3.0, np.nan, 2.0])
    return select_rows(
        prompt, texts, scores, RejectionSamplingConfig(**{**CONFIG.__dict__, "n": 6, **config})
    )


def test_the_best_distinct_completions_are_kept():
    row = {"id": 7, "prompt": "Q", "n": 6}
    assert selected() == [{**row, "completion": "b", "score": 3.0}]
    assert [r["completion"] for r in selected(keep=6)] == ["b", "d", "a"]
    assert [r["completion"] for r in selected(keep=6, threshold=2.0)] == ["b", "d"]
    assert selected(threshold=3.5) == []


@pytest.mark.parametrize(
    ("scores", "threshold", "kept"),
    [
        ([0, 0, 0], None, []),
        ([0, 0, 0], 0.0, [0, 0, 0]),
        ([1, 0, 0], None, [1]),
        ([0, -1, -2], None, [0, -1, -2]),
        ([0.5, 0, -1], None, [0.5, 0, -1]),
    ],
)
def test_completions_that_earned_nothing_are_no_demonstrations(scores, threshold, kept):
    group = PromptGroup("Q", (), "f:1")
    prompt = Prompt(group, TokenizedGroup(np.array([1], np.int32), (), "f:1"))
    config = RejectionSamplingConfig(**{**CONFIG.__dict__, "keep": 3, "threshold": threshold})
    rows = select_rows(prompt, ["a", "b", "c"], np.array(scores, float), config)
    assert [row["score"] for row in rows] == kept


def test_nothing_to_write_if_every_sample_scored_0(sample, capsys):
    Path("zero.py").write_text(
        "def zero(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    code, rows = sample(reward="zero.py:zero")
    assert (code, rows) == (1, [])
    err = capsys.readouterr().err
    assert "the best score is 0" in err
    assert "Train on them" not in err


def test_pairs_are_best_and_worst():
    (pair,) = selected(pairs=True)
    assert (pair["chosen"], pair["rejected"]) == ("b", "a")
    assert (pair["score_chosen"], pair["score_rejected"], pair["id"]) == (3.0, 1.0, 7)
    assert selected(pairs=True, threshold=3.5) == []


def test_equal_scores_make_no_pair():
    group = PromptGroup((Message("user", "Q"),), (), "f:1")
    prompt = Prompt(group, TokenizedGroup(np.array([1], np.int32), (), "f:1"))
    config = RejectionSamplingConfig(**{**CONFIG.__dict__, "pairs": True, "n": 2})
    assert select_rows(prompt, ["a", "b"], np.array([1.0, 1.0]), config) == []


@pytest.mark.parametrize("chat", [True, False])
def test_rows_are_read_by_sft_and_dpo(sample, chat, capsys):
    code, rows = sample("--keep", 2, chat=chat)
    assert code == 0
    numbers = [row["number"] for row in rows]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(20))
    for first, second in itertools.pairwise(rows):
        if first["number"] == second["number"]:
            assert first["score"] >= second["score"]
    assert all("text" not in row and row["n"] == 4 for row in rows)
    text = rows[0]["completion"][0]["content"] if chat else rows[0]["completion"]
    assert rows[0]["score"] == sum(c.isalpha() for c in text)
    groups, reading = read_supervised("out.jsonl")
    assert (len(groups), reading.format) == (len(rows), "completion")
    assert "mlx-align sft" in capsys.readouterr().out
    assert sample("--keep", 2, chat=chat, output="again.jsonl") == (0, rows)
    assert sample("--keep", 2, "--seed", 1, chat=chat, output="other.jsonl")[1] != rows
    code, pairs = sample("--pairs", chat=chat, output="pairs.jsonl")
    assert code == 0
    assert all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs)
    assert len(read_preferences("pairs.jsonl")[0]) == len(pairs)


def test_with_an_adapter_and_a_reward_model(sample, tmp_path, capsys):
    pairs = [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "chosen": "yes", "rejected": "no no"}
        for i in range(12)
    ]
    for pair in pairs:
        for name in ("chosen", "rejected"):
            pair[name] = [{"role": "assistant", "content": pair[name]}]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    short = ["--model", str(TINY_MODEL), "--data", "pairs.jsonl", "--iters", "3", "--samples", "0"]
    short += ["--grad-accumulation-steps", "1", "--learning-rate", "0.05", "--lora-rank", "2"]
    assert run(["sft", *short, "--output", "sft"]) == 0
    assert run(["reward", *short, "--output", "rm"]) == 0
    capsys.readouterr()
    bare = sample()[1]
    code, rows = sample("--adapter-path", "sft", output="adapted.jsonl")
    assert code == 0
    assert [r["completion"] for r in rows] != [r["completion"] for r in bare]
    capsys.readouterr()
    more = ("--reward-model", "rm", "--adapter-path", "sft", "--json")
    code, rows = sample(*more, output="scored.jsonl", reward=None)
    assert code == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["rows"], summary["prompts"]) == (len(rows), 20)
    assert summary["score"] == pytest.approx(np.mean([row["score"] for row in rows]))
    from mlx_align.inference.reward_model import RewardModel

    answer = rows[3]["completion"]
    (alone,) = RewardModel.load(str(TINY_MODEL), "rm").score(rows[3]["prompt"], [answer])
    assert rows[3]["score"] == pytest.approx(float(alone), abs=1e-4)


def test_prompts_without_a_score_have_no_row(sample):
    code, rows = sample(reward="rewards.py:even")
    assert code == 0
    assert [row["number"] for row in rows] == list(range(0, 20, 2))


def test_interrupted_output_has_only_whole_lines(sample, monkeypatch):
    original, calls = rejection_sampling.sample_completions, []

    def stopping(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **named)

    monkeypatch.setattr(rejection_sampling, "sample_completions", stopping)
    code, rows = sample()
    assert code == 130
    assert [row["number"] for row in rows] == list(range(16))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--output", "prompts.jsonl"], "exists already"),
        (["--keep", "5"], "--keep 5"),
        (["--pairs", "--keep", "2"], "--keep 2"),
        (["--pairs", "-n", "1"], "-n 1"),
        (["--threshold", "1e9"], "--threshold 1e+09"),
        (["--reward-model-weight", "2"], "--reward-model-weight 2"),
        (["--adapter-path", "nowhere"], "--adapter-path nowhere"),
        (["--reward", "nonsense"], "nonsense"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_errors_are_one_line(sample, capsys, more, said):
    assert sample(*more)[0] == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


@pytest.mark.parametrize(
    "more", [["--threshold", "1e9"], ["--reward", "exact_answer(column='gone')"]]
)
def test_no_file_is_left_when_there_are_no_rows(sample, more):
    assert sample(*more) == (1, [])
    assert not Path("out.jsonl").exists()


def test_without_rewards(sample):
    """Answers to compare, of every prompt."""
    code, rows = sample(reward=None)
    assert code == 0
    assert len(rows) == 20, rows[0]
