"""`mlx-align eval`: a run measured against its reference."""

from __future__ import annotations

from typing import Any

import click

from mlx_align.cli.options import (
    Command,
    config_options,
    echo_json,
    json_option,
    options_of_run,
    run_argument,
)
from mlx_align.config import EvalConfig, make_config

# Prompts of which an answer is printed; --output keeps all.
SHOWN_ANSWERS = 2


@click.command("eval", cls=Command, short_help="Measure a run against its reference.")
@run_argument
@config_options(EvalConfig)
@json_option("Print the numbers as JSON; all else goes to stderr.")
def evaluate(json: bool, **options: Any) -> None:
    """Measure a run against its reference: the model or adapter that it started from.

    Reports held-out preference accuracy and margins, and the KL from the reference on the run's
    own completions. With --reward-model: the win rate over the reference, also at equal length,
    and the gain of best-of-n. With --perplexity-data: what the run cost on other text. Both models
    complete the same prompts at temperature 1. With --output, an interrupted evaluation keeps its
    finished parts, and --resume continues.
    """
    from mlx_align import commands
    from mlx_align.evaluation.render import render_evaluation
    from mlx_align.system.console import Console

    console = Console(json)
    config = make_config(EvalConfig, options_of_run(options, needs_run=True), None, "command line")
    found = commands.evaluate(config, console)
    if json:
        echo_json(found.content, indent=2)
        return
    console.note(render_evaluation(found.evaluation))
    for row in found.answers[:SHOWN_ANSWERS]:
        sides = [name for name in ("reference", "policy") if name in row]
        console.sample(row["prompt"], {name: row[name][0]["text"] for name in sides})
    if found.folder is not None:
        evaluation, answers = commands.EVALUATION_FILE, commands.ANSWERS_FILE
        console.note(f"\nWrote {found.folder / evaluation} and {found.folder / answers}")
