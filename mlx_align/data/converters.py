"""Convert rows to `PromptGroup`s, one function per data format.

Each function raises `DataError` for a row that is not of its format, and `UnusableRow` for a row
that can't be used for training. `mlx_align.data.formats` decides which format a file has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mlx_align.data.columns import suggest_columns
from mlx_align.data.messages import (
    UnusableRow,
    as_messages,
    as_number,
    as_string,
    as_text,
    as_tools,
    describe_value,
    is_messages,
    is_transcript,
    parse_prompt_transcript,
    parse_transcript,
    required_field,
    split_shared_text,
    split_shared_turns,
)
from mlx_align.data.readers import Row
from mlx_align.errors import DataError
from mlx_align.types import Message, PromptGroup, Text

QUESTION_FIELDS = ("instruction", "question")
_FIRST_STEPS = "initial_reason_steps"  # of Step-DPO's pairs
PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
)
COMPLETION_LIST_FIELDS = ("completions", "responses", "answers")
# Conversations in front of a pair's answers, in the order in which they are tried.
CONVERSATION_FIELDS = (
    *("conversations", "messages", "conversation", "trajectory", "dialogue", "dialog"),
    *("history", "context"),
)
RATING_LIST_FIELDS = ("scores", "ratings", "rank", "ranks")
ALL_RATED_THE_SAME = "all completions rated the same"


# Columns of pictures and sound: training on the text alone would be something else.
_MEDIA_FIELDS = ("image", "images", "audio", "audios", "video", "videos")
# Fields of an object in a list of completions: its text and its rating.
_TEXT_KEYS = ("text", "response", "completion", "content", "answer")
_SCORE_KEYS = ("score", "rating", "overall_score", "pm_score", "fine-grained_score", "rank")

# --- pairs and ranked lists ---


def pair(row: Row) -> PromptGroup:
    """`prompt`, `chosen`, `rejected`: each a string or a list of messages.

    A text prompt ends with `initial_reason_steps`, if there are any: in Step-DPO's data, `chosen`
    and `rejected` are the next step after these.

    Source: Lai et al. 2024 (Step-DPO): the prompt and the steps before are the condition.
    """
    prompt = as_text(row, "prompt", required_field(row, "prompt"))
    steps = row.fields.get(_FIRST_STEPS) or ""
    if steps:
        if not isinstance(prompt, str):
            raise DataError(
                f"{row.source}: {_FIRST_STEPS!r} begins the answer, which a prompt of messages "
                "can't hold; make 'prompt' text that ends with these steps"
            )
        prompt = f"{prompt.rstrip()}\n{as_string(row, _FIRST_STEPS, steps)}"
    completions = tuple(
        as_text(row, key, required_field(row, key)) for key in ("chosen", "rejected")
    )
    used = ("prompt", "system", _FIRST_STEPS)
    return _pair(row, with_system(row, prompt), completions, used)


def implicit_pair(row: Row) -> PromptGroup:
    """`chosen` and `rejected` without a prompt: texts or conversations that share a prefix."""
    whole = [as_text(row, key, required_field(row, key)) for key in ("chosen", "rejected")]
    mapping = suggest_columns(row)
    if mapping and not holds_prompt(row.fields["chosen"]):
        column = mapping.partition("prompt=")[2].split()[0]
        raise DataError(
            f"{row.source}: {column!r} may be the prompt of 'chosen' and 'rejected'; give {mapping}"
            ", or --columns chosen=chosen rejected=rejected if they begin with the prompt"
        )
    strings = [text for text in whole if isinstance(text, str)]
    turns = [text for text in whole if not isinstance(text, str)]
    if len(strings) == 2:
        return _pair(row, *split_shared_text(strings))
    if strings:
        raise DataError(
            f"{row.source}: one of 'chosen' and 'rejected' is text, the other a list of messages; "
            "expected two of one kind"
        )
    return _pair(row, *split_shared_turns(turns))


def transcript_pair(row: Row) -> PromptGroup:
    """HH-RLHF text: whole transcripts, or a transcript as `prompt` and completions as text."""
    if "prompt" in row.fields:
        prompt = parse_prompt_transcript(row, "prompt", row.fields["prompt"])
        completions = [
            as_string(row, k, required_field(row, k)).strip() for k in ("chosen", "rejected")
        ]
        return _pair(row, prompt, completions, ("prompt",))
    whole = [parse_transcript(row, key, required_field(row, key)) for key in ("chosen", "rejected")]
    if any(turns[-1].role != "assistant" for turns in whole):
        raise UnusableRow("does not end with an assistant turn")
    return _pair(row, *split_shared_turns(whole))


def whole_conversation_pair(row: Row) -> PromptGroup:
    """UltraFeedback: `prompt`, and `chosen`/`rejected` as conversations that include it."""
    whole = [as_messages(row, key, required_field(row, key)) for key in ("chosen", "rejected")]
    prompt = as_text(row, "prompt", required_field(row, "prompt"))
    turns, completions = split_shared_turns(whole)
    present = {turn.content.strip() for turn in turns}
    expected = [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]
    if not all(text.strip() in present for text in expected):
        raise DataError(
            f"{row.source}: 'prompt' is not among the turns that 'chosen' and 'rejected' share; "
            "correct it, or ignore it with --format implicit"
        )
    return _pair(row, with_system(row, turns), completions, ("prompt", "system"))


def openai_pair(row: Row) -> PromptGroup:
    """`input.messages`, `preferred_output`, `non_preferred_output`."""
    given = required_field(row, "input")
    if not isinstance(given, dict):
        raise DataError(
            f"{row.source}: 'input' is {describe_value(given)}; expected {{'messages': […]}}"
        )
    prompt = as_messages(row, "input.messages", given.get("messages"))
    keys = ("preferred_output", "non_preferred_output")
    completions = [as_messages(row, key, required_field(row, key)) for key in keys]
    if given.get("tools"):
        row = replace(row, fields={**row.fields, "tools": given["tools"]})
    return _pair(row, prompt, completions, ("input", *keys))


def sharegpt_pair(row: Row) -> PromptGroup:
    """A conversation (one of `CONVERSATION_FIELDS`); `chosen` and `rejected` are its next turn."""
    key = conversation_field(row) or CONVERSATION_FIELDS[0]
    turns = as_messages(row, key, required_field(row, key))
    completions = [as_text(row, name, required_field(row, name)) for name in ("chosen", "rejected")]
    return _pair(row, with_system(row, turns), completions, (key, "system"))


def conversation_field(row: Row) -> str | None:
    """The column that holds a conversation; None without one."""
    return next((key for key in CONVERSATION_FIELDS if is_messages(row.fields.get(key))), None)


def is_pair_of_lists(row: Row) -> bool:
    """Whether `chosen` and `rejected` are lists of texts: several good and several bad answers."""
    return all(
        isinstance(value, list) and value and all(isinstance(text, str) for text in value)
        for value in (row.fields.get(key) for key in ("chosen", "rejected"))
    )


def pair_of_lists(row: Row) -> PromptGroup:
    """`prompt` with lists of texts as `chosen` and `rejected`: those score 1, these 0."""
    fields = {key: v for key, v in row.fields.items() if key not in ("chosen", "rejected")}
    good, bad = required_field(row, "chosen"), required_field(row, "rejected")
    if not is_pair_of_lists(row):
        raise DataError(f"{row.source}: 'chosen' and 'rejected' are no lists of texts")
    fields["completions"] = [*good, *bad]
    fields["scores"] = [1.0] * len(good) + [0.0] * len(bad)
    return ranked(replace(row, fields=fields))


def instruction_pair(row: Row) -> PromptGroup:
    """`instruction` (or `question`) with `input`, `system`, `history`; `chosen`, `rejected`."""
    completions = [as_string(row, key, required_field(row, key)) for key in ("chosen", "rejected")]
    return _pair(
        row, instruction_turns(row), completions, (*QUESTION_FIELDS, "input", "system", "history")
    )


def ranked(row: Row) -> PromptGroup:
    """`prompt` and a list of completions with scores, or ranks (1 is best); returns best first.

    A completion is a string, a list of messages, or an object with a text and a score. Several
    ratings of a completion are averaged. Of two completions, each rater who rated both has a vote:
    the soft label is made of these, and the raters' agreement is put into `columns`.
    """
    prompt_key, prompt, key, values = _prompt_and_list(row)
    rating = next((name for name in RATING_LIST_FIELDS if name in row.fields), None)
    raters: list[list[float]] = []
    if rating is not None:
        ratings = row.fields[rating]
        if not isinstance(ratings, list) or len(ratings) != len(values):
            raise DataError(
                f"{row.source}: {rating!r} is {describe_value(ratings)}; expected one number for "
                f"each of the {len(values)} {key}"
            )
        sign = -1.0 if rating.startswith("rank") else 1.0
        raters = [
            [sign * score for score in _ratings(row, f"{rating}[{i}]", r)]
            for i, r in enumerate(ratings)
        ]
        scores = [sum(given) / len(given) for given in raters]
        texts = [as_text(row, f"{key}[{i}]", value) for i, value in enumerate(values)]
    else:
        rated = [_text_and_score(row, f"{key}[{i}]", value) for i, value in enumerate(values)]
        texts, scores = [text for text, _ in rated], [score for _, score in rated]
    if len(texts) < 2:
        raise UnusableRow("fewer than two completions")
    equal = len(set(scores)) == 1
    if equal and len(texts) > 2:
        raise UnusableRow(ALL_RATED_THE_SAME)
    order = sorted(range(len(texts)), key=lambda i: -scores[i])
    votes = _rater_votes([raters[i] for i in order]) if raters and len(texts) == 2 else None
    group = make_group(
        row,
        with_system(row, prompt),
        [texts[i] for i in order],
        (prompt_key, "input", "history", key, "system", *([rating] if rating else [])),
        scores=tuple(scores[i] for i in order),
        soft_label=None if votes is None else soft_label_of_votes(*votes),
    )
    if equal:
        group = replace(group, strength=0.0)
    if votes is not None:
        agreement = max(votes) / sum(votes)
        group = replace(group, votes=votes, columns={**group.columns, "agreement": agreement})
    return group


def _ratings(row: Row, where: str, value: Any) -> list[float]:
    """One rating, or those of several raters."""
    if not isinstance(value, list):
        return [as_number(row, where, value)]
    if not value:
        raise DataError(f"{row.source}: {where} is empty; expected a number per rater")
    return [as_number(row, f"{where}[{i}]", one) for i, one in enumerate(value)]


def _rater_votes(raters: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Votes of raters who each rated both completions; ties count half. None for one rater."""
    first, second = raters
    if len(first) != len(second) or len(first) < 2:
        return None
    won = sum((a > b) + (a == b) / 2 for a, b in zip(first, second, strict=True))
    return won, len(first) - won


def soft_label_of_votes(first: float, second: float) -> float:
    """The probability that the first of two is better, from the votes for each.

    It is (votes + ½)/(n + 1), the posterior mean under Jeffreys' prior, so that a unanimous vote
    does not mean certainty.
    """
    return (first + 0.5) / (first + second + 1)


def completion_list(row: Row) -> PromptGroup:
    """`prompt` and a list of completions to score, in the order of the row; ratings are ignored."""
    prompt_key, prompt, key, values = _prompt_and_list(row)
    texts = []
    for i, value in enumerate(values):
        where = f"{key}[{i}]"
        if isinstance(value, dict) and (name := _text_key(value)) is not None:
            value = value[name]
        texts.append(as_text(row, where, value))
    if not texts:
        raise UnusableRow("no completions")
    return make_group(
        row,
        with_system(row, prompt),
        texts,
        (prompt_key, "input", "history", key, "system"),
        allow_identical=True,
    )


# --- single completions ---


def unpaired(row: Row) -> PromptGroup:
    """`prompt`, `completion`, `label` (true: desirable; or the probability that it is)."""
    prompt = as_text(row, "prompt", required_field(row, "prompt"))
    completion = _after_prompt(row, prompt)
    return _labelled(row, with_system(row, prompt), completion, "label", "prompt", "completion")


def unpaired_conversation(row: Row) -> PromptGroup:
    """`messages` or `conversations` whose last turn is rated by `label` or `kto_tag`."""
    key, tag = _messages_field(row), "label" if "label" in row.fields else "kto_tag"
    turns = as_messages(row, key, required_field(row, key))
    if len(turns) < 2:
        raise DataError(
            f"{row.source}: {key!r} has only one turn; expected a prompt and a completion"
        )
    prompt = with_system(row, turns[:-1])
    return _labelled(row, prompt, turns[-1:], tag, key)


def _after_prompt(row: Row, prompt: Text) -> Text:
    """The row's `completion`, without the prompt if it is a conversation that begins with it."""
    completion = as_text(row, "completion", required_field(row, "completion"))
    if isinstance(completion, str) or not holds_prompt(row.fields["completion"]):
        return completion
    first = [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]
    for start in range(len(completion) - len(first)):
        turns = completion[start : start + len(first)]
        if [turn.content.strip() for turn in turns] == [text.strip() for text in first]:
            return completion[start + len(first) :]
    return completion


def _labelled(row: Row, prompt: Text, completion: Text, tag: str, *used: str) -> PromptGroup:
    """A labelled completion; a label between 0 and 1 is also its soft label."""
    probability = _label(row, tag)
    if "soft_label" in row.fields:
        soft, _ = _soft_label(row)
        assert soft is not None
        if probability in (0, 1) and soft != 0.5 and (soft > 0.5) != (probability == 1):
            raise DataError(
                f"{row.source}: {tag!r} contradicts 'soft_label' {soft:g}, the probability that "
                "the completion is good; leave one out"
            )
        probability = soft
    return make_group(
        row,
        prompt,
        [completion],
        (*used, tag, "soft_label", "system"),
        label=probability >= 0.5,
        soft_label=None if probability in (0, 1) else probability,
    )


def prompt_completion(row: Row) -> PromptGroup:
    """`prompt` and `completion`; rows with a false `label` are dropped."""
    if "label" in row.fields and _label(row, "label") <= 0.5:
        raise UnusableRow("labelled undesirable")
    prompt = as_text(row, "prompt", required_field(row, "prompt"))
    completion = _after_prompt(row, prompt)
    keys = ("prompt", "completion", "label", "system")
    return make_group(row, with_system(row, prompt), [completion], keys)


def conversation(row: Row) -> PromptGroup:
    """`messages` or `conversations`; the completion starts at the first assistant turn."""
    key = _messages_field(row)
    turns = as_messages(row, key, required_field(row, key))
    roles = [turn.role for turn in turns]
    first = next(
        (i for i, role in enumerate(roles) if role == "assistant" and "user" in roles[:i]), None
    )
    if first is None:
        raise UnusableRow("no assistant turn after a user turn")
    last = max(i for i, role in enumerate(roles) if role == "assistant")
    prompt = with_system(row, turns[:first])
    return make_group(row, prompt, [turns[first : last + 1]], (key, "system", "tools"))


def plain_text(row: Row) -> PromptGroup:
    """`text`: an empty prompt with the text as its completion."""
    text = as_string(row, "text", required_field(row, "text"))
    if not text.strip():
        raise UnusableRow("empty completion")
    return PromptGroup("", (text,), row.source, columns=_other_columns(row, ("text",)))


def instruction_output(row: Row) -> PromptGroup:
    """`instruction` (or `question`) with `input`, `system`, `history`; and `output`."""
    name = "response" if "output" not in row.fields and "response" in row.fields else "output"
    output = as_string(row, name, required_field(row, name))
    keys = (*QUESTION_FIELDS, "input", "context", "system", "system_prompt", "history", name)
    return make_group(row, instruction_turns(row), [output], keys)


def is_tool_call_row(row: Row) -> bool:
    """Whether a row has a question, `tools`, and `answers` that are calls as JSON text (xLAM)."""
    answers = row.fields.get("answers")
    question = any(isinstance(row.fields.get(key), str) for key in ("query", *QUESTION_FIELDS))
    return question and "tools" in row.fields and isinstance(answers, str)


def tool_call_answer(row: Row) -> PromptGroup:
    """`query` (or `question`), `tools`, and `answers`: JSON text of calls with `arguments`."""
    keys = ("query", *QUESTION_FIELDS)
    key = next((key for key in keys if key in row.fields), keys[0])
    prompt = with_system(row, (Message("user", as_string(row, key, required_field(row, key))),))
    turn = {"from": "function_call", "value": required_field(row, "answers")}
    (message,) = as_messages(row, "answers", [turn])
    if not message.tool_calls:
        raise DataError(f"{row.source}: 'answers' holds no calls with a name and arguments")
    return make_group(row, prompt, [(message,)], (key, "answers"))


def scorable_completion(row: Row) -> PromptGroup:
    """`prompt` and `completion` to score; the label is ignored."""
    prompt = as_text(row, "prompt", required_field(row, "prompt"))
    completion = as_text(row, "completion", required_field(row, "completion"))
    return make_group(
        row, with_system(row, prompt), [completion], ("prompt", "completion", "system")
    )


def scorable_conversation(row: Row) -> PromptGroup:
    """`messages` or `conversations`; the last turn is the completion to score."""
    key = "conversations" if "conversations" in row.fields else "messages"
    turns = as_messages(row, key, required_field(row, key))
    if len(turns) < 2:
        raise DataError(
            f"{row.source}: {key!r} has only one turn; expected a prompt and a completion"
        )
    return make_group(row, with_system(row, turns[:-1]), [turns[-1:]], (key, "system"))


# --- prompts ---


def prompt_only(row: Row) -> PromptGroup:
    """`prompt`, `instruction` or `question`, without completions."""
    if "prompt" not in row.fields and any(key in row.fields for key in QUESTION_FIELDS):
        return make_group(
            row, instruction_turns(row), [], (*QUESTION_FIELDS, "input", "system", "history")
        )
    prompt = with_system(row, as_text(row, "prompt", required_field(row, "prompt")))
    return make_group(row, prompt, [], ("prompt", "system"))


def conversation_prompt(row: Row) -> PromptGroup:
    """`messages` or `conversations` as a prompt; assistant turns at the end are removed."""
    key = _messages_field(row)
    turns = as_messages(row, key, required_field(row, key))
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if not turns:
        raise DataError(f"{row.source}: {key!r} has no user turn; expected one")
    return make_group(row, with_system(row, turns), [], (key, "system", "tools"))


# --- shared by the converters ---


def make_group(
    row: Row,
    prompt: Text,
    completions: Sequence[Text],
    used: Sequence[str],
    *,
    scores: tuple[float, ...] | None = None,
    label: bool | None = None,
    soft_label: float | None = None,
    margin: float | None = None,
    allow_identical: bool = False,
) -> PromptGroup:
    """Check a prompt and its completions, and make a group of them.

    If one of them is a list of messages, the others become messages too.

    The row's `tools` become the group's.

    Args:
        row: The row they come from.
        prompt: The prompt.
        completions: The completions.
        used: Fields that were read; all others go into `columns`.
        scores: As in `PromptGroup`.
        label: As in `PromptGroup`.
        soft_label: As in `PromptGroup`.
        margin: As in `PromptGroup`.
        allow_identical: Whether all completions may be the same (to score them).
    """
    if any(not isinstance(text, str) for text in (prompt, *completions)):
        prompt = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        completions = [
            (Message("assistant", text),) if isinstance(text, str) else text for text in completions
        ]
    media = next((key for key in _MEDIA_FIELDS if row.fields.get(key)), None)
    if media is not None and media not in used:
        raise DataError(
            f"{row.source}: has {media!r}, and only text can be trained on; remove the column to "
            "train on the text alone"
        )
    tools = as_tools(row, row.fields["tools"]) if row.fields.get("tools") else ()
    if tools and isinstance(prompt, str):
        raise DataError(
            f"{row.source}: has 'tools', which go through the chat template, but the prompt is "
            "text; write it as messages, or remove the tools"
        )
    _check_prompt(row, prompt)
    for completion in completions:
        _check_completion(row, completion)
    if len(completions) > 1 and len(set(completions)) == 1 and not allow_identical:
        raise UnusableRow("identical completions")
    return PromptGroup(
        prompt,
        tuple(completions),
        row.source,
        scores,
        label,
        soft_label,
        margin,
        columns=_other_columns(row, (*used, "tools") if tools else used),
        tools=tools,
    )


def _check_prompt(row: Row, prompt: Text) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UnusableRow("empty prompt")
    elif prompt[-1].role not in ("user", "tool"):
        raise DataError(
            f"{row.source}: the prompt ends with role {prompt[-1].role!r}; expected a user turn"
        )
    elif not any(turn.content.strip() for turn in prompt):
        raise UnusableRow("empty prompt")


def _check_completion(row: Row, completion: Text) -> None:
    if isinstance(completion, str):
        if not completion.strip():
            raise UnusableRow("empty completion")
    elif {completion[0].role, completion[-1].role} != {"assistant"}:
        ends = (completion[0].role, completion[-1].role)
        role = next(role for role in ends if role != "assistant")
        raise DataError(
            f"{row.source}: a completion starts or ends with role {role!r}; expected 'assistant'"
        )
    elif not completion[-1].content.strip() and not completion[-1].tool_calls:
        raise UnusableRow("empty completion")


def _label(row: Row, key: str) -> float:
    """The probability that a completion is desirable: 0 or 1, or a soft label between."""
    value = required_field(row, key)
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return float(value)
    raise DataError(
        f"{row.source}: {key!r} is {describe_value(value)}; expected true or false, or a "
        "probability"
    )


def instruction_turns(row: Row) -> Text:
    """A prompt from `instruction` (or `question`), `input`, `history` and `system`."""
    keys = (*QUESTION_FIELDS, "input")
    key = next((key for key in keys if key in row.fields), QUESTION_FIELDS[0])
    parts = [as_string(row, key, required_field(row, key))]
    if row.fields.get("input") and key != "input":
        parts.append(as_string(row, "input", row.fields["input"]))
    if key != "input" and isinstance(row.fields.get("context"), str) and row.fields["context"]:
        parts.append(row.fields["context"])
    turns = []
    history = row.fields.get("history") or []
    for turn in history if isinstance(history, list) else [history]:
        if not (isinstance(turn, list) and len(turn) == 2):
            raise DataError(
                f"{row.source}: 'history' holds {describe_value(turn)}; expected a list of "
                "[question, answer] lists"
            )
        turns.append(Message("user", as_string(row, "history", turn[0])))
        turns.append(Message("assistant", as_string(row, "history", turn[1])))
    return with_system(row, (*turns, Message("user", "\n".join(parts))))


def with_system(row: Row, prompt: Text) -> Text:
    """The prompt with the row's `system` (or `system_prompt`), if any, as its first turn."""
    key = "system" if row.fields.get("system") else "system_prompt"
    if not row.fields.get(key):
        return prompt
    if key == "system_prompt" and not isinstance(prompt, str) and prompt[0].role == "system":
        return prompt
    system = Message("system", as_string(row, key, row.fields[key]))
    return (system, *((Message("user", prompt),) if isinstance(prompt, str) else prompt))


def _messages_field(row: Row) -> str:
    return "conversations" if "conversations" in row.fields else "messages"


def _other_columns(row: Row, used: Sequence[str]) -> dict[str, Any]:
    others = {key: value for key, value in row.fields.items() if key not in used}
    return {**(row.extra or {}), **others}


def _prompt_and_list(row: Row) -> tuple[str, Text, str, list[Any]]:
    """The prompt and the list of completions, each preceded by the name of its field."""
    fields = row.fields
    prompt: Text
    if "prompt" in fields or not any(key in fields for key in QUESTION_FIELDS):
        prompt_key = "prompt"
        value = required_field(row, prompt_key)
        if is_transcript(value):
            prompt = parse_prompt_transcript(row, prompt_key, value)
        else:
            prompt = as_text(row, prompt_key, value)
    else:
        prompt_key = next(key for key in QUESTION_FIELDS if key in fields)
        plain = not any(fields.get(key) for key in ("input", "history"))
        prompt = as_text(row, prompt_key, fields[prompt_key]) if plain else instruction_turns(row)
    key = next(
        (key for key in COMPLETION_LIST_FIELDS if key in row.fields), COMPLETION_LIST_FIELDS[0]
    )
    values = required_field(row, key)
    if not isinstance(values, list):
        raise DataError(f"{row.source}: {key!r} is {describe_value(values)}; expected a list")
    return prompt_key, prompt, key, values


def _text_key(value: dict[str, Any]) -> str | None:
    """The field that holds the text of an object with a text and a rating."""
    if "role" in value or "from" in value:
        return None  # a message
    return next((k for k in _TEXT_KEYS if k in value), None)


def _text_and_score(row: Row, where: str, value: Any) -> tuple[Text, float]:
    """The text and the score (or negative rank) of a completion given as an object."""
    if isinstance(value, dict):
        text = _text_key(value)
        score = next((k for k in _SCORE_KEYS if k in value), None)
        if text and score:
            number = as_number(row, f"{where}.{score}", value[score])
            return as_text(row, where, value[text]), -number if score == "rank" else number
        rated = _annotated(value)
        if text and rated:
            return as_text(row, where, value[text]), sum(rated) / len(rated)
    raise DataError(
        f"{row.source}: {where} has no rating; expected a field 'scores', 'ratings' or 'rank', "
        "or completions that are objects with 'text' and 'score'"
    )


def _annotated(value: dict[str, Any]) -> list[float]:
    """UltraFeedback's `annotations`: a rating per aspect; "N/A" counts as no rating."""
    aspects = value.get("annotations")
    found = []
    for aspect in aspects.values() if isinstance(aspects, dict) else ():
        rating = aspect.get("Rating") if isinstance(aspect, dict) else None
        if isinstance(rating, str | int | float) and str(rating).replace(".", "", 1).isdigit():
            found.append(float(rating))
    return found


def _pair(
    row: Row, prompt: Text, completions: Sequence[Text], used: Sequence[str] = ()
) -> PromptGroup:
    soft_label, voted = _soft_label(row)
    keys = next((keys for keys in PAIR_SCORES if set(keys) <= row.fields.keys()), ())
    scores = tuple(as_number(row, key, row.fields[key]) for key in keys) or None
    margin = None
    if "margin" in row.fields:
        margin = as_number(row, "margin", row.fields["margin"])
        if margin < 0:
            raise DataError(f"{row.source}: 'margin' is {margin:g}; expected 0 or more")
    used = ("chosen", "rejected", "margin", *used, *voted, *keys)
    group = make_group(
        row, prompt, completions, used, scores=scores, soft_label=soft_label, margin=margin
    )
    if "votes_chosen" not in voted:
        return group
    chosen, rejected = (as_number(row, key, row.fields[key]) for key in voted)
    return replace(group, votes=(chosen, rejected))


def _soft_label(row: Row) -> tuple[float | None, tuple[str, ...]]:
    """The probability that chosen is better, in [0, 1], and the fields it was read from.

    From votes it is `soft_label_of_votes`.
    """
    given = [key for key in ("soft_label", "chosen_prob") if key in row.fields]
    votes = [key for key in ("votes_chosen", "votes_rejected") if key in row.fields]
    if len(given) + bool(votes) > 1:
        raise DataError(
            f"{row.source}: has {', '.join(map(repr, given + votes))}; expected only one of "
            "'soft_label', 'chosen_prob', and 'votes_chosen' with 'votes_rejected'"
        )
    if given:
        label = as_number(row, given[0], row.fields[given[0]])
        if not 0 <= label <= 1:
            raise DataError(f"{row.source}: {given[0]!r} is {label}; expected 0 to 1")
        return label, tuple(given)
    if not votes:
        return None, ()
    chosen, rejected = (
        as_number(row, key, required_field(row, key)) for key in ("votes_chosen", "votes_rejected")
    )
    if min(chosen, rejected) < 0 or not 0 < chosen + rejected < float("inf"):
        raise DataError(
            f"{row.source}: 'votes_chosen' is {chosen:g} and 'votes_rejected' {rejected:g}; "
            "expected counts, not both 0"
        )
    return soft_label_of_votes(chosen, rejected), tuple(votes)


def holds_prompt(value: Any) -> bool:
    """Whether this value of `chosen` is a conversation that includes the prompt."""
    if not is_messages(value):
        return False
    role = value[0].get("role", value[0].get("from"))
    return isinstance(role, str) and role.lower() in ("user", "human", "system", "developer")


def holds_transcript(row: Row) -> bool:
    """Whether the row's prompt (or `chosen`, if it has no prompt) is HH-RLHF text."""
    key = "prompt" if "prompt" in row.fields else "chosen"
    return is_transcript(row.fields.get(key))
