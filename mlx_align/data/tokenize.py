"""Prompt groups as token ids: where the prompt ends, how an answer ends, what is too long.

Where a prompt ends and an answer begins is found in `mlx_align.data.boundary`, how a tokenizer
writes conversations in `mlx_align.data.rendering`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_align.data.boundary import render_group
from mlx_align.data.rendering import ChatStyle, Refused, chat_style
from mlx_align.errors import ConfigError, DataError
from mlx_align.types import Message, PromptGroup, TokenizedGroup

# A run that would lose more of its rows than this is refused.
MAX_LOST = 0.1

TOO_LONG = "too long"
REFUSED = "refused by the chat template"
NO_PROMPT = "prompt rendered differently with its answer"
IDENTICAL = "identical completions"


@dataclass(frozen=True, slots=True)
class TokenizeResult:
    """What became of one group.

    Attributes:
        group: The group, or None where it has to be dropped.
        length: Tokens of the prompt and its longest completion, 0 where it can't be rendered.
        dropped: Why it is dropped: one of this module's reasons.
        detail: The template's own words, where it refused.
        cut: How many completions were cut to the longest allowed (they lose their end token).
        boundary_moved: The prompt rendered alone is not what the answers continue.
        end_appended: The template writes no end token, so EOS was appended.
        thinking_off: Rendered with thinking off.
        system_folded: A system turn went in front of the first user turn.
    """

    group: TokenizedGroup | None
    length: int = 0
    dropped: str | None = None
    detail: str = ""
    cut: int = 0
    boundary_moved: bool = False
    end_appended: bool = False
    thinking_off: bool = False
    system_folded: bool = False


@dataclass(frozen=True, slots=True)
class TokenizeReport:
    """What became of all groups; counts are of groups, unless they say otherwise.

    Attributes:
        rows: Groups given.
        kept: Groups left.
        dropped: Groups dropped, by reason.
        cut_completions: Completions cut to the longest allowed.
        boundary_moved: See `TokenizeResult`, as for the next three.
        end_appended: Groups whose completions got their EOS from us.
        thinking_off: Groups rendered with thinking off.
        system_folded: Groups whose system turn was folded.
        lengths: Percentiles of the tokens of prompt and longest completion, before dropping:
            "50", "90", "99", "100" → tokens.
        notes: Sentences about the tokenizer that its user should read.
    """

    rows: int
    kept: int
    dropped: Mapping[str, int]
    cut_completions: int
    boundary_moved: int
    end_appended: int
    thinking_off: int
    system_folded: int
    lengths: Mapping[str, int]
    notes: tuple[str, ...]


def tokenize_group(
    group: PromptGroup,
    tokenizer: Any,
    *,
    max_seq_length: int,
    max_completion_length: int | None = None,
) -> TokenizedGroup:
    """One group as token ids; see `tokenize_groups`.

    Raises:
        DataError: The group has to be dropped; the text says why.
    """
    result = try_tokenize_group(
        group,
        chat_style(tokenizer),
        max_seq_length=max_seq_length,
        max_completion_length=max_completion_length,
    )
    if result.group is None:
        detail = f" ({result.detail})" if result.detail else ""
        length = f": {result.length} tokens, over {max_seq_length}" if result.length else ""
        raise DataError(f"{group.source}: {result.dropped}{length}{detail}")
    return result.group


def tokenize_conversation(
    messages: Sequence[Message],
    tokenizer: Any,
    *,
    max_seq_length: int,
    source: str = "conversation",
) -> TokenizedGroup:
    """A whole conversation as one group whose loss mask covers every assistant turn.

    The prompt is everything up to the first answer; the completion is the rest, in which the
    user's turns are there but don't count.

    Raises:
        DataError: It has no answer after a user's turn, or has to be dropped.
    """
    roles = [turn.role for turn in messages]
    first = next((i for i, r in enumerate(roles) if r == "assistant" and "user" in roles[:i]), None)
    if first is None:
        raise DataError(f"{source}: no answer to a user's turn")
    last = max(i for i, role in enumerate(roles) if role == "assistant")
    group = PromptGroup(tuple(messages[:first]), (tuple(messages[first : last + 1]),), source)
    return tokenize_group(group, tokenizer, max_seq_length=max_seq_length)


def tokenize_groups(
    groups: Iterable[PromptGroup],
    tokenizer: Any,
    *,
    max_seq_length: int,
    max_completion_length: int | None = None,
) -> tuple[list[TokenizedGroup], TokenizeReport]:
    """All groups as token ids, and what became of them.

    Args:
        groups: Read by `formats`; groups without completions give their prompts alone.
        tokenizer: An mlx-lm `TokenizerWrapper` or a Hugging Face tokenizer.
        max_seq_length: In tokens; a group whose prompt and longest completion exceed it together
            is dropped.
        max_completion_length: In tokens; completions are cut to it first, and a cut one has no
            end token.

    Raises:
        DataError: More than a tenth of the groups would be dropped, or none is left.
    """
    style = chat_style(tokenizer)
    results = []
    chats = False
    for group in groups:
        chats = chats or not isinstance(group.prompt, str)
        results.append(
            try_tokenize_group(
                group,
                style,
                max_seq_length=max_seq_length,
                max_completion_length=max_completion_length,
            )
        )
    kept = [result.group for result in results if result.group is not None]
    report = TokenizeReport(
        rows=len(results),
        kept=len(kept),
        dropped=dict(Counter(r.dropped for r in results if r.dropped is not None)),
        cut_completions=sum(r.cut for r in results if r.group is not None),
        boundary_moved=sum(r.boundary_moved for r in results),
        end_appended=sum(r.end_appended for r in results),
        thinking_off=sum(r.thinking_off for r in results),
        system_folded=sum(r.system_folded for r in results),
        lengths=percentiles([r.length for r in results if r.length]),
        notes=style.notes + (style.chat_notes if chats else ()),
    )
    refuse_great_loss(results, "--max-seq-length", max_seq_length)
    return kept, report


def try_tokenize_group(
    group: PromptGroup,
    style: ChatStyle,
    *,
    max_seq_length: int,
    max_completion_length: int | None = None,
    drop_identical: bool = True,
) -> TokenizeResult:
    """One group as token ids, or the reason to drop it; arguments as in `tokenize_groups`.

    Nothing can be learned from a group of identical completions, but they can be scored:
    `drop_identical` says whether it is dropped.
    """
    limit = max_completion_length
    if max_seq_length < 1 or (limit is not None and limit < 1):
        raise ConfigError("--max-seq-length and --max-completion-length: expected at least 1")
    folded = (
        style.folds_system
        and not isinstance(group.prompt, str)
        and any(turn.role == "system" for turn in group.prompt)
    )
    try:
        rendered = render_group(group.prompt, group.completions, style)
    except Refused as refusal:
        return TokenizeResult(None, dropped=REFUSED, detail=str(refusal))
    if rendered is None:
        return TokenizeResult(None, dropped=NO_PROMPT)
    cut = 0 if limit is None else sum(len(ids) > limit for ids in rendered.completions)
    completions = [ids[:limit] for ids in rendered.completions]
    result = TokenizeResult(
        group=None,
        length=len(rendered.prompt) + max(map(len, completions), default=0),
        cut=cut,
        boundary_moved=rendered.moved,
        end_appended=rendered.appended,
        thinking_off=rendered.thinking_off,
        system_folded=folded,
    )
    if result.length > max_seq_length:
        return replace(result, dropped=TOO_LONG)
    alike = len(completions) > 1 and all(ids == completions[0] for ids in completions)
    if alike and drop_identical:
        return replace(result, dropped=IDENTICAL)
    tokenized = TokenizedGroup(
        prompt=np.array(rendered.prompt, np.int32),
        completions=tuple(np.array(ids, np.int32) for ids in completions),
        source=group.source,
        scores=group.scores,
        label=group.label,
        soft_label=group.soft_label,
        margin=group.margin,
        loss_masks=tuple(mask[:limit] for mask in rendered.masks) if rendered.masks else None,
    )
    return replace(result, group=tokenized)


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Lengths by percentile: the least length that 50, 90, 99 and 100 in a hundred don't exceed."""
    if not lengths:
        return {}
    ordered = np.sort(np.array(lengths))
    return {str(p): int(ordered[-(-len(ordered) * p // 100) - 1]) for p in (50, 90, 99, 100)}


def refuse_great_loss(results: Sequence[TokenizeResult], option: str, limit: int) -> None:
    """Refuse data of which more than a tenth would be dropped, or all.

    Args:
        results: Of all groups.
        option: The option that limits lengths, for the message.
        limit: Its value, tokens.

    Raises:
        DataError: So much would be dropped; the text says why, and which limit would keep more.
    """
    rows = len(results)
    dropped = Counter(r.dropped for r in results if r.dropped is not None)
    kept = rows - dropped.total()
    lost = dropped.total() - dropped[IDENTICAL]
    if kept and lost <= MAX_LOST * rows:
        return
    if not rows:
        raise DataError("no rows to tokenise")
    too_long = dropped[TOO_LONG]
    if 2 * too_long >= max(lost, 1):
        at = percentiles([r.length for r in results if r.length])
        raise DataError(
            f"{'all' if too_long == rows else too_long} of {rows} rows are longer than "
            f"{option} {limit} and would be dropped (tokens: median {at['50']}, "
            f"longest {at['100']}); {option} {at['90']} keeps 90% of them, {at['99']} "
            "keeps 99%"
        )
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    detail = next((f" ({r.detail})" for r in results if r.detail), "")
    raise DataError(
        f"{rows - kept} of {rows} rows would be dropped: {reasons}{detail}; mend them or "
        "leave them out"
    )
