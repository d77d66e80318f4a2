r"""From conversations and strings to token ids, by the rules generation follows too.

Conversations go through the tokenizer's chat template, exactly as stock `mlx_lm.generate` sends
them: what the template writes is all there is, so a BOS it leaves out is not added, and one
written twice is reduced to one. Tokenizers without a template get
`\n\nHuman: …\n\nAssistant: …`. Strings are tokenised as they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_align.data.sources import one_line
from mlx_align.types import Message

Ids = list[int]

_PLAIN_NAMES = {"user": "Human", "assistant": "Assistant", "tool": "Tool"}
_PROBE_QUESTION = "Qx0w"
_PROBE_ANSWERS = ("Zq7", "Xw9")
_PROBE_SYSTEM = "Sv3k"


class Refused(Exception):
    """The chat template raised on this conversation; the text is its reason."""


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """What has to be known of a tokenizer before it renders conversations.

    Attributes:
        tokenizer: As `mlx_lm` wraps it.
        has_template: False where conversations are rendered as plain Human/Assistant turns.
        folds_system: The template refuses or forgets system turns: their text goes in front of
            the first user turn.
        ending: The ids the template writes after an answer, from the end-of-turn token on; empty
            where it writes none.
        eos: The id that ends an answer where the template writes nothing to end it.
        notes: What a user should know about it, a sentence each.
        chat_notes: The same, where there are conversations to render.
    """

    tokenizer: Any
    has_template: bool
    folds_system: bool
    ending: tuple[int, ...]
    eos: int | None
    notes: tuple[str, ...]
    chat_notes: tuple[str, ...] = ()


def chat_style(tokenizer: Any) -> ChatStyle:
    """Find out how a tokenizer renders conversations, by rendering two tiny ones.

    Args:
        tokenizer: An mlx-lm `TokenizerWrapper` or a Hugging Face tokenizer.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    # Rows too long are counted and reported here; the library's own warning names another limit.
    warned = getattr(tokenizer, "deprecation_warnings", {})
    warned["sequence-length-is-longer-than-the-specified-maximum"] = True
    stops = set(tokenizer.eos_token_ids)
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(stops, default=None)
    notes: tuple[str, ...] = ()
    if eos is None:
        notes = ("The tokenizer has no end token: answers end without one.",)
    if not tokenizer.has_chat_template:
        plain = (
            "The tokenizer has no chat template: conversations are written as plain "
            "Human/Assistant turns."
        )
        return ChatStyle(tokenizer, False, False, (), eos, notes, (plain,))
    ending = _ending(tokenizer, stops)
    chat_notes: tuple[str, ...] = ()
    if ending and ending[0] not in stops:
        token = tokenizer.convert_ids_to_tokens(ending[0])
        chat_notes = (
            f"Answers end with {token}, at which generation does not stop: name it as an EOS token "
            "in the model's generation_config.json.",
        )
    folds = not _takes_system(tokenizer)
    return ChatStyle(tokenizer, True, folds, ending, eos, notes, chat_notes)


def _ending(tokenizer: Any, stops: set[int]) -> tuple[int, ...]:
    """What the template writes after an answer, from the token that ends it on.

    Two answers that differ in their last character: what their ids end with alike is the
    template's. Generation stops at the first stop token, so that one is the end; failing that,
    the first special token is.
    """
    user = Message("user", _PROBE_QUESTION)
    turns = [(user, Message("assistant", answer)) for answer in _PROBE_ANSWERS]
    try:
        one, other = (_apply(tokenizer, pair) for pair in turns)
        text = _apply(tokenizer, turns[0], tokenize=False)
    except Refused:
        return ()
    written = str(text).rpartition(_PROBE_ANSWERS[0])[2]
    tail = one[len(one) - common_prefix(one[::-1], other[::-1]) :]
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = set(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
    special.discard(tokenizer.unk_token_id)
    for ends in (stops, special):
        for place, token in enumerate(tail):
            if token in ends and str(tokenizer.convert_ids_to_tokens(token)) in written:
                return tuple(tail[place:])
    return ()


def _takes_system(tokenizer: Any) -> bool:
    turns = (Message("system", _PROBE_SYSTEM), Message("user", _PROBE_QUESTION))
    try:
        return _PROBE_SYSTEM in str(_apply(tokenizer, turns, tokenize=False))
    except Refused:
        return False


def fold_system(style: ChatStyle, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation with its system turns in front of the first user turn, if it has to be."""
    system = [turn.content for turn in messages if turn.role == "system"]
    rest = [turn for turn in messages if turn.role != "system"]
    first = next((i for i, turn in enumerate(rest) if turn.role == "user"), None)
    if not style.folds_system or not system or first is None:
        return tuple(messages)
    rest[first] = Message("user", "\n\n".join([*system, rest[first].content]))
    return tuple(rest)


def render(
    style: ChatStyle,
    messages: Sequence[Message],
    *,
    generation_prompt: bool = False,
    thinking: bool | None = None,
) -> Ids:
    """A conversation as token ids.

    Args:
        style: Of the tokenizer.
        messages: The turns, system turns already folded where the style wants it.
        generation_prompt: Whether the answer's opening follows; never after an answer.
        thinking: What a thinking template is told; None is mlx-lm's own default.

    Raises:
        Refused: The template raised.
    """
    if style.has_template:
        ids: Ids = list(_apply(style.tokenizer, messages, generation_prompt, thinking))
        return _single_bos(style, ids)
    text = "".join(
        f"\n\n{_PLAIN_NAMES[turn.role]}: {turn.content}" if turn.role != "system" else turn.content
        for turn in messages
    )
    return encode(style, text + ("\n\nAssistant:" if generation_prompt else ""))


def _apply(
    tokenizer: Any,
    messages: Sequence[Message],
    generation_prompt: bool = False,
    thinking: bool | None = None,
    tokenize: bool = True,
) -> Any:
    turns = [{"role": turn.role, "content": turn.content} for turn in messages]
    options = {} if thinking is None else {"enable_thinking": thinking}
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=tokenize, add_generation_prompt=generation_prompt, **options
        )
    # A template is a program of the model's maker: it may raise anything.
    except Exception as error:
        raise Refused(one_line(error, 100)) from None


def encode(style: ChatStyle, text: str) -> Ids:
    """A string as token ids: BOS once if the tokenizer adds one, and no EOS at the end."""
    ids: Ids = _single_bos(style, list(style.tokenizer.encode(text)))
    while len(ids) > 1 and ids[-1] == style.eos:
        ids.pop()
    return ids


def _single_bos(style: ChatStyle, ids: Ids) -> Ids:
    bos = style.tokenizer.bos_token_id
    start = 0
    while bos is not None and ids[start : start + 2] == [bos, bos]:
        start += 1
    return ids[start:]


def end_once(style: ChatStyle, ids: Ids) -> tuple[Ids, bool]:
    r"""A rendered conversation cut right after the token that ends its answer.

    What the template writes behind it (a "\n", an opening for the next turn) goes, and so does
    an end token that the data brought along.

    Returns:
        The ids, and whether the end token had to be appended.
    """
    size = len(style.ending)
    if size and tuple(ids[-size:]) == style.ending:
        ids = ids[: len(ids) - size + 1]
        while len(ids) > 1 and ids[-2] == ids[-1]:
            ids.pop(-2)
        return ids, False
    end = style.ending[0] if size else style.eos
    if end is None:
        return ids, False
    if size and end in ids[-size - 1 :]:
        return ids[: len(ids) - ids[::-1].index(end)], False
    return [*ids, end], True


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    limit = min(len(one), len(other))
    if one[:limit] == other[:limit]:
        return limit
    return next(i for i in range(limit) if one[i] != other[i])
