"""The steps of an on-policy run, and its evaluation on held-out prompts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.optimizers as optim
import numpy as np

from mlx_align.algorithms.base import OnPolicyAlgorithm
from mlx_align.config import OnPolicyConfig
from mlx_align.errors import TrainingError
from mlx_align.models.weights import AdapterWeights
from mlx_align.planning.duration import rollout_batches
from mlx_align.rollout.collector import RolloutBatch, RolloutCollector
from mlx_align.rollout.reward_functions import as_data
from mlx_align.rollout.rewards import Rewards
from mlx_align.rollout.sampler import Prompt
from mlx_align.system.progress import Console
from mlx_align.tracking.diagnostics import text_metrics
from mlx_align.tracking.run_dir import append_samples
from mlx_align.training.evaluation import EvaluationResult, mean_and_error
from mlx_align.training.metrics import MIN_TIMED_STEPS, Progress, StepResult, mean_row
from mlx_align.types import TokenizedGroup

# Largest mean |ratio − 1| in the first update of a rollout batch, when the policy is unchanged.
RATIO_TOLERANCE = 1e-3


class OnPolicyTrainer:
    """Steps that are one rollout batch: sample, reward, compute log-probs, update.

    Args:
        algorithm: Makes the updates.
        collector: Samples and rewards completions.
        evaluation: Measures held-out prompts.
        config: The options.
        run: The run folder; completions are added to its samples.jsonl.
    """

    step_name = "batch"
    on_policy = True

    def __init__(
        self,
        algorithm: OnPolicyAlgorithm,
        collector: RolloutCollector,
        evaluation: RolloutEvaluation,
        config: OnPolicyConfig,
        run: Path,
    ) -> None:
        self.algorithm, self.title = algorithm, algorithm.title
        self.collector, self.evaluation = collector, evaluation
        self.memory = collector.memory
        self.mid_step = False
        self.total_steps = rollout_batches(config, len(collector.prompts))
        self._run = run
        # Metrics of the rollout batches since the last report.
        self._rows: list[dict[str, float]] = []
        # Completions per second of the rollout batches of this process.
        self._rates: list[float] = []

    @property
    def weights(self) -> dict[str, AdapterWeights]:
        """The algorithm's weights, by name."""
        return self.algorithm.weights

    @property
    def optimizers(self) -> dict[str, optim.Optimizer]:
        """The algorithm's optimizers, by name."""
        return self.algorithm.optimizers

    @property
    def best_step(self) -> int | None:
        """The rollout batch after which the held-out reward was highest."""
        return self.evaluation.best_step

    @property
    def start_is_best(self) -> bool:
        """Whether the held-out reward has never been higher than at the start."""
        return self.evaluation.start_is_best

    def prepare(self, console: Console) -> str:
        """Run the algorithm's preparation."""
        return self.algorithm.prepare(console)

    def step(
        self,
        progress: Progress,
        learning_rate: float,
        raise_if_interrupted: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Collect a rollout batch and make its updates.

        Nothing changes before the first update: an abandoned batch is sampled again, with the same
        result.

        Raises:
            TrainingError: A loss is not finite, a reward failed, or the ratios of the first update
                are not 1.
        """
        began = time.perf_counter()
        step, algorithm = progress.step, self.algorithm
        batch = self.collector.collect(
            self.weights["policy"],
            progress.microbatches,
            step,
            raise_if_interrupted,
            dynamic_sampling=algorithm.dynamic_sampling,
        )
        self.mid_step = True
        result = algorithm.update(batch, step, learning_rate)
        _check_ratio(result.first_ratio_deviation)
        self.mid_step = False
        completions = batch.completions
        metrics = {
            **batch.metrics(),
            **result.metrics,
            **text_metrics([ids.tolist() for ids in completions.token_ids()]),
            "learning_rate": learning_rate,
        }
        if algorithm.dynamic_sampling:
            metrics["dynamic/replaced"] = batch.dropped
        seconds = time.perf_counter() - began
        append_samples(self._run, sample_rows(batch, step + 1))
        self._rates.append(len(completions.texts) / seconds)
        self._rows.append({**metrics, "tokens_per_second": completions.num_tokens / seconds})
        return StepResult(
            metrics=metrics,
            microbatches=batch.prompts_drawn,
            groups=batch.prompts_drawn,
            tokens=completions.num_tokens,
            seconds=seconds,
            skipped=[
                f"an update of rollout batch {step + 1} skipped: {reason}"
                for reason in result.skipped
            ],
        )

    def report(self, progress: Progress) -> dict[str, float] | None:
        """Means over the rollout batches since the last report."""
        if not self._rows:
            return None
        row = mean_row(self._rows, progress, self.memory.peak_bytes)
        self._rows = []
        return row

    def evaluate(self, step: int) -> EvaluationResult | None:
        """Metrics on the held-out prompts."""
        return self.evaluation.evaluate(step, self.weights["policy"])

    def check_trained(self, progress: Progress) -> None:
        """Check that at least one update was made.

        Raises:
            TrainingError: No optimizer made an update.
        """
        made = any(one.step.item() for one in self.optimizers.values())
        if progress.skipped and not made:
            raise TrainingError(
                f"every update was skipped, all {progress.skipped}: no loss was finite; lower "
                "--learning-rate, and check the rewards"
            )

    def state(self) -> dict[str, Any]:
        """State of algorithm and evaluation, and the batches not reported yet."""
        return {
            "learner": self.algorithm.state(),
            "held_out": self.evaluation.state(),
            "rows": self._rows,
        }

    def restore(
        self, weights: Mapping[str, AdapterWeights], state: Mapping[str, Any], progress: Progress
    ) -> None:
        """Continue from a checkpoint."""
        self.algorithm.weights = dict(weights)
        self.algorithm.restore(state["learner"])
        self.evaluation.restore(state["held_out"])
        self._rows = [dict(row) for row in state["rows"]]

    def rate(self) -> float | None:
        """Median completions per second: early batches also compile.

        None if too few rollout batches were timed.
        """
        if len(self._rates) < MIN_TIMED_STEPS:
            return None
        return float(np.median(self._rates))


def sample_rows(batch: RolloutBatch, step: int) -> list[dict[str, Any]]:
    """Rows of samples.jsonl: the completions of a rollout batch and their rewards."""
    completions, rewards = batch.completions, batch.rewards
    size = completions.group_size
    return [
        {
            "step": step,
            "source": completions.groups[n // size].source,
            "prompt": as_data(completions.prompts[n // size].text.prompt),
            "completion": text,
            "ended": bool(completions.finished[n]),
            "tokens": int(completions.lengths[n]),
            "reward": float(rewards.total[n]),
            "rewards": dict(zip(rewards.names, map(float, rewards.values[n]), strict=True)),
            "kl": float(batch.kl_by_completion[n]),
        }
        for n, text in enumerate(completions.texts)
    ]


def _check_ratio(deviation: float | None) -> None:
    if deviation is not None and not deviation <= RATIO_TOLERANCE:
        raise TrainingError(
            "in the first update of a rollout batch, the probability ratios of new to old policy "
            f"differ from 1 by {deviation:.1e} on average, before anything was updated: a bug, or "
            "a model whose outputs depend on its batch; please report it, with the model's name"
        )


class RolloutEvaluation:
    """Held-out rewards of an on-policy run: one completion per held-out prompt.

    The random seed is the same in every evaluation. The best result after the start is the highest
    held-out reward, or the highest training reward if there is no held-out one.

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
        self.best_kl: dict[str, float] | None = None
        self._best = -math.inf
        self._start: float | None = None
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
            "best_kl": self.best_kl,
            "start": self._start,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state` returned."""
        # Older versions counted the start among the results, as step 0.
        self.best_step, self._first = state["best_step"] or None, dict(state["first"])
        self._best = -math.inf if self.best_step is None else float(state["best"])
        self.last_kl, self.best_kl = state["last_kl"], state.get("best_kl")
        first = self._first.get("held_out", self._first.get("reward"))
        self._start = state.get("start", None if first is None else float(first[0]))

    def evaluate(self, step: int, weights: AdapterWeights) -> EvaluationResult | None:
        """Metrics of `weights` after rollout batch `step`; None without held-out prompts."""
        metrics = self.measure(weights)
        if metrics is None:
            return None
        best = self._is_best(metrics, step)
        return EvaluationResult(metrics, len(self._prompts), best, self.deviations(metrics))

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
        self.last_kl = mean_and_error(k1)
        metrics["objective/kl"] = float(k1.mean())
        metrics["completions/mean_length"] = float(completions.lengths.mean())
        metrics["completions/ended"] = float(completions.finished.mean())
        return metrics

    @property
    def start_is_best(self) -> bool:
        """Whether there was an evaluation at the start, and no better one since."""
        return self._start is not None and self._best <= self._start

    def _is_best(self, metrics: Mapping[str, float], step: int) -> bool:
        score = metrics.get("held_out", metrics.get("reward"))
        if step == 0:
            self._start = score
        if step == 0 or score is None or score <= self._best:
            return False
        self._best, self.best_step, self.best_kl = score, step, self.last_kl
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
