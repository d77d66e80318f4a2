"""Pairs that prefer short answers: data/real/brevity, made of a model's own answers.

SmolLM2-135M-Instruct answers first questions of data/real/hh-helpful. The rejected completion of a
pair is the model's answer, the chosen one its first sentence. Because both are the model's own
words, the pairs teach length and nothing else, and a short run shows.

    python scripts/real/make_brevity.py --output data/real/brevity    # minutes on a CPU
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from models import smollm2
from studies import REAL, one_line, read_rows, sample, study_folder, write_rows

LONGEST_QUESTION, SHORTEST_SENTENCE = 100, 20
OPTIONS = ("--temperature", 0.7, "--max-completion-length", 96)
PAIRS = {"train": 100, "valid": 40}
# Prompts asked per pair: some answers are a single sentence.
SPARE = 1.8


def questions(split: str) -> list[str]:
    """The first user turns of a split, short ones, without repetitions."""
    found = {}
    for row in read_rows(REAL / "hh-helpful" / f"{split}.jsonl"):
        question = row["prompt"][0]["content"].strip()
        if len(question) <= LONGEST_QUESTION and "\n" not in question:
            found[question.lower()] = question
    return list(found.values())


def sentences(text: str) -> list[str]:
    """The sentences of a text; a last one that was cut off is left out."""
    parts = re.split(r"(?<=[.!?])\s+", one_line(text))
    return [part for part in parts if re.search(r"\w[.!?]$", part)]


def pairs(answers: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A pair for each answer of at least two sentences that doesn't start with a list."""
    rows = []
    for row in answers:
        said = sentences(row["completions"][0])
        if len(said) < 2 or len(said[0]) < SHORTEST_SENTENCE or re.search(r"\b1\.", said[0]):
            continue
        chosen, rejected = (
            [{"role": "assistant", "content": content}] for content in (said[0], " ".join(said))
        )
        rows.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=REAL / "brevity")
    output = parser.parse_args().output
    folder = study_folder("brevity")
    for split, count in PAIRS.items():
        asked = questions(split)[: int(SPARE * count)]
        sampled = sample(folder / f"{split}.answers.jsonl", asked, "--model", smollm2(), *OPTIONS)
        rows = pairs(sampled)[:count]
        if len(rows) < count:
            print(f"{split}: only {len(rows)} of {count} pairs", file=sys.stderr)
        write_rows(output / f"{split}.jsonl", rows)


if __name__ == "__main__":
    main()
