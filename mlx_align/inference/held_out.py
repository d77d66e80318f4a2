"""What a finished run is judged on: held-out pairs and prompts, and a text from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_align.data.formats import (
    PREFERENCE_FORMATS,
    Reading,
    read_preferences,
    read_prompts,
    read_supervised,
    read_unpaired,
)
from mlx_align.data.groups import last_answers, to_pairs
from mlx_align.data.rendering import ChatStyle, encode
from mlx_align.data.sources import SUFFIXES, has_split, read_rows
from mlx_align.data.splits import Reader, read_splits
from mlx_align.data.tokenize import try_tokenize_group
from mlx_align.errors import ConfigError, DataError
from mlx_align.inference.finished import Finished
from mlx_align.types import PromptGroup, TokenizedGroup


@dataclass(frozen=True)
class HeldOut:
    """Rows that the run did not learn from.

    Attributes:
        pairs: Chosen first; none where the data holds no preferences.
        prompts: Every prompt once, without completions.
        title: Which rows these are, for people.
    """

    pairs: list[PromptGroup]
    prompts: list[PromptGroup]
    title: str


@dataclass(frozen=True)
class Question:
    """A prompt as text, for a judge, and as the policy's tokens."""

    text: PromptGroup
    tokens: TokenizedGroup


def read_held_out(run: Finished, data: str | None, format: str | None) -> HeldOut:
    """The rows that the run itself held out, or those of other data.

    The run's own are found by its own rule: the valid split of its data, or the share that its
    seed set aside. Of other data it is the valid split, or where there is none, all of it.

    Raises:
        ConfigError: The run's data is unknown, and none is named.
        DataError: The data can't be read, or holds nothing out.
    """
    own = None if run.config is None else run.config.data
    if data is None and own is None:
        raise ConfigError(
            f"--data is missing: {run.folder} has no config.yaml that names its own; name a file "
            "or folder of pairs or prompts"
        )
    if data is None or (data == own and format is None):
        return _own(run)
    split = "valid" if has_split(data, "valid") else "train"
    pairs = _pairs(data, split, format)
    groups = pairs or read_prompts(data, split, format)[0]
    return HeldOut(pairs, _prompts(groups), f"{data}, {split} split")


def _own(run: Finished) -> HeldOut:
    config = run.config
    assert config is not None
    assert config.data is not None
    if config.valid_fraction == 0 and not has_split(config.data, "valid"):
        raise DataError(
            f"{run.folder}: the run held nothing out (--valid-fraction 0, and {config.data} has "
            "no valid split); name other data with --data"
        )
    groups = read_splits(config, _reader(run)).valid
    split = "valid" if has_split(config.data, "valid") else "train"
    held_out = {group.prompt for group in groups}
    # Read anew, as a kto run took its pairs apart: the same prompts, together again.
    pairs = [
        group for group in _pairs(config.data, split, config.format) if group.prompt in held_out
    ]
    how = "valid split" if split == "valid" else "the part that the run set aside"
    return HeldOut(pairs, _prompts(groups), f"{config.data}, {how}")


def _reader(run: Finished) -> Reader:
    """How the run read its data: what is held out depends on that."""
    if run.command == "dpo":
        return _read_pairs
    if run.command == "kto":
        return read_unpaired
    if run.command == "sft":
        return read_supervised if run.loss_on == "assistant" else _read_last_answers
    return read_prompts


def _read_pairs(data: str, split: str, format: str | None) -> tuple[list[PromptGroup], Reading]:
    groups, reading = read_preferences(data, split, format)
    return to_pairs(groups), reading


def _read_last_answers(
    data: str, split: str, format: str | None
) -> tuple[list[PromptGroup], Reading]:
    groups, reading = read_supervised(data, split, format)
    return last_answers(groups), reading


def _pairs(data: str, split: str, format: str | None) -> list[PromptGroup]:
    """The data's pairs; none where it is something else."""
    if format is None:
        first = read_rows(data, split)[0]
        pairs = any(entry.matches(first) for entry in PREFERENCE_FORMATS)
    else:
        pairs = format in {entry.name for entry in PREFERENCE_FORMATS}
    return _read_pairs(data, split, format)[0] if pairs else []


def _prompts(groups: Sequence[PromptGroup]) -> list[PromptGroup]:
    first: dict[object, PromptGroup] = {}
    for group in groups:
        first.setdefault(group.prompt, group)
    return [
        replace(group, completions=(), scores=None, soft_label=None, label=None, margin=None)
        for group in first.values()
    ]


def choose_questions(
    prompts: Sequence[PromptGroup], style: ChatStyle, *, count: int, max_length: int, seed: int
) -> list[Question]:
    """At most `count` prompts that fit `max_length` tokens, drawn by the seed, in their order.

    Raises:
        DataError: None fits.
    """
    order = np.random.default_rng(seed).permutation(len(prompts))
    found: dict[int, Question] = {}
    for index in order.tolist():
        if len(found) == count:
            break
        tokens = try_tokenize_group(prompts[index], style, max_seq_length=max_length).group
        if tokens is not None:
            found[index] = Question(prompts[index], tokens)
    if not found:
        raise DataError(
            f"{prompts[0].source}: none of the {len(prompts)} prompts can be asked within "
            f"--max-seq-length {max_length} tokens; raise it, or name other --data"
        )
    return [found[index] for index in sorted(found)]


def read_documents(file: str) -> list[PromptGroup]:
    """Texts whose perplexity is measured: data with a `text` per row, or any other file as text.

    Of a file that is no data every paragraph is a document.

    Raises:
        DataError: It can't be read, or holds no text.
    """
    path = Path(file).expanduser()
    if path.suffix in SUFFIXES or not path.is_file():
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
        raise DataError(f"--perplexity-data {file}: holds no text")
    return [PromptGroup("", (part,), f"{path.name}, part {i}") for i, part in enumerate(documents)]


def stretches(
    documents: Sequence[PromptGroup], style: ChatStyle, max_length: int
) -> tuple[list[TokenizedGroup], list[int]]:
    """Texts cut into stretches of at most `max_length` tokens, the first of each given, not scored.

    No end token is added: the end of such a text is where somebody cut it.

    Returns:
        The stretches, and of each the number of its document.

    Raises:
        DataError: No text has two tokens.
    """
    groups, of = [], []
    for number, document in enumerate(documents):
        ids = np.array(encode(style, str(document.completions[0])), np.int32)
        for start in range(0, len(ids), max_length):
            part = ids[start : start + max_length]
            if len(part) > 1:
                groups.append(TokenizedGroup(part[:1], (part[1:],), document.source))
                of.append(number)
    if not groups:
        raise DataError(f"{documents[0].source}: no text of two tokens or more to measure")
    return groups, of
