"""A user's own function as a pairwise loss: its signature, hyperparameters and result."""

from __future__ import annotations

from typing import Literal

import mlx.core as mx
import pytest

from mlx_align.errors import ConfigError
from mlx_align.losses.hyperparameters import Positive
from mlx_align.losses.pairwise import hinge_loss
from mlx_align.losses.registry import PairwiseLoss, combine, parse_losses
from mlx_align.types import PairLogps

LOGPS = PairLogps(
    *(mx.array(v) for v in ([-6.0, -4.0], [-5.0, -7.0], [2.0, 0.5], [-1.0, 0.1])),
    *(mx.array(v) for v in ([4.0, 2.0], [2.0, 3.0], [1.0, 1.0])),
)


def my_hinge(logps: PairLogps, *, beta: float = 0.1) -> mx.array:
    return mx.maximum(0.0, 1 - beta * (logps.chosen_logratio - logps.rejected_logratio))


def test_a_function_is_a_loss():
    loss = combine(parse_losses(my_hinge), {})
    assert loss.parts == (("my_hinge", 1.0),)
    assert (loss.needs_reference, loss.soft_labels, loss.couples_batch) == (True, False, False)
    assert loss.beta == 0.1
    assert mx.array_equal(loss(LOGPS, 3.0), hinge_loss(LOGPS, beta=0.1))


def test_keyword_only_arguments_are_hyperparameters():
    loss = combine(parse_losses(my_hinge), {"beta": "0.5"})
    assert loss.options == {"my_hinge": {"beta": 0.5}}
    assert mx.array_equal(loss(LOGPS, 3.0), hinge_loss(LOGPS, beta=0.5))
    with pytest.raises(ConfigError, match="gamma: has no effect on --loss my_hinge"):
        combine(parse_losses(my_hinge), {"gamma": 1.0})
    with pytest.raises(ConfigError, match="beta=nan: expected a number"):
        combine(parse_losses(my_hinge), {"beta": "nan"})


def test_annotations_limit_the_values():
    def loss(logps, *, beta: Positive = 0.1, kind: Literal["a", "b"] = "a"):
        return beta * logps.chosen * (1 if kind == "a" else -1)

    combined = combine(parse_losses(loss), {"kind": "b"})
    assert combined.options["loss"] == {"beta": 0.1, "kind": "b"}
    with pytest.raises(ConfigError, match="must be > 0"):
        combine(parse_losses(loss), {"beta": 0})
    with pytest.raises(ConfigError, match="kind=c: unknown; choose from a, b"):
        combine(parse_losses(loss), {"kind": "c"})


def test_a_pairwise_loss_declares_what_it_needs():
    def lengths(logps, mean_chosen_length, *, alpha=1):
        return alpha * logps.chosen / mean_chosen_length

    given = PairwiseLoss(lengths, needs_reference=False, mean_over_tokens=True)
    loss = combine(parse_losses(given), {})
    assert not loss.needs_reference
    assert loss.losses["lengths"] is given
    assert mx.array_equal(loss(LOGPS, 3.0), LOGPS.chosen / 3.0)


def test_a_function_can_be_combined_with_named_losses():
    loss = combine(((PairwiseLoss(my_hinge), 2.0), ("hinge", 1.0)), {"beta": 0.3})
    assert mx.allclose(loss(LOGPS, 3.0), 3 * hinge_loss(LOGPS, beta=0.3))


def needs_default(logps, *, beta):
    return logps.chosen


def text_default(logps, *, kind="a"):
    return logps.chosen


def positional(logps, beta=0.1):
    return logps.chosen


def anything(logps, **options):
    return logps.chosen


def no_arguments():
    return mx.zeros(2)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (needs_default, "loss needs_default: its argument beta needs a default value"),
        (text_default, "the default of kind is 'a', which is not a number"),
        (positional, r"2 positional arguments \(logps, beta\), expected 1; hyperparameters are"),
        (anything, r"it takes \*args or \*\*kwargs; name its hyperparameters"),
        (no_arguments, r"0 positional arguments \(none\), expected 1"),
        (PairwiseLoss(my_hinge, mean_over_tokens=True), "expected 2"),
    ],
)
def test_functions_that_are_not_losses_are_refused(function, says):
    with pytest.raises(ConfigError, match=says):
        parse_losses(function)


def test_one_value_per_pair_is_expected():
    def averaged(logps):
        return mx.mean(logps.chosen)

    def number(logps):
        return 1.0

    with pytest.raises(ConfigError, match=r"loss averaged: returned shape \(\), expected one val"):
        combine(parse_losses(averaged), {})(LOGPS, 3.0)
    with pytest.raises(ConfigError, match="loss number: returned float, expected one value"):
        combine(parse_losses(number), {})(LOGPS, 3.0)
