"""Numbers as a reader takes them in: a few digits, and a unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise


def say(value: float | None, unit: str = "") -> str:
    """A value of a metric with its unit, three digits of it."""
    if value is None:
        return "–"
    if unit == "share":
        return f"{value:.1%}".replace("-", "−")
    if unit == "bytes":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
    if unit == "tokens/s":
        return f"{value:,.0f} tokens/s"
    return f"{_digits(value)} {unit}".strip()


def _digits(value: float) -> str:
    size = abs(value)
    if size >= 10_000:
        text = f"{value:,.0f}"
    elif size >= 100:
        text = f"{value:.0f}"
    elif size >= 1e-3 or size == 0:
        places = 3 if size < 1 else 2 if size < 10 else 1
        text = f"{value:.{places}f}"
    else:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return text.replace("-", "−")


def tick_labels(ticks: Sequence[float], unit: str) -> list[str]:
    """Labels of an axis, with as many places as tell its ticks apart."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    scale, tail = 1.0, ""
    if unit == "share":
        scale, tail = 100.0, "%"
    elif unit == "bytes":
        scale, tail = (1e-9, " GB") if largest >= 1e9 else (1e-6, " MB")
    elif largest >= 10_000:
        scale, tail = (1e-6, "M") if largest >= 2e6 else (1e-3, "k")
    elif 0 < largest < 1e-2:
        power = math.floor(math.log10(largest))
        scale, tail = 10.0**-power, f"e−{-power}"
    shown = [tick * scale for tick in ticks]
    step = min((b - a for a, b in pairwise(shown)), default=1.0)
    # 0.5 takes one place, 0.25 two.
    places = next((p for p in range(7) if abs(step - round(step, p)) < 1e-6 * abs(step)), 6)
    nothing = "0" if tail[:1] in ("k", "M", "e") else f"0{tail}"
    return [
        nothing if round(value, places) == 0 else f"{value:,.{places}f}{tail}".replace("-", "−", 1)
        for value in shown
    ]


def say_duration(seconds: float) -> str:
    """A duration, to the precision one plans with."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def say_date(written: object) -> str:
    """A date of status.json, or nothing where there is none."""
    try:
        when = datetime.fromisoformat(str(written))
    except ValueError:
        return ""
    return f"{when.day} {when:%B %Y, %H:%M}"
