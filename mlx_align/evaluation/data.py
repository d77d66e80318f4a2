"""Data to evaluate a run on: held-out pairs and prompts, and text for perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_align.data.chat_template import ChatTemplate
from mlx_align.data.columns import ConfiguredSource, configure_data
from mlx_align.data.formats import (
    PREFERENCE_FORMATS,
    ReadReport,
    ScorableDataset,
    read_preferences,
    read_prompts,
    read_scorable,
    read_supervised,
    read_unpaired,
)
from mlx_align.data.readers import (
    FILE_SUFFIXES,
    Data,
    DataSource,
    has_split,
    open_data,
    read_rows,
)
from mlx_align.data.splits import GroupReader, prompts_needed, read_splits
from mlx_align.data.tokenization import try_tokenize_group
from mlx_align.data.transforms import keep_last_completion, to_pairs
from mlx_align.errors import ConfigError, DataError, MlxAlignError
from mlx_align.inference.trained_run import TrainedRun
from mlx_align.system.formatting import counted
from mlx_align.types import PromptGroup, Text, TokenizedGroup


@dataclass(frozen=True)
class HeldOutData:
    """Rows to evaluate a run on.

    Attributes:
        pairs: Preference pairs, chosen first; empty if the data has none.
        prompts: Each prompt once, without completions.
        title: Source of the rows, for display.
        trained: Number of prompts that the run was trained on.
    """

    pairs: list[PromptGroup]
    prompts: list[PromptGroup]
    title: str
    trained: int = 0


@dataclass(frozen=True)
class RowsToScore:
    """Rows whose completions are scored.

    Attributes:
        dataset: The rows.
        split: The split that was read.
        title: Source of the rows, for display; empty if it was named by the user.
        trained: The prompts that the run was trained on.
    """

    dataset: ScorableDataset
    split: str
    title: str
    trained: frozenset[Text]


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt as text (for a reward model) and as the policy's tokens."""

    text: PromptGroup
    tokens: TokenizedGroup


def read_held_out_data(
    run: TrainedRun,
    data: Data | None,
    format: str | None,
    own_data: DataSource | None = None,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
) -> HeldOutData:
    """Read the rows that the run held out, or those of other data.

    The rows held out by the run are found as in training: the valid split of its data, or the
    fraction that its seed selected. Of other data, the valid split is read if there is one, else
    all rows.

    Args:
        run: The run.
        data: Other data; None for the run's data.
        format: Data format; None to detect it.
        own_data: The run's data, if it was passed from Python.
        columns: Columns of other data, as for `columns.ConfiguredSource`.
        split: The split to read, of the run's data or of other data; None as above.

    Raises:
        ConfigError: The run's data is unknown and no other data is given.
        DataError: The data can't be read, or nothing was held out.
    """
    own: Data | None = own_data
    if own is None and run.config is not None:
        own = run.config.data
    if data is None and own is None:
        raise _missing_data(run, "pairs or prompts")
    if data is None:
        _check_no_effect(format, columns or {})
    if own is not None and (data is None or (data == own and format is None and not columns)):
        if split is None:
            return _read_own_data(run, own)
        data = own
        if run.config is not None:
            format, columns = run.config.format, run.config.columns
    assert data is not None
    if split is None:
        split = "valid" if has_split(data, "valid") else "train"
    source = ConfiguredSource(open_data(data), columns or {}, run.labels)
    pairs = _pairs(source, split, format)
    prompts = _unique_prompts(pairs or read_prompts(source, split, format)[0])
    trained = trained_prompts(run, own)
    known = sum(group.prompt in trained for group in prompts)
    title = f"{_name(data)}, {split} split{trained_on_remark(known, len(prompts))}"
    return HeldOutData(pairs, prompts, title, known)


def _missing_data(run: TrainedRun, kind: str) -> ConfigError:
    """The error for a run whose data can't be found."""
    reason = "has no config.yaml that names its data"
    if run.config is not None:
        reason = "was trained on data passed from Python"
    return ConfigError(f"--data is missing: {run.folder} {reason}; give a file or folder of {kind}")


def _check_no_effect(format: str | None, columns: Mapping[str, str]) -> None:
    """Raise a ConfigError if options of --data were given without it."""
    for flag, value in (("--format", format), ("--columns", columns)):
        if value:
            raise ConfigError(
                f"{flag}: has no effect without --data, because the run's data is read as in "
                "training; give --data, or leave it out"
            )


def read_rows_to_score(
    run: TrainedRun | None,
    data: Data | None,
    split: str | None,
    format: str | None,
    columns: Mapping[str, str],
) -> RowsToScore:
    """Read the rows whose completions are to be scored: those given, or those the run held out.

    Args:
        run: The run that scores; None for a model.
        data: The data; None for the run's data.
        split: The split to read; None for the training split of `data`, or for what the run held
            out.
        format: Data format; None to detect it.
        columns: Columns of the data, as for `columns.ConfiguredSource`.

    Raises:
        ConfigError: No data is given, and the run's is unknown or has nothing to score.
        DataError: The data can't be read, or nothing was held out.
    """
    config = None if run is None else run.config
    own = None if config is None else config.data
    if data is not None:
        split = split or "train"
        dataset = read_scorable(ConfiguredSource(open_data(data), columns), split, format)
        trained = set() if run is None else trained_prompts(run, own)
        return RowsToScore(dataset, split, "", frozenset(trained))
    if run is None:
        raise ConfigError("--data is missing; give a file, folder or hub name of rows to score")
    if config is None or own is None:
        raise _missing_data(run, "rows to score")
    _check_no_effect(format, columns)
    groups: list[PromptGroup] | None = None
    part = f"{split} split"
    if split is None:
        groups, split, part = _own_held_out(run, own)
    source = configure_data(own, config, run.labels)
    try:
        dataset = read_scorable(source, split, config.format)
    except (ConfigError, DataError) as error:
        raise ConfigError(
            f"--data is missing, and the run's own has no completions to score ({error})"
        ) from error
    if groups is None:
        trained = trained_prompts(run, own)
    else:
        trained, dataset = set(), _rows_of(dataset, groups)
    return RowsToScore(dataset, split, f"{_name(own)}, {part}", frozenset(trained))


def _rows_of(dataset: ScorableDataset, groups: Sequence[PromptGroup]) -> ScorableDataset:
    """The rows that `groups` were made of. A list of completions can be made of several rows."""
    sources = {group.source for group in groups}
    prompts = {group.prompt for group in groups if group.prompt}
    rows = [
        found.row
        for found in dataset
        if found.row.source in sources
        or (found.group is not None and found.group.prompt in prompts)
    ]
    return replace(dataset, rows=rows)


def trained_prompts(run: TrainedRun, data: Data | None) -> set[Text]:
    """The prompts that the run was trained on; none if its data can't be read any more."""
    config = run.config
    if config is None or data is None:
        return set()
    try:
        source = configure_data(data, config, run.labels)
        groups = read_splits(config, _reader(run), source).train
        return {group.prompt for group in groups if group.prompt}
    except MlxAlignError:
        return set()


def trained_on_remark(trained: int, prompts: int) -> str:
    """What a line on `prompts` prompts ends with if `trained` of them are training data, or ""."""
    which = "all" if trained == prompts else str(trained)
    return f" (trained on: {which} of the prompts)" if trained else ""


def trained_on_warning(trained: int, prompts: int) -> tuple[str, ...]:
    """A warning if `trained` of the `prompts` prompts that were measured are training data."""
    if not trained:
        return ()
    return (
        f"{trained} of the {counted(prompts, 'prompt')} are in the run's training data: their "
        "numbers say how well the run fits what it was trained on, not how it does on new prompts",
    )


def _read_own_data(run: TrainedRun, data: Data) -> HeldOutData:
    groups, split, part = _own_held_out(run, data)
    held_out = {group.prompt for group in groups}
    assert run.config is not None
    source = configure_data(data, run.config, run.labels)
    # Read again as pairs, because a kto run splits pairs into single completions.
    pairs = _pairs(source, split, run.config.format)
    pairs = [group for group in pairs if group.prompt in held_out]
    return HeldOutData(pairs, _unique_prompts(groups), f"{_name(data)}, {part}")


def _own_held_out(run: TrainedRun, data: Data) -> tuple[list[PromptGroup], str, str]:
    """What the run held out of its data, the split it is in, and a description of it."""
    config = run.config
    assert config is not None
    if config.valid_fraction == 0 and not has_split(data, "valid"):
        raise DataError(
            f"{run.folder}: the run held no rows out (--valid-fraction 0, and {_name(data)} has "
            "no valid split); give other data with --data"
        )
    source = configure_data(data, config, run.labels)
    needed = prompts_needed(run.command, run.loss)
    groups = read_splits(config, _reader(run), source, min_valid_prompts=needed).valid
    if has_split(data, "valid"):
        return groups, "valid", "valid split"
    return groups, "train", "the part that the run held out"


def _name(data: Data) -> str:
    """The path or name of data, for display."""
    return data.name if isinstance(data, DataSource) else str(data)


def _reader(run: TrainedRun) -> GroupReader:
    """The function with which the run read its data; the split depends on it."""
    if run.command == "dpo":
        return _read_pairs
    if run.command == "reward":
        return read_preferences
    if run.command == "kto":
        return read_unpaired
    if run.command == "sft":
        return read_supervised if run.loss_on == "assistant" else _read_last_answers
    return read_prompts


def _read_pairs(data: Data, split: str, format: str | None) -> tuple[list[PromptGroup], ReadReport]:
    groups, reading = read_preferences(data, split, format)
    return to_pairs(groups), reading


def _read_last_answers(
    data: Data, split: str, format: str | None
) -> tuple[list[PromptGroup], ReadReport]:
    groups, reading = read_supervised(data, split, format)
    return keep_last_completion(groups), reading


def _pairs(data: Data, split: str, format: str | None) -> list[PromptGroup]:
    """The data's preference pairs; [] if it is of another kind."""
    if format is None:
        first = read_rows(data, split)[0]
        pairs = any(entry.matches(first) for entry in PREFERENCE_FORMATS)
    else:
        pairs = format in {entry.name for entry in PREFERENCE_FORMATS}
    return _read_pairs(data, split, format)[0] if pairs else []


def _unique_prompts(groups: Sequence[PromptGroup]) -> list[PromptGroup]:
    first: dict[object, PromptGroup] = {}
    for group in groups:
        first.setdefault(group.prompt, group)
    return [
        replace(group, completions=(), scores=None, soft_label=None, label=None, margin=None)
        for group in first.values()
    ]


def sample_prompts(
    prompts: Sequence[PromptGroup], style: ChatTemplate, *, count: int, max_length: int, seed: int
) -> list[EvalPrompt]:
    """Draw at most `count` prompts of at most `max_length` tokens; they keep their order.

    Raises:
        DataError: All prompts are too long.
    """
    order = np.random.default_rng(seed).permutation(len(prompts))
    found: dict[int, EvalPrompt] = {}
    for index in order.tolist():
        if len(found) == count:
            break
        tokens = try_tokenize_group(prompts[index], style, max_seq_length=max_length).group
        if tokens is not None:
            found[index] = EvalPrompt(prompts[index], tokens)
    if not found:
        raise DataError(
            f"{prompts[0].source}: none of the {len(prompts)} prompts fits in "
            f"--max-seq-length {max_length} tokens; raise it, or give other --data"
        )
    return [found[index] for index in sorted(found)]


def read_documents(file: str) -> list[PromptGroup]:
    """Read documents to measure perplexity on.

    Args:
        file: Data with a `text` field per row, or a text file, in which each paragraph is a
            document.

    Raises:
        DataError: It can't be read, or contains no text.
    """
    path = Path(file).expanduser()
    if path.suffix in FILE_SUFFIXES or not path.is_file():
        try:
            split = "valid" if has_split(file, "valid") else "train"
            return read_supervised(file, split, "text")[0]
        except DataError as error:
            text = str(error).removeprefix("--data ")
            raise DataError(f"--perplexity-data {text}") from error
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"--perplexity-data {file}: can't be read ({reason})") from error
    documents = [part for part in content.split("\n\n") if part.strip()]
    if not documents:
        raise DataError(f"--perplexity-data {file}: contains no text")
    return [PromptGroup("", (part,), f"{path.name}, part {i}") for i, part in enumerate(documents)]


def split_into_segments(
    documents: Sequence[PromptGroup], style: ChatTemplate, max_length: int
) -> tuple[list[TokenizedGroup], list[int]]:
    """Split documents into segments of at most `max_length` tokens.

    The first token of each segment is its prompt and is not scored. No end token is added, because
    documents need not end with a sentence.

    Returns:
        The segments, and the number of each segment's document.

    Raises:
        DataError: No document has two tokens or more.
    """
    groups, numbers = [], []
    for number, document in enumerate(documents):
        ids = np.array(style.encode(str(document.completions[0])), np.int32)
        for start in range(0, len(ids), max_length):
            part = ids[start : start + max_length]
            if len(part) > 1:
                groups.append(TokenizedGroup(part[:1], (part[1:],), document.source))
                numbers.append(number)
    if not groups:
        raise DataError(f"{documents[0].source}: expected a text of two tokens or more")
    return groups, numbers
