"""Judgements: one rater's verdict on two answers to a prompt, as a line of a JSONL file.

Lines are only ever added to a file of judgements. Of several lines by one rater on one pair, the
last one counts, so that a correction is a further line. Files of several raters can be joined end
to end. The two answers are called a and b by their hashes: they have the same names in every file,
and the names say nothing about their order in the data or on the screen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from mlx_align.data.agreement import MISSING, VERDICT_LABELS, fit_preferences, verdict_table
from mlx_align.data.converters import make_group
from mlx_align.data.messages import (
    UnusableRow,
    as_number,
    as_string,
    as_text,
    describe_value,
    required_field,
    text_as_json,
)
from mlx_align.data.readers import Row
from mlx_align.errors import DataError
from mlx_align.types import PromptGroup, Text

# a or b is better; both are equally good; the rater can't tell; the rater left it for later; the
# rater took the verdict back.
Winner = Literal["a", "b", "tie", "unsure", "skip", "undone"]
Side = Literal["a", "b"]
WINNERS: tuple[Winner, ...] = get_args(Winner)
# Verdicts that say something about the answers.
DECIDED = ("a", "b", "tie")
# Soft labels that differ from 0.5 by less are ties.
_EQUAL = 1e-6
# The fields that make a row a judgement.
_REQUIRED = ("prompt", "response_a", "response_b", "winner", "rater")


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """Two answers to compare, in the order given; `pair_answers` makes one in a fixed order.

    Attributes:
        prompt: The prompt.
        a: One answer.
        b: The other.
        source: File and line of the row, for messages.
        authors: The models that wrote a and b; "" if the data doesn't say.
        columns: The other fields of the row.
        human: Probability that a is better according to people; None without their label.
        criteria: What a judge compares this pair by, if not by the criteria of all.
        id: A hash of the prompt and the answers, 16 hexadecimal digits.
    """

    prompt: Text
    a: Text
    b: Text
    source: str = ""
    authors: tuple[str, str] = ("", "")
    columns: Mapping[str, Any] = field(default_factory=dict)
    human: float | None = None
    criteria: Mapping[str, str] | None = None
    id: str = field(init=False)

    def __post_init__(self) -> None:
        name = _digest([text_as_json(text) for text in (self.prompt, self.a, self.b)])
        object.__setattr__(self, "id", name)


def pair_answers(
    prompt: Text,
    answers: tuple[Text, Text],
    source: str = "",
    authors: tuple[str, str] = ("", ""),
    columns: Mapping[str, Any] | None = None,
) -> AnswerPair:
    """A pair whose answers are a and b in the order of their hashes, as in every other file."""
    first, second = (0, 1)
    if _digest(text_as_json(answers[1])) < _digest(text_as_json(answers[0])):
        first, second = (1, 0)
    return AnswerPair(
        prompt,
        answers[first],
        answers[second],
        source,
        (authors[first], authors[second]),
        columns or {},
    )


@dataclass(frozen=True, slots=True)
class Judgement:
    """One rater's verdict on a pair.

    Attributes:
        pair: The prompt and the answers.
        winner: The verdict.
        rater: Name of the person or model.
        time: When it was given: ISO 8601, in UTC.
        seconds: How long the pair was shown; None for models.
        shown_first: The answer that was shown first (or on the left); None if unknown.
        criteria: Verdict on each criterion of the rubric; None for those without one.
        note: What the rater wrote about it.
        probability: Probability that a is better, if a model says so.
        source: File and line of the judgement, for messages.
    """

    pair: AnswerPair
    winner: Winner
    rater: str
    time: str = ""
    seconds: float | None = None
    shown_first: Side | None = None
    criteria: Mapping[str, Winner | None] = field(default_factory=dict)
    note: str = ""
    probability: float | None = None
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The judgement as a line of a file; `read_judgement` reads it."""
        pair = self.pair
        row: dict[str, Any] = {
            "pair": pair.id,
            "rater": self.rater,
            "winner": self.winner,
            "time": self.time,
            "seconds": self.seconds,
            "shown_first": self.shown_first,
            "criteria": dict(self.criteria),
            "note": self.note,
            "prompt": text_as_json(pair.prompt),
            "response_a": text_as_json(pair.a),
            "response_b": text_as_json(pair.b),
            "model_a": pair.authors[0],
            "model_b": pair.authors[1],
            "source": pair.source,
        }
        if self.probability is not None:
            row["probability"] = self.probability
        if pair.columns:
            row["columns"] = dict(pair.columns)
        return row


def is_judgement(row: Row) -> bool:
    """Whether a row is a line of a file of judgements."""
    return set(_REQUIRED) <= row.fields.keys()


def read_judgement(row: Row) -> Judgement:
    """The judgement in a row.

    Raises:
        DataError: A field is missing or has a wrong value.
    """
    fields = row.fields
    prompt, a, b = (
        as_text(row, key, required_field(row, key))
        for key in ("prompt", "response_a", "response_b")
    )
    seconds, probability = (
        as_number(row, key, fields[key]) if key in fields else None
        for key in ("seconds", "probability")
    )
    columns = fields.get("columns", {})
    criteria = fields.get("criteria", {})
    for key, value in (("columns", columns), ("criteria", criteria)):
        if not isinstance(value, dict):
            raise DataError(f"{row.source}: {key!r} is {describe_value(value)}; expected an object")
    shown = fields.get("shown_first")
    if shown not in (None, "a", "b"):
        raise DataError(f"{row.source}: 'shown_first' is {describe_value(shown)}; expected a or b")
    rater = as_string(row, "rater", fields["rater"]).strip()
    if not rater:
        raise DataError(f"{row.source}: 'rater' is empty; expected a name")
    authors = (str(fields.get("model_a", "")), str(fields.get("model_b", "")))
    given = pair_answers(prompt, (a, b), str(fields.get("source", "")), authors, columns)
    # Other programs may name the answers as they like.
    swapped = given.a != a
    return Judgement(
        given,
        _swap(_winner(row, "winner", required_field(row, "winner")), swapped),
        rater,
        str(fields.get("time", "")),
        seconds,
        None if shown is None else _swap_side(shown, swapped),
        {
            str(name): None if value is None else _swap(_winner(row, name, value), swapped)
            for name, value in criteria.items()
        },
        str(fields.get("note", "")),
        1 - probability if probability is not None and swapped else probability,
        row.source,
    )


def latest_judgements(judgements: Iterable[Judgement]) -> list[Judgement]:
    """The judgements that count: the last of each rater on each pair, unless it was undone.

    The last by time, or in the order given if not all have a time.
    """
    ordered = list(judgements)
    if all(judgement.time for judgement in ordered):
        ordered.sort(key=lambda judgement: judgement.time)
    latest: dict[tuple[str, str], Judgement] = {}
    for judgement in ordered:
        key = (judgement.pair.id, judgement.rater)
        latest.pop(key, None)  # so that the dict is in the order of the last ones
        if judgement.winner != "undone":
            latest[key] = judgement
    return list(latest.values())


def join_judgements(rows: Sequence[Row]) -> list[Row]:
    """One row per pair, from the judgements of all raters: `read_joined` converts it.

    With one rater the verdict is the label. With several, the label is the probability that
    `fit_preferences` finds.

    Raises:
        DataError: A row is not a judgement.
    """
    judgements = latest_judgements(map(read_judgement, rows))
    if not judgements:
        raise DataError(f"{rows[0].source}: every judgement was undone; nothing is left")
    verdicts = {(one.rater, one.pair.id): one.winner for one in judgements}
    _, ids, table = verdict_table(verdicts)
    votes = np.stack([(table == VERDICT_LABELS[side]).sum(0) for side in ("a", "b")], 1)
    votes = votes + (table == VERDICT_LABELS["tie"]).sum(0)[:, None] / 2
    several = int((table != MISSING).any(1).sum()) > 1
    soft = fit_preferences(table).soft_labels if several else None
    first = {one.pair.id: one for one in reversed(judgements)}
    joined = []
    for index, name in enumerate(ids):
        pair = first[name].pair
        fields: dict[str, Any] = {"pair": pair}
        if votes[index].sum():
            fields["votes"] = tuple(votes[index].tolist())
        if soft is not None:
            fields["soft_label"] = float(soft[index])
        joined.append(Row(first[name].source, fields))
    return joined


def read_joined(row: Row) -> PromptGroup:
    """The pair in a row of `join_judgements`, the answer that is more probably better first.

    Raises:
        UnusableRow: No rater decided.
    """
    pair: AnswerPair = row.fields["pair"]
    if "votes" not in row.fields:
        raise UnusableRow("without a verdict (unsure or skipped)")
    votes, soft = row.fields["votes"], row.fields.get("soft_label")
    answers, models = [pair.a, pair.b], list(pair.authors)
    if (votes[1] - votes[0] if soft is None else 0.5 - soft) > 0:
        answers, models, votes = answers[::-1], models[::-1], votes[::-1]
        soft = None if soft is None else 1 - soft
    columns = dict(pair.columns)
    if any(models):
        columns |= dict(zip(("chosen_model", "rejected_model"), models, strict=True))
    group = make_group(Row(row.source, {}, columns), pair.prompt, answers, (), soft_label=soft)
    size = abs(votes[0] - votes[1]) if soft is None else abs(soft - 0.5)
    return replace(group, strength=0.0 if size < _EQUAL else abs(votes[0] - votes[1]), votes=votes)


def _winner(row: Row, key: str, value: Any) -> Winner:
    for known in WINNERS:
        if value == known:
            return known
    raise DataError(
        f"{row.source}: {key!r} is {describe_value(value)}; expected {', '.join(WINNERS)}"
    )


def _swap(winner: Winner, swapped: bool) -> Winner:
    if winner not in ("a", "b"):
        return winner
    return _swap_side(winner, swapped)


def _swap_side(side: Side, swapped: bool) -> Side:
    other: Side = "b" if side == "a" else "a"
    return other if swapped else side


def _digest(value: Any) -> str:
    content = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(content.encode("utf-8", "replace"), digest_size=8).hexdigest()
