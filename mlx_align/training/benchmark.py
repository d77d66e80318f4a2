"""Measure the speed of a run by a few of its updates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_align.algorithms.base import Algorithm
from mlx_align.algorithms.update import make_optimizer
from mlx_align.config import TrainConfig
from mlx_align.data.batching import microbatch_stream
from mlx_align.data.buckets import batch_limit, plan_shapes
from mlx_align.models.loading import open_model
from mlx_align.models.policy import make_policy
from mlx_align.training.metrics import Progress
from mlx_align.training.offline import OfflineTrainer
from mlx_align.training.setup import resolve_layout
from mlx_align.types import TokenizedGroup

# The first update also compiles and is not counted.
MEASURED_UPDATES = 3


def measure_rate(
    config: TrainConfig, algorithm: Algorithm, groups: Sequence[TokenizedGroup]
) -> float:
    """Tokens per second of a few real updates of the run; nothing is written."""
    assert config.model is not None
    policy = make_policy(config, open_model(config.model), resolve_layout(config))
    # The values of the reference's log-probs don't affect the time.
    zeros = [tuple(np.zeros(len(c), np.float32) for c in group.completions) for group in groups]
    scorer = algorithm.make_scorer(policy.model)
    reference = zeros if algorithm.needs_reference else None
    limit = batch_limit(config, packs=policy.model.packs and algorithm.packs)
    shapes = plan_shapes(groups, limit)
    trainer = OfflineTrainer(
        policy.model,
        algorithm.objective(policy, groups, reference, scorer),
        lambda start: microbatch_stream(groups, shapes, seed=config.seed, start=start),
        policy.start,
        make_optimizer(policy.start, config.weight_decay),
        accumulation=min(config.accumulation, 4),
        max_grad_norm=1.0,
    )
    with trainer.memory:
        results = [trainer.step(Progress(), 0.0) for _ in range(MEASURED_UPDATES)]
    # An update with a new shape includes compilation; the fastest one doesn't.
    return max(result.tokens / result.seconds for result in results[1:])
