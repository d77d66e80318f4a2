"""Evaluations as text for the terminal; each number comes with an explanation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlx_align.evaluation.metrics import BestOf, Divergence, Perplexity, Preferences, WinRate
from mlx_align.evaluation.policy import Evaluation
from mlx_align.evaluation.reward_model import AccuracyBin, PairReport, RewardReport
from mlx_align.system.intervals import Estimate, mean_interval

Format = Callable[[float], str]

_NO_PAIRS = "Held-out pairs: none in the data, so no accuracy (give pairs with --data)."
_NO_REWARD_MODEL = "Win rate: not measured; it needs a judge, --reward-model."


def render_evaluation(found: Evaluation) -> str:
    """Format an evaluation to fit one screen; ranges are 95% intervals over prompts."""
    parts = [
        f"{found.run} against {found.reference}\n"
        f"rows: {found.data}; ranges are 95% intervals over prompts",
        _NO_PAIRS if found.preferences is None else _preferences(found.preferences),
        _divergence(found.divergence),
        _NO_REWARD_MODEL if found.wins is None else _win_rate(found.wins, str(found.judge)),
    ]
    if len(found.best_of) > 1:
        by = "the implicit reward" if found.judge is None else found.judge
        parts.append(_best_of(found.best_of, by))
    if found.perplexity is not None:
        parts.append(_perplexity(found.perplexity))
    if found.warnings:
        parts.append("\n".join(f"! {warning}" for warning in found.warnings))
    return "\n\n".join(parts)


def _preferences(one: Preferences) -> str:
    rows = [
        ("", "reference", "policy", "95%"),
        (
            "prefers the chosen (own log-prob)",
            _rate(one.reference_accuracy.value),
            *_value_and_interval(one.accuracy, _rate),
        ),
        (
            "log-prob margin, nats",
            _signed(one.reference_margin.value),
            *_value_and_interval(one.margin, _signed),
        ),
        (
            "prefers the chosen (implicit reward)",
            "",
            *_value_and_interval(one.reward_accuracy, _rate),
        ),
        (f"reward margin (β = {one.beta:g})", "", *_value_and_interval(one.reward_margin, _signed)),
        ("log-prob of chosen, change, nats", "", *_value_and_interval(one.chosen_change, _signed)),
        (
            "log-prob of rejected, change, nats",
            "",
            *_value_and_interval(one.rejected_change, _signed),
        ),
    ]
    table = _table(f"{one.pairs:,} pairs of {one.prompts:,} prompts", rows)
    return (
        f"{table}\n"
        "  own log-prob: the completion more likely under the model; implicit reward: the one that "
        "training made more likely"
    )


def _divergence(one: Divergence) -> str:
    ends = ""
    if one.standard_error is not None:
        found = mean_interval(one.per_answer, one.standard_error, one.prompts)
        ends = f" ({found.low:z.2f} to {found.high:z.2f})"
    return (
        f"KL from the reference: {one.per_answer:z.2f}{ends} nats per answer, "
        f"{one.per_token:.4f} per token\n"
        f"  how far the policy has moved; {one.answers:,} of its answers to {one.prompts:,} "
        "prompts at temperature 1"
    )


def _win_rate(one: WinRate, judge: str) -> str:
    controlled = "can't be estimated: all lengths differ by the same amount"
    if one.length_controlled is not None:
        equal_length = one.length_controlled
        controlled = f"{_rate(equal_length.value)} ({_interval(equal_length, _rate)})"
    unscored = f"; {one.unjudged} prompts could not be scored" if one.unjudged else ""
    return "\n".join(
        [
            f"Win rate against the reference: {_rate(one.rate.value)} "
            f"({_interval(one.rate, _rate)}), "
            f"{one.ties:.0%} ties; judge: {judge}",
            f"  at equal length: {controlled}; answers have {one.length:.0f} tokens, the "
            f"reference's {one.reference_length:.0f}",
            f"  score: {one.reward:+.3f}, the reference's {one.reference_reward:+.3f}, gain "
            f"{one.reward_gain.value:+.3f} ({_interval(one.reward_gain, _signed)})",
            f"  {one.prompts:,} prompts, {one.answers // one.prompts} answers each: a true rate "
            f"within {100 * one.detectable:.1f} points of 50% may go undetected "
            f"(80% power, 5%){unscored}",
        ]
    )


def _best_of(curve: Sequence[BestOf], by: str) -> str:
    rows = [("best of", "score", "gain", "95%", "KL at most")]
    for one in _select_rows(curve):
        gain = ("", "") if one.n == 1 else _value_and_interval(one.gain, _signed)
        rows.append((f"{one.n}", f"{one.score.value:+.3f}", *gain, f"{one.kl_at_most:.2f}"))
    return _table(f"Keeping the best of n answers, by {by}", rows)


def _select_rows(curve: Sequence[BestOf]) -> list[BestOf]:
    """All rows of a curve of up to 8 values of n; else the powers of two and the last."""
    last = len(curve)
    return [one for one in curve if last <= 8 or one.n & (one.n - 1) == 0 or one.n == last]


def _perplexity(one: Perplexity) -> str:
    return (
        f"Perplexity on the text, over the reference's: × {one.ratio.value:.4f} "
        f"({one.ratio.low:.4f} to {one.ratio.high:.4f})\n"
        f"  what alignment cost on other text: {one.reference_nats_per_token:.4f} → "
        f"{one.nats_per_token:.4f} nats per token, {one.tokens:,} tokens of {one.documents:,} "
        "documents"
    )


def _table(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [title]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  " + "  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _value_and_interval(one: Estimate, format_number: Format) -> tuple[str, str]:
    return format_number(one.value), _interval(one, format_number)


def _interval(one: Estimate, format_number: Format) -> str:
    return f"{format_number(one.low)} to {format_number(one.high)}"


def _rate(value: float) -> str:
    return f"{value:.1%}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def render_reward_report(found: RewardReport) -> str:
    """Format a reward model's report to fit one screen."""
    shorter = found.accuracy_shorter_chosen
    temperature = found.temperature
    lines = [
        f"accuracy {found.accuracy:.1%} (95%: {found.accuracy_low:.1%} to "
        f"{found.accuracy_high:.1%}) on {found.comparisons:,} held-out comparisons",
        f'  "pick the longer" gets {found.longer_accuracy:.1%} of them',
        f"  where the shorter is chosen: {_percent(shorter)} of {found.shorter_chosen:,}",
        "  by difference of the scores: " + _format_bins(found.by_difference),
        "  by length, chosen over rejected: " + _format_bins(found.by_length_ratio),
        f"calibration error {found.ece:.1%}"
        + (
            "; no temperature fits"
            if temperature is None or found.ece_at_temperature is None
            else f"; {found.ece_at_temperature:.1%} at the fitted temperature {temperature:.2f}"
            + (" (overconfident)" if temperature > 1.2 else "")
            + (" (underconfident)" if temperature < 1 / 1.2 else "")
        ),
        f"correlation of score and length: {_correlation(found.length_correlation)} over all "
        f"completions, {_correlation(found.length_correlation_within)} within prompts",
    ]
    return "\n".join(lines + [f"! {warning}" for warning in found.warnings])


def _format_bins(parts: Sequence[AccuracyBin]) -> str:
    return ", ".join(f"{part.name} {_percent(part.accuracy)}" for part in parts if part.comparisons)


def _percent(value: float | None) -> str:
    return "–" if value is None else _rate(value)


def _correlation(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def render_pair_report(found: PairReport) -> str:
    """Format a report on pairs."""
    return (
        f"accuracy {found.accuracy:.1%} (95%: {found.accuracy_low:.1%} to "
        f"{found.accuracy_high:.1%}) on {found.comparisons:,} pairs\n"
        f'  "pick the longer" gets {found.longer_accuracy:.1%} of them\n'
        f"margin {found.margin:+.4g} (95%: {found.margin_low:+.4g} to {found.margin_high:+.4g})"
    )
