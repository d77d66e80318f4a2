"""Charts as data: JSON inside the page, which the page's script draws with uPlot.

Long series are thinned before they are embedded, so that a page of a run with 20,000 rows stays
small. Extremes survive thinning; a second, averaged series carries the smoothed line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

# Points of an embedded series. A chart is about 380 pixels wide; this leaves room to zoom in.
MAX_POINTS = 1000
# Colours of the page's style sheet, --c1 to --c8.
COLOURS = 8


class Line(NamedTuple):
    """One series of a chart.

    Attributes:
        label: Its label in the legend.
        x: Horizontal values in ascending order.
        y: Vertical values, the same number.
        colour: Its colour, counting from 0.
        held_out: Whether it is of held-out data, which is drawn without smoothing.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    held_out: bool = False


@dataclass(frozen=True)
class LegendEntry:
    """One entry of a legend: a colour, a label, and the last value."""

    colour: int
    label: str
    value: str
    held_out: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart with its heading and legend.

    Attributes:
        title: Heading.
        about: A short description.
        legend: Entries in the order of the series.
        data: The data that the script draws, JSON-serialisable.
        mark: A description of what is marked in it, or "".
    """

    title: str
    about: str
    legend: tuple[LegendEntry, ...]
    data: Mapping[str, Any]
    mark: str = ""


def line_chart(
    lines: Sequence[Line],
    *,
    x_name: str,
    unit: str,
    level: float | None,
    bounds: tuple[float, float] | None,
    smooth: bool,
    fall: int | None = None,
) -> dict[str, Any]:
    """The data of a line chart.

    Args:
        lines: The series, each with at least one point.
        x_name: Name of the horizontal axis: "update", or another quantity, which makes it a
            scatter plot.
        unit: Unit of the values, as in `format_value`.
        level: A value to mark by a dashed line.
        bounds: Ends of the vertical axis; None for those of the data.
        smooth: Whether the smoothing slider applies.
        fall: Index of a line that is marked where it is below its first value.
    """
    return {
        "kind": "lines",
        "x": x_name,
        "unit": unit,
        "level": level,
        "bounds": bounds,
        "smooth": smooth,
        "fall": fall,
        "series": [_series(line, smooth and not line.held_out) for line in lines],
    }


def _series(line: Line, smooth: bool) -> dict[str, Any]:
    x, y = thin(line.x, line.y)
    series = {
        "label": line.label,
        "colour": line.colour % COLOURS + 1,
        "heldOut": line.held_out,
        "x": _rounded(x),
        "y": _rounded(y),
    }
    if smooth and len(line.x) > MAX_POINTS:
        # A smoothed line has to follow the means, not the extremes that thinning keeps.
        means = bucket_means(line.x, line.y)
        series["means"] = {"x": _rounded(means[0]), "y": _rounded(means[1])}
    return series


def _rounded(values: Sequence[float]) -> list[float]:
    """Six significant digits; whole numbers are kept as they are."""
    return [v if isinstance(v, int) else float(f"{v:.6g}") for v in values]


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `MAX_POINTS` points: the first, the last, and both extremes of every stretch."""
    n = len(x)
    if n <= MAX_POINTS:
        return list(x), list(y)
    size = math.ceil((n - 2) / ((MAX_POINTS - 2) // 2))
    kept = [0]
    for start in range(1, n - 1, size):
        stretch = range(start, min(start + size, n - 1))
        low, high = min(stretch, key=y.__getitem__), max(stretch, key=y.__getitem__)
        kept += sorted({low, high})
    kept.append(n - 1)
    return [x[i] for i in kept], [y[i] for i in kept]


def bucket_means(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most half of `MAX_POINTS` points: the means of stretches of equal length."""
    size = math.ceil(len(x) / (MAX_POINTS // 2))
    parts = [slice(i, i + size) for i in range(0, len(x), size)]
    first, second = ([sum(v[p]) / len(v[p]) for p in parts] for v in (x, y))
    return first, second


def bar_chart(
    names: Sequence[str], rates: Sequence[float | None], counts: Sequence[int]
) -> dict[str, Any]:
    """The data of a bar chart of rates, each with its number of examples."""
    labels = [f"{name}\n{count:,}" for name, count in zip(names, counts, strict=True)]
    return {"kind": "bars", "labels": labels, "y": list(rates), "level": 0.5}


def calibration_chart(
    confidence: Sequence[float], right: Sequence[float], counts: Sequence[int]
) -> dict[str, Any]:
    """The data of a calibration chart: the accuracy of a model against its confidence."""
    labels = [
        f"{count:,} at {sure:.0%}: {rate:.0%} right"
        for sure, rate, count in zip(confidence, right, counts, strict=True)
    ]
    return {
        "kind": "calibration",
        "labels": labels,
        "x": list(confidence),
        "y": list(right),
        "counts": list(counts),
    }


def embed_json(content: Any) -> str:
    """JSON that is safe inside a `<script>` element.

    Only ASCII, and no `<`, `>` or `&`: the text can't end the element, open a comment, or hold a
    line separator that JavaScript does not allow in strings.
    """
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
