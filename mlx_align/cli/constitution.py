"""`mlx-align constitution`: demonstrations and pairs from written principles."""

from __future__ import annotations

from typing import Any

import click

from mlx_align.cli.options import Command, config_options, given_options, json_option
from mlx_align.config import ConstitutionConfig, make_config
from mlx_align.system.json_text import to_json


@click.command(cls=Command, short_help="Revise and compare answers by principles, without labels.")
@config_options(ConstitutionConfig)
@json_option("Print the report as JSON; all else goes to stderr.")
def constitution(json: bool, **options: Any) -> None:
    """Let a model revise its answers by principles, and a judge compare them by principles.

    For each prompt the model answers, criticises its answer by a principle that is drawn at random,
    and rewrites it. The folder --output then has revisions.jsonl, demonstrations for sft. Then
    the answers and the revision of each prompt are compared, each two by a principle drawn at
    random, as mlx-align judge does; pairs.jsonl has the preferences, for dpo and reward.

    steps.jsonl and verdicts.jsonl keep every step; to continue after an interruption, give the same
    command again. samples.md has prompts with every step to read. (Constitutional AI, Bai et al.
    2022.)
    """
    from mlx_align.preferences.run_constitution import PAIRS, REVISIONS, SAMPLES, apply_constitution
    from mlx_align.preferences.run_judge import describe_counts
    from mlx_align.system.console import Console

    config = make_config(ConstitutionConfig, given_options(options), None, "command line")
    console = Console(json)
    outcome = apply_constitution(config, console)
    if json:
        click.echo(to_json(outcome.as_json(), indent=2))
        return
    report, folder = outcome.revisions, outcome.folder
    if config.rounds:
        before, after = report.words
        console.note(
            f"{report.changed:,} of {report.revised:,} revised answers changed "
            f"({report.share_changed:.0%}); words per answer: {before:.0f}, then {after:.0f}"
        )
        for name, (count, share) in report.by_principle.items():
            console.note(f"  {name}: {count:,} revised, {share:.0%} changed")
        problems = ", ".join(f"{count:,} {why}" for why, count in report.problems.items())
        if problems:
            console.note(f"! Without a usable revision: {problems}")
        console.note(f"Wrote {outcome.demonstrations:,} demonstrations to {folder / REVISIONS}")
    if outcome.pairs is not None:
        counts = describe_counts(outcome.pairs)
        if outcome.pairs.rows:
            console.note(f"Wrote {len(outcome.pairs.rows):,} pairs to {folder / PAIRS}{counts}")
        else:
            console.note(f"! No pair got a label{counts}")
    if config.samples and (folder / SAMPLES).exists():
        console.note(f"Read some before you train: {folder / SAMPLES}")
