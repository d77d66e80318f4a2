"""Train SmolLM2-135M-Instruct by this and by other packages on the same pairs, and compare them.

mlx-align, mlx-lm-lora, mlx-tune, the mlx half of unsloth_zoo, and TRL on torch's CPU backend train
with DPO on the 100 pairs of data/real/brevity: the same token ids, LoRA layers, initial matrices,
AdamW, learning rate and order. Measured are seconds per pair, memory, losses, and the held-out
loss of each adapter, always by this package. Every package gets an environment of its own.

    python scripts/real/compare.py --list           # the runs, and which are finished
    python scripts/real/compare.py --updates 2      # try all of them on 8 pairs
    python scripts/real/compare.py --page docs/verified/real-comparison.md

A finished run is not repeated; to repeat it, delete its file in the folder that --list names. A
failed one is tried again. Nothing else should run on the machine, or on the core that all of it is
bound to (`taskset -c 0` on Linux): a run takes 2 to 15 minutes, all of them some hours.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(SCRIPTS))
sys.path.insert(1, str(SCRIPTS / "bench"))

from bench import run_job, runner_environment
from common import Job, Pair
from comparison_page import OURS, Measured, render
from environments import PEERS, TRL, Package, python_of
from models import smollm2
from studies import computer

from mlx_align.system.user_folders import cache_folder

DATA = SCRIPTS.parent / "data" / "real" / "brevity"
PAIRS_PER_UPDATE = 4
# No package's default: what can be the same for all. A clipping norm that is never reached.
OPTIONS: dict[str, Any] = {
    "epochs": 1.0,
    "learning_rate": 5e-5,
    "lr_schedule": "constant",
    "warmup": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1e9,
    "lora_rank": 16,
    "lora_alpha": 32.0,
    "beta": 0.1,
    "valid_fraction": 0.0,
    "samples": 0,
    "keep": "last",
}
OURS_PACKAGE = Package(OURS, "run_mlx_align_command.py")
DEFAULT, PACKED = "default batches", "packed, as many updates"
SINGLE, TOGETHER = "1 pair at a time", f"{PAIRS_PER_UPDATE} pairs at once"


@dataclass(frozen=True)
class Run:
    """A run of one package.

    Attributes:
        name: Name of its files.
        package: The package.
        batches: How pairs are batched: one of the names above.
        grad_checkpoint: Whether activations are computed again.
        options: Options of ours for these batches.
        note: Added to `batches` in the tables.
        power_exponential: Whether ours takes the faster exponential of x86.
    """

    name: str
    package: Package
    batches: str
    grad_checkpoint: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    power_exponential: bool = False

    @property
    def batch_size(self) -> int:
        """Pairs that run together, in other packages."""
        return 1 if self.batches == SINGLE else PAIRS_PER_UPDATE

    @property
    def same_order(self) -> bool:
        """Whether it trains on the pairs in the common order."""
        return self.package.name != OURS or self.batches == SINGLE


def planned_runs(packed_tokens: int | None, default_checkpoint: bool) -> list[Run]:
    """All runs, ours first.

    Args:
        packed_tokens: Size of packed microbatches that gives as many updates as the others make.
        default_checkpoint: What ours does by default.
    """
    other = not default_checkpoint
    word = "checkpointed" if other else "not-checkpointed"
    runs = [
        Run(OURS, OURS_PACKAGE, DEFAULT, default_checkpoint),
        Run(f"{OURS}-{word}", OURS_PACKAGE, DEFAULT, other, {"grad_checkpoint": other}),
    ]
    if packed_tokens is not None:
        packed = {"batch_tokens": packed_tokens, "grad_accumulation_steps": 1}
        runs.append(_ours("packed", PACKED, packed))
    single = {"batch_size": 1, "grad_accumulation_steps": PAIRS_PER_UPDATE}
    together = {"batch_size": PAIRS_PER_UPDATE, "grad_accumulation_steps": 1}
    runs += [_ours("1", SINGLE, single), _ours(str(PAIRS_PER_UPDATE), TOGETHER, together)]
    note = ", faster exponential of x86"
    power = Run(
        f"{OURS}-power", OURS_PACKAGE, DEFAULT, default_checkpoint, {}, note, power_exponential=True
    )
    runs.append(power)
    for package in (TRL, *PEERS):
        name = package.name
        # It ignores the number of batches of an update.
        if name != "mlx-tune":
            runs.append(Run(f"{name}-1", package, SINGLE))
        runs.append(Run(f"{name}-{PAIRS_PER_UPDATE}", package, TOGETHER))
        checkpointed = Run(f"{name}-{PAIRS_PER_UPDATE}-checkpointed", package, TOGETHER, True)
        runs.append(checkpointed)
    return runs


def _ours(name: str, batches: str, options: dict[str, Any]) -> Run:
    options = {**options, "grad_checkpoint": False}
    return Run(f"{OURS}-{name}", OURS_PACKAGE, batches, options=options)


class Comparison:
    """The folder of a comparison: settings, prepared pairs, and results.

    Attributes:
        folder: The folder.
        settings: What all runs have in common.
        prepared: The pairs in order and the defaults of ours.
    """

    def __init__(self, folder: Path, data: Path, updates: int) -> None:
        """Prepare the folder, unless that is done.

        Args:
            folder: The folder.
            data: Folder with train.jsonl and valid.jsonl.
            updates: Updates of each run.
        """
        self.folder = folder
        self.environment, self._remark = runner_environment()
        file = folder / "prepared.json"
        if not file.is_file():
            self._write_rows(data, updates)
            self._call("prepare", str(updates))
        self.settings: dict[str, Any] = json.loads((folder / "settings.json").read_text())
        self.prepared: dict[str, Any] = json.loads(file.read_text())
        self.runs = planned_runs(
            self.prepared["packed_tokens"], bool(self.prepared["grad_checkpoint"])
        )

    def _write_rows(self, data: Path, updates: int) -> None:
        count = updates * PAIRS_PER_UPDATE
        rows = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        if len(rows) < count:
            sys.exit(f"error: --updates {updates}: needs {count} pairs, {data} has {len(rows)}")
        for name, lines in (
            ("data", rows[:count]),
            ("held-out", (data / "valid.jsonl").read_text(encoding="utf-8").splitlines(True)),
        ):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            text = "".join(lines)
            (self.folder / name / "train.jsonl").write_text(text, encoding="utf-8")
        settings = {
            "model": str(smollm2()),
            "data_name": data.name,
            "updates": updates,
            "options": OPTIONS,
        }
        (self.folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")

    def _call(self, command: str, *arguments: str) -> None:
        script = Path(__file__).resolve().parent / "comparison_model.py"
        call = [sys.executable, str(script), command, str(self.folder), *arguments]
        subprocess.run(call, env=self.environment, check=True)

    def file(self, run: Run, turn: int) -> Path:
        """The file of a result."""
        return self.folder / "results" / f"{run.name}-{turn}.json"

    def adapter(self, run: Run, turn: int) -> Path:
        """The folder of the adapter that a run wrote."""
        return self.folder / "runs" / f"{run.name}-{turn}" / "adapter"

    def train(self, run: Run, turn: int, environments: Path, timeout: float) -> str:
        """Make a run; returns why it failed, or ""."""
        out = self.folder / "runs" / f"{run.name}-{turn}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        environment = dict(self.environment)
        if not run.package.shares_mlx:
            environment.pop("LD_PRELOAD", None)  # torch brings a fast matrix product
        python = python_of(run.package, environments)
        began = time.perf_counter()
        runner = SCRIPTS / "bench" / run.package.runner
        result = run_job(python, runner, self._job(run, out), environment, timeout)
        content: dict[str, Any] = {
            "seconds": time.perf_counter() - began,
            "date": date.today().isoformat(),
            "machine": computer(),
        }
        failed = result if isinstance(result, str) else ""
        content |= {"error": failed} if isinstance(result, str) else {"result": asdict(result)}
        self.file(run, turn).parent.mkdir(exist_ok=True)
        self.file(run, turn).write_text(json.dumps(content), encoding="utf-8")
        return failed

    def _job(self, run: Run, out: Path) -> Job:
        options = self.settings["options"]
        return Job(
            model=self.settings["model"],
            out=str(out),
            pairs=[Pair(*ids) for ids in self.prepared["pairs"]],
            updates=self.settings["updates"],
            batch_size=run.batch_size,
            accumulation=PAIRS_PER_UPDATE // run.batch_size,
            grad_checkpoint=run.grad_checkpoint,
            rank=options["lora_rank"],
            scale=options["lora_alpha"] / options["lora_rank"],
            learning_rate=options["learning_rate"],
            weight_decay=options["weight_decay"],
            beta=options["beta"],
            start=str(self.folder / "start" / "adapters.safetensors"),
            power_exponential=run.power_exponential,
            options={**options, **run.options, "data": str(self.folder / "data")},
        )

    def stored(self, run: Run, turn: int) -> dict[str, Any] | None:
        """What is known of a run; None if it was not made."""
        file = self.file(run, turn)
        if not file.is_file():
            return None
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        evaluation = self.adapter(run, turn) / "evaluation.json"
        if evaluation.is_file():
            content["evaluation"] = json.loads(evaluation.read_text(encoding="utf-8"))
        return content

    def is_finished(self, run: Run, turn: int) -> bool:
        """Whether a run was made and did not fail."""
        content = self.stored(run, turn)
        return content is not None and "result" in content

    def evaluate(self, rounds: int) -> None:
        """Measure the adapters that were not measured yet on the held-out pairs."""
        missing = [
            self.adapter(run, turn)
            for run in self.runs
            for turn in range(rounds)
            if self.is_finished(run, turn) and "evaluation" not in (self.stored(run, turn) or {})
        ]
        if missing:
            self._call("evaluate", *map(str, missing))

    def page(self, rounds: int) -> str:
        """The page of what is stored; "" if nothing is finished."""
        measured, failures = [], {}
        for run in self.runs:
            stored = [self.stored(run, turn) for turn in range(rounds)]
            good = [one for one in stored if one is not None and "result" in one]
            if not good:
                errors = [one["error"] for one in stored if one is not None]
                if errors:
                    failures[run.name] = errors[0]
                continue
            batches = run.batches + run.note
            measured.append(
                Measured(
                    run.name,
                    run.package.name,
                    batches,
                    run.grad_checkpoint,
                    run.same_order,
                    run.name == OURS,
                    good,
                )
            )
        if not measured:
            return ""
        return render(self._described(), measured, failures)

    def _described(self) -> dict[str, Any]:
        """The settings, in the words and numbers of the page."""
        pairs = [Pair(*ids) for ids in self.prepared["pairs"]]
        columns = {name: [len(getattr(pair, name)) for pair in pairs] for name in Pair._fields}
        means = {name: sum(lengths) / len(pairs) for name, lengths in columns.items()}
        longest = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
        return {
            **self.settings,
            "model_name": "SmolLM2-135M-Instruct",
            "pairs": len(pairs),
            "pairs_per_update": PAIRS_PER_UPDATE,
            "tokens": {**means, "pair": sum(means.values()), "longest": longest},
            "environment": self._remark.replace("for all", "for all that use mlx"),
        }


def chosen(runs: Sequence[Run], names: str | None) -> list[Run]:
    """The runs of a comma-separated list of names; a package's name means all of its runs."""
    if names is None:
        return list(runs)
    wanted = names.split(",")
    known = {run.name for run in runs} | {run.package.name for run in runs}
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"error: --runs {unknown[0]}: unknown; see --list")
    return [run for run in runs if run.name in wanted or run.package.name in wanted]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", help="names of runs or packages, comma-separated; default: all")
    parser.add_argument("--list", action="store_true", help="list the runs and the folder")
    parser.add_argument(
        "--updates", type=int, default=25, help=f"updates of {PAIRS_PER_UPDATE} pairs; default: 25"
    )
    parser.add_argument("--rounds", type=int, default=1, help="how often each run is made")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="folder with train.jsonl and valid.jsonl"
    )
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for one run")
    parser.add_argument("--page", type=Path, help="file to write the page to; default: print it")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "real" / "compare")
    args = parser.parse_args(argv)
    if min(args.updates, args.rounds) < 1:
        parser.error("--updates and --rounds are at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    folder = args.folder.resolve() / f"{args.data.resolve().name}-{args.updates}"
    comparison = Comparison(folder, args.data, args.updates)
    turns = [(run, turn) for turn in range(args.rounds) for run in comparison.runs]
    if args.list:
        print(folder / "results")
        for run, turn in turns:
            finished = "finished" if comparison.is_finished(run, turn) else ""
            print(comparison.file(run, turn).name, finished)
        return
    wanted = chosen(comparison.runs, args.runs)
    for run, turn in turns:
        if run not in wanted or comparison.is_finished(run, turn):
            continue
        print(f"{run.name}, round {turn + 1} …", file=sys.stderr, flush=True)
        failed = comparison.train(run, turn, args.folder.resolve() / "environments", args.timeout)
        if failed:
            print(f"  failed: {failed}", file=sys.stderr, flush=True)
    comparison.evaluate(args.rounds)
    page = comparison.page(args.rounds)
    if args.page is None:
        print(page)
    elif page:
        args.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
