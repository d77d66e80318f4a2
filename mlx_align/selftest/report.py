"""Run a self-test, check its numbers against their limits, and write them to a file."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_align.planning.machine import software_versions, this_machine
from mlx_align.selftest.cases import Case, GradientCase, SamplingCase, Size, StepCase, cases
from mlx_align.selftest.checks import case_to_json
from mlx_align.system.atomic_io import write_text

# Relative error of a float32 gradient, and of a loss.
FLOAT32_ERROR = 1e-4
# In 16 bits, the error of the GPU may be at most this multiple of the CPU's.
TIMES_CPU_ERROR = 3.0
# A planned peak may be off by this fraction.
PLAN_ERROR = 0.10
# Memory over weights and optimizer with twice the tokens. Attention whose memory grows with the
# square of the length gives up to 4.
DOUBLING = 2.1

# A check whose process fails gets its last line of output, at most this long.
LONGEST_REASON = 200


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        check: Name of the check.
        result: What was measured, in words.
        limit: What was expected; "" where nothing is.
        passed: Whether it was as expected; None where nothing is expected, or it did not run.
    """

    check: str
    result: str
    limit: str = ""
    passed: bool | None = None


class Report(NamedTuple):
    """A self-test.

    Attributes:
        device: The device that was tested: gpu or cpu.
        machine: The machine, as `machine` in the file.
        size: Size of the checks.
        seconds: Time it took.
        rows: The table.
        numbers: All numbers by name of the check.
    """

    device: str
    machine: dict[str, Any]
    size: Size
    seconds: float
    rows: list[Row]
    numbers: dict[str, dict[str, Any]]

    @property
    def passed(self) -> bool:
        """Whether no check failed and every check ran."""
        return all("error_message" not in found for found in self.numbers.values()) and all(
            row.passed is not False for row in self.rows
        )

    def as_json(self) -> dict[str, Any]:
        """The content of the file."""
        return {
            "passed": self.passed,
            "mlx-align": version("mlx-align"),
            "date": datetime.now().isoformat(timespec="seconds"),
            "device": self.device,
            "size": self.size,
            "seconds": round(self.seconds, 1),
            "machine": self.machine,
            "versions": software_versions(),
            "rows": [row._asdict() for row in self.rows],
            "numbers": self.numbers,
        }


def has_gpu() -> bool:
    """Whether mlx has a GPU here: Metal or CUDA."""
    return bool(mx.default_device() == mx.gpu)


def run_selftest(size: Size, seconds: float, on_row: Callable[[Row], None]) -> Report:
    """Run all checks of a size, each in its own process.

    Args:
        size: Size of the checks.
        seconds: Time for all of them; a check that runs then is stopped, later ones are left out.
        on_row: Called with every line of the table as soon as it is known.
    """
    began = time.monotonic()
    numbers: dict[str, dict[str, Any]] = {}
    rows: list[Row] = []
    for case in cases(size):
        left = seconds - (time.monotonic() - began)
        numbers[case.name] = _in_own_process(case, left)
        for row in judge_case(case, numbers, gpu=has_gpu()):
            rows.append(row)
            on_row(row)
    machine = this_machine()
    described = {
        "name": machine.name,
        "memory_bytes": machine.memory_bytes,
        "working_set_bytes": machine.working_set_bytes,
        "device": {name: str(value) for name, value in mx.device_info().items()},
    }
    device = "gpu" if has_gpu() else "cpu"
    return Report(device, described, size, time.monotonic() - began, rows, numbers)


def _in_own_process(case: Case, seconds: float) -> dict[str, Any]:
    """The numbers of a case, or `error_message` if its process failed or took too long."""
    if seconds <= 0:
        return {"error_message": "left out: no time left"}
    # MLX_BFS_MAX_WIDTH as in training. TF32 would round the GPU's float32 to 10 bits.
    environment = {"MLX_BFS_MAX_WIDTH": "1", "MLX_ENABLE_TF32": "0", **os.environ}
    command = [sys.executable, "-m", "mlx_align.selftest.checks", case_to_json(case)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error_message": f"stopped after {seconds:.0f} seconds: no time left"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        signal = f"signal {-done.returncode}: " if done.returncode < 0 else ""
        return {"error_message": f"{signal}{lines[-1]}"[:LONGEST_REASON]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def judge_case(case: Case, numbers: Mapping[str, Mapping[str, Any]], *, gpu: bool) -> list[Row]:
    """The lines of the table for a case.

    Args:
        case: The case.
        numbers: Numbers of this case and of those before it, by name.
        gpu: Whether it ran on a GPU. The growth of memory with the length has no limit on a CPU,
            where attention keeps its scores.
    """
    found = numbers[case.name]
    if "error_message" in found:
        return [Row(case.name, str(found["error_message"]), passed=False)]
    if isinstance(case, GradientCase):
        return _gradient_rows(case, found)
    if isinstance(case, SamplingCase):
        return [Row(case.name, f"{found['tokens_per_second']:,.0f} tokens/s")]
    return _step_rows(case, numbers, gpu)


def _gradient_rows(case: GradientCase, found: Mapping[str, Any]) -> list[Row]:
    error, allowed = found["error"], FLOAT32_ERROR
    loss_error = abs(found["loss"] / found["loss_exact"] - 1)
    loss_allowed = FLOAT32_ERROR
    if case.model.precision != "float32":
        allowed = TIMES_CPU_ERROR * found["error_cpu"]
        loss_allowed = max(0.01, TIMES_CPU_ERROR * abs(found["loss_cpu"] / found["loss_exact"] - 1))
    passed = math.isfinite(error) and error <= allowed and loss_error <= loss_allowed
    rows = [
        Row(
            case.name,
            f"off by {error:.1e}, loss by {loss_error:.1e}",
            f"{allowed:.1e}, {loss_allowed:.1e}",
            passed,
        )
    ]
    if "load_check" in found:
        shared = found["load_check"].startswith("prompts are shared")
        rows.append(Row(f"{case.name}: check at load", found["load_check"], passed=shared))
    return rows


def _step_rows(case: StepCase, numbers: Mapping[str, Mapping[str, Any]], gpu: bool) -> list[Row]:
    found = numbers[case.name]
    off = found["planned"] / found["peak"] - 1
    speed = f"{found['seconds']:.2f} s per update, {found['tokens_per_second']:,.0f} tokens/s"
    memory = f"{found['peak'] / 1e9:.3f} GB, planned {found['planned'] / 1e9:.3f} GB ({off:+.0%})"
    rows = [Row(f"memory, {case.name}", memory), Row(f"speed, {case.name}", speed)]
    # What mlx's kernel of linear attention holds on Metal has not been measured.
    if case.model.family == "llama" or not gpu:
        rows[0] = rows[0]._replace(limit=f"{PLAN_ERROR:.0%}", passed=abs(off) <= PLAN_ERROR)
    half = numbers.get(case.twice or "", {})
    if "peak" in half:
        growth = (found["peak"] - found["fixed"]) / (half["peak"] - half["fixed"])
        limit, passed = (f"{DOUBLING}", growth <= DOUBLING) if gpu else ("", None)
        name = f"memory, {case.name} over {case.twice}"
        rows.append(Row(name, f"{growth:.2f} times", limit, passed))
    return rows


def write_report(report: Report, file: Path) -> None:
    """Write a report as JSON.

    Raises:
        WriteError: The file can't be written.
    """
    write_text(file, json.dumps(report.as_json(), indent=1) + "\n")


def verdict(rows: Sequence[Row]) -> str:
    """A sentence about the checks that failed."""
    failed = [row.check for row in rows if row.passed is False]
    if not failed:
        return "All checks passed."
    return f"{len(failed)} of {len(rows)} checks failed: {'; '.join(failed)}."
