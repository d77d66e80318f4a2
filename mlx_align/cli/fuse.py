"""`mlx-align fuse`: merge a run's adapter into its base model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import click

from mlx_align.cli.options import (
    Command,
    config_options,
    echo_json,
    json_option,
    options_of_run,
    run_argument,
)
from mlx_align.config import FuseConfig, make_config


@click.command(cls=Command, short_help="Merge a run's adapter into its base model.")
@run_argument
@config_options(FuseConfig)
@json_option("Print the report as JSON.")
def fuse(json: bool, **options: Any) -> None:
    """Merge an adapter into its base model, as one model folder.

    The loss of storing each layer as the base does (in 4 bits, or in bfloat16) is measured. A layer
    that would lose more than a twentieth of what training changed is stored in 8 bits, 16 bits or
    float32, whichever is the first to keep it.
    """
    from mlx_align import commands
    from mlx_align.models.fuse import MAX_LOST_CHANGE
    from mlx_align.system.console import Console

    console = Console(json)
    config = make_config(FuseConfig, options_of_run(options, needs_run=True), None, "command line")
    report = commands.fuse(config)
    if json:
        echo_json(dataclasses.asdict(report), indent=2)
        return
    what = "layers" if report.fine_tune_type != "full" else "fully trained tensors"
    console.note(
        f"Fused {len(report.layers)} {what} into {report.output}: "
        f"{report.bytes_before / 1e6:,.1f} MB before, {report.bytes_after / 1e6:,.1f} MB after."
    )
    finer = [layer for layer in report.layers if layer.lost > MAX_LOST_CHANGE]
    stored = Counter(layer.stored for layer in report.layers)
    if finer or any(layer.quantized for layer in report.layers):
        ways = ", ".join(f"{count} in {form}" for form, count in stored.items())
        console.note(f"Stored: {ways}.")
    if finer:
        worst = max(layer.lost for layer in finer)
        console.note(
            f"! Stored as in the base model, {len(finer)} of them would have lost up to "
            f"{worst:.0%} of their change to rounding. To keep the base's size, use the base with "
            f"its adapter: mlx_lm.chat --model {config.model} --adapter-path {config.adapter_path}"
        )
    console.note(
        f"Token log-probs: changed by up to {report.logps_change:.3g} nats by the adapter; fusing "
        f"loses {report.logps_lost:.1%} of that (up to {report.logps_gap:.2g} nats).\n"
        f"Chat with it: mlx_lm.chat --model {report.output}"
    )
