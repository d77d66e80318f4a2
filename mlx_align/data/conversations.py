"""From JSON values to text: strings, message lists, ShareGPT turns, HH-RLHF transcripts, prefixes.

What these functions refuse, they refuse with a `DataError` naming the row. What is merely of no
use for training (an empty answer, two equal answers) raises `Unusable`: readers drop and count it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from mlx_align.data.sources import Row
from mlx_align.errors import DataError
from mlx_align.types import Message, Text

# What the field calls the four roles.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# Parts of a message that carry meaning and that `Message` has no place for. Leaving them out
# without a word would train something else than the data says.
_UNREAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_WORD_RUN = 32


class Unusable(Exception):
    """A well-formed row that nothing can be learned from; its text is the reason to count."""


def shown(value: Any, limit: int = 40) -> str:
    """A value as an error message shows it: its type, and its text where that is short."""
    if isinstance(value, str):
        text = repr(value[: limit + 1])
        return f"text {text}" if len(value) <= limit else f"text {text[:limit]}…"
    if isinstance(value, bool | int | float):
        return f"{type(value).__name__} {str(value)[:limit]}" if _printable(value) else "a number"
    return {"dict": "object", "NoneType": "null"}.get(type(value).__name__, type(value).__name__)


def _printable(value: float) -> bool:
    return not isinstance(value, int) or value.bit_length() < 1024  # str() of more may refuse


def is_messages(value: Any) -> bool:
    """Whether this looks like a list of turns (`role`/`content` or `from`/`value` objects)."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and ("role" in value[0] or "from" in value[0])
    )


def is_transcript(value: Any) -> bool:
    r"""Whether this is HH-RLHF text: `\n\nHuman: … \n\nAssistant: …`."""
    return (
        isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value
    )


def need(row: Row, key: str) -> Any:
    """The field `key` of a row, or an error that names it and the mend."""
    if key in row.fields:
        return row.fields[key]
    if key in ("chosen", "rejected"):
        other = "rejected" if key == "chosen" else "chosen"
        raise DataError(
            f"{row.source}: no {key!r}; a pair needs a worse answer as well as a better one. Add "
            f"it, leave the row out, or train unpaired ({{prompt, completion, label}}) from the "
            f"{other!r} ones"
        )
    found = ", ".join(map(repr, sorted(row.fields)))[:120] or "nothing"
    raise DataError(f"{row.source}: no {key!r}; found {found}")


def as_string(row: Row, key: str, value: Any) -> str:
    """A value that has to be a string."""
    if not isinstance(value, str):
        raise DataError(f"{row.source}: {key!r} is {shown(value)}; expected text")
    return value


def as_number(row: Row, key: str, value: Any) -> float:
    """A value that has to be a finite number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = float("inf")
        if abs(number) < float("inf"):
            return number
    raise DataError(f"{row.source}: {key!r} is {shown(value)}; expected a finite number")


def as_messages(row: Row, key: str, value: Any) -> tuple[Message, ...]:
    """A value that has to be a non-empty list of turns, by the OpenAI or the ShareGPT names."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{row.source}: {key!r} is {shown(value)}; expected a list of "
            '{"role": …, "content": …} messages'
        )
    return tuple(_message(row, f"{key}[{i}]", turn) for i, turn in enumerate(value))


def _message(row: Row, where: str, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{row.source}: {where} is {shown(turn)}; expected a message object")
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise DataError(
            f"{row.source}: {where} has role {shown(name)}; expected system, user, assistant or "
            "tool"
        )
    for unread in _UNREAD:
        if turn.get(unread):
            raise DataError(
                f"{row.source}: {where} has {unread!r}, which is not read; write it into the "
                "message's content or remove it"
            )
    if turn.get("weight") == 0:
        raise DataError(f"{row.source}: {where} has weight 0, which is not supported; remove it")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(_part(row, where, part) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{row.source}: {where} has content {shown(content)}; expected text")
    return Message(role, content)


def _part(row: Row, where: str, part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else part
    raise DataError(f"{row.source}: {where} has a part that is no text ({shown(kind)})")


def as_text(row: Row, key: str, value: Any) -> Text:
    """A value that may be a string or a list of turns."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | dict):
        return as_messages(row, key, value)
    raise DataError(f"{row.source}: {key!r} is {shown(value)}; expected text or a list of messages")


def parse_transcript(row: Row, key: str, value: Any) -> tuple[Message, ...]:
    r"""HH-RLHF text as messages; turns of one speaker in a row are joined by an empty line."""
    text = as_string(row, key, value)
    starts = list(_HH_TURN.finditer(text.lstrip()))
    if not starts or starts[0].start() != 0:
        raise DataError(
            f"{row.source}: {key!r} is {shown(value)}; expected '\\n\\nHuman: … \\n\\nAssistant: …'"
        )
    text = text.lstrip()
    ends = [match.start() for match in starts[1:]] + [len(text)]
    turns = [
        Message(_ROLES[match[1].lower()], text[match.end() : end].strip())
        for match, end in zip(starts, ends, strict=True)
    ]
    return tuple(
        Message(role, "\n\n".join(turn.content for turn in run if turn.content))
        for role, run in groupby(turns, key=lambda turn: turn.role)
    )


def split_shared_turns(
    conversations: Sequence[tuple[Message, ...]],
) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], ...]]:
    """Part whole conversations into the turns they share, up to an answer, and their answers.

    The shared turns end on a user or tool turn: an answer that all begin with belongs to the
    completions where the conversations go on differently after it.

    Raises:
        Unusable: All are the same conversation, or they share no turns up to an answer.
    """
    if len(set(conversations)) == 1:
        raise Unusable("identical completions")
    shared = 0
    while all(len(c) > shared for c in conversations) and (
        len({c[shared] for c in conversations}) == 1
    ):
        shared += 1
    # Each needs an answer of its own, and what comes before an answer is no answer.
    shared = min(shared, min(map(len, conversations)) - 1)
    first = conversations[0]
    while shared and first[shared - 1].role in ("assistant", "system"):
        shared -= 1
    if not shared:
        raise Unusable("no shared turns to take as prompt")
    return first[:shared], tuple(c[shared:] for c in conversations)


def split_shared_text(texts: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Part strings into their longest common beginning, up to a word, and the rests.

    The blank before the word in which they differ belongs to the completions, as tokenizers have
    it.

    Raises:
        Unusable: The strings are equal, or have no beginning in common.
    """
    if len(set(texts)) == 1:
        raise Unusable("identical completions")
    limit = min(map(len, texts)) - 1
    shared = 0
    while shared < limit and len({text[shared] for text in texts}) == 1:
        shared += 1
    head = texts[0][:shared]
    if shared and any(text[shared].isalnum() for text in texts) and head[-1].isalnum():
        # Languages without blanks between words have no word to go back to.
        word = re.search(rf"\w{{1,{_WORD_RUN}}}\Z", head)
        if word and word.start() and head[word.start() - 1].isspace():
            head = head[: word.start()]
    if head.endswith(" "):
        head = head[:-1]
    if not head.strip():
        raise Unusable("no shared beginning to take as prompt")
    return head, tuple(text[len(head) :] for text in texts)
