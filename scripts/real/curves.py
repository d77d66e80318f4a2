"""Curves of reward against KL: their published forms, fitted, and drawings of them as SVG.

Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization": with d = √KL, the gold reward is
R(d) = d(α − β·d) under best-of-n and R(d) = d(α − β·ln d) under reinforcement learning.
"""

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 20, 52
STYLE = """
    .card { fill: #fbfbfd; stroke: #d9dbe3; }
    .grid { stroke: #e3e5ec; stroke-width: 1; }
    .zero { stroke: #9aa1b5; stroke-width: 1.2; }
    text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
    text { fill: #1f2430; }
    .c0 { stroke: #3d52c4; fill: #3d52c4; } .c1 { stroke: #c2500a; fill: #c2500a; }
    .c2 { stroke: #18805a; fill: #18805a; } .c3 { stroke: #8a3fa8; fill: #8a3fa8; }
    .line { fill: none; stroke-width: 2; } .dashed { stroke-dasharray: 6 4; }
    .bar { stroke-width: 1.2; } .hollow { fill: #fbfbfd; stroke-width: 1.6; }
    @media (prefers-color-scheme: dark) {
      .card { fill: #1f222b; stroke: #3a3f4d; }
      .grid { stroke: #323642; } .zero { stroke: #7c8499; }
      text { fill: #e6e8ef; }
      .c0 { stroke: #93a2ff; fill: #93a2ff; } .c1 { stroke: #ffa366; fill: #ffa366; }
      .c2 { stroke: #5fd3a4; fill: #5fd3a4; } .c3 { stroke: #d7a0ee; fill: #d7a0ee; }
      .line { fill: none; } .hollow { fill: #1f222b; }
    }"""


class Fit(NamedTuple):
    """A fitted curve.

    Attributes:
        alpha: Slope at the start, gold standard deviations per √nat.
        beta: How fast the gain is lost.
        peak: d = √KL of its maximum; inf if it has none.
        best: The curve's value there.
        farthest: The largest d that was measured.
        error: Root mean square of the residuals.
        curve: The value at d.
    """

    alpha: float
    beta: float
    peak: float
    best: float
    farthest: float
    error: float
    curve: Callable[[Floats], Floats]


def fit_best_of(d: Floats, reward: Floats) -> Fit:
    """R(d) = d(α − β·d), by least squares."""
    return _fit(d, reward, lambda x: x, lambda alpha, beta: alpha / (2 * beta))


def fit_rl(d: Floats, reward: Floats) -> Fit:
    """R(d) = d(α − β·ln d), by least squares."""
    return _fit(d, reward, np.log, lambda alpha, beta: math.exp(alpha / beta - 1))


def _fit(
    d: Floats,
    reward: Floats,
    form: Callable[[Floats], Floats],
    top: Callable[[float, float], float],
) -> Fit:
    d, reward = (np.asarray(values, np.float64) for values in (d, reward))
    if (d <= 0).any():
        raise ValueError("a KL of 0 or less has no place on the curve")
    columns = np.stack([d, -d * form(d)], axis=1)
    alpha, beta = map(float, np.linalg.lstsq(columns, reward, rcond=None)[0])

    def curve(x: Floats) -> Floats:
        x = np.asarray(x, np.float64)
        return x * (alpha - beta * form(x))

    # The exponent is bounded: an almost straight line has its maximum far from any measurement.
    has_peak = beta > 0 and alpha / beta < 100
    peak = top(alpha, beta) if has_peak else math.inf
    best = float(curve(np.array(peak))) if has_peak else math.inf
    error = float(np.sqrt(np.mean((curve(d) - reward) ** 2)))
    return Fit(alpha, beta, peak, best, float(d.max()), error, curve)


class Series(NamedTuple):
    """What a drawing shows of one method.

    Attributes:
        name: For the legend.
        x: Horizontal positions.
        y: Values.
        half: Half of each interval; None for none.
        colour: 0 to 3.
        hollow: Whether the points are hollow.
        points: Whether there are points.
        line: "", "solid" or "dashed".
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float] | None = None
    colour: int = 0
    hollow: bool = False
    points: bool = True
    line: str = ""


def ticks(low: float, high: float) -> list[float]:
    """About six round numbers from low to high."""
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def draw(title: str, description: str, x_name: str, y_name: str, series: Sequence[Series]) -> str:
    """A drawing with axes and a legend, as SVG; legible on light and dark pages."""
    across = [x for one in series for x in one.x]
    up = [
        y + sign * h
        for one in series
        for y, h in zip(one.y, one.half or [0.0] * len(one.y), strict=True)
        for sign in (-1, 1)
    ]
    right, low, high = max(across) * 1.03, min(0.0, *up), max(up)
    low, high = low - 0.04 * (high - low), high + 0.06 * (high - low)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * x / right,
            HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (y - low) / (high - low),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + 26 * len(series)}"'
        ' role="img" aria-labelledby="title description">',
        f'  <title id="title">{html.escape(title)}</title>',
        f'  <desc id="description">{html.escape(description)}</desc>',
        f"  <style>{STYLE}\n  </style>",
        f'  <rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" '
        f'height="{HEIGHT + 26 * len(series) - 1}" rx="8"/>',
    ]
    for x in ticks(0, right):
        across_at, bottom = at(x, low)
        parts.append(f'  <path class="grid" d="M{across_at:.1f} {TOP}V{bottom:.1f}"/>')
        parts.append(
            f'  <text x="{across_at:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{x:g}</text>'
        )
    for y in ticks(low, high):
        _, up_at = at(0, y)
        kind = "zero" if abs(y) < 1e-9 else "grid"
        parts.append(f'  <path class="{kind}" d="M{LEFT} {up_at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'  <text x="{LEFT - 8}" y="{up_at + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'  <text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">'
        f"{html.escape(x_name)}</text>"
    )
    parts.append(
        f'  <text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_name)}</text>"
    )
    for k, one in enumerate(series):
        parts += _drawn(one, at)
        y = HEIGHT + 26 * k + 10
        parts += _drawn(
            one._replace(x=[0, 1], y=[0, 0], half=None), lambda x, _, y=y: (24 + 28 * x, y)
        )
        parts.append(f'  <text x="64" y="{y + 4}">{html.escape(one.name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _drawn(one: Series, at: Callable[[float, float], tuple[float, float]]) -> list[str]:
    """The line, intervals and points of a series."""
    colour, parts = f"c{one.colour}", []
    places = [at(x, y) for x, y in zip(one.x, one.y, strict=True)]
    if one.line:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        dashed = " dashed" if one.line == "dashed" else ""
        parts.append(f'  <path class="{colour} line{dashed}" d="M{path}"/>')
    if one.half:
        for x, y, half in zip(one.x, one.y, one.half, strict=True):
            (left, top), (_, bottom) = at(x, y + half), at(x, y - half)
            parts.append(f'  <path class="{colour} bar" d="M{left:.1f} {top:.1f}V{bottom:.1f}"/>')
    if one.points:
        kind = f"{colour} hollow" if one.hollow else colour
        parts += [f'  <circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places]
    return parts
