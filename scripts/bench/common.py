"""What all runners share: arguments, the pairs, the line of results.

Runs in every package's own environment, so it stands on Python alone.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# The line of a runner's output that the benchmark reads.
MARK = "RESULT "
# LoRA as all packages get it; the scale is mlx-lm's, alpha / rank.
RANK = 8
SCALE = 10.0
LEARNING_RATE = 1e-5
WEIGHT_DECAY = 0.01
BETA = 0.1
# Longest row, for packages that want to know; longer than any here, as a user would leave it.
MAX_LENGTH = 2048


@dataclass(frozen=True)
class Pair:
    """Token ids of one preference pair."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass
class Result:
    """What a runner measured.

    Attributes:
        package: Name and version.
        steps: Seconds of each training step, the first ones with compilation.
        cpu: Seconds of all the process's threads in each of them.
        losses: Of each step.
        peak_bytes: mlx's peak from the loaded model on, reference pass included; for torch the
            process's.
        model_bytes: In use once the model is loaded.
        reference_pairs: Pairs whose reference log-probs were computed before training; 0 where
            that happens in every step.
        reference_seconds: Time for all of them, compilation included.
        reference_batches: Seconds of each batch of that pass, where they can be told apart.
        note: What a reader should know.
    """

    package: str
    steps: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    model_bytes: int = 0
    reference_pairs: int = 0
    reference_seconds: float = 0.0
    reference_batches: list[float] = field(default_factory=list)
    note: str = ""

    def print(self) -> None:
        """One line that the benchmark reads."""
        print(MARK + json.dumps(asdict(self)), flush=True)


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


def runner_arguments(
    argv: Sequence[str] | None = None, flags: Sequence[str] = ()
) -> argparse.Namespace:
    """Arguments of a runner; the same for all, and its own `flags`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--completion", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--grad-checkpoint", action="store_true")
    parser.add_argument("--out", required=True, help="folder for what the trainer writes")
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    return parser.parse_args(argv)


def synthetic_pairs(args: argparse.Namespace) -> list[Pair]:
    """Pairs of random ids, one for every place in every step's batch; the same in all packages."""
    config = json.loads((Path(args.model) / "config.json").read_text(encoding="utf-8"))
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(10, config["vocab_size"]) for _ in range(count)]

    pairs = []
    for _ in range(args.steps * args.batch_size):
        pair = Pair(ids(args.prompt), ids(args.completion), ids(args.completion))
        # Packages that cut at the common prefix must find exactly the prompt.
        while pair.rejected[0] == pair.chosen[0]:
            pair.rejected[0] = draw.randrange(10, config["vocab_size"])
        pairs.append(pair)
    return pairs


def rows_of_numbers(count: int) -> list[dict[str, Any]]:
    """Rows of text that only carry the number of a pair, for packages that insist on text."""
    return [{"prompt": str(i), "chosen": "c", "rejected": "r"} for i in range(count)]
