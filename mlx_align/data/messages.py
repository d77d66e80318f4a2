"""Convert JSON values to text: strings, message lists, ShareGPT turns and HH-RLHF transcripts.

Malformed values raise a `DataError` that names the row. Well-formed rows that can't be used for
training (an empty completion, two identical completions) raise `UnusableRow`; readers drop and
count them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from mlx_align.data.columns import suggest_columns
from mlx_align.data.readers import Row
from mlx_align.errors import DataError
from mlx_align.types import Message, Text, ToolCall

# The names used for the four roles.
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
# Names of the field for the thinking before an answer, as servers and data sets write it.
_REASONING = ("reasoning_content", "reasoning", "thinking")

_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
# The longest word that `split_shared_text` goes back over; languages without spaces have no words.
_MAX_WORD_LENGTH = 32


class UnusableRow(Exception):
    """A well-formed row that can't be used. Readers count such rows by the reason, its text."""


def describe_value(value: Any, limit: int = 40) -> str:
    """Describe a value for an error message: its type, and its text if that is short."""
    if isinstance(value, str):
        text = repr(value[: limit + 1])
        return f"text {text}" if len(value) <= limit else f"text {text[:limit]}…"
    if isinstance(value, bool | int | float):
        return f"{type(value).__name__} {str(value)[:limit]}" if _printable(value) else "a number"
    return {"dict": "object", "NoneType": "null"}.get(type(value).__name__, type(value).__name__)


def _printable(value: float) -> bool:
    return not isinstance(value, int) or value.bit_length() < 1024  # str() refuses longer ones


def is_messages(value: Any) -> bool:
    """Whether this is a list of messages (`role`/`content` or `from`/`value` objects)."""
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


def required_field(row: Row, key: str) -> Any:
    """The field `key` of a row.

    Raises:
        DataError: The row has no such field.
    """
    if key in row.fields:
        return row.fields[key]
    if key in ("chosen", "rejected"):
        other = "rejected" if key == "chosen" else "chosen"
        if mapping := suggest_columns(row):
            raise DataError(f"{row.source}: no {key!r}; try {mapping}")
        raise DataError(
            f"{row.source}: no {key!r}; a pair needs a chosen and a rejected completion. Add it, "
            "remove the row, or train on unpaired data (prompt, completion, label) made from the "
            f"{other!r} completions"
        )
    found = ", ".join(map(repr, sorted(row.fields)))[:120] or "nothing"
    raise DataError(f"{row.source}: no {key!r}; found {found}")


def as_string(row: Row, key: str, value: Any) -> str:
    """Check that a value is a string."""
    if not isinstance(value, str):
        raise DataError(f"{row.source}: {key!r} is {describe_value(value)}; expected text")
    return value


def as_number(row: Row, key: str, value: Any) -> float:
    """Check that a value is a finite number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = float("inf")
        if abs(number) < float("inf"):
            return number
    raise DataError(f"{row.source}: {key!r} is {describe_value(value)}; expected a finite number")


def as_messages(row: Row, key: str, value: Any) -> tuple[Message, ...]:
    """Convert a non-empty list of messages with OpenAI or ShareGPT field names."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{row.source}: {key!r} is {describe_value(value)}; expected a list of "
            '{"role": …, "content": …} messages'
        )
    return tuple(_message(row, f"{key}[{i}]", turn) for i, turn in enumerate(value))


def _message(row: Row, where: str, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise DataError(
            f"{row.source}: {where} is {describe_value(turn)}; expected a message object"
        )
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise DataError(
            f"{row.source}: {where} has role {describe_value(name)}; expected system, user, "
            "assistant or tool"
        )
    if turn.get("weight") == 0 and role == "assistant":
        raise DataError(f"{row.source}: {where} has weight 0, which is not supported; remove it")
    calls = _tool_calls(row, where, turn)
    if name == "function_call" and not calls and (written := _written_calls(turn)):
        turn, calls = {**turn, "content": "", "value": ""}, written
    reasoning = next((turn[key] for key in _REASONING if turn.get(key)), None)
    if reasoning is not None and not isinstance(reasoning, str):
        raise DataError(
            f"{row.source}: {where} has reasoning {describe_value(reasoning)}; expected text"
        )
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(_part(row, where, part) for part in content)
    if content is None and (calls or reasoning is not None):
        content = ""
    if not isinstance(content, str):
        raise DataError(
            f"{row.source}: {where} has content {describe_value(content)}; expected text"
        )
    if (calls or reasoning is not None) and role != "assistant":
        what = "tool calls" if calls else "reasoning"
        raise DataError(f"{row.source}: {where} has {what}, but role {role!r}; expected assistant")
    names = (turn.get(key) for key in ("name", "tool_call_id"))
    tool, call_id = (value if isinstance(value, str) and value else None for value in names)
    return Message(role, content, reasoning, calls, tool, call_id)


def _tool_calls(row: Row, where: str, turn: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """The message's `tool_calls`, or its one `function_call` (OpenAI's older form)."""
    calls = turn.get("tool_calls") or []
    if not calls and turn.get("function_call"):
        calls = [{"function": turn["function_call"]}]
    if not isinstance(calls, list):
        raise DataError(
            f"{row.source}: {where}.tool_calls is {describe_value(calls)}; expected a list"
        )
    return tuple(_tool_call(row, f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls))


def _written_calls(turn: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """The calls of a ShareGPT turn from `function_call`: JSON with a name and arguments, or a list.

    Empty if its text is something else.
    """
    try:
        value = json.loads(turn.get("value", turn.get("content")))
    except (TypeError, ValueError, RecursionError):
        return ()
    calls = value if isinstance(value, list) else [value]
    known = all(
        isinstance(call, dict) and isinstance(call.get("name"), str) and "arguments" in call
        for call in calls
    )
    if not calls or not known:
        return ()
    return tuple(
        ToolCall(call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in calls
    )


def _tool_call(row: Row, where: str, call: Any) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise DataError(
            f'{row.source}: {where} is {describe_value(call)}; expected {{"function": {{"name": …, '
            '"arguments": …}}'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI's API writes the arguments as JSON text
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise DataError(
                f"{row.source}: {where} has arguments {describe_value(arguments)}; expected JSON"
            ) from None
    identifier = call.get("id")
    text = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return ToolCall(name, text, identifier if isinstance(identifier, str) else None)


def as_tools(row: Row, value: Any) -> tuple[Mapping[str, Any], ...]:
    """Convert the `tools` column: a list of function descriptions, or such a list as JSON text.

    Fields that are null are removed: tables of the `datasets` library fill every description with
    the fields of all others.
    """
    tools = value
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{row.source}: 'tools' is {describe_value(value)}; expected a list of function "
            "descriptions (rename the column if it holds something else)"
        )
    return tuple(_without_null(tool) for tool in tools)


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _part(row: Row, where: str, part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(part, str):
        return part
    kind = str(part.get("type")) if isinstance(part, dict) else type(part).__name__
    raise DataError(
        f"{row.source}: {where} has a part of type {kind[:40]!r}; expected text only (images, "
        "audio and video can't be trained on)"
    )


def as_text(row: Row, key: str, value: Any) -> Text:
    """Convert a value that is a string or a list of messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | dict):
        return as_messages(row, key, value)
    raise DataError(
        f"{row.source}: {key!r} is {describe_value(value)}; expected text or a list of messages"
    )


def parse_transcript(row: Row, key: str, value: Any) -> tuple[Message, ...]:
    r"""Parse HH-RLHF text; consecutive turns of one role are joined by an empty line."""
    text = as_string(row, key, value)
    starts = list(_HH_TURN.finditer(text.lstrip()))
    if not starts or starts[0].start() != 0:
        raise DataError(
            f"{row.source}: {key!r} is {describe_value(value)}; expected "
            "'\\n\\nHuman: … \\n\\nAssistant: …'"
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


def parse_prompt_transcript(row: Row, key: str, value: Any) -> tuple[Message, ...]:
    """Parse an HH-RLHF transcript that is a prompt: without the open "Assistant:" at its end."""
    turns = parse_transcript(row, key, value)
    return turns[:-1] if turns[-1] == Message("assistant", "") else turns


def split_shared_turns(
    conversations: Sequence[tuple[Message, ...]],
) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], ...]]:
    """Split conversations into their common prompt and a completion each.

    The prompt ends with a user or tool turn. If the conversations share an assistant turn and
    differ later, that turn belongs to the completions.

    Raises:
        UnusableRow: All conversations are the same, or they don't share a prompt.
    """
    if len(set(conversations)) == 1:
        raise UnusableRow("identical completions")
    shared = 0
    while all(len(c) > shared for c in conversations) and (
        len({c[shared] for c in conversations}) == 1
    ):
        shared += 1
    # Each conversation needs a completion, and the turn before a completion is not an assistant's.
    shared = min(shared, min(map(len, conversations)) - 1)
    first = conversations[0]
    while shared and first[shared - 1].role in ("assistant", "system"):
        shared -= 1
    if not shared:
        raise UnusableRow("no shared turns to take as prompt")
    return first[:shared], tuple(c[shared:] for c in conversations)


def split_shared_text(texts: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Split strings into their longest common prefix, cut at a word boundary, and the rest.

    The space before the first word that differs belongs to the completions, because tokenizers
    join it to the word.

    Raises:
        UnusableRow: The strings are equal, or have no common prefix.
    """
    if len(set(texts)) == 1:
        raise UnusableRow("identical completions")
    limit = min(map(len, texts)) - 1
    shared = 0
    while shared < limit and len({text[shared] for text in texts}) == 1:
        shared += 1
    head = texts[0][:shared]
    if shared and any(text[shared].isalnum() for text in texts) and head[-1].isalnum():
        word = re.search(rf"\w{{1,{_MAX_WORD_LENGTH}}}\Z", head)
        if word and word.start() and head[word.start() - 1].isspace():
            head = head[: word.start()]
    if head.endswith(" "):
        head = head[:-1]
    if not head.strip():
        raise UnusableRow("no shared beginning to take as prompt")
    return head, tuple(text[len(head) :] for text in texts)


def plain_text(text: Text) -> str:
    """The text of a prompt or completion, without roles."""
    return text if isinstance(text, str) else "\n".join(turn.content for turn in text)


def text_as_json(text: Text) -> str | list[dict[str, Any]]:
    """Text as it is; a conversation as a list of messages."""
    return text if isinstance(text, str) else [turn.to_dict() for turn in text]
