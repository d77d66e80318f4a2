"""Options as dataclass fields: how one is declared, and how values given for them are checked.

Knows no option by name but those that exclude each other; they stand in `config.py`.
Precedence: command line > `-c file.yaml` > defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mlx_align.errors import ConfigError

Config = TypeVar("Config")
# Nothing is counted beyond it, and arrays are not indexed beyond it.
LARGEST = 2**31 - 1
# Two ways to say one thing.
EXCLUSIVE = (("iters", "epochs"), ("batch_size", "batch_tokens"))


def option(
    default: Any,
    help: str,  # the click word for it
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
    training: bool = True,
    several: bool = False,
) -> Any:
    """A dataclass field that is also a command-line option and a YAML key.

    `training` says whether it decides what is trained: such options can't change on resume.
    `several` says that it may be given more than once, each time with one of its values.
    """
    return field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "at_least": at_least,
            "above": above,
            "below": below,
            "metavar": metavar,
            "training": training,
            "several": several,
        },
    )


def flag_of(name: str) -> str:
    """The command-line spelling of an option."""
    return "-" * min(len(name), 2) + name.replace("_", "-")


def resolve(
    kind: type[Config], command_line: Mapping[str, Any], file: Path | None = None
) -> Config:
    """Options from the command line over those of a YAML file over defaults, all checked.

    Args:
        kind: The command's dataclass.
        command_line: Only what was given, by field name.
        file: The `-c` file.

    Raises:
        ConfigError: A key is unknown, a value has the wrong type or is out of range, or two
            options exclude each other; the text names it.
    """
    values = {} if file is None else read_yaml(file, kind)
    values.update(_checked(kind, command_line, where=""))
    for one, other in EXCLUSIVE:
        if one in command_line and other not in command_line:
            values.pop(other, None)
        if other in command_line and one not in command_line:
            values.pop(one, None)
        if values.get(one) is not None and values.get(other) is not None:
            raise ConfigError(f"{flag_of(one)} and {flag_of(other)} exclude each other; give one")
    return kind(**values)


def read_yaml(file: Path, kind: type[Any]) -> dict[str, Any]:
    """The checked options of a YAML file.

    Raises:
        ConfigError: It can't be read or parsed, or holds a wrong key or value.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"-c {file}: can't be read ({reason})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0][:120]
        raise ConfigError(f"{file}{line}: not YAML ({problem})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected option: value lines, found {type(content).__name__}")
    given = {_shown(key, str).replace("-", "_"): value for key, value in content.items()}
    return _checked(kind, given, where=f"{file}: ")


def to_yaml(config: Any) -> str:
    """The resolved options as a YAML file that `-c` takes; those left to None are not named."""
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
        if value is not None and value != {}
    }
    return yaml.safe_dump(values, sort_keys=False)


def _checked(kind: type[Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in given.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{where}unknown option {name}{hint}")
        label = f"{where}{name}" if where else flag_of(name)
        values[name] = _value(hints[name], value, fields[name].metadata, label)
    return values


def _value(hint: Any, value: Any, rules: Mapping[str, Any], label: str) -> Any:
    """`value` as the type `hint` says, within `rules`; or a ConfigError that names `label`."""
    kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
    if value is None and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    origin = typing.get_origin(kind) or kind
    if origin is tuple:
        alone = [value] if rules.get("several") else str(value).split(",")
        items = alone if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(i, str) for i in items):
            raise ConfigError(f"{label}: {_shown(value)} is not a list of names")
        found = tuple(item.strip() for item in items if item.strip())
        if not found:
            raise ConfigError(f"{label}: no name in it; name at least one, or leave it out")
        return found
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{label}: {_shown(value)} is not a list of name: value")
        for name, item in value.items():
            if not isinstance(item, str | int | float):
                raise ConfigError(
                    f"{label}: {_shown(name, str)}: {_shown(item)} is no single value"
                )
        return {str(k): v for k, v in value.items()}
    converted = _scalar(origin, value)
    if converted is None:
        names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise ConfigError(f"{label}: {_shown(value)} is not {names[origin]}")
    _check_range(converted, rules, label)
    return converted


def _shown(value: Any, say: Callable[[Any], str] = repr) -> str:
    """The value as a message has it: short, and never the inside of a list or mapping.

    A few lines of YAML can stand for more items than there is memory.
    """
    if isinstance(value, list | tuple | dict):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    try:
        text = say(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:79] + "…"


def _scalar(kind: type, value: Any) -> Any:
    """`value` as `kind`, or None where it isn't one. YAML reads 1e-5 as text: taken as number."""
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind is str:
        return value if isinstance(value, str) and value else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number) or (kind is int and number != int(number)):
        return None
    return kind(value) if isinstance(value, int) else kind(number)


def _check_range(value: Any, rules: Mapping[str, Any], label: str) -> None:
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError(f"{label}: {_shown(value)} is out of range; at most {LARGEST}")
    if rules.get("choices") and value not in rules["choices"]:
        raise ConfigError(
            f"{label}: {_shown(value, str)} is unknown; choose from {', '.join(rules['choices'])}"
        )
    for word, rule, holds in (
        ("at least", rules.get("at_least"), operator.ge),
        ("above", rules.get("above"), operator.gt),
        ("below", rules.get("below"), operator.lt),
    ):
        if rule is not None and not holds(value, rule):
            raise ConfigError(f"{label}: {value} is out of range; it must be {word} {rule:g}")
