"""What a long run meets at night: locks, full disks, changes, signals, readers that go away."""

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

from mlx_align.algorithms import update
from mlx_align.cli.main import run
from mlx_align.errors import ConfigError, WriteError
from mlx_align.models import policy
from mlx_align.system import atomic_io
from mlx_align.tracking.run_dir import lock_run_dir
from mlx_align.training import offline
from mlx_align.training.callbacks import Callbacks

ROOT = Path(__file__).parent.parent.parent
TINY = Path(__file__).parent.parent / "oracle" / "models" / "policy"
SMALL = (
    *("--batch-size", 2, "--grad-accumulation-steps", 2, "--lora-rank", 2, "--samples", 1),
    *("--sample-tokens", 3, "--reference-cache", "cache", "--iters", 6, "--save-every", 2),
    *("--steps-per-report", 2),
)


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """A folder of pairs, and a copy of the model beside it; both may be changed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "model")
    Path("pairs").mkdir()
    for split, n in (("train", 16), ("valid", 3)):
        rows = [
            {"prompt": f"{split} {i}?", "chosen": " yes" + "a" * (i % 4), "rejected": " no"}
            for i in range(n)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        Path("pairs", f"{split}.jsonl").write_text(lines)
    return Path("pairs")


def dpo(*options, output="run"):
    command = ["dpo", "--model", "model", "--data", "pairs", "--output", str(output)]
    return run([*command, *map(str, (*SMALL, *options))])


def stop_after(monkeypatch, step, stop=lambda: signal.raise_signal(signal.SIGINT)):
    """Call `stop` as soon as this step is done."""
    original = Callbacks.on_step_end

    def on_step_end(self, at, metrics):
        result = original(self, at, metrics)
        if at == step:
            stop()
        return result

    monkeypatch.setattr(Callbacks, "on_step_end", on_step_end)


def result(folder):
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("tokens_per_second", None)
        row.pop("peak_memory_bytes", None)
    return Path(folder, "adapters.safetensors").read_bytes(), rows


def test_a_lock_dies_with_its_process(tmp_path):
    code = "import sys, time; from pathlib import Path\n"
    code += "from mlx_align.tracking.run_dir import lock_run_dir\n"
    code += "with lock_run_dir(Path(sys.argv[1])):\n print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"pid {process.pid}\)"), lock_run_dir(tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()
    with lock_run_dir(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_two_runs_on_one_folder(pairs, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        assert dpo() == 130
    capsys.readouterr()
    # flock belongs to the open file: another one of this process is as good as another process.
    with lock_run_dir(Path("run")):
        assert run(["dpo", "--resume", "run"]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"another process trains in it (pid {os.getpid()})" in error
        Path("empty").mkdir()
    with lock_run_dir(Path("empty")):
        assert dpo(output="empty") == 1
        assert "another process trains in it" in capsys.readouterr().err
        assert not Path("empty", "config.yaml").exists()


def test_what_changed_is_named(pairs, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        assert dpo() == 130
    capsys.readouterr()

    def refused(*options):
        assert run(["dpo", "--resume", "run", *options]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    file = pairs / "train.jsonl"
    before = file.read_text()
    file.write_text(before.replace("train 3?", "train three?"))
    assert "the training data (--data) changed since the run began" in refused()
    file.write_text(before)
    valid = (pairs / "valid.jsonl").read_text()
    (pairs / "valid.jsonl").write_text(valid + valid.splitlines()[0] + "\n")
    assert "the held-out data (--data) changed" in refused()
    (pairs / "valid.jsonl").write_text(valid)

    weights = next(Path("model").glob("*.safetensors"))
    arrays = mx.load(str(weights))
    mx.eval(arrays)
    name = min(arrays)
    changed = {**arrays, name: arrays[name] + 0.5}
    mx.save_safetensors(str(weights), changed, metadata={"format": "mlx"})
    assert "the model (--model) changed" in refused()
    shutil.rmtree("model")
    shutil.copytree(TINY, "model")

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
    assert run(["kto", "--resume", "run"]) == 1
    assert "a run of dpo; resume it with mlx-align dpo --resume run" in capsys.readouterr().err

    # All is as it was, in another place; another numpy is a word of warning.
    shutil.move("model", "moved")
    assert run(["dpo", "--resume", "run", "--model", "moved"]) == 0
    out = capsys.readouterr().out
    assert "! Changed since the run began: numpy 0." in out
    shutil.move("moved", "model")
    assert dpo(output="whole") == 0
    assert result("run") == result("whole")


def test_a_report_after_a_stop_off_its_beat_is_the_same(pairs, monkeypatch):
    options = ("--steps-per-report", 4, "--steps-per-eval", 3, "--lora-dropout", 0.1)
    assert dpo(*options, output="whole") == 0
    with monkeypatch.context() as patched:
        stop_after(patched, 5)
        assert dpo(*options) == 130
    assert run(["dpo", "--resume", "run"]) == 0
    assert result("run") == result("whole")
    best = [json.loads(Path(n, "summary.json").read_text())["best"] for n in ("run", "whole")]
    assert best[0] == best[1]
    kept = Path("run", "checkpoints", f"{best[0]['step']:07d}")
    # Whether it is the last or not, the best one is an adapter that can be used.
    assert (kept / "adapters.safetensors").is_file()


def test_an_interrupted_reference_pass_goes_on_in_its_batches(pairs, monkeypatch):
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
    assert run(["dpo", "--resume", "run"]) == 0
    assert result("run") == result("whole")
    assert sum(calls) == 16 + 3
    assert calls[: len(done)] == done


def test_non_finite_updates_are_skipped_and_counted(pairs, capsys, monkeypatch):
    from mlx_align.algorithms import dpo as pair_algorithm

    original = pair_algorithm.collate_pairs

    def poison(microbatches):
        calls = []

        def poisoned(*arguments):
            calls.append(arguments)
            batch = original(*arguments)
            return (
                batch._replace(weight=batch.weight * mx.nan) if microbatches(len(calls)) else batch
            )

        monkeypatch.setattr(pair_algorithm, "collate_pairs", poisoned)

    poison(lambda n: n == 6)  # of the third update
    assert dpo("--on-non-finite", "skip") == 0
    out = capsys.readouterr().out
    assert "! update 3 skipped: the loss is not finite on rows train.jsonl:" in out
    rows = [row for row in result("run")[1] if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    assert [row.get("skipped", 0) for row in rows] == [0, 0, 1, 1]
    assert json.loads(Path("run/summary.json").read_text())["skipped"] == 1
    weights = mx.load("run/adapters.safetensors")
    assert all(np.isfinite(np.array(w)).all() for w in weights.values())
    # Update 3 changed nothing but the count.
    assert (
        json.loads(Path("run/checkpoints/0000004/state.json").read_text())["progress"]["step"] == 4
    )

    monkeypatch.setattr(update, "MAX_SKIPPED_IN_A_ROW", 2)
    poison(lambda n: n > 2)
    assert dpo("--on-non-finite", "skip", output="hopeless") == 1
    error = capsys.readouterr().err
    assert "2 updates before it were skipped for the same" in error
    assert error.count("\n") == 1
    poison(lambda n: n > 2)
    assert dpo(output="stopped") == 1
    assert "--on-non-finite skip" in capsys.readouterr().err
    # With good numbers again it goes on, and ends as if nothing had been.
    monkeypatch.setattr(pair_algorithm, "collate_pairs", original)
    assert run(["dpo", "--resume", "stopped"]) == 0
    assert dpo(output="whole") == 0
    assert result("stopped") == result("whole")


def test_signals_outside_of_updates(pairs, capsys, monkeypatch):
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
    assert not Path("run-0").exists()
    for folder in ("run-1", "run-2"):
        assert run(["dpo", "--resume", folder]) == 0
    assert result("run-1") == result("run-2")


def test_a_second_signal_stops_at_once_and_tears_nothing(pairs, capfd, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        stop_after(patched, 3, twice)
        assert dpo() == 130
    captured = capfd.readouterr()
    assert "interrupt again to stop at once" in captured.err
    assert "resume with: mlx-align dpo --resume run" in captured.out
    assert [path.name for path in Path("run", "checkpoints").iterdir()] == ["0000002"]
    assert run(["dpo", "--resume", "run"]) == 0
    assert dpo(output="whole") == 0
    assert result("run") == result("whole")


def test_a_run_outlives_its_reader(pairs):
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


def fails_after(monkeypatch, count, error):
    """From the `count`-th file brought to the disk on, there is no room."""
    left = [count]

    def full(path):
        left[0] -= 1
        if left[0] < 0:
            raise error
        original(path)

    original = atomic_io.flush_to_disk
    monkeypatch.setattr(atomic_io, "flush_to_disk", full)


def test_no_quota_is_one_line_and_the_last_checkpoint_stays(pairs, capsys, monkeypatch):
    number = errno.EDQUOT
    with monkeypatch.context() as patched:
        fails_after(patched, 24, OSError(number, os.strerror(number)))
        assert dpo() == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "can't be written (the quota is used up; make room)" in captured.err
    assert "resume with: mlx-align dpo --resume run" in captured.out
    assert not list(Path("run").rglob("*.partial*"))
    assert run(["dpo", "--resume", "run"]) == 0
    assert dpo(output="whole") == 0
    assert result("run") == result("whole")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a tmpfs")
def test_a_disk_that_is_really_full(pairs, capsys):
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
        assert not (disk / "run" / "adapters.safetensors").exists()
        grow = ["mount", "-o", "remount,size=8m", str(disk)]
        subprocess.run(grow, check=True, capture_output=True)
        assert run(["dpo", "--resume", str(disk / "run")]) == 0
        assert dpo(*options, output="whole") == 0
        assert result(disk / "run") == result("whole")
    finally:
        subprocess.run(["umount", str(disk)], capture_output=True)


def test_a_folder_that_can_not_be_written_to(pairs, capsys, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert dpo(output="sealed/run") == 1
    error = capsys.readouterr().err
    assert error == "error: sealed/run: can't be written (permission denied)\n"


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    file = tmp_path / "file.txt"
    atomic_io.write_text(file, "old")
    fails_after(monkeypatch, 0, OSError(28, "No space left on device"))
    with pytest.raises(WriteError, match="no space left on the disk; make room"):
        atomic_io.write_text(file, "new")
    with pytest.raises(WriteError), atomic_io.open_atomic(file) as stream:
        stream.write("new")
    assert file.read_text() == "old"
    with pytest.raises(ZeroDivisionError), atomic_io.open_atomic(file):
        1 / 0  # noqa: B018
    with pytest.raises(WriteError), atomic_io.atomic_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("half")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    monkeypatch.undo()
    with atomic_io.atomic_folder(tmp_path / "a" / "folder") as partial:
        (partial / "file").write_text("whole")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["folder"]
    assert (tmp_path / "a" / "folder" / "file").read_text() == "whole"
