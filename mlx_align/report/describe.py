"""Tables of a page: what is in the data, what a reward model is worth, what was sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_align.report.numbers import say
from mlx_align.report.runs import RunFacts

Pairs = list[tuple[str, str]]

# Facts of the data by their names in summary.json; those that are 0 are left out.
_COUNTS = (
    ("rows", "rows read"),
    ("groups", "groups kept"),
    ("completions", "completions"),
    ("tokens", "tokens"),
    ("scored_tokens", "tokens that count in the loss"),
    ("valid_groups", "held-out groups"),
    ("valid_overlap", "held-out prompts that are in the training data too"),
    ("cut_completions", "completions cut to the longest allowed"),
    ("boundary_moved", "prompts that render otherwise alone"),
    ("end_appended", "completions that got their end token"),
    ("thinking_off", "groups rendered with thinking off"),
    ("system_folded", "system turns folded into the user's"),
    ("near_identical", "pairs whose answers are nearly identical"),
    ("contradictions", "pairs that stand the other way round too"),
    ("scores_disagree", "pairs whose scores prefer the rejected answer"),
    ("prompt_repeated", "completions that begin with the prompt"),
    ("duplicates", "duplicates"),
)


def data_rows(facts: Mapping[str, Any]) -> Pairs:
    """What is known of the training data, for people."""
    if not facts:
        return []
    rows: Pairs = []
    if facts.get("read_as"):
        rows.append(("format", str(facts["read_as"]).removeprefix("read as: ")))
    rows += [(label, f"{facts[key]:,}") for key, label in _COUNTS if facts.get(key)]
    for key, label in (("prompt_lengths", "prompt"), ("completion_lengths", "completion")):
        lengths = facts.get(key) or {}
        if lengths:
            shown = f"{lengths.get('50'):,} in the middle, {lengths.get('100'):,} the longest"
            rows.append((f"tokens of a {label}", shown))
    longer, shorter = facts.get("chosen_longer"), facts.get("rejected_longer")
    if longer is not None and shorter is not None:
        shown = f"the chosen in {longer:.0%}, the rejected in {shorter:.0%} of the pairs"
        rows.append(("which answer is longer", shown))
    rows += [(f"dropped: {why}", f"{n:,}") for why, n in (facts.get("dropped") or {}).items()]
    rows += [("note", str(note)) for note in facts.get("notes") or ()]
    return rows


def judged_rows(judged: Mapping[str, Any]) -> Pairs:
    """A reward model's report, for people."""
    if judged.get("accuracy") is None:
        return []
    shorter = judged.get("accuracy_shorter_chosen")
    interval = f"{say(judged['accuracy_low'], 'share')} to {say(judged['accuracy_high'], 'share')}"
    rows = [
        ("accuracy", f"{say(judged['accuracy'], 'share')} (95%: {interval})"),
        ("comparisons", f"{judged['comparisons']:,}"),
        ("“pick the longer” gets", say(judged["longer_accuracy"], "share")),
        (
            "accuracy where the shorter is chosen",
            f"{say(shorter, 'share')} of {judged['shorter_chosen']:,}",
        ),
        ("calibration error", say(judged["ece"], "share")),
    ]
    if judged.get("temperature") is not None:
        at = say(judged.get("ece_at_temperature"), "share")
        rows.append(("at the fitted temperature", f"{at} at {judged['temperature']:.2f}"))
    for key, label in (
        ("length_correlation", "correlation of score and length"),
        ("length_correlation_within", "the same within prompts"),
    ):
        if judged.get(key) is not None:
            rows.append((label, f"{judged[key]:+.2f}".replace("-", "−")))
    members = judged.get("members") or {}
    if members.get("accuracies"):
        shown = ", ".join(say(accuracy, "share") for accuracy in members["accuracies"])
        rows.append(("members alone", shown))
    return rows


def sample_rows(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A row of samples.jsonl as prompt and sides: before and after, scored, or whatever it has."""
    sides = []
    if isinstance(sample.get("completions"), list):
        parts = [part for part in sample["completions"] if isinstance(part, dict)]
        scores = [part.get("score") for part in parts]
        best = max((s for s in scores if isinstance(s, int | float)), default=None)
        for part, score in zip(parts, scores, strict=True):
            shown = f"score {say(score)}" if isinstance(score, int | float) else "completion"
            kind = "best" if best is not None and score == best else ""
            sides.append({"name": shown, "text": str(part.get("text", "")), "kind": kind})
    else:
        for name, value in sample.items():
            if name not in ("source", "prompt"):
                sides.append({"name": str(name), "text": option_text(value), "kind": str(name)})
    for side in sides:
        side["kind"] = side["kind"] if side["kind"] in ("best", "after") else ""
    return {
        "source": str(sample.get("source", "")),
        "prompt": prompt_text(sample.get("prompt")).strip("\n"),
        "sides": sides,
    }


def rollout_rows(rollouts: Sequence[Mapping[str, Any]], prompts: int, each: int) -> list[Any]:
    """What was said last to some prompts, best first: as `sample_rows` has it."""
    by_prompt: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rollouts:
        key = (str(row.get("source", "")), prompt_text(row.get("prompt")))
        by_prompt.setdefault(key, []).append(row)
    shown = []
    for (source, prompt), rows in list(by_prompt.items())[:prompts]:
        ranked = sorted(rows, key=_earned, reverse=True)
        chosen = ranked if len(ranked) <= each else [*ranked[: each - 1], ranked[-1]]
        completions = [
            {"text": str(row.get("completion", "")), "score": row.get("reward")} for row in chosen
        ]
        shown.append(sample_rows({"source": source, "prompt": prompt, "completions": completions}))
    return shown


def _earned(row: Mapping[str, Any]) -> float:
    reward = row.get("reward")
    return reward if isinstance(reward, int | float) else float("-inf")


def prompt_text(prompt: Any) -> str:
    """A prompt for people: text as it stands, of messages who says what."""
    if isinstance(prompt, list) and all(isinstance(turn, Mapping) for turn in prompt):
        if len(prompt) == 1:
            return str(prompt[0].get("content", ""))
        return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in prompt)
    return option_text(prompt)


def number_rows(run: RunFacts) -> list[list[str]]:
    """Every metric: its first and last value, on training and on held-out data."""
    keys = dict.fromkeys(
        key.removeprefix("eval/")
        for row in (*run.training, *run.held_out)
        for key in row
        if key != "step"
    )
    rows = []
    for key in keys:
        unit = {"peak_memory_bytes": "bytes", "tokens_per_second": "tokens/s"}.get(key, "")
        ends = []
        for values in (run.values(key), run.values(f"eval/{key}")):
            ends += [say(values[0], unit), say(values[-1], unit)] if values else ["", ""]
        rows.append([key, *ends])
    return rows


def option_text(value: Any) -> str:
    """A value of a configuration, as one would type it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={option_text(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(option_text(part) for part in value)
    return str(value)
