"""DPO, IPO, SimPO, ORPO and KTO on the same people's preferences, each at its own best settings.

Conversations of data/real/hh-helpful of up to 200 tokens, as in helpful.py, whose judge is needed.
Every loss is trained for one pass over the same pairs: at the middle one of three learning rates,
at the higher one, and at the lower one if the higher one is worse; then at a second value of β. The
best setting by a third of the held-out pairs is measured on the others.

    python scripts/real/helpful.py --only judge
    python scripts/real/losses.py                # 2.5 hours of one core
    python scripts/real/losses.py --only dpo,ipo

Finished runs are not repeated, and interrupted ones continue. Writes docs/verified/when-to-use.md,
which has what was measured, here or before. On Linux LD_PRELOAD should name libopenblas.
"""

import argparse
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

from helpful import ANSWERS, write_data
from models import smollm2
from studies import (
    add_only,
    evaluate,
    is_finished,
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

STUDY = "when-to-use"
PAIRS = 180
RATES = ("5e-5", "2e-4", "5e-4")  # low, middle, high

FINDINGS = (
    "The intervals overlap: 180 pairs don't show which loss is the best, and none of the policies "
    "is surely judged better than the start. What the losses cost differs more:",
    "- **DPO** ranks held-out pairs as well as any, and leaves chosen answers as likely as they "
    "were. It is the default of `dpo`.\n"
    "- **KTO** ranks them as well without knowing which two answers belong together, and makes "
    "chosen ones more likely by 3 nats. It is for answers that were rated one by one; a pass over "
    "pairs takes more than twice the time of DPO's.\n"
    "- **ORPO** trains on the chosen answers too: it makes them more likely by 13 nats and answers "
    "as short as they are, drifts furthest, and ranks pairs no better than chance. It is for data "
    "whose chosen answers are what the model should write.\n"
    "- **IPO** and **SimPO** rank no better, and make chosen answers less likely, by 12 and 4 "
    "nats. Nothing here speaks for them.",
    "The rate of 5e-4, the highest of the sweep, is ten times the default. It moves the model by 4 "
    "to 11 nats per answer in one pass, and DPO ranks pairs no better than with the defaults, at "
    "0.2 nats, on twice the pairs ([preferences](helpful.md)). So the default stays low.",
)


class Method(NamedTuple):
    """A loss and the settings that are tried.

    Attributes:
        title: Its name in the table.
        command: The command that trains it.
        options: The options that select it.
        betas: Values of --beta: the one with which rates are compared, and another.
        ranking: The run's metric of how often its implicit reward ranks held-out completions right.
    """

    title: str
    command: str
    options: tuple[str, ...]
    betas: tuple[str, str]
    ranking: str = "rewards/accuracies"


METHODS = {
    "dpo": Method("DPO", "dpo", (), ("0.1", "0.03")),
    "ipo": Method("IPO", "dpo", ("--loss", "ipo"), ("0.1", "0.03")),
    "simpo": Method("SimPO", "dpo", ("--loss", "simpo"), ("2", "5")),
    "orpo": Method("ORPO", "dpo", ("--loss", "orpo"), ("0.1", "0.5")),
    "kto": Method("KTO", "kto", (), ("0.1", "0.03"), "rewards/auc"),
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


class Accuracy(NamedTuple):
    """How often the implicit reward of a setting is right on the part that chooses."""

    value: float
    standard_error: float

    @classmethod
    def of(cls, value: float, pairs: int) -> "Accuracy":
        """The share `value` of `pairs`."""
        return cls(value, math.sqrt(value * (1 - value) / pairs))


def write_data_of_losses(folder: Path, source: Path) -> None:
    """Write the training pairs, and the two parts of the held-out pairs."""
    write_rows(folder / "data" / "train.jsonl", read_rows(source / "train.jsonl")[:PAIRS])
    valid = read_rows(source / "valid.jsonl")
    write_rows(folder / "data" / "valid.jsonl", valid[::3])
    write_rows(folder / "report.jsonl", [row for at, row in enumerate(valid) if at % 3])


@cache
def accuracy(folder: Path, setting: Setting) -> Accuracy:
    """Train a setting, and measure it on the part that chooses."""
    method = METHODS[setting.method]
    where = ("--model", smollm2(), "--data", folder / "data", "--epochs", 1)
    given = ("--learning-rate", setting.rate, "--beta", setting.beta)
    at_end = ("--steps-per-eval", 0, "--samples", 0)
    trained = train(folder / setting.name, method.command, *where, *method.options, *given, *at_end)
    value = read_json(trained / "summary.json")["eval"][method.ranking]
    cells = [method.title, setting.rate, setting.beta, f"{value:.0%}"]
    record(STUDY, f"choose-{setting.name}", cells)
    return Accuracy.of(value, len(read_rows(folder / "data" / "valid.jsonl")))


def best(folder: Path, name: str) -> Setting:
    """The best setting of a method: the best rate, then the better β.

    A rate is better than a lower one unless it is right less often by more than a standard error:
    low rates rank the pairs about as well, but hardly change what the model says.
    """
    first, second = METHODS[name].betas

    def rises(lower: Setting, higher: Setting) -> bool:
        before, after = accuracy(folder, lower), accuracy(folder, higher)
        return after.value >= before.value - before.standard_error

    low, middle, high = (Setting(name, rate, first) for rate in RATES)
    found = high if rises(middle, high) else middle if rises(low, middle) else low
    other = found._replace(beta=second)
    return other if accuracy(folder, other).value > accuracy(folder, found).value else found


def report_row(folder: Path, judge: Path, chosen: Setting) -> list[str]:
    """What the best setting of a method is worth, on the part that reports."""
    judged = ("--data", folder / "report.jsonl", "--reward-model", judge, *ANSWERS)
    found = evaluate(folder / chosen.name, folder / f"report-{chosen.name}", *judged)
    preferences, wins, divergence = found["preferences"], found["wins"], found["divergence"]
    return [
        METHODS[chosen.method].title,
        f"{chosen.rate}, {chosen.beta}",
        shown(preferences["reward_accuracy"]),
        shown(wins["rate"]),
        f"{preferences['chosen_change']['value']:+.1f}",
        shown_kl(divergence["per_answer"], divergence["standard_error"]),
        f"{wins['reference_length']:.0f} → {wins['length']:.0f}",
    ]


def page() -> list[str]:
    """The parts of the page for what was measured."""
    rows = recorded(STUDY)
    titles = ["", "learning rate, β", "held-out reward accuracy", "judged better than the start"]
    titles += ["chosen, nats", "KL, nats per answer", "tokens"]
    return [
        "# Which loss, from measurements",
        f"SmolLM2-135M-Instruct, one pass over {PAIRS} pairs of HH-RLHF (helpful); the best "
        "setting of each loss, measured on 124 held-out pairs and 64 answers. 95% intervals, over "
        "prompts. `python scripts/real/losses.py` measures it again.",
        table(titles, [rows[name] for name in METHODS if name in rows]),
        *FINDINGS,
        "“Chosen” is the change of the log-prob of held-out chosen answers; “tokens”, the length "
        "of answers before and after.",
        "## The sweep",
        "On 63 other held-out pairs. Two rates, and a third if the higher one ranks worse by more "
        "than a standard error (about 6%); the best one again with another β. For KTO, which takes "
        "the completions one by one: how often a chosen one has the higher implicit reward, among "
        "all chosen and rejected ones.",
        table(
            ["", "learning rate", "β", "ranked right"],
            [cells for name, cells in rows.items() if name.startswith("choose-")],
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_only(parser, METHODS)
    given, helpful = parser.parse_args(), study_folder("helpful")
    if not is_finished(helpful / "judge"):
        parser.error("the judge is missing: python scripts/real/helpful.py --only judge")
    folder = study_folder("losses")
    if not (helpful / "texts.jsonl").is_file():
        write_data(helpful)
    write_data_of_losses(folder, helpful / "data-a")
    for name in given.only:
        record(STUDY, name, report_row(folder, helpful / "judge", best(folder, name)))
        write_page(STUDY, *page())


if __name__ == "__main__":
    main()
