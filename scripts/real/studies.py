"""What the studies share: runs that are not repeated, tables with intervals, and their page."""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_align.system.atomic_io import write_text
from mlx_align.system.intervals import Estimate
from mlx_align.system.user_folders import cache_folder

ROOT = Path(__file__).resolve().parent.parent.parent
REAL = ROOT / "data" / "real"
MEASURED = Path(__file__).resolve().parent / "measured"


def study_folder(name: str) -> Path:
    """The folder in the user's cache in which a study keeps its runs."""
    folder = cache_folder() / "real" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def add_only(parser: argparse.ArgumentParser, known: Collection[str]) -> None:
    """Add the option --only, which names parts of a study; all of them by default."""

    def names(text: str) -> list[str]:
        asked = text.split(",")
        if unknown := set(asked) - set(known):
            there = f"there are {', '.join(known)}"
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; {there}")
        return [name for name in known if name in asked]

    told = f"comma-separated: {', '.join(known)}; all by default"
    parser.add_argument("--only", metavar="NAMES", type=names, default=list(known), help=told)


def run(command: Sequence[object]) -> None:
    """Run an mlx-align command with its output in the terminal; the script ends if it fails."""
    words = [str(word) for word in command]
    print(f"\n$ mlx-align {' '.join(words)}", file=sys.stderr, flush=True)
    code = subprocess.run([sys.executable, "-m", "mlx_align", *words], check=False).returncode
    if code:
        sys.exit(code)


def train(output: Path, command: str, *options: object) -> Path:
    """Train a run, or continue it; a finished one is not repeated."""
    if not is_finished(output):
        begun = (output / "config.yaml").is_file()
        run([command, "--resume", output] if begun else [command, *options, "--output", output])
    return output


def sample(output: Path, asked: Sequence[str], *options: object) -> list[dict[str, Any]]:
    """The rows of `mlx-align data sample`, one answer to each question; kept in `output`."""
    if not output.is_file():
        prompts = [{"prompt": [{"role": "user", "content": question}]} for question in asked]
        data = write_rows(output.with_suffix(".prompts.jsonl"), prompts)
        run(["data", "sample", "--data", data, "--output", output, "-n", 1, *options])
    return read_rows(output)


def answers(
    model: Path, trained: Path | None, folder: Path, asked: Sequence[str], tokens: int
) -> list[str]:
    """Answers of a run, or of the model itself, at a temperature close to 0; kept in a file.

    Args:
        model: The model.
        trained: The run; None for the model itself.
        folder: Folder of the study.
        asked: The questions.
        tokens: Longest answer, tokens.
    """
    file = folder / f"answers-{'start' if trained is None else trained.name}.jsonl"
    adapter = () if trained is None else ("--adapter-path", trained)
    options = ("--temperature", 0.01, "--max-completion-length", tokens)
    found = sample(file, asked, "--model", model, *adapter, *options)
    return [row["completions"][0] for row in found]


def is_finished(output: Path) -> bool:
    """Whether the run in this folder has ended."""
    return (output / "summary.json").is_file()


def evaluate(trained: Path, output: Path, *options: object) -> dict[str, Any]:
    """The numbers of `mlx-align eval`, computed once."""
    file = output / "evaluation.json"
    if not file.is_file():
        resume = ["--resume"] if output.is_dir() else []
        run(["eval", trained, *options, "--output", output, *resume])
    found: dict[str, Any] = read_json(file)
    return found


def read_json(file: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write a JSON Lines file whole, and its folder; returns its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def shown(found: Estimate | Mapping[str, float], form: str = "{:.0%}") -> str:
    """A number with its interval."""
    if isinstance(found, Mapping):
        found = Estimate(found["value"], found["low"], found["high"])
    value, low, high = (form.format(number) for number in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})"


def shown_kl(mean: float, standard_error: float | None) -> str:
    """A KL in nats per answer with its standard error."""
    return f"{mean:.1f} ± {standard_error or 0:.1f}"


def one_line(text: str) -> str:
    """A text without line breaks and repeated spaces."""
    return " ".join(text.split())


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; columns after the first are aligned to the right."""
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def record(study: str, name: str, cells: Sequence[str]) -> None:
    """Keep a row of a study's tables in the repository, with the date and the machine.

    The page is made of such rows. It keeps those whose runs are gone, or were made elsewhere.
    """
    rows = _measured(study)
    if list(cells) != rows.get(name, {}).get("cells"):
        found = {"cells": list(cells), "date": str(datetime.date.today()), "machine": machine()}
        text = json.dumps(rows | {name: found}, ensure_ascii=False, indent=1)
        MEASURED.mkdir(exist_ok=True)
        write_text(MEASURED / f"{study}.json", text + "\n")


def recorded(study: str) -> dict[str, list[str]]:
    """The rows that `record` kept, by name."""
    return {name: row["cells"] for name, row in _measured(study).items()}


def _measured(study: str) -> dict[str, Any]:
    file = MEASURED / f"{study}.json"
    return read_json(file) if file.is_file() else {}


def write_page(name: str, *parts: str) -> None:
    """Write a page of docs/verified: its parts, and when and where they were measured.

    The dates are those of the recorded rows, or today if the study records none.
    """
    rows = list(_measured(name).values())
    rows = rows or [{"date": str(datetime.date.today()), "machine": machine()}]
    places = dict.fromkeys(row["machine"] for row in rows)
    made = [
        f"{days([row['date'] for row in rows if row['machine'] == place])}: {place}"
        for place in places
    ]
    last = f"Measured {'; '.join(made)}. This page is written by the script."
    file = ROOT / "docs" / "verified" / f"{name}.md"
    file.write_text("\n\n".join([*parts, last]) + "\n", encoding="utf-8")
    print(file)


def days(dates: Sequence[str]) -> str:
    """The first and last of some ISO dates, in words."""
    first, last = min(dates), max(dates)
    return f"on {first}" if first == last else f"from {first} to {last}"


def machine() -> str:
    """The machine and backend, in words."""
    import mlx.core as mx

    if mx.metal.is_available():
        return f"{mx.device_info()['device_name']}, GPU"
    backend = "mlx's CPU backend"
    if "openblas" in os.environ.get("LD_PRELOAD", ""):
        backend += " with OpenBLAS"
    return f"{computer()}, {backend}"


def computer() -> str:
    """The kind of computer, and how many of its cores this process may use."""
    cores: int | str | None = os.cpu_count()
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) != cores:
        cores = f"{len(os.sched_getaffinity(0))} of {cores}"
    return f"{platform.system()} {platform.machine()}, {cores} cores"
