"""Masks, weights, KL estimators, losses of single completions and of scores: literal numbers."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_align.losses import kl, masking, unpaired
from mlx_align.losses.reward import bt_loss, kwise_loss, reward_bt
from mlx_align.types import Comparisons

# ---------------------------------------------------------------- masks, weights, estimators


def test_aggregation():
    values = mx.array([[1.0] * 4 + [10.0] + [math.nan] * 5, [1.0] * 9 + [10.0]])
    mask = mx.arange(10)[None, :] < mx.array([[5], [10]])
    assert mx.mean(masking.masked_mean(values, mask)).item() == pytest.approx(2.35)
    assert masking.masked_mean(values, mask, None).item() == pytest.approx(2.2)
    assert masking.lengths(mask).tolist() == [5.0, 10.0]


def test_ld_mask():
    mask = mx.array([[1, 1, 1, 1, 0], [0, 1, 1, 0, 0]]) != 0
    weight = masking.ld_mask(mask, masking.shared_lengths(mask), 0.5)
    assert weight.tolist() == [[1, 1, 0.5, 0.5, 0], [0, 1, 1, 0, 0]]
    assert mx.array_equal(masking.ld_mask(mask, masking.shared_lengths(mask), 1.0), mask).item()


def test_wpo_weight():
    """A uniform distribution of any size gives 1; no gradient reaches the weight."""
    logps = mx.full((1, 3), -math.log(50))
    mask = mx.array([[True, True, False]])
    assert masking.wpo_weight(logps, logps, mask).item() == pytest.approx(1.0)
    likely = mx.array([[math.log(0.5), math.log(0.25), math.nan]])
    squares = mx.full((1, 3), math.log(0.375))
    assert masking.wpo_weight(likely, squares, mask).item() == pytest.approx(0.942809, rel=1e-5)
    gradient = mx.grad(lambda x: mx.sum(masking.wpo_weight(x, squares, mask)))(logps)
    assert not mx.any(gradient).item()


def test_kl_estimators():
    values = [
        kl.KL_ESTIMATORS[k](mx.array(-1.0), mx.array(-2.0)).item() for k in ("k1", "k2", "k3")
    ]
    assert values == pytest.approx([1.0, 0.5, 0.367879], rel=1e-5)
    # Near 0 k3 is l²/2, which 1e-4 would lose in rounding: e^x − 1 − x at x = −1e-3.
    assert kl.k3(mx.array(0.001), mx.array(0.0)).item() == pytest.approx(4.9983e-7, rel=1e-3)


def test_kl_estimators_average_to_the_kl_and_differ_in_gradient():
    logits, reference = mx.random.normal((2, 8), key=mx.random.key(0))

    def log_policy(x: mx.array) -> mx.array:
        return x - mx.logsumexp(x)

    reference = log_policy(reference)
    policy = mx.exp(log_policy(logits))
    true = mx.sum(policy * (log_policy(logits) - reference)).item()
    for name in ("k1", "k3"):
        estimate = mx.sum(policy * kl.KL_ESTIMATORS[name](log_policy(logits), reference)).item()
        assert estimate == pytest.approx(true, rel=1e-5)
        flipped = mx.sum(policy * kl.KL_ESTIMATORS[name](reference, log_policy(logits))).item()
        assert abs(flipped - true) > 0.1

    def as_loss(name: str) -> mx.array:
        estimator = kl.KL_ESTIMATORS[name]
        return mx.grad(lambda x: mx.sum(policy * estimator(log_policy(x), reference)))(logits)

    forward = mx.grad(lambda x: mx.sum(mx.exp(log_policy(x)) * (log_policy(x) - reference)))(logits)
    backward = mx.grad(lambda x: mx.sum(mx.exp(reference) * (reference - log_policy(x))))(logits)
    assert np.allclose(as_loss("k1"), 0.0, atol=1e-6)
    assert np.allclose(as_loss("k2"), forward, atol=1e-5)
    assert np.allclose(as_loss("k3"), backward, atol=1e-5)
    assert not np.allclose(forward, backward, atol=1e-2)


# ---------------------------------------------------------------- unpaired and ranked


def test_kto():
    logratio, desirable = mx.array([2.0, 2.0]), mx.array([True, False])
    losses = unpaired.kto_loss(logratio, desirable, 1.0, beta=0.5, undesirable_weight=2.0)
    # σ(−0.5) and 2·σ(0.5).
    assert losses.tolist() == pytest.approx([0.377541, 1.244919], rel=1e-5)
    zero = unpaired.apo_zero_unpaired_loss(logratio, desirable, beta=0.5)
    assert zero.tolist() == pytest.approx([0.268941, 0.731059], rel=1e-5)
    signs = mx.grad(lambda x: mx.sum(unpaired.kto_loss(x, desirable, 0.0)))(logratio)
    assert signs[0].item() < 0
    assert signs[1].item() > 0


def test_kto_reference_point():
    ratios = mx.array([3.0, -1.0, math.nan])
    weight = mx.array([1.0, 1.0, 0.0])
    assert unpaired.kto_kl(ratios, weight).item() == 1.0
    assert unpaired.kto_kl(-ratios, weight).item() == 0.0

    def through(ratios: mx.array) -> mx.array:
        point = unpaired.kto_kl(ratios, mx.ones(2))
        return mx.sum(unpaired.kto_loss(mx.array([1.0]), mx.array([True]), point))

    assert not mx.any(mx.grad(through)(mx.array([3.0, 1.0]))).item()


def test_token_losses():
    logps = mx.array([[math.log(0.5), math.log(0.25)]])
    assert unpaired.nll_loss(logps)[0].tolist() == pytest.approx([0.693147, 1.386294])
    assert unpaired.dft_loss(logps)[0].tolist() == pytest.approx([0.346574, 0.346574], rel=1e-5)
    slope = mx.grad(lambda x: mx.sum(unpaired.dft_loss(x)))(logps)
    assert slope[0].tolist() == pytest.approx([-0.5, -0.25])  # not through p


def test_reward_with_margin_centering_and_soft_label():
    chosen, rejected = mx.array([2.0]), mx.array([0.5])
    # Margin 1: log(1 + e^−0.5); centering 0.01·2.5²; p = 0.8 of 1.5: .8·.201413 + .2·1.701413.
    assert reward_bt(chosen, rejected, 1.0).item() == pytest.approx(0.474077, rel=1e-5)
    assert reward_bt(chosen, rejected, center=0.01).item() == pytest.approx(0.263913, rel=1e-5)
    assert reward_bt(chosen, rejected, 0.0, 0.8).item() == pytest.approx(0.501413, rel=1e-5)


def test_soft_labels_have_their_optimum_at_the_log_odds():
    """Gradient descent on the margin ends at log q/(1−q), q smoothed."""
    for p, smoothing in ((0.8, 0.0), (0.3, 0.0), (1.0, 0.1), (0.9, 0.2)):
        q = (1 - smoothing) * p + smoothing * (1 - p)
        margin = mx.array(0.0)
        slope = mx.grad(
            lambda x, p=p, e=smoothing: reward_bt(x, mx.array(0.0), 0.0, p, label_smoothing=e)
        )
        for _ in range(400):
            margin = margin - 2.0 * slope(margin)
        assert margin.item() == pytest.approx(math.log(q / (1 - q)), abs=1e-4)


def comparisons(weight, probability=None, margin=None):
    weight = mx.array(weight)
    ones = mx.ones(weight.shape)
    return Comparisons(
        ones if probability is None else mx.array(probability),
        0 * ones if margin is None else mx.array(margin),
        weight,
    )


def test_kwise():
    scores, third = mx.array([[2.0, 1.0, 0.0]]), [[1 / 3] * 3]
    # (2·log(1 + e^−1) + log(1 + e^−2)) / 3.
    assert kwise_loss(scores, comparisons(third)).item() == pytest.approx(0.251150, rel=1e-5)
    # Turned round: each margin comes back, + (1 + 1 + 2)/3.
    worse = comparisons(third, [[0.0] * 3])
    assert kwise_loss(scores, worse).item() == pytest.approx(1.584484, rel=1e-5)
    # Two of them tie and are left out: one comparison less, of three all the same.
    skipped = comparisons([[0.0, 1 / 3, 1 / 3]])
    assert kwise_loss(scores, skipped).item() == pytest.approx(0.146730, rel=1e-5)
    # Each wins half: + ½·(log(1 + e^−1) + log(1 + e))/3.
    half = comparisons(third, [[0.5, 1.0, 1.0]])
    assert kwise_loss(scores, half).item() == pytest.approx(0.146730 + 0.271087, rel=1e-4)
    assert kwise_loss(scores[:, :2], comparisons([[1.0]])).item() == pytest.approx(
        bt_loss(2.0, 1.0).item()
    )


def test_kwise_is_the_sum_over_its_pairs():
    """Value and gradient against one `reward_bt` after another, with all options at once."""
    random = np.random.default_rng(0)
    scores = mx.array(random.normal(size=(3, 4)).astype(np.float32))
    probability, margin, weight = (random.uniform(size=(3, 6)).astype(np.float32) for _ in range(3))
    known = Comparisons(mx.array(probability), mx.array(margin), mx.array(weight))
    options = {"center": 0.03, "label_smoothing": 0.1}

    def plain(scores):
        total = mx.array(0.0)
        for b in range(3):
            column = 0
            for i in range(4):
                for j in range(i + 1, 4):
                    of_pair = (float(margin[b, column]), float(probability[b, column]))
                    value = reward_bt(scores[b, i], scores[b, j], *of_pair, **options)
                    total = total + float(weight[b, column]) * value
                    column += 1
        return total

    def together(scores):
        return kwise_loss(scores, known, **options).sum()

    assert together(scores).item() == pytest.approx(plain(scores).item(), rel=1e-5)
    gap = mx.abs(mx.grad(together)(scores) - mx.grad(plain)(scores)).max().item()
    assert gap < 1e-6


def test_kwise_ignores_padding():
    scores = mx.array([[2.0, 1.0, 0.0, math.inf], [5.0, math.nan, math.inf, -math.inf]])
    weight = mx.array([[1, 1, 0, 1, 0, 0], [0] * 6]) / 3
    losses = kwise_loss(scores, comparisons(weight.tolist()))
    assert losses.tolist() == pytest.approx([0.251150, 0.0], rel=1e-5)
    gradient = mx.grad(lambda s: mx.sum(kwise_loss(s, comparisons(weight.tolist()))))(scores)
    assert mx.all(mx.isfinite(gradient)).item()
    assert not mx.any(gradient[:, 3]).item()
    assert not mx.any(gradient[1]).item()
