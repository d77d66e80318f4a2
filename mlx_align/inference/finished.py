"""A finished run as its folder tells it: what it learned, from where, and with which β.

Also any adapter folder of mlx-lm's, which tells less: its policy started from the bare base, and
nothing is known of its data.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlx_align.config import DpoConfig, KtoConfig, SftConfig, TrainConfig
from mlx_align.errors import ConfigError, ModelError
from mlx_align.losses.registry import combine, parse_losses, resolve_options
from mlx_align.models.adapters import (
    ADAPTER_CONFIG,
    AdapterLayout,
    read_layout,
)
from mlx_align.models.heads import has_head
from mlx_align.settings import resolve

# Runs that learned from their own samples: held to where they started by a KL, without a β.
ON_POLICY = ("ppo", "grpo")
CONFIG, SUMMARY, CHECKPOINTS = "config.yaml", "summary.json", "checkpoints"


@dataclass(frozen=True)
class Finished:
    """What is known of a run.

    Attributes:
        folder: With its adapter.
        layout: Of that adapter.
        base: The model that it names as its base; None where it names none.
        command: dpo, kto, sft, ppo …; None for an adapter without config.yaml.
        config: What all commands share; None likewise.
        beta: Of its loss; None where that has none.
        loss_on: What of a conversation an sft run learned.
    """

    folder: Path
    layout: AdapterLayout
    base: str | None = None
    command: str | None = None
    config: TrainConfig | None = None
    beta: float | None = None
    loss_on: str | None = None


def read_run(adapter_path: str | Path) -> Finished:
    """Read a run folder, one of its checkpoints, or an adapter folder of mlx-lm.

    Raises:
        ModelError: There is no adapter in it, or it is a reward model's.
        ConfigError: Its config.yaml can't be read.
    """
    folder = Path(adapter_path).expanduser()
    if not folder.is_dir():
        raise ModelError(f"--adapter-path {adapter_path}: no such folder")
    if has_head(folder):
        raise ModelError(
            f"--adapter-path {adapter_path}: a reward model's run, which writes no text; "
            "mlx-align score says how good it is on labelled pairs"
        )
    layout = read_layout(folder)
    base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("model")
    named = base if isinstance(base, str) else None
    run = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder
    file = run / CONFIG
    if not file.is_file():
        return Finished(folder, layout, named)
    values = _read_yaml(file)
    command = _command(run, values)
    shared = {entry.name for entry in dataclasses.fields(TrainConfig)}
    if command in ON_POLICY:
        # There it is how long a sample may get; the data's own completions are not cut.
        shared.remove("max_completion_length")
    config = resolve(TrainConfig, {k: v for k, v in values.items() if k in shared})
    return Finished(
        folder,
        layout,
        named,
        command,
        config,
        _beta(command, file),
        str(values.get("loss_on", "completion")) if command == "sft" else None,
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file}: can't be read ({str(error).splitlines()[0][:120]})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected option: value lines; is it a run folder?")
    return {str(key): value for key, value in values.items()}


def _command(run: Path, values: dict[str, Any]) -> str:
    """As the summary says; an unfinished run has none, and its options tell."""
    try:
        return str(json.loads((run / SUMMARY).read_text(encoding="utf-8"))["command"])
    except (OSError, ValueError, KeyError, TypeError):
        if "loss_on" in values:
            return "sft"
        if "group_size" in values:
            return "ppo" if "critic" in values else "grpo"
        return "dpo" if "wpo" in values else "kto" if "loss" in values else "run"


def _beta(command: str, file: Path) -> float | None:
    if command == "dpo":
        dpo = resolve(DpoConfig, {}, file)
        return combine(parse_losses(dpo.loss), dpo.loss_options()).beta
    if command == "kto":
        kto = resolve(KtoConfig, {}, file)
        return float(resolve_options(kto.loss, kto.loss_options())["beta"])
    if command == "sft":
        resolve(SftConfig, {}, file)
    return None
