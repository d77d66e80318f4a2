"""`mlx-align improve`: rounds of sampling, comparing, training and evaluation."""

from __future__ import annotations

from typing import Any

import click

from mlx_align.cli.options import Command, config_options, given_options, json_option
from mlx_align.config import ImproveConfig, make_config
from mlx_align.system.json_text import to_json


@click.command(cls=Command, short_help="Sample, judge, train and evaluate in rounds: iterated DPO.")
@config_options(ImproveConfig)
@json_option("Print the summary as JSON; all else goes to stderr.")
def improve(json: bool, **options: Any) -> None:
    """Improve a policy in rounds: sample answers, judge them, train by DPO, evaluate.

    Each round starts from the policy of the last one, which is its reference too, and has its own
    folder in --output, with answers, judged pairs and the run folder. After each round a held-out
    judge compares the new policy with the start on held-out prompts. If it prefers the new one no
    more than the best before, the guard stops.

    With --labels-by people, a round waits for labels.jsonl. To continue, also after an
    interruption, give the same command again.
    """
    from mlx_align.improver import Improver, WaitingForLabels
    from mlx_align.system.console import Console

    config = make_config(ImproveConfig, given_options(options), None, "command line")
    console = Console(json)
    try:
        outcome = Improver(config, console).run()
    except WaitingForLabels as waiting:
        console.note(str(waiting))
        if json:
            click.echo(to_json({"waiting": str(waiting)}))
        return
    if json:
        click.echo(to_json(outcome.as_json(), indent=2))
        return
    console.note(f"\nStopped: {outcome.stopped}.")
    if outcome.best is None:
        console.note("! No round beats the start, according to the held-out judge.")
        return
    rate = outcome.best.win_rate
    if rate.low <= 0.5:
        console.note(
            f"! Its win rate ({rate.low:.0%} to {rate.high:.0%}) can't be told apart from ½: use "
            "more prompts to hold out (--eval-prompts) before you believe it."
        )
    console.note(
        f"Best round: {outcome.best.number}. Chat with it in stock mlx-lm:\n"
        f"  mlx_lm.chat --model {config.model} --adapter-path {outcome.best.run}"
    )
