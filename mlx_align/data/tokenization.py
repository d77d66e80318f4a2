"""Tokenise prompt groups: the prompt/completion boundary, end tokens, and length limits.

**The boundary** is found by rendering, not assumed. The prompt is rendered alone (with the
generation prompt) and with each of its completions, and cut where these renderings start to differ.
A group has one prompt, so it is cut at the shortest common prefix. If that is shorter than the
prompt (tokens that merge across the boundary, templates that write something else before a finished
completion), the row is counted as "boundary moved".

**Thinking templates** start an assistant turn differently with thinking on and off. One rule holds
for all of them (`thinking="auto"`): completions without reasoning are rendered with thinking off,
so that an empty thinking block is part of the prompt and never scored; if a completion has
reasoning, the group is rendered with thinking on. If the prompt is not a prefix then, or the
template leaves the reasoning out, the other mode is tried.

**Text that the template leaves out** is found by comparing the row with the rendered text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_align.data.chat_template import (
    ChatTemplate,
    Ids,
    TemplateError,
    Thinking,
    Tools,
    common_prefix,
    inspect_chat_template,
    squeeze,
)
from mlx_align.errors import ConfigError, DataError
from mlx_align.types import Message, PromptGroup, Text, TokenizedGroup

# If a larger fraction of the rows would be dropped, the data is refused.
MAX_DROPPED = 0.1
# Characters of a prompt or of a completion. At 4 per token it is a million tokens, more than models
# read; tokenising it takes some seconds.
MAX_TEXT = 1 << 22
# If the boundary moves by more tokens than this, the row is dropped: part of the user's turn would
# be trained on.
MAX_BOUNDARY_SHIFT = 16

# Reasons to drop a group.
TOO_LONG = "too long"
REFUSED = "refused by the chat template"
NO_PROMPT = "prompt rendered differently with its completion"
IDENTICAL = "identical completions"
NO_TOOLS = "with tools or tool calls, which the chat template leaves out"


@dataclass(frozen=True, slots=True)
class TokenizeResult:
    """The result of tokenising one group.

    Attributes:
        group: The tokenised group, or None if it has to be dropped.
        length: Tokens of the prompt and its longest completion, 0 if it can't be rendered.
        dropped: The reason to drop it, one of this module's constants.
        detail: The error message of the chat template.
        truncated: Number of completions cut to `max_completion_length` (they have no end token).
        boundary_moved: The prompt rendered alone is not a prefix of prompt and completion.
        end_appended: The template writes no end token, so EOS was appended.
        thinking_off: The group was rendered with thinking off.
        system_folded: A system turn was put in front of the first user turn.
        reasoning_dropped: The template leaves out the reasoning of a completion.
        reasoning_removed: Reasoning was removed because of `--thinking off`.
        text_dropped: The template leaves out other text of the row.
    """

    group: TokenizedGroup | None
    length: int = 0
    dropped: str | None = None
    detail: str = ""
    truncated: int = 0
    boundary_moved: bool = False
    end_appended: bool = False
    thinking_off: bool = False
    system_folded: bool = False
    reasoning_dropped: bool = False
    reasoning_removed: bool = False
    text_dropped: bool = False


@dataclass(frozen=True, slots=True)
class TokenizeReport:
    """Counts over all groups of a split.

    Attributes:
        rows: Groups before tokenisation.
        kept: Groups that were not dropped.
        dropped: Number of dropped groups, by reason.
        cut_completions: Number of completions cut to `max_completion_length`.
        boundary_moved: Number of groups with this property of `TokenizeResult`; also
            `end_appended`, `thinking_off`, `system_folded`, `reasoning_dropped`,
            `reasoning_removed` and `text_dropped`.
        end_appended: See above.
        thinking_off: See above.
        system_folded: See above.
        lengths: Percentiles of the tokens of prompt and longest completion, before dropping:
            "50", "90", "99", "100" → tokens.
        notes: Sentences about the tokenizer that users should know.
        reasoning_dropped: See above.
        reasoning_removed: See above.
        text_dropped: See above.
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
    reasoning_dropped: int = 0
    reasoning_removed: int = 0
    text_dropped: int = 0


@dataclass(frozen=True, slots=True)
class PromptReport:
    """Counts over all prompts of a split.

    Attributes:
        rows: Prompts before tokenisation.
        indices: Indices of the prompts that were kept.
        dropped: Number of dropped prompts, by reason.
        system_folded: Prompts whose system turn was put in front of the first user turn.
        lengths: Percentiles of their lengths, before dropping: "50", "90", "99", "100" → tokens.
        notes: Sentences about the tokenizer that users should know.
    """

    rows: int
    indices: tuple[int, ...]
    dropped: Mapping[str, int]
    system_folded: int
    lengths: Mapping[str, int]
    notes: tuple[str, ...]


def tokenize_group(
    group: PromptGroup,
    tokenizer: Any,
    *,
    max_seq_length: int,
    max_completion_length: int | None = None,
    thinking: Thinking = "auto",
) -> TokenizedGroup:
    """Tokenise one group. Arguments are those of `tokenize_groups`.

    Raises:
        DataError: The group has to be dropped; the message gives the reason.
    """
    result = try_tokenize_group(
        group,
        inspect_chat_template(tokenizer, thinking),
        max_seq_length=max_seq_length,
        max_completion_length=max_completion_length,
    )
    if result.group is None:
        detail = f" ({result.detail})" if result.detail else ""
        over = f": {result.length} tokens, limit {max_seq_length}" if result.length else ""
        raise DataError(f"{group.source}: {result.dropped}{over}{detail}")
    return result.group


def tokenize_conversation(
    messages: Sequence[Message],
    tokenizer: Any,
    *,
    max_seq_length: int,
    source: str = "conversation",
) -> TokenizedGroup:
    """Tokenise a conversation as one group whose loss mask covers every assistant turn.

    The prompt is everything before the first assistant turn. The completion is the rest; its user
    turns are masked.

    Raises:
        DataError: It has no assistant turn after a user turn, or has to be dropped.
    """
    roles = [turn.role for turn in messages]
    first = next((i for i, r in enumerate(roles) if r == "assistant" and "user" in roles[:i]), None)
    if first is None:
        raise DataError(f"{source}: no assistant turn after a user turn")
    last = max(i for i, role in enumerate(roles) if role == "assistant")
    group = PromptGroup(tuple(messages[:first]), (tuple(messages[first : last + 1]),), source)
    return tokenize_group(group, tokenizer, max_seq_length=max_seq_length)


def tokenize_groups(
    groups: Iterable[PromptGroup],
    tokenizer: Any,
    *,
    max_seq_length: int,
    max_completion_length: int | None = None,
    thinking: Thinking = "auto",
    keep_text: bool = False,
) -> tuple[list[TokenizedGroup], TokenizeReport]:
    """Tokenise the groups of a split.

    Args:
        groups: The groups; they may have no completions.
        tokenizer: An mlx-lm `TokenizerWrapper` or a Hugging Face tokenizer.
        max_seq_length: In tokens. A group is dropped if its prompt and longest completion together
            are longer.
        max_completion_length: In tokens. Longer completions are cut first, and lose their end
            token.
        thinking: Whether to render with the template's thinking on; see the module's docstring.
        keep_text: Whether the result has the prompts as text too.

    Raises:
        ConfigError: A limit is below 1.
        DataError: More than 10% of the groups, or all of them, would be dropped.
    """
    template = inspect_chat_template(tokenizer, thinking)
    results = []
    chats = text = False
    for group in groups:
        chats = chats or not isinstance(group.prompt, str)
        text = text or (isinstance(group.prompt, str) and bool(group.prompt))
        result = try_tokenize_group(
            group,
            template,
            max_seq_length=max_seq_length,
            max_completion_length=max_completion_length,
        )
        if keep_text and result.group is not None:
            result = replace(result, group=replace(result.group, text=group.prompt))
        results.append(result)
    kept = [result.group for result in results if result.group is not None]
    report = TokenizeReport(
        rows=len(results),
        kept=len(kept),
        dropped=dict(Counter(r.dropped for r in results if r.dropped is not None)),
        cut_completions=sum(r.truncated for r in results if r.group is not None),
        boundary_moved=sum(r.boundary_moved for r in results),
        end_appended=sum(r.end_appended for r in results),
        thinking_off=sum(r.thinking_off for r in results),
        system_folded=sum(r.system_folded for r in results),
        lengths=percentiles([r.length for r in results if r.length]),
        notes=template.notes_on(chats=chats, text=text),
        reasoning_dropped=sum(r.reasoning_dropped for r in results),
        reasoning_removed=sum(r.reasoning_removed for r in results),
        text_dropped=sum(r.text_dropped for r in results),
    )
    check_dropped(results, "--max-seq-length", max_seq_length)
    return kept, report


def try_tokenize_group(
    group: PromptGroup,
    template: ChatTemplate,
    *,
    max_seq_length: int,
    max_completion_length: int | None = None,
    drop_identical: bool = True,
) -> TokenizeResult:
    """Tokenise one group, or return the reason to drop it.

    Args:
        group: The group.
        template: From `inspect_chat_template`.
        max_seq_length: See `tokenize_groups`.
        max_completion_length: See `tokenize_groups`.
        drop_identical: Whether to drop groups of identical completions: they can't be used for
            training, but they can be scored.

    Raises:
        ConfigError: A limit is below 1.
        DataError: A text has more than `MAX_TEXT` characters.
    """
    limit = max_completion_length
    if max_seq_length < 1:
        raise ConfigError(f"--max-seq-length {max_seq_length}: expected at least 1")
    if limit is not None and limit < 1:
        raise ConfigError(f"--max-completion-length {limit}: expected at least 1")
    _check_length(group)
    folded = (
        template.folds_system
        and not isinstance(group.prompt, str)
        and any(turn.role == "system" for turn in group.prompt)
    )
    try:
        rendered = render_group(group.prompt, group.completions, template, tools=group.tools)
    except TemplateError as error:
        return TokenizeResult(None, dropped=REFUSED, detail=str(error))
    if rendered is None:
        return TokenizeResult(None, dropped=NO_PROMPT)
    if rendered.tools_dropped:
        return TokenizeResult(None, dropped=NO_TOOLS)
    truncated = 0 if limit is None else sum(len(ids) > limit for ids in rendered.completions)
    completions = [ids[:limit] for ids in rendered.completions]
    result = TokenizeResult(
        group=None,
        length=len(rendered.prompt) + max(map(len, completions), default=0),
        truncated=truncated,
        boundary_moved=rendered.moved,
        end_appended=rendered.appended,
        thinking_off=rendered.thinking_off,
        system_folded=folded,
        reasoning_dropped=rendered.reasoning_dropped,
        reasoning_removed=rendered.reasoning_removed,
        text_dropped=rendered.text_dropped,
    )
    if result.length > max_seq_length:
        return replace(result, dropped=TOO_LONG)
    identical = len(completions) > 1 and all(ids == completions[0] for ids in completions)
    if identical and drop_identical:
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


def _check_length(group: PromptGroup) -> None:
    """Refuse texts for which tokenising alone would take minutes and gigabytes."""
    for text in (group.prompt, *group.completions):
        size = len(text) if isinstance(text, str) else sum(len(turn.content) for turn in text)
        if size > MAX_TEXT:
            raise DataError(
                f"{group.source}: a text of {size:,} characters; more than {MAX_TEXT:,} are "
                "refused before they are tokenised: shorten or remove the row"
            )


def tokenize_prompts(
    groups: Sequence[PromptGroup],
    tokenizer: Any,
    max_prompt_length: int,
    thinking: Thinking = "auto",
) -> tuple[list[TokenizedGroup], PromptReport]:
    """Tokenise prompts as for training, so that a policy samples from what it was trained on.

    Args:
        groups: The groups; their completions are ignored.
        tokenizer: An mlx-lm `TokenizerWrapper` or a Hugging Face tokenizer.
        max_prompt_length: In tokens. Longer prompts are dropped, never cut.
        thinking: Whether completions start with the template's thinking on; auto: as mlx-lm does.

    Returns:
        Groups without completions, and a report.

    Raises:
        ConfigError: `max_prompt_length` is below 1.
        DataError: More than 10% of the prompts, or all of them, would be dropped.
    """
    if max_prompt_length < 1:
        raise ConfigError(f"--max-prompt-length {max_prompt_length}: expected at least 1")
    template = inspect_chat_template(tokenizer, thinking)
    results = [
        try_tokenize_group(
            replace(group, completions=(), scores=None),
            template,
            max_seq_length=max_prompt_length,
        )
        for group in groups
    ]
    check_dropped(results, "--max-prompt-length", max_prompt_length)
    kept = [(index, r.group) for index, r in enumerate(results) if r.group is not None]
    chats = any(not isinstance(group.prompt, str) for group in groups)
    return [group for _, group in kept], PromptReport(
        rows=len(results),
        indices=tuple(index for index, _ in kept),
        dropped=dict(Counter(r.dropped for r in results if r.dropped is not None)),
        system_folded=sum(r.system_folded for r in results),
        lengths=percentiles([r.length for r in results if r.length]),
        notes=template.notes_on(
            chats=chats, text=any(isinstance(g.prompt, str) and g.prompt for g in groups)
        ),
    )


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """The smallest lengths that cover 50%, 90%, 99% and 100% of the rows, by percentile."""
    if not lengths:
        return {}
    ordered = np.sort(np.array(lengths))
    return {str(p): int(ordered[-(-len(ordered) * p // 100) - 1]) for p in (50, 90, 99, 100)}


def check_dropped(results: Sequence[TokenizeResult], option: str, limit: int) -> None:
    """Refuse data if more than 10% of its groups, or all of them, would be dropped.

    Args:
        results: The results of all groups.
        option: The option that limits lengths, for the message.
        limit: Its value, tokens.

    Raises:
        DataError: Too many would be dropped; the message gives reasons and limits that keep more.
    """
    rows = len(results)
    dropped = Counter(r.dropped for r in results if r.dropped is not None)
    kept = rows - dropped.total()
    refused = dropped.total() - dropped[IDENTICAL]
    if kept and refused <= MAX_DROPPED * rows:
        return
    if not rows:
        raise DataError("the data has no rows; expected at least one")
    too_long = dropped[TOO_LONG]
    if 2 * too_long >= max(refused, 1):
        lengths = percentiles([r.length for r in results if r.length])
        raise DataError(
            f"{'all' if too_long == rows else too_long} of {rows} rows are longer than "
            f"{option} {limit} and would be dropped (tokens: median {lengths['50']}, "
            f"longest {lengths['100']}); {option} {lengths['90']} keeps 90% of them, "
            f"{lengths['99']} keeps 99%"
        )
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    detail = next((f" ({r.detail})" for r in results if r.detail), "")
    raise DataError(
        f"{rows - kept} of {rows} rows would be dropped: {reasons}{detail}; correct or remove them"
    )


# --- the boundary between prompt and completions ---


@dataclass(frozen=True, slots=True)
class RenderedGroup:
    """The token ids of a group, before any length limit.

    Attributes:
        prompt: At least one id.
        completions: At least one id each, with one end token.
        masks: For each completion, which ids belong to assistant turns; None if all do.
        moved: The prompt rendered alone is not a prefix of prompt and completion.
        appended: The template writes no end token, so EOS was appended.
        thinking_off: Rendered with thinking off.
        reasoning_dropped: The template leaves out the reasoning of a completion.
        reasoning_removed: Reasoning was removed because of `thinking="off"`.
        text_dropped: The template leaves out other text.
        tools_dropped: The template leaves out tools or tool calls.
    """

    prompt: Ids
    completions: list[Ids]
    masks: list[npt.NDArray[np.bool_]] | None = None
    moved: bool = False
    appended: bool = False
    thinking_off: bool = False
    reasoning_dropped: bool = False
    reasoning_removed: bool = False
    text_dropped: bool = False
    tools_dropped: bool = False


def render_group(
    prompt: Text,
    completions: Sequence[Text],
    template: ChatTemplate,
    *,
    tools: Tools = (),
) -> RenderedGroup | None:
    """Render a group. Returns None if its renderings don't share a usable prompt.

    Args:
        prompt: Text, or turns.
        completions: The completions; of the same kind.
        template: From `inspect_chat_template`.
        tools: Descriptions of functions for the template.

    Raises:
        TemplateError: The chat template raised an error.
    """
    if isinstance(prompt, str):
        return _render_strings(prompt, [str(text) for text in completions], template)
    whole = [
        template.fold_system((*prompt, *turns))
        for turns in completions
        if not isinstance(turns, str)
    ]
    prompt = template.fold_system(prompt)
    answers = [turn for turns in whole for turn in turns[len(prompt) :]]
    reasons = any(template.split_reasoning(turn)[0] is not None for turn in answers)
    without = template.thinking == "off" and reasons
    if without:
        whole = [(*prompt, *_without_reasoning(t[len(prompt) :], template)) for t in whole]
    best = None
    for mode in _thinking_modes(template, bool(whole), reasons):
        rendered = _render_turns(prompt, whole, template, mode, tools)
        if rendered is None:
            continue
        if best is None or _loss(rendered) < _loss(best):
            best = rendered
        if _loss(best) == (False, False):
            break
    return replace(best, reasoning_removed=True) if best is not None and without else best


def _thinking_modes(
    template: ChatTemplate, has_completions: bool, reasons: bool
) -> tuple[bool | None, ...]:
    """The values of `enable_thinking` to try, in order; None is mlx-lm's default."""
    if template.thinking != "auto":
        return (template.thinking == "on",)
    if not has_completions:
        return (None,)
    if reasons:
        return (None, True, False) if template.switches_thinking else (None, True)
    return (False, None) if template.switches_thinking else (None,)


def _loss(rendered: RenderedGroup) -> tuple[bool, bool]:
    """What is wrong with a rendering, for comparing them: lost reasoning, a moved boundary."""
    return rendered.reasoning_dropped, rendered.moved


def _without_reasoning(turns: Sequence[Message], template: ChatTemplate) -> tuple[Message, ...]:
    return tuple(
        replace(turn, content=rest.lstrip(), reasoning=None) if reasoning is not None else turn
        for turn in turns
        for reasoning, rest in [template.split_reasoning(turn)]
    )


def _render_strings(
    prompt: str, completions: Sequence[str], template: ChatTemplate
) -> RenderedGroup | None:
    head = template.encode(prompt)
    if not completions:
        return RenderedGroup(head, []) if head else None
    whole = [template.encode(prompt + text) for text in completions]
    shared = min(common_prefix(head, ids) for ids in whole)
    if not head and not prompt and min(map(len, whole)) > 1:
        shared = len(head := whole[0][:1])  # text without BOS: its first token is the prompt
    end = [] if template.eos is None else [template.eos]
    tails = [ids[shared:] + end for ids in whole]
    if not shared or not all(tails) or len(head) - shared > MAX_BOUNDARY_SHIFT:
        return None
    return RenderedGroup(head[:shared], tails, moved=shared < len(head), appended=bool(end))


def _render_turns(
    prompt: Sequence[Message],
    whole: Sequence[Sequence[Message]],
    template: ChatTemplate,
    thinking: bool | None,
    tools: Tools,
) -> RenderedGroup | None:
    head = template.render(prompt, generation_prompt=True, thinking=thinking, tools=tools)
    off = thinking is False and template.switches_thinking
    if not whole:
        if not head:
            return None
        text = template.render_text(prompt, thinking=thinking, tools=tools)
        lost = _left_out(prompt, len(prompt), text, template, thinking, tools)
        return RenderedGroup(
            head, [], thinking_off=off, text_dropped=lost.text, tools_dropped=lost.tools
        )
    finished = [template.render_finished(turns, thinking, tools) for turns in whole]
    shared = min(common_prefix(head, one.ids) for one in finished)
    completions = [one.ids[shared:] for one in finished]
    if not shared or not all(completions) or len(head) - shared > MAX_BOUNDARY_SHIFT:
        return None
    moved = shared < len(head)
    masks = None
    if any(len(turns) > len(prompt) + 1 for turns in whole):
        masks = []
        for turns, one in zip(whole, finished, strict=True):
            mask = _assistant_mask(turns, len(prompt), one.ids, shared, template, thinking, tools)
            masks.append(mask.scored)
            moved = moved or not mask.exact
            off = off or mask.thinking_off
    lost_in = [
        _left_out(turns, len(prompt), one.text, template, thinking, tools)
        for turns, one in zip(whole, finished, strict=True)
    ]
    return RenderedGroup(
        head[:shared],
        completions,
        masks,
        moved,
        any(one.appended for one in finished),
        thinking_off=off,
        reasoning_dropped=any(lost.reasoning for lost in lost_in),
        text_dropped=any(lost.text for lost in lost_in),
        tools_dropped=any(lost.tools for lost in lost_in),
    )


@dataclass(frozen=True, slots=True)
class _LeftOut:
    """What a template leaves out of a conversation.

    Attributes:
        reasoning: Reasoning in its completion. In earlier turns that is usual, in use too.
        text: Content of a system, user or assistant turn. (Templates write tool results as JSON.)
        tools: The tools, or the tool calls of a turn.
    """

    reasoning: bool
    text: bool
    tools: bool


def _left_out(
    turns: Sequence[Message],
    first: int,
    text: str,
    template: ChatTemplate,
    thinking: bool | None,
    tools: Tools,
) -> _LeftOut:
    """Compare a conversation, whose completion starts at turn `first`, with its rendered text."""
    rendered = squeeze(text)
    split = [template.split_reasoning(turn) for turn in turns]
    return _LeftOut(
        reasoning=any(
            reasoning is not None and squeeze(reasoning) not in rendered
            for reasoning, _ in split[first:]
        ),
        text=any(
            turn.role != "tool" and squeeze(content) not in rendered
            for turn, (_, content) in zip(turns, split, strict=True)
        ),
        tools=_leaves_tools_out(turns, template, thinking, tools),
    )


def _leaves_tools_out(
    turns: Sequence[Message], template: ChatTemplate, thinking: bool | None, tools: Tools
) -> bool:
    """Whether the conversation is rendered the same without its tools, or without some calls."""

    def text(turns: Sequence[Message], tools: Tools) -> str:
        return template.render_text(turns, thinking=thinking, tools=tools)

    if not tools and not any(turn.tool_calls for turn in turns):
        return False
    whole = text(turns, tools)
    if tools and text(turns, ()) == whole:
        return True
    for i, turn in enumerate(turns):
        if turn.tool_calls:
            without = (*turns[:i], replace(turn, tool_calls=()), *turns[i + 1 :])
            try:
                if text(without, tools) == whole:
                    return True
            except TemplateError:  # without its call the tool's answer has no place
                continue
    return False


@dataclass(frozen=True, slots=True)
class _AssistantMask:
    """Which ids of a completion belong to assistant turns.

    Attributes:
        scored: One value per id.
        exact: Whether every assistant turn starts right after its generation prompt.
        thinking_off: Whether a turn starts after the empty thinking block of thinking off.
    """

    scored: npt.NDArray[np.bool_]
    exact: bool
    thinking_off: bool


def _assistant_mask(
    turns: Sequence[Message],
    first: int,
    ids: Ids,
    shared: int,
    template: ChatTemplate,
    thinking: bool | None,
    tools: Tools,
) -> _AssistantMask:
    """Which of `ids[shared:]` belong to assistant turns, starting with turn `first`."""
    assistant = [i for i in range(first, len(turns)) if turns[i].role == "assistant"]
    starts, exact, off = [shared], True, False
    for i in assistant[1:]:
        start = None
        # An empty thinking block before an answer without reasoning is not scored (see the top).
        if (
            thinking is None
            and template.switches_thinking
            and template.split_reasoning(turns[i])[0] is None
        ):
            head = template.render(turns[:i], generation_prompt=True, thinking=False, tools=tools)
            if common_prefix(head, ids) == len(head):
                start, off = len(head), True
        if start is None:
            head = template.render(
                turns[:i], generation_prompt=True, thinking=thinking, tools=tools
            )
            start = common_prefix(head, ids)
            exact = exact and start == len(head)
        starts.append(start)
    mask = np.zeros(len(ids), np.bool_)
    mask[starts[-1] :] = True
    for i, start, limit in zip(assistant, starts, starts[1:], strict=False):
        # Templates may render an assistant turn differently if others follow it (without its
        # thinking), so its end is found by the end token, unless that is only written at the very
        # end.
        if template.ending and template.ending[0] in ids[start:limit]:
            stop = ids.index(template.ending[0], start) + 1
        else:
            finished = template.render(turns[: i + 1], thinking=thinking, tools=tools)
            stop = min(common_prefix(finished, ids), limit)
            # GLM has no end token: the next turn's role token ends the answer, and generation
            # stops at it. It is scored, or the model would not learn to stop.
            if not template.ending and stop < limit and ids[stop] in template.stops:
                stop += 1
        mask[start:stop] = True
    return _AssistantMask(mask[shared:], exact, off)
