"""Online DPO: of each prompt's completions the best and the worst are a pair to learn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_align.config import GrpoConfig
from mlx_align.data.batching import Microbatch, epoch_order
from mlx_align.errors import ConfigError
from mlx_align.inference.score import make_scorer
from mlx_align.losses.registry import combine, parse_losses
from mlx_align.rollout.advantages import zero_variance_share
from mlx_align.train.learner import Learned
from mlx_align.train.lessons import Tally, passes, policy_metrics
from mlx_align.train.loop import make_optimizer, ready
from mlx_align.train.preference import preference_objective
from mlx_align.train.update import Updater
from mlx_align.train.workplace import Experience, Workplace
from mlx_align.types import Logps, TokenizedGroup

ONLINE_DPO = "online_dpo"
# Guo et al. 2024's, and DPO's.
BETA = 0.1


def check_pair_options(config: GrpoConfig) -> None:
    """Refuse what has no effect on pairs.

    Raises:
        ConfigError: Such an option was given, or a prompt has one completion only.
    """
    defaults = GrpoConfig()
    method = ("clip_eps", "clip_eps_high", "kl", "kl_coef", "entropy_coef", "overlong")
    for name in (*method, "multi_objective_aggregation"):
        if getattr(config, name) != getattr(defaults, name):
            raise ConfigError(
                f"--{name.replace('_', '-')}: has no effect on --loss online_dpo, whose pull to "
                "the reference is --beta; leave it out"
            )
    if config.group_size < 2:
        raise ConfigError(
            f"--group-size {config.group_size}: a pair takes two completions; give 2 or more"
        )


class PairLearner:
    """Learns by DPO from pairs of the policy's own completions.

    Source: Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback", with the
    best and the worst of several completions.
    """

    title = "Online DPO"

    def __init__(self, config: GrpoConfig, workplace: Workplace) -> None:
        self._config, self._place = config, workplace
        model, start = workplace.policy.model, workplace.policy.start
        self.dynamic = bool(config.dynamic_sampling)
        self.trees = {"policy": start}
        self.optimizers = {"policy": make_optimizer(start, config.weight_decay)}
        # The objective reads them anew for every rollout batch, and is compiled once.
        self._pairs: list[TokenizedGroup] = []
        self._reference: list[tuple[Logps, ...]] = []
        self._objective = preference_objective(
            model,
            combine(parse_losses("sigmoid"), {"beta": config.beta or BETA}),
            self._pairs,
            self._reference,
            make_scorer(model),
            grad_checkpoint=config.grad_checkpoint,
        )
        self._update = Updater(
            model,
            self.optimizers["policy"],
            self._objective.loss,
            config.max_grad_norm,
            workplace.memory,
            skip=config.on_non_finite == "skip",
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold beside trees and optimizers: nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""

    def begin(self) -> str:
        """What happens before the first rollout batch: nothing."""
        return ""

    def learn(self, experience: Experience, step: int, rate: float) -> Learned:
        """The updates of one rollout batch."""
        rewards = experience.rewards.total.reshape(-1, self._config.group_size)
        places = self._take_pairs(experience, rewards)
        tally = Tally()
        for part in passes(len(rewards), self._config, step):
            for chosen in part:
                indices = [places[index] for index in chosen if index in places]
                if not indices:
                    continue
                micro = self._microbatches(indices)
                batches = [self._objective.collate(one) for one in micro]
                done = self._update(
                    self.trees["policy"],
                    ready(self._objective, batches, micro),
                    self._objective.totals(batches),
                    rate,
                )
                self.trees["policy"] = done.tree
                tally.add(done)
        names = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
        metrics = {**policy_metrics(tally), **tally.row({name: name for name in names})}
        metrics["frac_reward_zero_std"] = zero_variance_share(rewards)
        return Learned(metrics, None, tally.skipped)

    def _take_pairs(self, experience: Experience, rewards: np.ndarray) -> dict[int, int]:
        """Make the batch's pairs; where each prompt's is, for those that have one."""
        self._pairs.clear()
        self._reference.clear()
        places: dict[int, int] = {}
        groups, size = experience.rollouts.groups, self._config.group_size
        for index, (group, earned) in enumerate(zip(groups, rewards, strict=True)):
            if zero_variance_share(earned[None]) == 1:
                continue
            best, worst = int(np.nanargmax(earned)), int(np.nanargmin(earned))
            pair = (group.completions[best], group.completions[worst])
            places[index] = len(self._pairs)
            self._pairs.append(TokenizedGroup(group.prompt, pair, group.source))
            rows = (experience.reference_logps[index * size + k] for k in (best, worst))
            self._reference.append(
                tuple(row[: len(ids)] for row, ids in zip(rows, pair, strict=True))
            )
        return places

    def _microbatches(self, indices: list[int]) -> list[Microbatch]:
        pairs = [self._pairs[index] for index in indices]
        return [
            Microbatch(tuple(indices[i] for i in micro.indices), micro.shape)
            for micro in epoch_order(pairs, self._place.shapes, seed=None)
        ]
