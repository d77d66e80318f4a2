"""`mlx-align fuse`: merge a run's adapter into its base model."""

from __future__ import annotations

import dataclasses
import json as json_module
from typing import Any

import click

from mlx_align.cli.options import Command, config_options, given, json_option
from mlx_align.config import FuseConfig, make_config


@click.command(cls=Command, short_help="Merge a run's adapter into its base model.")
@config_options(FuseConfig)
@json_option("Print the report as JSON.")
def fuse(json: bool, **options: Any) -> None:
    """Merge an adapter into its base model, as one model folder.

    On a quantised base, the error of quantising each layer again is measured. A layer that would
    lose more than a tenth of what training changed stays dequantised.
    """
    from mlx_align import commands
    from mlx_align.system.console import Console

    console = Console(json)
    config = make_config(FuseConfig, given(options), None, "command line")
    report = commands.fuse(config)
    if json:
        click.echo(json_module.dumps(dataclasses.asdict(report), indent=2))
        return
    quantized = [layer for layer in report.layers if layer.quantized]
    if report.layers:
        console.note(f"Fused {len(report.layers)} layers into {config.output}.")
    else:
        console.note(f"The run trained full weights; the model with them is in {config.output}.")
    if quantized:
        kept = sum(layer.kept_quantized for layer in quantized)
        worst = max(layer.lost for layer in quantized)
        console.note(
            f"Quantised again: {kept}; left dequantised: {len(quantized) - kept}. Quantising again "
            f"would have lost up to {worst:.0%} of a layer's change."
        )
    console.note(
        f"Token log-probs: changed by up to {report.logps_change:.3g} nats by the adapter, and by "
        f"up to {report.logps_gap:.3g} by fusing.\n"
        f"Chat with it: mlx_lm.chat --model {config.output}"
    )
