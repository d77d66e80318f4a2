"""From a row to a `PromptGroup`, one function per format of single answers and of prompts.

Each raises `DataError` for a row that isn't of its format, and `Unusable` for one nothing can be
learned from. Which format a file has is decided in `mlx_align.data.formats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_align.data.conversations import (
    Unusable,
    as_messages,
    as_string,
    as_text,
    need,
    shown,
)
from mlx_align.data.sources import Row
from mlx_align.errors import DataError
from mlx_align.types import Message, PromptGroup, Text

QUESTIONS = ("instruction", "question")


def unpaired(row: Row) -> PromptGroup:
    """`prompt`, `completion`, `label` (true: desirable)."""
    prompt = as_text(row, "prompt", need(row, "prompt"))
    answer = as_text(row, "completion", need(row, "completion"))
    keys = ("prompt", "completion", "label", "system")
    return group(row, with_system(row, prompt), [answer], keys, label=_label(row, "label"))


def unpaired_conversation(row: Row) -> PromptGroup:
    """`messages` or `conversations` ending with the rated answer, and `label` or `kto_tag`."""
    key, tag = _turns_key(row), "label" if "label" in row.fields else "kto_tag"
    turns = as_messages(row, key, need(row, key))
    if len(turns) < 2:
        raise DataError(f"{row.source}: {key!r} holds one turn; expected a question and an answer")
    prompt = with_system(row, turns[:-1])
    return group(row, prompt, [turns[-1:]], (key, tag, "system"), label=_label(row, tag))


def prompt_completion(row: Row) -> PromptGroup:
    """`prompt` and `completion`; of rows with a `label`, the desirable ones."""
    if "label" in row.fields and not _label(row, "label"):
        raise Unusable("labelled undesirable")
    prompt = as_text(row, "prompt", need(row, "prompt"))
    answer = as_text(row, "completion", need(row, "completion"))
    keys = ("prompt", "completion", "label", "system")
    return group(row, with_system(row, prompt), [answer], keys)


def conversation(row: Row) -> PromptGroup:
    """`messages` or `conversations`: everything from the first answer on is the completion."""
    key = _turns_key(row)
    turns = as_messages(row, key, need(row, key))
    if row.fields.get("tools"):
        raise DataError(f"{row.source}: 'tools' is not read; write it into a system message")
    roles = [turn.role for turn in turns]
    first = next(
        (i for i, role in enumerate(roles) if role == "assistant" and "user" in roles[:i]), None
    )
    if first is None:
        raise Unusable("no answer to a user's turn")
    last = max(i for i, role in enumerate(roles) if role == "assistant")
    prompt = with_system(row, turns[:first])
    return group(row, prompt, [turns[first : last + 1]], (key, "system", "tools"))


def plain_text(row: Row) -> PromptGroup:
    """`text` alone: an empty prompt and the text as its completion."""
    text = as_string(row, "text", need(row, "text"))
    if not text.strip():
        raise Unusable("empty completion")
    return PromptGroup("", (text,), row.source, columns=_others(row, ("text",)))


def instruction_output(row: Row) -> PromptGroup:
    """`instruction` (or `question`) with `input`, `system`, `history`; and `output`."""
    output = as_string(row, "output", need(row, "output"))
    keys = (*QUESTIONS, "input", "system", "history", "output")
    return group(row, instruction_turns(row), [output], keys)


def prompt_only(row: Row) -> PromptGroup:
    """`prompt`, or a question, without completions."""
    if "prompt" not in row.fields and any(key in row.fields for key in QUESTIONS):
        return group(row, instruction_turns(row), [], (*QUESTIONS, "input", "system", "history"))
    prompt = with_system(row, as_text(row, "prompt", need(row, "prompt")))
    return group(row, prompt, [], ("prompt", "system"))


def conversation_prompt(row: Row) -> PromptGroup:
    """`messages` or `conversations` to be answered; an answer that they end with is left out."""
    key = _turns_key(row)
    turns = as_messages(row, key, need(row, key))
    if row.fields.get("tools"):
        raise DataError(f"{row.source}: 'tools' is not read; write it into a system message")
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if not turns:
        raise DataError(f"{row.source}: {key!r} has no user turn; expected a question to answer")
    return group(row, with_system(row, turns), [], (key, "system", "tools"))


def group(
    row: Row,
    prompt: Text,
    completions: Sequence[Text],
    used: Sequence[str],
    *,
    scores: tuple[float, ...] | None = None,
    label: bool | None = None,
    soft_label: float | None = None,
    margin: float | None = None,
    alike: bool = False,
) -> PromptGroup:
    """A checked group: a string beside messages becomes a message, `used` fields no columns.

    `alike` says whether all completions may be the same, which nothing can be learned from.
    """
    if any(not isinstance(text, str) for text in (prompt, *completions)):
        prompt = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        completions = [
            (Message("assistant", text),) if isinstance(text, str) else text for text in completions
        ]
    _check_prompt(row, prompt)
    for completion in completions:
        _check_completion(row, completion)
    if len(completions) > 1 and len(set(completions)) == 1 and not alike:
        raise Unusable("identical completions")
    return PromptGroup(
        prompt,
        tuple(completions),
        row.source,
        scores,
        label,
        soft_label,
        margin,
        columns=_others(row, used),
    )


def _check_prompt(row: Row, prompt: Text) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise Unusable("empty prompt")
    elif prompt[-1].role not in ("user", "tool"):
        raise DataError(
            f"{row.source}: the prompt ends with role {prompt[-1].role!r}; expected a user turn"
        )
    elif not any(turn.content.strip() for turn in prompt):
        raise Unusable("empty prompt")


def _check_completion(row: Row, completion: Text) -> None:
    if isinstance(completion, str):
        if not completion.strip():
            raise Unusable("empty completion")
    elif {completion[0].role, completion[-1].role} != {"assistant"}:
        role = next(turn.role for turn in (completion[0], completion[-1]) if turn.role[0] != "a")
        raise DataError(
            f"{row.source}: a completion begins or ends with role {role!r}; expected 'assistant'"
        )
    elif not completion[-1].content.strip():
        raise Unusable("empty completion")


def _label(row: Row, key: str) -> bool:
    value = need(row, key)
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise DataError(f"{row.source}: {key!r} is {shown(value)}; expected true or false")


def instruction_turns(row: Row) -> Text:
    """A prompt from `instruction` (or `question`), `input`, `history` and `system`."""
    key = next((key for key in QUESTIONS if key in row.fields), QUESTIONS[0])
    parts = [as_string(row, key, need(row, key))]
    if row.fields.get("input"):
        parts.append(as_string(row, "input", row.fields["input"]))
    turns = []
    history = row.fields.get("history") or []
    for turn in history if isinstance(history, list) else [history]:
        if not (isinstance(turn, list) and len(turn) == 2):
            raise DataError(f"{row.source}: 'history' expects [question, answer] lists")
        turns.append(Message("user", as_string(row, "history", turn[0])))
        turns.append(Message("assistant", as_string(row, "history", turn[1])))
    return with_system(row, (*turns, Message("user", "\n".join(parts))))


def with_system(row: Row, prompt: Text) -> Text:
    """The prompt with the row's `system` field as its first turn, if there is one."""
    if not row.fields.get("system"):
        return prompt
    system = Message("system", as_string(row, "system", row.fields["system"]))
    return (system, *((Message("user", prompt),) if isinstance(prompt, str) else prompt))


def _turns_key(row: Row) -> str:
    return "conversations" if "conversations" in row.fields else "messages"


def _others(row: Row, used: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in row.fields.items() if key not in used}
