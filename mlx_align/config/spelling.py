"""Rewrite messages for Python callers: `beta=-1` instead of `--beta -1`.

Errors and notes name options as on the command line. The Python functions and `mlx_align.trl`
rewrite them with `python_spelling`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from mlx_align import config
from mlx_align.config.schema import Option, Options, declared_options

# Command-line options that are keywords of the Python functions, but not part of the schema.
_OTHERS = ("resume", "accept_changed", "config")
_COMMAND = re.compile(r"mlx-align (\w+) --resume (\S+)")
# An option at the start of a message, with its value: `--beta -1: must be above 0`.
_FIRST = re.compile(r"--([a-z][a-z0-9-]*) (\S+)(?=: )")
_ANY = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)(?: ([^\s;,:)]+))?")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?")


def python_spelling(text: str, names: Mapping[str, str] | None = None) -> str:
    """A message with its options as Python keywords.

    Args:
        text: The message, with options as on the command line.
        names: Other names for options, such as TRL's `output_dir` for `output`.
    """
    names = names or {}
    text = _COMMAND.sub(lambda found: f"mlx_align.{found[1]}(resume={found[2]!r})", text)
    first = _FIRST.match(text)
    if first is not None and _known(first[1]) and _kind(first[1]) is not dict:
        text = _keyword(first[1], first[2], names) + text[first.end() :]
    return _ANY.sub(lambda found: _rewritten(found, names), text)


def _rewritten(found: re.Match[str], names: Mapping[str, str]) -> str:
    option, following = found[1], found[2]
    if not _known(option):
        return found[0]
    if following is None:
        return _keyword(option, None, names)
    value = following.rstrip(".")
    if not _is_value(option, value):
        return f"{_keyword(option, None, names)} {following}"
    return _keyword(option, value, names) + following[len(value) :]


def _known(option: str) -> bool:
    name = option.replace("-", "_")
    known = _options()
    return name in known or name in _OTHERS or _switched_off(option) is not None


def _kind(option: str) -> type | None:
    declared = _options().get(option.replace("-", "_"))
    return None if declared is None else declared.kind


def _switched_off(option: str) -> str | None:
    """The option that a flag such as --no-guard or --sum turns off."""
    for name, declared in _options().items():
        if f"--{option}" == (declared.off or f"--no-{name.replace('_', '-')}"):
            return name if declared.kind is bool else None
    return None


def _is_value(option: str, text: str) -> bool:
    """Whether the word after an option is its value, and not the next word of the sentence."""
    declared = _options().get(option.replace("-", "_"))
    if declared is not None and declared.kind in (bool, dict):
        return False
    choices = () if declared is None else (*declared.choices, *declared.names)
    return (
        text in choices
        or _NUMBER.fullmatch(text) is not None
        or text[0] in "'\""
        or any(letter in text for letter in "_/=.")
    )


def _keyword(option: str, value: str | None, names: Mapping[str, str]) -> str:
    name = option.replace("-", "_")
    off = None if name in _options() else _switched_off(option)
    declared = _options().get(off or name)
    shown = names.get(off or name, off or name)
    if declared is not None and declared.kind is bool:
        return f"{shown}={off is None}" + ("" if value is None else f" {value}")
    if value is None:
        return "resume=True" if name == "resume" else shown
    plain = _NUMBER.fullmatch(value) or value[0] in "'\"" or value in ("True", "False")
    return f"{shown}={value if plain else repr(value)}"


@cache
def _options() -> dict[str, Option]:
    """Every option of every command, by name."""
    found: dict[str, Option] = {}
    for name in config.__all__:
        one = getattr(config, name)
        if isinstance(one, type) and issubclass(one, Options):
            for option in declared_options(one).values():
                earlier = found.setdefault(option.name, option)
                names = (*earlier.choices, *option.choices, *earlier.names, *option.names)
                if earlier is not option and names != (*earlier.choices, *earlier.names):
                    found[option.name] = _with_names(earlier, names)
    return found


def _with_names(option: Option, names: tuple[str, ...]) -> Option:
    return replace(option, names=tuple(dict.fromkeys(names)))
