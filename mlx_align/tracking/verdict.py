"""The verdict on a run: one sentence with an interval and the number of held-out examples.

The terminal prints it at the end of a run, and the run page begins with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, cast

from mlx_align.system.formatting import counted, format_value
from mlx_align.system.intervals import (
    Estimate,
    mean_difference,
    metric_interval,
    prompts_of,
    rate_difference,
    wilson_interval,
)
from mlx_align.tracking.diagnostics import (
    MIN_EXAMPLES,
    PERPLEXITY_CHANGE,
    RISING_LOSS,
    Finding,
    diagnose,
    moved_on_held_out,
    unmoved,
)
from mlx_align.tracking.run_dir import RunRecord, held_out_examples

Kind = Literal[
    "better",
    "no difference",
    "worse",
    "not trained",
    "overfitted",
    "at risk",
    "broken",
    "unknown",
]

# Signals of the findings that indicate overfitting.
_OVERFITTING = frozenset({"rewards/accuracies", "eval/loss"})
_ENTROPY = "objective/entropy"
# Signals of the findings that indicate text unlike what the policy began with, at level "stop".
_BREAKAGE = frozenset(
    {
        "kl",
        "answers",
        "objective/kl",
        _ENTROPY,
        "text/repeated_4grams",
        "text/distinct_2",
    }
)


@dataclass(frozen=True)
class Verdict:
    """The result of a run on held-out data.

    Attributes:
        kind: better, no difference (that is significant), worse, not trained (the policy answers
            as before), overfitted, at risk (better, but log-probs fall or length explains it),
            broken (text unlike that of the start), or unknown (no held-out data).
        sentence: The verdict in words, for terminal and page.
        estimate: The number behind it, with its 95% interval; None if unknown.
        n: Number of held-out examples; None if unknown.
    """

    kind: Kind
    sentence: str
    estimate: Estimate | None = None
    n: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The verdict for summary.json."""
        return asdict(self)


def verdict(record: RunRecord) -> Verdict:
    """The verdict on one run, from its folder."""
    steps = record.step or record.summary.get("steps") or 0
    if steps == 0:
        return Verdict("not trained", "Not trained yet: no update has been made.")
    skipped = record.last("skipped") or record.summary.get("skipped") or 0
    if skipped >= steps and record.command not in ("ppo", "grpo"):
        return Verdict("not trained", f"Not trained: all {steps:,} updates were skipped.")
    found = (
        _reward_model_verdict(record)
        or _rate_verdict(record)
        or _reward_verdict(record)
        or _perplexity_verdict(record)
        or _without_held_out(record)
    )
    findings = diagnose(record)
    for kind, reason in (
        ("broken", _breakage(found, findings)),
        ("not trained", _untrained(record, findings)),
        ("overfitted", _overfitting(record, findings)),
        ("at risk", _risk(record, found, findings)),
    ):
        if not reason or (found.kind == "unknown" and kind in ("overfitted", "at risk")):
            continue
        # The problem comes first, so that a good number is read with it.
        result = found.sentence
        if kind == "not trained" and found.kind == "better":
            result = f"{result.rpartition(':')[0]}, by differences too small to change an answer."
        sentence = reason if found.kind == "unknown" else f"{reason} {result}"
        return Verdict(cast(Kind, kind), sentence, found.estimate, found.n)
    return found


def _breakage(found: Verdict, findings: Sequence[Finding]) -> str:
    """Why the policy's text is broken, or ""."""
    # A policy that has found the one right answer is sure of it: its held-out reward tells.
    signals = _BREAKAGE - {_ENTROPY} if found.kind == "better" else _BREAKAGE
    broken = [one for one in findings if one.level == "stop" and one.signal in signals]
    return f"Broken: {_lower_first(broken[0].problem)}" if broken else ""


def _untrained(record: RunRecord, findings: Sequence[Finding]) -> str:
    """How the policy is the same as before training, or ""."""
    if any(row["before"] != row["after"] for row in record.samples if "before" in row):
        return ""
    found = next((finding for finding in findings if finding.untrained), None)
    if found is None:
        early = unmoved(record)
        return "" if early is None else f"Not trained yet: {_lower_first(early.problem)}"
    reason = found.problem
    if found.signal != "samples":
        # "Nothing was learned: the loss …". Losses without noise may be equal in every row of a run
        # that moves.
        if moved_on_held_out(record):
            return ""
        reason = reason.partition(": ")[2]
    return f"Not trained: {_lower_first(reason)} {found.advice}"


def _overfitting(record: RunRecord, findings: Sequence[Finding]) -> str:
    """How the run overfitted, or ""."""
    kept, losses = record.kept_step, record.values("eval/loss")
    past_best = kept is not None and 0 < kept < record.step
    if past_best and losses:
        lowest = record.kept_evaluation.get("eval/loss", losses[-1])
        past_best = losses[-1] > lowest + (RISING_LOSS - 1) * abs(lowest)
    shown = [finding for finding in findings if finding.signal in _OVERFITTING]
    if not past_best and not shown:
        return ""
    if kept is not None and kept < record.step:
        return (
            f"Overfitted: the result is best after update {kept:,} of {record.step:,}, and that "
            "adapter is kept."
        )
    if not shown:
        return "Overfitted: the held-out loss rose."
    return f"Overfitted: {_lower_first(shown[0].problem.removesuffix(': the model overfits.'))}."


def _risk(record: RunRecord, found: Verdict, findings: Sequence[Finding]) -> str:
    """Why a better result may not be a better policy, or ""."""
    if found.kind != "better":
        return ""
    sure = next((one for one in findings if one.signal == _ENTROPY), None)
    if sure is not None:
        return f"At risk: {_lower_first(sure.problem)}"
    if record.command not in ("dpo", "kto"):
        return ""
    if any(finding.signal == "logps/chosen" for finding in findings):
        return "At risk: the log-probs of chosen completions fell; read the answers."
    length = next((one for one in findings if one.signal == "chosen_longer"), None)
    return "" if length is None else f"At risk: {_lower_first(length.problem)}"


def _lower_first(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


class _Rate(NamedTuple):
    """A held-out rate that decides a verdict.

    Attributes:
        name: The metric.
        what: The middle of the sentence.
        unit: An example: pair or completion.
        value: The last value.
        baseline: The value without training.
        baseline_name: The baseline in words.
    """

    name: str
    what: str
    unit: str
    value: float
    baseline: float
    baseline_name: str


def _rate(record: RunRecord) -> _Rate | None:
    key = record.rate_key
    values, margins = record.values(key), record.values("eval/rewards/margins")
    kept = record.kept_evaluation
    if key not in kept or kept["step"] == 0:
        return None
    if record.command == "kto":
        what, unit = "a good one has a higher reward than a bad one in", "completion"
    elif record.command == "reward":
        what, unit = "the reward model ranks the better completion first in", "pair"
    else:
        what, unit = "the policy's reward prefers the chosen completion in", "pair"
    # Implicit rewards are 0 before training, so the baseline is 50%. Rewards without a reference
    # model are not, so their baseline is the value before training.
    started = len(values) > 1 and bool(margins) and margins[0] != 0 and record.command == "dpo"
    if started and record.held_out[0]["step"] == 0:
        return _Rate(key, what, unit, kept[key], values[0], f"{values[0]:.0%} before training")
    return _Rate(key, what, unit, kept[key], 0.5, "50%")


def _rate_verdict(record: RunRecord) -> Verdict | None:
    rate, n = _rate(record), held_out_examples(record)
    if rate is None:
        return None
    if n is None:
        return Verdict(
            "unknown",
            f"On held-out {rate.unit}s {rate.what} {rate.value:.0%}; their number is not recorded, "
            "so there is no interval.",
        )
    kept = record.kept_evaluation
    found = metric_interval(kept, rate.name, n) or wilson_interval(rate.value, n)
    prompts = prompts_of(kept)
    kind, ending = _compare(found, rate.baseline, rate.baseline_name, prompts or n)
    examples = counted(n, f"held-out {rate.unit}")
    if prompts is not None:
        examples += f" of {counted(prompts, 'prompt')}"
    sentence = f"On {examples} {rate.what} {_interval(found, n)}: {ending}."
    return Verdict(kind, sentence, found, n)


def _compare(found: Estimate, baseline: float, name: str, n: int) -> tuple[Kind, str]:
    if n < MIN_EXAMPLES:
        return "no difference", f"too few to tell it from {name}"
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


def _reward_model_verdict(record: RunRecord) -> Verdict | None:
    """The verdict by a reward model's report on all held-out comparisons."""
    report = record.summary.get("held_out")
    if not isinstance(report, Mapping) or report.get("accuracy") is None:
        return None
    low, high = report["accuracy_low"], report["accuracy_high"]
    found, n = Estimate(report["accuracy"], low, high), int(report["comparisons"])
    kind, ending = _compare(found, 0.5, "50%", n)
    longer = report.get("longer_accuracy")
    if longer is not None:
        versus, words = _compare(found, longer, f"choosing the longer one ({longer:.1%})", n)
        if kind == "better" and versus != "better":
            kind = versus
            ending += f", but {words}"
        elif kind == "better":
            ending += f" and than choosing the longer one ({longer:.1%})"
    sentence = (
        f"On {counted(n, 'held-out comparison')} the reward model ranks the better completion "
        f"first in {_interval(found, n)}: {ending}."
    )
    return Verdict(kind, sentence, found, n)


def _reward_verdict(record: RunRecord) -> Verdict | None:
    """The verdict by held-out rewards of an on-policy run, at the start and now."""
    name = "held_out" if record.values("eval/held_out") else "reward"
    rows = [row for row in record.held_out if f"eval/{name}" in row]
    if len(rows) < 2:
        return None
    first, last = rows[0], rows[-1]
    if f"eval/{name}" in record.kept_evaluation:
        last = record.kept_evaluation
    before, now = first[f"eval/{name}"], last[f"eval/{name}"]
    label = "held-out reward" if name == "held_out" else "reward"
    change = f"went from {format_value(before)} to {format_value(now)}"
    n = held_out_examples(record)
    spreads = [row.get(f"eval/{name}_std") for row in (first, last)]
    if n is None or spreads[0] is None or spreads[1] is None:
        return Verdict("unknown", f"On held-out prompts the mean {label} {change}.", None, n)
    found = mean_difference(now, spreads[1], before, spreads[0], n)
    kind, ending = _compare(found, 0.0, "the start", n)
    low, high = (_signed(value) for value in (found.low, found.high))
    sentence = (
        f"On {counted(n, 'held-out prompt')} the mean {label} {change} (change "
        f"{_signed(found.value)}, 95% interval {low} to {high}): {ending}."
    )
    return Verdict(kind, sentence, found, n)


def _signed(value: float) -> str:
    return f"+{format_value(value)}" if value >= 0 else format_value(value)


def _perplexity_verdict(record: RunRecord) -> Verdict | None:
    values = record.values("eval/perplexity")
    if len(values) < 2 or values[0] <= 0:
        return None
    now = record.kept_evaluation.get("eval/perplexity", values[-1])
    change = now / values[0] - 1
    kind: Kind = "better" if change < 0 else "worse"
    if abs(change) < PERPLEXITY_CHANGE:
        kind = "no difference"
    n = held_out_examples(record)
    examples = "held-out examples" if n is None else counted(n, "held-out example")
    report = record.summary.get("held_out")
    if n is not None and isinstance(report, Mapping) and "perplexity" in report:
        ratio = Estimate(**report["perplexity"]["ratio"])
        gain = Estimate(-ratio.value, -ratio.high, -ratio.low)  # a lower perplexity is better
        kind, ending = _compare(gain, -1.0, "the start", n)
        sentence = (
            f"On {examples} perplexity went from {format_value(values[0])} to "
            f"{format_value(now)} (× {ratio.value:.2f}, 95% interval {ratio.low:.2f} to "
            f"{ratio.high:.2f}): {ending}."
        )
        return Verdict(kind, sentence, ratio, n)
    ending = {"better": "better", "worse": "worse", "no difference": "no real change"}[kind]
    sentence = (
        f"On {examples} perplexity went from {format_value(values[0])} to "
        f"{format_value(now)} ({f'{change:+.1%}'.replace('-', '−')}): {ending}."
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

    Compares the two best of the largest group of runs that measure the same rate on the same data.
    Losses without a reference are in another group than those with one: both are measured by the
    implicit reward, which only the latter are trained on. A run that is broken or not trained, or
    that has too few examples, is never the better one.
    """
    verdicts = [verdict(record) for record in records]
    groups: dict[tuple[str, ...], list[tuple[Verdict, str, int]]] = {}
    for record, name, found in zip(records, names, verdicts, strict=True):
        rate = _rate(record)
        if rate is not None and found.estimate is not None:
            data, free = str(record.config.get("data")), str(_is_reference_free(record))
            key = rate.what, rate.unit, data, free, str(record.config.get("ld_alpha"))
            size = prompts_of(record.kept_evaluation) or found.n or 1
            groups.setdefault(key, []).append((found, name, size))
    (what, unit, *_), known = max(
        groups.items(), key=lambda item: len(item[1]), default=(("", ""), [])
    )
    if len(known) < 2:
        sentence = "These runs have no held-out rate on the same data in common to compare."
        if len({key[:3] for key in groups}) < len(groups):
            sentence = (
                "These runs are not compared: losses with and without a reference, or with another "
                "--ld-alpha, are trained on different rewards. mlx-align eval with --reward-model "
                "compares their answers."
            )
        return Verdict("unknown", sentence)
    (best, name, size), (second, other, other_size) = sorted(
        known, key=lambda one: -_value(one[0])
    )[:2]
    assert best.estimate is not None
    assert second.estimate is not None
    difference = rate_difference(best.estimate, second.estimate)
    n = min(best.n or 1, second.n or 1)
    examples = counted(n, f"held-out {unit}")
    if best.n != second.n:
        examples = f"{best.n:,} and {second.n:,} held-out {unit}s"
    clear = difference.low > 0
    points = [f"{100 * x:+.0f}".replace("-", "−") for x in (difference.low, difference.high)]
    ending = f"{name} is better" if clear else "they can't be told apart"
    if min(size, other_size) < MIN_EXAMPLES:
        ending, clear = "too few to tell which is better", False
    for one, its_name in ((best, name), (second, other)):
        if clear and one.kind in ("broken", "not trained"):
            ending, clear = f"but {its_name} is {one.kind}", False
    sentence = (
        f"On {examples} {what} {best.estimate.value:.0%} ({name}) and "
        f"{second.estimate.value:.0%} ({other}); the difference is "
        f"{100 * difference.value:.0f} points (95% interval {points[0]} to {points[1]}): {ending}."
    )
    return Verdict("better" if clear else "no difference", sentence, difference, n)


def _is_reference_free(record: RunRecord) -> bool:
    """Whether a `dpo` run's loss has no reference: then its training rows have no rewards."""
    keys = record.training_keys
    return "logps/chosen" in keys and "rewards/chosen" not in keys


def _value(found: Verdict) -> float:
    return found.estimate.value if found.estimate is not None else 0.0
