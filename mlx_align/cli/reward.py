"""`mlx-align reward`: train a reward model; `mlx-align reward export`: hand it to transformers."""

from __future__ import annotations

import dataclasses
import json as json_module
from pathlib import Path
from typing import Any

import click

from mlx_align.cli.options import given
from mlx_align.cli.training import offline, run_training, training_options
from mlx_align.config import RewardConfig
from mlx_align.errors import ConfigError
from mlx_align.settings import flag_of


@click.group(
    invoke_without_command=True,
    short_help="Train a reward model on preferences, or export one.",
    subcommand_metavar="| export …",
)
@training_options(RewardConfig)
@click.pass_context
def reward(
    context: click.Context,
    /,
    config_file: str | None,
    resume: str | None,
    json: bool,
    **options: Any,
) -> None:
    """Train a reward model on pairs or ranked lists and write a run folder.

    The model's vocabulary head gives way to one linear map to a score, read at the end token of
    an answer. At its end a run says how good the model is on held-out data, and how much of that
    is length.

    --iters, --steps-per-* and --save-every count optimizer updates.
    """
    if context.invoked_subcommand is not None:
        named = [flag_of(name) for name in given(options)]
        if named or config_file is not None or resume is not None or json:
            first = named[0] if named else "--config, --resume or --json"
            raise ConfigError(
                f"{first} before {context.invoked_subcommand}: an option of training; put the "
                f"options of {context.invoked_subcommand} behind it"
            )
        return
    from mlx_align.train.reward import reward_task

    run_training(
        RewardConfig,
        "reward",
        offline(reward_task),
        options,
        config_file=config_file,
        resume=resume,
        json=json,
        invitation="Score completions with it",
    )


@reward.command(short_help="Write a trained reward model as transformers loads it.")
@click.option("--model", required=True, metavar="PATH_OR_NAME", help="The base model.")
@click.option("--adapter-path", required=True, metavar="RUN", help="Run folder of reward.")
@click.option("--output", required=True, metavar="PATH", help="Folder to write.")
@click.option("--json", is_flag=True, help="Print the report as JSON.")
def export(model: str, adapter_path: str, output: str, json: bool) -> None:
    """Write base, adapter and head as one *ForSequenceClassification folder.

    transformers loads it, and vLLM reads that layout too. Quantised layers are written dequantised;
    of several members, the mean.
    """
    from mlx_align.cli.display import Terminal
    from mlx_align.inference.export import export_reward_model
    from mlx_align.models.loading import open_model
    from mlx_align.shipped import shipped_or_given

    terminal = Terminal(json)
    folder = open_model(shipped_or_given(model, "model"))
    report = export_reward_model(folder, Path(adapter_path), Path(output))
    if json:
        click.echo(json_module.dumps(dataclasses.asdict(report), indent=2))
        return
    terminal.note(
        f"{report.architecture} written to {output}; its scores on random tokens differ from the "
        f"run's by at most {report.score_gap:.2g}.\n"
        f"{report.reads_at}\n"
        f"Load it: AutoModelForSequenceClassification.from_pretrained({output!r})"
    )
