"""Policy-gradient losses: known answers, mutants that must miss them, what must never be NaN."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from helpers.strategies import PROPERTY, orders, splits
from hypothesis import given
from hypothesis import strategies as st

from mlx_align.losses.policy import POLICY_METHODS, PolicyMethod, policy_loss, policy_totals
from mlx_align.losses.value import explained_variance, value_loss
from mlx_align.rollout.advantages import GROUP_ADVANTAGES, gae, token_rewards
from mlx_align.types import PolicySample

PRESETS = pytest.mark.parametrize("name", POLICY_METHODS)
PLAIN = PolicyMethod("centred", "none", "plain")


def make_sample(rows=8, width=6, seed=0, spread=0.3, fillers=(3,)) -> PolicySample:
    """Ragged completions near the old policy; row 3 is a filler, row 5 one token long."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, width + 1, rows)
    lengths[list(fillers)] = 0
    lengths[5 % rows] = 1
    old = -random.exponential(2.0, (rows, width))

    def near():
        return mx.array((old + random.normal(0, spread, old.shape)).astype(np.float32))

    return PolicySample(
        near(),
        mx.array(old.astype(np.float32)),
        near(),
        mx.array(random.normal(0, 1, old.shape).astype(np.float32)),
        mx.array(np.arange(width)[None] < lengths[:, None]),
        mx.array(random.uniform(0.5, 1.5, old.shape).astype(np.float32)),
        mx.array(random.uniform(0.1, 3.0, old.shape).astype(np.float32)),
    )


def rows_of(sample: PolicySample, rows: slice) -> PolicySample:
    return PolicySample(*(part[rows] for part in sample))


def loss_and_gradients(method, sample, totals, kl_coef=0.1, entropy_coef=0.02):
    """Loss, gradient by log-probs and by entropies, metric sums."""
    kl_coef = 0.0 if method.kl == "none" else kl_coef

    def function(logps, entropies):
        moved = sample._replace(logps=logps, entropies=entropies)
        return policy_loss(method, moved, totals, kl_coef=kl_coef, entropy_coef=entropy_coef)

    (loss, sums), grads = mx.value_and_grad(function, argnums=(0, 1))(
        sample.logps, sample.entropies
    )
    mx.eval(loss, sums, grads)
    return loss.item(), grads, {name: value.item() for name, value in sums.items()}


# ---------------------------------------------------------------- bandits, exactly


class Bandit:
    """One prompt, n answers of one token: all of them at once, weighed by how often they come.

    `correction` holds n·π_old, so the mean over the n rows is the expectation over samples.
    """

    def __init__(self, reference, rewards):
        self.reference = np.log(np.asarray(reference, np.float64))
        self.rewards = np.asarray(rewards, np.float64)
        self.mask = np.ones((len(self.rewards), 1))

    def optimum(self, beta):
        tilted = self.reference + self.rewards / beta
        return np.exp(tilted - np.logaddexp.reduce(tilted))

    def train(
        self,
        method,
        beta,
        *,
        updates=200,
        epochs=2,
        rate=4.0,
        start=None,
        reward_of=token_rewards,
        old_is_reference=False,
    ):
        """The policy after these rollouts; the critic is the exact expectation."""
        mask = mx.array(self.mask)
        totals = policy_totals([mask], method, 1)
        reference = mx.array(self.reference.astype(np.float32))[:, None]

        def loss(theta, sample):
            logps = (theta - mx.logsumexp(theta))[:, None]
            coef = 0.0 if method.kl == "none" else beta
            return policy_loss(method, sample._replace(logps=logps), totals, kl_coef=coef)[0]

        step = mx.grad(loss)
        first = self.reference if start is None else np.log(start)
        theta = mx.array(first.astype(np.float32))
        for _ in range(updates):
            old = (theta - mx.logsumexp(theta))[:, None]
            logps = np.array(old, np.float64)
            probability = np.exp(logps)
            coef = beta if method.kl == "k1_reward" else 0.0
            rewards = reward_of(self.rewards, logps, self.reference[:, None], self.mask, coef)
            values = np.full(rewards.shape, (probability * rewards).sum())
            advantages, _ = gae(rewards, values, self.mask)
            sample = PolicySample(
                old,
                reference if old_is_reference else old,
                reference,
                mx.array(advantages.astype(np.float32)),
                mask,
                mx.array((len(probability) * probability).astype(np.float32)),
            )
            for _ in range(epochs):
                theta = theta - rate * step(theta, sample)
            mx.eval(theta)
        return np.exp(np.array(theta - mx.logsumexp(theta), np.float64))


def distance(p, q) -> float:
    """Total variation."""
    return float(np.abs(np.asarray(p) - np.asarray(q)).sum() / 2)


@pytest.fixture(scope="module")
def bandit() -> Bandit:
    random = np.random.default_rng(0)
    logits = random.normal(size=8)
    return Bandit(np.exp(logits) / np.exp(logits).sum(), random.normal(size=8))


def test_ppo_reaches_the_optimum(bandit):
    """π* ∝ π_ref·e^(r/β)."""
    assert distance(bandit.train(POLICY_METHODS["ppo"], 0.5), bandit.optimum(0.5)) < 0.01


def test_ppo_with_the_kl_the_other_way_round_does_not(bandit):
    def flipped(scores, logps, reference, mask, coef):
        return token_rewards(scores, reference, logps, mask, coef)

    got = bandit.train(POLICY_METHODS["ppo"], 0.5, reward_of=flipped)
    assert distance(got, bandit.optimum(0.5)) > 0.1


def test_ppo_with_k3_in_the_reward_leaves_the_optimum(bandit):
    def with_k3(scores, logps, reference, mask, coef):
        difference = reference - logps
        penalty = coef * (np.exp(difference) - 1 - difference)
        return token_rewards(scores, logps, logps, mask, 0.0) - penalty

    optimum, method = bandit.optimum(0.5), POLICY_METHODS["ppo"]
    way = {"start": optimum, "updates": 100, "rate": 0.2}
    assert distance(bandit.train(method, 0.5, **way), optimum) < 1e-4
    assert distance(bandit.train(method, 0.5, reward_of=with_k3, **way), optimum) > 0.1


def test_ppo_with_its_ratio_against_the_reference_does_not(bandit):
    got = bandit.train(POLICY_METHODS["ppo"], 0.5, old_is_reference=True)
    assert distance(got, bandit.optimum(0.5)) > 0.1


def test_k2_as_a_loss_reaches_the_optimum_and_k3_another(bandit):
    """k3's gradient is that of KL(reference‖policy): π = β·π_ref/(λ − r), λ so that Σπ = 1."""
    method = replace(PLAIN, kl="k2")
    assert distance(bandit.train(method, 0.5, epochs=1), bandit.optimum(0.5)) < 0.01
    low, high = bandit.rewards.max() + 1e-9, bandit.rewards.max() + 10
    for _ in range(100):
        middle = (low + high) / 2
        other = 0.5 * np.exp(bandit.reference) / (middle - bandit.rewards)
        low, high = (middle, high) if other.sum() > 1 else (low, middle)
    got = bandit.train(replace(PLAIN, kl="k3"), 0.5, epochs=1)
    assert distance(got, other) < 0.01
    assert distance(other, bandit.optimum(0.5)) > 0.1


def test_a_proxy_reward_over_optimises_as_predicted():
    """A proxy that overrates one bad answer: what is really wanted rises and then falls."""
    gold, proxy = np.array([0, 0.5, 1, 2, -2]), np.array([0, 0.5, 1, 2, 4])
    reference = np.array([*(0.9999 * np.array([0.5, 0.3, 0.15, 0.05])), 1e-4])
    world = Bandit(reference / reference.sum(), proxy)
    start = np.exp(world.reference)
    assert start @ gold == pytest.approx(0.3998, abs=1e-4)
    method = POLICY_METHODS["ppo"]

    mild = world.train(method, 2.0)
    best = world.train(method, 0.49, updates=500)
    assert best @ gold == pytest.approx(1.1712, abs=1e-3)
    assert best @ (np.log(best) - world.reference) == pytest.approx(1.37, abs=0.01)
    assert start @ gold < mild @ gold < best @ gold
    over = world.train(method, 0.2, start=best)
    assert over @ gold == pytest.approx(world.optimum(0.2) @ gold, abs=0.01)
    assert over @ gold < -1.9
    assert over @ proxy > best @ proxy > mild @ proxy > start @ proxy


# ---------------------------------------------------------------- clip, ratios, aggregation


@pytest.mark.parametrize(
    ("advantage", "expected"), [(1.0, [-0.7, -1.0, 0.0]), (-1.0, [0.0, 1.0, 1.3])]
)
def test_clip(advantage, expected):
    """Ratios .7, 1, 1.3 at ε = .2: derivatives by the log-prob."""
    ratios, mask = mx.array([[0.7], [1.0], [1.3]]), mx.ones((3, 1))
    old = mx.zeros((3, 1))
    sample = PolicySample(mx.log(ratios), old, old, mx.full((3, 1), advantage), mask, mask)
    method = replace(POLICY_METHODS["ppo"], kl="none")
    totals = policy_totals([mask], method, 1)

    def loss(logps):
        return 3 * policy_loss(method, sample._replace(logps=logps), totals, kl_coef=0.0)[0]

    assert mx.grad(loss)(sample.logps)[:, 0].tolist() == pytest.approx(expected, abs=1e-6)
    _, sums = policy_loss(method, sample, totals, kl_coef=0.0)
    got = {k: v.item() for k, v in sums.items()}
    assert got["weight"] == 3
    assert got["ratio"] == pytest.approx(3.0)
    assert got["ratio/deviation"] == pytest.approx(0.6)
    logs = np.log([0.7, 1.0, 1.3])
    assert got["approx_kl"] == pytest.approx((np.exp(logs) - 1 - logs).sum(), rel=1e-5)
    low, high = (0, 1) if advantage > 0 else (1, 0)
    assert (got["clip_ratio/low_mean"], got["clip_ratio/high_mean"]) == (low, high)
    assert got["clip_ratio/region_mean"] == 1


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sequence_mean", 2.35),
        ("token_mean", 2.2),
        ("local_token_mean", 2.2),
        ("sequence_sum", 16.5),
        ("max_length", 33 / 40),
    ],
)
def test_aggregation(aggregation, expected):
    """Losses [1, 1, 1, 1, 10] and [1 × 9, 10]; 20 tokens at most."""
    losses = mx.array([[1.0] * 4 + [10.0] + [math.nan] * 5, [1.0] * 9 + [10.0]])
    mask = mx.array([[1] * 5 + [0] * 5, [1] * 10])
    zeros = mx.zeros(losses.shape)
    sample = PolicySample(zeros, zeros, zeros, -losses, mask, zeros + 1)
    method = replace(PLAIN, aggregation=aggregation)
    loss, _ = policy_loss(method, sample, policy_totals([mask], method, 20), kl_coef=0.0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@PRESETS
def test_gradients_of_the_first_update_are_the_policy_gradient(name):
    """∂loss/∂log π = −A times the aggregation's weight, for every kind of clip, gate and ratio."""
    method = POLICY_METHODS[name]
    sample = make_sample()
    ones = mx.ones(sample.mask.shape)
    by_row = mx.broadcast_to(sample.advantages[:, :1], sample.mask.shape)
    sample = sample._replace(logps=sample.old_logps, correction=ones, advantages=by_row)
    totals = policy_totals([sample.mask], method, 6)
    _, (grad, _), sums = loss_and_gradients(method, sample, totals, 0.0, 0.0)
    mask = np.array(sample.mask)
    length = mask.sum(1, keepdims=True)
    share = {
        "sequence_mean": 1 / np.maximum(length, 1) / 7,
        "token_mean": np.ones((8, 1)) / mask.sum(),
        "sequence_sum": np.ones((8, 1)) / 7,
        "max_length": np.ones((8, 1)) / (7 * 6),
    }[method.aggregation]
    assert np.array(grad) == pytest.approx(-np.array(by_row) * mask * share, abs=1e-6)
    assert sums["approx_kl"] == 0
    assert sums["ratio"] == pytest.approx(sums["weight"])
    assert sums["ratio/deviation"] == 0


def test_components_of_every_method():
    names = {method.advantage for method in POLICY_METHODS.values()}
    assert names - {"gae"} <= GROUP_ADVANTAGES.keys()
    expected = {
        "ppo": ("gae", "token", "clip", 0.2, 0.2, "token_mean", "k1_reward"),
        "grpo": ("group_std", "token", "clip", 0.2, 0.2, "sequence_mean", "k2"),
        "rloo": ("leave_one_out", "none", "plain", 0.2, 0.2, "sequence_sum", "k1_reward"),
        "dr_grpo": ("centred", "token", "clip", 0.2, 0.2, "max_length", "none"),
        "dapo": ("group_std", "token", "clip", 0.2, 0.28, "token_mean", "none"),
        "gspo": ("group_std", "sequence", "clip", 3e-4, 4e-4, "sequence_mean", "none"),
        "reinforce++": ("whitened", "token", "clip", 0.2, 0.2, "token_mean", "k1_reward"),
        "cispo": ("group_std", "token", "cispo", 0.2, 5.0, "token_mean", "none"),
    }
    for name, parts in expected.items():
        m = POLICY_METHODS[name]
        got = (m.advantage, m.ratio, m.surrogate, m.clip_low, m.clip_high, m.aggregation, m.kl)
        assert got == parts, name


# ---------------------------------------------------------------- 8 × 1 is 1 × 8


@PRESETS
@pytest.mark.parametrize(
    "changes",
    [{}, {"kl": "k3_corrected"}, {"entropy_quantile": 0.3, "off_policy_threshold": 0.05}],
    ids=["preset", "k3", "selected"],
)
def test_accumulation_is_exact(name, changes):
    method, sample = replace(POLICY_METHODS[name], **changes), make_sample()
    results = []
    for sizes in ((8,), (4, 4), (1,) * 8, (5, 3)):
        starts = np.cumsum([0, *sizes])
        parts = [rows_of(sample, slice(a, b)) for a, b in pairwise(starts)]
        totals = policy_totals(
            [part.mask for part in parts], method, 6, [part.entropies for part in parts]
        )
        shares = [loss_and_gradients(method, part, totals) for part in parts]
        grads = [mx.concatenate([share[1][i] for share in shares]) for i in (0, 1)]
        sums = {key: sum(share[2][key] for share in shares) for key in shares[0][2]}
        results.append((sum(share[0] for share in shares), grads, sums))
    loss, grads, sums = results[0]
    assert max(mx.abs(g).max().item() for g in grads) > 0
    for other_loss, other_grads, other_sums in results[1:]:
        assert other_loss == pytest.approx(loss, abs=1e-6)
        assert other_sums == pytest.approx(sums, rel=1e-5, abs=1e-5)
        for other, grad in zip(other_grads, grads, strict=True):
            assert mx.abs(other - grad).max().item() < 1e-6


@PRESETS
@PROPERTY
@given(st.data())
def test_padding_order_and_microbatches_do_not_change_the_update(name, data):
    method, sample = POLICY_METHODS[name], make_sample(seed=data.draw(st.integers(0, 2**32 - 1)))
    order, padding = data.draw(orders(8)), data.draw(st.integers(0, 4))
    parts = [mx.array(part) for part in data.draw(splits(order))]

    def padded(part):
        return PolicySample(*(mx.pad(array[part], ((0, 0), (0, padding))) for array in sample))

    def update(samples):
        masks = [one.mask for one in samples]
        totals = policy_totals(masks, method, 6, [one.entropies for one in samples])
        found = [loss_and_gradients(method, one, totals) for one in samples]
        sums = {key: sum(one[2][key] for one in found) for key in found[0][2]}
        grads = [mx.concatenate([one[1][i] for one in found]) for i in (0, 1)]
        return sum(one[0] for one in found), grads, sums

    loss, grads, sums = update([sample])
    other_loss, other_grads, other_sums = update([padded(part) for part in parts])
    assert other_loss == pytest.approx(loss, abs=1e-6)
    assert other_sums == pytest.approx(sums, rel=1e-5, abs=1e-5)
    for other, grad in zip(other_grads, grads, strict=True):
        assert mx.abs(other[:, :6] - grad[mx.array(order)]).max().item() < 1e-6
        assert not other[:, 6:].any().item()


def test_local_token_mean_depends_on_the_split():
    """As its name says: TRL's bnpo, and the defect that the others are without."""
    method, sample = replace(PLAIN, aggregation="local_token_mean"), make_sample()
    masks = [sample.mask[:4], sample.mask[4:]]
    totals = policy_totals(masks, method, 6)
    parts = [rows_of(sample, slice(0, 4)), rows_of(sample, slice(4, 8))]
    split = sum(policy_loss(method, p, totals, kl_coef=0.0)[0].item() for p in parts)
    whole, _ = policy_loss(method, sample, policy_totals([sample.mask], method, 6), kl_coef=0.0)
    assert split != pytest.approx(whole.item(), rel=1e-3)


# ---------------------------------------------------------------- gradients go where they should


def test_only_log_probs_and_entropies_have_a_gradient(monkeypatch):
    sample, method = make_sample(), replace(POLICY_METHODS["grpo"], kl="k3_corrected")
    totals = policy_totals([sample.mask], method, 6)

    def loss(fields):
        moved = sample._replace(**fields)
        return policy_loss(method, moved, totals, kl_coef=0.1, entropy_coef=0.01)[0]

    constants = ("old_logps", "reference_logps", "advantages", "correction")
    live = ("logps", "entropies")
    grads = mx.grad(loss)({name: getattr(sample, name) for name in constants + live})
    sizes = {name: mx.abs(grad).max().item() for name, grad in grads.items()}
    assert all(sizes[name] == 0 for name in constants)
    assert all(sizes[name] > 0 for name in live)
    # What would be seen of a forgotten stop-gradient.
    monkeypatch.setattr(mx, "stop_gradient", lambda x: x)
    leaking = mx.grad(loss)({name: getattr(sample, name) for name in constants})
    assert all(mx.abs(grad).max().item() > 0 for grad in leaking.values())


@PRESETS
def test_values_outside_of_the_mask_are_ignored(name):
    method, clean = replace(POLICY_METHODS[name], kl="k3_corrected"), make_sample()
    totals = policy_totals([clean.mask], method, 6)
    expected = loss_and_gradients(method, clean, totals)
    for garbage in (math.nan, math.inf, -math.inf, 1e30):
        fields = {
            field: mx.where(clean.mask, getattr(clean, field), garbage)
            for field in clean._fields
            if field != "mask"
        }
        dirty = clean._replace(**fields)
        totals = policy_totals([dirty.mask], method, 6)
        loss, grads, sums = loss_and_gradients(method, dirty, totals)
        assert loss == expected[0]
        assert sums == expected[2]
        for grad, wanted in zip(grads, expected[1], strict=True):
            assert mx.array_equal(grad, wanted).item()


@PRESETS
@pytest.mark.parametrize("width", [0, 1, 4])
def test_an_empty_mask_gives_a_loss_of_zero(name, width):
    """An update whose completions are all skipped or empty, and one of zero advantages."""
    method = replace(POLICY_METHODS[name], kl="k2", entropy_quantile=0.2)
    for masked in (0.0, 1.0):
        shape = (3, width)
        mask = mx.full(shape, masked)
        zeros = mx.zeros(shape)
        sample = PolicySample(zeros - 1, zeros - 1, zeros - 1, zeros, mask, zeros + 1, zeros + 1)
        totals = policy_totals([mask], method, 8, [sample.entropies])
        loss, (grad, _), sums = loss_and_gradients(method, sample, totals, 0.1, 0.0)
        assert loss == 0
        assert mx.all(grad == 0).item()
        assert all(math.isfinite(value) for value in sums.values())


@PRESETS
def test_far_from_the_old_policy_and_the_reference_is_finite(name):
    method = replace(POLICY_METHODS[name], kl="k3_corrected")
    for far in (-300.0, 300.0):
        sample = make_sample()
        sample = sample._replace(logps=sample.old_logps + far)
        totals = policy_totals([sample.mask], method, 6)
        loss, grads, sums = loss_and_gradients(method, sample, totals)
        assert math.isfinite(loss)
        assert all(mx.all(mx.isfinite(grad)).item() for grad in grads)
        assert all(math.isfinite(value) for value in sums.values())


def test_k2_has_a_gradient_far_from_the_reference():
    method = replace(PLAIN, kl="k2")
    sample = make_sample()._replace(advantages=mx.zeros((8, 6)), correction=mx.ones((8, 6)))
    sample = sample._replace(logps=sample.reference_logps + 50.0)
    totals = policy_totals([sample.mask], method, 6)
    _, (grad, _), _ = loss_and_gradients(method, sample, totals, 1.0, 0.0)
    expected = 50.0 / totals.tokens.item()
    assert mx.where(sample.mask, grad, expected).tolist() == [pytest.approx([expected] * 6)] * 8


def test_coefficients_can_change_after_compilation():
    """Coefficients are arguments of one compiled function."""
    sample, method = make_sample(), POLICY_METHODS["grpo"]
    totals = policy_totals([sample.mask], method, 6)
    traces = []

    def loss(sample, totals, kl_coef, entropy_coef):
        traces.append(sample)
        return policy_loss(method, sample, totals, kl_coef=kl_coef, entropy_coef=entropy_coef)[0]

    compiled = mx.compile(loss)
    for coefs in ((0.0, 0.0), (0.3, 0.05)):
        arrays = [mx.array(coef) for coef in coefs]
        got = compiled(sample, totals, *arrays).item()
        assert got == pytest.approx(loss(sample, totals, *coefs).item(), rel=1e-6, abs=1e-7)
    assert len(traces) == 3


def test_options_without_effect_are_refused():
    sample = make_sample()._replace(entropies=None)
    method = POLICY_METHODS["dapo"]
    totals = policy_totals([sample.mask], method, 6)
    with pytest.raises(ValueError, match="has no effect"):
        policy_loss(method, sample, totals, kl_coef=0.1)
    with pytest.raises(ValueError, match="expected entropies in the sample"):
        policy_loss(method, sample, totals, kl_coef=0.0, entropy_coef=0.1)
    with pytest.raises(ValueError, match="expected entropies"):
        policy_totals([sample.mask], replace(method, entropy_quantile=0.8), 6)


def test_quantile_of_entropies_is_numpys():
    method = replace(POLICY_METHODS["dapo"], entropy_quantile=0.8)
    sample = make_sample()
    masks, entropies = [sample.mask[:3], sample.mask[3:]], [sample.entropies[:3], None]
    entropies[1] = mx.where(masks[1], sample.entropies[3:], math.nan)
    threshold = policy_totals(masks, method, 6, entropies).entropy_threshold.item()
    chosen = np.array(sample.entropies)[np.array(sample.mask)]
    assert threshold == pytest.approx(np.quantile(chosen, 0.8), rel=1e-6)


# ---------------------------------------------------------------- the critic


def test_value_loss():
    """Clipped to ±.2 around the old value, the worse of the two errors counts."""
    values = mx.array([[1.0, 0.1, 0.5, math.nan]])
    old = mx.array([[0.0, 0.0, 0.0, math.inf]])
    returns = mx.array([[2.0, 1.0, -1.0, math.nan]])
    mask = mx.array([[1, 1, 1, 0]])
    clipped = value_loss(values, old, returns, mask, clip=0.2)
    # ½·max(1, 1.8²), ½·max(.9², .9²), ½·max(1.5², 1.2²)
    assert clipped[0].tolist() == pytest.approx([1.62, 0.405, 1.125, 0.0])
    plain = value_loss(values, old, returns, mask, clip=None)
    assert plain[0].tolist() == pytest.approx([0.5, 0.405, 1.125, 0.0])

    def total(values, old, returns):
        return value_loss(values, old, returns, mask, clip=0.2).sum()

    by_value, by_old, by_return = mx.grad(total, argnums=(0, 1, 2))(values, old, returns)
    # No gradient if the clipped error is the larger one: the value has moved enough.
    assert by_value[0].tolist() == pytest.approx([0.0, -0.9, 1.5, 0.0])
    assert not mx.any(by_old).item()
    assert not mx.any(by_return).item()


def test_explained_variance():
    mask = mx.array([[1, 1, 1, 0], [1, 0, 0, 0]])
    returns = mx.array([[1.0, 2.0, 3.0, math.nan], [4.0, math.inf, 0.0, 0.0]])
    values = mx.array([[1.5, 2.0, 2.0, 9.0], [3.0, 9.0, 9.0, math.nan]])
    error = np.array([1.0, 2, 3, 4]) - [1.5, 2, 2, 3]
    expected = 1 - error.var() / np.var([1, 2, 3, 4])
    assert explained_variance(values, returns, mask).item() == pytest.approx(expected, rel=1e-6)
    assert explained_variance(returns, returns, mask).item() == 1.0
    constant = mx.full((2, 4), 2.5)
    assert explained_variance(constant, returns, mask).item() == pytest.approx(0.0, abs=1e-6)
    for args in ((values, constant, mask), (values, returns, mask * 0)):
        assert explained_variance(*args).item() == 0.0
