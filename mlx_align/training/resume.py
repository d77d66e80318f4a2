"""Resuming a run: fingerprints of its inputs, the lock of its folder, and the record of resumes.

Paths may change when a run is resumed (a folder was moved). Their content may not, except data and
rewards that the user accepts as changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_align.config import TRAINING_CONFIGS, TrainConfig
from mlx_align.config.schema import (
    EXCLUSIVE,
    REMOVED_OPTIONS,
    declared_options,
    fixed_options,
    flag_of,
    read_yaml,
    to_yaml,
)
from mlx_align.errors import ConfigError, ModelError
from mlx_align.losses.registry import combine, parse_losses, resolve_options
from mlx_align.models.adapters import fingerprint_folder, read_layout
from mlx_align.system.atomic_io import wrap_write_errors, write_text
from mlx_align.tracking.run_dir import (
    CHECKPOINTS,
    CONFIG_FILE,
    FINGERPRINTS_FILE,
    INIT_ADAPTER,
    append_resume,
    lock_run_dir,
    new_run_dir,
    package_versions,
    read_resumes,
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
# What --accept-changed can name, with the hashes (of OPTIONS) that it covers besides files and
# functions of rewards, and the options that may then change too.
ACCEPTABLE: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "rewards": (
        frozenset({"reward model", "held-out reward model"}),
        frozenset({"reward", "eval_reward", "reward_model_weight"}),
    ),
    "data": (
        frozenset(
            {"training data", "held-out data", "prompts", "held-out prompts", "demonstrations"}
        ),
        frozenset({"data", "format", "columns"}),
    ),
}
# Changes of these make earlier held-out metrics incomparable.
_HELD_OUT = frozenset({"held-out data", "held-out prompts"})


@dataclass(frozen=True)
class Resumption:
    """How a run differs from its earlier part, or {} and () for a new run.

    Attributes:
        run: The run folder.
        config: The options from now on.
        made_of: The fingerprints from now on.
        options: The options that changed, by name: before and after.
        inputs: Names of the data and rewards that changed, which the user accepted.
        versions: Versions and machine that changed since the last part: before and after.
    """

    run: Path
    config: TrainConfig
    made_of: dict[str, Any]
    options: Mapping[str, tuple[Any, Any]]
    inputs: tuple[str, ...]
    versions: Mapping[str, tuple[Any, Any]]

    @property
    def length_changed(self) -> bool:
        """Whether the run is to train for longer, or shorter, than before."""
        return not self.options.keys().isdisjoint({"iters", "epochs", "target_margin"})

    @property
    def held_out_changed(self) -> bool:
        """Whether earlier held-out metrics can't be compared with later ones."""
        return any(name in _HELD_OUT or kind_of(name) == "rewards" for name in self.inputs)

    @property
    def rewards_changed(self) -> bool:
        """Whether rewards changed."""
        return any(kind_of(name) == "rewards" for name in self.inputs)

    def record(self, step: int, total_steps: int) -> None:
        """Add the resume to the run folder, and make the changes permanent.

        Args:
            step: The step after which the run continues.
            total_steps: Steps of the whole run.
        """
        row = {
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "step": step,
            "total_steps": total_steps,
            "changed": {
                "options": {name: list(pair) for name, pair in self.options.items()},
                "inputs": list(self.inputs),
                "versions": {name: list(pair) for name, pair in self.versions.items()},
            },
            "versions": self.made_of["versions"],
        }
        append_resume(self.run, row)
        began = read_fingerprints(self.run)
        if began and self.inputs:
            began["hashes"] = self.made_of["hashes"]
            began["options"] = {**began["options"], **self.made_of["options"]}
            write_json(self.run / FINGERPRINTS_FILE, began)
        write_text(self.run / CONFIG_FILE, to_yaml(self.config, with_unset=True))


@contextmanager
def open_run_folder(
    run: Path,
    config: TrainConfig,
    made_of: dict[str, Any],
    note: Callable[[str], None],
    *,
    resume: bool,
    accept: Sequence[str] = (),
) -> Iterator[Resumption | None]:
    """Lock the run folder for this process within the block; write config and fingerprints.

    Args:
        run: The run folder; created if it doesn't exist.
        config: The resolved options.
        made_of: The `fingerprints` of the run.
        note: Called with lines about changes since the run began.
        resume: Whether the folder already has this run.
        accept: Names in `ACCEPTABLE` of what may have changed.

    Yields:
        For a resumed run, how it differs from its earlier part. Its `record` writes that down;
        until then the files that describe the run are unchanged.

    Raises:
        ConfigError: Another process trains in the folder, it has another run, or an input of the
            run has changed.
        WriteError: The folder can't be written to.
    """
    with wrap_write_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    with lock_run_dir(run):
        if resume:
            resumption, lines = compare_with_start(run, config, made_of, accept)
            for line in lines:
                note(line)
            yield resumption
            return
        new_run_dir(str(run), made_of["command"])  # checked again: now it is locked
        write_json(run / FINGERPRINTS_FILE, made_of)
        write_text(run / CONFIG_FILE, to_yaml(config, with_unset=True))
        yield None


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


def compare_with_start(
    run: Path, config: TrainConfig, now: dict[str, Any], accept: Sequence[str] = ()
) -> tuple[Resumption, list[str]]:
    """Check that a resumed run has the command, model, data, rewards and options it began with.

    Args:
        run: The run folder.
        config: The options from now on.
        now: `fingerprints` of the run to resume.
        accept: Names in `ACCEPTABLE` of what may have changed.

    Returns:
        What is different, and lines about it.

    Raises:
        ConfigError: Something else changed; the message names it.
        ModelError: The fingerprints in the folder can't be read.
    """
    began = read_fingerprints(run)
    options = _changed_options(run, config)
    if not began:
        line = f"! {run}: has no {FINGERPRINTS_FILE}; assuming that its inputs are unchanged."
        return Resumption(run, config, now, options, (), {}), [line]
    check_command(run, now["command"], began)
    changed = [
        name
        for name in sorted(began["hashes"].keys() | now["hashes"].keys())
        if began["hashes"].get(name) != now["hashes"].get(name)
    ]
    refused = [name for name in changed if kind_of(name) not in accept]
    if refused:
        names = " and ".join(f"the {name}{OPTIONS.get(name, '')}" for name in refused)
        kinds = list(dict.fromkeys(filter(None, map(kind_of, refused))))
        way = ""
        if all(kind_of(name) is not None for name in refused):
            accepting = " ".join(f"--accept-changed {kind}" for kind in kinds)
            way = f", continue with the changed ones by adding {accepting}"
        raise ConfigError(
            f"--resume {run}: {names} changed since the run began; restore the original{way}, or "
            "start a new run"
        )
    _check_options(run, now, began, accept)
    earlier = [row["versions"] for row in read_resumes(run) if "versions" in row]
    before = earlier[-1] if earlier else began["versions"]
    versions = {
        name: (before.get(name), value)
        for name, value in now["versions"].items()
        if before.get(name) != value
    }
    lines = []
    others = [
        f"{name} {began['versions'].get(name)} → {value}"
        for name, value in now["versions"].items()
        if began["versions"].get(name) != value
    ]
    if others:
        lines.append(
            f"! Changed since the run began: {', '.join(others)}. The last digits may differ."
        )
    if changed:
        names = ", ".join(f"the {name}" for name in changed)
        lines.append(f"! Accepted as changed: {names}. Metrics before and after are not the same.")
    elif accept:
        lines.append(f"Nothing changed in {' and '.join(accept)}; --accept-changed is not needed.")
    return Resumption(run, config, now, options, tuple(changed), versions), lines


def kind_of(name: str) -> str | None:
    """The name in `ACCEPTABLE` that covers an input of a run; None if it may not change."""
    if name.startswith(("reward file ", "reward function ")):
        return "rewards"
    return next((kind for kind, (names, _) in ACCEPTABLE.items() if name in names), None)


def may_change(name: str, accept: Sequence[str]) -> bool:
    """Whether an option may differ because the user accepts changed data or rewards."""
    return any(name in ACCEPTABLE[kind][1] for kind in accept)


def _check_options(
    run: Path, now: dict[str, Any], began: dict[str, Any], accept: Sequence[str]
) -> None:
    """Raise a ConfigError if an option that determines what is trained has changed."""
    declared = declared_options(TRAINING_CONFIGS[now["command"]])
    for name, value in now["options"].items():
        # A run of an older version lacks options that came later, which had no effect then.
        before = began["options"].get(name, declared[name].default)
        if before != value and not may_change(name, accept):
            raise ConfigError(
                f"--resume {run}: {flag_of(name)} is {value} in its config.yaml, and was "
                f"{before} when the run began; restore that, or start a new run"
            )


def _changed_options(run: Path, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The options that differ from those in the run's config.yaml: before and after."""
    # Through JSON, as lists, which is how they are written.
    before = json.loads(json.dumps(asdict(run_config(run, type(config), read_fingerprints(run)))))
    after = json.loads(json.dumps(asdict(config)))
    return {
        name: (before[name], value)
        for name, value in after.items()
        if before[name] != value and name != "output"
    }


def run_config(run: Path, config_class: type[TrainConfig], began: Mapping[str, Any]) -> TrainConfig:
    """The options of an earlier run, also of one that another version made.

    An option that the run didn't have gets its default. One that was left out of config.yaml has
    the value that the run began with, even if the default is another one now.

    Args:
        run: The run folder.
        config_class: The class of its options.
        began: From `read_fingerprints`.

    Raises:
        ConfigError: config.yaml can't be read, or has an option that this version lacks; the
            message says what replaces it.
    """
    declared = declared_options(config_class)
    try:
        values = read_yaml(run / CONFIG_FILE, config_class, of_run=True)
    except ConfigError as error:
        raise _with_versions(error, began) from error
    for name, value in began.get("options", {}).items():
        if name in declared and not declared[name].change_on_resume:
            values.setdefault(name, value)
        elif name in REMOVED_OPTIONS and value != REMOVED_OPTIONS[name].default:
            removed = REMOVED_OPTIONS[name]
            raise _with_versions(
                ConfigError(
                    f"--resume {run}: began with {flag_of(name)} {value}, which was removed in "
                    f"mlx-align {removed.version}; {removed.instead}"
                ),
                began,
            )
    return config_class(**values)


def _with_versions(error: ConfigError, began: Mapping[str, Any]) -> ConfigError:
    """The error with a hint at the version that the run began with, if that is not this one."""
    ours, name = package_versions()["mlx-align"], "mlx-align"
    version = began.get("versions", {}).get(name)
    if version is None or version == ours:
        return error
    return ConfigError(
        f"{error}; the run began with {name} {version}, and this is {ours}: resume it with that "
        "version, or start a new run"
    )


def effective_value(config: TrainConfig, name: str, run: Path) -> tuple[Any, str]:
    """The value that an option of a run has in effect, and how to show it.

    An option that was left out has the default of the loss, of the adapter, or of its declaration.

    Args:
        config: The options of the run.
        name: The option.
        run: The run folder.

    Returns:
        The value, None if it has no single one; and its text.
    """
    value = getattr(config, name)
    if value is None and name in getattr(config, "shortcuts", ()):
        value = _loss_hyperparameter(config, name)
    if value is None and name in ("lora_rank", "lora_alpha", "num_layers"):
        value = _layout_value(run, name)
    if value is None:
        others = {one for pair in EXCLUSIVE if name in pair for one in pair} - {name}
        text = declared_options(type(config))[name].default_text
        if any(getattr(config, other) is not None for other in others):
            text = None  # another option sets it
        return None, "none" if text is None else f"the default ({text})"
    return value, f"{value:g}" if isinstance(value, float) else str(value)


def _loss_hyperparameter(config: Any, name: str) -> Any:
    """A hyperparameter of the run's loss, given or by default; None if the loss lacks it."""
    try:
        if config.loss in ("kto", "apo_zero_unpaired"):
            return resolve_options(config.loss, config.loss_options()).get(name)
        parts = combine(parse_losses(config.loss), config.loss_options()).options
        return next((options[name] for options in parts.values() if name in options), None)
    except ConfigError:  # a loss that was passed from Python
        return config.loss_options().get(name)


def _layout_value(run: Path, name: str) -> Any:
    """Rank, alpha or number of blocks of the run's adapter; None before its first checkpoint."""
    for folder in (run, *sorted((run / CHECKPOINTS).glob("*"), reverse=True)):
        try:
            layout = read_layout(folder)
        except ModelError:
            continue
        if layout.fine_tune_type == "full" and name != "num_layers":
            return None
        found = {
            "lora_rank": layout.rank,
            "lora_alpha": layout.scale * layout.rank,
            "num_layers": layout.num_layers,
        }
        return found[name]
    return None


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
