"""`mlx-align dpo`: train on preference pairs."""

from __future__ import annotations

from typing import Any

import click

from mlx_align.cli.training import offline, run_training, training_options
from mlx_align.config import DpoConfig


@click.command(short_help="Train on preference pairs (DPO and its family).")
@training_options(DpoConfig)
def dpo(config_file: str | None, resume: str | None, json: bool, **options: Any) -> None:
    """Train a model on preference pairs and write a run folder that mlx-lm loads.

    Without --model, --data and -c, trains the small starter model that comes with the package.
    --iters, --steps-per-* and --save-every count optimizer updates.
    """
    from mlx_align.train.preference import dpo_task

    run_training(
        DpoConfig,
        "dpo",
        offline(dpo_task),
        options,
        config_file=config_file,
        resume=resume,
        json=json,
        starter="starter.yaml",
    )
