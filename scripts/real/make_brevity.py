"""Pairs that prefer short answers: data/real/brevity, made of a model's own answers.

SmolLM2-135M-Instruct answers first questions of data/real/hh-helpful. The rejected completion of a
pair is the model's answer, the chosen one its first sentence. Because both are the model's own
words, the pairs teach length and nothing else, and a short run shows.

    python scripts/real/make_brevity.py --output data/real/brevity    # minutes on a CPU
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from models import smollm2

from mlx_align.system.user_folders import cache_folder

REAL = Path(__file__).resolve().parent.parent.parent / "data" / "real"
LONGEST_QUESTION, SHORTEST_SENTENCE, MAX_TOKENS = 100, 20, 96
PAIRS = {"train": 100, "valid": 40}
# Prompts asked per pair: some answers are a single sentence.
SPARE = 1.8


def questions(split: str) -> list[str]:
    """The first user turns of a split, short ones, without repetitions."""
    found = {}
    with (REAL / "hh-helpful" / f"{split}.jsonl").open() as stream:
        for line in stream:
            question = json.loads(line)["prompt"][0]["content"].strip()
            if len(question) <= LONGEST_QUESTION and "\n" not in question:
                found[question.lower()] = question
    return list(found.values())


def sentences(text: str) -> list[str]:
    """The sentences of a text; a last one that was cut off is left out."""
    parts = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
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


def sample(split: str, asked: list[str], folder: Path) -> list[dict[str, Any]]:
    """The model's answers, by `mlx-align data sample`; kept in `folder`."""
    file, output = folder / f"{split}.prompts.jsonl", folder / f"{split}.answers.jsonl"
    if output.is_file():
        return [json.loads(line) for line in output.read_text().splitlines()]
    prompts = [{"prompt": [{"role": "user", "content": question}]} for question in asked]
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    command = [sys.executable, "-m", "mlx_align", "data", "sample", "--model", str(smollm2())]
    command += ["--data", str(file), "--output", str(output), "-n", "1", "--temperature", "0.7"]
    subprocess.run([*command, "--max-completion-length", str(MAX_TOKENS)], check=True)
    return [json.loads(line) for line in output.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=REAL / "brevity")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    folder = cache_folder() / "real" / "brevity"
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in PAIRS.items():
        asked = questions(split)[: int(SPARE * count)]
        rows = pairs(sample(split, asked, folder))[:count]
        if len(rows) < count:
            print(f"{split}: only {len(rows)} of {count} pairs", file=sys.stderr)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (output / f"{split}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
