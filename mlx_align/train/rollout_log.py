"""What an on-policy run writes of its rollout batches: rows of metrics, and what was said."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mlx_align.config import OnPolicyConfig
from mlx_align.plan.machine import this_machine
from mlx_align.plan.timing import rate_key, store_rate
from mlx_align.rollout.rewards import as_data
from mlx_align.train import runlog
from mlx_align.train.display import Display
from mlx_align.train.loop import Progress
from mlx_align.train.pace import ENOUGH
from mlx_align.train.publish import Publication
from mlx_align.train.run_ahead import RunAhead
from mlx_align.train.setup import Policy
from mlx_align.train.workplace import Experience


class RolloutLog:
    """Reports of a run.

    Attributes:
        rows: Metrics of the rollout batches since the last report; part of checkpoints.
    """

    def __init__(
        self,
        config: OnPolicyConfig,
        run: Path,
        total: int,
        memory: RunAhead,
        display: Display,
        publication: Publication,
    ) -> None:
        self._config, self._run, self._total, self._memory = config, run, total, memory
        self._display, self._publication = display, publication
        self.rows: list[dict[str, float]] = []
        # Completions and seconds of the rollout batches of this process.
        self._paces: list[tuple[int, float]] = []

    def add(
        self, experience: Experience, row: dict[str, float], at: Progress, seconds: float
    ) -> None:
        """Keep what was said; keep the row, and write and say the means where one is due."""
        rollouts = experience.rollouts
        self._paces.append((len(rollouts.texts), seconds))
        runlog.append_samples(self._run, sampled(experience, at.step))
        self.rows.append({**row, "tokens_per_second": rollouts.tokens / seconds})
        if at.step in (1, self._total) or at.step % self._config.steps_per_report == 0:
            self.flush(at)

    def flush(self, at: Progress) -> None:
        """Write and say the means of the rows since the last report, if there are any."""
        if not self.rows:
            return
        names = dict.fromkeys(name for kept in self.rows for name in kept)
        means = {
            name: float(np.mean([kept[name] for kept in self.rows if name in kept]))
            for name in names
        }
        self.rows = []
        # Where all updates were skipped, the loss is null: a row has one.
        means.setdefault("loss", math.nan)
        memory = {"peak_memory_bytes": self._memory.peak_bytes, "num_tokens": at.tokens}
        skipped = {"skipped": at.skipped} if at.skipped else {}
        runlog.append_row(self._run, {"step": at.step, **means, **memory, **skipped})
        left = runlog.say_seconds((self._total - at.step) * at.seconds / at.step)
        said = runlog.say_metrics({**means, **memory})
        self._display.note(f"  batch {at.step}/{self._total}: {said}, {left} left")
        self._publication.tell(at.step, at.seconds)

    def evaluated(self, metrics: dict[str, float], at: Progress) -> None:
        """Write and say what was seen on held-out prompts."""
        row = {f"eval/{name}": value for name, value in metrics.items()}
        runlog.append_row(self._run, {"step": at.step, **row})
        if at.step:
            self._display.note(f"  held-out after {at.step}: {runlog.say_metrics(metrics)}")
            self._publication.tell(at.step, at.seconds, evaluated=True)

    def store_rate(self, command: str, policy: Policy) -> None:
        """Keep the run's speed for later plans: the median, as early batches also compile."""
        if len(self._paces) < ENOUGH:
            return
        path, machine = policy.model.folder.path, this_machine().name
        key = rate_key(command, path, self._config, policy.layout, machine)
        store_rate(key, float(np.median([count / seconds for count, seconds in self._paces])))


def sampled(experience: Experience, step: int) -> list[dict[str, Any]]:
    """Rows of samples.jsonl: what was said, and what it earned."""
    rollouts, rewards = experience.rollouts, experience.rewards
    size = rollouts.group_size
    return [
        {
            "step": step,
            "source": rollouts.groups[n // size].source,
            "prompt": as_data(rollouts.prompts[n // size].text.prompt),
            "completion": text,
            "ended": bool(rollouts.ended[n]),
            "tokens": int(rollouts.lengths[n]),
            "reward": float(rewards.total[n]),
            "rewards": dict(zip(rewards.names, map(float, rewards.values[n]), strict=True)),
            "kl": float(experience.kl_by_completion[n]),
        }
        for n, text in enumerate(rollouts.texts)
    ]
