"""`mlx-align fuse`: merge a run's adapter into its base model."""

from __future__ import annotations

import dataclasses
import json as json_module
from pathlib import Path
from typing import Any

import click

from mlx_align.cli.options import Command, config_options, given, json_option
from mlx_align.config import FuseConfig, make_config
from mlx_align.system.starter import resolve_starter


@click.command(cls=Command, short_help="Merge a run's adapter into its base model.")
@config_options(FuseConfig)
@json_option("Print the report as JSON.")
def fuse(json: bool, **options: Any) -> None:
    """Merge an adapter into its base model, as one model folder.

    On a quantised base, the error of quantising each layer again is measured. A layer that would
    lose more than a tenth of what training changed stays dequantised.
    """
    from mlx_align.cli.console import Console
    from mlx_align.models.fuse import fuse_adapter
    from mlx_align.models.loading import open_model

    console = Console(json)
    config = make_config(FuseConfig, given(options), None, "command line")
    folder = open_model(resolve_starter(config.model, "model"))
    output = Path(config.output)
    report = fuse_adapter(folder, Path(config.adapter_path), output, dequantize=config.dequantize)
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
