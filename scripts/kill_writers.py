"""Kill the commands that write files at random moments, and check what they leave.

Each command runs once undisturbed. Then it is killed (SIGKILL) at a random time or before a random
write, flush or rename, again and again. Files of rows must hold whole lines, the first of the
undisturbed file; pages and folders must be whole or not there. Continued with `--resume`, or
started again where there is nothing to continue, the command must end with the same bytes.

    python scripts/kill_writers.py --kills 300
    python scripts/kill_writers.py --kills 40 --commands score,eval

With `--ctrl-c`, `mlx-align dpo` is started instead and interrupted at random moments from 0 ms on.
It has to end with "stopped" and 130:

    python scripts/kill_writers.py --ctrl-c 200

The killed processes are forked from one that has imported everything; the interrupted ones are not.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# This imports the command, which comes first: it tells mlx how to order evaluation, and mlx reads
# that once.
from forked import run_forked

# isort: split
# Imported here, not by each process.
from mlx_align.cli import data, score
from mlx_align.data import convert  # noqa: F401
from mlx_align.evaluation import policy
from mlx_align.inference import export, implicit_reward, rerank  # noqa: F401
from mlx_align.models import fuse  # noqa: F401
from mlx_align.preferences import sample_answers
from mlx_align.report import page  # noqa: F401
from mlx_align.rollout import rejection_sampling
from mlx_align.system import console, row_file  # noqa: F401
from mlx_align.training import offline, run  # noqa: F401

MODEL = ROOT / "tests" / "oracle" / "models" / "policy"
SHORT = "-n 2 --max-tokens 4"
# Arguments, and what is written: rows that --resume continues, a log that the same command
# continues, a folder whose parts --resume continues, or a page or folder that is whole.
COMMANDS = {
    "score": ("score --logps --model MODEL --data pairs.jsonl", "rows"),
    "score-reward": ("score --model MODEL --adapter-path rm --data pairs.jsonl", "rows"),
    "rerank": ("rerank --model MODEL --adapter-path dpo --input given.jsonl", "rows"),
    "rerank-sampled": (
        f"rerank --model MODEL --adapter-path dpo --input asked.jsonl {SHORT}",
        "rows",
    ),
    "sample": (
        f"data sample --model MODEL --data asked.jsonl {SHORT} --reward length(target=4) "
        "--threshold -99",
        "rows",
    ),
    "sample-answers": (f"data sample --model MODEL --data asked.jsonl {SHORT}", "log"),
    "convert": ("data convert many.jsonl", "rows"),
    "judge": ("judge --data given.jsonl --reward rewards.py:size --human human.jsonl", "log"),
    "eval": (
        f"eval --model MODEL --adapter-path dpo --reward-model rm --samples 12 {SHORT}",
        "parts",
    ),
    "fuse": ("fuse --model MODEL --adapter-path dpo", "whole"),
    "export": ("export --model MODEL --adapter-path dpo", "whole"),
    "reward-export": ("reward export --model MODEL --adapter-path rm", "whole"),
    "report": ("report dpo rm", "whole"),
}
REWARDS = "def size(completions):\n    return [float(len(text)) for text in completions]\n"


def make_inputs(folder: Path) -> None:
    """Small data, and runs of dpo and reward, in the working folder."""

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    pairs = [
        {"prompt": f"{i}? what", "chosen": f" yes {i}", "rejected": " no" + "!" * (i % 5)}
        for i in range(2000)
    ]
    write("many.jsonl", pairs)
    write("pairs.jsonl", pairs[:60])
    write("human.jsonl", [{**row, "prompt": f"h{i}?"} for i, row in enumerate(pairs[:30])])
    write(
        "asked.jsonl", [{"prompt": row["prompt"], "number": i} for i, row in enumerate(pairs[:30])]
    )
    write(
        "given.jsonl",
        [{"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"]]} for r in pairs[:40]],
    )
    (folder / "rewards.py").write_text(REWARDS)
    train = f"--model {MODEL} --data pairs.jsonl --iters 2 --samples 0"
    for command in (
        f"dpo {train} --output dpo --reference-cache cache",
        f"reward {train} --output rm",
    ):
        code = forked(command.split(), folder / "train.log")
        if code:
            sys.exit(f"{command}: ended with {code}\n{(folder / 'train.log').read_text()[-2000:]}")


def forked(arguments: list[str], log: Path, kill: tuple[str, float] | None = None) -> int:
    """The exit code of a command in a process of its own; −9 if it was killed.

    Args:
        arguments: The command line.
        log: Its output.
        kill: ("time", seconds) or ("write", number) at which it is killed.
    """

    def prepare() -> None:
        # Several batches of what is small here.
        score.WINDOW, data.ROWS_PER_COMMIT = 8, 100
        rerank.PROMPTS_AT_ONCE = rejection_sampling.PROMPTS_PER_BATCH = 4
        sample_answers.PROMPTS_PER_BATCH, policy.COMPLETIONS_AT_ONCE = 4, 8
        if kill is not None and kill[0] == "write":
            die_before_write(int(kill[1]))

    after = kill[1] if kill is not None and kill[0] == "time" else None
    return run_forked(arguments, log, prepare, after)


def die_before_write(number: int) -> None:
    """From now on, this process kills itself before the n-th write, flush or rename."""
    left = number

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)

        return wrapped

    for name in ("write", "fsync", "rename", "replace", "ftruncate", "unlink"):
        setattr(os, name, dying(getattr(os, name)))


class Trial:
    """One command: what it writes undisturbed, and how often it was killed."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        text, self.kind = COMMANDS[name]
        self.arguments = text.replace("MODEL", str(MODEL)).split()
        self.log = folder / f"{name}.log"
        began = time.perf_counter()
        whole = self._output("whole")
        code = forked([*self.arguments, "--output", str(whole)], self.log)
        if code:
            sys.exit(f"{name}: ended with {code}\n{self.log.read_text()[-2000:]}")
        self.seconds = time.perf_counter() - began
        self.expected = contents(whole)
        self.kills = self.runs = 0

    def _output(self, name: str) -> Path:
        suffix = (
            ".html" if self.name == "report" else ".jsonl" if self.kind in ("rows", "log") else ""
        )
        return self.folder / f"{self.name}-{name}" / f"out{suffix}"

    def killed(self, draw: random.Random, kills: int) -> list[str]:
        """Run it, killed up to so many times, to its end; what was wrong."""
        self.runs += 1
        output = self._output(str(self.runs))
        output.parent.mkdir()
        command = [*self.arguments, "--output", str(output)]
        resumed = [*command, "--resume"] if self.kind in ("rows", "parts") else command
        moments = []
        for turn in range(kills):
            kind = draw.choice(("time", "write"))
            at = draw.uniform(0, self.seconds) if kind == "time" else draw.randint(1, 30)
            moments.append((kind, at))
            code = forked(resumed if turn else command, self.log, (kind, at))
            self.kills += code == -signal.SIGKILL
            if wrong := self._wrong(output):
                return [f"{self.name}: {wrong} after {moments}"]
            if code != -signal.SIGKILL:
                break
        if contents(output) != self.expected or self._is_unfinished(output):
            code = forked(resumed, self.log)
            if code and not (code == 1 and "is complete" in self.log.read_text()):
                return [
                    f"{self.name}: ended with {code} after {moments}\n{self.log.read_text()[-999:]}"
                ]
        if "Traceback" in self.log.read_text():
            return [f"{self.name}: a traceback after {moments}\n{self.log.read_text()[-999:]}"]
        if contents(output) != self.expected:
            return [f"{self.name}: other bytes after {moments}"]
        usual = {f.name for f in (self.folder / f"{self.name}-whole").iterdir()}
        left = sorted({f.name for f in output.parent.iterdir()} - usual)
        shutil.rmtree(output.parent)
        return [f"{self.name}: left {left} after {moments}"] if left else []

    def _is_unfinished(self, output: Path) -> bool:
        return row_file.progress_file(output).exists() or any(
            f.name.endswith(".partial") for f in output.parent.iterdir()
        )

    def _wrong(self, output: Path) -> str:
        """What is wrong with what a killed process left; empty if nothing is."""
        for file in output.parent.rglob("*.jsonl"):
            if "partial" in file.name and file.name.startswith("."):
                continue  # replaced as a whole, or never
            content = file.read_bytes()
            if content and not content.endswith(b"\n"):
                return f"{file.name} ends within a line"
            for line in content.splitlines():
                json.loads(line)
            if self.kind == "rows" and not self.expected[output.name].startswith(content):
                return f"{file.name} has other rows"
        if self.kind == "whole" and output.exists() and contents(output) != self.expected:
            return f"{output.name} is not whole"
        return ""


def contents(output: Path) -> dict[str, bytes]:
    """The bytes of a file, or of the files of a folder; {} if there is none."""
    if output.is_file():
        return {output.name: output.read_bytes()}
    if not output.is_dir():
        return {}
    return {f.name: f.read_bytes() for f in output.iterdir() if "partial" not in f.name}


def kill_commands(names: list[str], kills: int, per_run: int, number: int) -> bool:
    """Kill commands in turn; whether all was well."""
    draw = random.Random(number)
    faults: list[str] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = os.environ["HOME"] = str(folder / "home")
        make_inputs(folder)
        for one in names:
            (folder / f"{one}-whole").mkdir()
        trials = {one: Trial(one, folder) for one in names}
        for one, trial in trials.items():
            print(f"{one}: {trial.seconds:.1f} s undisturbed", flush=True)
        for turn, one in enumerate(itertools.cycle(names), 1):
            left = kills - sum(trial.kills for trial in trials.values())
            if left <= 0:
                break
            if turn % 20 == 0:
                print(f"{kills - left} kills of {turn - 1} runs", flush=True)
            found = trials[one].killed(draw, min(left, draw.randint(1, per_run)))
            faults += found
            print("".join(f"FAIL: {line}\n" for line in found), end="", flush=True)
        counts = ", ".join(f"{one} {trial.kills}" for one, trial in trials.items())
        runs = sum(trial.runs for trial in trials.values())
        total = sum(trial.kills for trial in trials.values())
    print(
        f"{total} kills of {runs} runs ({counts}), {time.perf_counter() - began:.0f} s: "
        f"{len(faults)} runs were torn or ended otherwise"
    )
    return not faults


def interrupt_commands(count: int, seconds: float, number: int) -> bool:
    """Interrupt `mlx-align dpo` at random moments; whether all was well but Python's own start."""
    draw = random.Random(number)
    script = Path(sys.executable).with_name("mlx-align")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "mlx_align"]
    seen: Counter[str] = Counter()
    late: dict[str, float] = {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        environment |= {"HOME": folder, "XDG_CACHE_HOME": folder}
        for _ in range(count):
            at = draw.uniform(0, seconds)
            process = subprocess.Popen(
                [*command, "dpo"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folder,
                env=environment,
            )
            time.sleep(at)
            process.send_signal(signal.SIGINT)
            try:
                _, errors = process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                _, errors = process.communicate()
                end = "did not stop"
            else:
                end = how_it_ended(process.returncode, errors)
            seen[end] += 1
            late[end] = max(late.get(end, 0.0), at)
    for end, times in seen.most_common():
        print(f"{times:4} {end} (the latest at {late[end]:.3f} s)")
    return set(seen) <= {"stopped", "Python was not up", "Python's start was interrupted"}


def how_it_ended(code: int, errors: str) -> str:
    """In words, how an interrupted command ended."""
    if code == 130 and errors.rstrip().endswith("stopped") and "Traceback" not in errors:
        return "stopped"
    if code == -signal.SIGINT and not errors:
        return "Python was not up"
    if "KeyboardInterrupt" in errors and ", in run\n" not in errors:
        return "Python's start was interrupted"
    return f"ended with {code}: {errors[-300:]!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--per-run", type=int, default=3, help="kills of one run, at most")
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--ctrl-c", type=int, metavar="N", help="interrupt a training run instead")
    parser.add_argument("--seconds", type=float, default=1.5, help="latest moment of --ctrl-c")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.ctrl_c:
        good = interrupt_commands(options.ctrl_c, options.seconds, options.seed)
    else:
        names = options.commands.split(",")
        good = kill_commands(names, options.kills, options.per_run, options.seed)
    sys.exit(not good)


if __name__ == "__main__":
    main()
