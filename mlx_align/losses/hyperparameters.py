"""Hyperparameters: what each may be, declared in the signature of the function that has it.

A loss writes `beta: Positive = 0.1`; for the type checker that is a float, and here it is also
the range that a given value is held to. Enumerations are strings.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from mlx_align.errors import ConfigError

OptionValue = float | str


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers an option may take; the bounds belong to it unless marked open."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        low = f"{'>' if self.low_open else '>='} {self.low:g}" if self.low > -math.inf else ""
        high = f"{'<' if self.high_open else '<='} {self.high:g}" if self.high < math.inf else ""
        return "must be " + (" and ".join(bound for bound in (low, high) if bound) or "finite")


@dataclass(frozen=True, slots=True)
class Choice:
    """The names an option may take."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Option:
    """One hyperparameter of a function: its default and the rule for its values."""

    default: OptionValue
    rule: Range | Choice


Positive = Annotated[float, Range(low=0.0, low_open=True)]
NonNegative = Annotated[float, Range(low=0.0)]
Smoothing = Annotated[float, Range(low=0.0, high=0.5, high_open=True)]
PositiveSmoothing = Annotated[float, Range(low=0.0, high=0.5, low_open=True, high_open=True)]
UnitInterval = Annotated[float, Range(low=0.0, high=1.0, low_open=True, high_open=True)]


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The hyperparameters of a loss: its keyword-only arguments, in order."""
    hints = get_type_hints(function, include_extras=True)
    options = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            (rule,) = hints[parameter.name].__metadata__
            options[parameter.name] = Option(parameter.default, rule)
    return options


def read_option(name: str, value: object, option: Option, loss: str) -> OptionValue:
    """`value` as option `name` of `loss` takes it: a float in its range, or one of its names.

    Text that spells a number is read as one, so that a command line can pass what was typed.

    Raises:
        ConfigError: The value is of the wrong kind or out of range.
    """
    where = f"--loss-option {name}={value}"
    if isinstance(option.rule, Choice):
        if value not in option.rule.names:
            raise ConfigError(f"{where}: {_hint(str(value), option.rule.names)} (--loss {loss})")
        return str(value)
    try:
        # float() takes True, and what was meant by `beta: true` in a file is anyone's guess.
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise ConfigError(f"{where}: expected a number (--loss {loss})")
    if number not in option.rule:
        raise ConfigError(f"{where}: {option.rule} (--loss {loss})")
    return number


def resolve(
    loss: str, options: Mapping[str, Option], given: Mapping[str, Any]
) -> dict[str, OptionValue]:
    """The hyperparameters of `loss`: the defaults of `options`, overridden by `given`.

    Raises:
        ConfigError: `loss` has no such option, or a value is out of range.
    """
    refuse_without_effect(loss, options, given)
    resolved: dict[str, OptionValue] = {
        name: read_option(name, given[name], option, loss) if name in given else option.default
        for name, option in options.items()
    }
    if "f_alpha" in given and resolved.get("f_divergence", "alpha") != "alpha":
        raise ConfigError("--loss-option f_alpha: has no effect without f_divergence=alpha")
    return resolved


def refuse_without_effect(loss: str, options: Iterable[str], given: Iterable[str]) -> None:
    """Raise a ConfigError for the first name in `given` that is none of `loss`'s `options`."""
    known = tuple(options)
    for name in given:
        if name not in known:
            raise ConfigError(
                f"--loss-option {name}: has no effect on --loss {loss} "
                f"(it has: {', '.join(known) or 'none'})"
            )


def unknown_name(option: str, name: str, choices: Iterable[str]) -> ConfigError:
    """The error for a name that is not among `choices`: says the nearest one and lists all."""
    return ConfigError(f"{option} {name}: {_hint(name, tuple(choices))}")


def _hint(name: str, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, choices, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"unknown; {meant}choose from {', '.join(choices)}"
