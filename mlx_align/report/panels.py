"""The table of the page's charts, and the charts made from it.

To add a metric, add a line to `PANELS`. Names are those of metrics.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from mlx_align.report.charts import (
    COLOURS,
    Chart,
    LegendEntry,
    Line,
    bar_chart,
    calibration_chart,
    line_chart,
)
from mlx_align.report.tables import option_text
from mlx_align.system.formatting import format_value
from mlx_align.tracking.diagnostics import (
    MAX_CLIP_RATIO,
    MIN_FINISHED_SHARE,
    STOP_EPOCHS_ABOVE_KL,
    WARN_KL,
    chosen_fall,
    history_of,
)
from mlx_align.tracking.run_dir import RunRecord


class Curve(NamedTuple):
    """One metric of a panel.

    Attributes:
        key: Its name in training rows. A `*` makes one curve of each metric that matches, named by
            the part that the `*` matches.
        label: Its label; empty if the panel's title is enough.
    """

    key: str
    label: str = ""

    @property
    def twin(self) -> str:
        """The metric on held-out data."""
        return f"eval/{self.key}"


@dataclass(frozen=True)
class Panel:
    """One chart. It is shown if the run has one of its metrics.

    Attributes:
        title: Heading.
        curves: The metrics that it shows.
        unit: Unit of the values, as in `format_value`: share, bytes, nats, tokens, or nothing.
        about: A short description.
        level: A value to mark by a line, such as chance or a threshold.
        over: A metric whose square root is the horizontal axis, instead of the update.
        marks_fall: Whether the first curve is marked where it is below its first value.
        bounds: Ends of the vertical axis; None for those of the data.
        skip_start: Whether the held-out value before training is left out, because it is
            meaningless: all implicit rewards are 0.
        exact: Whether the values are without noise, so that smoothing does not apply.
    """

    title: str
    curves: tuple[Curve, ...]
    unit: str = ""
    about: str = ""
    level: float | None = None
    over: str | None = None
    marks_fall: bool = False
    bounds: tuple[float, float] | None = None
    skip_start: bool = False
    exact: bool = False


def _metric(key: str) -> tuple[Curve, ...]:
    return (Curve(key),)


_SHARE = (0.0, 1.0)
_SIDES = (("chosen", "chosen"), ("rejected", "rejected"))
_REWARD_SIDES = tuple(Curve(f"rewards/{key}", label) for key, label in _SIDES)
_LOGP_SIDES = tuple(Curve(f"logps/{key}", label) for key, label in _SIDES)
_LENGTHS = tuple(
    Curve(f"completions/{key}_length", label)
    for key, label in (("mean", "mean"), ("max", "longest"), ("min", "shortest"))
)

PANELS = (
    Panel("Reward", _metric("reward"), "", "what is optimised"),
    Panel("Held-out reward", _metric("held_out"), "", "of a reward that is not trained on"),
    Panel("Single rewards", _metric("rewards/*/mean"), "", "means over completions"),
    Panel("Spread of rewards", _metric("reward_std"), "", "standard deviation"),
    Panel(
        "Reward against √KL", _metric("reward"), "", "gain for the distance", over="objective/kl"
    ),
    Panel("KL from the reference", _metric("objective/kl"), "nats", "per completion", WARN_KL),
    Panel("Loss", _metric("loss"), "", "lower is better"),
    Panel("Perplexity", _metric("perplexity"), "", "lower is better"),
    Panel(
        "Accuracy",
        _metric("rewards/accuracies"),
        "share",
        "how often the chosen completion has the higher reward",
        0.5,
        bounds=_SHARE,
        skip_start=True,
    ),
    Panel("AUC", _metric("rewards/auc"), "share", "good completions rank above bad ones", 0.5),
    Panel("Margin", _metric("rewards/margins"), "", "reward of chosen minus rejected", 0),
    Panel("Rewards", _REWARD_SIDES, "", "what the margin is made of", 0),
    Panel("Log-probs", _LOGP_SIDES, "nats", "of a whole completion", marks_fall=True),
    Panel(
        "Chosen more likely",
        _metric("logps/accuracies"),
        "share",
        "by the policy's own log-prob, without reference",
        0.5,
        bounds=_SHARE,
    ),
    Panel("KL point", _metric("kl"), "nats", "of mismatched completions"),
    Panel(
        "KL of an update",
        _metric("policy/approx_kl"),
        "nats",
        "from old to new policy, per token",
        STOP_EPOCHS_ABOVE_KL,
    ),
    Panel("Ratio", _metric("policy/ratio"), "", "new over old probability of a token", 1),
    Panel(
        "Clipped", _metric("policy/clip_ratio"), "share", "tokens without gradient", MAX_CLIP_RATIO
    ),
    Panel("Entropy", _metric("objective/entropy"), "nats", "per token"),
    Panel("Completion length", _LENGTHS, "tokens"),
    Panel(
        "Finished completions",
        _metric("completions/ended"),
        "share",
        "with an end token",
        MIN_FINISHED_SHARE,
    ),
    Panel(
        "Repetition", _metric("text/repeated_4grams"), "share", "of 4-grams that occurred before"
    ),
    Panel("Variety", _metric("text/distinct_2"), "share", "of bigrams that are distinct"),
    Panel("Sampler gap", _metric("sampler/gap"), "nats", "log-prob in sampling against training"),
    Panel(
        "Explained variance", _metric("value/explained_variance"), "", "of returns, by critic", 0
    ),
    Panel("Value loss", _metric("value/loss"), "", "of the critic"),
    Panel(
        "Groups without contrast",
        _metric("frac_reward_zero_std"),
        "share",
        "all rewards equal",
    ),
    Panel("KL coefficient", _metric("kl_coef"), exact=True),
    Panel("Learning rate", _metric("learning_rate"), exact=True),
    Panel("Gradient norm", _metric("grad_norm"), "", "before clipping"),
    Panel("Speed", _metric("tokens_per_second"), "tokens/s"),
    Panel("Peak memory", _metric("peak_memory_bytes"), "bytes", exact=True),
)


def curves_of(panel: Panel, record: RunRecord) -> tuple[Curve, ...]:
    """The curves of a panel for which the run has values, with patterns filled in."""
    keys, twins = record.training_keys, record.held_out_keys
    if panel.over is not None and panel.over not in keys:
        return ()
    found: list[Curve] = []
    for curve in panel.curves:
        if "*" in curve.key:
            head, tail = curve.key.split("*")
            matching = sorted(key for key in keys if fnmatchcase(key, curve.key))
            found += [Curve(key, key[len(head) : len(key) - len(tail)]) for key in matching]
        elif curve.key in keys or curve.twin in twins:
            found.append(curve)
    return tuple(found)


def run_charts(record: RunRecord) -> list[Chart]:
    """The charts of one run for which it has values."""
    charts = [_run_chart(panel, record) for panel in PANELS]
    return [chart for chart in charts if chart is not None]


def _run_chart(panel: Panel, record: RunRecord) -> Chart | None:
    lines: list[Line] = []
    curves = curves_of(panel, record)
    fall = chosen_fall(history_of(record)) if panel.marks_fall else None
    fallen = None
    for curve in curves:
        training, held_out = _lines_of(panel, curve, record, len(lines))
        # In a panel with one metric, held-out data has another colour; with several, it has the
        # colour of its metric.
        if len(curves) > 1 and held_out is not None and training is not None:
            held_out = held_out._replace(colour=training.colour)
        added = [line for line in (training, held_out) if line is not None]
        if fall is not None and curve is curves[0] and added:
            use_held_out = held_out is not None and len(held_out.y) > 1
            fallen = len(lines) + len(added) - 1 if use_held_out else len(lines)
        lines += added
    if len(curves) > 1:
        order = list(dict.fromkeys(line.colour for line in lines))
        lines = [line._replace(colour=order.index(line.colour)) for line in lines]
    if not lines:
        return None
    return Chart(
        panel.title,
        panel.about,
        tuple(_legend_entry(line, panel) for line in lines),
        _chart_data(panel, lines, fallen),
        "" if fall is None else f"chosen fell by {fall:.0%}",
    )


def _chart_data(panel: Panel, lines: Sequence[Line], fall: int | None = None) -> dict[str, Any]:
    return line_chart(
        lines,
        x_name="update" if panel.over is None else "√KL",
        unit=panel.unit,
        level=panel.level,
        bounds=panel.bounds,
        smooth=not panel.exact,
        fall=fall,
    )


def _lines_of(
    panel: Panel, curve: Curve, record: RunRecord, colour: int
) -> tuple[Line | None, Line | None]:
    """Training and held-out line of a metric."""
    if panel.over is not None:
        # Estimates of a small KL may be negative; those have no root.
        points = sorted(
            (math.sqrt(row[panel.over]), row[curve.key])
            for row in record.training
            if curve.key in row and row.get(panel.over, -1.0) >= 0
        )
        label = curve.label or "training"
        return _line(label, [p[0] for p in points], [p[1] for p in points], colour), None
    held_out_rows = [row for row in record.held_out if row["step"] or not panel.skip_start]
    prefix = f"{curve.label}, " if curve.label else ""
    training, held_out = (
        _line(
            label,
            [row["step"] for row in rows if key in row],
            [row[key] for row in rows if key in row],
            shade,
        )
        for label, rows, key, shade in (
            (curve.label or "training", record.training, curve.key, colour),
            (f"{prefix}held-out", held_out_rows, curve.twin, colour + 1),
        )
    )
    return training, held_out._replace(held_out=True) if held_out is not None else None


def _line(label: str, x: list[float], y: list[float], colour: int) -> Line | None:
    return Line(label, x, y, colour) if y else None


def _legend_entry(line: Line, panel: Panel) -> LegendEntry:
    value = format_value(line.y[-1], panel.unit)
    return LegendEntry(line.colour % COLOURS, line.label, value, line.held_out)


# Options that set the scale of a loss, and of a reward.
_REWARD_OPTIONS = ("loss", "beta", "loss_option")
_LOSS_OPTIONS = (*_REWARD_OPTIONS, "label_smoothing", "wpo", "ld_alpha")
_SCALES = {
    "loss": _LOSS_OPTIONS,
    **{f"rewards/{name}": _REWARD_OPTIONS for name in ("chosen", "rejected", "margins")},
}


def are_comparable(records: Sequence[RunRecord], key: str) -> bool:
    """Whether a metric means the same for these runs: losses have scales, and rewards a beta.

    Runs without the metric don't count.
    """
    names = _SCALES.get(key.removeprefix("eval/"))
    if names is None:
        return True
    known = [one for one in records if key in one.training_keys or key in one.held_out_keys]
    return len({(r.command, *(option_text(r.config.get(n)) for n in names)) for r in known}) < 2


def comparison_charts(records: Sequence[RunRecord], names: Sequence[str]) -> list[Chart]:
    """One chart per metric and one colour per run; of held-out data if a run has it.

    Metrics that have different scales in these runs are left out, as in the table of results.
    """
    charts = []
    for panel in PANELS:
        curves = {curve.key: curve for record in records for curve in curves_of(panel, record)}
        for curve in curves.values():
            both = [_lines_of(panel, curve, record, 0) for record in records]
            has_held_out = any(held_out is not None for _, held_out in both)
            if not are_comparable(records, curve.twin if has_held_out else curve.key):
                continue
            lines = [
                line._replace(label=name, colour=colour)
                for colour, (name, (training, held_out)) in enumerate(zip(names, both, strict=True))
                if (line := held_out if has_held_out else training) is not None
            ]
            if not lines:
                continue
            title = f"{panel.title}: {curve.label}" if curve.label else panel.title
            title += ", held-out" if has_held_out else ""
            legend = tuple(_legend_entry(line, panel) for line in lines)
            charts.append(Chart(title, panel.about, legend, _chart_data(panel, lines)))
    return charts


def reward_report_charts(report: Mapping[str, Any]) -> list[Chart]:
    """The charts of a reward model's report, which summary.json holds under `held_out`."""
    charts = []
    bins = report.get("calibration") or ()
    if bins:
        about = "how often it is right against its confidence; larger dots have more comparisons"
        data = calibration_chart(
            [part["confidence"] for part in bins],
            [part["right"] for part in bins],
            [part["comparisons"] for part in bins],
        )
        legend = (LegendEntry(0, "calibration error", format_value(report.get("ece"), "share")),)
        charts.append(Chart("Calibration", about, legend, data))
    for key, title, about in (
        ("by_length_ratio", "Accuracy by length", "tokens of the chosen over the rejected one"),
        ("by_difference", "Accuracy by certainty", "quarters by the difference of scores"),
    ):
        parts = report.get(key) or ()
        if parts:
            data = bar_chart(
                [_shorten(part["name"]) for part in parts],
                [part["accuracy"] for part in parts],
                [part["comparisons"] for part in parts],
            )
            charts.append(Chart(title, about, (), data))
    return charts


def _shorten(name: str) -> str:
    """The name of a bin, short enough for a label below a bar."""
    for long, short in ((" quarter", ""), ("below ", "< "), ("above ", "> "), (" to ", "–")):
        name = name.replace(long, short)
    return name
