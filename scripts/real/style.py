"""Teach SmolLM2-135M-Instruct to answer in one sentence, and see what else that changes.

Trains `mlx-align dpo` for 5 passes over the 100 pairs of data/real/brevity, with and without
--ld-alpha, each three times with other seeds. Then the model answers the held-out questions and a
set of facts, as it was and after each run: are the answers short, and the facts still right?

    python scripts/real/style.py            # 2 hours on 2 cores, minutes on a Mac
    python scripts/real/style.py --seeds 1  # 40 minutes

Finished runs are not repeated, and interrupted ones continue. Writes docs/verified/style.md. On
Linux LD_PRELOAD should name libopenblas.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from models import smollm2
from studies import (
    REAL,
    ROOT,
    read_json,
    read_rows,
    run,
    shown,
    study_folder,
    table,
    train,
    write_page,
    write_rows,
)

from mlx_align.system.intervals import mean_interval, wilson_interval

MAX_TOKENS = 96
# A change of style takes more than the 3 passes that are the default for 100 pairs.
PASSES = 5
ARMS = {"DPO": (), "LD-DPO": ("--ld-alpha", "0.1")}
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
    world = read_json(ROOT / "data" / "starter" / "world.json")
    capitals = {
        f"What is the capital of {country['name']}?": (country["capital"].lower(),)
        for country in world["countries"]
    }
    return FACTS | capitals


def questions() -> list[str]:
    """The held-out questions of the pairs."""
    rows = read_rows(REAL / "brevity" / "valid.jsonl")
    return [row["prompt"][-1]["content"] for row in rows]


def is_right(answer: str, words: Sequence[str]) -> bool:
    """Whether an answer has one of the words."""
    return any(re.search(rf"\b{re.escape(word)}\b", answer.lower()) for word in words)


def answers(trained: Path | None, folder: Path, asked: Sequence[str]) -> list[str]:
    """Answers of a run, or of the model itself, at a temperature close to 0; kept in a file."""
    file = folder / f"answers-{'start' if trained is None else trained.name}.jsonl"
    if not file.is_file():
        prompts = [{"prompt": [{"role": "user", "content": question}]} for question in asked]
        data = write_rows(folder / "questions.jsonl", prompts)
        adapter = () if trained is None else ("--adapter-path", trained)
        options = ("-n", 1, "--temperature", 0.01, "--max-completion-length", MAX_TOKENS)
        where = ("--model", smollm2(), *adapter, "--data", data, "--output", file)
        run(["data", "sample", *where, *options])
    return [row["completions"][0] for row in read_rows(file)]


def row(name: str, said: Sequence[str], before: Sequence[str]) -> list[str]:
    """A line of the table: lengths of answers to questions, facts that are right."""
    asked = len(questions())
    lengths = [len(text.split()) for text in said[:asked]]
    changes = [a - len(b.split()) for a, b in zip(lengths, before[:asked], strict=True)]
    change = mean_interval(mean(changes), stdev(changes), asked)
    right = [
        is_right(text, words) for text, words in zip(said[asked:], facts().values(), strict=True)
    ]
    share = wilson_interval(mean(right), len(right))
    changed = "–" if said is before else shown(change, "{:+.0f}")
    return [name, f"{mean(lengths):.0f}", changed, shown(share)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    given, folder = parser.parse_args(), study_folder("style")
    asked = [*questions(), *facts()]
    before = answers(None, folder, asked)
    rows, shown_answers = [row("SmolLM2-135M-Instruct", before, before)], []
    for title, options in ARMS.items():
        for seed in range(given.seeds):
            output = folder / f"{title.lower()}-{seed}"
            data = ("--data", REAL / "brevity", "--epochs", PASSES, "--seed", seed)
            train(output, "dpo", "--model", smollm2(), *data, *options)
            said = answers(output, folder, asked)
            rows.append(row(f"{title}, seed {seed}", said, before))
            if not seed:
                shown_answers.append(said)
    titles = ["", f"words, n = {len(questions())}", "change"]
    write_page(
        "style",
        "# A style, and what it costs",
        f"`mlx-align dpo --epochs {PASSES}` teaches SmolLM2-135M-Instruct to answer in one "
        "sentence: 100 pairs of the model's own answers (`data/real/brevity`), the first sentence "
        f"of each preferred to all of it. It answers {len(questions())} held-out questions and "
        f"{len(facts())} questions of fact at temperature 0.01, in up to {MAX_TOKENS} tokens. "
        "A fact is right if the answer names it. 95% intervals, over questions. "
        "`python scripts/real/style.py` measures it again.",
        table([*titles, f"facts right, n = {len(facts())}"], rows),
        "The style is learned, and knowledge is lost: answers are short on questions that were "
        "not trained, and fewer facts are right than before. The rejected completion is the "
        "chosen one and more; what both have in common cancels in DPO's loss, which then makes "
        "the rest of the model's own words less likely. But that is not the whole reason: LD-DPO "
        f"(`{' '.join(ARMS['LD-DPO'])}`) gives the tokens beyond the shorter completion's length "
        "a tenth of the weight, and does no better. Both are far from the start, and the runs "
        "warn that the log-probs of chosen completions fall. Fewer passes change less: the two of "
        "`scripts/quickstart --real` go 2 nats from the start, with answers of 78 tokens in place "
        "of 103. Whether a dose or another loss teaches the style and keeps the facts has not "
        "been measured yet.",
        "Some answers: before, and after each (seed 0):",
        "\n".join(
            f"- {asked[place]}\n" + "\n".join(f"    - {_line(one[place])}" for one in examples)
            for examples in [[before, *shown_answers]]
            for place in (0, 1, 2, -3, -2, -1)
        ),
    )


def _line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    main()
