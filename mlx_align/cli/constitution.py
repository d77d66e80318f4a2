"""`mlx-align constitution`: demonstrations and pairs from written principles."""

from __future__ import annotations

from typing import Any

import click

from mlx_align.cli.options import Command, config_options, given_options, json_option
from mlx_align.config import ConstitutionConfig, make_config
from mlx_align.system.json_text import to_json


@click.command(cls=Command, short_help="Revise and compare answers by principles, without labels.")
@config_options(ConstitutionConfig)
@json_option("Print the report as JSON; all else goes to stderr.")
def constitution(json: bool, **options: Any) -> None:
    """Let a model revise its answers by principles, and a judge compare them by principles.

    For each prompt the model answers, criticises its answer by a principle that is drawn at random,
    and rewrites it. The folder --output then has revisions.jsonl, demonstrations for sft. Then
    the answers and the revision of each prompt are compared, each two by a principle drawn at
    random, as mlx-align judge does; pairs.jsonl has the preferences, for dpo and reward.

    steps.jsonl and verdicts.jsonl keep every step; to continue after an interruption, give the same
    command again. samples.md has prompts with every step to read. (Constitutional AI, Bai et al.
    2022.)
    """
    from mlx_align.preferences.run_constitution import apply_constitution, describe_outcome
    from mlx_align.system.console import Console

    config = make_config(ConstitutionConfig, given_options(options), None, "command line")
    console = Console(json)
    outcome = apply_constitution(config, console)
    if json:
        click.echo(to_json(outcome.as_json(), indent=2))
        return
    for line in describe_outcome(outcome, config):
        console.note(line)
