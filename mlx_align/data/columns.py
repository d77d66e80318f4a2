"""Map columns of any data set to the fields that the formats read, and set how labels are read.

`--columns prompt=question.full_text completions=answer_0,answer_1 label=winner`: each field of
`FIELDS` is taken from a column, a dotted path into nested objects (`info.post`, `turns.0.text`), or
several of these, which make a list.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_align.data.readers import Data, DataSource, Row, open_data
from mlx_align.errors import ConfigError, DataError

# The fields that can be mapped, with what they hold.
FIELDS: Mapping[str, str] = {
    "prompt": "text or messages",
    "system": "a system prompt",
    "chosen": "the better completion",
    "rejected": "the worse completion",
    "completion": "one completion",
    "completions": "a list of completions, or several columns",
    "messages": "a conversation",
    "text": "plain text",
    "scores": "a score per completion, higher is better",
    "ranks": "a rank per completion, 1 is best",
    "label": "which completion is better, or whether the one is good",
    "strength": "a number, negative if the first completion is better, 0 for a tie",
    "votes": "votes for each completion, or the raters' verdicts",
    "margin": "least difference of scores",
    "soft_label": "probability that chosen is better",
    "tools": "function descriptions",
}
# Fields that hold text. A mapping without one of these only replaces fields of the format found.
_TEXT = ("prompt", "chosen", "rejected", "completion", "completions", "messages", "text")
# Columns that are read under their own name though a mapping leaves them out.
_KEPT = ("system", "tools")


# Options of `LabelRules`.
_RULES = ("ties", "strength", "votes", "min_agreement")


@dataclass(frozen=True, slots=True)
class LabelRules:
    """How ties, strength and votes of pairs are read.

    Attributes:
        ties: `skip` drops tied pairs and counts them, `half` keeps them with the soft label 0.5.
        strength: What the strength of a preference becomes: nothing, the `margin` of a reward
            model, or a `soft-label`, the logistic function of it.
        votes: Votes become a `soft-label`, (votes + ½)/(n + 1), or are left out (`ignore`).
        min_agreement: Least share of a pair's votes for one answer; pairs with less are dropped.
    """

    ties: Literal["skip", "half"] = "skip"
    strength: Literal["ignore", "margin", "soft-label"] = "ignore"
    votes: Literal["soft-label", "ignore"] = "soft-label"
    min_agreement: float | None = None


class ConfiguredSource:
    """A data source with a mapping of its columns and rules for its labels.

    Args:
        source: The data.
        columns: Field of `FIELDS` -> column, path, or several of them with commas between.
        rules: How labels are read.

    Raises:
        ConfigError: A field is unknown, or the mapping is incomplete.
    """

    def __init__(
        self, source: DataSource, columns: Mapping[str, str], rules: LabelRules | None = None
    ) -> None:
        self.name = source.name
        self.rules = rules or LabelRules()
        self._source = source
        self._columns = _check_columns(columns)

    def has_split(self, split: str) -> bool:
        """As the source's."""
        return self._source.has_split(split)

    def rows(self, split: str) -> list[Row]:
        """The rows of a split, with mapped fields.

        Raises:
            DataError: A column is in none of the rows.
        """
        rows = self._source.rows(split)
        if not self._columns:
            return rows
        mapped = [_map_row(row, self._columns) for row in rows]
        for field, paths in self._columns.items():
            if not any(field in row.fields for row in mapped):
                raise _missing_column(rows[0], field, paths)
        return [_as_pair_fields(row) for row in mapped]

    def __str__(self) -> str:
        return str(self.name)


def configure_data(data: Data, options: Any, rules: LabelRules | None = None) -> DataSource:
    """Open data with the mapping and the label rules of a config.

    Args:
        data: As for `readers.open_data`; if it is configured already, it is returned unchanged.
        options: A config class; options that it lacks have their defaults.
        rules: Rules to use instead of those in `options`.

    Raises:
        ConfigError: A field of the mapping is unknown.
        DataError: The data can't be opened.
    """
    if isinstance(data, ConfiguredSource):
        return data
    given = {name: getattr(options, name, None) for name in _RULES}
    rules = rules or LabelRules(**{name: rule for name, rule in given.items() if rule is not None})
    return ConfiguredSource(open_data(data), getattr(options, "columns", {}), rules)


def suggest_columns(row: Row) -> str:
    """The mapping to try for a row of unknown columns; empty if there is no guess."""
    values = dict(row.fields)
    for key, value in row.fields.items():
        if isinstance(value, dict):
            values.update({f"{key}.{inner}": item for inner, item in value.items()})
    names = [name for name in values if not re.fullmatch(_NO_TEXT, name, re.I)]
    found: dict[str, str] = {}
    for field, pattern in _GUESSES.items():
        for name in names:
            fits = _is_text(values[name]) or (field == "label" and _is_label(values[name]))
            if fits and re.fullmatch(pattern, name.rpartition(".")[2], re.I):
                if name not in found.values():
                    found[field] = name
                break
    if "chosen" not in found or "rejected" not in found:
        found.pop("chosen", None)
        found.pop("rejected", None)
        if two := _numbered_columns(names):
            found["completions"] = ",".join(two)
            found.pop("completion", None)
        elif "completion" not in found or not isinstance(found.get("label"), str):
            found.pop("label", None)
    else:
        for other in ("completion", "label"):
            found.pop(other, None)
    if "prompt" not in found or len(found.keys() & {"chosen", "completion", "completions"}) == 0:
        return ""
    return "--columns " + " ".join(f"{field}={name}" for field, name in found.items())


# Names of columns that say something about a text.
_NO_TEXT = (
    r".*[_-](id|ids|hash|type|length|len|tokens|source|model|models|name|lang|language|category"
    r"|policy|judg(e)?ment|critique|feedback|rationale|reason|explanation)"
)


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return (
        isinstance(value, list | dict)
        and bool(value)
        and "role"
        in (value[0] if isinstance(value, list) and isinstance(value[0], dict) else value)
    )


def _is_label(value: Any) -> bool:
    return isinstance(value, str | bool | int | float)


_GUESSES = {
    "prompt": r"prompts?|questions?|query|instructions?|inputs?|context|post|problem|user(_\w+)?"
    r"|\w+[_-](prompt|question|instruction)|(prompt|question)[_-]\w+|full_text",
    "chosen": r"\w*(chosen|accepted|preferred|better|winning|positive|good)\w*|win|pos|best|\w+_w",
    "rejected": r"\w*(rejected|dispreferred|worse|losing|negative|bad)\w*|lose|neg|worst|\w+_l",
    "completion": r"(response|answer|output|completion|reply|target)s?"
    r"|\w+[_-](response|answer|output)",
    "label": r"(\w*_)?(label|winner|preference|preferred|choice|verdict|better|overall)(_\w+)?"
    r"|is_\w+|thumbs\w*",
}


def _numbered_columns(names: Sequence[str]) -> tuple[str, str] | None:
    """Two columns of one name with a/b, 0/1 or 1/2 at its end."""
    for first, second in (("a", "b"), ("A", "B"), ("0", "1"), ("1", "2")):
        for name in names:
            if (
                re.search(r"answer|response|output|completion|reply|summary|text", name, re.I)
                and name.endswith(first)
                and f"{name[:-1]}{second}" in names
            ):
                return name, f"{name[:-1]}{second}"
    return None


def _check_columns(columns: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    checked: dict[str, tuple[str, ...]] = {}
    for field, column in columns.items():
        if field not in FIELDS:
            close = difflib.get_close_matches(field, FIELDS, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(
                f"--columns {field}={column}: unknown field {field!r}; {hint}write FIELD=COLUMN "
                f"with one of {', '.join(FIELDS)}"
            )
        checked[field] = tuple(path.strip() for path in str(column).split(","))
        if not all(checked[field]):
            raise ConfigError(f"--columns {field}={column}: expected a column, or columns a,b")
    if not checked or not set(checked) & set(_TEXT):
        return checked
    if {"chosen", "rejected"} & set(checked) and not {"chosen", "rejected"} <= set(checked):
        lacks = "rejected" if "chosen" in checked else "chosen"
        raise ConfigError(f"--columns: a pair needs chosen and rejected; add {lacks}=COLUMN")
    return checked


def _map_row(row: Row, columns: Mapping[str, tuple[str, ...]]) -> Row:
    fields: dict[str, Any] = {}
    for field, paths in columns.items():
        values = [_value_at(row.fields, path) for path in paths]
        value = values[0] if len(values) == 1 else values
        if value is not None and not (len(values) > 1 and all(one is None for one in values)):
            fields[field] = value
    if not set(columns) & set(_TEXT):
        return Row(row.source, {**row.fields, **fields})
    for name in _KEPT:
        if name in row.fields and name not in columns:
            fields[name] = row.fields[name]
    used = {path.split(".")[0] for paths in columns.values() for path in paths} | set(fields)
    extra = {key: value for key, value in row.fields.items() if key not in used}
    answers = columns.get("completions", ())
    return Row(row.source, fields, extra, answers if len(answers) > 1 else ())


def _value_at(fields: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or of a dotted path; None if it is missing."""
    if path in fields:
        return fields[path]
    value: Any = fields
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.lstrip("-").isdigit():
            index = int(part)
            value = value[index] if -len(value) <= index < len(value) else None
        else:
            return None
    return value


def _as_pair_fields(row: Row) -> Row:
    """Scores and votes of chosen and rejected under the names that pairs have."""
    fields = dict(row.fields)
    if "chosen" not in fields or "rejected" not in fields or row.extra is None:
        return row
    for field, names in (
        ("scores", ("score_chosen", "score_rejected")),
        ("votes", ("votes_chosen", "votes_rejected")),
    ):
        values = fields.get(field)
        if isinstance(values, list) and len(values) == 2:
            del fields[field]
            fields.update(zip(names, values, strict=True))
    return Row(row.source, fields, row.extra, row.answers)


def _missing_column(row: Row, field: str, paths: Sequence[str]) -> DataError:
    names = [*row.fields]
    names += [f"{k}.{inner}" for k, v in row.fields.items() if isinstance(v, dict) for inner in v]
    close = difflib.get_close_matches(paths[0], names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    found = ", ".join(names)[:200]
    return DataError(
        f"{row.source}: --columns {field}={','.join(paths)}: no such column; {hint}found {found}"
    )
