"""Teach SmolLM2-135M-Instruct small sums with a reward that checks the answer: GRPO and PPO.

The model answers some questions like "What is 3 + 8? Answer with the number only." right at
temperature 1, but most wrong. 60 of 315 sums and differences are held out.

    python scripts/real/sums.py            # GRPO with 3 seeds, PPO with one: 3 hours of one core
    python scripts/real/sums.py --only grpo-0

Finished runs are not repeated, and interrupted ones continue. Writes docs/verified/sums.md, which
has what was measured, here or before. On Linux LD_PRELOAD should name libopenblas.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from models import smollm2
from studies import (
    add_only,
    answers,
    one_line,
    read_json,
    read_rows,
    record,
    recorded,
    shown,
    shown_kl,
    study_folder,
    table,
    train,
    write_page,
    write_rows,
)

from mlx_align.rollout.builtin_rewards import CompletionFacts, exact_answer
from mlx_align.system.intervals import Estimate, wilson_interval

QUESTION = "What is {} {} {}? Answer with the number only."
LARGEST_SUMMAND, LARGEST, HELD_OUT = 12, 20, 60
TOKENS = 16
GRPO_OPTIONS = ("--iters", 30)
BATCHES = 5  # rollout batches that are averaged

FINDINGS = (
    "GRPO raises the share of right answers with every seed, by 16 points on average; one interval "
    "of three reaches below 0. At temperature 0 the three runs end within 4 points of each other. "
    "PPO went on for longer and from more completions, and gained most."
)


class Arm(NamedTuple):
    """A way to train: its name in the table, the command and its options."""

    title: str
    command: str
    options: tuple[object, ...]


ARMS = {
    **{
        f"grpo-{seed}": Arm(f"GRPO, seed {seed}", "grpo", (*GRPO_OPTIONS, "--seed", seed))
        for seed in (0, 1, 2)
    },
    "ppo": Arm("PPO, all defaults", "ppo", ()),
}


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


def row(title: str, run: Path, greedy: Sequence[Estimate]) -> list[str]:
    """A line of the table; `greedy` is the share right at temperature 0, before and after."""
    summary = read_json(run / "summary.json")
    before, after = summary["eval_before"]["reward"], summary["eval"]["reward"]
    interval, kl = summary["eval_intervals"]["reward"], summary["kl"]
    return [
        title,
        f"{summary['steps']} × {summary['completions'] // summary['steps']}",
        f"{before:.0%}",
        shown({"value": after, **interval}),
        shown(summary["verdict"]["estimate"], "{:+.0%}"),
        f"{greedy[0].value:.0%} → {shown(greedy[1])}",
        shown_kl(kl["mean"], kl["standard_error"]),
        f"{summary['seconds_in_all'] / 60:.0f}",
    ]


def right_share(said: Sequence[str], results: Sequence[str]) -> Estimate:
    """The share of answers that `exact_answer` finds right."""
    reward, facts = exact_answer(), CompletionFacts(TOKENS, True, TOKENS)
    found = [reward(text, facts, {"answer": one}) for text, one in zip(said, results, strict=True)]
    return wilson_interval(mean(map(bool, found)), len(found))


def training_rows(run: Path) -> list[list[str]]:
    """What changed in the completions that were trained on: first and last batches."""
    samples = [one for one in read_rows(run / "samples.jsonl") if "step" in one]
    last = max(one["step"] for one in samples)
    rows = []
    for first in (1, last - BATCHES + 1):
        found = [one for one in samples if first <= one["step"] < first + BATCHES]
        ended = [one for one in found if one["ended"]]
        plus, minus = (
            [one for one in found if sign in one["prompt"][-1]["content"]]
            for sign in (" + ", " - ")
        )
        shares = [mean(one["reward"] for one in part) for part in (found, plus, minus, ended)]
        shares.append(len(ended) / len(found))
        rows.append([f"{first} to {first + BATCHES - 1}", *(f"{share:.0%}" for share in shares)])
    return rows


def examples(run: Path) -> list[str]:
    """Answers to held-out questions, before and after."""
    told = [one for one in read_rows(run / "samples.jsonl") if "before" in one]
    return [
        f"{one['messages'][-1]['content']} “{one_line(one['before'])}” → “{one_line(one['after'])}”"
        for one in told
    ]


def page() -> list[str]:
    """The parts of the page for what was measured."""
    rows = recorded("sums")
    titles = ["", "rollout batches × completions", "right, before", "right, after", "change"]
    titles += ["at temperature 0", "KL, nats per answer", "minutes"]
    parts = [
        "# GRPO and PPO with a reward that can be checked",
        f"SmolLM2-135M-Instruct, questions such as “{QUESTION.format(3, '+', 8)}”, the "
        f"built-in reward `exact_answer`, up to {TOKENS} tokens; GRPO with "
        f"{' '.join(map(str, GRPO_OPTIONS))}, all else by default. "
        f"{HELD_OUT} of 315 are held out, one answer to each at temperature 1. 95% intervals. "
        "`python scripts/real/sums.py` measures it again.",
        table(titles, [rows[name] for name in ARMS if name in rows]),
        FINDINGS,
    ]
    if "examples" in rows:
        shares = ["rollout batches", "right", "of sums", "of differences", "of ended answers"]
        parts += [
            "The answers that GRPO was trained on (seed 0):",
            table([*shares, "ended"], [rows["first-batches"], rows["last-batches"]]),
            "Answers to held-out questions at temperature 0, before and after GRPO (seed 0):",
            "\n".join(f"- {line}" for line in rows["examples"]),
        ]
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_only(parser, ARMS)
    given, folder = parser.parse_args(), study_folder("sums")
    data = write_data(folder)
    held_out = read_rows(data / "valid.jsonl")
    asked = [one["prompt"][-1]["content"] for one in held_out]
    results = [one["answer"] for one in held_out]
    reward = ("--reward", "exact_answer", "--max-completion-length", TOKENS)
    where = ("--model", smollm2(), "--data", data)
    before = right_share(answers(smollm2(), None, folder, asked, TOKENS), results)
    for name in given.only:
        arm = ARMS[name]
        trained = train(folder / name, arm.command, *where, *reward, *arm.options)
        after = right_share(answers(smollm2(), trained, folder, asked, TOKENS), results)
        record("sums", name, row(arm.title, trained, (before, after)))
        if name == "grpo-0":
            for part, cells in zip(("first", "last"), training_rows(trained), strict=True):
                record("sums", f"{part}-batches", cells)
            record("sums", "examples", examples(trained))
        write_page("sums", *page())


if __name__ == "__main__":
    main()
