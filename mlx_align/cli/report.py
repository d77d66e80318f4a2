"""`mlx-align report`: the page of a run, or a comparison of several."""

from __future__ import annotations

import textwrap
import webbrowser
from collections import Counter
from pathlib import Path
from typing import Any

import click

from mlx_align.cli.options import Command, config_options, given_options
from mlx_align.config import ReportConfig, make_config
from mlx_align.errors import ConfigError

COMPARISON_FILE = "comparison.html"
_WIDTH = 96


@click.command(cls=Command, short_help="Write the page of a run, or compare several.")
@config_options(ReportConfig)
def report(**options: Any) -> None:
    """Write a self-contained HTML page from one or more run folders.

    Training writes it too. For a run in progress, the page shows how far it is.
    """
    from mlx_align.report.page import render_comparison, render_run
    from mlx_align.system.atomic_io import check_can_create, write_text
    from mlx_align.tracking.run_dir import PAGE_FILE, read_run_record
    from mlx_align.tracking.verdict import compare_runs, verdict

    config = make_config(ReportConfig, given_options(options), None, "command line")
    if config.output is not None:
        check_can_create(config.output)
    folders = [Path(run).expanduser() for run in config.runs]
    names: list[str] = []
    runs = [read_run_record(folder) for folder in folders]
    if len(runs) == 1:
        text = render_run(runs[0])
        file = Path(config.output).expanduser() if config.output else folders[0] / PAGE_FILE
    else:
        counts = Counter(run.name for run in runs)
        # Runs of the same name are listed by their paths.
        names = [
            run.name if counts[run.name] == 1 else str(folder)
            for run, folder in zip(runs, folders, strict=True)
        ]
        text = render_comparison(runs, names)
        file = Path(config.output or COMPARISON_FILE).expanduser()
    try:
        write_text(file, text)
    except OSError as error:
        raise ConfigError(f"--output {file}: can't be written ({error.strerror})") from error
    for name, run in zip(names, runs, strict=False):
        click.echo(f"{name}: {verdict(run).kind}")
    if len(runs) > 1:
        click.echo("\n".join(textwrap.wrap(compare_runs(runs, names).sentence, _WIDTH)))
    click.echo(f"Wrote {file}")
    if config.open and not webbrowser.open(file.resolve().as_uri()):
        click.echo("Can't open a browser; open the file yourself.")
