"""Which shapes batches come in: few, with little padding.

Every new shape is traced and compiled anew and never forgotten, so a data set gets at most
`MAX_SHAPES` of them, chosen where they save most padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlx_align.types import TokenizedGroup

MAX_SHAPES = 12
# Widths are rounded up to this many tokens: what vector units like, and fewer odd shapes.
ROUND = 8
# A shape that saves less than this share of all tokens is not worth a compilation.
MIN_SAVING = 0.01


class Shape(NamedTuple):
    """What a microbatch holds when it is full.

    Attributes:
        prompt: Width of its prompts, tokens.
        completion: Width of its completions, tokens.
        groups: Its prompts, each with all its completions.
    """

    prompt: int
    completion: int
    groups: int


@dataclass(frozen=True)
class BatchLimit:
    """How many groups a microbatch holds: always the same number."""

    groups: int = 1

    def of(self, tokens: int) -> int:
        """Groups of a microbatch whose groups take `tokens` each, padding counted."""
        return self.groups


def plan_shapes(
    groups: Sequence[TokenizedGroup], limit: BatchLimit, max_shapes: int = MAX_SHAPES
) -> list[Shape]:
    """At most `max_shapes` shapes that hold every group with little padding, cheapest first.

    Greedy: from one shape that holds all, add the shape that saves most padded tokens, until it
    would save less than `MIN_SAVING` or the groups would not fill its batches.
    """
    lengths = np.array([lengths_of(group) for group in groups])
    rows = max(len(group.completions) for group in groups)
    rounded = -(-lengths // ROUND) * ROUND

    def shape_of(widths: npt.NDArray[np.int64]) -> Shape:
        prompt, completion = (int(width) for width in widths)
        return Shape(prompt, completion, limit.of(prompt + rows * completion))

    shapes = [shape_of(rounded.max(axis=0))]
    quantiles = np.unique(
        np.quantile(rounded, np.linspace(0, 1, 13), axis=0, method="higher"), axis=0
    )
    candidates = [
        shape_of(np.array([p, c]))
        for p in np.unique(quantiles[:, 0])
        for c in np.unique(quantiles[:, 1])
    ]
    cost = np.full(len(groups), tokens_of(shapes[0], rows))
    while len(shapes) < max_shapes:
        best: tuple[int, Shape, np.ndarray] | None = None
        for shape in candidates:
            tokens = tokens_of(shape, rows)
            better = (rounded <= shape[:2]).all(axis=1) & (tokens < cost)
            # Filler in a batch that is never full would eat what the shape saves.
            if better.sum() < 2 * shape.groups:
                continue
            saved = int((cost[better] - tokens).sum())
            if best is None or saved > best[0]:
                best = (saved, shape, np.where(better, tokens, cost))
        if best is None or best[0] < MIN_SAVING * cost.sum():
            break
        shapes.append(best[1])
        cost = best[2]
    return sorted(shapes, key=lambda shape: tokens_of(shape, rows))


def lengths_of(group: TokenizedGroup) -> tuple[int, int]:
    """Tokens of a group's prompt and of its longest completion."""
    return len(group.prompt), max(len(completion) for completion in group.completions)


def tokens_of(shape: Shape, rows: int) -> int:
    """Tokens, padding counted, of one group of `rows` completions in a shape."""
    return shape.prompt + rows * shape.completion
