"""The verdict on a run: one sentence with an interval and the number of held-out examples.

The terminal prints it at the end of a run, and the run page begins with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mlx_align.system.formatting import format_value
from mlx_align.system.intervals import Estimate, mean_difference, rate_difference, wilson_interval
from mlx_align.tracking.diagnostics import diagnose
from mlx_align.tracking.run_dir import RunRecord

Kind = Literal["better", "no difference", "worse", "overfitted", "not trained", "unknown"]

# Signals of the findings that indicate overfitting.
_OVERFITTING = frozenset({"rewards/accuracies", "eval/loss"})
# Smallest relative change of a perplexity that counts. There is no interval: only means are known.
_PERPLEXITY_CHANGE = 0.01


@dataclass(frozen=True)
class Verdict:
    """The result of a run on held-out data.

    Attributes:
        kind: better, no difference (that is significant), worse, overfitted, not trained, or
            unknown (no held-out data).
        sentence: The verdict in words, for terminal and page.
        estimate: The number behind it, with its 95% interval; None if unknown.
        n: Number of held-out examples; None if unknown.
    """

    kind: Kind
    sentence: str
    estimate: Estimate | None = None
    n: int | None = None


def verdict(record: RunRecord) -> Verdict:
    """The verdict on one run, from its folder."""
    report = record.summary.get("held_out")
    if isinstance(report, Mapping) and report.get("accuracy") is not None:
        return _reward_model_verdict(report)
    if record.step == 0:
        return Verdict("not trained", "Not trained yet: no update has been made.")
    skipped = record.last("skipped") or record.summary.get("skipped") or 0
    if skipped >= record.step and record.command not in ("ppo", "grpo"):
        return Verdict("not trained", f"Not trained: all {record.step:,} updates were skipped.")
    found = (
        _rate_verdict(record)
        or _reward_verdict(record)
        or _perplexity_verdict(record)
        or _without_held_out(record)
    )
    overfits = any(finding.signal in _OVERFITTING for finding in diagnose(record))
    if not overfits or found.kind == "unknown":
        return found
    sentence = f"{found.sentence.removesuffix('.')}, and the model overfits its training data."
    return Verdict("overfitted", sentence, found.estimate, found.n)


def held_out_examples(record: RunRecord) -> int | None:
    """Number of held-out examples in each evaluation; None if the files don't tell.

    Runs write it as `eval_examples`. For runs of older versions it follows from the size of the
    held-out data and from --val-batches.
    """
    for source in (record.summary, record.status):
        count = source.get("eval_examples")
        if isinstance(count, int) and count > 0:
            return count
    kl = record.summary.get("kl")
    if record.command in ("ppo", "grpo"):
        return kl.get("samples") if isinstance(kl, Mapping) else None
    available = record.data_statistics.get("valid_groups")
    batches, size = record.config.get("val_batches"), record.config.get("batch_size")
    if not isinstance(available, int) or available < 1:
        return None
    if batches == -1:
        return available
    if isinstance(batches, int | float) and isinstance(size, int):
        return max(1, min(available, round(batches * size)))
    return None


class _Rate(NamedTuple):
    """A held-out rate that decides a verdict.

    Attributes:
        what: The middle of the sentence.
        unit: The examples: pairs or completions.
        value: The last value.
        baseline: The value without training.
        baseline_name: The baseline in words.
    """

    what: str
    unit: str
    value: float
    baseline: float
    baseline_name: str


def _rate(record: RunRecord) -> _Rate | None:
    key = "eval/rewards/accuracies"
    values, margins = record.values(key), record.values("eval/rewards/margins")
    if not values or record.held_out[-1]["step"] == 0:
        return None
    if record.command == "kto":
        what, unit = "the reward has the right sign for", "completions"
    elif record.command == "reward":
        what, unit = "the reward model ranks the better completion first in", "pairs"
    else:
        what, unit = "the policy's reward prefers the chosen completion in", "pairs"
    # Implicit rewards are 0 before training, so the baseline is 50%. Rewards without a reference
    # model are not, so their baseline is the value before training.
    started = len(values) > 1 and bool(margins) and margins[0] != 0 and record.command == "dpo"
    if started and record.held_out[0]["step"] == 0:
        return _Rate(what, unit, values[-1], values[0], f"{values[0]:.0%} before training")
    return _Rate(what, unit, values[-1], 0.5, "50%")


def _rate_verdict(record: RunRecord) -> Verdict | None:
    rate, n = _rate(record), held_out_examples(record)
    if rate is None:
        return None
    if n is None:
        return Verdict(
            "unknown",
            f"On held-out {rate.unit} {rate.what} {rate.value:.0%}; their number is not recorded, "
            "so there is no interval.",
        )
    found = wilson_interval(rate.value, n)
    kind, ending = _compare(found, rate.baseline, rate.baseline_name)
    sentence = f"On {n:,} held-out {rate.unit} {rate.what} {_interval(found, n)}: {ending}."
    return Verdict(kind, sentence, found, n)


def _compare(found: Estimate, baseline: float, name: str) -> tuple[Kind, str]:
    if found.low > baseline:
        return "better", f"better than {name}"
    if found.high < baseline:
        return "worse", f"worse than {name}"
    return "no difference", f"can't be told apart from {name}"


def _interval(found: Estimate, n: int) -> str:
    value, low, high = (_percent(x, n) for x in (found.value, found.low, found.high))
    return f"{value} (95% interval {low} to {high})"


def _percent(rate: float, n: int) -> str:
    """A rate; of fewer than 100 examples without a decimal place."""
    return f"{rate:.0%}" if n < 100 or rate in (0, 1) else f"{rate:.1%}"


def _reward_model_verdict(report: Mapping[str, Any]) -> Verdict:
    low, high = report["accuracy_low"], report["accuracy_high"]
    found, n = Estimate(report["accuracy"], low, high), int(report["comparisons"])
    kind, ending = _compare(found, 0.5, "50%")
    longer = report.get("longer_accuracy")
    if longer is not None:
        versus, words = _compare(found, longer, f"choosing the longer one ({longer:.1%})")
        if kind == "better" and versus != "better":
            kind = versus
            ending += f", but {words}"
        elif kind == "better":
            ending += f" and than choosing the longer one ({longer:.1%})"
    sentence = (
        f"On {n:,} held-out comparisons the reward model ranks the better completion first in "
        f"{_interval(found, n)}: {ending}."
    )
    return Verdict(kind, sentence, found, n)


def _reward_verdict(record: RunRecord) -> Verdict | None:
    """The verdict by held-out rewards of an on-policy run, at the start and now."""
    name = "held_out" if record.values("eval/held_out") else "reward"
    rows = [row for row in record.held_out if f"eval/{name}" in row]
    if len(rows) < 2:
        return None
    first, last = rows[0], rows[-1]
    before, now = first[f"eval/{name}"], last[f"eval/{name}"]
    label = "held-out reward" if name == "held_out" else "reward"
    change = f"went from {format_value(before)} to {format_value(now)}"
    n = held_out_examples(record)
    spreads = [row.get(f"eval/{name}_std") for row in (first, last)]
    if n is None or spreads[0] is None or spreads[1] is None:
        return Verdict("unknown", f"On held-out prompts the mean {label} {change}.", None, n)
    found = mean_difference(now, spreads[1], before, spreads[0], n)
    kind, ending = _compare(found, 0.0, "the start")
    low, high = (_signed(value) for value in (found.low, found.high))
    sentence = (
        f"On {n:,} held-out prompts the mean {label} {change} (change {_signed(found.value)}, 95% "
        f"interval {low} to {high}): {ending}."
    )
    return Verdict(kind, sentence, found, n)


def _signed(value: float) -> str:
    return f"+{format_value(value)}" if value >= 0 else format_value(value)


def _perplexity_verdict(record: RunRecord) -> Verdict | None:
    values = record.values("eval/perplexity")
    if len(values) < 2 or values[0] <= 0:
        return None
    change = values[-1] / values[0] - 1
    kind: Kind = "better" if change < 0 else "worse"
    if abs(change) < _PERPLEXITY_CHANGE:
        kind = "no difference"
    n = held_out_examples(record)
    examples = "held-out examples" if n is None else f"{n:,} held-out examples"
    ending = {"better": "better", "worse": "worse", "no difference": "no real change"}[kind]
    sentence = (
        f"On {examples} perplexity went from {format_value(values[0])} to "
        f"{format_value(values[-1])} ({f'{change:+.1%}'.replace('-', '−')}): {ending}."
    )
    return Verdict(kind, sentence, None, n)


def _without_held_out(record: RunRecord) -> Verdict:
    reward = record.values("reward")
    if len(reward) > 1:
        now = record.recent_mean("reward")
        last = format_value(reward[-1] if now is None else now)
        return Verdict(
            "unknown",
            f"The mean reward of sampled completions went from {format_value(reward[0])} to "
            f"{last}; there are no held-out prompts to confirm it.",
        )
    reason = "no held-out evaluation so far" if record.config else "no held-out data"
    return Verdict("unknown", f"There is no verdict: {reason}.")


def compare_runs(records: Sequence[RunRecord], names: Sequence[str]) -> Verdict:
    """The verdict on several runs: the best one on held-out data, and whether that is significant.

    Compares the two best of the largest group of runs that measure the same rate.
    """
    verdicts = [verdict(record) for record in records]
    groups: dict[tuple[str, str], list[tuple[Verdict, str]]] = {}
    for record, name, found in zip(records, names, verdicts, strict=True):
        rate = _rate(record)
        if rate is not None and found.estimate is not None:
            groups.setdefault((rate.what, rate.unit), []).append((found, name))
    (what, unit), known = max(groups.items(), key=lambda item: len(item[1]), default=(("", ""), []))
    if len(known) < 2:
        return Verdict("unknown", "These runs have no held-out rate in common to compare.")
    (best, name), (second, other) = sorted(known, key=lambda one: -_value(one[0]))[:2]
    assert best.estimate is not None
    assert second.estimate is not None
    difference = rate_difference(best.estimate, second.estimate)
    n = min(best.n or 1, second.n or 1)
    counts = f"{n:,}" if best.n == second.n else f"{best.n:,} and {second.n:,}"
    clear = difference.low > 0
    points = [f"{100 * x:+.0f}".replace("-", "−") for x in (difference.low, difference.high)]
    ending = f"{name} is better" if clear else "they can't be told apart"
    sentence = (
        f"On {counts} held-out {unit} {what} {best.estimate.value:.0%} ({name}) and "
        f"{second.estimate.value:.0%} ({other}); the difference is "
        f"{100 * difference.value:.0f} points (95% interval {points[0]} to {points[1]}): {ending}."
    )
    return Verdict("better" if clear else "no difference", sentence, difference, n)


def _value(found: Verdict) -> float:
    return found.estimate.value if found.estimate is not None else 0.0
