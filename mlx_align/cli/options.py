"""Command-line options made from a command's dataclass, so there is one list of them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

import click

from mlx_align.errors import ConfigError
from mlx_align.settings import flag_of

_TYPES = {str: str, int: int, float: float}


def config_options(kind: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a command one option per field of `kind`.

    Options left out are not passed as defaults: the dataclass alone knows those, and what was
    given explicitly must be told apart (see `given`).
    """
    hints = typing.get_type_hints(kind)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for entry in reversed(dataclasses.fields(kind)):
            function = option_of(entry, hints[entry.name])(function)
        return function

    return decorate


def option_of(
    entry: dataclasses.Field[Any], hint: Any, help: str | None = None
) -> Callable[..., Any]:
    """A decorator that gives a command the option of one field, with its own help or another."""
    rules = entry.metadata
    if help is not None:
        flag = flag_of(entry.name)
        if hint is bool or bool in typing.get_args(hint):
            return click.option(f"{flag}/{flag.replace('--', '--no-', 1)}", default=None, help=help)
        return click.option(flag, multiple=bool(rules.get("several")), help=help)
    text = rules["help"]
    kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
    plain = next(k for k in kinds if k is not type(None))
    flag = flag_of(entry.name)
    if plain is bool:
        text += f" [default: {'on' if entry.default else 'off'}]"
        return click.option(f"{flag}/{flag.replace('--', '--no-', 1)}", default=None, help=text)
    if typing.get_origin(plain) is dict or rules.get("several"):
        return click.option(flag, multiple=True, metavar=rules["metavar"], help=text)
    if rules.get("choices"):
        text += f" ({', '.join(rules['choices'])})"
    if entry.default is not None:
        text += f" [default: {entry.default}]"
    metavar = rules.get("metavar") or {int: "N", float: "X"}.get(plain, "TEXT")
    if entry.name in ("model", "data", "output", "init_adapter", "reference_cache"):
        metavar = "PATH" if entry.name not in ("model", "data") else "PATH_OR_NAME"
    return click.option(flag, type=_TYPES.get(plain, str), metavar=metavar, help=text)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were on the command line, by field name.

    Raises:
        ConfigError: A --loss-option is not name=value.
    """
    found = {name: value for name, value in options.items() if value not in (None, ())}
    if "loss_option" in found:
        found["loss_option"] = dict(_name_and_value(text) for text in found["loss_option"])
    return found


def _name_and_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--loss-option {text}: expected name=value, like gamma=0.5")
    return name.strip().replace("-", "_"), value.strip()
