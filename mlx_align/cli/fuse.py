"""`mlx-align fuse`: one model out of base and adapter."""

from __future__ import annotations

import dataclasses
import json as json_module
from pathlib import Path

import click


@click.command(short_help="Make one model of a base and a run's adapter.")
@click.option("--model", required=True, metavar="PATH_OR_NAME", help="The base model.")
@click.option("--adapter-path", required=True, metavar="RUN", help="Run or adapter folder.")
@click.option("--output", required=True, metavar="PATH", help="Folder for the fused model.")
@click.option("--dequantize", is_flag=True, help="Leave no adapted layer quantised.")
@click.option("--json", is_flag=True, help="Print the report as JSON.")
def fuse(model: str, adapter_path: str, output: str, dequantize: bool, json: bool) -> None:
    """Fuse an adapter into its base model.

    On a quantised base, each layer's loss by quantising again is measured; a layer that would
    lose more than a tenth of what training changed stays dequantised.
    """
    from mlx_align.cli.display import Terminal
    from mlx_align.models.fusing import fuse_adapter
    from mlx_align.models.loading import open_model
    from mlx_align.shipped import shipped_or_given

    terminal = Terminal(json)
    folder = open_model(shipped_or_given(model, "model"))
    report = fuse_adapter(folder, Path(adapter_path), Path(output), dequantize=dequantize)
    if json:
        click.echo(json_module.dumps(dataclasses.asdict(report), indent=2))
        return
    quantized = [layer for layer in report.layers if layer.quantized]
    if report.layers:
        terminal.note(f"Fused {len(report.layers)} layers into {output}.")
    else:
        terminal.note(f"The run trained whole weights; the model with them is in {output}.")
    if quantized:
        kept = sum(layer.kept_quantized for layer in quantized)
        worst = max(layer.lost for layer in quantized)
        terminal.note(
            f"Quantised again: {kept}; left dequantised: {len(quantized) - kept}. Quantising again "
            f"would have lost up to {worst:.0%} of a layer's change."
        )
    terminal.note(
        f"Token log-probs: the adapter moved them by up to {report.logps_change:.3g} nats, fusing "
        f"by up to {report.logps_gap:.3g}.\nTalk to it: mlx_lm.chat --model {output}"
    )
