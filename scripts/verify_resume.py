"""Kill training runs at random moments, resume them, and compare what they end with.

Each command trains once undisturbed. Then runs of it are killed (SIGKILL) again and again, after an
update, at a write to the disk (any, or one of a checkpoint's; half of a tensor file or of a line
written), or at a random time, and resumed until they end: with the same bytes in their weights,
last checkpoint and samples and the same metrics but for times and memory, or the script ends with
1.

    python scripts/verify_resume.py --kills 200
    python scripts/verify_resume.py --commands dpo --moments update:3,checkpoint:5 --json

Processes are forked from one that has imported everything, so that a kill costs a second.
"""

import argparse
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# This imports the command, which comes first: it tells mlx how to order evaluation, and mlx reads
# that once.
from forked import run_forked

# isort: split
import mlx.core as mx
import numpy as np

# Imported here, not by each process.
from mlx_align.algorithms import (  # noqa: F401
    dpo,
    grpo,
    kto,
    online_dpo,
    ppo,
    reward_modeling,
    sft,
    update,
)
from mlx_align.system import console  # noqa: F401
from mlx_align.tracking import run_dir
from mlx_align.training import loop, offline, on_policy, on_policy_trainer  # noqa: F401

# A run that makes a checkpoint every other update, and reports and evaluates between them.
COMMON = (
    "--iters 9 --batch-size 2 --grad-accumulation-steps 2 --lora-rank 4 --learning-rate 1e-3 "
    "--save-every 2 --steps-per-report 3 --steps-per-eval 4 --samples 2 --sample-tokens 4"
)
# Of policies that train on their own samples; their iterations are rollout batches.
OWN = (
    "--reward REWARDS:letters --reward repetition(n=2)=0.1 --group-size 2 --minibatches 2 "
    "--max-completion-length 6 --max-seq-length 256"
)
# Data and further options of each command.
COMMANDS = {
    "dpo": ("pairs", "--lora-dropout 0.1 --reference-cache CACHE"),
    "kto": ("pairs", "--lora-dropout 0.1 --reference-cache CACHE"),
    "sft": ("answers", "--lora-dropout 0.1"),
    "reward": ("pairs", "--lora-dropout 0.1 --members 2"),
    "ppo": (
        "pairs",
        f"{OWN} --reward-rollouts 8 --critic-warmup 1 --target-kl 1 --ptx-coef 0.1 "
        "--ptx-data SHOWN",
    ),
    "grpo": ("pairs", f"{OWN} --kl-coef 0.05"),
}
REWARDS = """
def letters(completions):
    return [sum(c.isalpha() for c in text) / 8 for text in completions]
"""
KINDS = ("update", "checkpoint", "write", "time")
# Of a row of metrics, what no two runs have in common.
MEASURED = ("tokens_per_second", "peak_memory_bytes")
RESULTS = ("adapters.safetensors", "reward_head.safetensors", "samples.jsonl")


class Moment(NamedTuple):
    """When a process dies: at the n-th event of a kind, or after so many seconds."""

    kind: str
    at: float


def make_data(folder: Path) -> None:
    """Pairs and demonstrations of many lengths."""
    random = np.random.default_rng(0)
    for name in ("pairs", "answers"):
        (folder / name).mkdir()
        for split, n in (("train", 30), ("valid", 6)):
            rows = []
            for i in range(n):
                tail = "a" * int(random.integers(0, 9))
                row = {"prompt": f"{split} {i}: {tail[1:]} good?"}
                if name == "pairs":
                    row |= {"chosen": f" yes {tail}", "rejected": " no never"}
                else:
                    row |= {"completion": f" yes {tail}"}
                rows.append(json.dumps(row) + "\n")
            (folder / name / f"{split}.jsonl").write_text("".join(rows))
    (folder / "rewards.py").write_text(REWARDS)


def arguments_of(command: str, model: str, data: Path, run: Path) -> list[str]:
    """The command line of a run, or of its going on where there is something to go on with."""
    if (run / "config.yaml").is_file():
        return [command, "--resume", str(run)]
    kind, options = COMMANDS[command]
    own = options.replace("CACHE", str(run.with_suffix(".cache")))
    own = own.replace("REWARDS", str(data / "rewards.py")).replace("SHOWN", str(data / "answers"))
    where = ["--model", model, "--data", str(data / kind), "--output", str(run)]
    return [command, *where, *COMMON.split(), *own.split()]


def forked(arguments: list[str], log: Path, moment: Moment | None) -> int:
    """The exit code of a command in a process of its own; −9 if it was killed."""
    after = moment.at if moment is not None and moment.kind == "time" else None
    prepare = (lambda: None) if moment is None else partial(die_at, moment)
    return run_forked(arguments, log, prepare, after)


def die_at(moment: Moment) -> None:
    """From now on, this process kills itself at that moment."""
    left, within = int(moment.at), [moment.kind == "write"]

    def count() -> bool:
        nonlocal left
        left -= within[0]
        return within[0] and left == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            if count():
                die()
            return function(*given, **named)

        return wrapped

    def half(file: str, *given: Any, **named: Any) -> None:
        written(file, *given, **named)
        if count():
            os.truncate(file, os.path.getsize(file) // 2)
            die()

    def flagged(*given: Any, **named: Any) -> None:
        within[0] = True
        saved(*given, **named)
        within[0] = False

    def ticked(*given: Any, **named: Any) -> Any:
        nonlocal left
        done = updated(*given, **named)
        left -= 1
        if left == 0:
            die()
        return done

    def tearing(append: Callable[..., None], name: str) -> Callable[..., None]:
        """As if killed in the midst of the rows that are appended to a file."""

        def torn(run: Path, rows: Any) -> None:
            append(run, rows)
            if count():
                os.truncate(run / name, max(0, os.path.getsize(run / name) - 20))
                die()

        return torn

    if moment.kind == "update":
        updated, update.Updater.__call__ = update.Updater.__call__, ticked  # type: ignore
    elif moment.kind in ("write", "checkpoint"):
        written, mx.save_safetensors = mx.save_safetensors, half
        os.fsync, os.rename, os.replace = map(dying, (os.fsync, os.rename, os.replace))
        loop.append_metrics = tearing(loop.append_metrics, run_dir.METRICS_FILE)
        samples = tearing(on_policy_trainer.append_samples, run_dir.SAMPLES_FILE)
        on_policy_trainer.append_samples = on_policy.append_samples = samples
        if moment.kind == "checkpoint":
            saved = loop.save_checkpoint
            loop.save_checkpoint = flagged


def outcome(run: Path) -> dict[str, Any]:
    """What a finished run left that another like it must have too."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    kept = [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
    files = {name: (run / name).read_bytes() for name in RESULTS if (run / name).exists()}
    # All trees and optimizers, the critic's too.
    last = max((run / "checkpoints").iterdir())
    files |= {f"{last.name}/{f.name}": f.read_bytes() for f in last.glob("*.safetensors")}
    summary = json.loads((run / "summary.json").read_text())
    names = ("steps", "tokens", "eval", "best", "best_step", "kl", "learner", "skipped")
    summed = {key: summary.get(key) for key in names}
    return {"metrics": kept, "summary": summed, **files}


class Trial:
    """Runs of one command in a folder, the undisturbed one first."""

    def __init__(self, command: str, model: str, data: Path, folder: Path) -> None:
        self.command, self.model, self.data, self.folder = command, model, data, folder
        began = time.perf_counter()
        self.expected = self._finish(folder / f"{command}-whole")
        self.seconds = time.perf_counter() - began
        self.runs = 0

    def _finish(self, run: Path) -> dict[str, Any]:
        log = run.with_suffix(".log")
        code = forked(arguments_of(self.command, self.model, self.data, run), log, None)
        if code:
            sys.exit(f"{self.command} ended with {code}:\n{log.read_text()[-3000:]}")
        return outcome(run)

    def killed(self, moments: list[Moment]) -> tuple[int, list[str]]:
        """A run killed at these moments, one after another; kills, and what came out otherwise."""
        self.runs += 1
        run = self.folder / f"{self.command}-{self.runs}"
        kills = 0
        for moment in moments:
            arguments = arguments_of(self.command, self.model, self.data, run)
            code = forked(arguments, run.with_suffix(".log"), moment)
            kills += code == -signal.SIGKILL
            if code not in (0, -signal.SIGKILL):
                text = run.with_suffix(".log").read_text()[-3000:]
                return kills, [f"{self.command} ended with {code} after {moments}:\n{text}"]
        found = self._finish(run)
        wrong = [key for key in self.expected if found.get(key) != self.expected[key]]
        return kills, [f"{self.command}: other {', '.join(wrong)} after {moments}"] if wrong else []


def some_moment(kind: str, random: np.random.Generator, seconds: float) -> Moment:
    """A moment that most runs live to see."""
    if kind == "time":
        return Moment(kind, float(random.uniform(0, seconds)))
    last = {"update": 6, "checkpoint": 30, "write": 60}[kind]
    return Moment(kind, int(random.integers(1, last + 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--per-run", type=int, default=4, help="kills of one run, at most")
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--model", default=str(ROOT / "data" / "starter" / "model"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--moments", help="instead of random ones, each command's: update:3,checkpoint:5"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    random = np.random.default_rng(options.seed)
    commands = options.commands.split(",")
    kills = dict.fromkeys(commands, 0)
    kinds = dict.fromkeys(KINDS, 0)
    faults: dict[str, list[str]] = {command: [] for command in commands}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        trials = {c: Trial(c, options.model, folder, folder) for c in commands}
        for turn, command in enumerate(itertools.cycle(commands)):
            if (options.moments and turn == len(commands)) or sum(kills.values()) >= options.kills:
                break
            if options.moments:
                pairs = (moment.split(":") for moment in options.moments.split(","))
                moments = [Moment(kind, float(at)) for kind, at in pairs]
            else:
                wanted = min(options.per_run, options.kills - sum(kills.values()))
                chosen = [KINDS[(turn + i) % len(KINDS)] for i in range(wanted)]
                moments = [some_moment(kind, random, trials[command].seconds) for kind in chosen]
            done, wrong = trials[command].killed(moments)
            kills[command] += done
            faults[command] += wrong
            for kind, _ in moments:
                kinds[kind] += 1
            if not options.json:
                print(f"{command}: {done} kills, {sum(kills.values())} in all", flush=True)
                print("".join(f"FAIL: {line}\n" for line in wrong), end="", flush=True)
    if options.json:
        print(json.dumps({"kills": kills, "moments": kinds, "faults": faults}))
    else:
        print(f"{kills}, at {kinds}: {sum(map(len, faults.values()))} ended otherwise")
    sys.exit(any(faults.values()))


if __name__ == "__main__":
    main()
