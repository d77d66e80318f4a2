"""What `mlx-align data check` finds: how data is read, who can use it, and what is suspicious."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_align.config import TRAINING_CONFIGS, CheckDataConfig, OnPolicyConfig
from mlx_align.data.columns import configure_data
from mlx_align.data.formats import read_prompts
from mlx_align.data.quality import DataQuality, check_quality
from mlx_align.data.readers import DataSource, ReadOnce, has_split, open_data
from mlx_align.data.splits import GroupReader, read_splits
from mlx_align.data.statistics import render_statistics
from mlx_align.data.uses import Use, find_uses
from mlx_align.errors import SplitError
from mlx_align.models.loading import ModelFolder, open_model
from mlx_align.training.on_policy import describe_prompts, read_prompt_splits
from mlx_align.training.run import make_algorithm
from mlx_align.training.setup import prepare_data


@dataclass(frozen=True, slots=True)
class DataCheck:
    """A dataset, described.

    Attributes:
        text: How it is read, its size and lengths.
        facts: The same as JSON-serialisable values.
        uses: What each training command would read from it.
        quality: Problems in its text.
        source: The data.
    """

    text: str
    facts: Mapping[str, Any]
    uses: tuple[Use, ...]
    quality: DataQuality
    source: DataSource


def check_dataset(config: CheckDataConfig, data: str, model: str | None) -> DataCheck:
    """Read data as the first training command that can use it, and describe it.

    Args:
        config: How to read it; its `data` and `model` are not used.
        data: The path or hub name.
        model: The model whose tokenizer to use; None for no lengths in tokens.

    Raises:
        MlxAlignError: The data or the model can't be read, or no command can use the data.
    """
    source = configure_data(ReadOnce(open_data(data)), config)
    uses = find_uses(source, config.format)
    command = next(use.command for use in uses if not use.reason)
    kind = TRAINING_CONFIGS[command]
    names = {field.name for field in dataclasses.fields(kind)}
    values = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name in names and value is not None
    }
    training = kind(**values | {"model": model, "data": data})
    read: GroupReader = read_prompts
    if not isinstance(training, OnPolicyConfig):
        read = make_algorithm(training).read  # type: ignore[union-attr]
    folder = None if model is None else open_model(model)
    try:
        text, facts = _describe(training, folder, read, source)
    except SplitError as error:
        # The data can be checked all the same.
        groups, report = read(source, "train", config.format)
        text = f"{report}\n{len(groups):,} rows. To train on them: {error}"
        facts = {"read_as": str(report), "rows": report.rows, "groups": len(groups)}
    valid = read(source, "valid", config.format)[0] if has_split(source, "valid") else []
    train = read(source, "train", config.format)[0]
    quality = check_quality(train, valid, None if folder is None else folder.tokenizer)
    return DataCheck(text, facts, uses, quality, source)


def _describe(
    config: Any, folder: ModelFolder | None, read: GroupReader, source: DataSource
) -> tuple[str, dict[str, Any]]:
    """How the data is read and its size, as text and as facts."""
    if folder is None:
        splits = read_splits(config, read, source)
        kept, held_out = len(splits.train), len(splits.valid)
        text = (
            f"{splits.report}\n{kept:,} rows to train on, {held_out:,} held out. Give --model for "
            "lengths in tokens."
        )
        facts = {"read_as": str(splits.report), "rows": splits.report.rows, "groups": kept}
        return text, {**facts, "valid_groups": held_out}
    if isinstance(config, OnPolicyConfig):
        train, valid, report, title, _ = read_prompt_splits(config, folder, source)
        lines, facts = describe_prompts(report, title, train, valid)
        return "\n".join(lines), facts
    statistics = prepare_data(config, folder, read, source).statistics
    return render_statistics(statistics), dataclasses.asdict(statistics)
