"""Train SmolLM2-135M-Instruct with the defaults of every command, and print what they did.

The data are made of Anthropic's HH-RLHF (helpful): a short question; as chosen completion the first
sentence of an answer, as rejected one its first two to four. Held-out questions are others. ppo and
grpo get the questions and a reward for short answers.

    python scripts/real/defaults.py --list                 # the runs, and which are finished
    python scripts/real/defaults.py --runs dpo-30,dpo-300  # train what is missing, then the table

A finished run is not repeated, and an interrupted one continues. On 2 cores a run takes 5 minutes
(30 rows) to an hour (1,500 rows); on Linux LD_PRELOAD should name libopenblas.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from models import smollm2
from studies import (
    REAL,
    is_finished,
    read_json,
    read_rows,
    shown_kl,
    study_folder,
    train,
    write_rows,
)

LONGEST_QUESTION = 160
SENTENCE, LONGEST_ANSWER = (15, 160), 320
HELD_OUT = 60
REWARD = ("--reward", "length(target=12,unit='words')", "--max-completion-length", "48")


class Run(NamedTuple):
    """A training run with defaults."""

    command: str
    rows: int
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.command}-{self.rows}"


RUNS = (
    *(Run("dpo", rows) for rows in (30, 300, 1500)),
    *(Run(command, rows) for command in ("sft", "reward") for rows in (30, 300)),
    *(Run("kto", rows) for rows in (30, 300, 1500)),
    *(Run(command, 30, REWARD) for command in ("ppo", "grpo")),
)


def pairs(split: str) -> list[dict[str, Any]]:
    """First sentence against first two to four, of both answers of each row of a split."""
    found = []
    for row in read_rows(REAL / "hh-helpful" / f"{split}.jsonl"):
        question = row["prompt"][-1]["content"]
        if len(question) > LONGEST_QUESTION:
            continue
        for key in ("chosen", "rejected"):
            text = row[key][-1]["content"].strip().replace("\n", " ")
            sentences = re.split(r"(?<=[.!?])\s+", text)
            longer = " ".join(sentences[:4])
            shortest, longest = SENTENCE
            if len(sentences) < 2 or not shortest <= len(sentences[0]) <= longest:
                continue
            if len(longer) > LONGEST_ANSWER:
                continue
            chosen, rejected = (
                [{"role": "assistant", "content": content}] for content in (sentences[0], longer)
            )
            prompt = [{"role": "user", "content": question}]
            found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return found


def write_data(folder: Path, rows: int) -> Path:
    """A data folder with `rows` training pairs."""
    data = folder / f"data-{rows}"
    write_rows(data / "train.jsonl", pairs("train")[:rows])
    write_rows(data / "valid.jsonl", pairs("valid")[:HELD_OUT])
    return data


def table(runs: Sequence[Run], folder: Path) -> str:
    """What the defaults chose and did, as Markdown."""
    lines = [
        "| rows | updates | learning rate | held out | KL, nats per answer | answers, tokens |",
        "|---|---:|---:|---|---|---|",
    ]
    for run in runs:
        if not is_finished(folder / run.name):
            continue
        summary = read_json(folder / run.name / "summary.json")
        rate = re.search(
            r"^learning_rate: (\S+)", (folder / run.name / "config.yaml").read_text(), re.M
        )
        assert rate is not None
        answers = summary.get("answers") or {}
        lengths = [f"{answers[when]['mean_length']:.0f}" for when in ("before", "after") if answers]
        lines.append(
            f"| {run.command}, {run.rows:,} | {summary['steps']:,} | {rate[1]} | "
            f"{held_out(summary)} | {kl(summary)} | {' → '.join(lengths)} |"
        )
    return "\n".join(lines)


def held_out(summary: dict[str, Any]) -> str:
    """The held-out number that a command is judged by, with its interval."""
    found, intervals = summary["eval"], summary["eval_intervals"]
    before = summary.get("eval_before") or {}
    for name, title, digits in (
        ("reward", "reward", 3),
        ("rewards/margins", "margin", 3),
        ("rewards/accuracies", "accuracy", 3),
        ("perplexity", "perplexity", 1),
    ):
        if name in found and name in intervals:
            one = intervals[name]
            start = f"{before[name]:.{digits}f} → " if name in before else ""
            return (
                f"{title} {start}{found[name]:.{digits}f} "
                f"({one['low']:.{digits}f} to {one['high']:.{digits}f}), n = {one['n']}"
            )
    return "–"


def kl(summary: dict[str, Any]) -> str:
    found = summary.get("kl")
    if not found:
        return "–"
    return shown_kl(found["mean"], found["standard_error"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", help="comma-separated; all by default")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    folder = arguments.folder or study_folder("defaults")
    names = arguments.runs.split(",") if arguments.runs else [run.name for run in RUNS]
    if unknown := set(names) - {run.name for run in RUNS}:
        parser.error(f"unknown: {', '.join(unknown)}; see --list")
    if arguments.list:
        for run in RUNS:
            print(run.name, "finished" if is_finished(folder / run.name) else "")
        return
    for run in RUNS:
        if run.name in names and not is_finished(folder / run.name):
            where = ("--model", smollm2(), "--data", write_data(folder, run.rows))
            train(folder / run.name, run.command, *where, *run.options)
    print(table(RUNS, folder))


if __name__ == "__main__":
    main()
