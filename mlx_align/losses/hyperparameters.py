"""Hyperparameters of losses, declared in the signatures of the loss functions.

A loss declares `beta: Positive = 0.1`. To the type checker that is a float; the annotation also
holds the range that values are checked against. Options with named values are strings.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from mlx_align.errors import ConfigError

HyperparameterValue = float | str


@dataclass(frozen=True, slots=True)
class Range:
    """Finite numbers between two bounds, which are included unless marked open."""

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
    """A fixed set of names."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """A hyperparameter of a loss: its default and the values it may have."""

    default: HyperparameterValue
    rule: Range | Choice


Positive = Annotated[float, Range(low=0.0, low_open=True)]
NonNegative = Annotated[float, Range(low=0.0)]
Smoothing = Annotated[float, Range(low=0.0, high=0.5, high_open=True)]
PositiveSmoothing = Annotated[float, Range(low=0.0, high=0.5, low_open=True, high_open=True)]
UnitInterval = Annotated[float, Range(low=0.0, high=1.0, low_open=True, high_open=True)]


def hyperparameters_of(function: Callable[..., Any]) -> dict[str, Hyperparameter]:
    """The hyperparameters of a loss: its keyword-only arguments, in order.

    The values they may have follow from the annotation: `Annotated` with a `Range` or `Choice`, or
    a `Literal` of strings. Others must have a number as default, and then accept any finite number.

    Raises:
        ConfigError: A keyword-only argument has no default, or its possible values are unknown.
    """
    found = {}
    hints = _hints(function)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        name, default = parameter.name, parameter.default
        loss = getattr(function, "__name__", str(function))
        if default is parameter.empty:
            raise ConfigError(f"loss {loss}: its argument {name} needs a default value")
        rule = _rule(hints.get(name))
        if rule is None:
            if isinstance(default, bool) or not isinstance(default, int | float):
                raise ConfigError(
                    f"loss {loss}: the default of {name} is {default!r}, which is not a number; "
                    "annotate it with a Literal of its possible values"
                )
            rule, default = Range(), float(default)
        found[name] = Hyperparameter(default, rule)
    return found


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # a user's annotations may not exist at run time
        return {}


def _rule(annotation: Any) -> Range | Choice | None:
    for item in getattr(annotation, "__metadata__", ()):
        if isinstance(item, Range | Choice):
            return item
    if get_origin(annotation) is Literal:
        return Choice(tuple(str(name) for name in get_args(annotation)))
    return None


def read_value(
    name: str, value: object, parameter: Hyperparameter, loss: str
) -> HyperparameterValue:
    """Convert and check a value given for hyperparameter `name` of `loss`.

    Text that spells a number is accepted, so that the command line can pass what the user typed.

    Returns:
        A float in the parameter's range, or one of its names.

    Raises:
        ConfigError: The value has the wrong type or is out of range.
    """
    where = f"--loss-option {name}={value}"
    if isinstance(parameter.rule, Choice):
        if value not in parameter.rule.names:
            hint = _hint(str(value), parameter.rule.names)
            raise ConfigError(f"{where}: {hint} (--loss {loss})")
        return str(value)
    try:
        # float(True) is 1, but `beta: true` in a YAML file is a mistake.
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise ConfigError(f"{where}: expected a number (--loss {loss})")
    if number not in parameter.rule:
        raise ConfigError(f"{where}: {parameter.rule} (--loss {loss})")
    return number


def resolve(
    loss: str, parameters: Mapping[str, Hyperparameter], given: Mapping[str, Any]
) -> dict[str, HyperparameterValue]:
    """The hyperparameters of `loss`: the defaults of `parameters`, overridden by `given`.

    Raises:
        ConfigError: `loss` has no such hyperparameter, or a value is out of range.
    """
    check_option_names(loss, parameters, given)
    resolved: dict[str, HyperparameterValue] = {
        name: read_value(name, given[name], parameter, loss) if name in given else parameter.default
        for name, parameter in parameters.items()
    }
    if "f_alpha" in given and resolved.get("f_divergence", "alpha") != "alpha":
        raise ConfigError("--loss-option f_alpha: has no effect without f_divergence=alpha")
    return resolved


def check_option_names(loss: str, parameters: Iterable[str], given: Iterable[str]) -> None:
    """Raise a ConfigError for the first name in `given` that is not one of `parameters`."""
    known = tuple(parameters)
    for name in given:
        if name not in known:
            raise ConfigError(
                f"--loss-option {name}: has no effect on --loss {loss} "
                f"(it has: {', '.join(known) or 'none'})"
            )


def unknown_name(option: str, name: str, choices: Iterable[str]) -> ConfigError:
    """The error for a name that is not one of `choices`: suggests the nearest and lists all."""
    return ConfigError(f"{option} {name}: {_hint(name, tuple(choices))}")


def _hint(name: str, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, choices, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"unknown; {meant}choose from {', '.join(choices)}"
