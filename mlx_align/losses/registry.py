"""The losses by name: the choices of `--loss`, their requirements, and weighted sums of them.

To add a pairwise loss, write a function of `PairLogps` and add a line to `PAIRWISE_LOSSES`; its
keyword-only arguments become `--loss-option`s. From Python, `loss=` also takes the function itself:

    def my_loss(logps: PairLogps, *, beta: float = 0.1) -> mx.array:
        return mx.maximum(0.0, 1 - beta * (logps.chosen_logratio - logps.rejected_logratio))

    mlx_align.dpo(..., loss=my_loss)

or `PairwiseLoss(my_loss, needs_reference=False)` if it does not use the log-ratios.

How a trainer uses a pairwise loss, such that 8 microbatches of 1 pair equal 1 batch of 8:

    loss = combine(parse_losses("sigmoid=1,sft=0.2"), {"beta": 0.1})
    pairs = sum of the weights of the whole update           # 0 for fillers
    mean_chosen_length = its number of chosen tokens / pairs # from the masks, before the update
    per microbatch: weighted_sum(loss(logps, mean_chosen_length), weight) / pairs

These contributions add up to the update's loss, and their gradients to its gradient. If
`loss.couples_batch`, the value of a pair depends on other pairs: see `loss_and_logps_gradient`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import mlx.core as mx

from mlx_align.errors import ConfigError
from mlx_align.losses import pairwise, unpaired
from mlx_align.losses.hyperparameters import (
    HyperparameterValue,
    check_option_names,
    hyperparameters_of,
    resolve,
    unknown_name,
)
from mlx_align.losses.policy import POLICY_METHODS
from mlx_align.types import PairLogps


class PairwiseLoss(NamedTuple):
    """A loss of pairs and its requirements.

    Attributes:
        function: (PairLogps, and the mean chosen length if `mean_over_tokens`) -> (B,) values. Its
            keyword-only arguments are the hyperparameters.
        needs_reference: Whether it uses the log-ratios, so that a reference model is needed.
        soft_labels: Whether it uses the soft labels; if not, data with soft labels is refused.
        mean_over_tokens: Whether it takes the update's mean chosen length as its second argument.
        couples_batch: Whether the value of a pair depends on other pairs (it sorts them). It is
            then computed over the whole update at once, and can't be combined with WPO.
    """

    function: Callable[..., mx.array]
    needs_reference: bool = True
    soft_labels: bool = False
    mean_over_tokens: bool = False
    couples_batch: bool = False

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def options(self) -> dict[str, HyperparameterValue]:
        """The hyperparameters and their defaults, from the function's signature."""
        return _defaults(self.function)


class UnpairedLoss(NamedTuple):
    """A loss of labelled rows: (log-ratio, desirable, and the KL if `needs_kl`) -> (B,)."""

    function: Callable[..., mx.array]
    needs_kl: bool = False

    @property
    def options(self) -> dict[str, HyperparameterValue]:
        """The hyperparameters and their defaults, from the function's signature."""
        return _defaults(self.function)


def _defaults(function: Callable[..., mx.array]) -> dict[str, HyperparameterValue]:
    return {name: found.default for name, found in hyperparameters_of(function).items()}


# What others call a loss.
LOSS_ALIASES = {"dpo": "sigmoid"}
# Values of --loss that are commands, not losses of preference pairs, and the command.
OTHER_COMMANDS = {
    "kto": "kto",
    "apo_zero_unpaired": "kto --loss apo_zero_unpaired",
    "nll": "sft",
    "reward": "reward",
    "bt": "reward",
    "ppo": "ppo",
    "online_dpo": "grpo --loss online_dpo",
    **{name: f"grpo --loss {name}" for name in POLICY_METHODS if name != "ppo"},
}
PAIRWISE_LOSSES: dict[str, PairwiseLoss] = {
    "sigmoid": PairwiseLoss(pairwise.sigmoid_loss, soft_labels=True),
    "hinge": PairwiseLoss(pairwise.hinge_loss),
    "ipo": PairwiseLoss(pairwise.ipo_loss),
    "sigmoid_norm": PairwiseLoss(pairwise.sigmoid_norm_loss, soft_labels=True),
    "exo_pair": PairwiseLoss(pairwise.exo_pair_loss),
    "nca_pair": PairwiseLoss(pairwise.nca_pair_loss),
    "robust": PairwiseLoss(pairwise.robust_loss),
    "bco_pair": PairwiseLoss(pairwise.bco_pair_loss),
    "sppo_hard": PairwiseLoss(pairwise.sppo_hard_loss),
    "aot": PairwiseLoss(pairwise.aot_loss, couples_batch=True),
    "aot_unpaired": PairwiseLoss(pairwise.aot_unpaired_loss, couples_batch=True),
    "apo_zero": PairwiseLoss(pairwise.apo_zero_loss),
    "apo_down": PairwiseLoss(pairwise.apo_down_loss),
    "discopop": PairwiseLoss(pairwise.discopop_loss),
    "dpop": PairwiseLoss(pairwise.dpop_loss),
    "sft": PairwiseLoss(pairwise.sft_loss, needs_reference=False, mean_over_tokens=True),
    "simpo": PairwiseLoss(pairwise.simpo_loss, needs_reference=False, soft_labels=True),
    "alphapo": PairwiseLoss(pairwise.alphapo_loss, needs_reference=False),
    "orpo": PairwiseLoss(pairwise.orpo_loss, needs_reference=False, mean_over_tokens=True),
    "cpo": PairwiseLoss(
        pairwise.cpo_loss, needs_reference=False, soft_labels=True, mean_over_tokens=True
    ),
}

UNPAIRED_LOSSES: dict[str, UnpairedLoss] = {
    "kto": UnpairedLoss(unpaired.kto_loss, needs_kl=True),
    "apo_zero_unpaired": UnpairedLoss(unpaired.apo_zero_unpaired_loss),
}

# Losses of supervised training: log-probs (N, C) -> (N, C) per token, no hyperparameters.
TOKEN_LOSSES: dict[str, Callable[[mx.array], mx.array]] = {
    "nll": unpaired.nll_loss,
    "dft": unpaired.dft_loss,
}


def resolve_options(name: str, given: Mapping[str, Any]) -> dict[str, HyperparameterValue]:
    """The hyperparameters of a registered loss, pairwise or unpaired.

    Args:
        name: The loss.
        given: Values that override the defaults; text that spells a number is accepted.

    Returns:
        All hyperparameters, numbers as float.

    Raises:
        ConfigError: The loss is unknown, has no such hyperparameter, or a value is out of range.
    """
    functions = {key: loss.function for key, loss in PAIRWISE_LOSSES.items()}
    functions.update({key: loss.function for key, loss in UNPAIRED_LOSSES.items()})
    if name not in functions:
        raise unknown_name("--loss", name, functions)
    return resolve(name, hyperparameters_of(functions[name]), given)


@overload
def parse_losses(loss: str) -> tuple[tuple[str, float], ...]: ...


@overload
def parse_losses(
    loss: Callable[..., mx.array] | PairwiseLoss,
) -> tuple[tuple[PairwiseLoss, float], ...]: ...


def parse_losses(
    loss: str | Callable[..., mx.array] | PairwiseLoss,
) -> tuple[tuple[str | PairwiseLoss, float], ...]:
    """Parse the value of `--loss` into the losses to add up and their weights.

    Args:
        loss: Names with weights, `sigmoid=1,sft=0.2`, where a name alone has weight 1. Or a
            function of PairLogps, or a PairwiseLoss.

    Returns:
        ((name, weight), …), with a PairwiseLoss in place of the name for a function.

    Raises:
        ConfigError: A name is unknown or appears twice, a weight is not a positive number, or the
            function's arguments are not those of a loss.
    """
    if isinstance(loss, PairwiseLoss):
        _check_signature(loss)
        return ((loss, 1.0),)
    if callable(loss):
        return parse_losses(PairwiseLoss(loss))
    weights: dict[str, float] = {}
    for part in loss.split(","):
        name, equals, weight = (piece.strip() for piece in part.partition("="))
        name = LOSS_ALIASES.get(name, name)
        if command := OTHER_COMMANDS.get(name):
            raise ConfigError(
                f"--loss {name}: is not a loss of preference pairs; use mlx-align {command}"
            )
        if name not in PAIRWISE_LOSSES:
            raise unknown_name("--loss", name, PAIRWISE_LOSSES)
        if name in weights:
            raise ConfigError(f"--loss {loss}: {name} appears twice; give it one weight")
        weights[name] = _weight(name, weight) if equals else 1.0
    return tuple(weights.items())


@dataclass(frozen=True, slots=True)
class CombinedLoss:
    """A weighted sum of pairwise losses with their hyperparameters, also of a single one.

    Attributes:
        parts: (name, weight) in the given order.
        losses: The loss of each name.
        options: The hyperparameters of each name.
        needs_reference: Whether any part needs a reference.
        soft_labels: Whether every part that compares the two completions uses soft labels.
        couples_batch: Whether any part couples the pairs of an update.
    """

    parts: tuple[tuple[str, float], ...]
    losses: Mapping[str, PairwiseLoss]
    options: Mapping[str, Mapping[str, HyperparameterValue]]
    needs_reference: bool
    soft_labels: bool
    couples_batch: bool

    def __call__(self, logps: PairLogps, mean_chosen_length: mx.array | float) -> mx.array:
        """Values (B,) of B pairs, nats; their mean over the update's pairs is its loss.

        Args:
            logps: The pairs; if `couples_batch`, all of the update's and no fillers.
            mean_chosen_length: Mean number of chosen tokens per pair, over the update.

        Raises:
            ConfigError: A function given by the user does not return one value per pair.
        """
        total = mx.zeros(logps.chosen.shape)
        for name, weight in self.parts:
            loss = self.losses[name]
            length = (mean_chosen_length,) if loss.mean_over_tokens else ()
            values = loss.function(logps, *length, **self.options[name])
            shape = getattr(values, "shape", None)
            if shape != logps.chosen.shape:
                found = type(values).__name__ if shape is None else f"shape {shape}"
                raise ConfigError(
                    f"loss {name}: returned {found}, expected one value per pair, shape "
                    f"{logps.chosen.shape}"
                )
            total = total + weight * values
        return total

    @property
    def beta(self) -> float | None:
        """β of the first part that has one, for the implicit rewards in the metrics."""
        for options in self.options.values():
            if "beta" in options:
                return float(options["beta"])
        return None


def combine(
    parts: Sequence[tuple[str | PairwiseLoss, float]], given: Mapping[str, Any]
) -> CombinedLoss:
    """The weighted sum of losses.

    Args:
        parts: The losses, from `parse_losses`.
        given: Values of hyperparameters. Each goes to every part that has it.

    Raises:
        ConfigError: A hyperparameter belongs to no part or is out of range, or an f-divergence is
            combined with a loss that has none.
    """
    losses = {_name(loss): _loss(loss) for loss, _ in parts}
    parameters = {name: hyperparameters_of(loss.function) for name, loss in losses.items()}
    known = dict.fromkeys(option for options in parameters.values() for option in options)
    check_option_names(",".join(losses), known, given)
    if given.get("f_divergence", "reverse_kl") != "reverse_kl":
        for name, loss in losses.items():
            if loss.needs_reference and "f_divergence" not in parameters[name]:
                raise ConfigError(
                    f"--loss-option f_divergence={given['f_divergence']}: not defined for "
                    f"--loss {name}, which is not a function of the difference of the log-ratios"
                )
    # sft depends on the chosen completion alone, so soft labels don't concern it.
    comparing = [loss for name, loss in losses.items() if name != "sft"]
    return CombinedLoss(
        parts=tuple((_name(loss), weight) for loss, weight in parts),
        losses=losses,
        options={
            name: resolve(name, own, {k: v for k, v in given.items() if k in own})
            for name, own in parameters.items()
        },
        needs_reference=any(loss.needs_reference for loss in losses.values()),
        soft_labels=bool(comparing) and all(loss.soft_labels for loss in comparing),
        couples_batch=any(loss.couples_batch for loss in losses.values()),
    )


def _name(loss: str | PairwiseLoss) -> str:
    return loss if isinstance(loss, str) else loss.name


def _loss(loss: str | PairwiseLoss) -> PairwiseLoss:
    return PAIRWISE_LOSSES[loss] if isinstance(loss, str) else loss


def _check_signature(loss: PairwiseLoss) -> None:
    """Raise a ConfigError unless the function can be called as a pairwise loss."""
    expected = ["logps", "mean_chosen_length"] if loss.mean_over_tokens else ["logps"]
    example = f"def {loss.name}({', '.join(expected)}, *, beta=0.1)"
    positional = []
    for parameter in inspect.signature(loss.function).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            positional.append(parameter.name)
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            raise ConfigError(
                f"loss {loss.name}: it takes *args or **kwargs; name its hyperparameters, as in "
                f"{example}"
            )
    if len(positional) != len(expected):
        raise ConfigError(
            f"loss {loss.name}: it takes {len(positional)} positional arguments "
            f"({', '.join(positional) or 'none'}), expected {len(expected)}; hyperparameters are "
            f"keyword-only, as in {example}"
        )
    hyperparameters_of(loss.function)


def _weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise ConfigError(f"--loss {name}={text}: expected a positive weight, as in {name}=0.5")
    return weight
