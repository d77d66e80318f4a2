"""`mlx-align data`: look at data as training would see it, and make some."""

from __future__ import annotations

import dataclasses
import json as json_module

import click

from mlx_align.cli.options import given
from mlx_align.cli.sample import sample
from mlx_align.config import TrainConfig
from mlx_align.errors import ConfigError
from mlx_align.settings import resolve
from mlx_align.shipped import shipped_or_given


@click.group(short_help="Look at data before training; make some by rejection sampling.")
def data() -> None:
    """Look at data before training, or make some by rejection sampling."""


data.add_command(sample)


@data.command(short_help="Read, tokenise and describe preference data; train nothing.")
@click.option("--model", metavar="PATH_OR_NAME", help="Whose tokenizer to use.")
@click.option("--data", "data_name", metavar="PATH_OR_NAME", help="The data.")
@click.option("--format", metavar="TEXT", help="Force a data format.")
@click.option("--max-seq-length", type=int, metavar="N", help="As in training. [default: 1024]")
@click.option("--max-completion-length", type=int, metavar="N", help="As in training.")
@click.option("--json", is_flag=True, help="Print as JSON.")
def check(
    model: str | None,
    data_name: str | None,
    format: str | None,
    max_seq_length: int | None,
    max_completion_length: int | None,
    json: bool,
) -> None:
    """Print the screen that `mlx-align dpo` prints before it trains."""
    from mlx_align.data.checks import render_facts
    from mlx_align.models.loading import open_model
    from mlx_align.train.preference import read_pairs
    from mlx_align.train.setup import prepare_data

    options = {
        "model": model,
        "data": data_name,
        "format": format,
        "max_seq_length": max_seq_length,
        "max_completion_length": max_completion_length,
    }
    config = resolve(TrainConfig, given(options))
    if config.model is None or config.data is None:
        missing = "--model" if config.model is None else "--data"
        raise ConfigError(f"{missing} is missing; name a folder, a file or a hub name")
    config = dataclasses.replace(
        config,
        model=shipped_or_given(config.model, "model"),
        data=shipped_or_given(config.data, "data"),
    )
    assert config.model is not None
    facts = prepare_data(config, open_model(config.model), read_pairs).facts
    click.echo(
        json_module.dumps(dataclasses.asdict(facts), indent=2) if json else render_facts(facts)
    )
