"""`mlx-align score`: what a reward model or a policy thinks of the completions in a file."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_align.cli.files import free_file
from mlx_align.errors import ConfigError, DataError
from mlx_align.settings import flag_of

if TYPE_CHECKING:
    from mlx_align.data.scorable import Scorable, ScorableRows
    from mlx_align.inference.evaluate import RewardReport
    from mlx_align.inference.implicit import ImplicitReward
    from mlx_align.inference.pair_report import PairReport
    from mlx_align.inference.reward_model import RewardModel
    from mlx_align.inference.scored import Scored

# Rows in memory at a time; those of like length run together, so a few are too few.
WINDOW = 64
SCORES, MEMBERS, NOTE = "model_scores", "model_scores_members", "model_scores_note"
# Summed log-probs beside implicit rewards, nats.
POLICY, REFERENCE = "policy_logps", "reference_logps"


@click.command(short_help="Score completions: reward model, implicit reward or log-probs.")
@click.option(
    "--model", required=True, metavar="PATH_OR_NAME", help="A run's base model, or a classifier."
)
@click.option(
    "--adapter-path",
    metavar="RUN",
    help="A run: of mlx-align reward, or of dpo or kto for its implicit reward.",
)
@click.option("--logps", is_flag=True, help="Score by log-prob, in nats, under the model or run.")
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
@click.option("--beta", type=float, metavar="X", help="Of the implicit reward; default: the run's.")
@click.option(
    "--reference-adapter",
    metavar="PATH",
    help="Where the adapter is now that the run started from.",
)
@click.option(
    "--per-token/--sum",
    default=None,
    help="Divide implicit rewards or log-probs by the completion's length. [default: as the run's "
    "loss did]",
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
    logps: bool,
    data: str,
    split: str,
    output: str,
    format: str | None,
    combine: str,
    variance_penalty: float | None,
    beta: float | None,
    reference_adapter: str | None,
    per_token: bool | None,
    batch_size: int,
    max_seq_length: int,
    json: bool,
) -> None:
    """Write each row again, with the scores of its completions, in their order, as model_scores.

    Takes pairs, prompts with one completion or a list of them, and conversations, whose last
    answer is scored. A row that can't be scored gets null, and model_scores_note says why. Of
    pairs it also says how well the scores agree with them. Beside implicit rewards,
    β·log(policy / reference), stand both log-probs: policy_logps and reference_logps.
    """
    from mlx_align.cli.display import Terminal
    from mlx_align.data.scorable import read_scorable
    from mlx_align.shipped import shipped_or_given

    terminal = Terminal(json)
    file = free_file(output)
    source = read_scorable(shipped_or_given(data, "data"), split, format)
    if any(name in source.rows[0].fields for name in (SCORES, MEMBERS, NOTE, POLICY, REFERENCE)):
        raise DataError(
            f"{source.rows[0].source}: has scores already; score the file it was made from"
        )
    terminal.note(f"read as: {source.title} ({len(source.rows):,} rows)")
    scorer, said = _load(
        shipped_or_given(model, "model"),
        adapter_path,
        logps=logps,
        only_reward={"combine": combine, "variance_penalty": variance_penalty},
        only_implicit={"beta": beta, "reference_adapter": reference_adapter},
        per_token=per_token,
        limits={"max_seq_length": max_seq_length, "batch_size": batch_size},
    )
    terminal.note("\n".join(filter(None, [scorer.model.check + ".", said])))
    found: list[Scored] = []
    unscored = completions = 0
    bars = terminal.bar("Scoring", len(source.rows))
    with file.open("w", encoding="utf-8") as stream, bars as bar:
        for rows in _windows(source):
            for scored, entry in _scored(scorer, rows):
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
    report, rendered = _report(found, by_reward_model=not said)
    if report is not None:
        summary["pairs"] = report.as_json()
    if json:
        click.echo(json_module.dumps(summary, indent=2))
        return
    if report is not None:
        terminal.note(rendered)
    left = f"; {unscored:,} rows have none ({NOTE} says why)" if unscored else ""
    terminal.note(f"{completions:,} scores in {file}{left}")


def _windows(source: ScorableRows) -> Iterator[list[Scorable]]:
    rows = iter(source)
    while window := list(islice(rows, WINDOW)):
        yield window


def _load(
    model: str,
    adapter_path: str | None,
    *,
    logps: bool,
    only_reward: dict[str, Any],
    only_implicit: dict[str, Any],
    per_token: bool | None,
    limits: dict[str, Any],
) -> tuple[RewardModel | ImplicitReward, str]:
    """What scores, and in words what by; nothing of a reward model."""
    from mlx_align.inference.implicit import load_implicit, load_logps
    from mlx_align.inference.reward_model import RewardModel
    from mlx_align.models.heads import has_head

    is_run = adapter_path is not None and not has_head(Path(adapter_path).expanduser())
    if not logps and not is_run:
        given = {**only_implicit, "per_token": per_token}
        _refuse_without_effect(given, "a reward model's scores")
        return RewardModel.load(model, adapter_path, **only_reward, **limits), ""
    if only_reward["combine"] == "mean":
        only_reward = {**only_reward, "combine": None}
    if logps:
        _refuse_without_effect({**only_implicit, **only_reward}, "--logps")
        return load_logps(model, adapter_path, per_token=per_token, **limits)
    _refuse_without_effect(only_reward, "implicit rewards")
    assert adapter_path is not None
    return load_implicit(model, adapter_path, **only_implicit, per_token=per_token, **limits)


def _refuse_without_effect(options: dict[str, Any], what: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{flag_of(name)}: has no effect on {what}; leave it out")


def _scored(
    model: RewardModel | ImplicitReward, rows: list[Scorable]
) -> Iterator[tuple[Scored, Scorable]]:
    from mlx_align.inference.scored import Scored

    found = iter(model.score_groups([row.group for row in rows if row.group is not None]))
    for row in rows:
        yield (Scored(None, reason=row.reason) if row.group is None else next(found)), row


def _line(entry: Scorable, scored: Scored) -> dict[str, Any]:
    row = dict(entry.row.fields)
    if scored.scores is None:
        return {**row, SCORES: None, NOTE: scored.reason}
    row[SCORES] = [float(score) for score in scored.scores]
    if scored.members is not None and scored.members.shape[1] > 1:
        row[MEMBERS] = scored.members.tolist()
    if scored.policy_logps is not None and scored.reference_logps is not None:
        row[POLICY] = scored.policy_logps.tolist()
        row[REFERENCE] = scored.reference_logps.tolist()
    return row


def _report(
    found: list[Scored], *, by_reward_model: bool
) -> tuple[RewardReport | PairReport | None, str]:
    """The report on labelled pairs, and the same for people; None where there are none."""
    from mlx_align.data.comparisons import compare
    from mlx_align.inference.evaluate import render_report
    from mlx_align.inference.judge import comparisons, judge
    from mlx_align.inference.pair_report import pair_report, render_pair_report

    groups, scores = [], []
    for scored in found:
        if scored.tokens is not None and scored.scores is not None:
            groups.append(scored.tokens)
            scores.append(scored.scores[:, None])
    compared = [compare(group) for group in groups]
    if by_reward_model:
        report = judge(groups, compared, scores)
        if report is None:
            return None, ""
        return report, render_report(report).replace("held-out comparisons", "pairs")
    judged = comparisons(groups, compared, scores)
    if judged is None:
        return None, ""
    of_pairs = pair_report(judged.judged)
    return of_pairs, render_pair_report(of_pairs)
