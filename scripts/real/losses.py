"""DPO, IPO, SimPO, ORPO and KTO on the same people's preferences, each at its own best settings.

Conversations of data/real/hh-helpful of up to 200 tokens, as in helpful.py, whose judge is needed.
Every loss is trained for one pass over the same pairs: at rising learning rates, as long as its
implicit reward is right more often on a third of the held-out pairs, and then at a second value of
β. The best setting is measured on the other held-out pairs.

    python scripts/real/helpful.py --only judge
    python scripts/real/losses.py                # 2 hours of one core
    python scripts/real/losses.py --losses dpo,ipo

Finished runs are not repeated, and interrupted ones continue. Writes docs/verified/when-to-use.md.
On Linux LD_PRELOAD should name libopenblas.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

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
RATES = ("5e-5", "2e-4", "5e-4")


class Method(NamedTuple):
    """A loss and the settings that are tried.

    Attributes:
        title: Its name in the table.
        command: The command that trains it.
        options: The options that select it.
        betas: Values of --beta: the one with which rates are compared, and another.
    """

    title: str
    command: str
    options: tuple[str, ...]
    betas: tuple[str, str]


METHODS = {
    "dpo": Method("DPO", "dpo", (), ("0.1", "0.03")),
    "ipo": Method("IPO", "dpo", ("--loss", "ipo"), ("0.1", "0.03")),
    "simpo": Method("SimPO", "dpo", ("--loss", "simpo"), ("2", "5")),
    "orpo": Method("ORPO", "dpo", ("--loss", "orpo"), ("0.1", "0.5")),
    "kto": Method("KTO", "kto", (), ("0.1", "0.03")),
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


def write_data_of_losses(folder: Path, source: Path, pairs: int) -> None:
    """Write the training pairs, and the two parts of the held-out pairs."""
    write_rows(folder / "data" / "train.jsonl", read_rows(source / "train.jsonl")[:pairs])
    valid = read_rows(source / "valid.jsonl")
    write_rows(folder / "data" / "valid.jsonl", valid[::3])
    write_rows(folder / "report.jsonl", [row for at, row in enumerate(valid) if at % 3])


def accuracy(folder: Path, setting: Setting) -> float:
    """Train a setting; how often its implicit reward is right on the part that chooses."""
    method = METHODS[setting.method]
    where = ("--model", smollm2(), "--data", folder / "data", "--epochs", 1)
    given = ("--learning-rate", setting.rate, "--beta", setting.beta, "--steps-per-eval", 0)
    trained = train(folder / setting.name, method.command, *where, *method.options, *given)
    few = ("--samples", 1, "-n", 1, "--max-completion-length", 1)
    found = evaluate(trained, folder / f"choose-{setting.name}", *few)
    right: float = found["preferences"]["reward_accuracy"]["value"]
    return right


def best(folder: Path, name: str) -> Setting:
    """The setting of a method that is right most often: the best rate, then the better β."""
    first, second = METHODS[name].betas
    found = Setting(name, RATES[0], first)
    for rate in RATES[1:]:
        higher = Setting(name, rate, first)
        if accuracy(folder, higher) <= accuracy(folder, found):
            break
        found = higher
    other = Setting(name, found.rate, second)
    return other if accuracy(folder, other) > accuracy(folder, found) else found


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
    write_data_of_losses(folder, helpful / "data-a", given.pairs)
    rows = [row(folder, helpful / "judge", name) for name in names]
    titles = ["", "learning rate, β", "held-out reward accuracy", "judged better than the start"]
    write_page(
        "when-to-use",
        "# Which loss, from measurements",
        f"SmolLM2-135M-Instruct, one pass over {given.pairs} pairs of HH-RLHF (helpful). Every "
        f"loss at rising learning rates ({', '.join(RATES)}), as long as a third of the held-out "
        "pairs is ranked better, and then at a second value of β; the best is measured on the "
        "other held-out pairs. 95% intervals, over prompts. "
        "`python scripts/real/losses.py` measures it again.",
        table([*titles, "chosen, nats", "KL, nats per answer", "tokens"], rows),
    )


if __name__ == "__main__":
    main()
