"""Tables of the page: statistics of the data, a reward model's report, samples, all metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_align.system.formatting import format_value
from mlx_align.tracking.run_dir import RunRecord

Pairs = list[tuple[str, str]]

# Statistics of the data by their names in summary.json; zeros are not shown.
_COUNTS = (
    ("rows", "rows read"),
    ("groups", "groups kept"),
    ("completions", "completions"),
    ("tokens", "tokens"),
    ("scored_tokens", "tokens in the loss"),
    ("valid_groups", "held-out groups"),
    ("valid_overlap", "held-out prompts that also occur in the training data"),
    ("cut_completions", "completions truncated"),
    ("boundary_moved", "prompts that tokenize differently with their completion"),
    ("end_appended", "completions with an end token added"),
    ("thinking_off", "groups rendered with thinking turned off"),
    ("system_folded", "system messages merged into the user's"),
    ("reasoning_dropped", "groups with reasoning that the chat template leaves out"),
    ("reasoning_removed", "groups whose reasoning was removed (thinking off)"),
    ("text_dropped", "groups with text that the chat template leaves out"),
    ("beyond_positions", "groups longer than the model's max_position_embeddings"),
    ("near_identical", "pairs with nearly identical completions"),
    ("contradictions", "pairs that occur with chosen and rejected swapped"),
    ("scores_disagree", "pairs whose scores favour the rejected completion"),
    ("prompt_repeated", "completions that begin with the prompt"),
    ("duplicates", "duplicates"),
)


def data_rows(statistics: Mapping[str, Any]) -> Pairs:
    """Statistics of the training data."""
    if not statistics:
        return []
    rows: Pairs = []
    if statistics.get("read_as"):
        rows.append(("format", str(statistics["read_as"]).removeprefix("read as: ")))
    rows += [(label, f"{statistics[key]:,}") for key, label in _COUNTS if statistics.get(key)]
    for key, label in (("prompt_lengths", "prompt"), ("completion_lengths", "completion")):
        lengths = statistics.get(key) or {}
        if lengths:
            shown = f"{lengths.get('50'):,} median, {lengths.get('100'):,} maximum"
            rows.append((f"tokens per {label}", shown))
    longer, shorter = statistics.get("chosen_longer"), statistics.get("rejected_longer")
    if longer is not None and shorter is not None:
        shown = f"chosen in {longer:.0%}, rejected in {shorter:.0%} of the pairs"
        rows.append(("longer completion", shown))
    rows += [(f"dropped: {why}", f"{n:,}") for why, n in (statistics.get("dropped") or {}).items()]
    rows += [("note", str(note)) for note in statistics.get("notes") or ()]
    return rows


def reward_report_rows(report: Mapping[str, Any]) -> Pairs:
    """A reward model's report."""
    if report.get("accuracy") is None:
        return []
    shorter = report.get("accuracy_shorter_chosen")
    low, high = (format_value(report[f"accuracy_{end}"], "share") for end in ("low", "high"))
    rows = [
        ("accuracy", f"{format_value(report['accuracy'], 'share')} (95% interval {low} to {high})"),
        ("comparisons", f"{report['comparisons']:,}"),
        ("choosing the longer one gets", format_value(report["longer_accuracy"], "share")),
        (
            "accuracy if the shorter one is chosen",
            f"{format_value(shorter, 'share')} of {report['shorter_chosen']:,}",
        ),
        ("calibration error", format_value(report["ece"], "share")),
    ]
    if report.get("temperature") is not None:
        at = format_value(report.get("ece_at_temperature"), "share")
        rows.append(("at the fitted temperature", f"{at} at {report['temperature']:.2f}"))
    for key, label in (
        ("length_correlation", "correlation of score and length"),
        ("length_correlation_within", "the same within prompts"),
    ):
        if report.get(key) is not None:
            rows.append((label, f"{report[key]:+.2f}".replace("-", "−")))
    members = report.get("members") or {}
    if members.get("accuracies"):
        shown = ", ".join(format_value(accuracy, "share") for accuracy in members["accuracies"])
        rows.append(("single members", shown))
    return rows


def sample_rows(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A row of samples.jsonl as a prompt and its completions: before and after, or with scores."""
    sides = []
    if isinstance(sample.get("completions"), list):
        parts = [part for part in sample["completions"] if isinstance(part, dict)]
        scores = [part.get("score") for part in parts]
        best = max((s for s in scores if isinstance(s, int | float)), default=None)
        for part, score in zip(parts, scores, strict=True):
            shown = (
                f"score {format_value(score)}" if isinstance(score, int | float) else "completion"
            )
            kind = "best" if best is not None and score == best else ""
            sides.append({"name": shown, "text": str(part.get("text", "")), "kind": kind})
    else:
        for name, value in sample.items():
            if name not in ("source", "prompt", "messages"):
                sides.append({"name": str(name), "text": option_text(value), "kind": str(name)})
    for side in sides:
        side["text"] = side["text"] if side["text"].strip() else "(nothing)"
        side["kind"] = side["kind"] if side["kind"] in ("best", "after") else ""
    return {
        "source": str(sample.get("source", "")),
        "prompt": prompt_text(sample.get("messages", sample.get("prompt"))).strip("\n"),
        "sides": sides,
    }


def rollout_rows(rollouts: Sequence[Mapping[str, Any]], prompts: int, each: int) -> list[Any]:
    """The last completions of some prompts, best first, in the format of `sample_rows`."""
    by_prompt: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rollouts:
        key = (str(row.get("source", "")), prompt_text(row.get("prompt")))
        by_prompt.setdefault(key, []).append(row)
    shown = []
    for (source, prompt), rows in list(by_prompt.items())[:prompts]:
        ranked = sorted(rows, key=_reward, reverse=True)
        selected = ranked if len(ranked) <= each else [*ranked[: each - 1], ranked[-1]]
        completions = [
            {"text": str(row.get("completion", "")), "score": row.get("reward")} for row in selected
        ]
        shown.append(sample_rows({"source": source, "prompt": prompt, "completions": completions}))
    return shown


def _reward(row: Mapping[str, Any]) -> float:
    reward = row.get("reward")
    return reward if isinstance(reward, int | float) else float("-inf")


def prompt_text(prompt: Any) -> str:
    """A prompt as text; of messages, each with its role."""
    if isinstance(prompt, list) and all(isinstance(turn, Mapping) for turn in prompt):
        if len(prompt) == 1:
            return str(prompt[0].get("content", ""))
        return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in prompt)
    return option_text(prompt)


def metric_rows(record: RunRecord) -> list[list[str]]:
    """The first and last value of every metric, on training and on held-out data.

    Standard deviations are left out: they are there for intervals.
    """
    keys = dict.fromkeys(
        key.removeprefix("eval/")
        for row in (*record.training, *record.held_out)
        for key in row
        if key != "step" and not key.endswith("_std")
    )
    rows = []
    for key in keys:
        unit = {"peak_memory_bytes": "bytes", "tokens_per_second": "tokens/s"}.get(key, "")
        ends = []
        for values in (record.values(key), record.values(f"eval/{key}")):
            ends += (
                [format_value(values[0], unit), format_value(values[-1], unit)]
                if values
                else ["", ""]
            )
        rows.append([key, *ends])
    return rows


def option_text(value: Any) -> str:
    """A value of an option as text."""
    if value is None or value in ({}, []):
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={option_text(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(option_text(part) for part in value)
    return str(value)
