"""`mlx-align score`: what a reward model thinks of the completions in a file."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from mlx_align.cli.files import free_file
from mlx_align.errors import DataError

if TYPE_CHECKING:
    from mlx_align.data.scorable import Scorable, ScorableRows
    from mlx_align.inference.reward_model import RewardModel
    from mlx_align.inference.scored import Scored

# Rows in memory at a time; those of like length run together, so a few are too few.
WINDOW = 64
SCORES, MEMBERS, NOTE = "model_scores", "model_scores_members", "model_scores_note"


@click.command(short_help="Score completions with a reward model.")
@click.option(
    "--model", required=True, metavar="PATH_OR_NAME", help="A run's base model, or a classifier."
)
@click.option("--adapter-path", metavar="RUN", help="Run folder of mlx-align reward.")
@click.option("--data", required=True, metavar="PATH_OR_NAME", help="What to score.")
@click.option("--split", metavar="TEXT", default="train", show_default=True, help="Of a folder.")
@click.option("--output", required=True, metavar="FILE", help="JSONL file to write.")
@click.option("--format", metavar="TEXT", help="Force a data format.")
@click.option(
    "--combine",
    type=click.Choice(["mean", "min", "mean-variance"]),
    default="mean",
    show_default=True,
    help="How several members' scores become one.",
)
@click.option(
    "--variance-penalty", type=float, metavar="X", help="Of mean-variance: mean − X · variance."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    metavar="N",
    help="Prompts run at once.",
)
@click.option(
    "--max-seq-length",
    type=click.IntRange(2),
    default=4096,
    show_default=True,
    metavar="N",
    help="Longer rows get no score.",
)
@click.option("--json", is_flag=True, help="Print the summary as JSON; all else goes to stderr.")
def score(
    model: str,
    adapter_path: str | None,
    data: str,
    split: str,
    output: str,
    format: str | None,
    combine: str,
    variance_penalty: float | None,
    batch_size: int,
    max_seq_length: int,
    json: bool,
) -> None:
    """Write each row again, with the scores of its completions, in their order, as model_scores.

    Takes pairs, prompts with one completion or a list of them, and conversations, whose last
    answer is scored. A row that can't be scored gets null, and model_scores_note says why. Of
    pairs it also says how well the scores agree with them.
    """
    from mlx_align.cli.display import Terminal
    from mlx_align.data.scorable import read_scorable
    from mlx_align.inference.evaluate import render_report
    from mlx_align.inference.reward_model import RewardModel
    from mlx_align.shipped import shipped_or_given

    terminal = Terminal(json)
    file = free_file(output)
    source = read_scorable(shipped_or_given(data, "data"), split, format)
    if any(name in source.rows[0].fields for name in (SCORES, MEMBERS, NOTE)):
        raise DataError(
            f"{source.rows[0].source}: has {SCORES} already; score the file it was made from"
        )
    terminal.note(f"read as: {source.title} ({len(source.rows):,} rows)")
    reward_model = RewardModel.load(
        shipped_or_given(model, "model"),
        adapter_path,
        combine=combine,
        variance_penalty=variance_penalty,
        max_seq_length=max_seq_length,
        batch_size=batch_size,
    )
    terminal.note(reward_model.model.check + ".")
    found: list[Scored] = []
    unscored = completions = 0
    bars = terminal.bar("Scoring", len(source.rows))
    with file.open("w", encoding="utf-8") as stream, bars as bar:
        for rows in _windows(source):
            for scored, entry in _scored(reward_model, rows):
                stream.write(json_module.dumps(_line(entry, scored), ensure_ascii=False) + "\n")
                unscored += scored.scores is None
                completions += 0 if scored.scores is None else len(scored.scores)
                if source.is_pairs:
                    found.append(scored)
            stream.flush()
            bar.advance(len(rows))
    summary: dict[str, Any] = {
        "output": str(file),
        "rows": len(source.rows),
        "completions": completions,
        "unscored": unscored,
    }
    report = _report(found)
    if report is not None:
        summary["pairs"] = report.as_json()
    if json:
        click.echo(json_module.dumps(summary, indent=2))
        return
    if report is not None:
        terminal.note(render_report(report).replace("held-out comparisons", "pairs"))
    left = f"; {unscored:,} rows have none ({NOTE} says why)" if unscored else ""
    terminal.note(f"{completions:,} scores in {file}{left}")


def _windows(source: ScorableRows) -> Iterator[list[Scorable]]:
    rows = iter(source)
    while window := list(islice(rows, WINDOW)):
        yield window


def _scored(model: RewardModel, rows: list[Scorable]) -> Iterator[tuple[Scored, Scorable]]:
    from mlx_align.inference.scored import Scored

    found = iter(model.score_groups([row.group for row in rows if row.group is not None]))
    for row in rows:
        yield (Scored(None, reason=row.reason) if row.group is None else next(found)), row


def _line(entry: Scorable, scored: Scored) -> dict[str, Any]:
    row = dict(entry.row.fields)
    if scored.scores is None or scored.members is None:
        return {**row, SCORES: None, NOTE: scored.reason}
    row[SCORES] = [float(score) for score in scored.scores]
    if scored.members.shape[1] > 1:
        row[MEMBERS] = scored.members.tolist()
    return row


def _report(found: list[Scored]) -> Any:
    """The report on labelled pairs; None where there are none."""
    from mlx_align.data.comparisons import compare
    from mlx_align.inference.judge import judge

    groups, scores = [], []
    for scored in found:
        if scored.tokens is not None and scored.scores is not None:
            groups.append(scored.tokens)
            scores.append(scored.scores[:, None])
    return judge(groups, [compare(group) for group in groups], scores)
