"""`mlx-align report`: the page of a run, or of several side by side."""

from __future__ import annotations

import webbrowser
from collections import Counter
from pathlib import Path

import click

from mlx_align.errors import ConfigError

COMPARISON_FILE = "comparison.html"


@click.command(short_help="Write the page of a run, or compare several.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN ...]")
@click.option(
    "--output",
    metavar="FILE",
    help="Where to write it. [default: report.html in the run folder; of several runs, "
    f"{COMPARISON_FILE} here]",
)
@click.option("--open", "opens", is_flag=True, help="Show it in the browser.")
def report(runs: tuple[str, ...], output: str | None, opens: bool) -> None:
    """Write one HTML file, which needs no network, from what run folders hold.

    Training does so by itself. Of a run that is going on, it shows how far it is.
    """
    from mlx_align.files import write_text
    from mlx_align.report.charts import EXTRA, can_draw
    from mlx_align.report.page import PAGE_FILE, render_comparison, render_run
    from mlx_align.report.runs import read_run

    folders = [Path(run).expanduser() for run in runs]
    found = [read_run(folder) for folder in folders]
    if len(found) == 1:
        text = render_run(found[0])
        file = Path(output).expanduser() if output else folders[0] / PAGE_FILE
    else:
        counts = Counter(run.name for run in found)
        # Folders of one name are told apart by where they are.
        names = [
            run.name if counts[run.name] == 1 else str(folder)
            for run, folder in zip(found, folders, strict=True)
        ]
        text = render_comparison(found, names)
        file = Path(output or COMPARISON_FILE).expanduser()
    try:
        write_text(file, text)
    except OSError as error:
        raise ConfigError(f"--output {file}: can't be written ({error.strerror})") from error
    click.echo(f"Wrote {file}")
    if not can_draw():
        click.echo(f"Without charts: they are drawn by matplotlib. {EXTRA}")
    if opens and not webbrowser.open(file.resolve().as_uri()):
        click.echo("No browser could be opened; open the file yourself.")
