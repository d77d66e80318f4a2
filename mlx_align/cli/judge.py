"""`mlx-align judge`: preferences by a model, which is measured first."""

from __future__ import annotations

from typing import Any

import click

from mlx_align.cli.options import Command, config_options, given_options, json_option
from mlx_align.config import JudgeConfig, make_config
from mlx_align.system.json_text import to_json
from mlx_align.system.row_file import new_file


@click.command(cls=Command, short_help="Label pairs by a judge model, measured against people.")
@config_options(JudgeConfig)
@json_option("Print the report as JSON; all else goes to stderr.")
def judge(json: bool, **options: Any) -> None:
    """Compare answers by a judge and write preference pairs, for dpo or reward.

    The judge is a language model (--model, with --adapter-path for a run), a reward model, reward
    functions, or an endpoint. A language model is not sampled: its verdict is the probability of
    the letters A, B and C (a tie) as the next token, in both orders of the answers, averaged in
    log-odds.

    First it judges the pairs of --human, and says how far it agrees with people, with position
    bias, self-preference and calibration. It refuses to label if that is no better than a coin.

    All verdicts are kept in OUTPUT.verdicts.jsonl. To continue after an interruption, give the same
    command again.
    """
    from mlx_align.preferences.run_judge import describe_outcome, judge_data
    from mlx_align.system.console import Console

    config = make_config(JudgeConfig, given_options(options), None, "command line")
    output = new_file(config.output)
    console = Console(json)
    outcome = judge_data(config, output, console)
    if json:
        click.echo(to_json(outcome.as_json(), indent=2))
        return
    console.note(describe_outcome(outcome))
