"""What all runners share: the job, the clock, the line of results.

Runs in every package's own environment, so it stands on Python alone.
"""

import argparse
import json
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# The line of a runner's output that the benchmark reads.
MARK = "RESULT "
# Longest row, for packages that want to know; longer than any here, as a user would leave it.
MAX_LENGTH = 2048


class Pair(NamedTuple):
    """Token ids of one preference pair."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Job:
    """What a runner trains: LoRA on all linear layers of all blocks, AdamW at a constant rate.

    Gradients are not clipped, because not every package can.

    Attributes:
        model: Model folder.
        out: Folder for what the trainer writes.
        pairs: In the order of training; as many as the updates take.
        updates: Optimizer updates.
        batch_size: Pairs that run together.
        accumulation: Batches of an update.
        grad_checkpoint: Whether activations are computed again in the backward pass.
        rank: Rank of the adapters.
        scale: Their scale as in mlx-lm, alpha / rank.
        learning_rate: Of all updates.
        weight_decay: Of AdamW.
        beta: Of the DPO loss.
        start: Safetensors file with the adapters to start from, under mlx-lm's names; "" to draw
            them.
        power_exponential: Whether this package uses the faster exponential that it has on x86.
        options: Options of `mlx_align.dpo`, for the runner that calls it.
    """

    model: str
    out: str
    pairs: Sequence[Pair]
    updates: int
    batch_size: int
    accumulation: int = 1
    grad_checkpoint: bool = False
    rank: int = 8
    scale: float = 10.0
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    beta: float = 0.1
    start: str = ""
    power_exponential: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, file: Path) -> None:
        """Write the job for a runner."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def write_adapter_config(self, folder: Path) -> None:
        """Write the configuration of an adapter in mlx-lm's format, for what was trained."""
        lora = {"rank": self.rank, "scale": self.scale, "dropout": 0.0}
        content = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": lora}
        (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")


def read_job(argv: Sequence[str] | None = None) -> Job:
    """The job that a runner's command line names."""
    parser = argparse.ArgumentParser(description="Train what a job file says (see common.Job).")
    parser.add_argument("job", type=Path, help="file that Job.write wrote")
    content = json.loads(parser.parse_args(argv).job.read_text(encoding="utf-8"))
    return Job(**{**content, "pairs": [Pair(*ids) for ids in content["pairs"]]})


@dataclass
class Result:
    """What a runner measured.

    Attributes:
        package: Name and version.
        steps: Seconds of each update, the first ones with compilation.
        cpu: Seconds of all the process's threads in each of them.
        losses: Of each update.
        pairs: Pairs of each update.
        peak_bytes: mlx's peak from the loaded model on, reference pass included; for torch the
            process's.
        resident_peak_bytes: Peak of the process's memory.
        model_bytes: In use once the model is loaded.
        tokens: Tokens run through the model in all updates, padding included; 0 if not counted.
        shapes: Different sizes of batches.
        reference_pairs: Pairs whose reference log-probs were computed before training; 0 where
            that happens in every update.
        reference_seconds: Time for all of them, compilation included.
        reference_batches: Seconds of each batch of that pass, where they can be told apart.
        config: Options as the package resolved them, where it writes them down.
        note: What a reader should know.
    """

    package: str
    steps: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    resident_peak_bytes: int = 0
    model_bytes: int = 0
    tokens: int = 0
    shapes: int = 0
    reference_pairs: int = 0
    reference_seconds: float = 0.0
    reference_batches: list[float] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def print(self) -> None:
        """One line that the benchmark reads."""
        self.resident_peak_bytes = resident_peak_bytes()
        print(MARK + json.dumps(asdict(self)), flush=True)


def resident_peak_bytes() -> int:
    """The peak of the process's resident memory."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux's getrusage counts the process that started this one too.
        (line,) = (one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class StepClock:
    """Time between calls of `tick`, from `start` on, on the wall and of the process."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self._last = self._last_cpu = 0.0

    def start(self) -> None:
        """A first step begins now."""
        self._last, self._last_cpu = time.perf_counter(), time.process_time()

    def tick(self) -> None:
        """A step has ended, the next begins."""
        now, cpu = time.perf_counter(), time.process_time()
        self.seconds.append(now - self._last)
        self.cpu.append(cpu - self._last_cpu)
        self._last, self._last_cpu = now, cpu


def rows_of_numbers(count: int) -> list[dict[str, Any]]:
    """Rows of text that only carry the number of a pair, for packages that insist on text."""
    return [{"prompt": str(i), "chosen": "c", "rejected": "r"} for i in range(count)]
