"""How long a run will take, at a rate that was measured: here, or by an earlier run."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from mlx_align.config import DEFAULT_BATCH_SIZE, KtoConfig, OnPolicyConfig, TrainConfig
from mlx_align.data.batching import groups_per_batch
from mlx_align.data.shapes import BatchLimit, batch_limit
from mlx_align.errors import ConfigError
from mlx_align.models.adapters import AdapterLayout
from mlx_align.types import TokenizedGroup

# A forward pass, of a step's forward pass and a backward pass of about twice that.
FORWARD_SHARE = 1 / 3


@dataclass(frozen=True)
class Duration:
    """Expected seconds of a run, beside evaluations and samples.

    Attributes:
        tokens_per_second: The measured rate, padding not counted.
        source: Where the rate comes from.
        training_seconds: Of all updates.
        reference_seconds: Of the reference's log-probs, if none are stored.
    """

    tokens_per_second: float
    source: str
    training_seconds: float
    reference_seconds: float


def expected(
    config: TrainConfig,
    groups: Sequence[TokenizedGroup],
    rate: float,
    source: str,
    *,
    has_reference: bool,
    limit: BatchLimit,
) -> Duration:
    """The time that a run over `groups` takes at `rate` tokens per second."""
    # Of KTO's two completions the mismatched one is not counted in a run's tokens.
    trained = 1 if isinstance(config, KtoConfig) else None
    per_epoch = sum(len(g.prompt) + sum(map(len, g.completions[:trained])) for g in groups)
    referred = sum(len(g.prompt) + sum(map(len, g.completions)) for g in groups)
    if config.iters is not None:
        per_update = config.grad_accumulation_steps * groups_per_batch(groups, limit)
        seen = config.iters * per_update / len(groups)
    else:
        seen = config.epochs or 1.0
    once = min(1.0, seen) * referred if has_reference else 0.0
    return Duration(rate, source, seen * per_epoch / rate, once * FORWARD_SHARE / rate)


def rate_of_run(folder: Path) -> float:
    """Tokens per second of a finished run, from its summary.

    Raises:
        ConfigError: The folder holds no summary with a rate.
    """
    try:
        rate = float(json.loads((folder / "summary.json").read_text("utf-8"))["tokens_per_second"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--run {folder}: no summary.json with tokens_per_second in it; name the folder of a "
            "finished run"
        ) from error
    if rate <= 0:
        raise ConfigError(f"--run {folder}: it was measured as {rate} tokens per second")
    return rate


@dataclass(frozen=True)
class RolloutDuration:
    """Expected seconds of a run on its own samples, beside evaluations.

    Attributes:
        seconds_per_batch: Of a rollout batch with its updates, measured.
        source: Where that comes from.
        batches: Rollout batches.
        training_seconds: Of all of them.
    """

    seconds_per_batch: float
    source: str
    batches: int
    training_seconds: float


def rollout_batches(config: OnPolicyConfig, prompts: int) -> int:
    """Rollout batches of a run over so many prompts."""
    epochs = (config.epochs or 1.0) * prompts
    return config.iters or max(1, round(epochs / prompts_per_batch(config)))


def prompts_per_batch(config: OnPolicyConfig) -> int:
    """Prompts of a rollout batch."""
    size = config.batch_size or DEFAULT_BATCH_SIZE
    return size * config.grad_accumulation_steps * config.minibatches


def expected_rollouts(
    config: OnPolicyConfig, prompts: int, rate: float, source: str
) -> RolloutDuration:
    """The time that a run over so many prompts takes at `rate` completions per second."""
    each = prompts_per_batch(config) * config.group_size / rate
    batches = rollout_batches(config, prompts)
    return RolloutDuration(each, source, batches, each * batches)


def rate_of_rollouts(folder: Path, command: str) -> float:
    """Completions per second of a finished run of ppo or grpo, updates included.

    Raises:
        ConfigError: The folder is no such run.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        found, completions = str(summary["command"]), int(summary["completions"])
        seconds = float(summary["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--run {folder}: no summary.json of a finished run of {command} in it; name its folder"
        ) from error
    if found != command:
        raise ConfigError(f"--run {folder}: a run of {found}; name one of {command}")
    if completions <= 0 or seconds <= 0:
        raise ConfigError(f"--run {folder}: {completions} completions in {seconds:g} s")
    return completions / seconds


def rates_file() -> Path:
    """Where measured rates are kept."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mlx-align" / "rates.json"


def rate_key(
    command: str, model: Path, config: TrainConfig, layout: AdapterLayout, machine: str
) -> str:
    """Identity of a rate: all that makes a step faster or slower, beside the data."""
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
        # What is sampled, what is done with it, and what that earns.
        facts += [
            config.group_size,
            config.max_completion_length,
            config.grad_accumulation_steps * config.minibatches,
            config.update_epochs,
            config.reward,
            config.reward_model,
        ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def stored_rate(key: str) -> float | None:
    """The rate measured before under `key`, tokens per second; None if there is none."""
    rate = _stored().get(key)
    return float(rate) if isinstance(rate, int | float) and rate > 0 else None


def store_rate(key: str, rate: float) -> None:
    """Keep a rate for later plans; where the folder can't be written, it is not kept."""
    file = rates_file()
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({**_stored(), key: rate}, indent=1), encoding="utf-8")
        partial.replace(file)
    except OSError:
        return


def _stored() -> dict[str, object]:
    try:
        content = json.loads(rates_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
