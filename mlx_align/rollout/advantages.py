"""From rewards to advantages: plain numpy in float64, over all of a rollout at once.

Whole batches, because means and deviations of a microbatch are others. All of these are data:
nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# What keeps a deviation from dividing by 0; GRPO's and TRL's.
STD_EPSILON = 1e-4
WHITEN_EPSILON = 1e-8  # on the variance, as in TRL's PPO


# ---------------------------------------------------------------- rewards of tokens, with a critic


def token_rewards(
    scores: npt.ArrayLike,
    logps: npt.ArrayLike,
    reference_logps: npt.ArrayLike,
    mask: npt.ArrayLike,
    kl_coef: float,
) -> Floats:
    """−kl_coef·k1 of every token, and the score on a completion's last one.

    k1 = log π_old − log π_ref of the tokens that were sampled. Of the estimators only k1 in the
    reward makes π* ∝ π_ref·e^(r/kl_coef) the optimum.

    Args:
        scores: (N,) of the completions; ignored where the mask has no token.
        logps: (N, C) nats, of the policy that sampled.
        reference_logps: (N, C) nats.
        mask: (N, C) nonzero where a token is real; the rest may be anything.
        kl_coef: Reward per nat.

    Returns:
        (N, C), 0 off the mask.

    Raises:
        ValueError: A completion has a token under the mask and no finite score.

    Source: Ziegler et al. 2019, eq. 2; Stiennon et al. 2020, section 3.4.
    """
    real = _real(mask)
    k1 = _under(logps, real) - _under(reference_logps, real)
    rewards = -kl_coef * k1
    rows = np.flatnonzero(real.any(axis=1))
    given = np.asarray(scores, np.float64)[rows]
    if not np.isfinite(given).all():
        raise ValueError("a completion without a score: mask it out")
    if len(rows):
        last = real.shape[1] - 1 - real[rows, ::-1].argmax(axis=1)
        rewards[rows, last] += given
    return np.asarray(np.where(real, rewards, 0.0))


def gae(
    rewards: npt.ArrayLike,
    values: npt.ArrayLike,
    mask: npt.ArrayLike,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Floats, Floats]:
    """Generalised advantages and returns, each (N, C), 0 off the mask.

    A_t = δ_t + γλ·A_(t+1), δ_t = r_t + γ·V_(t+1) − V_t, R_t = A_t + V_t, where t + 1 is the next
    token under the mask; after the last there is nothing, of value 0.

    Args:
        rewards: (N, C).
        values: (N, C) of the state each token was chosen in.
        mask: (N, C) nonzero where a token is real; the rest may be anything.
        gamma: Discount per token.
        lam: λ; 1: returns minus values, 0: one step.

    Source: Schulman et al. 2016 ("High-dimensional continuous control using GAE"), eq. 16.
    """
    real = _real(mask)
    reward, value = _under(rewards, real), _under(values, real)
    advantages = np.zeros_like(value)
    next_value = np.zeros(len(value))
    following = np.zeros(len(value))
    for t in reversed(range(value.shape[1])):
        here = real[:, t]
        delta = reward[:, t] + gamma * next_value - value[:, t]
        following = np.where(here, delta + gamma * lam * following, following)
        next_value = np.where(here, value[:, t], next_value)
        advantages[:, t] = np.where(here, following, 0.0)
    return advantages, np.where(real, advantages + value, 0.0)


def returns_to_go(rewards: npt.ArrayLike, mask: npt.ArrayLike, gamma: float = 1.0) -> Floats:
    """Σ_(s ≥ t) γ^(s−t)·r_s per token (N, C): what REINFORCE++ whitens.

    Source: Hu et al. 2025 (REINFORCE++), the advantage before it is normalised.
    """
    return gae(rewards, np.zeros_like(np.asarray(rewards, np.float64)), mask, gamma, 1.0)[0]


def whiten(values: npt.ArrayLike, mask: npt.ArrayLike) -> Floats:
    """The values under the mask to mean 0 and (unbiased) variance 1; 0 elsewhere.

    Values that are all equal become exactly 0.

    Source: Ziegler et al. 2019, their code; Huang et al. 2024 ("The N+ implementation details").
    """
    real = _real(mask)
    chosen = np.asarray(values, np.float64)[real]
    whitened = np.zeros(real.shape)
    if chosen.size > 1 and chosen.max() > chosen.min():
        variance = chosen.var(ddof=1)
        whitened[real] = (chosen - chosen.mean()) / np.sqrt(variance + WHITEN_EPSILON)
    return whitened


def _real(mask: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    return np.asarray(mask) != 0


def _under(values: npt.ArrayLike, real: npt.NDArray[np.bool_]) -> Floats:
    return np.where(real, np.asarray(values, np.float64), 0.0)


# ---------------------------------------------------------------- advantages within groups
#
# Rewards are (B, G), G completions of each of B prompts; NaN where a completion has no reward: its
# advantage is 0 and it enters no mean. Groups of equal rewards get exactly 0, whatever rounding
# their mean would leave.


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
    """Rewards minus the mean of the *others* of their group: n/(n − 1) times `centred`.

    Source: Kool et al. 2019; Ahmadian et al. 2024 ("Back to Basics"), RLOO.
    """
    table = np.asarray(rewards, np.float64)
    count = _given(table).sum(axis=1, keepdims=True)
    return _centred(table) * count / np.maximum(count - 1, 1)


def whitened(rewards: npt.ArrayLike) -> Floats:
    """Rewards whitened over the whole batch, prompts apart or not. Source: Hu et al. 2025."""
    table = np.asarray(rewards, np.float64)
    return whiten(table, _given(table))


def centred_whitened(rewards: npt.ArrayLike) -> Floats:
    """`centred`, then whitened over the batch. Source: Hu et al. 2025 (REINFORCE++-baseline)."""
    table = np.asarray(rewards, np.float64)
    advantages = whiten(_centred(table), _given(table))
    return np.where(_equal(table), 0.0, advantages)


GROUP_ADVANTAGES: dict[str, Callable[[npt.ArrayLike], Floats]] = {
    "centred": centred,
    "group_std": group_std,
    "batch_std": batch_std,
    "leave_one_out": leave_one_out,
    "whitened": whitened,
    "centred_whitened": centred_whitened,
}


def zero_variance_share(rewards: npt.ArrayLike) -> float:
    """The share of groups that teach nothing: rewards all equal, or none."""
    table = np.asarray(rewards, np.float64)
    return float(_equal(table).mean()) if len(table) else 0.0


def normalised_rewards(rewards: npt.ArrayLike, weights: npt.ArrayLike) -> Floats:
    """Advantages (B, G): Σ_k w_k·`group_std`(r_k) of rewards (K, B, G), then normalised at large.

    Each reward counts by its weight, however widely it spreads. A completion without any reward
    gets 0 and enters no mean.

    Source: Liu et al. 2026 (GDPO, group reward-decoupled normalisation); TRL's
    `normalize_then_sum`.
    """
    table = np.asarray(rewards, np.float64)
    total = sum(
        (weight * group_std(one) for weight, one in zip(np.asarray(weights), table, strict=True)),
        np.zeros(table.shape[1:]),
    )
    given = _given(table).any(axis=0)
    chosen = total[given]
    if chosen.size < 2 or chosen.max() == chosen.min():
        return np.zeros(total.shape)
    scaled = (total - chosen.mean()) / (chosen.std(ddof=1) + STD_EPSILON)
    return np.where(given, scaled, 0.0)


def _given(rewards: Floats) -> npt.NDArray[np.bool_]:
    return ~np.isnan(rewards)


def _equal(rewards: Floats) -> npt.NDArray[np.bool_]:
    """(B, 1) groups whose rewards are all equal, or of which there is one or none."""
    given = _given(rewards)
    low = np.where(given, rewards, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    high = np.where(given, rewards, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    return low >= high


def _centred(rewards: Floats) -> Floats:
    given = _given(rewards)
    count = np.maximum(given.sum(axis=1, keepdims=True), 1)
    mean = np.where(given, rewards, 0.0).sum(axis=1, keepdims=True) / count
    return np.where(given & ~_equal(rewards), rewards - mean, 0.0)


def _std(rewards: Floats, axis: int | None) -> Floats:
    """Unbiased deviation of the rewards that are given; 0 of one or none."""
    given = _given(rewards)
    kept = np.where(given, rewards, 0.0)
    count = given.sum(axis=axis, keepdims=True)
    mean = kept.sum(axis=axis, keepdims=True) / np.maximum(count, 1)
    squares = np.where(given, np.square(kept - mean), 0.0).sum(axis=axis, keepdims=True)
    return np.asarray(np.sqrt(squares / np.maximum(count - 1, 1)))


# ---------------------------------------------------------------- the coefficient of the KL


@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """A controller that holds KL(policy‖reference) of completions near a target.

    Attributes:
        target: Nats per completion.
        horizon: Completions in which the coefficient follows.
        floor: The coefficient is never less: at 0 it could not rise again.

    Source: Ziegler et al. 2019, section 2.2.
    """

    target: float = 6.0
    horizon: float = 10_000.0
    floor: float = 1e-3

    def next(self, coef: float, kl: float, n: int) -> float:
        """The coefficient after n completions whose mean KL was `kl`, in nats a completion."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return max(coef * (1 + error * n / self.horizon), self.floor)
