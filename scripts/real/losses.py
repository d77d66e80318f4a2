"""DPO, IPO, SimPO, ORPO and KTO on the same people's preferences, each at its own best settings.

Conversations of data/real/hh-helpful of up to 200 tokens, as in helpful.py, whose judge is needed.
Every loss is trained for one pass over the same pairs at several learning rates and values of β.
The setting whose implicit reward is right most often on one half of the held-out pairs is compared
on the other half.

    python scripts/real/helpful.py --only judge
    python scripts/real/losses.py                # 3 hours on 2 cores
    python scripts/real/losses.py --losses dpo,ipo

Finished runs are not repeated, and interrupted ones continue. Writes docs/verified/when-to-use.md.
On Linux LD_PRELOAD should name libopenblas.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from helpful import ANSWERS, write_data
from models import smollm2
from studies import (
    evaluate,
    is_finished,
    read_rows,
    shown,
    shown_kl,
    study_folder,
    table,
    train,
    write_page,
    write_rows,
)

PAIRS = 180
RATES = ("2e-5", "5e-5", "2e-4")


class Method(NamedTuple):
    """A loss and the settings that are tried.

    Attributes:
        title: Its name in the table.
        command: The command that trains it.
        options: The options that select it.
        betas: Values of --beta that are tried; none for its own default.
    """

    title: str
    command: str
    options: tuple[str, ...]
    betas: tuple[str, ...]


METHODS = {
    "dpo": Method("DPO", "dpo", (), ("0.05", "0.2")),
    "ipo": Method("IPO", "dpo", ("--loss", "ipo"), ("0.05", "0.2")),
    "simpo": Method("SimPO", "dpo", ("--loss", "simpo"), ("2", "5")),
    "orpo": Method("ORPO", "dpo", ("--loss", "orpo"), ("0.1", "0.5")),
    "kto": Method("KTO", "kto", (), ("0.05", "0.2")),
}


class Setting(NamedTuple):
    """A method at a learning rate and a β."""

    method: str
    rate: str
    beta: str

    @property
    def name(self) -> str:
        """Name of its folder."""
        return "-".join(self)


def settings(names: list[str]) -> list[Setting]:
    """All settings of the methods."""
    return [
        Setting(name, rate, beta)
        for name in names
        for rate in RATES
        for beta in METHODS[name].betas
    ]


def write_halves(folder: Path, source: Path, pairs: int) -> None:
    """Write the training pairs, and the two halves of the held-out pairs."""
    write_rows(folder / "data" / "train.jsonl", read_rows(source / "train.jsonl")[:pairs])
    valid = read_rows(source / "valid.jsonl")
    write_rows(folder / "data" / "valid.jsonl", valid[::2])
    write_rows(folder / "report.jsonl", valid[1::2])


def accuracy(folder: Path, setting: Setting) -> dict[str, Any]:
    """Train a setting; what `eval` finds on the half that chooses."""
    method = METHODS[setting.method]
    where = ("--model", smollm2(), "--data", folder / "data", "--epochs", 1)
    given = ("--learning-rate", setting.rate, "--beta", setting.beta, "--samples", 0)
    trained = train(folder / setting.name, method.command, *where, *method.options, *given)
    few = ("--samples", 1, "-n", 1, "--max-completion-length", 1)
    return evaluate(trained, folder / f"choose-{setting.name}", *few)


def best(folder: Path, name: str) -> Setting:
    """The setting of a method whose implicit reward is right most often."""

    def rate(setting: Setting) -> float:
        found: float = accuracy(folder, setting)["preferences"]["reward_accuracy"]["value"]
        return found

    return max(settings([name]), key=rate)


def row(folder: Path, judge: Path, name: str) -> list[str]:
    """A line of the table."""
    chosen = best(folder, name)
    judged = ("--data", folder / "report.jsonl", "--reward-model", judge, *ANSWERS)
    found = evaluate(folder / chosen.name, folder / f"report-{chosen.name}", *judged)
    preferences, wins, divergence = found["preferences"], found["wins"], found["divergence"]
    return [
        METHODS[name].title,
        f"{chosen.rate}, {chosen.beta}",
        shown(preferences["reward_accuracy"]),
        shown(wins["rate"]),
        f"{preferences['chosen_change']['value']:+.1f}",
        shown_kl(divergence["per_answer"], divergence["standard_error"]),
        f"{wins['reference_length']:.0f} → {wins['length']:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--losses", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="training pairs")
    given, helpful = parser.parse_args(), study_folder("helpful")
    names = given.losses.split(",")
    if unknown := set(names) - METHODS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    if not is_finished(helpful / "judge"):
        parser.error("the judge is missing: python scripts/real/helpful.py --only judge")
    folder = study_folder(f"losses-{given.pairs}")
    if not (helpful / "texts.jsonl").is_file():
        write_data(helpful)
    write_halves(folder, helpful / "data-a", given.pairs)
    rows = [row(folder, helpful / "judge", name) for name in names]
    titles = ["", "learning rate, β", "held-out reward accuracy", "judged better than the start"]
    write_page(
        "when-to-use",
        "# Which loss, from measurements",
        f"SmolLM2-135M-Instruct, one pass over {given.pairs} pairs of HH-RLHF (helpful). Every "
        f"loss at the learning rates {', '.join(RATES)} and two values of β; the best by one half "
        "of the held-out pairs, measured on the other half. 95% intervals, over prompts. "
        "`python scripts/real/losses.py` measures it again.",
        table([*titles, "chosen, nats", "KL, nats per answer", "tokens"], rows),
    )


if __name__ == "__main__":
    main()
