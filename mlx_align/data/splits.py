"""Split a run's data into training and held-out rows, by one rule for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mlx_align.config import KTOConfig, TrainConfig
from mlx_align.data.columns import configure_data
from mlx_align.data.formats import ReadReport
from mlx_align.data.readers import Data, has_split
from mlx_align.data.transforms import split_validation
from mlx_align.types import PromptGroup

# A reader of one kind of data: (data, split, format) -> groups and a report, such as
# `formats.read_preferences`.
GroupReader = Callable[[Data, str, str | None], tuple[list[PromptGroup], ReadReport]]


class DatasetSplits(NamedTuple):
    """The rows of a run's data."""

    train: list[PromptGroup]
    valid: list[PromptGroup]
    report: ReadReport  # of the training split
    valid_fraction: float | None = None  # that was split off; None if the data has a valid split


def read_splits(
    config: TrainConfig,
    read: GroupReader,
    data: Data | None = None,
    *,
    min_valid_prompts: int | None = None,
) -> DatasetSplits:
    """Read the training split and the valid split.

    If the data has no valid split, `valid_fraction` of the training rows are held out, chosen by
    the seed; `default_valid_fraction` if it was not given.

    Args:
        config: Names the data, its format, the seed and `valid_fraction`.
        read: The reader for the kind of data.
        data: Data to use instead of `config.data`, such as Python objects opened by `open_data`.
        min_valid_prompts: Prompts that a split off part needs; None to take it from the config.

    Raises:
        DataError: The data can't be used; the text names file and line.
    """
    data = config.data if data is None else data
    assert data is not None
    data = configure_data(data, config)
    groups, report = read(data, "train", config.format)
    held_out: list[PromptGroup] = []
    fraction = config.valid_fraction
    if has_split(data, "valid"):
        held_out, _ = read(data, "valid", config.format)
        return DatasetSplits(groups, held_out, report)
    if fraction is None:
        fraction = default_valid_fraction(len(groups))
    if fraction > 0:
        if min_valid_prompts is None:
            loss = config.loss if isinstance(config, KTOConfig) else None
            min_valid_prompts = prompts_needed("kto" if loss else "", loss)
        groups, held_out = split_validation(
            groups, fraction, config.seed, min_prompts=min_valid_prompts
        )
    return DatasetSplits(groups, held_out, report, fraction)


def default_valid_fraction(rows: int) -> float:
    """The fraction to hold out of `rows` rows if none was given.

    A twentieth, but a fifth or 50 rows of fewer than 1,000, whichever is less: 6 of 30. With 6
    held-out rows all right, the 95% interval of the rate begins above 50%; with 2 it doesn't.
    """
    return max(0.05, min(0.2, 50 / max(rows, 1)))


def prompts_needed(command: str | None, loss: str | None) -> int:
    """Prompts that the valid split of a run needs: two for the KL estimate of kto."""
    return 2 if command == "kto" and loss == "kto" else 1
