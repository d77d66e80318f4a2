"""`mlx-align export`: write a run's adapter for other libraries."""

from __future__ import annotations

from pathlib import Path
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
from mlx_align.config import AdapterExportConfig, make_config
from mlx_align.system.starter import resolve_starter


@click.command(cls=Command, short_help="Write a run's adapter for transformers (PEFT).")
@run_argument
@config_options(AdapterExportConfig)
@json_option("Print the report as JSON.")
def export(json: bool, **options: Any) -> None:
    """Write the adapter of a run as PEFT does, for transformers, vLLM and others.

    LoRA and DoRA adapters of linear layers. Reward models are exported by `mlx-align reward
    export`; `mlx-align fuse` makes one model of base and adapter.
    """
    from mlx_align.inference.export import export_peft_adapter
    from mlx_align.inference.trained_run import default_output
    from mlx_align.models.loading import open_model
    from mlx_align.system.console import Console

    console = Console(json)
    config = make_config(
        AdapterExportConfig, options_of_run(options, needs_run=True), None, "command line"
    )
    folder = open_model(resolve_starter(config.model, "model"))
    output = config.output or str(default_output(config.adapter_path, config.format))
    layers = export_peft_adapter(folder, Path(config.adapter_path), Path(output))
    if json:
        report = {"output": output, "format": config.format, "layers": layers}
        echo_json(report, indent=2)
        return
    console.note(
        f"Wrote {layers} adapted layers in PEFT's format to {output}.\n"
        f"Load it: PeftModel.from_pretrained(model, {output!r})"
    )
