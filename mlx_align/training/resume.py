"""Resuming a run: fingerprints of its inputs, and the lock of its folder.

Paths may change when a run is resumed (a folder was moved), but their content may not.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_align.config import TRAINING_CONFIGS, TrainConfig
from mlx_align.config.schema import declared_options, fixed_options, flag_of, to_yaml
from mlx_align.errors import ConfigError, ModelError
from mlx_align.models.adapters import fingerprint_folder
from mlx_align.system.atomic_io import wrap_write_errors, write_text
from mlx_align.tracking.run_dir import (
    CONFIG_FILE,
    FINGERPRINTS_FILE,
    INIT_ADAPTER,
    lock_run_dir,
    new_run_dir,
    package_versions,
    write_json,
)
from mlx_align.types import TokenizedGroup

# The options that name the inputs of a run.
OPTIONS = {
    "model": " (--model)",
    INIT_ADAPTER: " (--init-adapter)",
    "training data": " (--data)",
    "held-out data": " (--data)",
    "prompts": " (--data)",
    "held-out prompts": " (--data)",
    "reward model": " (--reward-model)",
    "held-out reward model": " (--eval-reward-model)",
    "demonstrations": " (--ptx-data)",
}


@contextmanager
def open_run_folder(
    run: Path,
    config: TrainConfig,
    made_of: dict[str, Any],
    note: Callable[[str], None],
    *,
    resume: bool,
) -> Iterator[None]:
    """Lock the run folder for this process within the block; write config and fingerprints.

    Args:
        run: The run folder; created if it doesn't exist.
        config: The resolved options.
        made_of: The `fingerprints` of the run.
        note: Called with lines about changes since the run began.
        resume: Whether the folder already has this run.

    Raises:
        ConfigError: Another process trains in the folder, it has another run, or an input of the
            run has changed.
        WriteError: The folder can't be written to.
    """
    with wrap_write_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    with lock_run_dir(run):
        if resume:
            for line in check_same_run(run, made_of):
                note(line)
        else:
            new_run_dir(str(run), made_of["command"])  # checked again: now it is locked
            write_json(run / FINGERPRINTS_FILE, made_of)
        write_text(run / CONFIG_FILE, to_yaml(config))
        yield


def fingerprints(
    command: str,
    config: TrainConfig,
    model_folder: Path,
    data: Mapping[str, Sequence[TokenizedGroup]],
    others: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Hashes of model, init adapter and data; the command, its options, versions and machine.

    Args:
        command: Name of the command.
        config: The resolved options; those that affect training are kept.
        model_folder: Folder of the base model.
        data: Tokenised groups by name (`training data`).
        others: Further hashes, by name.
    """
    hashes = {"model": fingerprint_folder(model_folder)}
    if config.init_adapter is not None:
        hashes[INIT_ADAPTER] = fingerprint_folder(Path(config.init_adapter), "*adapter*")
    hashes.update((name, fingerprint_groups(groups)) for name, groups in data.items())
    hashes.update(others or {})
    options = fixed_options(config)
    return {
        "command": command,
        "hashes": hashes,
        # Through JSON, so that they compare equal after reading them back.
        "options": json.loads(json.dumps(options)),
        "versions": {
            **package_versions(),
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "device": str(mx.default_device()),
        },
    }


def fingerprint_groups(groups: Sequence[TokenizedGroup]) -> str:
    """A hash of tokens, labels and ratings, in their order."""
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
    """The fingerprints in the run folder; {} without them.

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
            f"{file}: damaged, so the inputs of the run can't be checked; start a new run"
        ) from error


def check_same_run(run: Path, now: dict[str, Any]) -> list[str]:
    """Check that a resumed run has the same command, model, data and options.

    Args:
        run: The run folder.
        now: `fingerprints` of the run to resume.

    Returns:
        Lines about other changes.

    Raises:
        ConfigError: One of them changed; the message names it.
        ModelError: The fingerprints in the folder can't be read.
    """
    began = read_fingerprints(run)
    if not began:
        return [f"! {run}: has no {FINGERPRINTS_FILE}; assuming that its inputs are unchanged."]
    check_command(run, now["command"], began)
    changed = [
        f"the {name}{OPTIONS.get(name, '')}"
        for name in sorted(began["hashes"].keys() | now["hashes"].keys())
        if began["hashes"].get(name) != now["hashes"].get(name)
    ]
    if changed:
        raise ConfigError(
            f"--resume {run}: {' and '.join(changed)} changed since the run began; restore the "
            "original, or start a new run"
        )
    declared = declared_options(TRAINING_CONFIGS[now["command"]])
    for name, value in now["options"].items():
        # A run of an older version lacks options that came later, which had no effect then.
        before = began["options"].get(name, declared[name].default)
        if before != value:
            raise ConfigError(
                f"--resume {run}: {flag_of(name)} is {value} in its config.yaml, and was "
                f"{before} when the run began; restore that, or start a new run"
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
    """Check that a run to resume is of this command.

    Raises:
        ConfigError: It is of another command.
    """
    if began and began["command"] != command:
        raise ConfigError(
            f"--resume {run}: is a run of {began['command']}; resume it with mlx-align "
            f"{began['command']} --resume {run}"
        )
