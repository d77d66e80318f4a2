"""Convert public preference data: two answers with a verdict, summaries, trees of messages.

The shapes of HelpSteer2 and 3, WebGPT, PKU-SafeRLHF, SHP, Chatbot Arena, MT-Bench, AlpacaFarm,
Prometheus, Stack Exchange (paired), summarize_from_feedback and OpenAssistant. Their prompts are
questions of a user, so text becomes messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from mlx_align.data.converters import (
    COMPLETION_LIST_FIELDS,
    QUESTION_FIELDS,
    RATING_LIST_FIELDS,
    instruction_turns,
    make_group,
    soft_label_of_votes,
    with_system,
)
from mlx_align.data.messages import (
    as_number,
    as_string,
    as_text,
    describe_value,
    is_transcript,
    parse_prompt_transcript,
    required_field,
    split_shared_turns,
)
from mlx_align.data.readers import Row
from mlx_align.errors import DataError
from mlx_align.types import Message, PromptGroup, Text

# Columns of two answers.
_ANSWERS = (
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("response_a", "response_b"),
    ("response_A", "response_B"),
    ("orig_response_A", "orig_response_B"),
    ("answer_0", "answer_1"),
    ("answer_1", "answer_2"),
    ("answer_a", "answer_b"),
    ("answer_A", "answer_B"),
    ("completion_a", "completion_b"),
    ("completion_A", "completion_B"),
    ("output_1", "output_2"),
    ("human_ref_A", "human_ref_B"),
    ("response_j", "response_k"),
)
_CONVERSATIONS = ("conversation_a", "conversation_b")
_PROMPTS = ("prompt", "context", "history", "orig_instruction", "conversation", "input")
# Which answer is better, by name or number.
_CHOICES = (
    "label",
    "better_response_id",
    "winner",
    "preferred",
    "preference",
    "choice",
    "verdict",
    "orig_preference",
    *("better", "better_response", "better_answer", "preferred_response", "preferred_answer"),
    *("human_preference", "overall", "vote"),
)
# A number that is negative if the first answer is better.
_SIGNED = ("strength", "overall_preference", "preference_strength")
_SCORES = (("score_0", "score_1"), ("score_a", "score_b"), ("score_A", "score_B"))
_VOTES = ("votes", "individual_preference")
_VOTE_COLUMNS = (("votes_0", "votes_1"), ("votes_1", "votes_2"), ("votes_a", "votes_b"))
_ARENA_WINNER = ("winner_model_a", "winner_model_b")

_TIE = re.compile(
    r"(hard |soft |about |roughly |nearly )*(the )?(tie|draw|equal|same|both|neither|none)\b.*"
    r"|both[_ ]?bad"
)
# "A>>B", "A = B", and "A is much better".
_SIGN = re.compile(r"(a|b|1|2) *(>+|<+|=+) *(a|b|1|2)")
_PHRASE = re.compile(
    r"(?P<side>a|b)( is| was)?( (?P<much>much|significantly|far|clearly)| slightly| marginally"
    r"| a bit| somewhat)?( better| preferred| wins?| won)( than \w+)?"
)
_PREFIX = re.compile(
    r"(the )?(model|response|answer|assistant|completion|output|option|conversation|choice)[ _-]*"
)
_FIRST, _SECOND = ("a", "first", "left"), ("b", "second", "right")


# --- two answers ---


def is_comparison(row: Row) -> bool:
    """Whether a row has a prompt, two answers and a verdict."""
    fields = row.fields
    if "chosen" in fields or "rejected" in fields:
        return False
    if set(_CONVERSATIONS) <= fields.keys():
        return _has_verdict(row)
    prompt = any(key in fields for key in (*_PROMPTS, *QUESTION_FIELDS))
    return prompt and _answer_columns(row) is not None and _has_verdict(row)


def comparison(row: Row) -> PromptGroup:
    """A prompt, two answers, and which is better.

    The verdict is the name or number of an answer (or a tie), a number that is negative if the
    first answer is better, or a score for each. Votes are counted too, if there are any.
    """
    names, prompt, answers = _prompt_and_answers(row)
    preference, used = _preference(row, names)
    votes, voted = _votes(row, names)
    if preference is None:
        if votes is None:
            raise DataError(f"{row.source}: no verdict; expected one of {', '.join(_CHOICES)}")
        preference = votes[0] - votes[1]
    if preference < 0:
        answers = answers[::-1]
        votes = votes and votes[::-1]
    group = make_group(
        row,
        prompt,
        answers,
        (*names, *_PROMPTS, *QUESTION_FIELDS, "completions", "system", *used, *voted),
        soft_label=None if votes is None else soft_label_of_votes(*votes),
    )
    return replace(group, strength=abs(preference), votes=votes)


def _has_verdict(row: Row) -> bool:
    fields = row.fields
    return (
        any(key in fields for key in (*_CHOICES, *_SIGNED, *_VOTES))
        or any(set(keys) <= fields.keys() for keys in (*_SCORES, *_VOTE_COLUMNS, _ARENA_WINNER))
        or ("human_ref_A" in fields and "labels" in fields)
        or "response_j" in fields
    )


def _answer_columns(row: Row) -> tuple[str, str] | None:
    fields = row.fields
    for key in COMPLETION_LIST_FIELDS:
        values = fields.get(key)
        rated = any(name in fields for name in RATING_LIST_FIELDS)
        if isinstance(values, list) and len(values) == 2 and not rated:
            return row.answers if len(row.answers) == 2 else (f"{key}_0", f"{key}_1")
    return next((names for names in _ANSWERS if set(names) <= fields.keys()), None)


def _prompt_and_answers(row: Row) -> tuple[tuple[str, str], Text, list[Text]]:
    fields = row.fields
    if set(_CONVERSATIONS) <= fields.keys():
        whole = [as_text(row, key, required_field(row, key)) for key in _CONVERSATIONS]
        if any(isinstance(turns, str) for turns in whole):
            raise DataError(f"{row.source}: the conversations are text; expected lists of messages")
        return _CONVERSATIONS, *_shared(row, [t for t in whole if not isinstance(t, str)])
    names = _answer_columns(row)
    if names is None:
        raise DataError(f"{row.source}: no two answers, such as response_a and response_b")
    key = next((k for k in COMPLETION_LIST_FIELDS if names[0] not in fields and k in fields), None)
    values = fields[key] if key is not None else [fields[name] for name in names]
    if key is None and (turns := _json_turns(row, names)):
        return names, *_shared(row, turns)
    answers = [as_text(row, name, value) for name, value in zip(names, values, strict=True)]
    return names, _prompt(row), answers


def _shared(row: Row, conversations: Sequence[tuple[Message, ...]]) -> tuple[Text, list[Text]]:
    prompt, answers = split_shared_turns(conversations)
    return with_system(row, prompt), list(answers)


def _json_turns(row: Row, names: Sequence[str]) -> list[tuple[Message, ...]]:
    """The conversations of Arena's older files: JSON lists of questions and of answers."""
    lists: list[list[str]] = []
    for key in ("prompt", *names):
        text = row.fields.get(key)
        if not isinstance(text, str) or not text.startswith("["):
            return []
        values: Any = None
        with suppress(ValueError):
            values = json.loads(text)
        if not isinstance(values, list) or not all(isinstance(v, str | None) for v in values):
            return []
        lists.append([value or "" for value in values])
    questions, *answers = lists
    if any(len(one) != len(questions) for one in answers):
        return []
    return [
        tuple(
            message
            for question, answer in zip(questions, one, strict=True)
            for message in (Message("user", question), Message("assistant", answer))
        )
        for one in answers
    ]


def _prompt(row: Row) -> Text:
    question = row.fields.get("question")
    if isinstance(question, dict):  # WebGPT
        text = as_string(row, "question.full_text", question.get("full_text"))
        return with_system(row, (Message("user", text),))
    if "orig_instruction" in row.fields:  # next to the judge's own `instruction` (Prometheus)
        text = as_string(row, "orig_instruction", row.fields["orig_instruction"])
        return with_system(row, (Message("user", text),))
    if "prompt" not in row.fields and any(key in row.fields for key in QUESTION_FIELDS):
        return instruction_turns(row)
    key = next((key for key in _PROMPTS if key in row.fields), "prompt")
    value = required_field(row, key)
    if is_transcript(value):
        return with_system(row, parse_prompt_transcript(row, key, value))
    text_or_turns = as_text(row, key, value)
    if isinstance(text_or_turns, str):
        text_or_turns = (Message("user", text_or_turns),)
    return with_system(row, text_or_turns)


def _preference(row: Row, names: Sequence[str]) -> tuple[float | None, tuple[str, ...]]:
    """How much better the first answer is (negative: worse), and the fields that say so."""
    fields = row.fields
    signed = next((key for key in _SIGNED if key in fields), None)
    size = None if signed is None else -as_number(row, signed, fields[signed])
    choice = next((key for key in _CHOICES if key in fields), None)
    if choice is not None:
        side = read_choice(row, choice, fields[choice], names)
        used = (choice,) if signed is None else (choice, signed)
        return (side if size is None else side * abs(size)), used
    if size is not None:
        assert signed is not None
        return size, (signed,)
    if set(_ARENA_WINNER) <= fields.keys():
        first, second = (as_number(row, key, fields[key]) for key in _ARENA_WINNER)
        return first - second, (*_ARENA_WINNER, "winner_tie")
    if "human_ref_A" in fields and "labels" in fields:  # SHP: 1 if A is better
        return 2 * as_number(row, "labels", fields["labels"]) - 1, ("labels",)
    for keys in _SCORES:
        if set(keys) <= fields.keys():
            first, second = (as_number(row, key, fields[key]) for key in keys)
            return first - second, keys
    if names == ("response_j", "response_k"):  # j is the better one
        return 1.0, ()
    return None, ()


def read_choice(row: Row, key: str, value: Any, names: Sequence[str]) -> float:
    """Which of two answers is better: 1 for the first, -1 for the second, 0 for a tie.

    2 and -2 where the verdict is much better (`A>>B`, `A is much better`).

    Args:
        row: The row, for messages.
        key: The field.
        value: Its value: the name of an answer's column or its last character (`model_a`, `A`,
            `first`), its number, or a word for a tie. Numbers count from 0, or from 1 if the
            columns do; 0 is a tie then.
        names: The columns of the two answers.

    Raises:
        DataError: It is something else.
    """
    if isinstance(value, str):
        word = value.strip().strip("[]").lower()
        if word in (name.lower() for name in names):
            return 1.0 if word == names[0].lower() else -1.0
        short = _PREFIX.sub("", word)
        if _TIE.fullmatch(word) or _TIE.fullmatch(short):
            return 0.0
        if short in _FIRST or short in _SECOND:
            return 1.0 if short in _FIRST else -1.0
        if (sign := _SIGN.fullmatch(word)) and (sign[1] in "a1") != (sign[3] in "a1"):
            size = 0.0 if "=" in sign[2] else 1.0 if len(sign[2]) == 1 else 2.0
            return size if (sign[1] in "a1") == (">" in sign[2]) else -size
        if phrase := _PHRASE.fullmatch(short.strip(".! ")):
            size = 2.0 if phrase["much"] else 1.0
            return size if phrase["side"] == "a" else -size
        if re.fullmatch(r"-?\d+(\.\d+)?", short):
            value = float(short)
    if isinstance(value, int | float) and not isinstance(value, bool):
        from_one = names[0][-1:] == "1"
        if value == (1 if from_one else 0):
            return 1.0
        if value == (2 if from_one else 1):
            return -1.0
        if value == (0 if from_one else 0.5):
            return 0.0
    numbers = "1, 2 or 0 (tie)" if names[0][-1:] == "1" else "0 or 1"
    raise DataError(
        f"{row.source}: {key!r} is {describe_value(value)}; expected a, b, tie, {numbers}"
    )


def _votes(row: Row, names: Sequence[str]) -> tuple[tuple[float, float] | None, tuple[str, ...]]:
    """Votes for the first and the second answer, and the field they were read from."""
    key = next((key for key in _VOTES if key in row.fields), None)
    if key is None:
        columns = next((keys for keys in _VOTE_COLUMNS if set(keys) <= row.fields.keys()), ())
        counts = [as_number(row, name, row.fields[name]) for name in columns]
        if not counts or min(counts) < 0 or sum(counts) == 0:
            return None, columns
        return (counts[0], counts[1]), columns
    values = row.fields[key]
    if not isinstance(values, list) or not values:
        return None, (key,)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if numbers and len(values) == 2 and min(values) >= 0:
        first, second = (as_number(row, key, value) for value in values)
    else:
        sides = [_vote(row, f"{key}[{i}]", value, names) for i, value in enumerate(values)]
        first = sum(side > 0 for side in sides) + sum(side == 0 for side in sides) / 2
        second = len(sides) - first
    if first + second == 0:
        return None, (key,)
    return (first, second), (key,)


def _vote(row: Row, where: str, value: Any, names: Sequence[str]) -> float:
    if isinstance(value, Mapping):
        inner = next((k for k in ("score", "preference", "winner", "label") if k in value), None)
        if inner is None:
            raise DataError(f"{row.source}: {where} has no score; expected one")
        value = value[inner]
    if isinstance(value, str):
        return read_choice(row, where, value, names)
    return -as_number(row, where, value)


# --- summaries ---


def is_summaries(row: Row) -> bool:
    """Whether a row is a comparison of summarize_from_feedback."""
    return {"info", "summaries", "choice"} <= row.fields.keys()


def summaries(row: Row) -> PromptGroup:
    """`info` with a `post` or `article`, two `summaries`, and `choice`, the index of the better.

    The prompt is the form of Stiennon et al. 2020, "Learning to summarize from human feedback":
    SUBREDDIT, TITLE, POST, TL;DR.
    """
    info, given = required_field(row, "info"), required_field(row, "summaries")
    if not isinstance(info, dict) or not isinstance(given, list) or len(given) != 2:
        raise DataError(f"{row.source}: expected an object 'info' and two 'summaries'")
    parts = [
        f"{name}: {prefix}{info[key]}"
        for name, key, prefix in (("SUBREDDIT", "subreddit", "r/"), ("TITLE", "title", ""))
        if info.get(key)
    ]
    if info.get("post"):
        parts.append("POST: " + as_string(row, "info.post", info["post"]))
    else:
        parts.append("ARTICLE: " + as_string(row, "info.article", info.get("article")))
    texts: list[Text] = []
    for i, one in enumerate(given):
        text = one.get("text") if isinstance(one, dict) else one
        texts.append(as_string(row, f"summaries[{i}].text", text).strip())
    side = read_choice(row, "choice", required_field(row, "choice"), ("summary_0", "summary_1"))
    if side < 0:
        texts.reverse()
    prompt = (Message("user", "\n\n".join([*parts, "TL;DR:"])),)
    group = make_group(row, prompt, texts, ("info", "summaries", "choice"))
    return replace(group, strength=abs(side))


# --- rows that belong together ---


def is_message_tree(row: Row) -> bool:
    """Whether a row is one of the trees of messages, or one of their messages (OpenAssistant)."""
    root = row.fields.get("prompt")
    if isinstance(root, dict) and "replies" in root:
        return True
    return {"message_id", "text", "role"} <= row.fields.keys()


def expand_trees(rows: Sequence[Row]) -> list[Row]:
    """One row per user turn with two or more ranked replies: `prompt`, `completions`, `ranks`.

    Raises:
        DataError: No turn has two ranked replies.
    """
    found: list[Row] = []
    if isinstance(rows[0].fields.get("prompt"), dict):
        for row in rows:
            root = required_field(row, "prompt")
            if not isinstance(root, dict):
                raise DataError(
                    f"{row.source}: 'prompt' is {describe_value(root)}; expected a message"
                )
            _visit(row.source, root, (), found)
    else:
        replies: dict[Any, list[Row]] = {}
        for row in rows:
            if not isinstance(row.fields.get("parent_id"), str | int | None):
                raise DataError(f"{row.source}: 'parent_id' is not a name; expected text")
            replies.setdefault(row.fields.get("parent_id"), []).append(row)

        def nested(row: Row) -> dict[str, Any]:
            below = [nested(child) for child in replies.pop(row.fields.get("message_id"), ())]
            return {**row.fields, "replies": below}

        for top in replies.pop(None, ()):
            _visit(top.source, nested(top), (), found)
    if not found:
        raise DataError(f"{rows[0].source}: no message has two or more ranked replies")
    return found


def _visit(
    source: str, node: Mapping[str, Any], before: tuple[dict[str, str], ...], found: list[Row]
) -> None:
    text = node.get("text")
    if not isinstance(text, str):
        return
    role = "assistant" if node.get("role") == "assistant" else "user"
    turns = (*before, {"role": role, "content": text})
    below = node.get("replies")
    replies = [
        reply
        for reply in (below if isinstance(below, list) else ())
        if isinstance(reply, dict) and not reply.get("deleted")
    ]
    ranked = [r for r in replies if isinstance(r.get("rank"), int | float) and r.get("text")]
    if role == "user" and len(ranked) > 1:
        fields = {
            "prompt": list(turns),
            "completions": [reply["text"] for reply in ranked],
            "ranks": [reply["rank"] for reply in ranked],
        }
        found.append(Row(source, fields, {k: node[k] for k in ("lang",) if k in node}))
    for reply in replies:
        _visit(source, reply, turns, found)


def is_scored(row: Row) -> bool:
    """Whether a row is one completion of a prompt with a score."""
    return _scored_fields(row) is not None


def expand_scored(rows: Sequence[Row]) -> list[Row]:
    """Join the rows of each prompt: `prompt`, `completions`, `scores`.

    Raises:
        DataError: Every prompt has only one row.
    """
    joined: dict[str, list[Row]] = {}
    for row in rows:
        prompt = json.dumps(required_field(row, "prompt"), sort_keys=True)
        joined.setdefault(prompt, []).append(row)
    found = []
    for same in joined.values():
        if len(same) < 2:
            continue
        names = [_scored_fields(row) or ("completion", "score") for row in same]
        fields = {
            "prompt": same[0].fields["prompt"],
            "completions": [required_field(r, t) for r, (t, _) in zip(same, names, strict=True)],
            "scores": [required_field(r, s) for r, (_, s) in zip(same, names, strict=True)],
        }
        for key in ("system", "tools"):
            if key in same[0].fields:
                fields[key] = same[0].fields[key]
        found.append(Row(same[0].source, fields, {}))
    if not found:
        raise DataError(
            f"{rows[0].source}: each prompt has one scored completion; pairs need two of a prompt "
            "(for labelled completions use kto)"
        )
    return found


def _scored_fields(row: Row) -> tuple[str, str] | None:
    """The fields of completion and score."""
    fields = row.fields
    if "prompt" not in fields or "chosen" in fields or "label" in fields:
        return None
    text = next((key for key in ("completion", "response") if key in fields), None)
    score = next((key for key in ("scores", "score", "helpfulness") if key in fields), None)
    if text is None or score is None or not isinstance(fields[score], int | float):
        return None
    return text, score
