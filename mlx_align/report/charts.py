"""Charts as SVG that stands inside the page, drawn by matplotlib where it is installed.

Colours go through matplotlib as stand-ins and come out as the page's CSS variables, so that one
drawing serves light and dark. Text stays text, in the page's font. Bytes depend on the input
alone. What a pointer shows over a chart is `<title>`s of invisible bands: no script.
"""

from __future__ import annotations

import io
import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup, escape

from mlx_align.report.numbers import say, tick_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXTRA = 'pip install "mlx-align[report]"'
# Points of a line; more are averaged. A chart is about 380 pixels wide.
MOST_POINTS = 400
# From so many points on, a line is their running mean, with themselves faint behind.
SMOOTHED = 40
BANDS = 60
COLOURS = 8

_WIDTH, _HEIGHT = 360, 206
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 38
_INKS = ("ink", "muted", "rule", "warn", *(f"c{i + 1}" for i in range(COLOURS)))
# Colours nothing else has, by the variable each stands for.
_STAND_IN = {name: f"#0a0b{i + 1:02x}" for i, name in enumerate(_INKS)}


class Line(NamedTuple):
    """One curve: `x` and `y` of equal length, `colour` counts from 0."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    held_out: bool = False


class Axis(NamedTuple):
    """What the axes say, and whether long lines are smoothed; see `panels.Panel`."""

    name: str = "update"
    unit: str = ""
    level: float | None = None
    bounds: tuple[float, float] | None = None
    smooth: bool = True


class Bar(NamedTuple):
    """One bar: its name, a share (None where there is nothing to count), and of how many."""

    name: str
    share: float | None
    comparisons: int


class Dot(NamedTuple):
    """A bin of a calibration chart: mean confidence, how often right, of how many."""

    confidence: float
    right: float
    comparisons: int


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_lines(lines: Sequence[Line], axis: Axis, name: str, fallen: Line | None = None) -> Markup:
    """Lines over a common horizontal axis.

    Args:
        lines: What to draw, each with at least one point.
        axis: What the axes say.
        name: For readers that see no pictures; also what sets the drawing's ids apart.
        fallen: A line of them to mark where it is below its first value.
    """
    with _canvas(name) as (axes, figure):
        for line in lines:
            _draw_line(axes, line, axis.smooth)
        points = [value for line in lines for value in line.y]
        low, high = axis.bounds or (min(points), max(points))
        pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
        axes.set_ylim(low - pad, high + pad)
        places = [value for line in lines for value in line.x]
        left, right = min(places), max(places)
        margin = 0.03 * (right - left) or 0.5
        axes.set_xlim(left - margin, right + margin)
        if axis.level is not None and low - pad <= axis.level <= high + pad:
            axes.axhline(axis.level, color=_STAND_IN["muted"], lw=0.8, dashes=(3, 3), zorder=1)
        if fallen is not None:
            first = fallen.y[0]
            axes.axhline(first, color=_STAND_IN["warn"], lw=0.9, dashes=(2, 2), zorder=1)
            x, y = _thinned(fallen.x, fallen.y)
            below = [min(value, first) for value in y]
            axes.fill_between(x, below, first, color=_STAND_IN["warn"], alpha=0.18, lw=0, zorder=1)
        _tick_x(axes, left, right, axis.name)
        _tick_y(axes, axis.unit)
        return _svg(figure, name, _bands(axes, lines, axis))


def _draw_line(axes: Axes, line: Line, smooth: bool) -> None:
    colour = _STAND_IN[f"c{line.colour % COLOURS + 1}"]
    x, y = _thinned(line.x, line.y)
    if line.held_out:
        marker = "o" if len(x) <= 30 else ""
        axes.plot(x, y, color=colour, lw=1.7, marker=marker, ms=3.6, zorder=4)
    elif len(y) < SMOOTHED or not smooth:
        marker = "o" if len(x) == 1 else ""
        axes.plot(x, y, color=colour, lw=1.6, marker=marker, ms=3.6, zorder=3)
    else:
        # Along another metric than the update, lines go to and fro: only their mean is a line.
        sorts = all(a <= b for a, b in pairwise(x))
        alone = {"lw": 0.9} if sorts else {"lw": 0, "marker": "o", "ms": 2.6, "mew": 0}
        axes.plot(x, y, color=colour, alpha=0.28, zorder=2, **alone)
        width = max(3, len(y) // 20)
        means = x if sorts else _running_mean(x, width), _running_mean(y, width)
        axes.plot(*means, color=colour, lw=1.7, zorder=3)


def draw_bars(bars: Sequence[Bar], name: str, level: float = 0.5) -> Markup:
    """Shares side by side, each with its count."""
    with _canvas(name) as (axes, figure):
        for i, bar in enumerate(bars):
            if bar.share is not None:
                axes.bar(i, bar.share, width=0.64, color=_STAND_IN["c1"], alpha=0.85, zorder=3)
                text: dict[str, Any] = {"color": _STAND_IN["ink"], "ha": "center", "fontsize": 9.5}
                axes.text(i, bar.share + 0.025, f"{bar.share:.0%}", **text)
        axes.axhline(level, color=_STAND_IN["muted"], lw=0.8, dashes=(3, 3), zorder=4)
        axes.set_xlim(-0.6, len(bars) - 0.4)
        axes.set_ylim(0, 1.08)
        axes.set_xticks(range(len(bars)), [f"{bar.name}\n{bar.comparisons:,}" for bar in bars])
        _tick_y(axes, "share")
        return _svg(figure, name, "")


def draw_calibration(dots: Sequence[Dot], name: str) -> Markup:
    """How often a model is right against how sure it is; on the diagonal it knows itself."""
    with _canvas(name) as (axes, figure):
        most = max(dot.comparisons for dot in dots)
        axes.plot([0.5, 1], [0.5, 1], color=_STAND_IN["muted"], lw=0.9, dashes=(3, 3), zorder=2)
        x, y = [dot.confidence for dot in dots], [dot.right for dot in dots]
        axes.plot(x, y, color=_STAND_IN["c1"], lw=1.2, alpha=0.5, zorder=3)
        area = [12 + 150 * dot.comparisons / most for dot in dots]
        axes.scatter(x, y, s=area, color=_STAND_IN["c1"], alpha=0.85, lw=0, zorder=4)
        low = min(0.5, *y)
        axes.set_xlim(0.47, 1.03)
        axes.set_ylim(low - 0.06, 1.06)
        axes.set_xticks(
            [0.5, 0.6, 0.7, 0.8, 0.9, 1], tick_labels([0.5, 0.6, 0.7, 0.8, 0.9, 1], "share")
        )
        axes.set_xlabel("how sure it is", fontsize=9.5, color=_STAND_IN["muted"], labelpad=3)
        _tick_y(axes, "share")
        hits = []
        for dot in dots:
            left, top = _place(axes, dot.confidence, dot.right)
            said = f"{dot.comparisons:,} at {dot.confidence:.0%}: {dot.right:.0%} right"
            hits.append(
                f'<circle class="hit" cx="{left}" cy="{top}" r="9"><title>{said}</title></circle>'
            )
        return _svg(figure, name, "".join(hits))


@contextmanager
def _canvas(name: str) -> Iterator[tuple[Axes, Any]]:
    """Axes of a new figure, and the figure; drawn and saved within it, whatever the user's style.

    `name` sets the ids of this drawing apart from others of the page.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": name})
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72)
        FigureCanvasSVG(figure)
        box = (
            _LEFT / _WIDTH,
            _BOTTOM / _HEIGHT,
            (_WIDTH - _LEFT - _RIGHT) / _WIDTH,
            (_HEIGHT - _TOP - _BOTTOM) / _HEIGHT,
        )
        axes = figure.add_axes(box)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_STAND_IN["rule"])
        axes.grid(axis="y", color=_STAND_IN["rule"], lw=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=9.5, labelcolor=_STAND_IN["muted"], pad=5)
        yield axes, figure


def _tick_x(axes: Axes, left: float, right: float, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    whole = name == "update"
    located = MaxNLocator(5, integer=whole, steps=[1, 2, 5, 10]).tick_values(left, right)
    ticks = [float(t) for t in located if left <= t <= right] or [left]
    axes.set_xticks(ticks, tick_labels(ticks, ""))
    axes.set_xlabel(name, fontsize=9.5, color=_STAND_IN["muted"], labelpad=3)


def _tick_y(axes: Axes, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_ylim()
    ticks = [
        float(t)
        for t in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        if low <= t <= high
    ]
    axes.set_yticks(ticks, tick_labels(ticks, unit))


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `MOST_POINTS` points: means of stretches of equal length, the last one as it is."""
    if len(x) <= MOST_POINTS:
        return list(x), list(y)
    size = -(-len(x) // MOST_POINTS)
    parts = [slice(i, i + size) for i in range(0, len(x) - 1, size)]
    thin = [[sum(values[p]) / len(values[p]) for p in parts] for values in (x, y)]
    return [*thin[0], x[-1]], [*thin[1], y[-1]]


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of up to `width` values around each; fewer at the ends, always as many on both sides."""
    smooth = []
    for i in range(len(values)):
        reach = min(width // 2, i, len(values) - 1 - i)
        part = values[i - reach : i + reach + 1]
        smooth.append(sum(part) / len(part))
    return smooth


def _place(axes: Axes, x: float, y: float) -> tuple[float, float]:
    """Where a point of the data is in the drawing."""
    across, up = axes.transData.transform((x, y))
    return round(float(across), 1), round(_HEIGHT - float(up), 1)


def _bands(axes: Axes, lines: Sequence[Line], axis: Axis) -> str:
    """Invisible bands that say, when pointed at, what the lines are there."""
    # Along another metric than the update, lines go to and fro.
    if axis.name != "update":
        return ""
    every = sorted({x for line in lines for x in line.x})
    stops = every[:: -(-len(every) // BANDS)]
    # A band reaches halfway to its neighbours.
    ends = [-math.inf, *((a + b) / 2 for a, b in pairwise(stops)), math.inf]
    edges = [_LEFT, *(_place(axes, end, 0)[0] for end in ends[1:-1]), _WIDTH - _RIGHT]
    hits = []
    for i, stop in enumerate(stops):
        said = [f"update {stop:g}"]
        for line in lines:
            near = slice(bisect_left(line.x, ends[i]), bisect_left(line.x, ends[i + 1]))
            if line.x[near]:
                value = min(
                    zip(line.x[near], line.y[near], strict=True), key=lambda p: abs(p[0] - stop)
                )
                said.append(f"{line.label}: {say(value[1], axis.unit)}")
        title = escape("\n".join(said))
        hits.append(
            f'<rect class="hit" x="{edges[i]}" y="{_TOP}" width="{edges[i + 1] - edges[i]:.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM}"><title>{title}</title></rect>'
        )
    return "".join(hits)


def _svg(figure: Any, name: str, overlay: str) -> Markup:
    """The drawing as an element of the page, its colours as variables, with `overlay` on top."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", metadata=nothing)
    text = stream.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"font-family: [^;\"]*;? ?|font: ([\d.]+px) [^;\"]*", _font, body)
    body = re.sub(r"xlink:href", "href", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", body)
    body = re.sub(r"\s*\n\s*", " ", body)
    for ink, stand_in in _STAND_IN.items():
        body = body.replace(stand_in, f"var(--{ink})")
    opened = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(name)}">'
    return Markup(opened + body.strip() + overlay + "</svg>")


def _font(found: re.Match[str]) -> str:
    return f"font-size: {found[1]}" if found[1] else ""
