"""Which rows a run learns from, and which it holds out: one rule, for training and for judging."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mlx_align.config import TrainConfig
from mlx_align.data.formats import Reading
from mlx_align.data.groups import split_validation
from mlx_align.data.sources import has_split
from mlx_align.types import PromptGroup

# (data, split, format) -> groups and how they were read.
Reader = Callable[[str, str, str | None], tuple[list[PromptGroup], Reading]]


class Splits(NamedTuple):
    """Rows of a run's data."""

    train: list[PromptGroup]
    valid: list[PromptGroup]
    reading: Reading  # of the training rows


def read_splits(config: TrainConfig, read: Reader) -> Splits:
    """The valid split of the data, or where it has none, a share of it set aside by the seed.

    Raises:
        DataError: The data can't be used; the text names file and line.
    """
    assert config.data is not None
    groups, reading = read(config.data, "train", config.format)
    held_out: list[PromptGroup] = []
    if has_split(config.data, "valid"):
        held_out, _ = read(config.data, "valid", config.format)
    elif config.valid_fraction > 0:
        groups, held_out = split_validation(groups, config.valid_fraction, config.seed)
    return Splits(groups, held_out, reading)
