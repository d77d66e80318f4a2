"""Where a prompt ends and its answers begin, in tokens.

The boundary is found, not assumed: the prompt is rendered alone (with the opening of an answer)
and with each of its answers, and cut where these renderings stop being equal. A group has one
prompt, so it is cut at the shortest of them. Where that is inside the prompt (tokens that merge
across the boundary, templates that write something else before a finished answer) the row is
counted as "boundary moved".

Thinking templates open an answer differently from how they write a finished one, depending on
whether thinking is on. First comes mlx-lm's default (on, where the tokenizer has thinking
tokens); a row whose prompt is no prefix then is rendered with thinking off, and that is taken if
its prompt is one. So answers with their reasoning written out train the thinking mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mlx_align.data.rendering import (
    ChatStyle,
    Ids,
    common_prefix,
    encode,
    end_once,
    fold_system,
    render,
)
from mlx_align.types import Message, Text

# A boundary that moves further than this is none: part of the user's turn would be scored.
MAX_MOVE = 16


@dataclass(frozen=True, slots=True)
class Rendered:
    """A group's ids, uncut.

    Attributes:
        prompt: At least one id.
        completions: At least one id each, ended once.
        masks: Per completion which ids belong to answers; None where all do.
        moved: The prompt rendered alone is not what the answers continue.
        appended: The template writes no end token, so EOS was appended.
        thinking_off: Rendered with thinking off.
    """

    prompt: Ids
    completions: list[Ids]
    masks: list[npt.NDArray[np.bool_]] | None = None
    moved: bool = False
    appended: bool = False
    thinking_off: bool = False


def render_group(prompt: Text, completions: Sequence[Text], style: ChatStyle) -> Rendered | None:
    """The ids of a group, or None where its renderings have no usable prompt in common.

    Raises:
        Refused: The chat template raised.
    """
    if isinstance(prompt, str):
        return _render_strings(prompt, [str(text) for text in completions], style)
    whole = [
        fold_system(style, (*prompt, *turns)) for turns in completions if not isinstance(turns, str)
    ]
    prompt = fold_system(style, prompt)
    first = _render_turns(prompt, whole, style, None)
    if first is not None and not first.moved:
        return first
    if style.has_template:
        quiet = _render_turns(prompt, whole, style, False)
        if quiet is not None and not quiet.moved:
            return replace(quiet, thinking_off=True)
    return first


def _render_strings(prompt: str, completions: Sequence[str], style: ChatStyle) -> Rendered | None:
    head = encode(style, prompt)
    if not completions:
        return Rendered(head, []) if head else None
    whole = [encode(style, prompt + text) for text in completions]
    shared = min(common_prefix(head, ids) for ids in whole)
    if not head and not prompt and min(map(len, whole)) > 1:
        shared = len(head := whole[0][:1])  # plain text without BOS: its first token is given
    end = [] if style.eos is None else [style.eos]
    tails = [ids[shared:] + end for ids in whole]
    if not shared or not all(tails) or len(head) - shared > MAX_MOVE:
        return None
    return Rendered(head[:shared], tails, moved=shared < len(head), appended=bool(end))


def _render_turns(
    prompt: Sequence[Message],
    whole: Sequence[Sequence[Message]],
    style: ChatStyle,
    thinking: bool | None,
) -> Rendered | None:
    head = render(style, prompt, generation_prompt=True, thinking=thinking)
    if not whole:
        return Rendered(head, []) if head else None
    ended = [end_once(style, render(style, turns, thinking=thinking)) for turns in whole]
    shared = min(common_prefix(head, ids) for ids, _ in ended)
    completions = [ids[shared:] for ids, _ in ended]
    if not shared or not all(completions) or len(head) - shared > MAX_MOVE:
        return None
    moved = shared < len(head)
    masks = None
    if any(len(turns) > len(prompt) + 1 for turns in whole):
        masks = []
        for turns, (ids, _) in zip(whole, ended, strict=True):
            mask, exact = _answer_mask(turns, len(prompt), ids, shared, style, thinking)
            masks.append(mask)
            moved = moved or not exact
    return Rendered(head[:shared], completions, masks, moved, any(added for _, added in ended))


def _answer_mask(
    turns: Sequence[Message],
    answer: int,
    ids: Ids,
    shared: int,
    style: ChatStyle,
    thinking: bool | None,
) -> tuple[npt.NDArray[np.bool_], bool]:
    """Which ids behind `shared` belong to assistant turns, from turn `answer` on.

    Returns:
        The mask, and whether every answer was found to begin where its opening ends.
    """
    places = [p for p in range(answer, len(turns)) if turns[p].role == "assistant"]
    starts, exact = [shared], True
    for place in places[1:]:
        opening = render(style, turns[:place], generation_prompt=True, thinking=thinking)
        starts.append(common_prefix(opening, ids))
        exact = exact and starts[-1] == len(opening)
    mask = np.zeros(len(ids), np.bool_)
    mask[starts[-1] :] = True
    for place, start, limit in zip(places, starts, starts[1:], strict=False):
        # Templates may write an answer differently once others follow it (thinking left out), so
        # its end is looked for by its token; unless that one is only written at the very end.
        if style.ending and style.ending[0] in ids[start:limit]:
            stop = ids.index(style.ending[0], start) + 1
        else:
            finished = render(style, turns[: place + 1], thinking=thinking)
            stop = min(common_prefix(finished, ids), limit)
        mask[start:stop] = True
    return mask[shared:], exact
