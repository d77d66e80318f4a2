"""Statistics and warnings about a dataset, shown before training.

Typical problems of preference data are counted: a correlation between length and preference, pairs
that are nearly identical, pairs that also occur in reverse order, and validation prompts that also
occur in training. One example is shown as the model sees it.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mlx_align.data.chat_template import Thinking
from mlx_align.data.formats import ReadReport
from mlx_align.data.provenance import Lineage, judges_of
from mlx_align.data.tokenization import TokenizeReport, percentiles
from mlx_align.types import PromptGroup, TokenIds, TokenizedGroup

# Completions that share this fraction of their tokens, in any order, are nearly identical.
NEAR_IDENTICAL = 0.9

_WIDTH = 96
_MAX_EXAMPLE_CHARACTERS = 260
# Completions may start with the same words as a prompt shorter than this ("The …").
_MIN_REPEATED_PROMPT = 8


class TokenizedDataset(NamedTuple):
    """The tokenised data of a run.

    Attributes:
        train: Groups to train on.
        valid: Held-out groups.
        statistics: Statistics of the training split.
        valid_fraction: The fraction that was held out; None if the data has a valid split.
    """

    train: list[TokenizedGroup]
    valid: list[TokenizedGroup]
    statistics: DatasetStatistics
    valid_fraction: float | None = None


@dataclass(frozen=True, slots=True)
class DatasetStatistics:
    """Statistics of a split. `dataclasses.asdict` of it can be written as JSON.

    Attributes:
        read_as: The line about the format; empty if unknown.
        rows: Rows of the split, including dropped ones.
        groups: Groups that were kept.
        completions: Completions of the kept groups.
        tokens: Tokens of the kept groups; a prompt is counted once.
        scored_tokens: Completion tokens that are in the loss.
        prompt_lengths: Percentiles, "50", "90", "99", "100" → tokens.
        completion_lengths: Percentiles, as for prompts.
        dropped: Number of rows dropped while reading and tokenising, by reason.
        cut_completions: Completions cut to `max_completion_length`.
        boundary_moved: Groups whose prompt, rendered alone, is not a prefix of prompt and
            completion.
        end_appended: Groups whose completions got an EOS appended.
        thinking_off: Groups rendered with the template's thinking off.
        system_folded: Groups whose system turn was moved into the first user turn.
        pairs: Kept groups of two completions; the next five fields are about these.
        chosen_longer: Fraction of pairs whose chosen completion has more tokens; None without
            pairs.
        rejected_longer: Fraction of pairs whose rejected completion has more tokens.
        near_identical: Pairs whose completions share 90% of their tokens.
        contradictions: Pairs that also occur with chosen and rejected swapped.
        scores_disagree: Pairs in which the rejected completion has the higher score.
        prompt_repeated: Groups of strings whose completions all start with the prompt, so that the
            model would see it twice.
        duplicates: Groups equal to an earlier one.
        valid_groups: Groups of the valid split, if given.
        valid_overlap: Groups of the valid split whose prompt is also in this split.
        notes: Sentences about the tokenizer.
        example: The first kept group as the model sees it, with special tokens: the prompt, then
            each completion.
        reasoning_dropped: Groups with reasoning that the chat template leaves out.
        reasoning_removed: Groups whose reasoning was removed because of `--thinking off`.
        text_dropped: Groups with other text that the chat template leaves out.
        max_positions: The longest sequence that the model was made for, tokens, if known.
        beyond_positions: Kept groups that are longer.
        judges: The judges that labelled the rows: their lineage by name.
    """

    read_as: str
    rows: int
    groups: int
    completions: int
    tokens: int
    scored_tokens: int
    prompt_lengths: Mapping[str, int]
    completion_lengths: Mapping[str, int]
    dropped: Mapping[str, int]
    cut_completions: int
    boundary_moved: int
    end_appended: int
    thinking_off: int
    system_folded: int
    pairs: int
    chosen_longer: float | None
    rejected_longer: float | None
    near_identical: int
    contradictions: int
    scores_disagree: int
    prompt_repeated: int
    duplicates: int
    valid_groups: int | None
    valid_overlap: int | None
    notes: tuple[str, ...]
    example: tuple[str, ...]
    reasoning_dropped: int = 0
    reasoning_removed: int = 0
    text_dropped: int = 0
    max_positions: int | None = None
    beyond_positions: int = 0
    judges: Mapping[str, Lineage] = field(default_factory=dict)


def compute_statistics(
    groups: Sequence[PromptGroup],
    tokenized: Sequence[TokenizedGroup],
    report: TokenizeReport,
    tokenizer: Any,
    *,
    read_report: ReadReport | None = None,
    valid: Sequence[PromptGroup] | None = None,
    max_positions: int | None = None,
) -> DatasetStatistics:
    """Compute the statistics of a split.

    Args:
        groups: The groups, as read.
        tokenized: The groups kept by `tokenize_groups`.
        report: The report of `tokenize_groups`.
        tokenizer: Decodes the example.
        read_report: The report of the reader: the format and the dropped rows.
        valid: Groups of the valid split, to count prompts that are in both.
        max_positions: The model's `max_position_embeddings`, to count longer groups.
    """
    pairs = [group.completions for group in tokenized if len(group.completions) == 2]
    longer = [len(chosen) - len(rejected) for chosen, rejected in pairs]
    seen = Counter((group.prompt, group.completions) for group in groups)
    flipped = sum(
        count
        for (prompt, texts), count in seen.items()
        if len(texts) == 2 and (prompt, texts[::-1]) in seen
    )
    read_dropped = read_report.dropped if read_report is not None else {}
    prompts = {group.prompt for group in groups}
    return DatasetStatistics(
        read_as=str(read_report) if read_report is not None else "",
        rows=len(groups) + sum(read_dropped.values()),
        groups=len(tokenized),
        completions=sum(len(group.completions) for group in tokenized),
        tokens=sum(len(g.prompt) + sum(map(len, g.completions)) for g in tokenized),
        scored_tokens=sum(_loss_tokens(group) for group in tokenized),
        prompt_lengths=percentiles([len(group.prompt) for group in tokenized]),
        completion_lengths=percentiles([len(c) for g in tokenized for c in g.completions]),
        dropped=dict(Counter(read_dropped) + Counter(report.dropped)),
        cut_completions=report.cut_completions,
        boundary_moved=report.boundary_moved,
        end_appended=report.end_appended,
        thinking_off=report.thinking_off,
        system_folded=report.system_folded,
        pairs=len(pairs),
        chosen_longer=sum(d > 0 for d in longer) / len(longer) if longer else None,
        rejected_longer=sum(d < 0 for d in longer) / len(longer) if longer else None,
        near_identical=sum(token_overlap(*pair) >= NEAR_IDENTICAL for pair in pairs),
        contradictions=flipped,
        scores_disagree=sum(
            group.scores is not None
            and len(group.completions) == 2
            and group.scores[0] < group.scores[1]
            for group in groups
        ),
        prompt_repeated=sum(map(_repeats_prompt, groups)),
        duplicates=sum(seen.values()) - len(seen),
        valid_groups=len(valid) if valid is not None else None,
        valid_overlap=sum(g.prompt in prompts for g in valid) if valid is not None else None,
        notes=report.notes,
        example=_example(tokenized[0], tokenizer) if tokenized else (),
        reasoning_dropped=report.reasoning_dropped,
        reasoning_removed=report.reasoning_removed,
        text_dropped=report.text_dropped,
        max_positions=max_positions,
        beyond_positions=sum(
            max_positions is not None
            and len(group.prompt) + max(map(len, group.completions), default=0) > max_positions
            for group in tokenized
        ),
        judges=judges_of(groups),
    )


def token_overlap(one: TokenIds, other: TokenIds) -> float:
    """The fraction of the longer completion's tokens that are also in the other, in [0, 1]."""
    ids, counts = np.unique(one, return_counts=True)
    other_ids, other_counts = np.unique(other, return_counts=True)
    _, mine, theirs = np.intersect1d(ids, other_ids, assume_unique=True, return_indices=True)
    shared = np.minimum(counts[mine], other_counts[theirs]).sum()
    return float(shared) / max(len(one), len(other), 1)


def trained_thinking(thinking: Thinking, statistics: Mapping[str, Any]) -> Thinking:
    """The way in which most completions of a run's data were rendered, to sample in the same way.

    Args:
        thinking: The run's option.
        statistics: A `DatasetStatistics` as JSON, or {} if unknown.

    Returns:
        "off" for "auto" if more than half of the groups were rendered with thinking off; else
        the option.
    """
    groups, off = statistics.get("groups"), statistics.get("thinking_off")
    if thinking == "auto" and isinstance(groups, int) and isinstance(off, int) and 2 * off > groups:
        return "off"
    return thinking


def render_statistics(statistics: DatasetStatistics) -> str:
    """The statistics as text for one screen; warnings start with "!"."""
    lines = [statistics.read_as] if statistics.read_as else []
    kind = "pairs" if statistics.pairs == statistics.groups and statistics.pairs else "rows"
    lines.append(
        f"{statistics.groups:,} {kind} kept of {statistics.rows:,} to train on, "
        f"{statistics.tokens:,} tokens "
        f"({statistics.scored_tokens:,} in the loss)"
        + (f"; {statistics.valid_groups:,} held out" if statistics.valid_groups else "")
    )
    for name, lengths in (
        ("prompts", statistics.prompt_lengths),
        ("completions", statistics.completion_lengths),
    ):
        if lengths:
            lines.append(
                f"{name + ':':<13}median {lengths['50']} tokens, 90% up to {lengths['90']}, "
                f"99% up to {lengths['99']}, longest {lengths['100']}"
            )
    if statistics.dropped:
        lines.append(
            "dropped: " + ", ".join(f"{n:,} {why}" for why, n in statistics.dropped.items())
        )
    if statistics.chosen_longer is not None and statistics.rejected_longer is not None:
        chosen, rejected = statistics.chosen_longer, statistics.rejected_longer
        which, rate = ("longer", chosen) if chosen >= rejected else ("shorter", rejected)
        mark = "! " if rate > 0.55 else ""
        lines.append(f"{mark}the {which} completion is chosen in {rate:.0%} of the pairs")
    warnings = (
        ("truncated completions, without an end token", statistics.cut_completions),
        ("rows whose prompt is not a prefix of prompt and completion", statistics.boundary_moved),
        ("pairs with nearly identical completions", statistics.near_identical),
        ("pairs that also occur with chosen and rejected swapped", statistics.contradictions),
        ("pairs whose scores prefer the rejected completion", statistics.scores_disagree),
        ("rows that repeat the prompt in their completions", statistics.prompt_repeated),
        ("duplicate rows", statistics.duplicates),
        ("rows with reasoning that the chat template leaves out", statistics.reasoning_dropped),
        ("rows with text that the chat template leaves out", statistics.text_dropped),
        (
            f"rows longer than the model's max_position_embeddings ({statistics.max_positions})",
            statistics.beyond_positions,
        ),
    )
    lines += [f"! {what}: {count:,}" for what, count in warnings if count]
    if statistics.valid_overlap:
        lines.append(
            f"! validation rows whose prompt is also in train: {statistics.valid_overlap:,} of "
            f"{statistics.valid_groups:,}"
        )
    remarks = (
        ("rows with an end token appended", statistics.end_appended),
        (
            "rows rendered with the template's thinking off (use the model with it off too)",
            statistics.thinking_off,
        ),
        ("rows whose reasoning --thinking off removed", statistics.reasoning_removed),
        ("rows with the system turn moved into the first user turn", statistics.system_folded),
    )
    lines += [f"{what}: {count:,}" for what, count in remarks if count]
    lines += [f"! {note}" for note in statistics.notes]
    wrapped = [
        part for line in lines for part in textwrap.wrap(line, _WIDTH, subsequent_indent="    ")
    ]
    return "\n".join([*wrapped, *_render_example(statistics)])


def _repeats_prompt(group: PromptGroup) -> bool:
    prompt = group.prompt
    return (
        isinstance(prompt, str)
        and len(prompt) >= _MIN_REPEATED_PROMPT
        and bool(group.completions)
        and all(isinstance(text, str) and text.startswith(prompt) for text in group.completions)
    )


def _loss_tokens(group: TokenizedGroup) -> int:
    if group.loss_masks is not None:
        return sum(int(mask.sum()) for mask in group.loss_masks)
    return sum(map(len, group.completions))


def _example(group: TokenizedGroup, tokenizer: Any) -> tuple[str, ...]:
    return tuple(str(tokenizer.decode(ids.tolist())) for ids in (group.prompt, *group.completions))


def _render_example(statistics: DatasetStatistics) -> list[str]:
    if not statistics.example:
        return []
    names = {2: ("completion",), 3: ("chosen", "rejected")}.get(len(statistics.example), ())
    # Of ranked lists, show only the best and the worst completion.
    texts = (
        statistics.example
        if len(statistics.example) <= 3
        else (*statistics.example[:2], statistics.example[-1])
    )
    lines = []
    for name, text in zip(("prompt", *(names or ("best", "worst"))), texts, strict=False):
        # Wrap by characters, not by words: a space at the boundary has to be visible.
        shown, width = f"⟦{one_line_preview(text)}⟧", _WIDTH - 11
        chunks = [shown[i : i + width] for i in range(0, len(shown), width)]
        lines += [f"{name:<11}{chunks[0]}", *(" " * 11 + chunk for chunk in chunks[1:])]
    return lines


def one_line_preview(text: str, limit: int = _MAX_EXAMPLE_CHARACTERS) -> str:
    r"""Text on one line: control characters are escaped (`\n`), long text is cut in the middle."""
    if len(text) > limit:
        half = (limit - 3) // 2
        text = f"{text[:half]} … {text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
