"""From a row to a `PromptGroup`, one function per format of pairs and ranked lists.

Each raises `DataError` for a row that isn't of its format, and `Unusable` for one nothing can be
learned from. Which format a file has is decided in `mlx_align.data.formats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_align.data.conversations import (
    Unusable,
    as_messages,
    as_number,
    as_string,
    as_text,
    is_messages,
    is_transcript,
    need,
    parse_transcript,
    shown,
    split_shared_text,
    split_shared_turns,
)
from mlx_align.data.converters import QUESTIONS, group, instruction_turns, with_system
from mlx_align.data.sources import Row
from mlx_align.errors import DataError
from mlx_align.types import Message, PromptGroup, Text

PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
COMPLETION_LISTS = ("completions", "responses")
RATING_LISTS = ("scores", "ratings", "rank", "ranks")


def pair(row: Row) -> PromptGroup:
    """`prompt`, `chosen`, `rejected`: each a string or a list of messages."""
    prompt = as_text(row, "prompt", need(row, "prompt"))
    answers = tuple(as_text(row, key, need(row, key)) for key in ("chosen", "rejected"))
    return _pair(row, with_system(row, prompt), answers, ("prompt", "system"))


def implicit_pair(row: Row) -> PromptGroup:
    """`chosen` and `rejected` alone: whole texts or conversations with a common beginning."""
    whole = [as_text(row, key, need(row, key)) for key in ("chosen", "rejected")]
    strings = [text for text in whole if isinstance(text, str)]
    turns = [text for text in whole if not isinstance(text, str)]
    if len(strings) == 2:
        return _pair(row, *split_shared_text(strings))
    if strings:
        raise DataError(f"{row.source}: one of 'chosen' and 'rejected' is text, the other messages")
    return _pair(row, *split_shared_turns(turns))


def transcript_pair(row: Row) -> PromptGroup:
    """HH-RLHF text: whole transcripts, or a transcript as `prompt` and bare answers."""
    if "prompt" in row.fields:
        prompt = parse_transcript(row, "prompt", row.fields["prompt"])
        if prompt[-1] == Message("assistant", ""):  # the open "Assistant:" at the end
            prompt = prompt[:-1]
        answers = [as_string(row, k, need(row, k)).strip() for k in ("chosen", "rejected")]
        return _pair(row, prompt, answers, ("prompt",))
    whole = [parse_transcript(row, key, need(row, key)) for key in ("chosen", "rejected")]
    if any(turns[-1].role != "assistant" for turns in whole):
        raise Unusable("does not end with an answer")
    return _pair(row, *split_shared_turns(whole))


def whole_conversation_pair(row: Row) -> PromptGroup:
    """UltraFeedback: `prompt`, and `chosen`/`rejected` as conversations that include it."""
    whole = [as_messages(row, key, need(row, key)) for key in ("chosen", "rejected")]
    prompt = as_text(row, "prompt", need(row, "prompt"))
    turns, answers = split_shared_turns(whole)
    asked = {turn.content.strip() for turn in turns}
    wanted = [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]
    if not all(text.strip() in asked for text in wanted):
        raise DataError(
            f"{row.source}: 'prompt' is not among the turns that 'chosen' and 'rejected' share; "
            "correct it, or read the conversations alone with --format implicit"
        )
    return _pair(row, with_system(row, turns), answers, ("prompt", "system"))


def openai_pair(row: Row) -> PromptGroup:
    """`input.messages`, `preferred_output`, `non_preferred_output`."""
    given = need(row, "input")
    if not isinstance(given, dict):
        raise DataError(f"{row.source}: 'input' is {shown(given)}; expected {{'messages': […]}}")
    if given.get("tools"):
        raise DataError(f"{row.source}: 'input.tools' is not read; remove it")
    prompt = as_messages(row, "input.messages", given.get("messages"))
    keys = ("preferred_output", "non_preferred_output")
    answers = [as_messages(row, key, need(row, key)) for key in keys]
    return _pair(row, prompt, answers, ("input", *keys))


def sharegpt_pair(row: Row) -> PromptGroup:
    """`conversations` with `from`/`value` turns, `chosen` and `rejected` as one turn each."""
    turns = as_messages(row, "conversations", need(row, "conversations"))
    answers = [as_text(row, key, need(row, key)) for key in ("chosen", "rejected")]
    return _pair(row, with_system(row, turns), answers, ("conversations", "system"))


def instruction_pair(row: Row) -> PromptGroup:
    """`instruction` (or `question`) with `input`, `system`, `history`; `chosen`, `rejected`."""
    answers = [as_string(row, key, need(row, key)) for key in ("chosen", "rejected")]
    return _pair(row, instruction_turns(row), answers, (*QUESTIONS, "input", "system", "history"))


def ranked(row: Row) -> PromptGroup:
    """`prompt` and a list of completions with scores, or ranks (1 is best): best first.

    The completions are strings, message lists, or objects with a text and a score of their own.
    """
    asked, prompt, key, values = _prompt_and_list(row)
    rating = next((name for name in RATING_LISTS if name in row.fields), None)
    if rating is not None:
        ratings = row.fields[rating]
        if not isinstance(ratings, list) or len(ratings) != len(values):
            raise DataError(
                f"{row.source}: {rating!r} is {shown(ratings)}; expected one number for each of "
                f"the {len(values)} {key}"
            )
        sign = -1.0 if rating.startswith("rank") else 1.0
        scores = [sign * as_number(row, f"{rating}[{i}]", r) for i, r in enumerate(ratings)]
        texts = [as_text(row, f"{key}[{i}]", value) for i, value in enumerate(values)]
    else:
        rated = [_rated(row, f"{key}[{i}]", value) for i, value in enumerate(values)]
        texts, scores = [text for text, _ in rated], [score for _, score in rated]
    if len(texts) < 2:
        raise Unusable("fewer than two completions")
    if len(set(scores)) == 1:
        raise Unusable("all completions rated the same")
    order = sorted(range(len(texts)), key=lambda i: -scores[i])
    return group(
        row,
        with_system(row, prompt),
        [texts[i] for i in order],
        (asked, key, "system", *([rating] if rating else [])),
        scores=tuple(scores[i] for i in order),
    )


def listed(row: Row) -> PromptGroup:
    """The same to be scored: in the order of the row, ratings or not, one completion or more."""
    asked, prompt, key, values = _prompt_and_list(row)
    texts = []
    for i, value in enumerate(values):
        where = f"{key}[{i}]"
        if isinstance(value, dict) and (name := _text_key(value)) is not None:
            value = value[name]
        texts.append(as_text(row, where, value))
    if not texts:
        raise Unusable("no completions")
    return group(row, with_system(row, prompt), texts, (asked, key, "system"), alike=True)


def _prompt_and_list(row: Row) -> tuple[str, Text, str, list[Any]]:
    """The prompt and the completions of a list, each with the name of its field."""
    asked = "prompt" if "prompt" in row.fields else "instruction"
    prompt = as_text(row, asked, need(row, asked))
    key = next((key for key in COMPLETION_LISTS if key in row.fields), COMPLETION_LISTS[0])
    values = need(row, key)
    if not isinstance(values, list):
        raise DataError(f"{row.source}: {key!r} is {shown(values)}; expected a list")
    return asked, prompt, key, values


def _text_key(value: dict[str, Any]) -> str | None:
    """Under which name an object with a text and a rating holds the text."""
    if "role" in value or "from" in value:
        return None  # a message
    return next((k for k in ("text", "response", "completion", "content") if k in value), None)


def _rated(row: Row, where: str, value: Any) -> tuple[Text, float]:
    if isinstance(value, dict):
        text = _text_key(value)
        score = next((k for k in ("score", "rating", "overall_score", "rank") if k in value), None)
        if text and score:
            number = as_number(row, f"{where}.{score}", value[score])
            return as_text(row, where, value[text]), -number if score == "rank" else number
    raise DataError(
        f"{row.source}: {where} has no rating; expected 'scores', 'ratings' or 'rank' beside the "
        "completions, or objects with 'text' and 'score'"
    )


def _pair(row: Row, prompt: Text, answers: Sequence[Text], used: Sequence[str] = ()) -> PromptGroup:
    soft_label, votes = _soft_label(row)
    keys = next((keys for keys in PAIR_SCORES if set(keys) <= row.fields.keys()), ())
    scores = tuple(as_number(row, key, row.fields[key]) for key in keys) or None
    margin = None
    if "margin" in row.fields:
        margin = as_number(row, "margin", row.fields["margin"])
        if margin < 0:
            raise DataError(f"{row.source}: 'margin' is {margin:g}; expected 0 or more")
    used = ("chosen", "rejected", "margin", *used, *votes, *keys)
    return group(row, prompt, answers, used, scores=scores, soft_label=soft_label, margin=margin)


def _soft_label(row: Row) -> tuple[float | None, tuple[str, ...]]:
    """The probability that chosen is better, in [0, 1], and the fields it was read from.

    Of votes it is (votes + ½)/(n + 1), the mean of what Jeffreys' prior makes of them: three of
    three do not make it certain.
    """
    given = [key for key in ("soft_label", "chosen_prob") if key in row.fields]
    votes = [key for key in ("votes_chosen", "votes_rejected") if key in row.fields]
    if len(given) + bool(votes) > 1:
        raise DataError(f"{row.source}: has {given + votes}; one soft label is enough")
    if given:
        label = as_number(row, given[0], row.fields[given[0]])
        if not 0 <= label <= 1:
            raise DataError(f"{row.source}: {given[0]!r} is {label}; expected 0 to 1")
        return label, tuple(given)
    if not votes:
        return None, ()
    chosen, rejected = (
        as_number(row, key, need(row, key)) for key in ("votes_chosen", "votes_rejected")
    )
    if min(chosen, rejected) < 0 or not 0 < chosen + rejected < float("inf"):
        raise DataError(f"{row.source}: votes {chosen:g} to {rejected:g}; expected counts")
    return (chosen + 0.5) / (chosen + rejected + 1), tuple(votes)


def holds_prompt(value: Any) -> bool:
    """Whether `chosen` is a conversation that begins before the answer."""
    if not is_messages(value):
        return False
    role = value[0].get("role", value[0].get("from"))
    return isinstance(role, str) and role.lower() in ("user", "human", "system", "developer")


def holds_transcript(row: Row) -> bool:
    """Whether the row's prompt, or where it has none its pair, is HH-RLHF text."""
    key = "prompt" if "prompt" in row.fields else "chosen"
    return is_transcript(row.fields.get(key))
