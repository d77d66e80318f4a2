"""Compare the speed and memory of DPO steps with other packages, on the same work.

The same pairs of random token ids, LoRA of rank 8 on all linear layers of all blocks, AdamW,
float32, through the real trainers of mlx-align, mlx-lm-lora, mlx-tune and the mlx half of
unsloth_zoo (reference log-probs precomputed), each in a process and a virtual environment of its
own; on request through TRL on torch's CPU backend. The model is a random Llama (34M by default),
made here. Ours runs with mlx's own exponential, as on a Mac; `--power-exponential` adds the faster
one that it takes on x86.

For each row of the table the packages take turns, `--rounds` times: a ratio compares runs that lie
close together in time, and the median of the rounds is shown. Times of different calls of this
script can't be compared on a machine that does other work too; where that is much, CPU seconds (of
all threads of a process) say more than the clock on the wall.

    python scripts/bench.py                              # all rows, all packages (an hour)
    python scripts/bench.py --cases 1,256,128 --packages mlx-tune --steps 8
    python scripts/bench.py --ours-only --rounds 3       # this package alone

Peak memory is mlx's own, from the loaded model to the end of training, the reference pass
included; for TRL it is the process's, which holds the interpreter and torch too.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from glob import glob
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent / "bench"
sys.path.insert(0, str(HERE))

from common import MARK, Job, Pair, Result
from environments import OURS, PEERS, TRL, WITH_POWER, Package, python_of

# mlx's Linux wheel brings a slow matrix product; with this in front it is some 60 times faster.
OPENBLAS = (
    "/usr/lib/*/openblas-pthread/libopenblas.so.0",
    "/usr/lib*/libopenblasp.so.0",
    "/usr/lib*/libopenblas.so.0",
)


@dataclass(frozen=True)
class Case:
    """One row of the table: pairs per step, tokens of a prompt and of a completion."""

    batch_size: int
    prompt: int
    completion: int
    grad_checkpoint: bool = False

    def __str__(self) -> str:
        text = f"B={self.batch_size} {self.prompt}+{self.completion}"
        return text + (" checkpointed" if self.grad_checkpoint else "")

    @classmethod
    def parse(cls, text: str) -> "Case":
        """`B,P,R`, or `B,P,R,ckpt` with gradient checkpointing."""
        numbers, last = text.split(","), False
        if numbers[-1] == "ckpt":
            numbers, last = numbers[:-1], True
        try:
            batch_size, prompt, completion = map(int, numbers)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: expected B,P,R or B,P,R,ckpt") from None
        if min(batch_size, prompt, completion) < 1:
            raise argparse.ArgumentTypeError(f"{text}: B, P and R are at least 1")
        return cls(batch_size, prompt, completion, last)


CASES = (
    Case(1, 256, 128),
    Case(2, 256, 128),
    Case(2, 512, 64),
    Case(2, 256, 128, grad_checkpoint=True),
    Case(2, 512, 64, grad_checkpoint=True),
)


@dataclass
class Measured:
    """One run of one package.

    Attributes:
        package: Its name.
        case: The row.
        round: Which turn, from 0.
        step_seconds: Median of the steps after the warm-up.
        cpu_seconds: The same of the process's CPU time.
        peak_bytes: See the head of this script.
        reference_seconds_per_pair: Cost of the reference before training; None where it is part
            of every step.
        error: What went wrong, if the run failed.
        result: All that the runner said.
    """

    package: str
    case: str
    round: int
    step_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    reference_seconds_per_pair: float | None = None
    error: str = ""
    result: dict[str, Any] = field(default_factory=dict)


def measured(package: Package, case: Case, turn: int, result: Result, warmup: int) -> Measured:
    """The numbers that are compared, from what a runner said."""
    reference = None
    if result.reference_batches:
        # The first batch compiles, as the first steps do.
        batches = result.reference_batches[1:] or result.reference_batches
        reference = median(batches) / case.batch_size
    elif result.reference_pairs:
        reference = result.reference_seconds / result.reference_pairs
    return Measured(
        package.name,
        str(case),
        turn,
        step_seconds=median(result.steps[warmup:] or result.steps),
        cpu_seconds=median(result.cpu[warmup:] or result.cpu),
        peak_bytes=result.peak_bytes,
        reference_seconds_per_pair=reference,
        result=asdict(result),
    )


def run(
    package: Package, case: Case, turn: int, args: argparse.Namespace, environment: dict[str, str]
) -> Measured:
    """One run in a process of its own; a failure is part of what was measured."""
    with tempfile.TemporaryDirectory() as out:
        job = Job(
            model=str(args.model),
            out=out,
            pairs=synthetic_pairs(args.model, case, args.steps * case.batch_size),
            updates=args.steps,
            batch_size=case.batch_size,
            grad_checkpoint=case.grad_checkpoint,
            power_exponential=package.power_exponential,
        )
        python = python_of(package, args.envs)
        result = run_job(python, HERE / package.runner, job, environment, args.timeout)
    if isinstance(result, str):
        return Measured(package.name, str(case), turn, error=result)
    return measured(package, case, turn, result, args.warmup)


def run_job(
    python: Path, runner: Path, job: Job, environment: dict[str, str], timeout: float
) -> Result | str:
    """What a runner measured, or why it failed. It runs in a process of its own, in `job.out`."""
    file = Path(job.out) / "job.json"
    job.write(file)
    try:
        done = subprocess.run(
            [str(python), str(runner), str(file)],
            env=environment,
            cwd=job.out,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return f"over {timeout:g} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return said[-1] if said else f"ended with {done.returncode}"
    return Result(**json.loads(lines[-1][len(MARK) :]))


def synthetic_pairs(model: Path, case: Case, count: int) -> list[Pair]:
    """Pairs of random ids, one for every place in every step's batch; the same in all packages."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    draw = random.Random(0)

    def ids(length: int) -> list[int]:
        return [draw.randrange(10, config["vocab_size"]) for _ in range(length)]

    pairs = []
    for _ in range(count):
        pair = Pair(ids(case.prompt), ids(case.completion), ids(case.completion))
        # Packages that cut at the common prefix must find exactly the prompt.
        while pair.rejected[0] == pair.chosen[0]:
            pair.rejected[0] = draw.randrange(10, config["vocab_size"])
        pairs.append(pair)
    return pairs


def table(cases: Sequence[Case], packages: Sequence[Package], runs: Sequence[Measured]) -> str:
    """Medians over the rounds, and ours / theirs, as Markdown."""
    rows = [
        "| pairs | package | step, s | its CPU, s | reference, s/pair | peak, GB "
        "| ours/it: time | CPU | peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        of_case = [run for run in runs if run.case == str(case)]
        for package in packages:
            theirs = [run for run in of_case if run.package == package.name]
            good = [run for run in theirs if not run.error]
            if not good:
                error = theirs[0].error if theirs else "not run"
                rows.append(f"| {case} | {package.name} | failed: {error[:80]} |{' |' * 6}")
                continue
            references = [
                run.reference_seconds_per_pair
                for run in good
                if run.reference_seconds_per_pair is not None
            ]
            cells = [
                str(case),
                package.name,
                f"{median(run.step_seconds for run in good):.3f}",
                f"{median(run.cpu_seconds for run in good):.3f}",
                f"{median(references):.3f}" if references else "in the step",
                f"{median(run.peak_bytes for run in good) / 1e9:.3f}",
                *ratios(of_case, package),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def ratios(of_case: Sequence[Measured], package: Package) -> list[str]:
    """Medians over the rounds of ours / theirs: step time, its CPU time, peak; "" for none."""
    quotients: list[tuple[float, float, float]] = []
    for turn in sorted({run.round for run in of_case}):
        pair = {run.package: run for run in of_case if run.round == turn and not run.error}
        if package == OURS or not {OURS.name, package.name} <= set(pair):
            continue
        ours, theirs = pair[OURS.name], pair[package.name]
        quotients.append(
            (
                ours.step_seconds / theirs.step_seconds,
                ours.cpu_seconds / theirs.cpu_seconds,
                ours.peak_bytes / theirs.peak_bytes,
            )
        )
    if not quotients:
        return [""] * 3
    texts = [f"{median(column):.2f}" for column in zip(*quotients, strict=True)]
    # torch's peak is another thing.
    return texts if package.shares_mlx else [*texts[:2], ""]


def runner_environment() -> tuple[dict[str, str], str]:
    """The environment of all runners alike, and what is to be known of it."""
    environment = dict(os.environ)
    environment.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
    # Ours sets what mlx reads by itself; nothing is set for it, or for others, from outside.
    environment.pop("MLX_BFS_MAX_WIDTH", None)
    if platform.system() != "Linux":
        return environment, ""
    if environment.get("LD_PRELOAD"):
        return environment, f"LD_PRELOAD={environment['LD_PRELOAD']} for all, as it was set."
    found = [file for pattern in OPENBLAS for file in sorted(glob(pattern))]
    if not found:
        return environment, (
            "No OpenBLAS found (apt-get install libopenblas0-pthread): all run with the matrix "
            "product of mlx's wheel, which is some 60 times slower."
        )
    environment["LD_PRELOAD"] = found[0]
    return environment, f"LD_PRELOAD={found[0]} for all."


def chosen_packages(args: argparse.Namespace) -> list[Package]:
    """Ours and whom it is compared with."""
    if args.ours_only:
        return [OURS, *([WITH_POWER] if args.power_exponential else [])]
    known = {package.name: package for package in PEERS}
    names = args.packages.split(",") if args.packages else list(known)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"error: --packages {unknown[0]}: known are {', '.join(known)}")
    peers = [*(known[name] for name in names), *([TRL] if args.trl else [])]
    return [OURS, *([WITH_POWER] if args.power_exponential else []), *peers]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        type=Case.parse,
        nargs="+",
        default=list(CASES),
        metavar="B,P,R[,ckpt]",
        help="rows: pairs per step, tokens of a prompt, of a completion, with checkpointing",
    )
    parser.add_argument("--packages", help="comma-separated; default: all but trl")
    parser.add_argument("--ours-only", action="store_true", help="only mlx-align")
    parser.add_argument(
        "--power-exponential",
        action="store_true",
        help="mlx-align once more with the exponential that it takes on x86",
    )
    parser.add_argument("--trl", action="store_true", help="TRL on torch's CPU backend too")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3, help="first steps left out of the median")
    parser.add_argument("--rounds", type=int, default=3, help="turns that the packages take")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for one run")
    parser.add_argument(
        "--envs", type=Path, default=Path("build/bench-envs"), help="the packages' environments"
    )
    parser.add_argument(
        "--model", type=Path, help="model folder; default: the 34M one, made beside --envs"
    )
    parser.add_argument("--json", type=Path, help="file for everything that was measured")
    args = parser.parse_args(argv)
    if not 0 <= args.warmup < args.steps:
        parser.error(f"--warmup {args.warmup}: fewer than --steps {args.steps}, at least 0")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1")
    args.envs = args.envs.resolve()
    args.model = (args.model or args.envs.parent / "bench-model-34m").resolve()
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    packages = chosen_packages(args)
    environment, remark = runner_environment()
    if remark:
        print(remark, file=sys.stderr)
    if not (args.model / "config.json").is_file():
        subprocess.run([sys.executable, str(HERE / "model.py"), str(args.model)], check=True)
    for package in packages:
        python_of(package, args.envs)
    runs: list[Measured] = []
    for case in args.cases:
        for turn in range(args.rounds):
            for package in packages:
                one = run(package, case, turn, args, environment)
                runs.append(one)
                said = one.error or f"{one.step_seconds:.3f} s, {one.peak_bytes / 1e9:.3f} GB"
                print(f"{case}, round {turn + 1}, {package.name}: {said}", file=sys.stderr)
                if args.json:
                    write_json(args, packages, runs, remark)
    print(table(args.cases, packages, runs))


def write_json(
    args: argparse.Namespace,
    packages: Sequence[Package],
    runs: Sequence[Measured],
    remark: str,
) -> None:
    """Everything measured so far; written after every run, so that nothing is lost."""
    content = {
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "environment": remark,
        "steps": args.steps,
        "warmup": args.warmup,
        "packages": {package.name: package.installs for package in packages},
        "runs": [asdict(run) for run in runs],
        "table": table(args.cases, packages, runs),
    }
    args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
