"""What a run was made of, so that one that goes on later is known to be the same run.

Paths may change (a folder was moved); what they hold may not.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_align.config import TrainConfig
from mlx_align.errors import ConfigError, ModelError
from mlx_align.models.adapters import fingerprint_folder
from mlx_align.settings import flag_of
from mlx_align.train.runlog import versions
from mlx_align.types import TokenizedGroup

FINGERPRINTS_FILE = "fingerprints.json"
# The option that names it.
WHERE = {
    "model": " (--model)",
    "init adapter": " (--init-adapter)",
    "training data": " (--data)",
    "held-out data": " (--data)",
    "prompts": " (--data)",
    "held-out prompts": " (--data)",
    "reward model": " (--reward-model)",
    "held-out reward model": " (--eval-reward-model)",
    "demonstrations": " (--ptx-data)",
}


def fingerprints(
    command: str,
    config: TrainConfig,
    model_folder: Path,
    data: Mapping[str, Sequence[TokenizedGroup]],
    others: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Hashes of model, init adapter and data; the command, its options, versions and machine.

    Args:
        command: Its name.
        config: The resolved options; those that decide what is trained are kept.
        model_folder: Where the weights are.
        data: Tokenised groups by what they are called (`training data`).
        others: Hashes of what else the run is made of, by what it is called.
    """
    hashes = {"model": fingerprint_folder(model_folder)}
    if config.init_adapter is not None:
        hashes["init adapter"] = fingerprint_folder(Path(config.init_adapter), "*adapter*")
    hashes.update((name, fingerprint_groups(groups)) for name, groups in data.items())
    hashes.update(others or {})
    options = {f.name: getattr(config, f.name) for f in fields(config) if f.metadata["training"]}
    return {
        "command": command,
        "hashes": hashes,
        # As JSON has them, to be compared with what is read.
        "options": json.loads(json.dumps(options)),
        "versions": {
            **versions(),
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "device": str(mx.default_device()),
        },
    }


def fingerprint_groups(groups: Sequence[TokenizedGroup]) -> str:
    """A hash of what is learned from: tokens, labels, ratings, and their order."""
    digest = hashlib.blake2b(digest_size=16)
    for group in groups:
        facts = (group.scores, group.label, group.soft_label, group.margin)
        digest.update(repr(facts).encode())
        for ids in (group.prompt, *group.completions):
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(np.ascontiguousarray(ids, np.int32).tobytes())
        for mask in group.loss_masks or ():
            digest.update(np.packbits(mask).tobytes())
    return digest.hexdigest()


def read_fingerprints(run: Path) -> dict[str, Any]:
    """What stands in the run folder; {} where there is nothing.

    Raises:
        ModelError: The file is damaged.
    """
    file = run / FINGERPRINTS_FILE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: dict(found[key]) for key in ("hashes", "options", "versions")}
        if not isinstance(found["command"], str):
            raise TypeError("command")
        return {"command": found["command"], **kept}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{file}: damaged; a run without it can't be known to be the same: start a new one"
        ) from error


def check_same_run(run: Path, now: dict[str, Any]) -> list[str]:
    """Refuse to go on with other things than the run began with; lines on what may differ.

    Args:
        run: The run folder.
        now: `fingerprints` of what would go on.

    Raises:
        ConfigError: The command, the model, the data or an option is another; the text says which.
        ModelError: What the run began with can't be read.
    """
    began = read_fingerprints(run)
    if not began:
        return [f"! {run}: no {FINGERPRINTS_FILE} in it; it is taken for the same run."]
    check_command(run, now["command"], began)
    changed = [
        f"the {name}{WHERE.get(name, '')}"
        for name in sorted(began["hashes"].keys() | now["hashes"].keys())
        if began["hashes"].get(name) != now["hashes"].get(name)
    ]
    if changed:
        raise ConfigError(
            f"--resume {run}: {' and '.join(changed)} changed since the run began; put back what "
            "it was, or start a new run"
        )
    for name, value in now["options"].items():
        if began["options"].get(name) != value:
            raise ConfigError(
                f"--resume {run}: {flag_of(name)} is {value} in its config.yaml, and was "
                f"{began['options'].get(name)} when the run began; put that back, or start a new "
                "run"
            )
    others = [
        f"{name} {began['versions'].get(name)} → {value}"
        for name, value in now["versions"].items()
        if began["versions"].get(name) != value
    ]
    if not others:
        return []
    return [f"! Changed since the run began: {', '.join(others)}. The last digits may differ."]


def check_command(run: Path, command: str, began: dict[str, Any]) -> None:
    """Refuse to go on with a run of another command.

    Raises:
        ConfigError: It is one.
    """
    if began and began["command"] != command:
        raise ConfigError(
            f"--resume {run}: a run of {began['command']}; go on with mlx-align "
            f"{began['command']} --resume {run}"
        )
