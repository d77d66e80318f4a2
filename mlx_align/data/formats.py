"""Detect the format of a dataset and read it into prompt groups.

A format is a test for rows (which fields, of which type) and a converter. The first row decides the
format, and all other rows have to match it. A row that matches several formats is an error, which
`format=` resolves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mlx_align.data import converters, judgements, public_formats
from mlx_align.data.columns import ConfiguredSource, LabelRules, suggest_columns
from mlx_align.data.messages import UnusableRow
from mlx_align.data.readers import Data, Row, container_of, read_rows
from mlx_align.data.transforms import NO_LABELS, to_pairs, unpair
from mlx_align.errors import ConfigError, DataError
from mlx_align.types import PromptGroup


@dataclass(frozen=True, slots=True)
class Format:
    """A data format.

    Attributes:
        name: The name, as `--format` takes it.
        title: The description that is printed.
        matches: Whether a row has this format.
        convert: Converts a row.
        expand: Makes the rows to convert from all rows of a split, where several belong together.
    """

    name: str
    title: str
    matches: Callable[[Row], bool]
    convert: Callable[[Row], PromptGroup]
    expand: Callable[[Sequence[Row]], list[Row]] | None = None


@dataclass(frozen=True, slots=True)
class ReadReport:
    """The format and the dropped rows of a split. Commands print its `str()`.

    Attributes:
        format: Name of the format, as `--format` takes it.
        title: Description of the format.
        rows: Rows in the split.
        dropped: Number of unusable rows, by reason.
    """

    format: str
    title: str
    rows: int
    dropped: Mapping[str, int]

    def __str__(self) -> str:
        line = f"read as: {self.title}"
        if not self.dropped:
            return line
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        return f"{line} ({sum(self.dropped.values())} of {self.rows} rows dropped: {reasons})"


def _has(row: Row, *keys: str) -> bool:
    return any(key in row.fields for key in keys)


def _is_pair(row: Row) -> bool:
    return _has(row, "chosen", "rejected")


def _has_question(row: Row) -> bool:
    """Whether a pair has an instruction; `input` alone is one too (distilabel's Orca pairs)."""
    named = _has(row, *converters.QUESTION_FIELDS)
    return named or (isinstance(row.fields.get("input"), str) and not _has(row, "prompt"))


def _continues_conversation(row: Row) -> bool:
    """Whether a pair's answers are the next turn of a conversation in another column."""
    if not _is_pair(row) or _has(row, "prompt") or _holds_prompt(row):
        return False
    return converters.conversation_field(row) is not None


def _holds_prompt(row: Row) -> bool:
    return converters.holds_prompt(row.fields.get("chosen"))


# Columns that say how good a single response is: such rows are no demonstrations.
_JUDGED = ("label", "score", "scores", "rating", "helpfulness", "is_safe", "reward")

PREFERENCE_FORMATS = (
    Format(
        "pairs",
        "pairs (prompt, chosen, rejected)",
        lambda row: (
            _is_pair(row)
            and _has(row, "prompt")
            and not _holds_prompt(row)
            and not converters.holds_transcript(row)
            and not converters.is_pair_of_lists(row)
        ),
        converters.pair,
    ),
    Format(
        "implicit",
        "pairs with the prompt inside chosen and rejected",
        lambda row: (
            _is_pair(row)
            and not _has(row, "prompt", "conversations")
            and (_holds_prompt(row) or not _has_question(row))
            and not converters.holds_transcript(row)
            and not _continues_conversation(row)
        ),
        converters.implicit_pair,
    ),
    Format(
        "hh-rlhf",
        "HH-RLHF text",
        lambda row: _is_pair(row) and converters.holds_transcript(row),
        converters.transcript_pair,
    ),
    Format(
        "ultrafeedback",
        "UltraFeedback pairs (whole conversations)",
        lambda row: _is_pair(row) and _has(row, "prompt") and _holds_prompt(row),
        converters.whole_conversation_pair,
    ),
    Format(
        "openai",
        "OpenAI preference pairs",
        lambda row: _has(row, "preferred_output", "non_preferred_output"),
        converters.openai_pair,
    ),
    Format(
        "sharegpt",
        "ShareGPT conversations with chosen and rejected",
        lambda row: _is_pair(row) and (_has(row, "conversations") or _continues_conversation(row)),
        converters.sharegpt_pair,
    ),
    Format(
        "instruction",
        "instructions with chosen and rejected",
        lambda row: (
            _is_pair(row)
            and _has_question(row)
            and not _holds_prompt(row)
            and not _continues_conversation(row)
            and not converters.is_pair_of_lists(row)
        ),
        converters.instruction_pair,
    ),
    Format(
        "ranked",
        "ranked completions",
        lambda row: (
            _has(row, *converters.COMPLETION_LIST_FIELDS)
            and _has(row, "prompt", *converters.QUESTION_FIELDS)
            and not converters.is_tool_call_row(row)
            and not public_formats.is_comparison(row)
        ),
        converters.ranked,
    ),
    Format(
        "pair-lists",
        "prompts with lists of chosen and of rejected answers",
        lambda row: (
            _has(row, "prompt", *converters.QUESTION_FIELDS) and converters.is_pair_of_lists(row)
        ),
        converters.pair_of_lists,
    ),
    Format(
        "comparison",
        "two answers and which is better",
        lambda row: public_formats.is_comparison(row) and not judgements.is_judgement(row),
        public_formats.comparison,
    ),
    Format(
        "judgements",
        "judgements of raters, joined by pair",
        judgements.is_judgement,
        judgements.read_joined,
        judgements.join_judgements,
    ),
    Format(
        "summaries",
        "comparisons of summaries",
        public_formats.is_summaries,
        public_formats.summaries,
    ),
    Format(
        "scored",
        "completions with scores, joined by prompt",
        public_formats.is_scored,
        converters.ranked,
        public_formats.expand_scored,
    ),
    Format(
        "message-tree",
        "trees of messages with ranked replies",
        public_formats.is_message_tree,
        converters.ranked,
        public_formats.expand_trees,
    ),
)
UNPAIRED_FORMATS = (
    Format(
        "unpaired",
        "unpaired rows (prompt, completion, label)",
        lambda row: _has(row, "completion") and _has(row, "label"),
        converters.unpaired,
    ),
    Format(
        "unpaired-conversation",
        "labelled conversations",
        lambda row: _has(row, "messages", "conversations") and _has(row, "label", "kto_tag"),
        converters.unpaired_conversation,
    ),
)
SUPERVISED_FORMATS = (
    Format(
        "completion",
        "prompts with completions",
        lambda row: _has(row, "prompt") and _has(row, "completion"),
        converters.prompt_completion,
    ),
    Format(
        "conversation",
        "conversations (trained on every assistant turn)",
        lambda row: (
            _has(row, "messages", "conversations")
            and not (_is_pair(row) and not _has(row, "prompt"))
        ),
        converters.conversation,
    ),
    Format(
        "instruction-output",
        "instructions with outputs",
        lambda row: (
            _has(row, *converters.QUESTION_FIELDS)
            and (_has(row, "output") or (_has(row, "response") and not _has(row, *_JUDGED)))
        ),
        converters.instruction_output,
    ),
    Format(
        "tool-calls",
        "questions with tool calls as answers",
        converters.is_tool_call_row,
        converters.tool_call_answer,
    ),
    Format(
        "text",
        "plain text",
        lambda row: _has(row, "text") and not public_formats.is_message_tree(row),
        converters.plain_text,
    ),
)
PROMPT_FORMATS = (
    Format(
        "prompts",
        "prompts",
        lambda row: _has(row, "prompt", *converters.QUESTION_FIELDS),
        converters.prompt_only,
    ),
    Format(
        "conversation-prompts",
        "conversations up to the last user turn",
        lambda row: (
            _has(row, "messages", "conversations")
            and not _has(row, "prompt", *converters.QUESTION_FIELDS)
        ),
        converters.conversation_prompt,
    ),
)
# What each kind of data has, for messages.
EXPECTED_FIELDS = {
    "preference": "prompt, chosen and rejected (or another pair format)",
    "unpaired": "prompt, completion and label (or pairs)",
    "supervised": "messages, prompt and completion, or text",
    "prompts": "prompt, question or messages",
    "scorable": "pairs, or a prompt with completion, completions or messages",
}

# The choices of `--format`.
FORMAT_NAMES: tuple[str, ...] = tuple(
    entry.name
    for entry in (*PREFERENCE_FORMATS, *UNPAIRED_FORMATS, *SUPERVISED_FORMATS, *PROMPT_FORMATS)
)


def read_preferences(
    data: Data, split: str = "train", format: str | None = None
) -> tuple[list[PromptGroup], ReadReport]:
    """Read preference data: pairs (chosen first, rejected second) or ranked lists (best first).

    Args:
        data: A path, hub name or `DataSource`, as for `readers.read_rows`.
        split: `train`, `valid` or `test`.
        format: The name of a format in `PREFERENCE_FORMATS`; detected by default.

    Raises:
        DataError: The data can't be read, isn't preference data, matches several formats, or has
            no usable row.
    """
    return _read(data, split, format, "preference", PREFERENCE_FORMATS)


def read_unpaired(
    data: Data, split: str = "train", format: str | None = None
) -> tuple[list[PromptGroup], ReadReport]:
    """Read labelled completions (KTO). A pair becomes a desirable and an undesirable completion.

    Arguments and errors are those of `read_preferences`.
    """
    groups, report = _read(data, split, format, "unpaired", UNPAIRED_FORMATS, PREFERENCE_FORMATS)
    if all(group.label is not None for group in groups):
        return groups, report
    title = f"{report.title}, split into desirable and undesirable completions"
    return unpair(to_pairs(groups)), replace(report, title=title)


def read_supervised(
    data: Data, split: str = "train", format: str | None = None
) -> tuple[list[PromptGroup], ReadReport]:
    """Read demonstrations, one completion per prompt. Preference data gives its best completions.

    The likelihood of a demonstration has no place for the probability that it is the better one, so
    soft labels only decide which completion is the best, and the report says so.

    Arguments and errors are those of `read_preferences`.
    """
    groups, report = _read(
        data, split, format, "supervised", SUPERVISED_FORMATS, PREFERENCE_FORMATS
    )
    if all(len(group.completions) == 1 for group in groups):
        return groups, report
    soft = any(group.soft_label is not None for group in groups)
    best = [
        replace(group, completions=(group.completions[_better(group)],), **NO_LABELS)
        for group in groups
    ]
    title = f"the best completions of {report.title}"
    return best, replace(
        report, title=f"{title} (soft labels don't weigh in sft)" if soft else title
    )


def _better(group: PromptGroup) -> int:
    return int(group.soft_label is not None and group.soft_label < 0.5)


def read_prompts(
    data: Data, split: str = "train", format: str | None = None
) -> tuple[list[PromptGroup], ReadReport]:
    """Read prompts: groups without completions, with all other fields in `columns`.

    Preference data gives its prompts. Arguments and errors are those of `read_preferences`.
    """
    # A list of completions next to a prompt may be anything, for instance the expected answers of
    # a reward function; it stays in `columns`.
    pairs = tuple(entry for entry in PREFERENCE_FORMATS if entry.name not in ("ranked", "scored"))
    rules = LabelRules(ties="half")
    groups, report = _read(data, split, format, "prompts", pairs, PROMPT_FORMATS, rules=rules)
    if all(not group.completions for group in groups):
        return groups, report
    bare = [replace(group, completions=(), **NO_LABELS) for group in groups]
    return bare, replace(report, title=f"the prompts of {report.title}")


def _read(
    data: Data,
    split: str,
    format: str | None,
    kind: str,
    *preferred: Sequence[Format],
    rules: LabelRules | None = None,
) -> tuple[list[PromptGroup], ReadReport]:
    """Read a split by the one format it has; see the functions above.

    Args:
        data: A `ConfiguredSource` has its own label rules.
        split: See `read_preferences`.
        format: See `read_preferences`.
        kind: What the data is read as, for messages.
        *preferred: As for `detect_format`.
        rules: Label rules to use instead of the source's.
    """
    if rules is None:
        rules = data.rules if isinstance(data, ConfiguredSource) else LabelRules()
    allowed = [entry for entries in preferred for entry in entries]
    if format is not None and format not in {entry.name for entry in allowed}:
        names = ", ".join(entry.name for entry in allowed)
        raise ConfigError(f"--format {format}: not a format of {kind} data (choose from: {names})")
    rows = read_rows(data, split)
    if format is None:
        data_format = detect_format(rows[0], kind, preferred)
    else:
        data_format = next(entry for entry in allowed if entry.name == format)
    expanded = data_format.expand is not None
    if data_format.expand is not None:
        rows = data_format.expand(rows)
    groups: list[PromptGroup] = []
    dropped: Counter[str] = Counter()
    counted = False
    for row in rows:
        try:
            group = data_format.convert(row)
            counted = counted or _agreement(group) is not None
            group = _apply_rules(group, rules)
        except UnusableRow as reason:
            dropped[str(reason)] += 1
            continue
        if format is None and not expanded and not data_format.matches(row):
            raise DataError(
                f"{row.source}: does not match {data_format.title}, the format of the first row; "
                f"put these rows into separate files, or give --format {data_format.name}"
            )
        _check_same_kind(group, groups)
        groups.append(group)
    if rules.min_agreement is not None and not counted:
        raise ConfigError(
            f"--min-agreement {rules.min_agreement:g}: has no effect, the data has no votes of "
            "several raters, and no agreement; leave it out"
        )
    if not groups:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        where = container_of(rows[0].source)
        raise DataError(f"{where}: none of the {len(rows)} rows can be used ({reasons})")
    return groups, ReadReport(data_format.name, data_format.title, len(rows), dict(dropped))


def _agreement(group: PromptGroup) -> float | None:
    """The share of a pair's raters who agree, from its votes or its column `agreement`.

    `data agreement` writes the column.
    """
    if group.votes is not None:
        return max(group.votes) / sum(group.votes)
    given = group.columns.get("agreement")
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0.5 <= given <= 1:
        return None
    return float(given)


def _apply_rules(group: PromptGroup, rules: LabelRules) -> PromptGroup:
    """A pair whose strength and votes are read as the rules say.

    Raises:
        UnusableRow: It is tied, and ties are skipped; or its raters agree too little.
    """
    if len(group.completions) != 2:
        return group
    agreement = _agreement(group)
    least = rules.min_agreement
    if agreement is not None and least is not None and agreement < least:
        raise UnusableRow("with less agreement of the raters than --min-agreement")
    if group.votes is not None and rules.votes == "ignore":
        group = replace(group, soft_label=None)
    if group.strength == 0:
        if rules.ties == "skip":
            raise UnusableRow("tied" if group.scores is None else converters.ALL_RATED_THE_SAME)
        return replace(group, soft_label=0.5 if group.soft_label is None else group.soft_label)
    size = group.strength
    if size is None and group.scores is not None:
        size = max(group.scores[0] - group.scores[1], 0.0)
    if size is None or rules.strength == "ignore":
        return group
    if rules.strength == "margin":
        return replace(group, margin=size)
    return replace(group, soft_label=1 / (1 + math.exp(-size)))


def detect_format(row: Row, kind: str, preferred: Sequence[Sequence[Format]]) -> Format:
    """Find the format of a row.

    Args:
        row: The first row of the data.
        kind: The kind of data, for messages: a key of `EXPECTED_FIELDS`.
        preferred: Lists of formats; a list is only tried if no format of an earlier one matches.

    Raises:
        DataError: No format matches, or several do.
    """
    if isinstance(row.fields.get("question"), Mapping) and _is_step_label(row.fields.get("label")):
        raise DataError(
            f"{row.source}: labels of single reasoning steps, as in PRM800K ('question' and "
            "'label' are objects), are not read; write pairs: a prompt that ends with the steps "
            "before, and steps of ratings 1 and -1 as chosen and rejected"
        )
    for entries in preferred:
        found = [entry for entry in entries if entry.matches(row)]
        if len(found) == 1:
            return found[0]
        if found:
            names = " and ".join(entry.name for entry in found)
            raise DataError(f"{row.source}: matches the formats {names}; choose one with --format")
    if kind == "preference" and _has(row, "completion") and _has(row, "prompt"):
        raise DataError(
            f"{row.source}: found prompt and completion, but no pair; expected chosen and "
            "rejected (use kto for labelled completions, sft for unlabelled ones)"
        )
    found_keys = ", ".join(map(repr, row.fields))[:120] or "no fields"
    mapping = suggest_columns(row) or "--columns prompt=COLUMN …"
    raise DataError(
        f"{row.source}: not recognised as {kind} data; found {found_keys}, expected "
        f"{EXPECTED_FIELDS[kind]}; try {mapping}"
    )


def _is_step_label(value: object) -> bool:
    return isinstance(value, Mapping) and "steps" in value


def _check_same_kind(group: PromptGroup, groups: Sequence[PromptGroup]) -> None:
    """Refuse a mix of text and conversations, which are tokenised differently."""
    if groups and isinstance(group.prompt, str) != isinstance(groups[0].prompt, str):
        kinds = ("text", "messages") if isinstance(group.prompt, str) else ("messages", "text")
        raise DataError(
            f"{group.source}: the prompt is {kinds[0]}, but {groups[0].source} has {kinds[1]}; "
            "use one kind for all rows"
        )


# --- data to score: all rows are kept, with a reason for those that can't be scored ---

PAIR_FORMATS = tuple(
    entry
    for entry in PREFERENCE_FORMATS
    if entry.name not in ("ranked", "pair-lists") and entry.expand is None
)
_RANKED = next(entry for entry in PREFERENCE_FORMATS if entry.name == "ranked")
LIST_FORMATS = (
    Format(
        "completions",
        "prompts with lists of completions",
        _RANKED.matches,
        converters.completion_list,
    ),
)
SINGLE_FORMATS = (
    Format(
        "completion",
        "prompts with completions",
        lambda row: {"prompt", "completion"} <= row.fields.keys(),
        converters.scorable_completion,
    ),
    Format(
        "conversation",
        "conversations (the last turn is scored)",
        lambda row: bool({"messages", "conversations"} & row.fields.keys()),
        converters.scorable_conversation,
    ),
)


@dataclass(frozen=True, slots=True)
class ScorableRow:
    """A row to score.

    Attributes:
        row: The row.
        group: Its prompt and completions, or None if it can't be scored.
        reason: Why it can't be scored.
    """

    row: Row
    group: PromptGroup | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ScorableDataset:
    """Rows to score; iterating converts them one by one.

    Attributes:
        title: Description of the format.
        rows: The rows, in the order of the file.
        format: The format of all rows.
    """

    title: str
    rows: list[Row]
    format: Format

    @property
    def is_pairs(self) -> bool:
        """Whether the first completion of each row is labelled as the better one."""
        return self.format in PAIR_FORMATS

    def __iter__(self) -> Iterator[ScorableRow]:
        """Convert the rows.

        Raises:
            DataError: A row does not have the format of the first row.
        """
        for row in self.rows:
            try:
                group = self.format.convert(row)
                if self.is_pairs and group.strength == 0:
                    raise UnusableRow("tied")
                yield ScorableRow(row, group)
            except UnusableRow as reason:
                yield ScorableRow(row, None, str(reason))


def read_scorable(data: Data, split: str = "train", format: str | None = None) -> ScorableDataset:
    """Read pairs, lists, completions or conversations to score.

    Arguments are those of `read_preferences`.

    Raises:
        ConfigError: There is no such format.
        DataError: The data can't be read, or its first row has no known format.
    """
    preferred = (PAIR_FORMATS + LIST_FORMATS, SINGLE_FORMATS)
    by_name = {entry.name: entry for entries in preferred for entry in entries}
    if format is not None and format not in by_name:
        raise ConfigError(
            f"--format {format}: not a format of data to score (choose from: {', '.join(by_name)})"
        )
    rows = read_rows(data, split)
    if format is None:
        data_format = detect_format(rows[0], "scorable", preferred)
    else:
        data_format = by_name[format]
    return ScorableDataset(data_format.title, rows, data_format)
