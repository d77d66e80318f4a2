"""What an on-policy run says to prompts that it is not trained on, and what that earns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_align.models.roles import Tree
from mlx_align.rollout.experience import Prompt
from mlx_align.train.judging import Judge
from mlx_align.train.workplace import Workplace
from mlx_align.types import TokenizedGroup


class HeldOut:
    """Answers held-out prompts, always with the same draws, and remembers when that went best.

    Args:
        workplace: The run's roles; its shapes have to hold the prompts.
        prompts: The held-out ones.
        judge: A reward that is only looked at; None where there is none but the one trained on.
    """

    def __init__(
        self, workplace: Workplace, prompts: Sequence[Prompt], judge: Judge | None
    ) -> None:
        self._place, self._prompts, self._judge = workplace, prompts, judge
        self.groups: list[TokenizedGroup] = [prompt.tokens for prompt in prompts]
        self.best_step: int | None = None
        self.last_kl: dict[str, float] | None = None
        self._best = -math.inf
        # Mean and spread of both rewards at the first look.
        self._first: dict[str, list[float]] = {}

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON has it."""
        best = None if self.best_step is None else self._best
        return {
            "best_step": self.best_step,
            "best": best,
            "first": self._first,
            "last_kl": self.last_kl,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""
        self.best_step, self._first = state["best_step"], dict(state["first"])
        self._best = -math.inf if state["best"] is None else float(state["best"])
        self.last_kl = state["last_kl"]

    def look(self, tree: Tree) -> dict[str, float] | None:
        """Metrics of one completion by the role `tree` for each prompt; None without prompts.

        `reward` is the one trained on, `held_out` the one only looked at; `objective/kl`
        is k1 of KL(policy‖reference) in nats per completion.
        """
        if not self._prompts:
            return None
        place = self._place
        rollouts = place.sample(tree, self._prompts, (2,), group_size=1)
        metrics: dict[str, float] = {}
        for name, judge in (("reward", place.judge), ("held_out", self._judge)):
            if judge is None:
                continue
            table = judge(rollouts)
            given = table.total[~np.isnan(table.total)]
            if len(given) == 0:
                continue
            metrics[name] = float(given.mean())
            spread = float(given.std(ddof=1)) if len(given) > 1 else 0.0
            metrics[f"{name}_std"] = spread
            self._first.setdefault(name, [metrics[name], spread])
            if len(table.names) > 1:
                metrics.update(table.metrics())
        logps = place.logps(tree, rollouts)
        k1 = (logps - place.logps(place.policy.start, rollouts)).sum(axis=1, dtype=np.float64)
        error = float(k1.std(ddof=1) / math.sqrt(len(k1))) if len(k1) > 1 else float("nan")
        self.last_kl = {"mean": float(k1.mean()), "standard_error": error, "samples": len(k1)}
        metrics["objective/kl"] = float(k1.mean())
        metrics["completions/mean_length"] = float(rollouts.lengths.mean())
        metrics["completions/ended"] = float(rollouts.ended.mean())
        return metrics

    def best_so_far(self, metrics: Mapping[str, float], step: int) -> bool:
        """Whether this look is the best; by the held-out reward where there is one."""
        score = metrics.get("held_out", metrics.get("reward"))
        if score is None or score <= self._best:
            return False
        self._best, self.best_step = score, step
        return True

    def deviations(self, metrics: Mapping[str, float]) -> tuple[float, float] | None:
        """How far both rewards are from their start, in its deviations; None if unknown."""
        found = []
        for name in ("reward", "held_out"):
            mean, spread = self._first.get(name, (0.0, 0.0))
            if name not in metrics or spread <= 0:
                return None
            found.append((metrics[name] - mean) / spread)
        return found[0], found[1]
