"""`mlx-align data`: inspect data as training would read it, or create some."""

from __future__ import annotations

import dataclasses
import json as json_module
from typing import Any

import click

from mlx_align.cli.options import Command, Group, config_options, given_options, json_option
from mlx_align.cli.sample import sample
from mlx_align.config import CheckDataConfig, TrainConfig, make_config
from mlx_align.config.schema import require
from mlx_align.system.starter import resolve_starter


@click.group(
    cls=Group,
    invoke_without_command=True,
    sections={"Commands": ("check", "sample")},
    short_help="Check data before training; create some by rejection sampling.",
)
@click.pass_context
def data(context: click.Context) -> None:
    """Check data before training, or create some by rejection sampling."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


data.add_command(sample)


@data.command(cls=Command, short_help="Read, tokenise and describe preference data.")
@config_options(CheckDataConfig)
@json_option("Print as JSON.")
def check(json: bool, **options: Any) -> None:
    """Print the data report that `mlx-align dpo` prints before it trains."""
    from mlx_align.algorithms.dpo import read_pairs
    from mlx_align.data.statistics import render_statistics
    from mlx_align.models.loading import open_model
    from mlx_align.training.setup import prepare_data

    config = make_config(CheckDataConfig, given_options(options), None, "command line")
    require(config, "model", "data")
    assert config.model is not None
    assert config.data is not None
    training = TrainConfig(
        **{
            **dataclasses.asdict(config),
            "model": resolve_starter(config.model, "model"),
            "data": resolve_starter(config.data, "data"),
        }
    )
    assert training.model is not None
    facts = prepare_data(training, open_model(training.model), read_pairs).statistics
    click.echo(
        json_module.dumps(dataclasses.asdict(facts), indent=2) if json else render_statistics(facts)
    )
