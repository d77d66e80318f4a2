"""`mlx-align sft`: train on demonstrations."""

from __future__ import annotations

from typing import Any

import click

from mlx_align.cli.training import offline, run_training, training_options
from mlx_align.config import SftConfig


@click.command(short_help="Train on demonstrations, to start preference training from.")
@training_options(SftConfig)
def sft(config_file: str | None, resume: str | None, json: bool, **options: Any) -> None:
    """Train a model on demonstrations and write a run folder that dpo --init-adapter takes.

    Prompts with completions, conversations, instructions or text; of pairs, the chosen answers.
    --iters, --steps-per-* and --save-every count optimizer updates.
    """
    from mlx_align.train.supervised import sft_task

    run = run_training(
        SftConfig,
        "sft",
        offline(sft_task),
        options,
        config_file=config_file,
        resume=resume,
        json=json,
    )
    if not json:
        click.echo(f"Prefer from here: mlx-align dpo … --init-adapter {run}")
