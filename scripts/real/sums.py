"""Teach SmolLM2-135M-Instruct small sums with a reward that checks the answer: GRPO.

The model answers some questions like "What is 3 + 8? Answer with the number only." right at
temperature 1, but most wrong. 60 of 315 sums and differences are held out.

    python scripts/real/sums.py            # 3 seeds, 90 minutes on 2 cores
    python scripts/real/sums.py --seeds 1

Finished runs are not repeated, and interrupted ones continue. Writes docs/verified/sums.md. On
Linux LD_PRELOAD should name libopenblas.
"""

import argparse
import random
from pathlib import Path

from models import smollm2
from studies import read_json, read_rows, shown, study_folder, table, train, write_page, write_rows

QUESTION = "What is {} {} {}? Answer with the number only."
LARGEST_SUMMAND, LARGEST, HELD_OUT = 12, 20, 60
OPTIONS = ("--iters", 30, "--max-completion-length", 16)


def write_data(folder: Path) -> Path:
    """Write sums and differences of two numbers, as prompts with their answer."""
    summands, numbers = range(1, LARGEST_SUMMAND + 1), range(2, LARGEST)
    asked = [(a, "+", b, a + b) for a in summands for b in summands]
    asked += [(a, "-", b, a - b) for a in numbers for b in range(1, a)]
    random.Random(0).shuffle(asked)
    rows = [
        {
            "prompt": [{"role": "user", "content": QUESTION.format(a, sign, b)}],
            "answer": str(result),
        }
        for a, sign, b, result in asked
    ]
    write_rows(folder / "data" / "train.jsonl", rows[HELD_OUT:])
    write_rows(folder / "data" / "valid.jsonl", rows[:HELD_OUT])
    return folder / "data"


def row(seed: int, run: Path) -> list[str]:
    """A line of the table."""
    summary = read_json(run / "summary.json")
    before, after = summary["eval_before"]["reward"], summary["eval"]["reward"]
    interval, kl = summary["eval_intervals"]["reward"], summary["kl"]
    return [
        f"seed {seed}",
        f"{before:.0%}",
        shown({"value": after, **interval}),
        f"{kl['mean']:.1f} ± {kl['standard_error']:.1f}",
        f"{summary['seconds_in_all'] / 60:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    folder, given = study_folder("sums"), parser.parse_args()
    data, rows = write_data(folder), []
    for seed in range(given.seeds):
        options = ("--reward", "exact_answer", *OPTIONS, "--seed", seed)
        where = ("--model", smollm2(), "--data", data)
        rows.append(row(seed, train(folder / f"seed-{seed}", "grpo", *where, *options)))
    titles = ["", "right, before", "right, after", "KL, nats per answer", "minutes"]
    answers = "\n".join(
        f"- {one['prompt']}: “{one['before']}” → “{one['after']}”"
        for one in read_rows(folder / "seed-0" / "samples.jsonl")[:4]
    )
    write_page(
        "sums",
        "# GRPO with a reward that can be checked",
        f"SmolLM2-135M-Instruct, questions such as “{QUESTION.format(3, '+', 8)}”, the "
        f"built-in reward `exact_answer`, {' '.join(map(str, OPTIONS))}; all else by default. "
        f"{HELD_OUT} of 315 are held out, one answer to each at temperature 1. 95% intervals. "
        "`python scripts/real/sums.py` measures it again.",
        table(titles, rows),
        "Answers to held-out questions, before and after (seed 0):",
        answers,
    )


if __name__ == "__main__":
    main()
