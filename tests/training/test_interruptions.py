"""Runs that are disturbed: signals, full disks, changed inputs, locked folders, closed pipes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.data import write_splits
from helpers.paths import ROOT, TINY_MODEL
from helpers.runs import (
    change_results,
    disk_full_after,
    interrupt_twice,
    metric_rows,
    mlx_align,
    outcome,
    stop_after,
    summary_of,
    with_nan,
)

from mlx_align.algorithms import update
from mlx_align.models import policy
from mlx_align.tracking.run_dir import lock_run_dir
from mlx_align.training import metrics, offline

SMALL = (
    *("--batch-size", 2, "--grad-accumulation-steps", 2, "--lora-rank", 2, "--samples", 1),
    *("--sample-tokens", 3, "--reference-cache", "cache", "--iters", 6, "--save-every", 2),
    *("--steps-per-report", 2, "--learning-rate", 1e-5),
)


@pytest.fixture
def own_pairs(tmp_path, monkeypatch):
    """A folder of pairs next to a copy of the model; tests may change both."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY_MODEL, "model")
    rows = {
        split: [
            {"prompt": f"{split} {i}?", "chosen": " yes" + "a" * (i % 4), "rejected": " no"}
            for i in range(n)
        ]
        for split, n in (("train", 16), ("valid", 3))
    }
    return write_splits("pairs", **rows)


def dpo(*options, output="run"):
    where = ("--model", "model", "--data", "pairs", "--output", output)
    return mlx_align("dpo", *where, *SMALL, *options)


def test_a_run_folder_is_locked_while_it_is_used(own_pairs, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        assert dpo() == 130
    capsys.readouterr()
    # flock belongs to the open file: another one of this process is as good as another process.
    with lock_run_dir(Path("run")):
        assert mlx_align("dpo", "--resume", "run") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"another process trains in it (pid {os.getpid()})" in error
        Path("empty").mkdir()
    with lock_run_dir(Path("empty")):
        assert dpo(output="empty") == 1
        assert "another process trains in it" in capsys.readouterr().err
        assert not Path("empty", "config.yaml").exists()


def test_changed_inputs_are_named_on_resume(own_pairs, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        assert dpo() == 130
    capsys.readouterr()

    def refused(*options):
        assert mlx_align("dpo", "--resume", "run", *options) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    file = own_pairs / "train.jsonl"
    before = file.read_text()
    file.write_text(before.replace("train 3?", "train three?"))
    assert "the training data (--data) changed since the run began" in refused()
    file.write_text(before)
    valid = (own_pairs / "valid.jsonl").read_text()
    (own_pairs / "valid.jsonl").write_text(valid + valid.splitlines()[0] + "\n")
    assert "the held-out data (--data) changed" in refused()
    (own_pairs / "valid.jsonl").write_text(valid)

    weights = next(Path("model").glob("*.safetensors"))
    arrays = mx.load(str(weights))
    mx.eval(arrays)
    name = min(arrays)
    changed = {**arrays, name: arrays[name] + 0.5}
    mx.save_safetensors(str(weights), changed, metadata={"format": "mlx"})
    assert "the model (--model) changed" in refused()
    shutil.rmtree("model")
    shutil.copytree(TINY_MODEL, "model")

    config = Path("run", "config.yaml")
    text = config.read_text()
    config.write_text(text.replace("learning_rate: 1.0e-05", "learning_rate: 0.1"))
    assert "--learning-rate is 0.1 in its config.yaml, and was 1e-05" in refused()
    config.write_text(text)

    made_of = Path("run", "fingerprints.json")
    kept = made_of.read_text()
    made_of.write_text(kept[: len(kept) // 2])
    assert "fingerprints.json: damaged" in refused()
    made_of.write_text(kept.replace('"numpy": "', '"numpy": "0.'))
    assert mlx_align("kto", "--resume", "run") == 1
    assert "a run of dpo; resume it with mlx-align dpo --resume run" in capsys.readouterr().err

    # All is as it was, in another place; another numpy is a word of warning.
    shutil.move("model", "moved")
    assert mlx_align("dpo", "--resume", "run", "--model", "moved") == 0
    out = capsys.readouterr().out
    assert "! Changed since the run began: numpy 0." in out
    shutil.move("moved", "model")
    assert dpo(output="whole") == 0
    assert outcome("run") == outcome("whole")


def test_stopping_between_reports_does_not_change_them(own_pairs, monkeypatch):
    options = ("--steps-per-report", 4, "--steps-per-eval", 3, "--lora-dropout", 0.1)
    assert dpo(*options, output="whole") == 0
    with monkeypatch.context() as patched:
        stop_after(patched, 5)
        assert dpo(*options) == 130
    assert mlx_align("dpo", "--resume", "run") == 0
    assert outcome("run") == outcome("whole")
    best = [summary_of(n)["best"] for n in ("run", "whole")]
    assert best[0] == best[1]
    kept = Path("run", "checkpoints", f"{best[0]['step']:07d}")
    # Whether it is the last or not, the best one is an adapter that can be used.
    assert (kept / "adapters.safetensors").is_file()


def test_the_time_before_a_resume_counts(own_pairs, monkeypatch):
    add = metrics.Progress.add

    def slow(self, result):
        add(self, result._replace(seconds=500.0))

    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        patched.setattr(metrics.Progress, "add", slow)
        assert dpo() == 130
    assert mlx_align("dpo", "--resume", "run") == 0
    summary = summary_of("run")
    assert 1000 < summary["seconds"] < summary["seconds_in_all"] < 1200


def test_an_interrupted_reference_pass_continues_with_the_same_batches(own_pairs, monkeypatch):
    """The last digits of log-probs depend on which rows run together."""
    assert dpo("--reference-cache", "one", output="whole") == 0
    from mlx_align.training import reference

    original = reference.ReferenceCache.put
    calls = []

    def put(self, groups, logps):
        original(self, groups, logps)
        calls.append(len(groups))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(reference.ReferenceCache, "put", put)
    assert dpo("--reference-cache", "two") == 143
    done = list(calls)
    assert mlx_align("dpo", "--resume", "run") == 0
    assert outcome("run") == outcome("whole")
    assert sum(calls) == 16 + 3
    assert calls[: len(done)] == done


def test_non_finite_updates_are_skipped_and_counted(own_pairs, capsys, monkeypatch):
    from mlx_align.algorithms import dpo as pair_algorithm

    def spoil(patched, which):
        change_results(patched, pair_algorithm, "collate_pairs", with_nan("weight"), which)

    with monkeypatch.context() as patched:
        spoil(patched, lambda n: n == 6)  # of the third update
        assert dpo("--on-non-finite", "skip") == 0
    out = capsys.readouterr().out
    assert "! update 3 skipped: the loss is not finite on rows train.jsonl:" in out
    rows = metric_rows("run", "loss")
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    assert [row.get("skipped", 0) for row in rows] == [0, 0, 1, 1]
    assert summary_of("run")["skipped"] == 1
    weights = mx.load("run/adapters.safetensors")
    assert all(np.isfinite(np.array(w)).all() for w in weights.values())
    # Update 3 changed nothing but the count.
    state = json.loads(Path("run/checkpoints/0000004/state.json").read_text())
    assert state["progress"]["step"] == 4

    monkeypatch.setattr(update, "MAX_SKIPPED_IN_A_ROW", 2)
    with monkeypatch.context() as patched:
        spoil(patched, lambda n: n > 2)
        assert dpo("--on-non-finite", "skip", output="hopeless") == 1
    error = capsys.readouterr().err
    assert "2 updates before it were skipped for the same" in error
    assert error.count("\n") == 1
    with monkeypatch.context() as patched:
        spoil(patched, lambda n: n > 2)
        assert dpo(output="stopped") == 1
    assert "--on-non-finite skip" in capsys.readouterr().err
    # With finite numbers it can be resumed, and equals an undisturbed run.
    assert mlx_align("dpo", "--resume", "stopped") == 0
    assert dpo(output="whole") == 0
    assert outcome("stopped") == outcome("whole")


def test_signals_outside_of_updates(own_pairs, capsys, monkeypatch):
    """While data is read, the model is loaded, answers are sampled at the end."""
    for number, (module, name, signum, said) in enumerate(
        (
            (offline, "prepare_data", signal.SIGTERM, "stopped before anything was written"),
            (
                policy,
                "load_language_model",
                signal.SIGINT,
                "again with: mlx-align dpo --resume run-1",
            ),
            (
                offline,
                "kl_from_reference",
                signal.SIGHUP,
                "resume with: mlx-align dpo --resume run-2",
            ),
        )
    ):
        with monkeypatch.context() as patched:
            patched.setattr(
                module, name, lambda *_, signum=signum, **__: signal.raise_signal(signum)
            )
            assert dpo(output=f"run-{number}") == 128 + signum
        captured = capsys.readouterr()
        assert said in captured.out
        assert "Traceback" not in captured.err
        assert (captured.out + captured.err).count("stopped") == 1
    assert not Path("run-0").exists()
    for folder in ("run-1", "run-2"):
        assert mlx_align("dpo", "--resume", folder) == 0
    assert outcome("run-1") == outcome("run-2")


def test_a_second_signal_stops_at_once_and_leaves_no_partial_files(own_pairs, capfd, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 3, interrupt_twice)
        assert dpo() == 130
    captured = capfd.readouterr()
    assert "interrupt again to stop at once" in captured.err
    assert "resume with: mlx-align dpo --resume run" in captured.out
    assert [path.name for path in Path("run", "checkpoints").iterdir()] == ["0000002"]
    assert mlx_align("dpo", "--resume", "run") == 0
    assert dpo(output="whole") == 0
    assert outcome("run") == outcome("whole")


def test_a_run_continues_after_its_output_pipe_is_closed(own_pairs):
    """`mlx-align … | tee log`: the Ctrl-C that stops the run ends tee before it."""
    command = [sys.executable, "-m", "mlx_align.cli.main", "dpo", "--model", "model"]
    command += ["--data", "pairs", "--output", "run", *map(str, SMALL)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    reader, writer = os.pipe()
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, b"")
    assert Path("run", "summary.json").exists()


def test_an_exceeded_quota_keeps_the_last_checkpoint(own_pairs, capsys, monkeypatch):
    number = errno.EDQUOT
    with monkeypatch.context() as patched:
        disk_full_after(patched, 24, OSError(number, os.strerror(number)))
        assert dpo() == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "can't be written (the quota is used up; make room)" in captured.err
    assert "resume with: mlx-align dpo --resume run" in captured.out
    assert not list(Path("run").rglob("*.partial*"))
    assert mlx_align("dpo", "--resume", "run") == 0
    assert dpo(output="whole") == 0
    assert outcome("run") == outcome("whole")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a tmpfs")
def test_a_run_on_a_full_disk_can_be_resumed(own_pairs, capsys):
    disk = Path("disk").absolute()
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no mounts here")
    try:
        options = ("--lora-rank", 8, "--save-every", 1)
        assert dpo(*options, output=disk / "run") == 1
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert "no space left on the disk" in captured.err
        assert "Traceback" not in captured.out
        kept = list((disk / "run" / "checkpoints").iterdir())
        assert kept
        assert all(path.name.isdecimal() for path in kept)
        # The run folder's adapter is that of the best or last checkpoint, whole.
        found = (disk / "run" / "adapters.safetensors").read_bytes()
        assert found in [(path / "adapters.safetensors").read_bytes() for path in kept]
        grow = ["mount", "-o", "remount,size=8m", str(disk)]
        subprocess.run(grow, check=True, capture_output=True)
        assert mlx_align("dpo", "--resume", disk / "run") == 0
        assert dpo(*options, output="whole") == 0
        assert outcome(disk / "run") == outcome("whole")
    finally:
        subprocess.run(["umount", str(disk)], capture_output=True)


def test_a_read_only_folder_is_refused(own_pairs, capsys, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert dpo(output="sealed/run") == 1
    error = capsys.readouterr().err
    assert error == "error: sealed/run: can't be written (permission denied)\n"
