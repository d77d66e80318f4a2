r"""What `--reward` says: which function, with which options, at which weight."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from mlx_align.errors import ConfigError
from mlx_align.rollout.builtin_rewards import BUILTIN_REWARDS, Reward

_BUILTIN = re.compile(r"(\w+)\s*(?:\((.*)\))?(?:\s*=([^()]*))?", re.DOTALL)
_FUNCTION = re.compile(r"([^=]+):\s*([^:=]*?)\s*(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """One `--reward`.

    Attributes:
        text: As it was given.
        name: What its metrics are called after: the function's name, numbered from the second of
            that name on (`regex`, `regex_2`).
        weight: What it counts in the total; 0 to watch it only.
        builtin: A built-in reward, ready to be called; None for a user's function.
        column: The field of the data that a built-in compares with, if it does.
        module: Where a user's function is: a module, or a file ending in .py.
        function: Its name there.
    """

    text: str
    name: str
    weight: float = 1.0
    builtin: Reward | None = None
    column: str | None = None
    module: str = ""
    function: str = ""


def parse_rewards(specs: Sequence[str]) -> tuple[RewardSpec, ...]:
    r"""Rewards as the command line names them; no user's code is run yet.

    Args:
        specs: `name`, `name(option=value)`, `module:function` or `file.py:function`, each with
            `=weight` behind it if that is not 1. Options are written as in Python:
            `regex(pattern=r'\d+')=0.5`.

    Raises:
        ConfigError: A spec can't be read, names no built-in reward, option or file, or has a
            wrong weight; or all weights are 0.
    """
    parsed: list[RewardSpec] = []
    for text in specs:
        spec = _parse(text.strip())
        taken = {other.name for other in parsed}
        name, number = spec.name, 1
        while name in taken:
            number += 1
            name = f"{spec.name}_{number}"
        parsed.append(replace(spec, name=name))
    if parsed and not any(spec.weight for spec in parsed):
        raise ConfigError(f"--reward {parsed[0].text}: all weights are 0; no reward would count")
    return tuple(parsed)


def _parse(text: str) -> RewardSpec:
    builtin = _BUILTIN.fullmatch(text)
    if builtin is not None:
        return _builtin(text, *builtin.groups())
    function = _FUNCTION.fullmatch(text)
    if function is not None:
        return _function(text, *function.groups())
    raise ConfigError(
        f"--reward {text}: expected a built-in reward ({', '.join(BUILTIN_REWARDS)}), with options "
        "as in length(target=200), module:function or file.py:function; =weight may follow"
    )


def _builtin(text: str, name: str, written: str | None, weight: str | None) -> RewardSpec:
    maker = BUILTIN_REWARDS.get(name)
    if maker is None:
        close = get_close_matches(name, BUILTIN_REWARDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "a function of yours is module:function"
        raise ConfigError(
            f"--reward {text}: no built-in reward {name!r} (those: {', '.join(BUILTIN_REWARDS)}); "
            f"{hint}"
        )
    takes = inspect.signature(maker).parameters
    try:
        call = ast.parse(f"f({written or ''})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    # MemoryError and RecursionError: what ast says of endless nesting.
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        example = ", ".join(f"{option}=…" for option in takes)
        raise ConfigError(
            f"--reward {text}: can't read its options; expected {name}({example}), text in quotes"
        ) from None
    odd = next((option for option in options if option not in takes), None)
    if odd is not None:
        raise ConfigError(f"--reward {text}: no option {odd!r}; {name} has {', '.join(takes)}")
    required = [key for key, option in takes.items() if option.default is option.empty]
    missing = next((key for key in required if key not in options), None)
    if missing is not None:
        raise ConfigError(f"--reward {text}: {name} needs {missing}, as in {name}({missing}=…)")
    try:
        reward = maker(**options)
    except ConfigError as error:
        raise ConfigError(f"--reward {text}: {error}") from None
    column = options.get("column", takes["column"].default) if "column" in takes else None
    return RewardSpec(text, name, _weight(text, weight), reward, column)


def _function(text: str, module: str, function: str, weight: str | None) -> RewardSpec:
    module = module.strip()
    if not function.isidentifier():
        raise ConfigError(
            f"--reward {text}: {function!r} is no function's name; expected {module}:function, "
            "with =weight behind it if it is not 1"
        )
    if module.endswith(".py"):
        if not Path(module).expanduser().is_file():
            raise ConfigError(f"--reward {text}: there is no file {module}")
    elif not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(f"--reward {text}: {module!r} is no module's name; a file's ends in .py")
    return RewardSpec(text, function, _weight(text, weight), module=module, function=function)


def _weight(text: str, weight: str | None) -> float:
    if weight is None:
        return 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(
            f"--reward {text}: weight {weight.strip()!r}; expected a number, such as 0.5"
        )
    return value
