"""Turn rewards into advantages: NumPy in float64, over a whole rollout batch.

Means and deviations are those of the whole batch, not of a microbatch. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Rewards that differ by less, relative to their size or 1, count as equal: float32 scores of equal
# completions differ by this much, and normalising would amplify the difference.
SAME_REWARD = 1e-6
STD_EPSILON = 1e-4  # added to a deviation, as in GRPO and TRL
WHITEN_EPSILON = 1e-8  # added to a variance, as in TRL's PPO


# --- per token, for PPO ---


def token_rewards(
    scores: npt.ArrayLike,
    logps: npt.ArrayLike,
    reference_logps: npt.ArrayLike,
    mask: npt.ArrayLike,
    kl_coef: float,
) -> Floats:
    """The reward of every token: −kl_coef·k1, plus the score at a completion's last token.

    k1 = log π_old − log π_ref of the sampled tokens. Of the KL estimators, only k1 in the reward
    has the optimum π* ∝ π_ref·e^(r/kl_coef).

    Args:
        scores: (N,) one per completion; ignored for rows that are masked out.
        logps: (N, C) nats, of the policy that sampled.
        reference_logps: (N, C) nats.
        mask: (N, C) nonzero for tokens that count; other positions may hold anything.
        kl_coef: Reward per nat.

    Returns:
        (N, C), 0 outside the mask.

    Raises:
        ValueError: A completion that is not masked out has no finite score.

    Source: Ziegler et al. 2019, eq. 2; Stiennon et al. 2020, section 3.4.
    """
    real = _as_bool(mask)
    k1 = _zero_outside(logps, real) - _zero_outside(reference_logps, real)
    rewards = -kl_coef * k1
    rows = np.flatnonzero(real.any(axis=1))
    row_scores = np.asarray(scores, np.float64)[rows]
    if not np.isfinite(row_scores).all():
        raise ValueError("a completion has no finite score; mask it out")
    if len(rows):
        last = real.shape[1] - 1 - real[rows, ::-1].argmax(axis=1)
        rewards[rows, last] += row_scores
    return np.asarray(np.where(real, rewards, 0.0))


def gae(
    rewards: npt.ArrayLike,
    values: npt.ArrayLike,
    mask: npt.ArrayLike,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Floats, Floats]:
    """Generalised advantage estimates and returns, each (N, C), 0 outside the mask.

    A_t = δ_t + γλ·A_(t+1), δ_t = r_t + γ·V_(t+1) − V_t, R_t = A_t + V_t, where t + 1 is the next
    token inside the mask. The value after the last token is 0.

    Args:
        rewards: (N, C).
        values: (N, C), of the state before each token.
        mask: (N, C) nonzero for tokens that count; other positions may hold anything.
        gamma: Discount per token.
        lam: λ; 1 gives returns minus values, 0 gives one-step advantages.

    Source: Schulman et al. 2016 ("High-dimensional continuous control using GAE"), eq. 16.
    """
    real = _as_bool(mask)
    reward, value = _zero_outside(rewards, real), _zero_outside(values, real)
    advantages = np.zeros_like(value)
    next_value = np.zeros(len(value))
    following = np.zeros(len(value))
    for t in reversed(range(value.shape[1])):
        inside = real[:, t]
        delta = reward[:, t] + gamma * next_value - value[:, t]
        following = np.where(inside, delta + gamma * lam * following, following)
        next_value = np.where(inside, value[:, t], next_value)
        advantages[:, t] = np.where(inside, following, 0.0)
    return advantages, np.where(real, advantages + value, 0.0)


def fit_line(x: Floats, y: Floats) -> tuple[float, float]:
    """Slope and intercept of the least-squares line through points (n,); slope 0 for equal x."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    spread = np.square(x - x.mean()).sum()
    slope = float(((x - x.mean()) * y).sum() / spread) if spread > 0 else 0.0
    return slope, float(y.mean() - slope * x.mean())


def returns_to_go(rewards: npt.ArrayLike, mask: npt.ArrayLike, gamma: float = 1.0) -> Floats:
    """Σ_(s ≥ t) γ^(s−t)·r_s per token (N, C): REINFORCE++'s advantage before whitening.

    Source: Hu et al. 2025 (REINFORCE++).
    """
    return gae(rewards, np.zeros_like(np.asarray(rewards, np.float64)), mask, gamma, 1.0)[0]


def whiten(values: npt.ArrayLike, mask: npt.ArrayLike) -> Floats:
    """Shift and scale the values inside the mask to mean 0 and unbiased variance 1; 0 elsewhere.

    If all values are equal, they become exactly 0.

    Source: Ziegler et al. 2019, their code; Huang et al. 2024 ("The N+ implementation details").
    """
    real = _as_bool(mask)
    inside = np.asarray(values, np.float64)[real]
    whitened = np.zeros(real.shape)
    if inside.size > 1 and inside.max() > inside.min():
        variance = inside.var(ddof=1)
        whitened[real] = (inside - inside.mean()) / np.sqrt(variance + WHITEN_EPSILON)
    return whitened


def _as_bool(mask: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    return np.asarray(mask) != 0


def _zero_outside(values: npt.ArrayLike, real: npt.NDArray[np.bool_]) -> Floats:
    return np.where(real, np.asarray(values, np.float64), 0.0)


# --- within groups ---
#
# Rewards are (B, G): G completions of each of B prompts. A completion without a reward is NaN: its
# advantage is 0, and it is left out of all means. Groups of equal rewards get exactly 0, without
# the rounding error of their mean.


def centred(rewards: npt.ArrayLike) -> Floats:
    """Rewards minus the mean of their group. Source: Liu et al. 2025 (Dr. GRPO), section 3.2."""
    return _centred(np.asarray(rewards, np.float64))


def group_std(rewards: npt.ArrayLike) -> Floats:
    """(r − mean)/(std + 1e-4) of the group, std unbiased. Source: Shao et al. 2024, section 4.1."""
    table = np.asarray(rewards, np.float64)
    return _centred(table) / (_std(table, axis=1) + STD_EPSILON)


def batch_std(rewards: npt.ArrayLike) -> Floats:
    """(r − mean of the group)/(std of all rewards + 1e-4).

    Source: Liu et al. 2025 ("Tricks or traps?"): group means, batch deviation.
    """
    table = np.asarray(rewards, np.float64)
    return _centred(table) / (_std(table, axis=None) + STD_EPSILON)


def leave_one_out(rewards: npt.ArrayLike) -> Floats:
    """Rewards minus the mean of the other rewards of their group: n/(n − 1) times `centred`.

    Source: Kool et al. 2019; Ahmadian et al. 2024 ("Back to Basics"), RLOO.
    """
    table = np.asarray(rewards, np.float64)
    count = _has_reward(table).sum(axis=1, keepdims=True)
    return _centred(table) * count / np.maximum(count - 1, 1)


def whitened(rewards: npt.ArrayLike, tokens: npt.ArrayLike | None = None) -> Floats:
    """Rewards whitened over all tokens of the batch, ignoring groups.

    Args:
        rewards: (B, G).
        tokens: (B, G) number of tokens of each completion, which is its weight in mean and
            variance. None to count each completion once.

    Source: Hu et al. 2025 (REINFORCE++); verl and OpenRLHF whiten over tokens, too.
    """
    table = np.asarray(rewards, np.float64)
    return _whiten_weighted(
        table, _has_reward(table) * (1 if tokens is None else np.asarray(tokens))
    )


def centred_whitened(rewards: npt.ArrayLike, tokens: npt.ArrayLike | None = None) -> Floats:
    """`centred`, then `whitened`; groups of equal rewards keep 0.

    Source: Hu et al. 2025 (REINFORCE++-baseline).
    """
    table = np.asarray(rewards, np.float64)
    weights = _has_reward(table) * (1 if tokens is None else np.asarray(tokens))
    return np.where(_is_constant(table), 0.0, _whiten_weighted(_centred(table), weights))


# Advantages that are whitened over tokens and take their number as a second argument.
WHITENED_OVER_TOKENS = {"whitened": whitened, "centred_whitened": centred_whitened}


def _whiten_weighted(values: Floats, weights: npt.NDArray[Any]) -> Floats:
    """`whiten` of values that occur `weights` times each; 0 where the weight is 0."""
    real, total = weights > 0, weights.sum()
    result = np.zeros(values.shape)
    inside, counts = values[real], weights[real]
    if total > 1 and inside.size and inside.max() - inside.min() > _rounding(inside):
        mean = (inside * counts).sum() / total
        variance = (np.square(inside - mean) * counts).sum() / (total - 1)
        result[real] = (inside - mean) / np.sqrt(variance + WHITEN_EPSILON)
    return result


GROUP_ADVANTAGES: dict[str, Callable[..., Floats]] = {
    "centred": centred,
    "group_std": group_std,
    "batch_std": batch_std,
    "leave_one_out": leave_one_out,
    "whitened": whitened,
    "centred_whitened": centred_whitened,
}


def zero_variance_share(rewards: npt.ArrayLike) -> float:
    """The fraction of groups without a signal: all rewards are equal, or missing."""
    table = np.asarray(rewards, np.float64)
    return float(_is_constant(table).mean()) if len(table) else 0.0


def normalize_then_sum(rewards: npt.ArrayLike, weights: npt.ArrayLike) -> Floats:
    """Advantages (B, G) = Σ_k w_k·`group_std`(r_k) of rewards (K, B, G), normalised over the batch.

    The influence of a reward is its weight, independent of its spread. A completion without any
    reward gets 0 and is left out of all means.

    Source: Liu et al. 2026 (GDPO, group reward-decoupled normalisation); TRL's
    `normalize_then_sum`.
    """
    table = np.asarray(rewards, np.float64)
    total = sum(
        (weight * group_std(one) for weight, one in zip(np.asarray(weights), table, strict=True)),
        np.zeros(table.shape[1:]),
    )
    given = _has_reward(table).any(axis=0)
    known = total[given]
    if known.size < 2 or known.max() == known.min():
        return np.zeros(total.shape)
    scaled = (total - known.mean()) / (known.std(ddof=1) + STD_EPSILON)
    return np.where(given, scaled, 0.0)


def _has_reward(rewards: Floats) -> npt.NDArray[np.bool_]:
    return ~np.isnan(rewards)


def _is_constant(rewards: Floats) -> npt.NDArray[np.bool_]:
    """(B, 1) whether all rewards of a group are equal up to rounding."""
    given = _has_reward(rewards)
    low = np.where(given, rewards, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    high = np.where(given, rewards, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    largest = np.maximum(np.abs(np.where(np.isfinite(low), low, 0)), np.abs(high))
    return high - low <= SAME_REWARD * np.maximum(1.0, np.where(np.isfinite(high), largest, 0))


def _rounding(values: Floats) -> float:
    """The difference up to which values count as equal."""
    return SAME_REWARD * max(1.0, float(np.abs(values).max()))


def _centred(rewards: Floats) -> Floats:
    given = _has_reward(rewards)
    count = np.maximum(given.sum(axis=1, keepdims=True), 1)
    mean = np.where(given, rewards, 0.0).sum(axis=1, keepdims=True) / count
    return np.where(given & ~_is_constant(rewards), rewards - mean, 0.0)


def _std(rewards: Floats, axis: int | None) -> Floats:
    """Unbiased deviation of the rewards that are not NaN; 0 if there are fewer than two."""
    given = _has_reward(rewards)
    kept = np.where(given, rewards, 0.0)
    count = given.sum(axis=axis, keepdims=True)
    mean = kept.sum(axis=axis, keepdims=True) / np.maximum(count, 1)
    squares = np.where(given, np.square(kept - mean), 0.0).sum(axis=axis, keepdims=True)
    return np.asarray(np.sqrt(squares / np.maximum(count - 1, 1)))


# --- the KL coefficient ---


@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """A controller that keeps KL(policy‖reference) near a target.

    Attributes:
        target: Nats per completion.
        horizon: Completions; the larger, the slower the coefficient changes.
        floor: The lowest coefficient; from 0 it could not rise again.

    Source: Ziegler et al. 2019, section 2.2.
    """

    target: float = 6.0
    horizon: float = 10_000.0
    floor: float = 1e-3

    def next(self, coef: float, kl: float, n: int) -> float:
        """The coefficient after n completions with a mean KL of `kl` nats per completion."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return max(coef * (1 + error * n / self.horizon), self.floor)
