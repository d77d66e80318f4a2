"""`mlx-align kto`: train on labelled answers."""

from __future__ import annotations

from typing import Any

import click

from mlx_align.cli.training import offline, run_training, training_options
from mlx_align.config import KtoConfig


@click.command(short_help="Train on good and bad answers that are no pairs (KTO).")
@training_options(KtoConfig)
def kto(config_file: str | None, resume: str | None, json: bool, **options: Any) -> None:
    """Train a model on labelled answers (prompt, completion, label) and write a run folder.

    Pairs will do too: they are taken apart into a good and a bad answer.
    --iters, --steps-per-* and --save-every count optimizer updates.
    """
    from mlx_align.train.unpaired import kto_task

    run_training(
        KtoConfig,
        "kto",
        offline(kto_task),
        options,
        config_file=config_file,
        resume=resume,
        json=json,
    )
