"""The losses by name: parsing, options, ranges, and that no option is accepted and ignored."""

from __future__ import annotations

import inspect

import mlx.core as mx
import pytest

from mlx_align.errors import ConfigError
from mlx_align.losses import hyperparameters
from mlx_align.losses.registry import (
    PAIRWISE_LOSSES,
    UNPAIRED_LOSSES,
    combine,
    parse_losses,
    resolve_options,
)
from mlx_align.types import PairLogps

LOGPS = PairLogps(*(mx.array(v) for v in ([-6.0], [-5.0], [2.0], [-1.0], [4.0], [2.0], [0.9])))
PREFERENCE = [name for name in PAIRWISE_LOSSES if name != "sft"]


def refused(*parts: str):
    """Expect a one-line ConfigError that holds all of `parts`."""
    pattern = "".join(f"(?=.*{part})" for part in parts)
    return pytest.raises(ConfigError, match=rf"\A{pattern}[^\n]*\Z")


# ---------------------------------------------------------------- names and weights


def test_parse_losses():
    assert parse_losses("sigmoid") == (("sigmoid", 1.0),)
    assert parse_losses("sigmoid=1, sft=0.2") == (("sigmoid", 1.0), ("sft", 0.2))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "sigmiod",
            ["--loss sigmiod: unknown; did you mean sigmoid\\? choose from sigmoid, hinge"],
        ),
        ("sigmoid=1,stf=0.2", ["--loss stf", "did you mean sft"]),
        ("zzz", ["--loss zzz: unknown; choose from"]),
        ("", ["--loss : unknown; choose from"]),
        ("sigmoid,", ["unknown"]),
        ("sigmoid=1,sigmoid=2", ["sigmoid appears twice"]),
        ("sigmoid=", ["--loss sigmoid=", "positive weight"]),
        ("sigmoid=x", ["--loss sigmoid=x", "positive weight"]),
        ("sigmoid=-1", ["positive weight"]),
        ("sigmoid=0", ["positive weight"]),
        ("sigmoid=nan", ["positive weight"]),
        ("sigmoid=inf", ["positive weight"]),
        (
            "kto",
            ["--loss kto: is not a loss of preference pairs; use mlx-align kto"],
        ),  # no loss of pairs
    ],
)
def test_losses_that_are_refused(text, says):
    with refused(*says):
        parse_losses(text)


# ---------------------------------------------------------------- options


def test_defaults_and_types():
    assert resolve_options("sigmoid", {}) == {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "f_divergence": "reverse_kl",
        "f_alpha": 0.5,
    }
    resolved = resolve_options("simpo", {"beta": 2, "gamma": "0.5"})
    assert resolved == {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.0}
    assert all(type(value) is float for value in resolved.values())
    assert resolve_options("kto", {"undesirable_weight": 1.33})["undesirable_weight"] == 1.33


@pytest.mark.parametrize("name", [*PAIRWISE_LOSSES, *UNPAIRED_LOSSES])
def test_every_hyperparameter_has_a_rule_and_a_default_within_it(name):
    for option, value in resolve_options(name, {}).items():
        # Passing a default explicitly runs it through its rule.
        given = {option: value} | ({"f_divergence": "alpha"} if option == "f_alpha" else {})
        assert resolve_options(name, given)[option] == value


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("sigmoid", {"beta": 0}, ["beta=0", "must be > 0", "--loss sigmoid"]),
        ("sigmoid", {"beta": -1}, ["beta=-1"]),
        ("sigmoid", {"beta": "high"}, ["beta=high", "expected a number"]),
        ("sigmoid", {"beta": True}, ["beta=True", "expected a number"]),
        ("sigmoid", {"beta": None}, ["beta=None", "expected a number"]),
        ("sigmoid", {"beta": [1]}, ["expected a number"]),
        ("sigmoid", {"beta": float("nan")}, ["expected a number"]),
        ("sigmoid", {"beta": float("inf")}, ["must be > 0"]),
        ("sigmoid", {"label_smoothing": 0.5}, ["label_smoothing=0.5", "must be >= 0 and < 0.5"]),
        ("sigmoid", {"label_smoothing": -0.1}, ["label_smoothing"]),
        ("exo_pair", {"label_smoothing": 0}, ["label_smoothing=0", "must be > 0 and < 0.5"]),
        ("sigmoid", {"f_divergence": "jss"}, ["f_divergence=jss", "did you mean js", "reverse_kl"]),
        ("sigmoid", {"f_divergence": 1}, ["f_divergence=1", "choose from"]),
        ("sigmoid", {"f_alpha": 0.3}, ["f_alpha", "no effect without f_divergence=alpha"]),
        ("sigmoid", {"f_divergence": "alpha", "f_alpha": 1}, ["f_alpha=1", "> 0 and < 1"]),
        ("discopop", {"tau": 2}, ["tau=2", "> 0 and <= 1"]),
        ("sigmoid", {"gamma": 1}, ["gamma: has no effect on --loss sigmoid", "it has: beta"]),
        ("hinge", {"label_smoothing": 0.1}, ["label_smoothing: has no effect on --loss hinge"]),
        ("bco_pair", {"f_divergence": "js"}, ["f_divergence: has no effect on --loss bco_pair"]),
        ("sft", {"beta": 0.1}, ["beta: has no effect on --loss sft", "it has: none"]),
        ("kto", {"label_smoothing": 0.1}, ["label_smoothing: has no effect on --loss kto"]),
        ("sigmiod", {}, ["--loss sigmiod", "did you mean sigmoid"]),
    ],
)
def test_options_that_are_refused(name, given, says):
    with refused(*says):
        resolve_options(name, given)


@pytest.mark.parametrize("name", PAIRWISE_LOSSES)
def test_every_option_has_an_effect(name):
    """Trap: options accepted and ignored. Each one moves the loss when it is moved."""
    defaults = resolve_options(name, {})
    moved = {
        option: 1.7 * value + 0.01 for option, value in defaults.items() if isinstance(value, float)
    }
    moved = {k: min(v, 0.4) if k == "label_smoothing" else v for k, v in moved.items()}
    cases = [({}, {k: v}) for k, v in moved.items() if k != "f_alpha"]
    if "f_divergence" in defaults:
        cases += [({}, {"f_divergence": f}) for f in ("forward_kl", "js", "alpha")]
        alpha = {"f_divergence": "alpha"}
        cases.append((alpha, alpha | {"f_alpha": 0.3}))
    # A pair that every part of every formula sees: the chosen lost probability, too.
    logps = LOGPS._replace(chosen_logratio=mx.array([-0.4]))
    for before, after in cases:
        values = [combine(((name, 1.0),), given)(logps, 4.0).item() for given in (before, after)]
        assert abs(values[0] - values[1]) > 1e-5, after


def test_f_divergence_only_where_it_is_defined():
    having = {name for name in PAIRWISE_LOSSES if "f_divergence" in resolve_options(name, {})}
    assert having == {
        "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop",
    }  # fmt: skip
    combine(parse_losses("sigmoid=1,sft=0.2"), {"f_divergence": "js"})
    with refused("f_divergence=js: not defined for --loss bco_pair"):
        combine(parse_losses("sigmoid=1,bco_pair=0.2"), {"f_divergence": "js"})


def test_ranges_read_as_text():
    assert str(hyperparameters.Range(low=0, low_open=True)) == "must be > 0"
    assert str(hyperparameters.Range(low=0, high=1, high_open=True)) == "must be >= 0 and < 1"
    assert str(hyperparameters.Range()) == "must be finite"


# ---------------------------------------------------------------- sums of several


def test_combined_is_the_weighted_sum():
    loss = combine(parse_losses("sigmoid=0.8,bco_pair=0.2,sft=2"), {"beta": 0.5})
    parts = [combine(((name, 1.0),), {} if name == "sft" else {"beta": 0.5})
             for name in ("sigmoid", "bco_pair", "sft")]  # fmt: skip
    values = [part(LOGPS, 4.0).item() for part in parts]
    expected = 0.8 * values[0] + 0.2 * values[1] + 2 * values[2]
    assert loss(LOGPS, 4.0).item() == pytest.approx(expected, rel=1e-6)
    assert loss.beta == 0.5
    assert (loss.needs_reference, loss.couples_batch) == (True, False)


def test_combined_options_reach_every_part_and_must_reach_one():
    loss = combine(parse_losses("sigmoid,simpo"), {"beta": 0.3, "gamma": 0.5})
    assert loss.options["sigmoid"]["beta"] == loss.options["simpo"]["beta"] == 0.3
    assert "gamma" not in loss.options["sigmoid"]
    with refused("alpha: has no effect on --loss sigmoid,simpo", "it has: beta"):
        combine(parse_losses("sigmoid,simpo"), {"alpha": 1.0})
    with refused("label_smoothing=0", "--loss exo_pair"):
        combine(parse_losses("sigmoid,exo_pair"), {"label_smoothing": 0})


@pytest.mark.parametrize(
    ("text", "reference", "soft", "coupled"),
    [
        ("sigmoid", True, True, False),
        ("sigmoid,sft", True, True, False),
        ("sigmoid,hinge", True, False, False),
        ("simpo", False, True, False),
        ("simpo,sft", False, True, False),
        ("sft", False, False, False),
        ("aot,sft", True, False, True),
        ("orpo", False, False, False),
    ],
)
def test_requirements_of_a_combination(text, reference, soft, coupled):
    loss = combine(parse_losses(text), {})
    assert (loss.needs_reference, loss.soft_labels, loss.couples_batch) == (
        reference,
        soft,
        coupled,
    )


@pytest.mark.parametrize("name", PAIRWISE_LOSSES)
def test_flags_agree_with_the_functions(name):
    """A field that a loss says it does not read does not move it."""
    loss, entry = combine(((name, 1.0),), {}), PAIRWISE_LOSSES[name]
    logps = PairLogps(*(mx.broadcast_to(field, (2,)) for field in LOGPS))
    base = loss(logps, 4.0)[0].item()

    def moves(**fields: float) -> bool:
        moved = {key: mx.array([value, value]) for key, value in fields.items()}
        return abs(loss(logps._replace(**moved), 4.0)[0].item() - base) > 1e-6

    assert moves(chosen_logratio=1.0, rejected_logratio=-2.5) == entry.needs_reference
    assert moves(soft_label=0.6) == entry.soft_labels
    assert (abs(loss(logps, 5.0)[0].item() - base) > 1e-6) == entry.mean_over_tokens
    # Another partner in the batch: the first pair's value changes only where pairs are sorted.
    own = logps._replace(rejected_logratio=mx.array([-1.0, -4.0]), rejected=mx.array([-5.0, 2.0]))
    assert (abs(loss(own, 4.0)[0].item() - base) > 1e-6) == entry.couples_batch


@pytest.mark.parametrize("name", [*PAIRWISE_LOSSES, *UNPAIRED_LOSSES])
def test_every_loss_names_its_source(name):
    entry = {**PAIRWISE_LOSSES, **UNPAIRED_LOSSES}[name]
    text = inspect.getdoc(entry.function) or ""
    assert "Source:" in text or name == "sft"
