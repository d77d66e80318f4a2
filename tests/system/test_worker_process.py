"""Calls in a worker process: limits of time and memory, and time that does not count."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.paths import ROOT

from mlx_align.system import worker_process
from mlx_align.system.worker_process import WorkerFailure, WorkerProcess

WORKER = "mlx_align.rollout.reward_worker"
# Asks for a call of one second with a timeout of four, and says when it has.
ASK = """
import sys
from mlx_align.system.worker_process import WorkerProcess
process = WorkerProcess("mlx_align.rollout.reward_worker")
process.request("load", {"target": "slow.py", "name": "f"}, 60)
process.request("batch", {"prompts": ["x"], "completions": [["y"]], "columns": {}}, 60)
print("asking", flush=True)
print(process.request("call", {"function": 0}, 4), flush=True)
process.close()
"""


@pytest.fixture
def slow(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "def f(completions):\n    time.sleep(1)\n    return [1.0]\n"
        "def large(completions):\n    kept = bytearray(300_000_000)\n    time.sleep(60)\n"
        "def hung(completions):\n    time.sleep(60)\n"
    )


def test_time_in_which_the_program_was_stopped_does_not_count(slow):
    """Ctrl-Z stops the program, not its worker, which is in another session."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", ASK], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "asking\n"
        time.sleep(0.2)
        parent.send_signal(signal.SIGSTOP)
        time.sleep(5)
        parent.send_signal(signal.SIGCONT)
        assert parent.stdout.readline() == "{'values': [1.0]}\n"
    assert parent.returncode == 0


def test_only_time_awake_counts(monkeypatch):
    now = 0.0
    monkeypatch.setattr(worker_process.time, "monotonic", lambda: now)
    clock = worker_process._AwakeClock(10.0)
    now = 3600.0
    assert 8.9 < clock.left() < 10
    for _ in range(8):
        now += 1.0
        clock.left()
    now += 1.0
    with pytest.raises(TimeoutError):
        clock.left()


def load(process, name):
    process.request("load", {"target": "slow.py", "name": name}, 60)
    process.request("batch", {"prompts": ["x"], "completions": [["y"]], "columns": {}}, 60)


def test_a_call_that_takes_too_long_or_too_much_memory_is_stopped(slow):
    process = WorkerProcess(WORKER)
    load(process, "hung")
    with pytest.raises(WorkerFailure, match=r"no answer within 0.3 s \(.*slow.py:9\)"):
        process.request("call", {"function": 0}, 0.3)
    with pytest.raises(WorkerFailure, match="closed"):
        process.request("call", {"function": 0}, 0.3)
    limited = WorkerProcess(WORKER, max_bytes=200_000_000)
    load(limited, "large")
    with pytest.raises(WorkerFailure, match=r"uses 0\.\d GB of memory \(allowed: 0.2\)"):
        limited.request("call", {"function": 0}, 60)
