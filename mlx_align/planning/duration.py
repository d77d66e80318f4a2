"""Estimates of how long a run takes, from a rate measured now or by an earlier run."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from mlx_align.config import DEFAULT_BATCH_SIZE, KTOConfig, OnPolicyConfig, TrainConfig
from mlx_align.data.batching import groups_per_batch
from mlx_align.data.buckets import BatchLimit, batch_limit
from mlx_align.errors import ConfigError
from mlx_align.models.adapters import AdapterLayout
from mlx_align.system.regular_files import read_json
from mlx_align.system.user_folders import cache_folder
from mlx_align.types import TokenizedGroup

# Fraction of a training step that the forward pass takes; the backward pass takes twice as long.
FORWARD_FRACTION = 1 / 3


@dataclass(frozen=True)
class Duration:
    """Expected duration of a run, without evaluations and samples.

    Attributes:
        tokens_per_second: The measured rate, padding not counted.
        source: The source of the rate, in words.
        training_seconds: Time for all updates.
        reference_seconds: Time for the reference log-probs if none are cached.
    """

    tokens_per_second: float
    source: str
    training_seconds: float
    reference_seconds: float


def expected_duration(
    config: TrainConfig,
    groups: Sequence[TokenizedGroup],
    rate: float,
    source: str,
    *,
    has_reference: bool,
    limit: BatchLimit,
) -> Duration:
    """Expected duration of a run over `groups`.

    Args:
        config: The run's options.
        groups: Training data.
        rate: Tokens per second.
        source: The source of the rate, in words.
        has_reference: Whether reference log-probs are needed.
        limit: The run's batch limit.
    """
    # The second completion of a KTO group is the mismatched one, not counted in a run's tokens.
    trained = 1 if isinstance(config, KTOConfig) else None
    per_epoch = sum(len(g.prompt) + sum(map(len, g.completions[:trained])) for g in groups)
    reference_tokens = sum(len(g.prompt) + sum(map(len, g.completions)) for g in groups)
    if config.iters is not None:
        per_update = config.accumulation * groups_per_batch(groups, limit)
        seen = config.iters * per_update / len(groups)
    else:
        seen = config.epochs or 1.0
    if not has_reference:
        reference_tokens = 0
    reference_seconds = min(1.0, seen) * reference_tokens * FORWARD_FRACTION / rate
    return Duration(rate, source, seen * per_epoch / rate, reference_seconds)


def read_run_rate(folder: Path) -> float:
    """Read the tokens per second of a finished run from its summary.

    Raises:
        ConfigError: The folder has no summary.json with a rate.
    """
    try:
        rate = float(read_json(folder / "summary.json")["tokens_per_second"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--run {folder}: has no summary.json with tokens_per_second; give the folder of a "
            "finished run"
        ) from error
    if rate <= 0:
        raise ConfigError(
            f"--run {folder}: has {rate} tokens per second in summary.json, expected above 0; "
            "give another run"
        )
    return rate


@dataclass(frozen=True)
class RolloutDuration:
    """Expected duration of an on-policy run, without evaluations.

    Attributes:
        seconds_per_batch: Time for a rollout batch with its updates.
        source: The source of the rate, in words.
        batches: Number of rollout batches.
        training_seconds: Time for all of them.
    """

    seconds_per_batch: float
    source: str
    batches: int
    training_seconds: float


def rollout_batches(config: OnPolicyConfig, prompts: int) -> int:
    """Number of rollout batches of a run over `prompts` prompts."""
    visits = round((config.epochs or 1.0) * prompts)
    return config.iters or max(1, math.ceil(visits / prompts_per_batch(config)))


def prompts_per_batch(config: OnPolicyConfig) -> int:
    """Number of prompts in a rollout batch."""
    size = config.batch_size or DEFAULT_BATCH_SIZE
    return size * config.accumulation * config.minibatches


def expected_rollout_duration(
    config: OnPolicyConfig, prompts: int, rate: float, source: str
) -> RolloutDuration:
    """Expected duration of a run over `prompts` prompts at `rate` completions per second."""
    seconds = prompts_per_batch(config) * config.group_size / rate
    batches = rollout_batches(config, prompts)
    return RolloutDuration(seconds, source, batches, seconds * batches)


def read_rollout_rate(folder: Path, command: str) -> float:
    """Read the completions per second, updates included, of a finished run of ppo or grpo.

    Raises:
        ConfigError: The folder is not a finished run of `command`.
    """
    try:
        summary = read_json(folder / "summary.json")
        found, completions = str(summary["command"]), int(summary["completions"])
        seconds = float(summary["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--run {folder}: has no summary.json of a finished run of {command}; give the folder "
            "of one"
        ) from error
    if found != command:
        raise ConfigError(f"--run {folder}: is a run of {found}; give a run of {command}")
    if completions <= 0 or seconds <= 0:
        raise ConfigError(
            f"--run {folder}: has {completions} completions in {seconds:g} s in summary.json, "
            "expected more than 0; give another run"
        )
    return completions / seconds


def rates_file() -> Path:
    """File in which measured rates are stored."""
    return cache_folder() / "rates.json"


def rate_key(
    command: str, model: Path, config: TrainConfig, layout: AdapterLayout, machine: str
) -> str:
    """Key of a measured rate: a hash of everything but the data that affects a step's speed."""
    facts = [
        command,
        str(model.resolve()),
        *astuple(batch_limit(config)),
        config.grad_checkpoint,
        config.adapter_dtype,
        config.max_seq_length,
        layout.to_mlx_lm(),
        machine,
    ]
    if isinstance(config, OnPolicyConfig):
        facts += [
            config.group_size,
            config.max_completion_length,
            config.accumulation * config.minibatches,
            config.update_epochs,
            config.reward,
            config.reward_model,
        ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def load_rate(key: str) -> float | None:
    """Load the rate stored under `key`, tokens (or completions) per second; None if missing."""
    rate = _load_rates().get(key)
    return float(rate) if isinstance(rate, int | float) and rate > 0 else None


def save_rate(key: str, rate: float) -> None:
    """Store a rate for later plans; does nothing if the file can't be written."""
    file = rates_file()
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({**_load_rates(), key: rate}, indent=1), encoding="utf-8")
        partial.replace(file)
    except OSError:
        return


def _load_rates() -> dict[str, object]:
    try:
        content = read_json(rates_file())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
