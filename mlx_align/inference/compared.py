"""Log-probs of the same completions under policy and reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np

from mlx_align.data.batching import scored
from mlx_align.data.shapes import BatchLimit, plan_shapes
from mlx_align.inference.finished import Roles
from mlx_align.inference.score import Scorer, score_groups
from mlx_align.inference.statistics import Floats
from mlx_align.types import TokenizedGroup

# Tokens of a microbatch, padding counted; one group at least, whatever its size.
BATCH_TOKENS = 2048


class Bar(Protocol):
    """One piece of counted work."""

    def advance(self, count: int = 1) -> None:
        """So much more is done."""


Bars = Callable[[str, int], AbstractContextManager[Bar]]


def compared_logps(
    scorer: Scorer, roles: Roles, groups: Sequence[TokenizedGroup], label: str, bars: Bars
) -> tuple[Floats, Floats]:
    """Log-probs of the reference, and log-ratios policy − reference: nats, (groups, completions).

    A log-ratio is the sum of differences per token; all groups have equally many completions.
    """
    shapes = plan_shapes(groups, BatchLimit(tokens=BATCH_TOKENS))
    found = []
    with bars(label, 2 * len(groups)) as bar:
        for tree in (roles.policy, roles.reference):
            found.append(
                score_groups(
                    scorer, tree, groups, shapes, on_batch=lambda at, _: bar.advance(len(at))
                )
            )
    policy, reference = found
    size = len(groups), len(groups[0].completions)
    logps, logratios = np.zeros(size), np.zeros(size)
    for i, group in enumerate(groups):
        for k in range(size[1]):
            mask = scored(group, k)
            theirs = reference[i][k][mask].astype(np.float64)
            logps[i, k] = theirs.sum()
            logratios[i, k] = (policy[i][k][mask] - theirs).sum()
    return logps, logratios
