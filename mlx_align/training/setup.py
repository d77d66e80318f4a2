"""What every run needs before its weights are loaded: its layout and its data.

`offline.py` and `on_policy_setup.py` prepare the two kinds of runs with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mlx.utils import tree_flatten

from mlx_align.config import TrainConfig
from mlx_align.data.provenance import Lineage, check_circularity
from mlx_align.data.quality import near_overlap
from mlx_align.data.readers import Data, has_split
from mlx_align.data.splits import GroupReader, read_splits
from mlx_align.data.statistics import DatasetStatistics, TokenizedDataset, compute_statistics
from mlx_align.data.tokenization import tokenize_groups
from mlx_align.errors import ConfigError
from mlx_align.models.adapters import AdapterLayout, read_layout
from mlx_align.models.loading import ModelFolder
from mlx_align.models.policy import Policy
from mlx_align.models.row_limits import check_rows
from mlx_align.models.weights import AdapterWeights
from mlx_align.system.progress import Console
from mlx_align.tracking.run_dir import INIT_ADAPTER
from mlx_align.training.loop import Trainer
from mlx_align.types import PromptGroup, TokenizedGroup

# Rows that are compared when a run starts: 2,300 conversations take .7 s, this many 6 s.
MAX_COMPARED = 20_000


@dataclass(frozen=True, kw_only=True)
class Setup(ABC):
    """A run before its weights are loaded.

    Attributes:
        config: The options, all resolved.
        layout: The layout to train.
        folder: The base model.
        eval_examples: Number of held-out examples in an evaluation.
        lines: Lines to show.
        facts: Statistics of the data, for the summary.
        made_of: Fingerprints of the run.
    """

    config: TrainConfig
    layout: AdapterLayout
    folder: ModelFolder
    eval_examples: int
    lines: Sequence[str]
    facts: dict[str, Any]
    made_of: dict[str, Any]

    @abstractmethod
    def load(self, run: Path, console: Console) -> Job:
        """Load the model, and make what trains it.

        Args:
            run: The run folder, which exists.
            console: Shows messages and progress.

        Raises:
            MlxAlignError: A model, adapter or reward can't be used.
        """


class Job(Protocol):
    """A run with its weights: its trainer, and what is done before and after training.

    Attributes:
        policy: The model that is trained.
        prompts: Held-out prompts that are answered before and after training.
        next_command: The command with which a person tries the result.
    """

    policy: Policy
    prompts: list[TokenizedGroup]
    next_command: str

    @property
    def trainer(self) -> Trainer:
        """Makes the steps."""

    def finish(
        self, weights: AdapterWeights, kept: int, samples: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Write the samples, and report on the run.

        Args:
            weights: The weights that are kept.
            kept: The step after which they were saved.
            samples: Answers before and after training.

        Returns:
            The samples that were written, and entries of the summary.
        """

    def counts(self, groups: int) -> dict[str, int]:
        """Counts of the training data, for the summary."""


def check_circular_run(
    config: TrainConfig, made_of: Mapping[str, Any], judges: Mapping[str, Lineage]
) -> dict[str, Any]:
    """Facts about the judges of the training data, for the summary and the page.

    Args:
        config: Says whether a circular run is allowed.
        made_of: Fingerprints of the run.
        judges: Lineage of each judge, by name.

    Raises:
        ConfigError: A judge is the policy or was trained from it, and that is not allowed.
    """
    if not judges:
        return {}
    hashes = made_of["hashes"]
    policy = (hashes.get(INIT_ADAPTER, hashes["model"]),)
    circular = check_circularity(policy, judges, allow=config.allow_circular)
    facts: dict[str, Any] = {"judges": {name: list(lineage) for name, lineage in judges.items()}}
    return {**facts, "circular": circular} if circular else facts


def prepare_data(
    config: TrainConfig, folder: ModelFolder, read: GroupReader, data: Data | None = None
) -> TokenizedDataset:
    """Read the data, split it if it has no valid split, tokenise it, and compute statistics.

    Args:
        config: Names the data and its limits.
        folder: Its tokenizer is used.
        read: (data, split, format) -> groups and how they were read.
        data: The data, if it is not `config.data`.

    Raises:
        DataError: The data can't be used; the message names file and line.
    """
    groups, held_out, reading, fraction = read_splits(config, read, data)
    tokenize = partial(
        tokenize_groups,
        tokenizer=folder.tokenizer,
        max_seq_length=config.max_seq_length,
        max_completion_length=config.max_completion_length,
        thinking=config.thinking,
    )
    train, report = tokenize(groups)
    valid = tokenize(held_out, keep_text=True)[0] if held_out else []
    remarks = check_rows(folder, (*train, *valid))
    facts = compute_statistics(
        groups,
        train,
        report,
        folder.tokenizer,
        read_report=reading,
        valid=held_out,
        max_positions=folder.max_positions,
    )
    notes = (*facts.notes, *remarks, *_describe_near_overlap(groups, held_out, facts))
    return TokenizedDataset(train, valid, replace(facts, notes=notes), fraction)


def _describe_near_overlap(
    groups: Sequence[PromptGroup], valid: Sequence[PromptGroup], facts: DatasetStatistics
) -> list[str]:
    """A remark if prompts of the valid split are nearly those of training rows, not only equal."""
    if len(groups) + len(valid) > MAX_COMPARED:
        return []
    found = near_overlap(groups, valid)
    if len(found) <= (facts.valid_overlap or 0):
        return []
    return [
        f"validation rows with a prompt nearly equal to one in train: {len(found):,} of "
        f"{len(valid):,}, as {found[0]}"
    ]


def describe_test_split(config: TrainConfig, data: Data | None) -> list[str]:
    """A line on the data's test split, if it has one."""
    source = config.data if data is None else data
    if source is None or not has_split(source, "test"):
        return []
    return [
        "The data has a test split, which training doesn't read. At the end: mlx-align eval RUN "
        "--split test"
    ]


def resolve_layout(config: TrainConfig) -> AdapterLayout:
    """The layout to train: from the options, else the init adapter's, else the defaults.

    Raises:
        ConfigError: The options don't fit the init adapter.
        ModelError: The init adapter can't be read.
    """
    init = None if config.init_adapter is None else read_layout(Path(config.init_adapter))
    layout = init or AdapterLayout()
    if config.fine_tune_type is not None:
        layout = replace(layout, fine_tune_type=config.fine_tune_type)
    _check_adapter_options(config, layout)
    if config.num_layers == 0:
        raise ConfigError("--num-layers 0: trains no layers; give 1 or more, or -1 for all")
    rank = config.lora_rank or layout.rank
    if init is not None and rank < init.rank:
        raise ConfigError(
            f"--lora-rank {rank}: the init adapter has rank {init.rank}; give that or more"
        )
    if config.lora_alpha is not None:
        scale = config.lora_alpha / rank
    else:
        scale = layout.scale if init is not None else AdapterLayout().scale
    return AdapterLayout(
        fine_tune_type=layout.fine_tune_type,
        rank=rank,
        scale=scale,
        dropout=config.lora_dropout,
        num_layers=layout.num_layers if config.num_layers is None else config.num_layers,
        keys=layout.keys if config.lora_keys is None else config.lora_keys,
    )


def _check_adapter_options(config: TrainConfig, layout: AdapterLayout) -> None:
    """Raise a ConfigError if an option of adapters has no effect."""
    if layout.fine_tune_type != "lora" and config.adapter_dtype != "float32":
        reason = "trains no adapters" if layout.fine_tune_type == "full" else "needs float32 norms"
        raise ConfigError(
            f"--adapter-dtype {config.adapter_dtype}: --fine-tune-type {layout.fine_tune_type} "
            f"{reason}; leave it out"
        )
    if layout.fine_tune_type != "full":
        return
    for name in ("lora_rank", "lora_alpha", "lora_keys", "lora_dropout"):
        if getattr(config, name):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag}: has no effect on --fine-tune-type full; leave it out")


def describe_policy(policy: Policy) -> str:
    """A line about the trained weights."""
    layout = policy.layout
    trained = sum(array.size for _, array in tree_flatten(policy.start))
    kind = {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}[layout.fine_tune_type]
    rank = (
        "" if layout.fine_tune_type == "full" else f" rank {layout.rank}, scale {layout.scale:g},"
    )
    return f"{kind},{rank} {trained:,} parameters; {policy.model.check}."
