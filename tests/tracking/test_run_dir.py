"""Run folders: reading, writing, odd rows, removal of later steps, and the lock."""

import json
import math
import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT

from mlx_align.errors import ConfigError
from mlx_align.tracking import run_dir


def test_rows_that_are_not_metrics_are_skipped(tmp_path):
    run_dir.append_metrics(tmp_path, {"step": 1, "loss": math.nan})
    run_dir.append_metrics(tmp_path, {"step": 1, "eval/loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(
            '[1]\nnull\n{"step": "2"}\n{"step": true}\n{"step": 2, "loss": "low"}\n{"loss": 1'
        )
    rows = [{"step": 1, "loss": None}, {"step": 1, "eval/loss": 0.5}]
    assert run_dir.read_metrics(tmp_path) == rows
    assert run_dir.read_training_metrics(tmp_path) == rows[:1]
    assert run_dir.read_eval_metrics(tmp_path) == {1: {"loss": 0.5}}
    record = run_dir.read_run_record(tmp_path)
    assert record.training == [{"step": 1}]
    assert record.held_out == rows[1:]
    assert (record.command, record.finished, record.step) == ("run", False, 1)


def test_rows_of_later_steps_are_removed(tmp_path):
    run_dir.truncate_metrics(tmp_path, 1)  # nothing there yet
    run_dir.truncate_samples(tmp_path, 1)
    for step in (1, 2, 3):
        run_dir.append_metrics(tmp_path, {"step": step, "loss": 1.0})
        run_dir.append_samples(tmp_path, [{"step": step, "completion": "a\u2028b"}])
    run_dir.append_samples(tmp_path, [{"before": "of a finished run"}])
    run_dir.truncate_metrics(tmp_path, 2)
    run_dir.truncate_samples(tmp_path, 2)
    assert [row["step"] for row in run_dir.read_metrics(tmp_path)] == [1, 2]
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["step"] for line in lines if line] == [1, 2]
    assert [row["step"] for row in run_dir.read_run_record(tmp_path).rollouts] == [2]


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    folder = run_dir.new_run_dir(str(tmp_path / "new" / "run"), "dpo")
    assert not folder.exists()
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="already contains another run"):
        run_dir.new_run_dir(str(folder), "dpo")
    assert run_dir.new_run_dir(None, "kto").parts[0] == "runs"


def test_json_has_no_infinities(tmp_path):
    run_dir.write_json(tmp_path / "summary.json", {"a": [math.inf, {"b": math.nan}], "c": 1})
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text) == {"a": [None, {"b": None}], "c": 1}


def test_another_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        run_dir.read_run_record(tmp_path / "missing")
    with pytest.raises(ConfigError, match="neither config"):
        run_dir.read_run_record(tmp_path)


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import sys, time; from pathlib import Path\n"
    code += "from mlx_align.tracking.run_dir import lock_run_dir\n"
    code += "with lock_run_dir(Path(sys.argv[1])):\n print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=rf"pid {process.pid}\)"),
            run_dir.lock_run_dir(tmp_path),
        ):
            pass
    finally:
        process.kill()
        process.communicate()
    with run_dir.lock_run_dir(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
