"""The training commands that can use a dataset, and the number of rows that each would get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_align.data.columns import suggest_columns
from mlx_align.data.formats import (
    EXPECTED_FIELDS,
    PREFERENCE_FORMATS,
    PROMPT_FORMATS,
    SUPERVISED_FORMATS,
    UNPAIRED_FORMATS,
    Format,
    read_preferences,
    read_prompts,
    read_supervised,
    read_unpaired,
)
from mlx_align.data.readers import DataSource
from mlx_align.data.transforms import to_pairs
from mlx_align.errors import ConfigError, DataError
from mlx_align.types import PromptGroup

_Groups = Sequence[PromptGroup]


@dataclass(frozen=True, slots=True)
class Use:
    """A training command, and what it would read from a dataset.

    Attributes:
        command: dpo, reward, kto, sft, ppo or grpo.
        rows: Number of rows it would read from the train split; 0 if it can't use the data.
        what: What a row is for it, such as "pairs".
        reason: Why it can't use the data; empty if it can.
    """

    command: str
    rows: int
    what: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Kind:
    """A way to read data, and the commands that read it so."""

    commands: tuple[str, ...]
    expected: str  # a key of EXPECTED_FIELDS
    formats: tuple[Format, ...]
    read: Callable[[DataSource, str | None], _Groups]
    describe: Callable[[_Groups], str]


def _lists(groups: _Groups) -> str:
    longer = sum(len(group.completions) > 2 for group in groups)
    return "pairs" if not longer else "ranked lists" if longer == len(groups) else "pairs and lists"


def _labelled(groups: _Groups) -> str:
    good = sum(bool(group.label) for group in groups)
    return f"completions, {good:,} desirable and {len(groups) - good:,} undesirable"


_KINDS = (
    _Kind(
        ("dpo",),
        "preference",
        PREFERENCE_FORMATS,
        lambda data, format: to_pairs(read_preferences(data, "train", format)[0]),
        lambda groups: "pairs",
    ),
    _Kind(
        ("reward",),
        "preference",
        PREFERENCE_FORMATS,
        lambda data, format: read_preferences(data, "train", format)[0],
        _lists,
    ),
    _Kind(
        ("kto",),
        "unpaired",
        UNPAIRED_FORMATS + PREFERENCE_FORMATS,
        lambda data, format: read_unpaired(data, "train", format)[0],
        _labelled,
    ),
    _Kind(
        ("sft",),
        "supervised",
        SUPERVISED_FORMATS + PREFERENCE_FORMATS,
        lambda data, format: read_supervised(data, "train", format)[0],
        lambda groups: "demonstrations",
    ),
    _Kind(
        ("ppo", "grpo"),
        "prompts",
        PREFERENCE_FORMATS + PROMPT_FORMATS,
        lambda data, format: read_prompts(data, "train", format)[0],
        lambda groups: "prompts; --reward or --reward-model scores the model's answers",
    ),
)


def find_uses(data: DataSource, format: str | None) -> tuple[Use, ...]:
    """For each training command, whether it can use the data, and how many rows it would read.

    Args:
        data: The data; its train split is read several times.
        format: The name of a format, or None to detect it.

    Raises:
        ConfigError: No kind of data has this format.
        DataError: The data can't be read, or no command can use it.
    """
    rows = data.rows("train")
    uses: list[Use] = []
    errors: list[ConfigError | DataError] = []
    for kind in _KINDS:
        groups: _Groups = ()
        what = reason = ""
        try:
            groups = kind.read(data, format)
            what = kind.describe(groups)
        except (ConfigError, DataError) as error:
            reason = str(error)
            if any(entry.matches(rows[0]) for entry in kind.formats):
                errors.insert(0, error)
            else:
                reason = f"needs {EXPECTED_FIELDS[kind.expected]}"
                if _fits(mapping := suggest_columns(rows[0]), kind.expected):
                    reason += f"; try {mapping}"
                errors.append(error)
        uses += [Use(command, len(groups), what, reason) for command in kind.commands]
    if all(use.reason for use in uses):
        raise errors[0]
    return tuple(uses)


def _fits(mapping: str, kind: str) -> bool:
    """Whether a mapping makes rows of this kind: a pair, or one completion, with its label."""
    if kind == "preference":
        return " chosen=" in mapping or " completions=" in mapping
    if kind == "unpaired":
        return " completion=" in mapping and " label=" in mapping
    return kind == "supervised" and " completion=" in mapping


def render_uses(uses: Sequence[Use]) -> str:
    """The commands that can use the data, one per line, then the others with the reason."""
    able: dict[str, list[str]] = {}
    for use in uses:
        if not use.reason:
            able.setdefault(f"{use.rows:,} {use.what}", []).append(use.command)
    width = max(len(", ".join(names)) for names in able.values())
    lines = ["Can be used by"]
    lines += [f"  {', '.join(names):<{width}}  {what}" for what, names in able.items()]
    reasons: dict[str, list[str]] = {}
    for use in uses:
        if use.reason:
            reasons.setdefault(use.reason, []).append(use.command)
    lines += [f"Not by {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join(lines)
