"""`mlx-align label`: people compare answers, in the terminal or the browser."""

from __future__ import annotations

from typing import Any

import click

from mlx_align.cli.options import Command, config_options, given_options
from mlx_align.config import LabelConfig, make_config


@click.command(cls=Command, short_help="Label pairs yourself, in the terminal or the browser.")
@config_options(LabelConfig)
def label(**options: Any) -> None:
    """Compare answers and write judgements, which dpo and reward read.

    PROMPTS_OR_ANSWERS has pairs, or prompts with lists of completions (as `mlx-align data sample`
    writes); their labels are not shown. Prompts alone are answered by --model first.

    Keys: 1 and 2 for the better answer, = for equal, ? if you can't tell, s to skip, u to undo, n
    for a note, c for a verdict by criterion, q to quit. Who wrote an answer isn't shown, and which
    one is first is drawn at random. Every verdict is written at once; to continue, give the same
    command again. Several people can label the same pairs: into one file or several, each with a
    --rater.

    --spot-check 0.1 takes the output of `mlx-align judge` and draws a tenth of its pairs for you to
    label, without the judge's answer; then it says how far you agree with the judge.
    """
    from mlx_align.preferences.records import JudgementLog
    from mlx_align.preferences.run_label import label_data, output_file
    from mlx_align.preferences.spot_check import report_spot_checks
    from mlx_align.system.console import Console

    config = make_config(LabelConfig, given_options(options), None, "command line")
    console = Console()
    output = output_file(config.output)

    def saved() -> str:
        count = len(JudgementLog(output).decided()) if output.is_file() else 0
        return f"{count:,} verdicts in {output}; the same command continues"

    try:
        label_data(config, console)
    except BaseException as error:
        if not isinstance(error, Exception):  # interrupted
            console.note(f"\n{saved()}")
        raise
    for check in report_spot_checks(JudgementLog(output).latest(), seed=config.seed):
        console.note(str(check))
        if check.warning:
            console.note(f"! {check.warning}.")
    console.note(
        f"{saved()}. Agreement of raters, and training:\n"
        f"  mlx-align data agreement {output}\n"
        f"  mlx-align dpo --model MODEL --data {output}"
    )
