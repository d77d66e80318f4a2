"""Online DPO: train on pairs of the best and the worst of each prompt's completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_align.algorithms.base import UpdateResult
from mlx_align.algorithms.dpo import PreferenceObjective
from mlx_align.algorithms.policy_gradient import UpdateMetrics, minibatch_epochs
from mlx_align.algorithms.update import Updater, collate_microbatches, make_optimizer
from mlx_align.config import GRPOConfig
from mlx_align.data.batching import Microbatch, epoch_order
from mlx_align.errors import ConfigError
from mlx_align.inference.scoring import make_logprob_scorer
from mlx_align.losses.registry import combine, parse_losses
from mlx_align.models.weights import AdapterWeights
from mlx_align.rollout.advantages import zero_variance_share
from mlx_align.rollout.collector import RolloutBatch, RolloutCollector
from mlx_align.system.progress import Console
from mlx_align.types import Logps, TokenizedGroup

# The default of Guo et al. 2024, and of DPO.
BETA = 0.1


def check_online_dpo_options(config: GRPOConfig) -> None:
    """Check that all given options have an effect on pairs.

    Raises:
        ConfigError: An option has no effect, or there is only one completion per prompt.
    """
    defaults = GRPOConfig()
    without_effect = ("clip_eps", "clip_eps_high", "kl", "kl_coef", "entropy_coef", "overlong")
    for name in (*without_effect, "multi_objective_aggregation"):
        if getattr(config, name) != getattr(defaults, name):
            raise ConfigError(
                f"--{name.replace('_', '-')}: has no effect on --loss online_dpo, where --beta "
                "keeps the policy near the reference; leave it out"
            )
    if config.group_size < 2:
        raise ConfigError(
            f"--group-size {config.group_size}: a pair needs two completions; give 2 or more"
        )


class OnlineDPO:
    """Trains by DPO on pairs of the policy's own completions.

    Source: Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback", with the
    best and the worst of several completions.

    Attributes:
        title: Label of the progress bar.
        dynamic_sampling: Whether prompts whose completions all have the same reward are replaced.
        weights: The trained weights, by name.
        optimizers: Their optimizers, by name.
    """

    title = "Online DPO"

    def __init__(self, config: GRPOConfig, collector: RolloutCollector) -> None:
        self._config, self._collector = config, collector
        model, start = collector.policy.model, collector.policy.start
        self.dynamic_sampling = bool(config.dynamic_sampling)
        self.weights: dict[str, AdapterWeights] = {"policy": start}
        self.optimizers = {"policy": make_optimizer(start, config.weight_decay)}
        # Refilled for every rollout batch. The objective reads them, and so is compiled only once.
        self._pairs: list[TokenizedGroup] = []
        self._reference: list[tuple[Logps, ...]] = []
        self._objective = PreferenceObjective(
            model,
            combine(parse_losses("sigmoid"), {"beta": config.beta or BETA}),
            self._pairs,
            self._reference,
            make_logprob_scorer(model),
            grad_checkpoint=bool(config.grad_checkpoint),
        )
        self._updater = Updater(
            model,
            self.optimizers["policy"],
            self._objective.loss,
            config.max_grad_norm,
            collector.memory,
            skip=config.on_non_finite == "skip",
        )

    def prepare(self, console: Console) -> str:
        """Nothing to do before the first rollout batch."""
        return ""

    def state(self) -> dict[str, Any]:
        """No state besides weights and optimizers."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """No state to restore."""

    def update(self, batch: RolloutBatch, step: int, learning_rate: float) -> UpdateResult:
        """Make the updates on one rollout batch."""
        rewards = batch.rewards.total.reshape(-1, self._config.group_size)
        pair_of = self._make_pairs(batch, rewards)
        metrics = UpdateMetrics()
        for minibatches in minibatch_epochs(len(rewards), self._config, step):
            for minibatch in minibatches:
                pairs = [pair_of[index] for index in minibatch if index in pair_of]
                if not pairs:
                    continue
                micro = self._microbatches(pairs)
                batches = [self._objective.collate(one) for one in micro]
                update = self._updater(
                    self.weights["policy"],
                    collate_microbatches(self._objective, batches, micro),
                    self._objective.totals(batches),
                    learning_rate,
                )
                self.weights["policy"] = update.weights
                metrics.add(update)
        names = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
        row = {**metrics.policy(), **metrics.named({name: name for name in names})}
        row["frac_reward_zero_std"] = zero_variance_share(rewards)
        return UpdateResult(row, None, metrics.skipped)

    def _make_pairs(self, batch: RolloutBatch, rewards: np.ndarray) -> dict[int, int]:
        """Make the pairs of the batch; returns prompt index -> pair index, if rewards differ."""
        self._pairs.clear()
        self._reference.clear()
        pair_of: dict[int, int] = {}
        groups, size = batch.completions.groups, self._config.group_size
        for index, (group, row) in enumerate(zip(groups, rewards, strict=True)):
            if zero_variance_share(row[None]) == 1:
                continue
            best, worst = int(np.nanargmax(row)), int(np.nanargmin(row))
            pair = (group.completions[best], group.completions[worst])
            pair_of[index] = len(self._pairs)
            self._pairs.append(TokenizedGroup(group.prompt, pair, group.source))
            reference = (batch.reference_logps[index * size + k] for k in (best, worst))
            self._reference.append(
                tuple(logps[: len(ids)] for logps, ids in zip(reference, pair, strict=True))
            )
        return pair_of

    def _microbatches(self, indices: list[int]) -> list[Microbatch]:
        pairs = [self._pairs[index] for index in indices]
        return [
            Microbatch(tuple(indices[i] for i in micro.indices), micro.shape)
            for micro in epoch_order(pairs, self._collector.shapes, seed=None)
        ]
