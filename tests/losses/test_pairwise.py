"""The offline losses against known answers, each with wrong versions that the test must reject."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

import mlx_align
from mlx_align.losses import kl, masking, pairwise
from mlx_align.losses.pairwise import DIVERGENCES, phi
from mlx_align.losses.registry import PAIRWISE_LOSSES, combine
from mlx_align.losses.reward import bt_loss, reward_bt
from mlx_align.types import PairLogps


def pairs(a, d, chosen=None, rejected=None, n_c=1.0, n_r=1.0, soft_label=1.0) -> PairLogps:
    """PairLogps of log-ratios a and d; log-probs equal them (a reference of 0) unless given."""
    a, d = mx.array(a, mx.float32).reshape(-1), mx.array(d, mx.float32).reshape(-1)
    full = lambda value: mx.broadcast_to(mx.array(value, mx.float32), a.shape)  # noqa: E731
    chosen = a if chosen is None else full(chosen)
    rejected = d if rejected is None else full(rejected)
    return PairLogps(chosen, rejected, a, d, full(n_c), full(n_r), full(soft_label))


# ---------------------------------------------------------------- 1. Bradley–Terry

DELTAS = (-1e4, -3.0, 0.0, 3.0, 1e4)
BT = (1e4, 3.048587, 0.693147, 0.048587, 0.0)


def bt_holds(loss) -> bool:
    """Values and gradients −σ(−Δ) at the five known places."""
    deltas = mx.array(DELTAS)
    values, slopes = loss(deltas), mx.grad(lambda x: mx.sum(loss(x)))(deltas)
    expected = [-1.0, -0.952574, -0.5, -0.047426, 0.0]
    return np.allclose(values, BT, rtol=1e-5, atol=1e-6) and np.allclose(
        slopes, expected, rtol=1e-4, atol=1e-6
    )


def test_bradley_terry():
    assert bt_holds(lambda x: bt_loss(x, 0.0))
    assert bt_holds(lambda x: reward_bt(x, mx.zeros(5)))
    assert bt_holds(lambda x: mlx_align.dpo_loss(x, 0.0, 0.0, 0.0, 1.0))
    assert bt_holds(lambda x: pairwise.sigmoid_loss(pairs(x, mx.zeros(5)), beta=1.0))
    # Mutants: the sign, and the textbook form that is inf at −1e4.
    assert not bt_holds(lambda x: bt_loss(0.0, x))
    assert not bt_holds(lambda x: -mx.log(mx.sigmoid(x)))


def test_floats_give_scalars():
    loss = bt_loss(1.0, -2.0)
    assert (loss.shape, loss.dtype) == ((), mx.float32)
    assert loss.item() == pytest.approx(0.048587, rel=1e-5)
    # (−10 + 11) − (−12 + 11) = 2 nats, β = 0.5: log(1 + e^−1).
    loss = mlx_align.dpo_loss(-10.0, -12.0, -11.0, -11.0, 0.5)
    assert (loss.shape, loss.dtype) == ((), mx.float32)
    assert loss.item() == pytest.approx(0.313262, rel=1e-5)
    assert mlx_align.dpo_loss(mx.zeros(3), mx.zeros(3), -1.0, -1.0, 0.1).tolist() == pytest.approx(
        [math.log(2)] * 3
    )


# ---------------------------------------------------------------- 2., 3. the bandit

BETA = 0.5
_rng = np.random.default_rng(0)
_logits, REWARDS = _rng.standard_normal(8), _rng.standard_normal(8)
LOG_REF = _logits - np.log(np.exp(_logits).sum())
LOG_Z = np.log(np.exp(LOG_REF + REWARDS / BETA).sum())
LOG_OPT = LOG_REF + REWARDS / BETA - LOG_Z


def objective(log_policy, sign: float = 1.0) -> float:
    """Expected reward minus β·KL, with our k1 as the KL's integrand."""
    log_policy = mx.array(log_policy, mx.float32)
    penalty = BETA * kl.k1(log_policy, mx.array(LOG_REF, mx.float32))
    return mx.sum(mx.exp(log_policy) * (mx.array(REWARDS, mx.float32) - sign * penalty)).item()


def test_optimum_of_the_regularised_objective():
    assert objective(LOG_OPT) == pytest.approx(BETA * LOG_Z, rel=1e-5)
    constant = REWARDS - BETA * (LOG_OPT - LOG_REF)
    assert np.ptp(constant) < 1e-12
    for shift in np.eye(8):
        moved = LOG_OPT + shift
        assert objective(moved - np.log(np.exp(moved).sum())) < BETA * LOG_Z - 1e-4
    assert objective(LOG_OPT, sign=-1.0) != pytest.approx(BETA * LOG_Z, rel=1e-2)
    wrong = LOG_REF + BETA * REWARDS  # 1/β for β
    assert objective(wrong - np.log(np.exp(wrong).sum())) < BETA * LOG_Z - 1e-2


def distance_after_training(loss, steps: int = 600) -> float:
    """Total variation to the optimum after minimising `loss` on all ordered pairs."""
    i, j = (mx.array(index) for index in np.where(~np.eye(8, dtype=bool)))
    weight = mx.sigmoid(mx.array(REWARDS, mx.float32)[i] - mx.array(REWARDS, mx.float32)[j])
    reference = mx.array(LOG_REF, mx.float32)
    lengths = mx.arange(1, 9).astype(mx.float32)

    def total(logits: mx.array) -> mx.array:
        logps = logits - mx.logsumexp(logits)
        ratio = logps - reference
        seen = PairLogps(
            logps[i], logps[j], ratio[i], ratio[j], lengths[i], lengths[j], mx.ones(i.shape)
        )
        return masking.weighted_sum(loss(seen), weight) / mx.sum(weight)

    gradient = mx.compile(mx.grad(total))
    logits, optimizer = mx.array(LOG_REF, mx.float32), optim.Adam(0.05, bias_correction=True)
    for step in range(steps):
        optimizer.learning_rate = 0.05 * (1 - step / steps)
        logits = optimizer.apply_gradients({"x": gradient(logits)}, {"x": logits})["x"]
        mx.eval(logits, optimizer.state)
    return 0.5 * np.abs(np.exp(LOG_OPT) - np.array(mx.softmax(logits))).sum()


def test_dpo_reaches_the_optimum():
    assert distance_after_training(lambda x: pairwise.sigmoid_loss(x, beta=BETA)) < 1e-3


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(lambda x: pairwise.sigmoid_loss(x, beta=1 / BETA), id="1/beta"),
        pytest.param(
            lambda x: pairwise.sigmoid_loss(
                x._replace(chosen_logratio=x.chosen, rejected_logratio=x.rejected), beta=BETA
            ),
            id="no reference",
        ),
        pytest.param(
            lambda x: pairwise.sigmoid_loss(
                x._replace(
                    chosen_logratio=x.rejected_logratio, rejected_logratio=x.chosen_logratio
                ),
                beta=BETA,
            ),
            id="wrong sign",
        ),
        pytest.param(lambda x: pairwise.sigmoid_norm_loss(x, beta=BETA), id="length-normalised"),
    ],
)
def test_wrong_dpo_misses_the_optimum(mutant):
    assert distance_after_training(mutant) > 0.05


# ---------------------------------------------------------------- 8. optimal log-ratio gaps


def optimal_gap(loss, p: float) -> float:
    """The gap h = a − d that minimises p·loss(h) + (1−p)·loss(−h), by bisection on the slope."""

    def expected(h: mx.array) -> mx.array:
        return mx.sum(p * loss(pairs(h / 2, -h / 2)) + (1 - p) * loss(pairs(-h / 2, h / 2)))

    low, high, slope = -40.0, 40.0, mx.grad(expected)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(mx.array(middle)).item() > 0 else (middle, high)
    return low


@pytest.mark.parametrize(
    ("loss", "p", "gap"),
    [
        (lambda x: pairwise.sigmoid_loss(x, beta=0.3), 0.8, 4.62098),
        (lambda x: pairwise.ipo_loss(x, beta=0.3), 0.8, 1.0),
        (lambda x: pairwise.sigmoid_loss(x, beta=0.3, label_smoothing=0.1), 0.8, 3.48656),
        # A tenth of the labels flipped: 0.8·0.9 + 0.2·0.1.
        (lambda x: pairwise.robust_loss(x, beta=0.3, label_smoothing=0.1), 0.74, 4.62098),
        (lambda x: pairwise.cpo_loss(x, 1.0, beta=0.3, alpha=0.0), 0.8, 4.62098),
    ],
    ids=["dpo", "ipo", "cdpo", "robust", "cpo"],
)
def test_optimal_gap(loss, p, gap):
    assert optimal_gap(loss, p) == pytest.approx(gap, rel=1e-4)


@pytest.mark.parametrize(
    ("mutant", "p", "gap"),
    [
        (lambda x: pairwise.sigmoid_loss(x, beta=1 / 0.3), 0.8, 4.62098),
        (lambda x: mx.square(x.chosen_logratio - x.rejected_logratio - 0.3), 0.8, 1.0),
        (lambda x: pairwise.sigmoid_loss(x, beta=0.3, label_smoothing=0.1), 0.74, 4.62098),
        (lambda x: pairwise.robust_loss(x, beta=0.3, label_smoothing=0.1), 0.8, 3.48656),
    ],
    ids=["1/beta", "ipo without 1/(2beta)", "cdpo is not robust", "robust is not cdpo"],
)
def test_wrong_losses_have_another_gap(mutant, p, gap):
    assert abs(optimal_gap(mutant, p) - gap) > 0.1


def test_soft_labels():
    """One pair with p = 0.8 is 0.8 of it and 0.2 of its reverse, and optimal at the same gap."""
    soft = pairs([1.0], [-0.5], n_c=3.0, n_r=5.0, soft_label=0.8)
    seen, turned = soft._replace(soft_label=mx.ones(1)), pairs([-0.5], [1.0], n_c=5.0, n_r=3.0)
    readers = {name: loss for name, loss in PAIRWISE_LOSSES.items() if loss.soft_labels}
    assert set(readers) == {"sigmoid", "sigmoid_norm", "simpo", "cpo"}
    for name in ("sigmoid", "sigmoid_norm"):
        loss = readers[name].function
        mixed = 0.8 * loss(seen) + 0.2 * loss(turned)
        assert loss(soft).item() == pytest.approx(mixed.item(), rel=1e-6)
    # ln 2 for every label if the margin is 0; smoothing 0.1 on p = 1 is p = 0.9.
    assert pairwise.sigmoid_loss(pairs([0.0], [0.0], soft_label=0.3)).item() == pytest.approx(
        0.693147
    )
    assert pairwise.sigmoid_loss(
        pairs([1.0], [0.0]), beta=1.0, label_smoothing=0.1
    ).item() == pytest.approx(0.413262, rel=1e-5)


# ---------------------------------------------------------------- literal values

# a = 2, d = −1, logp_c = −6 (4 tokens), logp_r = −3 (2 tokens), β = 0.5 unless said.
PAIR = {"a": 2.0, "d": -1.0, "chosen": -6.0, "rejected": -3.0, "n_c": 4.0, "n_r": 2.0}
LITERALS = {
    "sigmoid": ({"beta": 0.5}, 0.201413),  # log(1 + e^−1.5)
    "hinge": ({"beta": 0.25}, 0.25),  # 1 − 0.75
    "ipo": ({"beta": 0.5}, 0.0),  # 0.5 + 0.5 − 1
    "sigmoid_norm": ({"beta": 0.5}, 0.474077),  # log(1 + e^−0.5)
    "exo_pair": ({"beta": 0.5, "label_smoothing": 0.1}, 0.031139),
    "nca_pair": ({"beta": 0.5}, 1.206931),  # .313262 + .5·1.313262 + .5·.474077
    "robust": ({"beta": 0.5, "label_smoothing": 0.1}, 0.013913),  # (.9·.201413 − .1·1.701413) / .8
    "bco_pair": ({"beta": 0.5}, 0.787339),  # .313262 + .474077
    "sppo_hard": ({"beta": 0.25}, 1.0),  # (2 − 2)² + (−1 + 2)²
    "aot": ({"beta": 0.5}, 0.201413),  # one pair: sorting is nothing
    "aot_unpaired": ({"beta": 0.5}, 0.201413),
    "apo_zero": ({"beta": 0.5}, 0.646482),  # .268941 + .377541
    "apo_down": ({"beta": 0.5}, 0.913484),  # .731059 + .182426
    "discopop": ({"beta": 0.5, "tau": 0.5}, 0.222100),
    "dpop": ({"beta": 0.5}, 0.201413),  # chosen gained: no penalty
    "sft": ({}, 1.5),  # 6 / 4
    "simpo": ({"beta": 2.0, "gamma": 1.0}, 1.313262),  # means are equal: log(1 + e^1)
    "alphapo": ({"beta": 2.0, "gamma": 1.0}, 1.313262),
    "orpo": ({"beta": 0.5}, 1.846574),  # 1.5 + ½·ln 2: equal odds
    "cpo": ({"beta": 0.5, "alpha": 0.5}, 2.451413),  # log(1 + e^1.5) + 0.5·1.5
}


def test_every_loss_has_a_literal_value():
    assert LITERALS.keys() == PAIRWISE_LOSSES.keys()


@pytest.mark.parametrize("name", LITERALS)
def test_literal_values(name):
    options, expected = LITERALS[name]
    loss = combine(((name, 1.0),), options)
    value = loss(pairs(**PAIR), PAIR["n_c"])
    assert (value.shape, value.dtype) == ((1,), mx.float32)
    assert value.item() == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_dpop_penalty_is_inside_the_log_sigmoid():
    # a = −0.2, d = −0.5: β(0.3 − 50·0.2) = −0.97; outside it would be log(1 + e^−.03) + 10.
    loss = pairwise.dpop_loss(pairs(-0.2, -0.5), beta=0.1, penalty=50.0)
    assert loss.item() == pytest.approx(1.291419, rel=1e-5)


def test_divergences():
    x = mx.array([0.5])
    values = [phi(x, name, 0.5).item() for name in DIVERGENCES]
    assert values == pytest.approx([0.5, 0.393469, 0.219070, 0.442398], rel=1e-5)
    # All agree to first order at a ratio of 1, except js: f′(1) = 0 and f″(1) = ½ there.
    slopes = [
        mx.grad(lambda v, n=n: mx.sum(phi(v, n, 0.5)))(mx.zeros(1)).item() for n in DIVERGENCES
    ]
    assert slopes == pytest.approx([1.0, 1.0, 0.5, 1.0])
    near_forward, near_reverse = phi(x, "alpha", 1e-5).item(), phi(x, "alpha", 1 - 1e-3).item()
    assert (near_forward, near_reverse) == pytest.approx((0.393469, 0.5), rel=1e-3)


def test_orpo_is_finite_where_the_policy_is_certain():
    certain = pairs(0.0, -30.0, n_r=3.0)
    gradient = mx.grad(lambda c: mx.sum(pairwise.orpo_loss(certain._replace(chosen=c), 1.0)))
    assert math.isfinite(pairwise.orpo_loss(certain, 1.0).item())
    assert math.isfinite(gradient(mx.zeros(1)).item())
