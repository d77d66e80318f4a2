"""`mlx-align score`: scores of the completions in a file, by a reward model or a policy."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_align.cli.options import (
    Command,
    config_options,
    echo_json,
    json_option,
    options_of_run,
    run_argument,
)
from mlx_align.config import ScoreConfig, make_config
from mlx_align.config.schema import fingerprint_options, flag_of
from mlx_align.errors import ConfigError, DataError
from mlx_align.system.row_file import hash_rows, new_file, open_rows, unused_file
from mlx_align.system.starter import resolve_starter

if TYPE_CHECKING:
    from mlx_align.data.formats import ScorableDataset, ScorableRow
    from mlx_align.evaluation.data import RowsToScore
    from mlx_align.evaluation.reward_model import PairReport, RewardReport
    from mlx_align.inference.implicit_reward import ImplicitReward
    from mlx_align.inference.reward_model import RewardModel
    from mlx_align.inference.scoring import GroupScores
    from mlx_align.types import Text

# Rows in memory at a time. Rows of similar length are batched, which needs a window this large.
WINDOW = 64
SCORES, MEMBERS, NOTE = "model_scores", "model_scores_members", "model_scores_note"
# Summed log-probs in nats, written with implicit rewards.
POLICY, REFERENCE = "policy_logps", "reference_logps"


@click.command(
    cls=Command, short_help="Score completions: reward model, implicit reward or log-prob."
)
@run_argument
@config_options(ScoreConfig)
@json_option("Print the summary as JSON; all else goes to stderr.")
def score(json: bool, **options: Any) -> None:
    """Copy each row to --output with the scores of its completions, in order, as model_scores.

    Without --data, scores the rows that the run held out. Rows are pairs, prompts with one
    completion or a list of them, or conversations, whose last assistant turn is scored. A row that
    can't be scored gets null, and the reason in model_scores_note. Rows are written as they are
    scored: an interrupted command keeps them, and --resume continues. For pairs, the summary also
    says how well the scores agree with the labels. Implicit rewards, beta * log(policy /
    reference), come with policy_logps and reference_logps.
    """
    from mlx_align.evaluation.data import trained_on_remark, trained_on_warning
    from mlx_align.models.row_limits import check_lengths, row_lengths
    from mlx_align.system.console import Console

    console = Console(json)
    config = make_config(ScoreConfig, options_of_run(options), None, "command line")
    file = _output(config)
    read = _read(config)
    source = read.dataset
    if any(name in source.rows[0].fields for name in (SCORES, MEMBERS, NOTE, POLICY, REFERENCE)):
        raise DataError(
            f"{source.rows[0].source}: has scores already; score the file it was made from"
        )
    where = f"{read.title}, " if read.title else ""
    console.note(f"read as: {where}{source.title} ({len(source.rows):,} rows)")
    scorer, description = _load(config)
    console.note("\n".join(filter(None, [scorer.model.check + ".", description])))
    found: list[GroupScores] = []
    lengths: list[int] = []
    unscored = completions = 0
    prompts: set[Text] = set()
    hashes = {**_hashes(config, scorer, source), "split": repr(read.split)}
    inputs = fingerprint_options(config, hashes)
    output = open_rows(
        file, inputs, resume=config.resume, total=len(source.rows), note=console.note
    )
    with output as written, console.bar("Scoring", len(source.rows)) as bar:
        earlier = written.read()
        for start, rows in enumerate(_windows(source)):
            done = min(start * WINDOW, len(source.rows)) + len(rows)
            is_new = done > written.done
            results = (
                _score_rows(scorer, rows) if is_new else _scored_earlier(scorer, rows, earlier)
            )
            for scored, entry in results:
                if is_new:
                    written.write(_output_row(entry, scored))
                unscored += scored.scores is None
                if entry.group is not None and scored.scores is not None:
                    prompts.add(entry.group.prompt)
                completions += 0 if scored.scores is None else len(scored.scores)
                if scored.tokens is not None:
                    lengths += row_lengths([scored.tokens])
                if source.is_pairs:
                    found.append(scored)
            if is_new:
                written.commit(done)
            bar.advance(len(rows))
    for remark in check_lengths(scorer.model.folder, lengths):
        console.note(f"! {remark}")
    known = len(prompts & read.trained)
    summary: dict[str, Any] = {
        "output": str(file),
        "rows": len(source.rows),
        "completions": completions,
        "unscored": unscored,
        "trained_prompts": known,
    }
    report, rendered = _report(found, by_reward_model=not description)
    if report is not None:
        summary["pairs"] = report.as_json()
    if json:
        echo_json(summary, indent=2)
        return
    remark = trained_on_remark(known, len(prompts))
    if report is not None:
        first, newline, rest = rendered.partition("\n")
        console.note(f"{first}{remark}{newline}{rest}")
        remark = ""
    for warning in trained_on_warning(known, len(prompts)):
        console.note(f"! {warning}")
    missing = f"; {unscored:,} rows without a score (see {NOTE})" if unscored else ""
    console.note(f"Wrote {completions:,} scores to {file}{missing}{remark}")


def _output(config: ScoreConfig) -> Path:
    """The file to write: --output, or one in the run folder that doesn't exist yet."""
    from mlx_align.inference.trained_run import default_output

    output = config.output
    if output is None:
        if config.adapter_path is None:
            raise ConfigError("--output is missing; name a JSONL file to write")
        output = str(unused_file(default_output(config.adapter_path, "scores.jsonl")))
    return new_file(output, resume=config.resume)


def _read(config: ScoreConfig) -> RowsToScore:
    """The rows to score."""
    from mlx_align.evaluation.data import read_rows_to_score
    from mlx_align.inference.trained_run import read_trained_run

    run = None
    if config.adapter_path is not None:
        run = read_trained_run(config.adapter_path, reward_model=True)
    data = None if config.data is None else resolve_starter(config.data, "data")
    return read_rows_to_score(run, data, config.split, config.format, config.columns)


def _windows(source: ScorableDataset) -> Iterator[list[ScorableRow]]:
    rows = iter(source)
    while window := list(islice(rows, WINDOW)):
        yield window


def _load(config: ScoreConfig) -> tuple[RewardModel | ImplicitReward, str]:
    """The scorer, and a description of its scores (empty for a reward model)."""
    from mlx_align.inference.implicit_reward import load_implicit_reward, load_logprob_scorer
    from mlx_align.inference.reward_model import RewardModel
    from mlx_align.models.heads import has_reward_head

    model = resolve_starter(config.model, "model")
    run = config.adapter_path
    only_reward: dict[str, Any] = {
        "combine": config.combine,
        "variance_penalty": config.variance_penalty,
    }
    only_implicit: dict[str, Any] = {
        "beta": config.beta,
        "reference_adapter": config.reference_adapter,
    }
    limits: dict[str, Any] = {
        "max_seq_length": config.max_seq_length,
        "batch_size": config.batch_size,
    }
    is_policy = run is not None and not has_reward_head(Path(run).expanduser())
    if not config.logps and not is_policy:
        unused = {**only_implicit, "per_token": config.per_token, "thinking": config.thinking}
        _check_unused(unused, "a reward model's scores")
        return RewardModel.load(model, run, **only_reward, **limits), ""
    if config.combine == "mean":
        only_reward["combine"] = None  # the default
    if config.logps:
        _check_unused({**only_implicit, **only_reward}, "--logps")
        scorer = load_logprob_scorer(
            model, run, per_token=config.per_token, thinking=config.thinking, **limits
        )
        return scorer, scorer.description
    _check_unused(only_reward, "implicit rewards")
    assert run is not None
    implicit = load_implicit_reward(
        model,
        run,
        **only_implicit,
        per_token=config.per_token,
        thinking=config.thinking,
        **limits,
    )
    return implicit, implicit.description


def _check_unused(options: dict[str, Any], what: str) -> None:
    """Raise a ConfigError if one of `options`, which have no effect on `what`, was given."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{flag_of(name)}: has no effect on {what}; leave it out")


def _score_rows(
    model: RewardModel | ImplicitReward, rows: list[ScorableRow]
) -> Iterator[tuple[GroupScores, ScorableRow]]:
    from mlx_align.inference.scoring import GroupScores

    found = iter(model.score_groups([row.group for row in rows if row.group is not None]))
    for row in rows:
        yield (GroupScores(None, reason=row.reason) if row.group is None else next(found)), row


def _scored_earlier(
    model: RewardModel | ImplicitReward, rows: list[ScorableRow], earlier: Iterator[dict[str, Any]]
) -> Iterator[tuple[GroupScores, ScorableRow]]:
    """The results of rows that an interrupted command wrote, for the summary."""
    import numpy as np

    from mlx_align.inference.scoring import GroupScores

    tokens = iter(model.tokenize([row.group for row in rows if row.group is not None]))
    for row, written in zip(rows, islice(earlier, len(rows)), strict=True):
        result = None if row.group is None else next(tokens)
        scores = written[SCORES]
        if scores is None or result is None or isinstance(result, GroupScores):
            yield GroupScores(None, reason=str(written.get(NOTE))), row
        else:
            found = np.array([np.nan if one is None else one for one in scores])
            yield GroupScores(found, tokens=result), row


def _hashes(
    config: ScoreConfig, scorer: RewardModel | ImplicitReward, source: ScorableDataset
) -> dict[str, str]:
    """Hashes of what the scores depend on, by the option that names it."""
    from mlx_align.models.adapters import fingerprint_adapters, fingerprint_folder

    return {
        **fingerprint_adapters(config),
        "model": fingerprint_folder(scorer.model.folder.path),
        "data": hash_rows(row.fields for row in source.rows),
    }


def _output_row(entry: ScorableRow, scored: GroupScores) -> dict[str, Any]:
    row = {**(entry.row.extra or {}), **entry.row.fields}
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
    found: list[GroupScores], *, by_reward_model: bool
) -> tuple[RewardReport | PairReport | None, str]:
    """The agreement of scores with labelled pairs, as data and as text; None without labels."""
    from mlx_align.data.comparisons import compare_completions
    from mlx_align.evaluation.render import render_pair_report, render_reward_report
    from mlx_align.evaluation.reward_model import (
        collect_comparisons,
        evaluate_reward_model,
        pair_report,
    )

    groups, scores = [], []
    for scored in found:
        if scored.tokens is not None and scored.scores is not None:
            groups.append(scored.tokens)
            scores.append(scored.scores[:, None])
    compared = [compare_completions(group) for group in groups]
    if by_reward_model:
        report = evaluate_reward_model(groups, compared, scores)
        if report is None:
            return None, ""
        return report, render_reward_report(report).replace("held-out comparisons", "pairs")
    comparisons = collect_comparisons(groups, compared, scores)
    if comparisons is None:
        return None, ""
    pairs = pair_report(comparisons.compared)
    return pairs, render_pair_report(pairs)
