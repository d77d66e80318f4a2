"""Evaluation on held-out data during a run: metrics, sampled answers, KL from the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlx_align.algorithms.base import Algorithm, CompletionLogps
from mlx_align.config import TrainConfig
from mlx_align.data.batching import groups_per_batch
from mlx_align.data.buckets import BatchLimit, batch_limit, plan_shapes
from mlx_align.inference.scoring import Scorer, score_groups
from mlx_align.models.loading import ModelFolder
from mlx_align.models.policy import Policy
from mlx_align.models.weights import AdapterWeights
from mlx_align.rollout.collector import RolloutCollector
from mlx_align.rollout.rewards import Rewards
from mlx_align.rollout.sampler import Generations, Prompt, as_groups, generate
from mlx_align.types import TokenizedGroup


class EvaluationResult(NamedTuple):
    """Held-out metrics after a step.

    Attributes:
        metrics: The metrics by name, without `eval/`.
        is_best: Whether the result is the best so far.
        deviations: Changes of the training reward and the held-out reward since the first
            evaluation, in units of its standard deviation; None if there are not two rewards.
    """

    metrics: dict[str, float]
    is_best: bool
    deviations: tuple[float, float] | None = None


class Evaluation:
    """Held-out metrics of an offline run. The best result is the lowest loss after an update.

    Args:
        algorithm: Computes the metrics.
        groups: The held-out groups, the same for every evaluation.
        scorer: Runs them.
        reference: Token log-probs of the reference; empty without a reference.
        limit: The limit of batches.

    Attributes:
        best: `step` and `loss` of the best result; None before the first update.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        groups: Sequence[TokenizedGroup],
        scorer: Scorer,
        reference: CompletionLogps,
        limit: BatchLimit,
    ) -> None:
        self._algorithm, self._scorer = algorithm, scorer
        self._groups, self._reference = groups, reference
        self._shapes = plan_shapes(groups, limit) if groups else []
        self.best: dict[str, float] | None = None

    def evaluate(self, step: int, weights: AdapterWeights) -> EvaluationResult | None:
        """Metrics of `weights` after update `step`; None without held-out groups."""
        if not self._groups:
            return None
        if step == 0 and self._algorithm.has_reference:
            # The policy starts as the reference, whose log-probs are known.
            logps = self._reference
        else:
            logps = score_groups(
                self._scorer,
                weights,
                self._groups,
                self._shapes,
                per_token=self._algorithm.per_token,
            )
        metrics = self._algorithm.evaluate(logps, self._reference, self._groups)
        lowest = math.inf if self.best is None else self.best["loss"]
        is_best = step > 0 and metrics["loss"] < lowest
        if is_best:
            self.best = {"step": step, "loss": metrics["loss"]}
        return EvaluationResult(metrics, is_best)

    def restore_best(self, best: Any) -> None:
        """Restore `best` from a checkpoint.

        Raises:
            KeyError, TypeError, ValueError: It is not a value of `best`.
        """
        if best is not None:
            best = {"step": int(best["step"]), "loss": float(best["loss"])}
        self.best = best


class RolloutEvaluation:
    """Held-out rewards of an on-policy run: one completion per held-out prompt.

    The random seed is the same in every evaluation. The best result is the highest held-out
    reward, or the highest training reward if there is no held-out one.

    Args:
        collector: Samples and scores; its shapes must fit the prompts.
        prompts: The held-out prompts.
        held_out_rewards: Rewards that are not trained on, or None.
    """

    def __init__(
        self,
        collector: RolloutCollector,
        prompts: Sequence[Prompt],
        held_out_rewards: Rewards | None,
    ) -> None:
        self._collector, self._prompts = collector, prompts
        self._held_out_rewards = held_out_rewards
        self.groups: list[TokenizedGroup] = [prompt.tokens for prompt in prompts]
        self.best_step: int | None = None
        self.last_kl: dict[str, float] | None = None
        self._best = -math.inf
        # Mean and standard deviation of both rewards in the first evaluation.
        self._first: dict[str, list[float]] = {}

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        best = None if self.best_step is None else self._best
        return {
            "best_step": self.best_step,
            "best": best,
            "first": self._first,
            "last_kl": self.last_kl,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state` returned."""
        self.best_step, self._first = state["best_step"], dict(state["first"])
        self._best = -math.inf if state["best"] is None else float(state["best"])
        self.last_kl = state["last_kl"]

    def evaluate(self, step: int, weights: AdapterWeights) -> EvaluationResult | None:
        """Metrics of `weights` after rollout batch `step`; None without held-out prompts."""
        metrics = self.measure(weights)
        if metrics is None:
            return None
        return EvaluationResult(metrics, self._is_best(metrics, step), self.deviations(metrics))

    def measure(self, weights: AdapterWeights) -> dict[str, float] | None:
        """Metrics of one completion per prompt; None without prompts.

        `reward` is the training reward, `held_out` the held-out one, and `objective/kl` the k1
        estimate of KL(policy‖reference) in nats per completion.
        """
        if not self._prompts:
            return None
        collector = self._collector
        completions = collector.sample(weights, self._prompts, (2,), group_size=1)
        metrics: dict[str, float] = {}
        kinds = {"reward": collector.rewards, "held_out": self._held_out_rewards}
        for name, rewards in kinds.items():
            if rewards is None:
                continue
            table = rewards(completions)
            given = table.total[~np.isnan(table.total)]
            if len(given) == 0:
                continue
            metrics[name] = float(given.mean())
            spread = float(given.std(ddof=1)) if len(given) > 1 else 0.0
            metrics[f"{name}_std"] = spread
            self._first.setdefault(name, [metrics[name], spread])
            if len(table.names) > 1:
                metrics.update(table.metrics())
        logps = collector.token_logprobs(weights, completions)
        reference = collector.token_logprobs(collector.policy.start, completions)
        k1 = (logps - reference).sum(axis=1, dtype=np.float64)
        self.last_kl = _mean_and_error(k1)
        metrics["objective/kl"] = float(k1.mean())
        metrics["completions/mean_length"] = float(completions.lengths.mean())
        metrics["completions/ended"] = float(completions.finished.mean())
        return metrics

    def _is_best(self, metrics: Mapping[str, float], step: int) -> bool:
        score = metrics.get("held_out", metrics.get("reward"))
        if score is None or score <= self._best:
            return False
        self._best, self.best_step = score, step
        return True

    def deviations(self, metrics: Mapping[str, float]) -> tuple[float, float] | None:
        """Changes of training and held-out reward since the first evaluation.

        In units of the first evaluation's standard deviation. None if a reward is missing or did
        not vary.
        """
        found = []
        for name in ("reward", "held_out"):
            mean, spread = self._first.get(name, (0.0, 0.0))
            if name not in metrics or spread <= 0:
                return None
            found.append((metrics[name] - mean) / spread)
        return found[0], found[1]


def held_out_groups(valid: Sequence[TokenizedGroup], config: TrainConfig) -> list[TokenizedGroup]:
    """The held-out groups of an evaluation; the same ones every time."""
    if config.val_batches == -1 or not valid:
        return list(valid)
    wanted = round(config.val_batches * groups_per_batch(valid, batch_limit(config)))
    order = np.random.default_rng(config.seed).permutation(len(valid))
    return [valid[i] for i in sorted(order[:wanted])]


def answers(
    policy: Policy,
    weights: AdapterWeights,
    prompts: Sequence[TokenizedGroup],
    config: TrainConfig,
) -> Generations:
    """Greedy completions of held-out prompts."""
    if not prompts:
        return Generations([], [])
    return generate(
        policy.model,
        weights,
        prompts,
        max_tokens=config.sample_tokens,
        temperature=0.0,
        seed=config.seed,
    )


def prompt_texts(folder: ModelFolder, groups: Sequence[TokenizedGroup]) -> list[str]:
    """The prompts as text, without special tokens."""
    decode = folder.tokenizer.decode
    return [decode(group.prompt.tolist(), skip_special_tokens=True) for group in groups]


def kl_from_reference(
    scorer: Scorer,
    policy: Policy,
    weights: AdapterWeights,
    prompts: Sequence[TokenizedGroup],
    config: TrainConfig,
    limit: BatchLimit,
) -> dict[str, float] | None:
    """KL(policy‖reference) in nats per sequence with its standard error; None without prompts.

    The k1 estimator on the policy's own samples at temperature 1, truncated at `sample_tokens`:
    unbiased for the distribution over such completions.
    """
    if not prompts:
        return None
    sampled = generate(
        policy.model,
        weights,
        prompts,
        max_tokens=config.sample_tokens,
        temperature=1.0,
        seed=config.seed + 1,
    )
    groups = as_groups(prompts, sampled)
    shapes = plan_shapes(groups, limit)
    logps = score_groups(scorer, weights, groups, shapes)
    reference = score_groups(scorer, policy.start, groups, shapes)
    k1 = [(p[0] - r[0]).sum(dtype=np.float64) for p, r in zip(logps, reference, strict=True)]
    return _mean_and_error(np.array(k1))


def _mean_and_error(values: np.ndarray) -> dict[str, float]:
    count = len(values)
    error = float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else float("nan")
    return {"mean": float(values.mean()), "standard_error": error, "samples": count}
