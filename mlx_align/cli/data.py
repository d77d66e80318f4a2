"""`mlx-align data`: inspect data as training would read it, convert it, or create some."""

from __future__ import annotations

import dataclasses
import textwrap
from functools import partial
from typing import Any

import click

from mlx_align.cli.options import (
    Command,
    Group,
    config_options,
    echo_json,
    given_options,
    json_option,
)
from mlx_align.cli.sample import sample
from mlx_align.cli.select import select
from mlx_align.config import (
    AgreementConfig,
    CheckDataConfig,
    ConvertDataConfig,
    make_config,
)
from mlx_align.config.schema import fingerprint_options, require
from mlx_align.errors import ConfigError
from mlx_align.system.json_text import to_json
from mlx_align.system.row_file import hash_rows, new_file, open_rows
from mlx_align.system.starter import resolve_starter

_WIDTH = 96
ROWS_PER_COMMIT = 1000


@click.group(
    cls=Group,
    invoke_without_command=True,
    sections={"Commands": ("check", "agreement", "convert", "sample", "select")},
    short_help="Check or convert data before training; create some by rejection sampling.",
)
@click.pass_context
def data(context: click.Context) -> None:
    """Check or convert data before training, or create some by rejection sampling."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


data.add_command(sample)
data.add_command(select)


@data.command(cls=Command, short_help="Describe data, and say which commands can use it.")
@click.argument("file", required=False, type=click.Path(), metavar="[FILE]")
@config_options(CheckDataConfig)
@json_option("Print as JSON.")
def check(file: str | None, json: bool, **options: Any) -> None:
    """Say how data is read, which training commands can use it, and what is suspicious.

    FILE is a data file, a folder or a hub name, like --data. With --model, prints the lengths in
    tokens and the rows that would be dropped, as training does.

    Looks for near duplicates, prompts that are in train and valid, conflicting labels, HTML and
    template tokens in the text, and outliers of language and length; says how often the longer and
    the more formatted completion is chosen. Of judgements by raters, shows how far they agree.
    """
    from mlx_align.data.quality import render_quality
    from mlx_align.data.uses import render_uses
    from mlx_align.preferences.raters import render_agreement, report_agreement
    from mlx_align.preferences.run_agreement import read_any_judgements
    from mlx_align.training.data_check import check_dataset

    given = given_options(options)
    if file is not None:
        if "data" in given:
            raise ConfigError(f"{file} and --data {given['data']}: give one of them")
        given["data"] = file
    config = make_config(CheckDataConfig, given, None, "command line")
    require(config, "data")
    assert config.data is not None
    model = None if config.model is None else resolve_starter(config.model, "model")
    found = check_dataset(config, resolve_starter(config.data, "data"), model)
    judged = read_any_judgements(found.source)
    raters = report_agreement(judged) if judged else None
    if json:
        content = {
            **found.facts,
            "quality": dataclasses.asdict(found.quality),
            "uses": {use.command: dataclasses.asdict(use) for use in found.uses},
            "raters": None if raters is None else dataclasses.asdict(raters),
        }
        echo_json(content, indent=2)
        return
    click.echo(found.text)
    lines = render_quality(found.quality).splitlines()
    lines += [] if raters is None else render_agreement(raters).splitlines()
    for line in (*lines, *render_uses(found.uses).splitlines()):
        indent = " " * (len(line) - len(line.lstrip()))
        wrapped = textwrap.wrap(line, _WIDTH, subsequent_indent=indent + "    ")
        click.echo("\n".join(wrapped))


@data.command(cls=Command, short_help="Write data of any format as plain rows of messages.")
@config_options(ConvertDataConfig)
@json_option("Print a summary as JSON.")
def convert(json: bool, **options: Any) -> None:
    """Write any data that training reads as JSONL: prompt, chosen, rejected, or what it holds.

    Conversations become messages; other text stays text, unless --as-messages is given. Ties,
    strength and votes become soft labels and margins as the options say. Columns that training
    doesn't read are left out, except those of prompts, which reward functions may need. An
    interrupted command keeps its rows, and --resume continues.
    """
    from mlx_align.data.columns import configure_data, suggest_columns
    from mlx_align.data.convert import as_messages, plain_row, read_any, unique_groups

    config = make_config(ConvertDataConfig, given_options(options), None, "command line")
    if len(config.input) != 1:
        raise ConfigError(f"convert takes one input, found {len(config.input)}; convert each alone")
    target = new_file(config.output, resume=config.resume)
    source = configure_data(resolve_starter(config.input[0], "data"), config)
    groups, report = read_any(source, config.split, config.format)
    if config.as_messages:
        groups = [as_messages(group) for group in groups]
    kept = unique_groups(groups) if config.dedup else groups
    duplicates = len(groups) - len(kept)
    kept = kept[: config.max_rows]
    inputs = fingerprint_options(config, {"input": hash_rows(map(plain_row, kept))})
    with open_rows(
        target, inputs, resume=config.resume, total=len(kept), note=partial(click.echo, err=True)
    ) as written:
        for done, group in enumerate(kept[written.done :], written.done + 1):
            written.write(plain_row(group))
            if done % ROWS_PER_COMMIT == 0:
                written.commit(done)
    if json:
        summary = {
            "output": str(target),
            "format": report.format,
            "rows": report.rows,
            "written": len(kept),
            "dropped": dict(report.dropped),
            "duplicates": duplicates,
        }
        echo_json(summary, indent=2)
        return
    click.echo(str(report))
    if kept and not kept[0].completions:
        mapping = suggest_columns(source.rows(config.split)[0])
        if mapping:
            click.echo(f"The answers are not read as such; to read them: {mapping}")
    removed = f"; {duplicates:,} duplicates left out" if duplicates else ""
    click.echo(f"Wrote {len(kept):,} rows to {target}{removed}")


@data.command(cls=Command, short_help="How far raters agree; join their judgements.")
@config_options(AgreementConfig)
@json_option("Print as JSON.")
def agreement(json: bool, **options: Any) -> None:
    """Report on the raters of files that `mlx-align label` wrote, and join the files.

    Shows Krippendorff's alpha, Fleiss' and Cohen's kappa; for each rater the agreement with the
    rest, the reliability, the share of preferences for the first shown and the longer answer, and
    the time per judgement. With --output, writes the pairs with soft labels: the probability, by
    the model of Dawid and Skene, that the chosen answer is better.
    """
    from mlx_align.preferences.raters import render_agreement
    from mlx_align.preferences.run_agreement import measure_agreement

    config = make_config(AgreementConfig, given_options(options), None, "command line")
    outcome = measure_agreement(config)
    if json:
        click.echo(to_json(outcome.as_json(), indent=2))
        return
    for line in render_agreement(outcome.report).splitlines():
        click.echo("\n".join(textwrap.wrap(line, _WIDTH, subsequent_indent="    ")))
    if outcome.output is not None:
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in outcome.dropped.items())
        note = f" (left out: {left_out})" if left_out else ""
        click.echo(f"Wrote {outcome.written:,} pairs to {outcome.output}{note}")
