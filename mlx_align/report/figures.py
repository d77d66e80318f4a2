"""From runs to the charts of a page: which metrics, in which colours, with which legend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from mlx_align.report.charts import (
    COLOURS,
    Axis,
    Bar,
    Dot,
    Line,
    draw_bars,
    draw_calibration,
    draw_lines,
)
from mlx_align.report.health import chosen_fall
from mlx_align.report.numbers import say
from mlx_align.report.panels import PANELS, Curve, Panel, curves_of
from mlx_align.report.runs import RunFacts


@dataclass(frozen=True)
class Entry:
    """A line of a legend: a dot of that colour, what it is, and its last value."""

    colour: int
    label: str
    value: str
    held_out: bool = False


@dataclass(frozen=True)
class Figure:
    """A chart with the words around it; `mark` says what is marked in it."""

    title: str
    about: str
    legend: tuple[Entry, ...]
    svg: Markup
    mark: str = ""


def run_figures(run: RunFacts) -> list[Figure]:
    """The charts of one run, those for which it has numbers."""
    drawn = [_run_figure(panel, run) for panel in PANELS]
    return [figure for figure in drawn if figure is not None]


def _run_figure(panel: Panel, run: RunFacts) -> Figure | None:
    lines: list[Line] = []
    curves = curves_of(panel, run)
    fallen = None
    for curve in curves:
        training, held_out = _lines_of(panel, curve, run, len(lines))
        # Of one metric, held-out data has its own colour; of several, it shares the metric's.
        if len(curves) > 1 and held_out is not None and training is not None:
            held_out = held_out._replace(colour=training.colour)
        lines += [line for line in (training, held_out) if line is not None]
        if panel.marks_fall and curve is curves[0]:
            fallen = held_out if held_out is not None and len(held_out.y) > 1 else training
    if len(curves) > 1:
        order = list(dict.fromkeys(line.colour for line in lines))
        lines = [line._replace(colour=order.index(line.colour)) for line in lines]
    if not lines:
        return None
    share = chosen_fall(run) if panel.marks_fall else None
    return Figure(
        panel.title,
        panel.about,
        tuple(_entry(line, panel) for line in lines),
        draw_lines(lines, _axis(panel), panel.title, fallen if share is not None else None),
        "" if share is None else f"chosen fell by {share:.0%}",
    )


def _lines_of(
    panel: Panel, curve: Curve, run: RunFacts, colour: int
) -> tuple[Line | None, Line | None]:
    """Training and held-out line of a metric."""
    if panel.over is not None:
        rows = [row for row in run.training if curve.key in row and row.get(panel.over, -1.0) >= 0]
        # Estimates of a small KL may be negative; the root has no place for them.
        x = [math.sqrt(row[panel.over]) for row in rows]
        return _line(curve.label or "training", x, [r[curve.key] for r in rows], colour), None
    held_out_rows = [row for row in run.held_out if row["step"] or not panel.not_at_first]
    name = f"{curve.label}, " if curve.label else ""
    training, held_out = (
        _line(
            f"{name}{where}" if where == "held-out" else curve.label or where,
            [row["step"] for row in rows if key in row],
            [row[key] for row in rows if key in row],
            shade,
        )
        for where, rows, key, shade in (
            ("training", run.training, curve.key, colour),
            ("held-out", held_out_rows, curve.twin, colour + 1),
        )
    )
    return training, held_out._replace(held_out=True) if held_out is not None else None


def _line(label: str, x: list[float], y: list[float], colour: int) -> Line | None:
    return Line(label, x, y, colour) if y else None


def _entry(line: Line, panel: Panel) -> Entry:
    value = say(line.y[-1], panel.unit)
    return Entry(line.colour % COLOURS, line.label, value, line.held_out)


def _axis(panel: Panel) -> Axis:
    name = "update" if panel.over is None else "√KL"
    return Axis(name, panel.unit, panel.level, panel.bounds, not panel.exact)


def compared_figures(runs: Sequence[RunFacts], names: Sequence[str]) -> list[Figure]:
    """One chart per metric, a colour per run; of held-out data where all that have it have that."""
    figures = []
    for panel in PANELS:
        curves = {curve.key: curve for run in runs for curve in curves_of(panel, run)}
        for curve in curves.values():
            both = [_lines_of(panel, curve, run, 0) for run in runs]
            has_held_out = any(held_out is not None for _, held_out in both)
            lines, legend = [], []
            for colour, (name, (training, held_out)) in enumerate(zip(names, both, strict=True)):
                line = held_out if has_held_out else training
                if line is not None:
                    lines.append(line._replace(label=name, colour=colour))
                    legend.append(_entry(lines[-1], panel))
            if not lines:
                continue
            where = ", held-out" if has_held_out else ""
            title = f"{panel.title}: {curve.label}" if curve.label else panel.title
            svg = draw_lines(lines, _axis(panel), f"{title}{where}")
            figures.append(Figure(f"{title}{where}", panel.about, tuple(legend), svg))
    return figures


def judged_figures(judged: Mapping[str, Any]) -> list[Figure]:
    """The charts of a reward model's report, as summary.json holds it under `held_out`."""
    figures = []
    dots = [
        Dot(part["confidence"], part["right"], part["comparisons"])
        for part in judged.get("calibration") or ()
    ]
    if dots:
        about = "how often it is right against how sure it is; the larger, the more comparisons"
        svg = draw_calibration(dots, "Calibration")
        legend = (Entry(0, "calibration error", say(judged.get("ece"), "share")),)
        figures.append(Figure("Calibration", about, legend, svg))
    for key, title, about in (
        ("by_length_ratio", "Accuracy by length", "tokens of the chosen over the rejected answer"),
        ("by_difference", "Accuracy by certainty", "quarters by how far apart the scores are"),
    ):
        bars = [
            Bar(_short(part["name"]), part["accuracy"], part["comparisons"])
            for part in judged.get(key) or ()
        ]
        if bars:
            figures.append(Figure(title, about, (), draw_bars(bars, title)))
    return figures


def _short(name: str) -> str:
    return name.removesuffix(" quarter").replace("below ", "< ").replace("above ", "> ")
