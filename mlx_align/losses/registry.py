"""The losses by name: what `--loss` accepts, what each needs, and how several add up.

A new pairwise loss is one function, one line here and one test. The command line takes its
choices from these tables and the hyperparameters from the functions' signatures.

How a trainer uses a pairwise loss, so that 8 microbatches of 1 pair equal 1 batch of 8:

    loss = combine(parse_losses("sigmoid=1,sft=0.2"), {"beta": 0.1})
    pairs = sum of the weights of the whole update           # fillers weigh 0
    mean_chosen_length = its scored chosen tokens / pairs    # known from the masks, beforehand
    per microbatch: weighted_sum(loss(logps, mean_chosen_length), weight) / pairs

These add up to the update's loss, and their gradients to its gradient. Where
`loss.couples_batch`, the values of one pair depend on the others': see `coupled.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_align.errors import ConfigError
from mlx_align.losses import pairwise, reference_free, unpaired
from mlx_align.losses.options import (
    OptionValue,
    options_of,
    refuse_without_effect,
    resolve,
    unknown_name,
)
from mlx_align.types import PairLogps


class PairwiseLoss(NamedTuple):
    """A loss of pairs and what it asks of the run.

    Attributes:
        function: PairLogps (and the mean chosen length, see below) -> (B,) values.
        needs_reference: Whether the log-ratios have to be there.
        soft_labels: Whether it reads them; data that has some is refused elsewhere.
        mean_over_tokens: Whether it takes the update's mean chosen length as second argument.
        couples_batch: Whether it sorts over pairs: it must see the whole update at once, and
            per-pair weights (WPO) have no meaning.
    """

    function: Callable[..., mx.array]
    needs_reference: bool = True
    soft_labels: bool = False
    mean_over_tokens: bool = False
    couples_batch: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The hyperparameters and their defaults, read from the signature."""
        return {name: option.default for name, option in options_of(self.function).items()}


class UnpairedLoss(NamedTuple):
    """A loss of labelled rows: (log-ratio, desirable) -> (B,), with the KL point where needed."""

    function: Callable[..., mx.array]
    needs_kl: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The hyperparameters and their defaults, read from the signature."""
        return {name: option.default for name, option in options_of(self.function).items()}


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
    "sft": PairwiseLoss(reference_free.sft_loss, needs_reference=False, mean_over_tokens=True),
    "simpo": PairwiseLoss(reference_free.simpo_loss, needs_reference=False, soft_labels=True),
    "alphapo": PairwiseLoss(reference_free.alphapo_loss, needs_reference=False),
    "orpo": PairwiseLoss(reference_free.orpo_loss, needs_reference=False, mean_over_tokens=True),
    "cpo": PairwiseLoss(
        reference_free.cpo_loss, needs_reference=False, soft_labels=True, mean_over_tokens=True
    ),
}

UNPAIRED_LOSSES: dict[str, UnpairedLoss] = {
    "kto": UnpairedLoss(unpaired.kto_loss, needs_kl=True),
    "apo_zero_unpaired": UnpairedLoss(unpaired.apo_zero_unpaired_loss),
}

# Token losses of supervised training: log-probs (N, C) -> (N, C), no hyperparameters.
TOKEN_LOSSES: dict[str, Callable[[mx.array], mx.array]] = {
    "nll": unpaired.nll_loss,
    "dft": unpaired.dft_loss,
}


def resolve_options(name: str, given: Mapping[str, Any]) -> dict[str, OptionValue]:
    """The hyperparameters of loss `name`, pairwise or unpaired: defaults overridden by `given`.

    Numbers are returned as float, enumerations as text; text that spells a number will do.

    Raises:
        ConfigError: The loss is unknown, has no such option, or a value is out of range.
    """
    functions = {key: loss.function for key, loss in PAIRWISE_LOSSES.items()}
    functions.update({key: loss.function for key, loss in UNPAIRED_LOSSES.items()})
    if name not in functions:
        raise unknown_name("--loss", name, functions)
    return resolve(name, options_of(functions[name]), given)


def parse_losses(text: str) -> tuple[tuple[str, float], ...]:
    """`sigmoid=1,sft=0.2` as ((name, weight), …); a name alone weighs 1.

    Raises:
        ConfigError: A name is unknown or comes twice, or a weight is not a positive number.
    """
    losses: dict[str, float] = {}
    for part in text.split(","):
        name, equals, weight = (piece.strip() for piece in part.partition("="))
        if name not in PAIRWISE_LOSSES:
            raise unknown_name("--loss", name, PAIRWISE_LOSSES)
        if name in losses:
            raise ConfigError(f"--loss {text}: {name} comes twice")
        losses[name] = _weight(name, weight) if equals else 1.0
    return tuple(losses.items())


@dataclass(frozen=True, slots=True)
class CombinedLoss:
    """A weighted sum of pairwise losses with their hyperparameters; one loss is a sum of one.

    Attributes:
        parts: (name, weight) in the order given.
        options: Per name, the resolved hyperparameters.
        needs_reference: Whether any part does.
        soft_labels: Whether every part that compares the two completions reads soft labels.
        couples_batch: Whether any part sorts over pairs.
    """

    parts: tuple[tuple[str, float], ...]
    options: Mapping[str, Mapping[str, OptionValue]]
    needs_reference: bool
    soft_labels: bool
    couples_batch: bool

    def __call__(self, logps: PairLogps, mean_chosen_length: mx.array | float) -> mx.array:
        """The values (B,) of B pairs, nats; the mean over the update's pairs is its loss.

        Args:
            logps: The pairs; where `couples_batch`, all of the update's and no fillers.
            mean_chosen_length: Scored chosen tokens per pair, over the pairs of the update.
        """
        total = mx.zeros(logps.chosen.shape)
        for name, weight in self.parts:
            loss = PAIRWISE_LOSSES[name]
            length = (mean_chosen_length,) if loss.mean_over_tokens else ()
            total = total + weight * loss.function(logps, *length, **self.options[name])
        return total

    @property
    def beta(self) -> float | None:
        """β of the first part that has one, for implicit rewards in the metrics."""
        for options in self.options.values():
            if "beta" in options:
                return float(options["beta"])
        return None


def combine(parts: tuple[tuple[str, float], ...], given: Mapping[str, Any]) -> CombinedLoss:
    """The weighted sum of the losses `parts`, as `parse_losses` gives them.

    Each option of `given` goes to every part that has it, and one part at least must.

    Raises:
        ConfigError: An option has no effect, is out of range, or an f-divergence meets a loss
            that has none.
    """
    names = [name for name, _ in parts]
    have = {name: options_of(PAIRWISE_LOSSES[name].function) for name in names}
    anywhere = dict.fromkeys(option for options in have.values() for option in options)
    refuse_without_effect(",".join(names), anywhere, given)
    if given.get("f_divergence", "reverse_kl") != "reverse_kl":
        for name in names:
            if PAIRWISE_LOSSES[name].needs_reference and "f_divergence" not in have[name]:
                raise ConfigError(
                    f"--loss-option f_divergence={given['f_divergence']}: not defined for "
                    f"--loss {name}, which is no function of the difference of the two log-ratios"
                )
    losses = [PAIRWISE_LOSSES[name] for name in names]
    comparing = [loss for name, loss in zip(names, losses, strict=True) if name != "sft"]
    return CombinedLoss(
        parts=tuple(parts),
        options={
            name: resolve(name, have[name], {k: v for k, v in given.items() if k in have[name]})
            for name in names
        },
        needs_reference=any(loss.needs_reference for loss in losses),
        # sft sees the chosen alone: beside another loss it neither reads nor ignores them.
        soft_labels=bool(comparing) and all(loss.soft_labels for loss in comparing),
        couples_batch=any(loss.couples_batch for loss in losses),
    )


def _weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise ConfigError(f"--loss {name}={text}: expected a positive weight, as in {name}=0.5")
    return weight
