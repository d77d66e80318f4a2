"""PPO and the group methods by name: what one differs from another in, and nothing else.

A method is an entry of `POLICY_METHODS`: how rewards become advantages (`rollout/advantages.py`),
what the ratio is of and what is done where it is far from 1 (`surrogates.py`), how tokens are
averaged, and where the pull to the reference acts (`policy.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Ratio = Literal["token", "sequence", "trajectory", "none"]
Surrogate = Literal["clip", "plain", "cispo", "sapo", "vespo"]
Aggregation = Literal[
    "sequence_mean", "token_mean", "local_token_mean", "sequence_sum", "max_length"
]
KlPlace = Literal["none", "k1_reward", "k2", "k3", "k3_corrected"]


@dataclass(frozen=True, slots=True)
class PolicyMethod:
    """The parts of a policy-gradient method.

    Attributes:
        advantage: How rewards become advantages: a name of `GROUP_ADVANTAGES`, or "gae" where a
            critic has values.
        ratio: What the ratio π/π_old is of: each token, the geometric mean of a completion
            (sequence), all of a completion (trajectory), or nothing (REINFORCE).
        surrogate: What is done with it, a name of `SURROGATES`.
        clip_low: Ratios are clipped at 1 − clip_low.
        clip_high: And at 1 + clip_high; of cispo the bound of its weight itself.
        delta: Bound of the ratios that `clip` leaves alone, those of negative advantages.
        aggregation: Over what tokens are averaged: completions first (sequence_mean), all tokens
            of the update (token_mean), all of a microbatch and then microbatches, each alike
            (local_token_mean, TRL's bnpo; the only one that depends on how an update is split);
            summed over a completion, averaged over completions (sequence_sum); that by the
            longest length allowed (max_length).
        kl: The pull to the reference: none; k1 of each token in the reward, which is not the
            loss's business; or in the loss k2, k3, or k3 times the ratio (as TRL's GRPO).
        entropy_quantile: Only tokens of at least this quantile of the entropies have a surrogate.
        off_policy_threshold: Completions of negative advantage whose mean log π_old/π exceeds
            this, in nats per token, have none.
    """

    advantage: str
    ratio: Ratio = "token"
    surrogate: Surrogate = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float | None = None
    aggregation: Aggregation = "token_mean"
    kl: KlPlace = "none"
    entropy_quantile: float = 0.0
    off_policy_threshold: float | None = None


# In the group methods k2 is the pull to the reference where one is wanted: as a loss, k3 has the
# gradient of KL(reference‖policy), another optimum (see kl.py).
POLICY_METHODS: dict[str, PolicyMethod] = {
    # Schulman et al. 2017; k1 in the reward: Ziegler et al. 2019, eq. 2
    "ppo": PolicyMethod("gae", kl="k1_reward"),
    # Shao et al. 2024 (DeepSeekMath), eq. 3
    "grpo": PolicyMethod("group_std", aggregation="sequence_mean", kl="k2"),
    # Ahmadian et al. 2024 (RLOO)
    "rloo": PolicyMethod(
        "leave_one_out", "none", "plain", aggregation="sequence_sum", kl="k1_reward"
    ),
    # Liu et al. 2025 ("Understanding R1-Zero-like training")
    "dr_grpo": PolicyMethod("centred", aggregation="max_length"),
    # Yu et al. 2025, eq. 8
    "dapo": PolicyMethod("group_std", clip_high=0.28),
    # Zheng et al. 2025, eq. 5
    "gspo": PolicyMethod(
        "group_std", "sequence", clip_low=3e-4, clip_high=4e-4, aggregation="sequence_mean"
    ),
    # Hu et al. 2025 (REINFORCE++), and its variant with a group's mean as the baseline
    "reinforce++": PolicyMethod("whitened", kl="k1_reward"),
    "reinforce++-baseline": PolicyMethod("centred_whitened", kl="k1_reward"),
    # MiniMax 2025 (MiniMax-M1), eq. 4; the bound 5 as TRL advises
    "cispo": PolicyMethod("group_std", surrogate="cispo", clip_high=5.0),
    # Gao et al. 2025
    "sapo": PolicyMethod("group_std", surrogate="sapo", aggregation="sequence_mean"),
    # Shen et al. 2026, eq. 20; token mean as TRL
    "vespo": PolicyMethod("centred", surrogate="vespo"),
    # Liu et al. 2026 (length-unbiased sequence policy optimization)
    "luspo": PolicyMethod("group_std", "sequence", aggregation="sequence_sum"),
}
