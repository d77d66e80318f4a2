"""Losses of whole updates: extremes, padding, fillers, accumulation: 8×1 equals 1×8."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from test_pairwise import pairs

from mlx_align.losses import masking
from mlx_align.losses.pairwise import DIVERGENCES, linear_loss, loss_and_logps_gradient
from mlx_align.losses.registry import PAIRWISE_LOSSES, combine, parse_losses
from mlx_align.types import PairLogps


def gradient_of(loss, logps: PairLogps, length: float = 10.0) -> list[mx.array]:
    """Gradient of the summed values by the four log-prob fields."""

    def total(*fields: mx.array) -> mx.array:
        return mx.sum(loss(PairLogps(*fields, *logps[4:]), length))

    return list(mx.grad(total, argnums=(0, 1, 2, 3))(*logps[:4]))


@pytest.mark.parametrize("name", PAIRWISE_LOSSES)
def test_gradients_are_finite_at_extremes(name):
    loss = combine(((name, 1.0),), {})
    ratios = [r * s for r in (0.0, 500.0, 1e5) for s in (1, -1)]
    a, d = (mx.array(v) for v in zip(*((a, d) for a in ratios for d in ratios), strict=True))
    logps = pairs(a, d, n_c=10.0, n_r=7.0)._replace(chosen=-mx.abs(a), rejected=-mx.abs(d))
    assert mx.all(mx.isfinite(loss(logps, 10.0))).item()
    for part in gradient_of(loss, logps):
        assert mx.all(mx.isfinite(part)).item()


@pytest.mark.parametrize("f_divergence", DIVERGENCES)
def test_divergences_are_finite_at_extremes(f_divergence):
    loss = combine(parse_losses("sigmoid"), {"f_divergence": f_divergence})
    for ratio in (1e4, -1e4, 50.0, -50.0):
        logps = pairs(ratio, -ratio)
        values = [loss(logps, 1.0), *gradient_of(loss, logps)]
        assert all(mx.all(mx.isfinite(value)).item() for value in values)


@pytest.mark.parametrize(
    ("logit", "slope"), [(-1e4, -1.0), (-50.0, -1.0), (50.0, -1.928750e-22), (1e4, 0.0)]
)
def test_sigmoid_slope_at_extremes(logit, slope):
    loss = combine(parse_losses("sigmoid"), {"beta": 1.0})
    by_a = gradient_of(loss, pairs(logit, 0.0))[2]
    assert by_a.item() == pytest.approx(slope, rel=1e-5, abs=0)


def some_batch(seed: int = 3, count: int = 8):
    """(2B, C) log-probs of policy and reference and a ragged mask."""
    rng = np.random.default_rng(seed)
    mask = np.arange(6) < rng.integers(1, 7, (2 * count, 1))
    policy, reference = -rng.exponential(1.0, (2, 2 * count, 6))
    return mx.array(policy, mx.float32), mx.array(reference, mx.float32), mx.array(mask)


UNCOUPLED = [name for name, loss in PAIRWISE_LOSSES.items() if not loss.couples_batch]
ALL_WEIGHT = mx.ones(8)


def update_of(loss, policy, reference, mask, weight, microbatch: int):
    """Loss and gradient by token log-probs of one update, in microbatches of that many pairs."""
    pair_count = mx.sum(weight)
    mean_length = masking.weighted_sum(masking.lengths(mask)[0::2], weight) / pair_count

    def part(policy: mx.array, at: slice, rows: slice) -> mx.array:
        logps = masking.pair_logps(policy, reference[rows], mask[rows], mx.ones(weight[at].shape))
        return masking.weighted_sum(loss(logps, mean_length), weight[at]) / pair_count

    total, gradients = 0.0, []
    for start in range(0, len(weight), microbatch):
        at, rows = slice(start, start + microbatch), slice(2 * start, 2 * (start + microbatch))
        value, gradient = mx.value_and_grad(part)(policy[rows], at, rows)
        total, gradients = total + value.item(), [*gradients, gradient]
    return total, mx.concatenate(gradients)


@pytest.mark.parametrize("name", UNCOUPLED)
def test_accumulation_fillers_and_padding(name):
    """8×1, 8 with fillers, and any garbage in the padding: all equal one batch of 8."""
    loss = combine(((name, 0.7),), {})
    policy, reference, mask = some_batch()
    once, gradient = update_of(loss, policy, reference, mask, ALL_WEIGHT, 8)
    for size in (1, 4):
        value, parts = update_of(loss, policy, reference, mask, ALL_WEIGHT, size)
        assert value == pytest.approx(once, rel=1e-5)
        assert np.allclose(parts, gradient, rtol=1e-4, atol=1e-7)

    # Filler groups: two rows without a single token, full of what a forward pass may leave there.
    garbage = mx.full((4, 6), float("nan"))
    filled = [mx.concatenate([x, garbage]) for x in (policy, reference)]
    mask_filled = mx.concatenate([mask, mx.zeros((4, 6), mx.bool_)])
    weight = mx.concatenate([ALL_WEIGHT, mx.zeros(2)])
    value, parts = update_of(loss, *filled, mask_filled, weight, 5)
    assert value == pytest.approx(once, rel=1e-5)
    assert np.allclose(parts[:16], gradient, rtol=1e-4, atol=1e-7)
    assert not mx.any(parts[16:]).item()

    dirty = [mx.where(mask, x, float("inf")) for x in (policy, reference)]
    value, parts = update_of(loss, *dirty, mask, ALL_WEIGHT, 8)
    assert value == pytest.approx(once, rel=1e-6)
    assert np.allclose(parts, gradient, rtol=1e-4, atol=1e-7)


def test_local_denominators_would_differ():
    """Mutant: each microbatch dividing by its own tokens is another loss."""
    loss, (policy, reference, mask) = combine(parse_losses("sft"), {}), some_batch()
    once, _ = update_of(loss, policy, reference, mask, ALL_WEIGHT, 8)
    local = []
    for row in range(8):
        at = slice(2 * row, 2 * row + 2)
        local.append(update_of(loss, policy[at], reference[at], mask[at], mx.ones(1), 1)[0])
    assert abs(np.mean(local) - once) > 1e-2


@pytest.mark.parametrize("text", ["aot", "aot_unpaired", "sigmoid=1,aot=0.5,sft=0.2"])
def test_coupled_losses_accumulate(text):
    loss, (policy, reference, mask) = combine(parse_losses(text), {}), some_batch()
    assert loss.couples_batch
    mean_length = mx.mean(masking.lengths(mask)[0::2])
    everything = masking.pair_logps(policy, reference, mask, mx.ones(8))

    def whole(policy: mx.array) -> mx.array:
        return mx.mean(loss(masking.pair_logps(policy, reference, mask, mx.ones(8)), mean_length))

    values, by_logps = loss_and_logps_gradient(loss, everything, mean_length)
    assert mx.mean(values).item() == pytest.approx(whole(policy).item(), rel=1e-6)
    gradients = []
    for row in range(8):
        at, own = slice(2 * row, 2 * row + 2), PairLogps(*(f[row : row + 1] for f in by_logps))

        def one(policy: mx.array, at: slice = at, own: PairLogps = own) -> mx.array:
            logps = masking.pair_logps(policy, reference[at], mask[at], mx.ones(1))
            return linear_loss(logps, own)

        gradients.append(mx.grad(one)(policy[at]))
    assert np.allclose(mx.concatenate(gradients), mx.grad(whole)(policy), rtol=1e-4, atol=1e-7)


def test_log_ratio_is_the_sum_of_differences():
    """At −1,000 nats the difference of the sums has lost what the sum of differences keeps."""
    reference = mx.full((2, 400), -2.6)
    logps = masking.pair_logps(reference + 1e-6, reference, mx.ones((2, 400)), mx.ones(1))
    per_token = np.array(reference + 1e-6)[0] - np.array(reference)[0]
    exact = float(per_token.astype(np.float64).sum())
    assert logps.chosen_logratio.item() == pytest.approx(exact, rel=1e-5)
    difference_of_sums = mx.sum((reference + 1e-6)[0]) - mx.sum(reference[0])
    assert abs(difference_of_sums.item() - exact) > 0.05 * exact
