"""`mlx-align selftest`: check training on this machine's GPU, and write a file to send in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_align.cli.options import Command, config_options, echo_json, given_options, json_option
from mlx_align.config import SelftestConfig, make_config
from mlx_align.errors import SelftestError
from mlx_align.system.atomic_io import write_text

if TYPE_CHECKING:
    from mlx_align.selftest.report import Row


@click.command(cls=Command, short_help="Check training on this machine's GPU.")
@config_options(SelftestConfig)
@json_option("Print the content of the file instead of the table.")
def selftest(json: bool, **options: Any) -> None:
    """Check that training on this machine's GPU is right, and how much it needs.

    Compares losses and gradients with mlx's CPU backend, peak memory with the plan, and times
    updates and sampling, with random models and without network. Prints a table and writes a file.
    Exits with 1 if a check failed.
    """
    from mlx_align.selftest.report import has_gpu, run_selftest, verdict, write_report

    config = make_config(SelftestConfig, given_options(options), None, "command line")
    size = config.size or ("full" if has_gpu() else "small")
    file = Path(config.output).expanduser()
    write_text(file, "{}\n")  # a file that can't be written is an error now, not in eight minutes
    if not json:
        where = "the GPU" if has_gpu() else "the CPU: mlx has no GPU here"
        click.echo(f"Testing {where}; at most {config.minutes:g} minutes.")
    report = run_selftest(size, 60 * config.minutes, lambda row: None if json else _echo(row))
    write_report(report, file)
    if json:
        echo_json(report.as_json(), indent=2)
    else:
        click.echo(f"Wrote {file} after {report.seconds:.0f} seconds: machine, versions, numbers.")
        if report.passed:
            click.echo(f"{verdict(report.rows)} Please send the file in.")
    if not report.passed:
        raise SelftestError(f"{verdict(report.rows)} The numbers are in {file}; please send it in.")


def _echo(row: Row) -> None:
    mark = {True: "ok", False: "FAILED", None: ""}[row.passed]
    limit = f"  (limit {row.limit})" if row.limit else ""
    click.echo(f"{mark:<7} {row.check:<46} {row.result}{limit}")
