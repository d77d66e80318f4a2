"""Numbers, durations, dates and rows of metrics as text for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime

from mlx_align.system.intervals import AUC, metric_interval, prompts_of


def format_value(value: float | None, unit: str = "") -> str:
    """A metric's value with about three digits and its unit.

    Args:
        value: The value; None is shown as a dash.
        unit: "share" (shown in percent), "bytes", "tokens/s", or a word to append, such as "nats".
    """
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


def counted(count: int, noun: str) -> str:
    """A number with its noun: 1 pair, 2 pairs, 1,200 pairs."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def format_duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours, rounded for planning."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def format_date(written: object) -> str:
    """An ISO 8601 date as "24 November 2026, 20:05"; empty if `written` is not a date."""
    try:
        when = datetime.fromisoformat(str(written))
    except ValueError:
        return ""
    return f"{when.day} {when:%B %Y, %H:%M}"


def format_metrics(row: Mapping[str, float], examples: int | None = None) -> str:
    """A row of training or held-out metrics as one line for the terminal.

    Args:
        row: The metrics.
        examples: Number of held-out examples, to show 95% intervals; None for training metrics.
    """

    def ends(name: str, pattern: str) -> str:
        """The interval of a metric in parentheses, or ""."""
        found = metric_interval(row, name, examples)
        if found is None:
            return ""
        return f" ({pattern.format(found.low)} to {pattern.format(found.high)})"

    parts = []
    if "reward" in row:
        parts += _format_rollout_metrics(row, ends)
    elif "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if AUC in row:
        parts.append(f"AUC {row[AUC]:.0%}{ends(AUC, '{:.0%}')}")
    if "rewards/accuracies" in row:
        parts.append(
            f"accuracy {row['rewards/accuracies']:.0%}{ends('rewards/accuracies', '{:.0%}')}"
        )
        parts.append(f"margin {row['rewards/margins']:+z.3f}{ends('rewards/margins', '{:+z.3f}')}")
    if "perplexity" in row:
        parts.append(f"perplexity {row['perplexity']:.3f}{ends('perplexity', '{:.3f}')}")
    if row.get("tokens_per_second"):
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{row['peak_memory_bytes'] / 1e9:.2f} GB")
    if examples is not None:
        parts.append(format_count(row, examples))
    return ", ".join(parts)


def format_count(metrics: Mapping[str, float], examples: int) -> str:
    """The number of held-out examples, with that of their prompts where several have the same."""
    prompts = prompts_of(metrics)
    return f"n = {examples:,}" + ("" if prompts is None else f" of {prompts:,} prompts")


def _format_rollout_metrics(row: Mapping[str, float], ends: Callable[[str, str], str]) -> list[str]:
    reward = row["reward"]
    shown = f"reward {reward:+z.3f}{ends('reward', '{:+z.3f}')}"
    parts = [shown if math.isfinite(reward) else "no rewards"]
    if "held_out" in row:
        parts.append(f"held-out reward {row['held_out']:+z.3f}{ends('held_out', '{:+z.3f}')}")
    if "objective/kl" in row:
        parts.append(f"KL {row['objective/kl']:z.2f}")
    if "value/explained_variance" in row:
        parts.append(f"critic explains {row['value/explained_variance']:.0%}")
    if "completions/mean_length" in row:
        parts.append(f"{row['completions/mean_length']:.0f} tokens each")
        parts.append(f"{row['completions/ended']:.0%} ended")
    return parts
