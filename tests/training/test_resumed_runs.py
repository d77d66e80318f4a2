"""Runs that are continued with a difference: longer, corrected rewards or data, another version."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.data import read_rows, write_rows, write_splits
from helpers.paths import TINY_MODEL
from helpers.runs import (
    change_results,
    metric_rows,
    mlx_align,
    outcome,
    stop_after,
    summary_of,
    with_nan,
)

import mlx_align as ma
from mlx_align.algorithms import dpo as pair_algorithm
from mlx_align.algorithms.update import make_schedule
from mlx_align.config import DPOConfig, schema
from mlx_align.config.schema import RemovedOption
from mlx_align.rollout import reward_functions
from mlx_align.training.resume import run_config

SMALL = (
    *("--batch-size", 2, "--grad-accumulation-steps", 2, "--lora-rank", 2, "--samples", 0),
    *("--reference-cache", "cache", "--steps-per-report", 1, "--save-every", 2, "--keep", "last"),
    *("--learning-rate", 1e-5),
)
ROLLOUTS = (
    *("--group-size", 2, "--grad-accumulation-steps", 1, "--lora-rank", 2, "--samples", 0),
    *("--max-completion-length", 6, "--save-every", 1, "--no-guard", "--lr-schedule", "constant"),
    *("--keep", "last"),
)


@pytest.fixture(autouse=True)
def own_pairs(tmp_path, monkeypatch):
    """A folder of pairs and a reward function, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reward_functions, "_RETRY_SECONDS", 0.0)
    write_rewards("float(len(text))")
    rows = {
        split: [
            {"prompt": f"{split} {i}?", "chosen": " yes" + "a" * (i % 4), "rejected": " no"}
            for i in range(n)
        ]
        for split, n in (("train", 10), ("valid", 3))
    }
    return write_splits("pairs", **rows)


def write_rewards(value, before=""):
    Path("mine.py").write_text(
        f"CALLS = []\ndef f(completions):\n    CALLS.append(1)\n    {before}\n"
        f"    return [{value} for text in completions]\n"
    )


def dpo(*options, output="run"):
    where = ("--model", TINY_MODEL, "--data", "pairs", "--output", output)
    return mlx_align("dpo", *where, *SMALL, *options)


def grpo(*options, command="grpo", output="run"):
    where = ("--model", TINY_MODEL, "--data", "pairs", "--output", output)
    return mlx_align(command, *where, *ROLLOUTS, "--reward", "mine.py:f", *options)


def resumes(run="run"):
    return read_rows(Path(run) / "resumes.jsonl")


def refused(capsys, *arguments):
    """The error of a command, which is one line."""
    capsys.readouterr()
    assert mlx_align(*arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


# --- longer ---


def test_a_finished_run_is_trained_for_longer(capsys):
    """Same optimizer, reference, dropout and order as in a run begun with the new length."""
    same = ("--lr-schedule", "constant", "--warmup", 2, "--lora-dropout", 0.1)
    assert dpo(*same, "--iters", 3) == 0
    assert mlx_align("dpo", "--resume", "run", "--iters", 6) == 0
    assert "Resuming after update 3 of 6" in capsys.readouterr().out
    assert dpo(*same, "--iters", 6, output="whole") == 0
    found, whole = outcome("run"), outcome("whole")
    # The first part evaluated its last update, which the whole run did not.
    extra = [row for row in found["metrics"] if row not in whole["metrics"]]
    assert all(any(name.startswith("eval/") for name in row) for row in extra)
    assert {**found, "metrics": 0} == {**whole, "metrics": 0}
    assert summary_of("run")["steps"] == 6
    (row,) = summary_of("run")["resumes"]
    assert (row["step"], row["total_steps"]) == (3, 6)
    assert row["changed"] == {"options": {"iters": [3, 6]}, "inputs": [], "versions": {}}
    assert row["versions"]["mlx"]
    assert resumes() == [row]
    assert yaml.safe_load(Path("run/config.yaml").read_text())["iters"] == 6


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_is_that_of_a_run_begun_with_the_new_length(capsys, schedule):
    assert dpo("--iters", 3, "--lr-schedule", schedule) == 0
    assert mlx_align("dpo", "--resume", "run", "--iters", 8) == 0
    short, long = (make_schedule(schedule, 1e-5, total, 0.1) for total in (3, 8))
    expected = [*map(short, range(3)), *map(long, range(3, 8))]
    assert [row["learning_rate"] for row in metric_rows("run", "loss")] == pytest.approx(expected)
    out = capsys.readouterr().out
    rate = f"{long(3):.3g} at update 4"
    assert f"as in a run begun with this length ({schedule} schedule): {rate}" in out


def test_epochs_are_added_after_a_smaller_last_update():
    """5 microbatches are 3 updates, and 5 more are 3 more."""
    same = ("--lr-schedule", "constant", "--warmup", 0)
    assert dpo(*same, "--epochs", 1) == 0
    assert mlx_align("dpo", "--resume", "run", "--epochs", 2) == 0
    assert summary_of("run")["steps"] == 6
    assert summary_of("run")["pairs"] == 20
    assert mlx_align("dpo", "--resume", "run", "--iters", 7) == 0
    assert summary_of("run")["pairs"] == 24
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["iters"] == 7
    assert "epochs" not in config
    assert [row["changed"]["options"] for row in resumes()] == [
        {"epochs": [1.0, 2.0]},
        {"iters": [None, 7], "epochs": [2.0, None]},
    ]


def test_an_interrupted_run_can_be_made_longer_or_shorter(monkeypatch, capsys):
    same = ("--lr-schedule", "constant", "--warmup", 0)
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        assert dpo(*same, "--iters", 8) == 130
    assert "has made 2 steps already" in refused(capsys, "dpo", "--resume", "run", "--iters", 2)
    # As a change of the file, too.
    file = Path("run/config.yaml")
    file.write_text(file.read_text().replace("iters: 8", "iters: 4"))
    assert mlx_align("dpo", "--resume", "run") == 0
    assert dpo(*same, "--iters", 4, output="whole") == 0
    assert outcome("run") == outcome("whole")
    assert "is after update 4" in refused(capsys, "dpo", "--resume", "run", "--epochs", 0.5)
    # What is refused changes nothing.
    assert yaml.safe_load(file.read_text())["iters"] == 4
    assert len(resumes()) == 1


def test_reference_logprobs_of_rows_that_only_the_longer_run_uses(capsys):
    """No warning that they changed, and a warning if those of the first rows did."""
    assert dpo("--iters", 1) == 0
    assert mlx_align("dpo", "--resume", "run", "--iters", 2) == 0
    assert "were computed again" not in capsys.readouterr().out
    known = json.loads(Path("run/reference.json").read_text())
    assert known["microbatches"] == 4
    Path("run/reference.json").write_text(json.dumps({**known, "checksum": "0" * 32}))
    assert mlx_align("dpo", "--resume", "run", "--iters", 3) == 0
    assert "were computed again" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["grpo", "ppo"])
def test_an_on_policy_run_is_trained_for_longer(command):
    own = ("--critic-warmup", 0, "--reward-rollouts", 4) if command == "ppo" else ()
    own = (*own, "--warmup", 0)
    assert grpo("--iters", 1, *own, command=command) == 0
    assert mlx_align(command, "--resume", "run", "--iters", 3) == 0
    assert grpo("--iters", 3, *own, command=command, output="whole") == 0
    found, whole = outcome("run"), outcome("whole")
    assert {**found, "metrics": 0} == {**whole, "metrics": 0}


def test_a_run_that_the_guard_stopped_is_not_made_longer(monkeypatch, capsys):
    assert grpo("--iters", 1, "--guard") == 0
    file = Path("run/checkpoints/0000001/state.json")
    state = json.loads(file.read_text())
    state["extra"]["stopped"] = True
    state["extra"]["health"]["recorded"] = [{"step": 1, "level": "stop"}]
    text = json.dumps(state)
    file.write_text(text)
    from mlx_align.training import checkpoint

    monkeypatch.setattr(checkpoint, "_verify", lambda folder: None)
    error = refused(capsys, "grpo", "--resume", "run", "--iters", 2)
    assert "a health check ended the run after batch 1" in error


def test_longer_from_python():
    data = [{"prompt": f"{i}?", "chosen": " yes", "rejected": " no"} for i in range(12)]
    same = {"lora_rank": 2, "samples": 0, "progress": False, "reference_cache": "cache"}
    run = ma.dpo(model=str(TINY_MODEL), data=data, output="run", iters=1, **same)
    assert run.resume(iters=2, progress=False).summary["steps"] == 2


# --- rewards and data that changed ---


def test_a_reward_function_that_raised_once_is_called_again(capsys):
    write_rewards("float(len(text))", "if len(CALLS) == 3: raise OSError('busy')")
    assert grpo("--iters", 2) == 0
    out = capsys.readouterr().out
    assert "! --reward mine.py:f: raised OSError: busy (" in out
    assert "mine.py:4); calling it again." in out
    assert not Path("run/resumes.jsonl").exists()


@pytest.mark.parametrize("command", ["grpo", "ppo"])
def test_a_corrected_reward_function_continues_the_run(capsys, command):
    own = ("--critic-warmup", 0, "--reward-rollouts", 4) if command == "ppo" else ()
    # The first call is the first evaluation; ppo measures the reference before it, in two calls.
    calls = 3 + 2 * (command == "ppo")
    broken = f"if len(CALLS) >= {calls}: raise ValueError('a rare bug')"
    write_rewards("float(len(text))", broken)
    assert grpo("--iters", 3, *own, command=command) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "raised ValueError: a rare bug (" in captured.err
    resume = f"mlx-align {command} --resume run --accept-changed rewards"
    last = "the last checkpoint is run/checkpoints/0000001; after correcting the reward, resume"
    assert f"{last} from it with: {resume}\n" in captured.out

    write_rewards("float(len(text))")
    error = refused(capsys, command, "--resume", "run")
    assert "the reward file mine.py changed since the run began" in error
    assert "adding --accept-changed rewards" in error
    first = [row for row in metric_rows("run") if "eval/reward" in row]
    assert mlx_align(command, "--resume", "run", "--accept-changed", "rewards") == 0
    out = capsys.readouterr().out
    assert "! Accepted as changed: the reward file mine.py" in out
    (row,) = resumes()
    assert row["step"] == 1
    assert row["changed"]["inputs"] == ["reward file mine.py"]
    # The start was measured again, by the corrected rewards.
    assert read_rows("run/metrics-held-out-1.jsonl") == first
    assert [r["step"] for r in metric_rows("run", "eval/reward")] == [0, 3]
    # They were the same as before, so the run is what it would have been.
    assert grpo("--iters", 3, *own, command=command, output="whole") == 0
    assert outcome("run") == outcome("whole")
    findings = [one["problem"] for one in summary_of("run")["findings"]]
    assert "After step 1, the reward file mine.py changed (--accept-changed)." in findings
    # From now on it is the run's.
    assert mlx_align(command, "--resume", "run") == 0
    assert mlx_align(command, "--resume", "run", "--accept-changed", "rewards") == 0
    assert "Nothing changed in rewards" in capsys.readouterr().out


def test_a_corrected_reward_may_be_another_function(capsys):
    write_rewards("float(len(text))", "if len(CALLS) >= 2: raise ValueError('always')")
    assert grpo("--iters", 2) == 1
    out = capsys.readouterr().out
    assert "no checkpoint was written yet; after correcting the reward, start again" in out
    Path("other.py").write_text("def g(completions):\n    return [0.5 for _ in completions]\n")
    changed = ("--resume", "run", "--reward", "other.py:g", "--reward", "length(target=3)")
    assert "--reward ('other.py:g'" in refused(capsys, "grpo", *changed)
    assert mlx_align("grpo", *changed, "--accept-changed", "rewards") == 0
    assert resumes()[0]["changed"]["inputs"] == ["reward file mine.py", "reward file other.py"]
    assert mlx_align("grpo", "--resume", "run") == 0


def test_corrected_data_continues_the_run(monkeypatch, capsys):
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        assert dpo("--iters", 4) == 130
    for split in ("train", "valid"):
        rows = read_rows(f"pairs/{split}.jsonl")
        write_rows(f"pairs/{split}.jsonl", [*rows[1:], {**rows[0], "chosen": " yes indeed"}])
    error = refused(capsys, "dpo", "--resume", "run")
    assert "the held-out data (--data) and the training data (--data) changed" in error
    assert "adding --accept-changed data" in error
    assert mlx_align("dpo", "--resume", "run", "--accept-changed", "data") == 0
    assert resumes()[0]["changed"]["inputs"] == ["held-out data", "training data"]
    rows = metric_rows("run", "eval/loss")
    assert [row["step"] for row in rows] == [0, 4]
    assert rows[0]["eval/loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert metric_rows("run", "loss")[-1]["step"] == 4
    assert mlx_align("dpo", "--resume", "run") == 0
    # The model is never accepted as changed.
    shutil.copytree(TINY_MODEL, "model")
    content = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**content, "rope_theta": 12345.0}))
    options = ("--resume", "run", "--model", "model", "--accept-changed", "data")
    assert "the model (--model) changed" in refused(capsys, "dpo", *options)


def test_accept_changed_is_checked(capsys):
    assert "needs --resume" in refused(capsys, "grpo", "--accept-changed", "rewards")
    assert dpo("--iters", 1) == 0
    accept = ("--resume", "run", "--accept-changed")
    assert "dpo has no rewards" in refused(capsys, "dpo", *accept, "rewards")
    assert "model" in refused(capsys, "dpo", *accept, "model")
    with pytest.raises(ma.ConfigError, match="accept_changed='model': unknown"):
        ma.dpo(resume="run", accept_changed="model")


# --- other versions ---


def test_a_run_begun_without_an_option_gets_its_default(monkeypatch, capsys):
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        assert dpo("--iters", 4) == 130
    file = Path("run/fingerprints.json")
    content = json.loads(file.read_text())
    del content["options"]["adapter_dtype"]
    file.write_text(json.dumps(content))
    lines = Path("run/config.yaml").read_text().splitlines()
    kept = [line for line in lines if "adapter_dtype" not in line]
    assert len(kept) == len(lines) - 1
    Path("run/config.yaml").write_text("\n".join(kept))
    # A checkpoint that counts less, too.
    state = Path("run/checkpoints/0000002/state.json")
    content = json.loads(state.read_text())
    del content["progress"]["skipped"]
    state.write_text(json.dumps(content))
    from mlx_align.training import checkpoint

    monkeypatch.setattr(checkpoint, "_verify", lambda folder: None)
    assert mlx_align("dpo", "--resume", "run") == 0
    assert dpo("--iters", 4, output="whole") == 0
    assert outcome("run") == outcome("whole")


def test_a_default_that_changed_since_does_not_change_the_run(tmp_path):
    """Options that were None are not in config.yaml: the run began with None."""
    (tmp_path / "config.yaml").write_text("model: m\nbeta: 0.3\n")
    began = {"options": {"weight_decay": 0.25, "lora_rank": None, "beta": 0.1}}
    config = run_config(tmp_path, DPOConfig, began)
    assert (config.weight_decay, config.lora_rank, config.beta) == (0.25, None, 0.3)


def test_a_removed_option_is_named_with_what_replaces_it(monkeypatch, capsys):
    assert dpo("--iters", 1) == 0
    removed = {"old_beta": RemovedOption("0.2.0", 0.1, "use --beta")}
    monkeypatch.setattr(schema, "REMOVED_OPTIONS", removed)
    monkeypatch.setattr("mlx_align.training.resume.REMOVED_OPTIONS", removed)
    file = Path("run/config.yaml")
    text = file.read_text()
    # With its default it had no effect.
    file.write_text(f"{text}old_beta: 0.1\n")
    assert mlx_align("dpo", "--resume", "run") == 0
    file.write_text(f"{text}old_beta: 0.3\n")
    made_of = Path("run/fingerprints.json")
    content = json.loads(made_of.read_text())
    content["versions"]["mlx-align"] = "0.0.1"
    made_of.write_text(json.dumps(content))
    error = refused(capsys, "dpo", "--resume", "run")
    assert "old_beta was removed in mlx-align 0.2.0; use --beta" in error
    assert "the run began with mlx-align 0.0.1" in error
    file.write_text(text)
    content["options"]["old_beta"] = 0.3
    made_of.write_text(json.dumps(content))
    assert "began with --old-beta 0.3, which was removed" in refused(
        capsys, "dpo", "--resume", "run"
    )
    options = ("--model", TINY_MODEL, "--data", "pairs", "-c", "old.yaml")
    Path("old.yaml").write_text("old_beta: 0.1\n")
    assert "old.yaml:1: old_beta was removed" in refused(capsys, "dpo", *options)


# --- messages ---


def test_the_value_that_a_run_has_is_shown(capsys):
    assert dpo("--iters", 1) == 0
    for option, value, shown in (
        ("--beta", 0.3, "the run has 0.1,"),
        ("--label-smoothing", 0.2, "the run has 0,"),
        ("--lora-alpha", 3, "the run has 4,"),
        ("--num-layers", 1, "the run has -1,"),
        ("--batch-tokens", 100, "the run has none,"),
        ("--max-completion-length", 9, "the run has none,"),
        ("--ld-alpha", 0.5, "the run has the default (off),"),
    ):
        error = refused(capsys, "dpo", "--resume", "run", option, value)
        assert f"{option} {value:g}" in error or f"{option} {value}" in error
        assert shown in error, error
    # What it has in effect is no change.
    same = ("--beta", 0.1, "--lora-alpha", 4, "--learning-rate", 1e-5)
    assert mlx_align("dpo", "--resume", "run", *same) == 0


def test_no_checkpoint_is_promised_that_does_not_exist(monkeypatch, capsys):
    change_results(monkeypatch, pair_algorithm, "collate_pairs", with_nan("weight"))
    assert dpo("--iters", 2) == 1
    captured = capsys.readouterr()
    assert "nothing was updated with it: check these rows" in captured.err
    assert "checkpoint" not in captured.err
    assert "no checkpoint was written yet; start again with: mlx-align dpo --resume run" in (
        captured.out
    )
    assert not list(Path("run").glob("checkpoints/*"))


@pytest.mark.parametrize("command", ["grpo", "ppo"])
def test_rewards_that_overflow_are_refused(capsys, command):
    write_rewards("1e308 * (len(text) % 2 + 1)")
    assert grpo("--iters", 1, command=command) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--reward mine.py:f: returned 1e+308" in error or "returned inf" in error
    write_rewards("1e12")
    options = ("--reward", "mine.py:f=1e9", "--output", "weighted")
    where = ("--model", TINY_MODEL, "--data", "pairs")
    assert mlx_align(command, *where, *ROLLOUTS, "--iters", 1, *options) == 1
    error = capsys.readouterr().err
    assert "returned 1e+12 with weight 1e+09" in error
    assert "overflow in training: scale them down" in error


@pytest.mark.parametrize(
    ("command", "value", "problem"),
    [
        ("grpo", "1.0", "the completions of every prompt had equal rewards"),
        ("ppo", "1.0", "all completions of every rollout batch had equal rewards"),
        ("grpo", "None", "no completion got a reward"),
        ("ppo", "None", "no completion got a reward"),
        ("dpo", None, "the loss was 0.693147 in every row"),
    ],
)
def test_a_run_that_learned_nothing_says_so(capsys, command, value, problem):
    """In the log, on the page, and in summary.json."""
    if command == "dpo":
        assert dpo("--iters", 3, "--learning-rate", 1e-30) == 0
    else:
        write_rewards(value)
        own = ("--reward-rollouts", 4) if command == "ppo" else ()
        assert grpo("--iters", 2, *own, command=command) == 0
    out = capsys.readouterr().out
    assert "! Nothing was learned" in out
    assert problem in out
    findings = [one["problem"] for one in summary_of("run")["findings"]]
    assert any(problem in one for one in findings)
    assert problem in Path("run/report.html").read_text()
    assert "nan" not in out


def test_a_run_that_learned_says_nothing_of_the_kind(capsys):
    assert dpo("--iters", 3, "--learning-rate", 1e-3) == 0
    assert grpo("--iters", 2, "--learning-rate", 1e-3, output="rl") == 0
    assert "Nothing was learned" not in capsys.readouterr().out


# --- the folder ---


def test_a_folder_with_a_model_adapter_or_data_is_not_a_run_folder(capsys):
    shutil.copytree(TINY_MODEL, "model")
    before = sorted(Path("model").iterdir())
    where = ("--model", "model", "--data", "pairs", *SMALL, "--iters", 1)
    error = refused(capsys, "dpo", *where, "--output", "model")
    assert "--output model: holds a model or an adapter (config.json)" in error
    assert sorted(Path("model").iterdir()) == before
    Path("link").symlink_to("model")
    assert "holds a model" in refused(capsys, "dpo", *where, "--output", "link")
    assert "is the folder of --data" in refused(capsys, "dpo", *where, "--output", "pairs")
    assert sorted(path.name for path in Path("pairs").iterdir()) == ["train.jsonl", "valid.jsonl"]
    assert mlx_align("dpo", *where, "--output", "run") == 0
    Path("adapter").mkdir()
    for name in ("adapters.safetensors", "adapter_config.json"):
        shutil.copy(f"run/{name}", "adapter")
    error = refused(capsys, "dpo", *where, "--init-adapter", "adapter", "--output", "adapter")
    assert "holds a model or an adapter (adapters.safetensors)" in error
    options = ("--model", "model", "--adapter-path", "run", "--output", "model")
    assert "is the folder of --model" in refused(capsys, "eval", *options)
    assert sorted(Path("model").iterdir()) == before
