"""A finished ppo or grpo run, read again by `mlx-align eval` and `mlx-align rerank`."""

import json

import pytest
from helpers.data import assistant, user, write_splits
from helpers.paths import TINY_MODEL
from helpers.runs import mlx_align

from mlx_align.evaluation.data import read_held_out_data
from mlx_align.inference.trained_run import read_trained_run
from mlx_align.training import on_policy

SMALL = (
    *("--batch-size", 2, "--grad-accumulation-steps", 1, "--group-size", 2, "--lora-rank", 2),
    *("--max-completion-length", 4, "--max-seq-length", 96, "--samples", 0, "--iters", 1),
    *("--learning-rate", 1e-2, "--reward", "regex(pattern='[aeiou]')", "--val-batches", -1),
)
QUICK = ("--samples", 3, "-n", 2, "--sample-tokens", 4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A grpo run on prompts, and a ppo run on pairs that started from it; what both held out."""
    folder = tmp_path_factory.mktemp("runs")
    held_out = {}
    original = on_policy.read_prompt_splits
    questions = [user(f"{i}: is it good?") for i in range(12)]
    prompts = [{"prompt": one, "number": i} for i, one in enumerate(questions)]
    answers = {"chosen": assistant("yes " * 9), "rejected": assistant("no")}
    for name, rows in (("prompts", prompts), ("pairs", [{**row, **answers} for row in prompts])):
        write_splits(folder / name, train=rows)

    ppo = ("--init-adapter", folder / "grpo", "--reward-rollouts", 0, "--critic-warmup", 0)
    with pytest.MonkeyPatch.context() as patched:
        for name, data, options in (("grpo", "prompts", ()), ("ppo", "pairs", ppo)):

            def read(config, folder, data=None, name=name):
                found = original(config, folder, data)
                held_out[name] = [prompt.text.prompt for prompt in found[1]]
                return found

            patched.setattr(on_policy, "read_prompt_splits", read)
            where = ("--model", TINY_MODEL, "--data", folder / data, "--output", folder / name)
            own = ("--valid-fraction", 0.3, "--seed", 3)
            assert mlx_align(name, *where, *SMALL, *own, *options) == 0
    return folder, held_out


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_held_out_rows_are_those_of_an_on_policy_run(runs, name):
    folder, held_out = runs
    found = read_held_out_data(read_trained_run(folder / name), None, None)
    assert len(held_out[name]) == 4
    assert [group.prompt for group in found.prompts] == held_out[name]
    assert len(found.pairs) == (4 if name == "ppo" else 0)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_run_is_measured_against_its_start(runs, name, capsys):
    folder, _ = runs
    capsys.readouterr()
    where = ("--model", TINY_MODEL, "--adapter-path", folder / name)
    assert mlx_align("eval", *where, *QUICK, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["divergence"]["per_answer"] != 0
    if name == "grpo":
        assert found["reference"] == "the base model"
        assert found["preferences"] is None
    else:
        assert str(folder / "grpo") in found["reference"]
        assert found["preferences"]["pairs"] == 4
    assert mlx_align("eval", *where, *QUICK) == 0
    assert "KL from the reference" in capsys.readouterr().out


def test_pairs_are_not_truncated_to_the_sampling_length(runs):
    """--max-completion-length of such a run is how long its samples may get."""
    folder, _ = runs
    assert read_trained_run(folder / "ppo").config.max_completion_length is None


def test_the_command_of_an_unfinished_run_is_found(runs):
    folder, _ = runs
    for name in ("grpo", "ppo"):
        (folder / name / "summary.json").rename(folder / name / "kept.json")
        try:
            assert read_trained_run(folder / name).command == name
        finally:
            (folder / name / "kept.json").rename(folder / name / "summary.json")


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_reranking_needs_beta_or_a_reward_model(runs, name, capsys):
    folder, _ = runs
    where = ("--model", TINY_MODEL, "--adapter-path", folder / name)
    ask = (*where, "--prompt", "is it?", "-n", 2, "--max-tokens", 3)
    assert mlx_align("rerank", *ask) == 1
    error = capsys.readouterr().err
    assert f"a run of {name} has no β" in error
    assert "give --beta" in error
    assert "--reward-model" in error
    assert error.count("\n") == 1
    assert mlx_align("rerank", *ask, "--beta", 0.05, "--json") == 0
    ranked = json.loads(capsys.readouterr().out.splitlines()[0])
    scores = [one["score"] for one in ranked["completions"]]
    assert scores == sorted(scores, reverse=True)
