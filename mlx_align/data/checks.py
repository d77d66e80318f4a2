"""What is in the data, before anything is trained on it: facts to keep, and a screen to read.

Lengths are what preference data most often teaches by accident, pairs that hardly differ teach
nothing, a pair that stands both ways round cancels itself, and prompts seen in training make
validation look better than it is. All of it is counted here, and one example is shown as the
model sees it.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_align.data.formats import Reading
from mlx_align.data.tokenize import TokenizeReport, percentiles
from mlx_align.types import PromptGroup, TokenIds, TokenizedGroup

# Two completions that share this much of their tokens, whatever the order, are near-identical.
NEAR_IDENTICAL = 0.9

_WIDTH = 96
_SHOWN = 260
# Answers may well begin with a prompt shorter than this ("The …").
_REPEATED = 8


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What is in a split, as plain values (`dataclasses.asdict` of it goes into JSON).

    Attributes:
        read_as: The line on the format, empty if not given.
        rows: Groups of this split, those dropped by reading and tokenising included.
        groups: Groups that were kept.
        completions: Completions in them.
        tokens: Tokens of the kept groups, every prompt counted once.
        scored_tokens: Tokens of their completions that count in the loss.
        prompt_lengths: Percentiles, "50", "90", "99", "100" → tokens.
        completion_lengths: The same of the completions.
        dropped: Groups dropped by reading and by tokenising, by reason.
        cut_completions: Completions cut to the longest allowed.
        boundary_moved: Groups whose prompt rendered alone isn't what the answers continue.
        end_appended: Groups whose completions got their EOS appended.
        thinking_off: Groups rendered with the template's thinking off.
        system_folded: Groups whose system turn went into the first user turn.
        pairs: Kept groups of two completions, which the next five are about.
        chosen_longer: Share of pairs whose chosen completion has more tokens; None without pairs.
        rejected_longer: Share of pairs whose rejected one has.
        near_identical: Pairs whose completions share nine tenths of their tokens.
        contradictions: Pairs that also stand the other way round.
        scores_disagree: Pairs whose scores put the rejected completion above the chosen one.
        prompt_repeated: Groups of strings whose completions all begin with the prompt, which the
            model would then see twice.
        duplicates: Groups equal to an earlier one.
        valid_groups: Groups of the valid split, if it was given.
        valid_overlap: Those of them whose prompt is in this split too.
        notes: Sentences about the tokenizer.
        example: The first kept group as the model sees it, special tokens and all: the prompt,
            then each completion.
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


def describe(
    groups: Sequence[PromptGroup],
    tokenized: Sequence[TokenizedGroup],
    report: TokenizeReport,
    tokenizer: Any,
    *,
    reading: Reading | None = None,
    valid: Sequence[PromptGroup] | None = None,
) -> DataFacts:
    """Count what is in a split.

    Args:
        groups: As read.
        tokenized: The kept ones, as `tokenize_groups` gave them.
        report: What `tokenize_groups` gave with them.
        tokenizer: Decodes the example.
        reading: What the reader gave, for its line and its dropped rows.
        valid: Groups of the valid split, to count prompts that are in both.
    """
    pairs = [group.completions for group in tokenized if len(group.completions) == 2]
    longer = [len(chosen) - len(rejected) for chosen, rejected in pairs]
    seen = Counter((group.prompt, group.completions) for group in groups)
    flipped = sum(
        count
        for (prompt, texts), count in seen.items()
        if len(texts) == 2 and (prompt, texts[::-1]) in seen
    )
    read_dropped = reading.dropped if reading is not None else {}
    prompts = {group.prompt for group in groups}
    return DataFacts(
        read_as=str(reading) if reading is not None else "",
        rows=len(groups) + sum(read_dropped.values()),
        groups=len(tokenized),
        completions=sum(len(group.completions) for group in tokenized),
        tokens=sum(len(g.prompt) + sum(map(len, g.completions)) for g in tokenized),
        scored_tokens=sum(_scored(group) for group in tokenized),
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
    )


def token_overlap(one: TokenIds, other: TokenIds) -> float:
    """The share of the longer completion's tokens that the other has too, in [0, 1]."""
    ids, counts = np.unique(one, return_counts=True)
    other_ids, other_counts = np.unique(other, return_counts=True)
    _, mine, theirs = np.intersect1d(ids, other_ids, assume_unique=True, return_indices=True)
    shared = np.minimum(counts[mine], other_counts[theirs]).sum()
    return float(shared) / max(len(one), len(other), 1)


def render_facts(facts: DataFacts) -> str:
    """The facts on one screen, what needs attention first marked with "!"."""
    lines = [facts.read_as] if facts.read_as else []
    kind = "pairs" if facts.pairs == facts.groups and facts.pairs else "rows"
    lines.append(
        f"{facts.groups:,} {kind} kept of {facts.rows:,}, {facts.tokens:,} tokens "
        f"({facts.scored_tokens:,} scored)"
        + (f"; {facts.valid_groups:,} held out" if facts.valid_groups else "")
    )
    for name, lengths in (
        ("prompts", facts.prompt_lengths),
        ("completions", facts.completion_lengths),
    ):
        if lengths:
            lines.append(
                f"{name + ':':<13}{lengths['50']} tokens at the median, {lengths['90']} at 90%, "
                f"{lengths['99']} at 99%, {lengths['100']} at most"
            )
    if facts.dropped:
        lines.append("dropped: " + ", ".join(f"{n:,} {why}" for why, n in facts.dropped.items()))
    if facts.chosen_longer is not None and facts.rejected_longer is not None:
        chosen, rejected = facts.chosen_longer, facts.rejected_longer
        which, share = ("longer", chosen) if chosen >= rejected else ("shorter", rejected)
        mark = "! " if share > 0.55 else ""
        lines.append(f"{mark}{which} is chosen in {share:.0%} of the pairs")
    counts = (
        (facts.cut_completions, "of the completions were cut at the longest allowed: no end token"),
        (facts.boundary_moved, "of the rows have a prompt that is no prefix of prompt and answer"),
        (facts.near_identical, "of the pairs have completions that are nearly the same"),
        (facts.contradictions, "of the pairs are also there the other way round"),
        (facts.scores_disagree, "of the pairs have scores that prefer the rejected completion"),
        (facts.prompt_repeated, "of the rows repeat the prompt in their completions"),
        (facts.duplicates, "of the rows repeat an earlier one"),
        (facts.valid_overlap or 0, f"of {facts.valid_groups} valid rows have a prompt of train's"),
    )
    lines += [f"! {count:,} {what}" for count, what in counts if count]
    remarks = (
        (facts.end_appended, "of the rows got an end token appended"),
        (facts.thinking_off, "of the rows are written with the template's thinking off"),
        (facts.system_folded, "of the rows have their system turn put into the first user turn"),
    )
    lines += [f"{count:,} {what}" for count, what in remarks if count]
    lines += [f"! {note}" for note in facts.notes]
    wrapped = [
        part for line in lines for part in textwrap.wrap(line, _WIDTH, subsequent_indent="    ")
    ]
    return "\n".join([*wrapped, *_render_example(facts)])


def _repeats_prompt(group: PromptGroup) -> bool:
    prompt = group.prompt
    return (
        isinstance(prompt, str)
        and len(prompt) >= _REPEATED
        and bool(group.completions)
        and all(isinstance(text, str) and text.startswith(prompt) for text in group.completions)
    )


def _scored(group: TokenizedGroup) -> int:
    if group.loss_masks is not None:
        return sum(int(mask.sum()) for mask in group.loss_masks)
    return sum(map(len, group.completions))


def _example(group: TokenizedGroup, tokenizer: Any) -> tuple[str, ...]:
    return tuple(str(tokenizer.decode(ids.tolist())) for ids in (group.prompt, *group.completions))


def _render_example(facts: DataFacts) -> list[str]:
    if not facts.example:
        return []
    names = {2: ("completion",), 3: ("chosen", "rejected")}.get(len(facts.example), ())
    # Of ranked rows the best and the worst say enough for one screen.
    texts = facts.example if len(facts.example) <= 3 else (*facts.example[:2], facts.example[-1])
    lines = []
    for name, text in zip(("prompt", *(names or ("best", "worst"))), texts, strict=False):
        # Cut by characters, not by words: a blank at the boundary has to be seen.
        shown, width = f"⟦{visible(text)}⟧", _WIDTH - 11
        chunks = [shown[i : i + width] for i in range(0, len(shown), width)]
        lines += [f"{name:<11}{chunks[0]}", *(" " * 11 + chunk for chunk in chunks[1:])]
    return lines


def visible(text: str, limit: int = _SHOWN) -> str:
    r"""Text on one line: control characters escaped (`\n`), shortened in the middle."""
    if len(text) > limit:
        half = (limit - 3) // 2
        text = f"{text[:half]} … {text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
