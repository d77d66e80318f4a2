"""Teach SmolLM2-135M-Instruct to answer in one sentence, and see what else that changes.

Trains on the 100 pairs of data/real/brevity in several ways: DPO with more and fewer passes, with
--ld-alpha, with an SFT term, and SFT on the short answers alone. Then the model answers the
held-out questions and a set of facts, as it was and after each run: are the answers short, and the
facts still right?

    python scripts/real/style.py            # 2 hours on 2 cores, minutes on a Mac
    python scripts/real/style.py --only sft --seeds 3

Finished runs are not repeated, and interrupted ones continue. Writes docs/verified/style.md, which
has what was measured, here or before. On Linux LD_PRELOAD should name libopenblas.
"""

import argparse
import math
import re
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

from models import smollm2
from studies import (
    REAL,
    ROOT,
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
)

from mlx_align.system.intervals import mean_interval, wilson_interval

MAX_TOKENS = 96
SHOWN = (0, 1, 2, -3, -2, -1)  # places of questions whose answers are on the page


class Arm(NamedTuple):
    """A way to train.

    Attributes:
        title: Its name in the table.
        command: The command.
        options: Its options.
    """

    title: str
    command: str
    options: tuple[str, ...]


ARMS = {
    "sft": Arm("SFT on the short answers", "sft", ()),
    "dpo-2": Arm("DPO, 2 passes", "dpo", ("--epochs", "2")),
    "dpo-sft": Arm(
        "DPO with an SFT term, 2 passes", "dpo", ("--epochs", "2", "--loss", "sigmoid=1,sft=0.2")
    ),
    "dpo": Arm("DPO, 5 passes", "dpo", ("--epochs", "5")),
    "ld-dpo": Arm("LD-DPO, 5 passes", "dpo", ("--epochs", "5", "--ld-alpha", "0.1")),
}
FINDINGS = (
    "SFT on the short answers alone teaches the style and keeps most of what the model knew. DPO "
    "ranks all held-out pairs right after 2 passes, and the answers are hardly shorter, with an "
    "SFT term or without; after 5 they are as short as SFT's, and half of the facts are lost. The "
    "rejected completion is the chosen one and more: what both share cancels in DPO's loss, which "
    "then makes the rest of the model's own words less likely, and its knowledge with them. "
    "LD-DPO, which gives tokens beyond the shorter completion's length a tenth of the weight, does "
    "no better. So if the chosen answers show a style, `mlx-align sft` on them is the first thing "
    "to try. By default `dpo` would stop at the first evaluation with a margin surely above 0.5 "
    "(`--target-margin`), soon after 2 passes."
)
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


def row(name: str, moved: str, said: Sequence[str], before: Sequence[str]) -> list[str]:
    """A line of the table: lengths of answers to questions, facts that are right, KL."""
    asked = len(questions())
    lengths = [len(text.split()) for text in said[:asked]]
    changes = [a - len(b.split()) for a, b in zip(lengths, before[:asked], strict=True)]
    change = mean_interval(mean(changes), stdev(changes) / math.sqrt(asked), asked)
    right = [
        is_right(text, words) for text, words in zip(said[asked:], facts().values(), strict=True)
    ]
    share = wilson_interval(mean(right), len(right))
    changed = "–" if said is before else shown(change, "{:+.0f}")
    return [name, f"{mean(lengths):.0f}", changed, shown(share), moved]


def page() -> list[str]:
    """The parts of the page for what was measured."""
    rows = recorded("style")
    names = [name for arm in ARMS for name in rows if re.fullmatch(rf"{arm}-\d+", name)]
    asked = [[*questions(), *facts()][place] for place in SHOWN]
    said = [rows[f"said-{name}"] for name in ("start", *names) if f"said-{name}" in rows]
    titles = ["", f"words, n = {len(questions())}", "change", f"facts right, n = {len(facts())}"]
    return [
        "# A style, and what it costs",
        "SmolLM2-135M-Instruct is to answer in one sentence: 100 pairs of the model's own answers "
        "(`data/real/brevity`), the first sentence of each preferred to all of it. It answers "
        f"{len(questions())} held-out questions and {len(facts())} questions of fact at "
        f"temperature 0.01, in up to {MAX_TOKENS} tokens. A fact is right if the answer names it. "
        "95% intervals, over questions. `python scripts/real/style.py` measures it again.",
        table([*titles, "KL, nats per answer"], [rows[name] for name in ("start", *names)]),
        FINDINGS,
        "Some answers: before, and after each in the order of the table (seed 0):",
        "\n".join(
            f"- {question}\n" + "\n".join(f"    - {texts[at]}" for texts in said)
            for at, question in enumerate(asked)
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_only(parser, ARMS)
    parser.add_argument("--seeds", type=int, default=1)
    given, folder = parser.parse_args(), study_folder("style")
    asked = [*questions(), *facts()]
    before = answers(smollm2(), None, folder, asked, MAX_TOKENS)
    record("style", "start", row("SmolLM2-135M-Instruct", "–", before, before))
    record("style", "said-start", [one_line(before[place]) for place in SHOWN])
    for name in given.only:
        arm = ARMS[name]
        for seed in range(given.seeds):
            output = folder / f"{name}-{seed}"
            data = ("--model", smollm2(), "--data", REAL / "brevity", "--seed", seed)
            train(output, arm.command, *data, *arm.options)
            said = answers(smollm2(), output, folder, asked, MAX_TOKENS)
            kl = read_json(output / "summary.json").get("kl")
            moved = shown_kl(kl["mean"], kl["standard_error"]) if kl else "–"
            record("style", output.name, row(f"{arm.title}, seed {seed}", moved, said, before))
            if not seed:
                record("style", f"said-{output.name}", [one_line(said[place]) for place in SHOWN])
            write_page("style", *page())


if __name__ == "__main__":
    main()
