"""Runs of ppo and grpo that are disturbed: signals, changed inputs, losses that are not finite."""

import json
import os
import shutil
import signal
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.data import write_rows
from helpers.paths import TINY_MODEL
from helpers.runs import (
    before_call,
    change_results,
    interrupt,
    interrupt_twice,
    metric_rows,
    mlx_align,
    outcome,
    summary_of,
    with_nan,
)

from mlx_align.algorithms import dpo, ppo, update
from mlx_align.rollout.collector import RolloutBatch, RolloutCollector
from mlx_align.rollout.reward_functions import RewardFunctions
from mlx_align.training import run as run_module
from mlx_align.training.on_policy_trainer import RolloutEvaluation

SMALL = (
    *("--batch-size", 2, "--grad-accumulation-steps", 1, "--minibatches", 2, "--group-size", 2),
    *("--max-completion-length", 5, "--max-seq-length", 64, "--lora-rank", 2, "--samples", 1),
    *("--sample-tokens", 3, "--learning-rate", 1e-2, "--reward", "rewards.py:letters"),
    *("--iters", 3, "--steps-per-eval", 2, "--save-every", 1),
)
PPO = ("--reward-rollouts", 8, "--critic-warmup", 0)


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A folder of pairs, whose prompts are used, and a file with a reward function."""
    monkeypatch.chdir(tmp_path)
    for split, n in (("train", 9), ("valid", 2)):
        rows = [
            {"prompt": f"{split} {i}?", "chosen": " yes" + "a" * (i % 4), "rejected": " no"}
            for i in range(n)
        ]
        write_rows(f"data/{split}.jsonl", rows)
    Path("rewards.py").write_text(
        "def letters(completions):\n"
        "    return [sum(c.isalpha() for c in text) / 8 for text in completions]\n"
    )


def train(command, *options, output="run"):
    own = PPO if command == "ppo" else ()
    where = ("--model", TINY_MODEL, "--data", "data", "--output", output)
    return mlx_align(command, *where, *SMALL, *own, *options)


@pytest.fixture
def processes(monkeypatch):
    """Ids of the processes of reward functions."""
    seen = []
    original = RewardFunctions.__init__

    def opened(self, *arguments):
        original(self, *arguments)
        seen.append(self.pid)

    monkeypatch.setattr(RewardFunctions, "__init__", opened)
    return seen


# A function, the number of its call, what happens before that call, and the last checkpoint then.
MOMENTS = {
    "the reference's rewards": (RolloutCollector, "reference_rollouts", 1, signal.SIGTERM, None),
    "answers before": (run_module, "answers", 1, signal.SIGHUP, None),
    "an evaluation": (RolloutEvaluation, "evaluate", 2, signal.SIGTERM, "0000002"),
    "twice in an evaluation": (RolloutEvaluation, "evaluate", 2, interrupt_twice, "0000001"),
    "twice in an update": (update, "accumulate", 10, interrupt_twice, "0000001"),
    "twice in a reward": (RewardFunctions, "__call__", 4, interrupt_twice, "0000001"),
    "the last evaluation": (RolloutEvaluation, "evaluate", 3, signal.SIGINT, "0000003"),
    "answers after": (run_module, "answers", 2, signal.SIGTERM, "0000003"),
}


def test_signals_at_every_moment_of_a_step(inputs, capfd, monkeypatch, processes):
    assert train("ppo", output="whole") == 0
    expected = outcome("whole")
    for number, (moment, (owner, name, n, what, last)) in enumerate(MOMENTS.items()):
        folder = f"run-{number}"
        send = what if callable(what) else lambda signum=what: signal.raise_signal(signum)
        with monkeypatch.context() as patched:
            before_call(patched, owner, name, n, send)
            code = train("ppo", output=folder)
        assert code == 128 + (signal.SIGINT if callable(what) else what), moment
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err, moment
        assert f"with: mlx-align ppo --resume {folder}" in captured.out, moment
        found = sorted(Path(folder).glob("checkpoints/*"))
        assert (found[-1].name if found else None) == last, moment
        assert not Path(folder, "summary.json").exists(), moment
        # What was said after the last checkpoint is forgotten, and so is half a line.
        with Path(folder, "samples.jsonl").open("a") as stream:
            stream.write('{"step": 3, "torn')
        assert mlx_align("ppo", "--resume", folder) == 0, moment
        assert outcome(folder) == expected, moment
        for pid in processes:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def no_advantages(batch):
    return batch._replace(sample=batch.sample._replace(advantages=batch.sample.advantages * mx.nan))


ONCE = ("--update-epochs", 1)
SPOILED = {
    "grpo": ("grpo", (), RolloutBatch, "collate", no_advantages),
    "policy": ("ppo", ONCE, RolloutBatch, "collate", no_advantages),
    "critic": (
        "ppo",
        ONCE,
        ppo.ValueTargets,
        "collate",
        with_nan("returns"),
    ),
    "shared": ("ppo", (*ONCE, "--critic", "shared"), RolloutBatch, "collate", no_advantages),
    "pairs": (
        "grpo",
        ("--loss", "online_dpo"),
        dpo,
        "collate_pairs",
        with_nan("weight"),
    ),
}


@pytest.mark.parametrize("which", SPOILED)
def test_non_finite_on_policy_updates_are_skipped_and_counted(inputs, monkeypatch, capsys, which):
    command, options, owner, name, spoil = SPOILED[which]
    # All of the second rollout batch, whose updates have a microbatch each.
    change_results(monkeypatch, owner, name, spoil, lambda n: n in (3, 4))
    assert train(command, *options, "--on-non-finite", "skip") == 0
    out = capsys.readouterr().out
    assert "! an update of rollout batch 2 skipped: the loss is not finite on rows train" in out
    rows = metric_rows("run", "loss")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row.get("skipped", 0) for row in rows] == [0, 2, 2]
    if which == "critic":
        assert "value/loss" not in rows[1]
    else:
        assert rows[1]["loss"] is None
    assert summary_of("run")["skipped"] == 2
    for file in Path("run").rglob("*.safetensors"):
        assert all(np.isfinite(np.array(w)).all() for w in mx.load(str(file)).values()), file
    assert Path("run/report.html").exists()


def test_a_run_without_a_finite_update_is_an_error(inputs, monkeypatch, capsys):
    change_results(monkeypatch, RolloutBatch, "collate", no_advantages)
    assert train("grpo", "--on-non-finite", "skip", output="hopeless") == 1
    error = capsys.readouterr().err
    assert "5 updates before it were skipped for the same" in error
    assert train("grpo", "--on-non-finite", "skip", "--iters", 2, output="none") == 1
    error = capsys.readouterr().err
    assert "every update was skipped, all 4" in error
    assert error.count("\n") == 1


def test_a_partly_trained_rollout_batch_is_not_saved(inputs, monkeypatch, capsys):
    """Its first update was made, the second is not finite: what is kept is from before both."""
    with monkeypatch.context() as patched:
        change_results(patched, RolloutBatch, "collate", no_advantages, lambda n: n == 6)
        assert train("grpo") == 1
    assert "--on-non-finite skip" in capsys.readouterr().err
    assert mlx_align("grpo", "--resume", "run") == 0
    assert train("grpo", output="whole") == 0
    assert outcome("run") == outcome("whole")


def test_changed_inputs_of_ppo_are_named_on_resume(inputs, monkeypatch, capsys):
    small = ("--iters", 1, "--grad-accumulation-steps", 1, "--lora-rank", 2, "--samples", 0)
    shutil.copytree(TINY_MODEL, "other")
    for folder, base in (("rm", TINY_MODEL), ("rm-2", "other")):
        where = ("--model", base, "--data", "data", "--output", folder)
        assert mlx_align("reward", *where, *small) == 0
    write_rows("shown.jsonl", [{"prompt": "a", "completion": " b"}] * 4)
    judges = ("--reward-model", "rm", "--eval-reward-model", "rm-2")
    shown = ("--ptx-data", "shown.jsonl", "--ptx-coef", 0.1)
    with monkeypatch.context() as patched:
        before_call(patched, RolloutEvaluation, "evaluate", 1, interrupt)
        assert train("ppo", *judges, *shown) == 130

    def refused():
        capsys.readouterr()
        assert mlx_align("ppo", "--resume", "run") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    for file, name in (
        ("rewards.py", "the reward file rewards.py changed since the run began"),
        ("shown.jsonl", "the demonstrations (--ptx-data) changed"),
        ("data/train.jsonl", "the prompts (--data) changed"),
        ("rm/reward_head.safetensors", "the reward model (--reward-model) changed"),
        ("rm/adapters.safetensors", "the reward model (--reward-model) changed"),
        ("rm-2/adapter_config.json", "the held-out reward model (--eval-reward-model) changed"),
        ("other/model.safetensors", "the held-out reward model (--eval-reward-model) changed"),
    ):
        path = Path(file)
        kept = path.read_bytes()
        if path.suffix == ".safetensors":
            arrays = {key: array + 0.5 for key, array in mx.load(file).items()}
            mx.eval(arrays)
            mx.save_safetensors(file, arrays, metadata={"format": "mlx"})
        elif path.suffix == ".json":
            content = json.loads(kept)
            content["lora_parameters"]["scale"] *= 2
            path.write_text(json.dumps(content))
        else:
            path.write_bytes(kept.replace(b"8", b"9").replace(b" b", b" c"))
        assert name in refused(), file
        path.write_bytes(kept)
    # What is the same elsewhere is the same, and a function may get more time.
    shutil.move("rm", "moved")
    more = ("--reward-model", "moved", "--reward-timeout", "99")
    assert mlx_align("ppo", "--resume", "run", *more) == 0
