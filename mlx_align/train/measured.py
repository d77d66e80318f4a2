"""The speed of a run before it starts: a few of its updates, for real."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_align.config import TrainConfig
from mlx_align.data.batching import microbatch_stream
from mlx_align.data.shapes import batch_limit, plan_shapes
from mlx_align.models.loading import open_model
from mlx_align.train.loop import LoopHooks, LoopSettings, Progress, make_optimizer, train
from mlx_align.train.setup import make_policy, resolve_layout
from mlx_align.train.task import Task
from mlx_align.types import TokenizedGroup

# The first also compiles, and is not counted.
MEASURED_UPDATES = 3


def measured_rate(config: TrainConfig, task: Task, groups: Sequence[TokenizedGroup]) -> float:
    """Tokens per second of a few real updates of the run; nothing is written."""
    assert config.model is not None
    policy = make_policy(config, open_model(config.model), resolve_layout(config))
    # What the reference says does not change how long a step takes.
    zeros = [tuple(np.zeros(len(c), np.float32) for c in group.completions) for group in groups]
    scorer = task.scorer(policy.model)
    objective = task.objective(policy, groups, zeros if task.needs_reference else None, scorer)
    shapes = plan_shapes(groups, batch_limit(config, packs=policy.model.packs and task.packs))
    stream = microbatch_stream(groups, shapes, seed=config.seed)
    accumulation = min(config.grad_accumulation_steps, 4)
    settings = LoopSettings(MEASURED_UPDATES, accumulation, lambda _: 0.0, 1.0, 1, 0, 0)
    rates: list[float] = []
    hooks = LoopHooks(
        report=lambda _, row: rates.append(row["tokens_per_second"]),
        evaluate=lambda *_: False,
        save=lambda *_: None,
    )
    optimizer = make_optimizer(policy.start, config.weight_decay)
    train(policy.model, policy.start, optimizer, objective, stream, settings, hooks, Progress())
    # A batch of a new shape compiles anew: the fastest update is one that did not.
    return max(rates[1:])
