"""The run page: one run, or several for comparison, as one HTML file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from mlx_align.report.charts import Chart, embed_json
from mlx_align.report.panels import (
    are_comparable,
    comparison_charts,
    reward_report_charts,
    run_charts,
)
from mlx_align.report.tables import (
    data_rows,
    metric_rows,
    option_text,
    reward_report_rows,
    rollout_rows,
    sample_rows,
)
from mlx_align.system.formatting import format_count, format_date, format_duration, format_value
from mlx_align.system.intervals import kl_interval, metric_interval
from mlx_align.tracking.diagnostics import Finding, diagnose
from mlx_align.tracking.run_dir import RunRecord, held_out_examples
from mlx_align.tracking.verdict import compare_runs, verdict

# Interval at which the page of a running run reloads itself.
RELOAD_SECONDS = 30
SHOWN_SAMPLES = 12
# Prompts of the last rollout batch that are shown, and completions of each.
SHOWN_PROMPTS, SHOWN_ROLLOUTS = 6, 4

_ASSETS = Path(__file__).with_name("assets")
_TEMPLATES = Path(__file__).with_name("templates")

# Control characters and unpaired surrogates in the data, which HTML files can't have, are shown as
# visible symbols.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}
_VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)


@dataclass(frozen=True)
class Headline:
    """A metric that is shown as a card; the most important ones come first.

    Attributes:
        key: Name of the metric.
        label: Its label.
        unit: Its unit, as in `format_value`.
        show_start: Whether the value before training is shown too.
    """

    key: str
    label: str
    unit: str = ""
    show_start: bool = True


HEADLINES = (
    Headline("eval/logps/accuracies", "held-out: prefers the chosen (own log-prob)", "share"),
    # Implicit rewards are 0 before training.
    Headline(
        "eval/rewards/accuracies", "held-out: prefers the chosen (implicit reward)", "share", False
    ),
    Headline("eval/rewards/margins", "held-out: reward margin", "", False),
    Headline("eval/perplexity", "held-out: perplexity"),
    Headline("eval/held_out", "held-out: reward that is not trained on"),
    Headline("eval/reward", "held-out: reward"),
    Headline("reward", "reward"),
    Headline("objective/kl", "KL from the reference, per completion", "nats", False),
    Headline("completions/mean_length", "completion length", "tokens"),
    Headline("eval/loss", "held-out: loss"),
    Headline("loss", "training loss"),
)


@dataclass(frozen=True)
class Card:
    """A number in large type: label, value, and a note below."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class State:
    """The state and progress of a run.

    Attributes:
        kind: finished, running or stopped; sets the badge's colour.
        badge: The state in one or two words.
        text: The progress in words.
        share: Fraction of the run that is done; None if the run has ended.
        command: The command that continues the run; "" if there is nothing to continue.
    """

    kind: str
    badge: str
    text: str
    share: float | None = None
    command: str = ""


def render_run(record: RunRecord) -> str:
    """The page of one run."""
    report = record.summary.get("held_out") or {}
    samples = [sample_rows(sample) for sample in record.samples]
    state = run_state(record)
    statistics = record.data_statistics
    versions = record.summary.get("versions") or record.status.get("versions") or {}
    charts, found = run_charts(record), verdict(record)
    report_charts = reward_report_charts(report)
    return _render(
        "run.html",
        [*charts, *report_charts],
        title=f"{record.name} – {state.badge} – mlx-align {record.command}",
        reload=RELOAD_SECONDS if state.kind == "running" else None,
        run=record,
        date=format_date(record.status.get("began")),
        model=_short_name(record.config.get("model")),
        data=_short_name(record.config.get("data")),
        state=state,
        verdict=found,
        details=_details(record),
        cards=_cards(record),
        findings=diagnose(record),
        charts=list(enumerate(charts)),
        report=reward_report_rows(report),
        report_charts=list(enumerate(report_charts, len(charts))),
        samples=samples[:SHOWN_SAMPLES],
        more_samples=max(0, len(samples) - SHOWN_SAMPLES),
        rollouts=rollout_rows(record.rollouts, SHOWN_PROMPTS, SHOWN_ROLLOUTS),
        rollout_step=record.rollouts[0].get("step") if record.rollouts else None,
        scored=any("completions" in sample for sample in record.samples),
        metrics=metric_rows(record),
        statistics=data_rows(statistics),
        example=statistics.get("example") or (),
        options=[(name, option_text(value)) for name, value in record.config.items()],
        versions=list(versions.items()),
        next_command=None if found.kind == "broken" else record.summary.get("talk"),
    )


def render_comparison(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    """The page of several runs.

    Args:
        records: The runs.
        names: Their names, all different.
    """
    runs = [
        {"name": name, "command": f"{record.command}, {run_state(record).badge}"}
        for name, record in zip(names, records, strict=True)
    ]
    findings = [diagnose(record) for record in records]
    charts = comparison_charts(records, names)
    return _render(
        "comparison.html",
        charts,
        title=f"{', '.join(names)} – mlx-align",
        reload=None,
        runs=runs,
        verdict=compare_runs(records, names),
        verdicts=[(name, verdict(record)) for name, record in zip(names, records, strict=True)],
        results=_results(records, findings),
        differences=_differences(records),
        charts=list(enumerate(charts)),
        findings=[pair for pair in zip(runs, findings, strict=True) if pair[1]],
    )


def _render(template: str, embedded: Sequence[Chart], **content: Any) -> str:
    # Everything from data and models is escaped. Only our own assets and the JSON are Markup.
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["options"] = _mark_options
    style, library, script = _assets() if embedded else (_assets()[0], "", "")
    page = environment.get_template(template).render(
        style=Markup(style),
        scripts=[Markup(code) for code in (library, script) if code],
        policy=_content_policy(style, library, script),
        chart_data=Markup(embed_json(_visible([chart.data for chart in embedded]))),
        **content,
    )
    return page.translate(_VISIBLE)


@cache
def _assets() -> tuple[str, str, str]:
    """Style sheet, chart library with its licence, and the page's script."""

    def read(name: str) -> str:
        return (_ASSETS / name).read_text(encoding="utf-8")

    # The licence has to accompany every copy of the library.
    library = f"/*\n{read('uplot/LICENSE')}*/\n{read('uplot/uPlot.iife.min.js')}"
    return read("uplot/uPlot.min.css") + read("page.css"), library, read("charts.js")


def _content_policy(style: str, *scripts: str) -> str:
    """A content security policy that allows the page's own style and scripts, and nothing else."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    allowed = " ".join(digest(code) for code in scripts if code) or "'none'"
    return (
        f"default-src 'none'; style-src {digest(style)}; script-src {allowed}; base-uri 'none'; "
        "form-action 'none'"
    )


def _visible(value: Any) -> Any:
    """The value with control characters of its texts replaced, as in the rest of the page."""
    if isinstance(value, str):
        return value.translate(_VISIBLE)
    if isinstance(value, Mapping):
        return {key: _visible(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_visible(item) if not isinstance(item, int | float) else item for item in value]
    return value


def _mark_options(text: str) -> Markup:
    """The text with command-line options marked as code."""
    return Markup(re.sub(r"--[a-z][a-z-]*", r"<code>\g<0></code>", str(escape(text))))


def _short_name(name: object) -> str:
    """A hub name as it is; of a path the last two parts."""
    parts = str(name or "–").rstrip("/").split("/")
    return "/".join(parts[-2:])


def run_state(record: RunRecord) -> State:
    """The state of a run, from its files."""
    seconds, step = record.status.get("seconds"), record.step
    total = record.status.get("total") or record.config.get("iters")
    done = f"{step:,} of {total:,}" if total else f"{step:,}"
    share = min(1.0, step / total) if total else None
    if record.finished:
        took = record.summary.get("seconds_in_all")
        duration = "" if took is None else f" in {format_duration(took)}"
        count = f"{record.summary.get('steps', step):,}"
        if record.summary.get("stopped_early") and total:
            count = f"ended early, after {count} of {total:,}"
        return State("finished", "finished", f"{count} updates{duration}")
    state, when = record.status.get("state"), format_date(record.status.get("written"))
    if state == "running":
        left = ""
        if total and step and seconds:
            left = f", about {format_duration((total - step) * seconds / step)} left"
        when = f"; as of {when}" if when else ""
        return State("running", "running", f"update {done}{left}{when}", share)
    if state == "interrupted":
        folder = shlex.quote(str(record.config.get("output")))
        command = f"mlx-align {record.command} --resume {folder}"
        return State(
            "stopped", "interrupted", f"after update {done}; continue with", share, command
        )
    if state == "failed":
        reason = record.status.get("error") or "an error"
        return State("stopped", "failed", f"after update {done}: {reason}", share)
    return State("stopped", "not finished", f"after update {done}", share)


def _details(record: RunRecord) -> str:
    """A second sentence below the verdict, or ""."""
    key = "eval/logps/accuracies"
    values, kept = record.values(key), record.kept_evaluation
    if len(values) > 1 and key in kept:
        n, ends = held_out_examples(record), ""
        if (found := metric_interval(kept, key, n)) is not None and n is not None:
            low, high = (format_value(end, "share") for end in (found.low, found.high))
            ends = f" (95% interval {low} to {high}, {format_count(kept, n)})"
        return (
            f"By its own log-probs, the model finds the chosen completion more likely in "
            f"{kept[key]:.1%} of the pairs{ends}; before training it was {values[0]:.1%}."
        )
    kl = record.recent_mean("objective/kl")
    if kl is not None and record.values("reward"):
        return f"The policy is {format_value(kl)} nats per completion from the reference."
    return ""


def _cards(record: RunRecord) -> list[Card]:
    cards = []
    for headline in HEADLINES:
        values = record.values(headline.key)
        # The held-out loss replaces the training loss.
        if not values or (headline.key == "loss" and record.held_out):
            continue
        show_start = headline.show_start or record.command == "reward"
        notes = [_interval(record, headline)]
        if show_start and len(values) > 1:
            notes.append(f"at first {format_value(values[0], headline.unit)}")
        value = _kept_value(record, headline.key)
        note = "; ".join(note for note in notes if note)
        cards.append(Card(_label(headline, record), format_value(value, headline.unit), note))
    kl = record.summary.get("kl")
    if kl and kl.get("mean") is not None:
        found = kl_interval(kl)
        note = f"{kl.get('samples')} samples"
        if found is not None:
            note = f"{format_value(found.low)} to {format_value(found.high)}, {note}"
        cards.append(
            Card("KL from the reference, per completion", format_value(kl["mean"], "nats"), note)
        )
    seconds, speed = record.status.get("seconds"), record.last("tokens_per_second")
    seconds = record.summary.get("seconds", seconds)
    if seconds:
        mean_speed = record.summary.get("tokens_per_second", speed)
        note = format_value(mean_speed, "tokens/s") if speed else ""
        cards.append(Card("time in updates", format_duration(seconds), note))
    if (memory := record.last("peak_memory_bytes")) is not None:
        cards.append(Card("peak memory", format_value(memory, "bytes")))
    return cards


def _label(headline: Headline, record: RunRecord) -> str:
    """The label of a metric; a reward model's reward is not implicit."""
    plain = record.command == "reward"
    return headline.label.replace("(implicit reward)", "(reward)") if plain else headline.label


def _kept_value(record: RunRecord, key: str) -> float | None:
    """A metric of the adapter that was kept; its last value if it is not a held-out metric."""
    return record.kept_evaluation.get(key, record.last(key))


def _interval(record: RunRecord, headline: Headline) -> str:
    """The 95% interval of a held-out metric and its number of examples, or ""."""
    examples = held_out_examples(record)
    found = metric_interval(record.kept_evaluation, headline.key, examples)
    if found is None or examples is None:
        return ""
    low, high = (format_value(end, headline.unit) for end in (found.low, found.high))
    # No-break spaces, so that a card on a phone doesn't end a line within "n = 6".
    count = format_count(record.kept_evaluation, examples).replace(" = ", "\u00a0=\u00a0", 1)
    return f"{low} to {high}, {count}"


def _results(
    records: Sequence[RunRecord], findings: Sequence[Sequence[Finding]]
) -> list[list[str]]:
    rows = [["state", *(run_state(record).badge for record in records)]]
    rows.append(["verdict", *(verdict(record).kind for record in records)])
    rows.append(["updates", *(f"{record.step:,}" for record in records)])
    for headline in HEADLINES:
        values = [_kept_value(record, headline.key) for record in records]
        if any(value is not None for value in values) and are_comparable(records, headline.key):
            shown = [
                f"{format_value(value, headline.unit)} ({ends})"
                if ends
                else format_value(value, headline.unit)
                for value, ends in zip(
                    values, (_interval(record, headline) for record in records), strict=True
                )
            ]
            rows.append([_label(headline, records[0]), *shown])
    for label, show in (
        ("KL from the reference, per completion", _kl),
        ("accuracy on all held-out comparisons", _report_accuracy),
    ):
        shown = [show(record) for record in records]
        if any(shown):
            rows.append([label, *(text or format_value(None) for text in shown)])
    for label, key, unit in (
        ("speed", "tokens_per_second", "tokens/s"),
        ("peak memory", "peak_memory_bytes", "bytes"),
    ):
        rows.append([label, *(format_value(record.last(key), unit) for record in records)])
    rows.append(["warnings", *(str(len(found)) for found in findings)])
    return rows


def _kl(record: RunRecord) -> str:
    """The KL from the reference with its interval and number of samples, or ""."""
    kl = record.summary.get("kl") or {}
    if kl.get("mean") is None:
        return ""
    found, ends = kl_interval(kl), ""
    if found is not None:
        ends = f"{format_value(found.low)} to {format_value(found.high)}, "
    return f"{format_value(kl['mean'], 'nats')} ({ends}n = {kl.get('samples')})"


def _report_accuracy(record: RunRecord) -> str:
    """A reward model's accuracy on all held-out comparisons, with interval and number, or ""."""
    report = record.summary.get("held_out") or {}
    if report.get("accuracy") is None:
        return ""
    rate, low, high = (
        format_value(report[key], "share") for key in ("accuracy", "accuracy_low", "accuracy_high")
    )
    return f"{rate} ({low} to {high}, n = {report['comparisons']:,})"


def _differences(records: Sequence[RunRecord]) -> list[list[str]]:
    """Options that differ between the runs, except --output."""
    names = list(dict.fromkeys(name for record in records for name in record.config))
    rows = [[name, *(option_text(record.config.get(name)) for record in records)] for name in names]
    rows.insert(0, ["command", *(record.command for record in records)])
    return [row for row in rows if len(set(row[1:])) > 1 and row[0] != "output"]
