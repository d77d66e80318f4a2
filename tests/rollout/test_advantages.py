"""Advantages: known answers, missing rewards, garbage in padding."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_align.rollout.advantages import (
    GROUP_ADVANTAGES,
    WHITENED_OVER_TOKENS,
    AdaptiveKL,
    fit_line,
    gae,
    leave_one_out,
    normalize_then_sum,
    returns_to_go,
    token_rewards,
    whiten,
    zero_variance_share,
)

NAN = math.nan
EVERY = pytest.mark.parametrize("name", GROUP_ADVANTAGES)


# ---------------------------------------------------------------- per token


@pytest.mark.parametrize(
    ("lam", "expected"),
    [(0.95, [0.46575, 0.385, 0.3]), (1.0, [0.5, 0.4, 0.3]), (0.0, [0.1, 0.1, 0.3])],
)
def test_gae(lam, expected):
    """r = [0, 0, 1], V = [.5, .6, .7], γ = 1; the content of the padding is ignored."""
    for garbage in (0.0, NAN, math.inf, -1e300):
        rewards, values = [[0, 0, 1, garbage, garbage]], [[0.5, 0.6, 0.7, garbage, garbage]]
        advantages, returns = gae(rewards, values, [[1, 1, 1, 0, 0]], 1.0, lam)
        assert advantages[0] == pytest.approx([*expected, 0, 0])
        assert returns[0] == pytest.approx([*np.add(expected, [0.5, 0.6, 0.7]), 0, 0])


def test_gae_skips_masked_tokens():
    """Masked tokens inside a completion have no influence."""
    whole = gae([[0, 0, 1]], [[0.5, 0.6, 0.7]], [[1, 1, 1]], 0.9, 0.95)
    holed = gae([[0, NAN, 0, NAN, 1]], [[0.5, 9, 0.6, NAN, 0.7]], [[1, 0, 1, 0, 1]], 0.9, 0.95)
    for part, expected in zip(holed, whole, strict=True):
        assert part[0, [0, 2, 4]] == pytest.approx(expected[0])
        assert not part[0, [1, 3]].any()


def test_gae_against_its_definition():
    """Σ_l (γλ)^l·δ_(t+l), summed plainly, on ragged rows."""
    random = np.random.default_rng(3)
    rewards, values = random.normal(size=(4, 7)), random.normal(size=(4, 7))
    lengths, gamma, lam = [7, 4, 1, 0], 0.9, 0.8
    mask = np.arange(7)[None] < np.array(lengths)[:, None]
    advantages, _ = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        following = [*values[row, 1:length], 0.0]
        deltas = [rewards[row, t] + gamma * following[t] - values[row, t] for t in range(length)]
        expected = [
            sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length))
            for t in range(length)
        ]
        assert advantages[row] == pytest.approx(expected + [0.0] * (7 - length))
    to_go = returns_to_go(rewards, mask, gamma)
    assert to_go[1, 1] == pytest.approx(
        rewards[1, 1] + gamma * rewards[1, 2] + gamma**2 * rewards[1, 3]
    )


def test_token_rewards():
    """−c·(log π − log π_ref) on every token, the score on the last; a skipped row has neither."""
    logps = [[-1.0, -2.0, NAN], [-3.0, math.inf, NAN], [NAN, NAN, NAN]]
    reference = [[-2.0, -1.0, NAN], [-3.5, NAN, math.inf], [0.0, 0.0, 0.0]]
    mask = [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    got = token_rewards([2.0, -1.0, NAN], logps, reference, mask, 0.1)
    assert got == pytest.approx(np.array([[-0.1, 2.1, 0], [-1.05, 0, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="mask it out"):
        token_rewards([NAN, 1.0, 1.0], logps, reference, mask, 0.1)
    assert token_rewards([NAN], np.zeros((1, 0)), np.zeros((1, 0)), np.zeros((1, 0)), 0.1).size == 0


def test_whiten():
    random = np.random.default_rng(0)
    values, mask = random.normal(3, 2, (5, 6)), random.random((5, 6)) < 0.6
    values[~mask] = NAN
    got = whiten(values, mask)
    assert got[mask].mean() == pytest.approx(0, abs=1e-12)
    assert got[mask].std(ddof=1) == pytest.approx(1)
    assert not got[~mask].any()
    for nothing in (whiten(np.full((2, 3), 0.1), np.ones((2, 3))), whiten(values, mask & False)):
        assert not nothing.any()
    one = np.zeros((5, 6), bool)
    one[2, 2] = True
    assert not whiten(np.ones((5, 6)), one).any()


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("leave_one_out", [1, -1 / 3, -1 / 3, -1 / 3]),
        ("centred", [0.75, -0.25, -0.25, -0.25]),
        ("group_std", [1.4997, -0.4999, -0.4999, -0.4999]),
        ("batch_std", [1.4997, -0.4999, -0.4999, -0.4999]),
        ("whitened", [1.5, -0.5, -0.5, -0.5]),
        ("centred_whitened", [1.5, -0.5, -0.5, -0.5]),
    ],
)
def test_one_success_in_four(name, expected):
    assert GROUP_ADVANTAGES[name]([[1, 0, 0, 0]])[0] == pytest.approx(expected, abs=5e-5)


def test_known_values_of_every_estimator():
    names = {"leave_one_out", "centred", "group_std", "batch_std", "whitened", "centred_whitened"}
    assert names == GROUP_ADVANTAGES.keys()


@EVERY
def test_missing_rewards(name):
    """A missing reward has advantage 0 and does not change the others."""
    function = GROUP_ADVANTAGES[name]
    whole = function([[1.0, 0.0, 0.5], [2.0, 1.0, 4.0]])
    assert np.isfinite(whole).all()
    padded = function([[1.0, NAN, 0.0, 0.5, NAN], [NAN, 2.0, 1.0, NAN, 4.0]])
    given = [[True, False, True, True, False], [False, True, True, False, True]]
    assert padded[np.array(given)] == pytest.approx(whole.reshape(-1))
    assert not padded[~np.array(given)].any()
    assert not function([[NAN] * 3] * 2).any()
    assert function(np.zeros((0, 4))).shape == (0, 4)
    # Alone in its group, and the batch, a reward says nothing.
    assert not function([[NAN, 3.0, NAN]]).any()


@EVERY
def test_equal_rewards_are_exactly_zero(name):
    """.1 three times has a mean that is not .1."""
    rewards = np.array([[0.1] * 3, [0.1, 0.1, NAN], [0.7] * 3, [1.0, 0.0, 0.5]])
    advantages = GROUP_ADVANTAGES[name](rewards)
    if name == "whitened":  # no groups: what all of the batch share
        advantages = GROUP_ADVANTAGES[name](rewards[:1])
        assert not advantages.any()
        return
    assert (advantages[:3] == 0).all()
    assert advantages[3].any()


@EVERY
def test_rewards_that_differ_by_rounding_are_equal(name):
    for size in (1.0, 1e4, 1e-3):
        near = size + size * 1e-9 * np.arange(4)[None]
        assert not GROUP_ADVANTAGES[name](near).any()
    assert zero_variance_share(near) == 1
    assert GROUP_ADVANTAGES[name]([[0.0, 1e-3]]).all()


@pytest.mark.parametrize("name", ["whitened", "centred_whitened"])
def test_reinforce_pp_whitens_over_tokens(name):
    """As verl's masked_whiten and OpenRLHF do: a completion counts as often as it has tokens."""
    generator = np.random.default_rng(0)
    rewards = generator.normal(size=(3, 4))
    tokens = generator.integers(1, 9, (3, 4))
    mask = np.arange(9) < tokens.reshape(-1, 1)
    centre = rewards.mean(axis=1, keepdims=True) if name == "centred_whitened" else 0
    spread = (rewards - centre).reshape(-1, 1) * np.ones(9)
    expected = whiten(spread, mask)
    got = WHITENED_OVER_TOKENS[name](rewards, tokens).reshape(-1, 1) * mask
    assert got == pytest.approx(expected)
    inside = got[mask]
    assert inside.mean() == pytest.approx(0, abs=1e-12)
    assert inside.std(ddof=1) == pytest.approx(1)


def test_leave_one_out():
    rewards = np.random.default_rng(1).normal(size=(3, 5))
    for row, got in zip(rewards, leave_one_out(rewards), strict=True):
        expected = [row[i] - np.delete(row, i).mean() for i in range(5)]
        assert got == pytest.approx(expected)


def test_zero_variance_share():
    assert zero_variance_share([[1, 1], [0, 1], [NAN, NAN], [NAN, 2.0]]) == 0.75
    assert zero_variance_share(np.zeros((0, 2))) == 0.0


def test_normalize_then_sum():
    first, second = [[1.0, 0.0, NAN]], [[10.0, 30.0, NAN]]
    # A reward counts by its weight, independent of its spread: A − .5·A.
    advantages = normalize_then_sum([first, second], [1.0, 0.5])
    assert advantages[0] == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2), 0.0], rel=1e-3)
    assert not normalize_then_sum([[[NAN, NAN]], [[NAN, NAN]]], [1.0, 1.0]).any()
    assert not normalize_then_sum([[[1.0, 1.0]], [[2.0, 2.0]]], [1.0, 1.0]).any()


# ---------------------------------------------------------------- the coefficient


def test_adaptive_kl():
    control = AdaptiveKL(target=6.0, horizon=10_000)
    assert control.next(0.2, 12.0, 256) == pytest.approx(0.201024)
    assert control.next(0.2, 6.6, 256) == pytest.approx(0.2 * (1 + 0.1 * 0.0256))
    assert control.next(0.2, 0.0, 256) == pytest.approx(0.2 * (1 - 0.2 * 0.0256))
    assert control.next(0.2, 6.0, 256) == 0.2
    assert control.next(1e-3, 0.0, 256) == 1e-3


def test_fit_line_is_least_squares():
    random = np.random.default_rng(0)
    x = random.normal(size=50).astype(np.float32)
    y = 3 * x + random.normal(size=50)
    np.testing.assert_allclose(fit_line(x, y), np.polyfit(x, y, 1), rtol=1e-5)
    assert fit_line(np.ones(3), np.array([1.0, 2.0, 6.0])) == (0.0, 3.0)
