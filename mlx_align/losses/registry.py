"""The losses by name: what `--loss` accepts, and what each needs.

A new pairwise loss is one function in `pairwise.py`, one line here and one test. The command
line takes its choices from this table and the hyperparameters from the function's signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_align.errors import ConfigError
from mlx_align.losses import pairwise


class PairwiseLoss(NamedTuple):
    """A loss of pairs and what it asks of the run."""

    function: Callable[..., mx.array]
    needs_reference: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """The hyperparameters and their defaults, read from the signature."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


PAIRWISE_LOSSES: dict[str, PairwiseLoss] = {
    "sigmoid": PairwiseLoss(pairwise.sigmoid_loss),
}


def resolve_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of loss `name`: its defaults, overridden by `given`.

    Raises:
        ConfigError: The loss is unknown, has no such option, or a value is not a number.
    """
    if name not in PAIRWISE_LOSSES:
        raise ConfigError(f"--loss {name}: unknown; choose from {', '.join(PAIRWISE_LOSSES)}")
    options = PAIRWISE_LOSSES[name].options
    for key, value in given.items():
        if key not in options:
            known = ", ".join(options) or "none"
            raise ConfigError(f"loss option {key}: has no effect on --loss {name} (it has: {known})")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"loss option {key}={value}: expected a number")
        options[key] = type(options[key])(value) if value == int(value) else float(value)
    return options
