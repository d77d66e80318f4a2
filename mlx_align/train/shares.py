"""Sums of metrics and counts that the offline objectives share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from mlx_align.data.batching import Microbatch
from mlx_align.losses.masking import weighted_sum
from mlx_align.train.update import Sums
from mlx_align.types import TokenizedGroup


def weighted_metrics(metrics: Mapping[str, mx.array], weight: mx.array) -> Sums:
    """Sums of per-row metrics (B,) over rows that count, and the sum of their weights."""
    sums = {name: weighted_sum(mx.stop_gradient(v), weight) for name, v in metrics.items()}
    return {**sums, "weight": weight.sum()}


def size_of(
    groups: Sequence[TokenizedGroup], micro: Microbatch, completions: int | None = None
) -> tuple[int, int]:
    """Groups of a microbatch and their tokens, counting the first `completions` of each."""
    chosen = [groups[i] for i in micro.indices]
    tokens = sum(len(g.prompt) + sum(map(len, g.completions[:completions])) for g in chosen)
    return len(chosen), tokens
