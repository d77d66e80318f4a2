"""Teach SmolLM2-135M-Instruct to answer in one sentence, and see what else that changes.

Trains `mlx-align dpo` with its defaults on the 100 pairs of data/real/brevity, three times with
other seeds. Then the model answers the held-out questions and a set of facts greedily, as it was
and after each run. Asked are: how long are the answers, and are the facts still right?

    python scripts/real/style.py            # an hour on 2 cores, minutes on a Mac
    python scripts/real/style.py --seeds 1  # one run

A finished run is not repeated, and an interrupted one continues. Prints the table for the docs.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from models import smollm2

from mlx_align.inference.generate import TextGenerator
from mlx_align.system.intervals import Estimate, mean_interval, wilson_interval
from mlx_align.system.user_folders import cache_folder

DATA = Path(__file__).resolve().parent.parent.parent / "data"
MAX_TOKENS = 96
# Asked beside the capitals of the starter's countries; any of the words is right.
FACTS = {
    "How many days are in a week?": ("7", "seven"),
    "What is 2 + 2?": ("4", "four"),
    "What colour is the sky on a clear day?": ("blue",),
    "Which planet do we live on?": ("earth",),
    "What is the opposite of hot?": ("cold",),
    "How many legs does a spider have?": ("8", "eight"),
    "What do bees make?": ("honey",),
    "Which language is spoken in France?": ("french",),
    "What is frozen water called?": ("ice",),
    "Who wrote Romeo and Juliet?": ("shakespeare",),
    "How many months are in a year?": ("12", "twelve"),
    "What is the largest ocean on Earth?": ("pacific",),
    "What gas do plants take in?": ("carbon dioxide",),
    "On which continent is Egypt?": ("africa",),
    "What is the chemical symbol for water?": ("h2o", "h₂o"),
    "Which animal says meow?": ("cat",),
}


def facts() -> dict[str, tuple[str, ...]]:
    """Questions, and words of which a right answer has one."""
    world = json.loads((DATA / "starter" / "world.json").read_text())
    capitals = {
        f"What is the capital of {country['name']}?": (country["capital"].lower(),)
        for country in world["countries"]
    }
    return FACTS | capitals


def questions() -> list[str]:
    """The held-out questions of the pairs."""
    lines = (DATA / "real" / "brevity" / "valid.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"][-1]["content"] for line in lines]


def is_right(answer: str, words: Sequence[str]) -> bool:
    """Whether an answer has one of the words."""
    return any(re.search(rf"\b{re.escape(word)}\b", answer.lower()) for word in words)


def train(seed: int, folder: Path) -> Path:
    """The run of a seed, trained if it is not finished."""
    output = folder / f"seed-{seed}"
    if not (output / "summary.json").is_file():
        command = ["dpo", "--resume", str(output)]
        if not (output / "config.yaml").is_file():
            command = ["dpo", "--model", str(smollm2()), "--data", str(DATA / "real" / "brevity")]
            command += ["--output", str(output), "--seed", str(seed)]
        subprocess.run([sys.executable, "-m", "mlx_align", *command], check=True)
    return output


def answers(run: Path | None, folder: Path, asked: Sequence[str]) -> list[str]:
    """Greedy answers of a run, or of the model itself; kept in a file."""
    file = folder / f"answers-{'start' if run is None else run.name}.json"
    if file.is_file():
        kept: dict[str, str] = json.loads(file.read_text())
        return [kept[question] for question in asked]
    generator = TextGenerator.load(str(smollm2()), run)
    said = {question: generator.generate(question, max_tokens=MAX_TOKENS) for question in asked}
    file.write_text(json.dumps(said, indent=1, ensure_ascii=False))
    return [said[question] for question in asked]


def row(name: str, said: Sequence[str], before: Sequence[str]) -> str:
    """A line of the table: lengths of answers to questions, facts that are right."""
    asked = len(questions())
    lengths = [len(text.split()) for text in said[:asked]]
    changes = [a - len(b.split()) for a, b in zip(lengths, before[:asked], strict=True)]
    change = mean_interval(mean(changes), stdev(changes), asked)
    right = [
        is_right(text, words) for text, words in zip(said[asked:], facts().values(), strict=True)
    ]
    share = wilson_interval(mean(right), len(right))
    shown = "–" if said is before else _interval(change, "{:+.0f}")
    return f"| {name} | {mean(lengths):.0f} | {shown} | {_interval(share, '{:.0%}')} |"


def _interval(found: Estimate, form: str) -> str:
    low, high = form.format(found.low), form.format(found.high)
    return f"{form.format(found.value)} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=cache_folder() / "real" / "style")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    asked = [*questions(), *facts()]
    before = answers(None, arguments.folder, asked)
    lines = [
        f"| | words, n = {len(questions())} | change | facts right, n = {len(facts())} |",
        "|---|---:|---|---|",
        row("SmolLM2-135M-Instruct", before, before),
    ]
    for seed in range(arguments.seeds):
        said = answers(train(seed, arguments.folder), arguments.folder, asked)
        lines.append(row(f"after DPO, seed {seed}", said, before))
        for question, first, then in list(zip(asked, before, said, strict=True))[:3]:
            print(f"{question}\n  before: {first}\n  after:  {then}\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
