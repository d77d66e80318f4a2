"""`mlx-align data sample` without a reward: arms, temperatures, resuming, and what label reads."""

import json

import mlx_lm
import pytest
from helpers.data import read_rows, user, write_rows
from helpers.paths import STARTER

from mlx_align.cli.main import run as run_command
from mlx_align.errors import ConfigError
from mlx_align.preferences import sample_answers as module
from mlx_align.preferences.ai_feedback import read_answer_pairs
from mlx_align.preferences.arms import Arm, read_arms, temperature_arms
from mlx_align.preferences.sample_answers import with_system_prompt
from mlx_align.types import Message

DEFAULT = Arm("answers", "base", "runs/first", None, 1.0, 2)


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": user(f"What is the capital of {c}?"), "k": c} for c in ("Peru", "Chad")]
    return write_rows(tmp_path / "prompts.jsonl", rows)


def sample(prompts, output, *arguments):
    command = ["data", "sample", "--model", STARTER / "model", "--data", prompts]
    command += ["--output", output, "--max-tokens", "6", *arguments]
    return run_command([str(one) for one in command])


def test_answers_of_several_arms(prompts, tmp_path, capsys):
    arms = tmp_path / "arms.yaml"
    arms.write_text(
        "- name: plain\n- name: pirate\n  system: You are a pirate.\n  temperature: 2.0\n  n: 3\n"
    )
    output = tmp_path / "answers.jsonl"
    assert sample(prompts, output, "--arms", arms, "-n", "2", "--temperature", "1.5") == 0
    rows = read_rows(output)
    assert [row["k"] for row in rows] == ["Peru", "Chad"]
    for row in rows:
        assert row["prompt"][0]["role"] == "user"
        assert len(row["completions"]) == len(row["models"]) == len(row["arms"])
        assert len(set(row["completions"])) == len(row["completions"])
        assert row["arms"].count("plain") <= 2
        assert row["arms"].count("pirate") <= 3
        assert set(row["models"]) == {str(STARTER / "model")}
    assert "pirate" in rows[0]["arms"]
    pairs, _ = read_answer_pairs(str(output), pairs_per_prompt=1)
    assert len(pairs) == 2
    assert not list(tmp_path.glob("*.partial.jsonl"))
    assert "mlx-align label" in capsys.readouterr().out


def test_an_interrupted_command_continues_and_ends_with_the_same_file(
    prompts, tmp_path, monkeypatch
):
    options = ("--temperatures", "0.7,1.3", "-n", "2")
    assert sample(prompts, tmp_path / "whole.jsonl", *options) == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert {name for row in read_rows(tmp_path / "whole.jsonl") for name in row["arms"]} == {
        "temperature 0.7",
        "temperature 1.3",
    }
    original, calls = module.sample_completions, []

    def interrupted(*args, **kwargs):
        calls.append(kwargs["temperature"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "sample_completions", interrupted)
    output = tmp_path / "answers.jsonl"
    assert sample(prompts, output, *options) == 130
    assert not output.exists()
    assert len(read_rows(tmp_path / "answers.partial.jsonl")) == 1
    assert sample(prompts, output, *options) == 0
    assert output.read_bytes() == whole
    assert calls == [0.7, 1.3, 1.3]


def test_label_samples_answers_to_prompts_first(prompts, tmp_path, monkeypatch):
    import io

    output = tmp_path / "labels.jsonl"
    command = ["label", prompts, "--output", output, "--model", STARTER / "model", "-n", "4"]
    command += ["--max-completion-length", "6", "--temperatures", "2"]
    monkeypatch.setattr("sys.stdin", io.StringIO("11"))
    assert run_command([str(one) for one in command]) == 0
    assert len(read_rows(output)) == 2
    answers = read_rows(tmp_path / "labels.answers.jsonl")
    for row in read_rows(output):
        texts = {row["response_a"][0]["content"], row["response_b"][0]["content"]}
        assert any(texts <= set(line["completions"]) for line in answers)
        assert row["model_a"] == str(STARTER / "model")
        assert row["columns"]["k"] in ("Peru", "Chad")


def test_an_arm_has_what_the_file_says_and_else_the_options(tmp_path):
    file = tmp_path / "arms.yaml"
    file.write_text(json.dumps([{"temperature": 0.5}, {"name": "b", "model": "other", "n": 1}]))
    first, second = read_arms(file, DEFAULT)
    assert first == Arm("arm 1", "base", "runs/first", None, 0.5, 2)
    assert second == Arm("b", "other", None, None, 1.0, 1)
    assert first.author == "base + runs/first"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- temprature: 1", "unknown key 'temprature'; expected name, model"),
        ("- temperature: hot", "arm 1: temperature is 'hot'; expected a number"),
        ("- n: 0", "n of at least 1"),
        ("- temperature: -1", "a temperature of at least 0"),
        ("- temperature: 0", "temperature 0 makes all 2 answers the same; add n: 1"),
        ("- name: a\n- name: a", "two arms are named 'a'"),
        ("name: a", "expected a list"),
        ("- a: [", "not YAML"),
        ("- just text", "expected lines of"),
    ],
)
def test_a_wrong_arm_is_named(tmp_path, text, message):
    file = tmp_path / "arms.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_arms(file, DEFAULT)


@pytest.mark.parametrize("given", [("x",), ("0",), ("1", "1.0"), ("inf",)])
def test_wrong_temperatures(given):
    with pytest.raises(ConfigError, match="--temperatures"):
        temperature_arms(given, DEFAULT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep", "1"), "--keep 1 needs --reward or --reward-model"),
        (("--pairs",), "--pairs needs --reward"),
        (
            ("--reward", "length(target=3)", "--temperatures", "1"),
            "--temperatures is for all answers",
        ),
        (("--temperature", "0"), "--temperature 0 makes all completions the same; add -n 1"),
        (("--arms", "x.yaml", "--temperatures", "1"), "exclude each other"),
        (("--arms", "x.yaml"), "--arms x.yaml: can't be read"),
    ],
)
def test_options_without_effect_are_refused(prompts, tmp_path, capsys, arguments, message):
    assert sample(prompts, tmp_path / "answers.jsonl", *arguments) == 1
    assert message in capsys.readouterr().err


def test_at_temperature_0_the_answer_is_the_likeliest(prompts, tmp_path):
    found = []
    for seed in ("0", "1"):
        output = tmp_path / f"{seed}.jsonl"
        assert sample(prompts, output, "--temperature", "0", "-n", "1", "--seed", seed) == 0
        found.append([row["completions"] for row in read_rows(output)])
    model, tokenizer = mlx_lm.load(str(STARTER / "model"))
    rendered = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)
        for row in read_rows(prompts)
    ]
    likeliest = [
        [mlx_lm.generate(model, tokenizer, prompt, max_tokens=6).strip()] for prompt in rendered
    ]
    assert found == [likeliest, likeliest]


def test_the_system_prompt_of_an_arm_replaces_that_of_the_prompt():
    turn, system = Message("user", "hi"), Message("system", "Be brief.")
    assert with_system_prompt((turn,), "Be brief.") == (system, turn)
    assert with_system_prompt((Message("system", "x"), turn), "Be brief.") == (system, turn)
    assert with_system_prompt("hi", "Be brief.") == (system, turn)
    assert with_system_prompt("hi", None) == "hi"
