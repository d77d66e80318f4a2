"""Arms: the ways in which answers are sampled: model, adapter, system prompt, temperature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from mlx_align.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to sample answers.

    Attributes:
        name: Its name in the file of answers.
        model: Model folder or hub name.
        adapter_path: Run or adapter folder; None for the model alone.
        system: System prompt, instead of the prompt's own; None to leave the prompt as it is.
        temperature: Sampling temperature.
        n: Answers per prompt.
    """

    name: str
    model: str
    adapter_path: str | None = None
    system: str | None = None
    temperature: float = 1.0
    n: int = 1

    @property
    def author(self) -> str:
        """Model and adapter, as data names who wrote an answer."""
        return self.model if self.adapter_path is None else f"{self.model} + {self.adapter_path}"


_KINDS: Mapping[str, tuple[type, ...]] = {
    "name": (str,),
    "model": (str,),
    "adapter_path": (str,),
    "system": (str,),
    "temperature": (int, float),
    "n": (int,),
}


def read_arms(file: str | Path, default: Arm) -> list[Arm]:
    """The arms in a YAML file: a list of mappings, whose keys are the attributes of `Arm`.

    Args:
        file: The file.
        default: What an arm has that the file doesn't say.

    Raises:
        ConfigError: The file can't be read, or an arm has an unknown key or a wrong value.
    """
    try:
        content = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"--arms {file}: can't be read ({reason})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--arms {file}: not YAML ({str(error).splitlines()[0]})") from error
    if isinstance(content, dict) and "arms" in content:
        content = content["arms"]
    if not isinstance(content, list) or not content:
        raise ConfigError(f"--arms {file}: expected a list with a `- name: …` for each arm")
    found = [_arm(f"--arms {file}: arm {i}", one, default) for i, one in enumerate(content, 1)]
    names = [arm.name for arm in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--arms {file}: two arms are named {twice!r}; names must differ")
    return found


def _arm(where: str, given: Any, default: Arm) -> Arm:
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: expected lines of `key: value`")
    values: dict[str, Any] = {field.name: getattr(default, field.name) for field in fields(Arm)}
    values["name"] = f"arm {where.rpartition(' ')[2]}"
    for key, value in given.items():
        kinds = _KINDS.get(str(key))
        if kinds is None:
            raise ConfigError(f"{where}: unknown key {key!r}; expected {', '.join(_KINDS)}")
        if not isinstance(value, kinds) or isinstance(value, bool) or value == "":
            raise ConfigError(f"{where}: {key} is {value!r}; expected {_WORDS[kinds]}")
        values[key] = value
    if given.get("model") and "adapter_path" not in given:
        values["adapter_path"] = None  # the default's adapter is for the default's model
    arm = Arm(**values)
    if arm.n < 1 or not 0 <= arm.temperature < float("inf"):
        raise ConfigError(f"{where}: expected n of at least 1 and a temperature of at least 0")
    if arm.temperature == 0 and arm.n > 1:
        raise ConfigError(
            f"{where}: temperature 0 makes all {arm.n} answers the same; add n: 1, or give a "
            "temperature above 0"
        )
    return arm


_WORDS: Mapping[tuple[type, ...], str] = {
    (str,): "text",
    (int, float): "a number",
    (int,): "a whole number",
}


def temperature_arms(temperatures: Sequence[str], default: Arm) -> list[Arm]:
    """One arm per temperature.

    Raises:
        ConfigError: A temperature is no number above 0, or is given twice.
    """
    found = []
    for text in temperatures:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ConfigError(f"--temperatures {text}: expected numbers above 0, as 0.7,1.0")
        found.append(
            Arm(
                f"temperature {value:g}",
                default.model,
                default.adapter_path,
                default.system,
                value,
                default.n,
            )
        )
    if len({arm.name for arm in found}) < len(found):
        raise ConfigError("--temperatures: one is given twice; give each once")
    return found
