"""Choose length buckets: the few shapes in which microbatches are padded.

`mx.compile` traces every new shape and never evicts one, so a dataset gets at most `MAX_SHAPES`
shapes, chosen to minimise padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlx_align.config import DEFAULT_BATCH_SIZE, TrainConfig
from mlx_align.types import TokenizedGroup

MAX_SHAPES = 12
# Widths are rounded up to a multiple of this many tokens, which suits vector units and gives fewer
# different shapes.
LENGTH_MULTIPLE = 8
# A shape that saves less than this fraction of all tokens is not worth compiling.
MIN_SAVING = 0.01
# Number of candidate widths for prompts and for completions. On 1,124 pairs of up to 512 tokens, 16
# candidates gave 39.7% padding, 32 gave 38.7% and 64 gave 38.5%.
CANDIDATES = 32
# Number of widths for prompts and completions of an on-policy run: 12 shapes, each compiled when it
# first occurs.
PROMPT_WIDTHS, COMPLETION_WIDTHS = 3, 4


class Shape(NamedTuple):
    """The size of a padded microbatch.

    Attributes:
        prompt: Width of the prompts, tokens.
        completion: Width of the completions, tokens.
        groups: Number of prompts, each with all its completions.
    """

    prompt: int
    completion: int
    groups: int


class PackedShape(NamedTuple):
    """The size of a packed microbatch: one row of prompts and one row of completions.

    Attributes:
        prompt: Length of the row of prompts, tokens.
        completion: Length of the row of completions, tokens.
        groups: Maximum number of prompts.
        longest: Maximum length of a completion, tokens.
    """

    prompt: int
    completion: int
    groups: int
    longest: int


AnyShape = Shape | PackedShape


@dataclass(frozen=True)
class BatchLimit:
    """The size of a microbatch: a number of groups, or a number of tokens.

    Attributes:
        groups: Groups per microbatch, if `tokens` is None.
        tokens: Maximum tokens per microbatch (one group may have more). Includes padding and all
            completions of a group, even those that run in another forward pass (the mismatched
            completions of KTO).
        packed: Whether groups are packed one after the other instead of padded to one length.
    """

    groups: int = 1
    tokens: int | None = None
    packed: bool = False

    def groups_per_microbatch(self, tokens: int) -> int:
        """Groups per microbatch if each group takes `tokens` tokens, including padding."""
        return self.groups if self.tokens is None else max(1, self.tokens // tokens)


def batch_limit(config: TrainConfig, *, packs: bool = False) -> BatchLimit:
    """The limit set by --batch-size or --batch-tokens.

    Args:
        config: The options of the run.
        packs: Whether both the model and the algorithm support packing.
    """
    if config.batch_tokens is not None:
        return BatchLimit(tokens=config.batch_tokens, packed=packs)
    return BatchLimit(config.batch_size or DEFAULT_BATCH_SIZE)


def plan_shapes(
    groups: Sequence[TokenizedGroup], limit: BatchLimit, max_shapes: int = MAX_SHAPES
) -> list[AnyShape]:
    """Choose at most `max_shapes` shapes that fit all groups, smallest first."""
    if limit.packed and limit.tokens is not None:
        return [*_plan_packed(groups, limit.tokens, max_shapes)]
    lengths = np.array([group_lengths(group) for group in groups])
    rows = max(len(group.completions) for group in groups)
    shapes = _choose_shapes(_CostTable(lengths, rows, limit), max_shapes)
    return [*sorted(shapes, key=lambda shape: group_tokens(shape, rows))]


def rollout_shapes(
    prompts: Sequence[TokenizedGroup], max_completion: int, batch_size: int
) -> list[AnyShape]:
    """Choose the shapes for the microbatches of an on-policy run, smallest first.

    Prompt widths are quantiles of the prompt lengths. The lengths of completions are not known in
    advance, so their widths are equal fractions of the longest.
    """
    lengths = (
        -(-np.array([len(group.prompt) for group in prompts]) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    )
    quantiles = np.linspace(0, 1, PROMPT_WIDTHS + 1)[1:]
    widths = np.unique(np.quantile(lengths, quantiles, method="higher"))
    fractions = np.arange(1, COMPLETION_WIDTHS + 1) / COMPLETION_WIDTHS
    parts = np.unique(
        np.ceil(max_completion * fractions / LENGTH_MULTIPLE).astype(int) * LENGTH_MULTIPLE
    )
    # No wider than the arrays of completions.
    parts = np.unique(np.minimum(parts, max_completion))
    shapes = [Shape(int(p), int(c), batch_size) for c in parts for p in widths]
    return [*sorted(shapes, key=lambda shape: shape.prompt + shape.completion)]


def _plan_packed(
    groups: Sequence[TokenizedGroup], tokens: int, max_shapes: int
) -> list[PackedShape]:
    """Choose one main shape of `tokens` tokens, and further shapes for groups that don't fit it.

    In the main shape, prompts and completions share the tokens in the same proportion as in the
    whole data, so that both rows fill up. The shapes for longer groups are chosen like padded ones,
    and have at least as many tokens as the main shape: short groups fill the remaining room.
    """
    lengths = np.array([packed_lengths(group) for group in groups])
    totals = lengths.sum(axis=0)
    split = round(tokens * totals[0] / totals.sum() / LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    widths = np.array([split, tokens // LENGTH_MULTIPLE * LENGTH_MULTIPLE - split])
    widths = np.minimum(widths, -(-totals // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    found = []
    fitting = (lengths <= widths).all(axis=1)
    if fitting.any():
        found.append((int(widths[0]), int(widths[1])))
    # Long prompts and long completions get separate shapes: a common one would have to be as wide
    # as both the longest prompt and the longest completions.
    long_prompts = lengths[:, 0] > widths[0]
    for long, kind in ((True, long_prompts), (False, ~long_prompts & ~fitting)):
        if not kind.any():
            continue
        table = _CostTable(lengths[kind], 1, BatchLimit())
        chosen = _choose_shapes(table, (max_shapes - 1) // 2)
        for prompt, completion, _ in sorted(chosen, key=lambda shape: group_tokens(shape, 1)):
            room = max(0, tokens - prompt - completion) // LENGTH_MULTIPLE * LENGTH_MULTIPLE
            found.append((prompt + room * (not long), completion + room * long))
    longest = np.array([group_lengths(group)[1] for group in groups])
    shapes = []
    for prompt, completion in dict.fromkeys(found):
        inside = (lengths <= [prompt, completion]).all(axis=1)
        filled = np.sort(lengths[inside], axis=0).cumsum(axis=0) <= [prompt, completion]
        widest = int(-(-longest[inside].max() // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
        shapes.append(PackedShape(prompt, completion, int(filled.sum(axis=0).min()), widest))
    return shapes


def _choose_shapes(table: _CostTable, max_shapes: int) -> list[Shape]:
    """Choose at most `max_shapes` shapes that fit all groups of the table with little padding.

    Greedy search followed by exchanges: starting from the shape that fits all groups, add the shape
    that saves most padding until it would save less than `MIN_SAVING`; then replace each shape in
    turn by a better one until none is found. Every shape is used by at least two full batches:
    otherwise the filler in its only batch would cost what the shape saves.
    """
    chosen = [table.largest]
    while len(chosen) < max_shapes:
        cost = table.cost(chosen)
        best = table.best_addition(chosen)
        if best is None or cost.sum() - table.cost([*chosen, best]).sum() < MIN_SAVING * cost.sum():
            break
        chosen.append(best)
    improved = True
    while improved:
        improved = False
        for place in range(1, len(chosen)):
            rest = chosen[:place] + chosen[place + 1 :]
            best = table.best_addition(rest)
            if best is not None and table.cost([*rest, best]).sum() < table.cost(chosen).sum():
                chosen[place] = best
                improved = True
    return [table.shapes[index] for index in chosen]


class _CostTable:
    """The cost in tokens of every group in every candidate shape.

    Groups whose lengths round up to the same candidate widths form one *cell*, so the size of the
    table does not depend on the number of groups.
    """

    def __init__(self, lengths: npt.NDArray[np.int64], rows: int, limit: BatchLimit) -> None:
        prompts, completions = (_widths(column) for column in lengths.T)
        grid = [(int(p), int(c)) for p in prompts for c in completions]
        most = len(lengths)
        self.shapes = [
            Shape(p, c, min(limit.groups_per_microbatch(p + rows * c), most)) for p, c in grid
        ]
        widths = np.array(grid)
        cells, self._count = np.unique(
            np.stack(
                [
                    prompts[np.searchsorted(prompts, lengths[:, 0])],
                    completions[np.searchsorted(completions, lengths[:, 1])],
                ],
                axis=1,
            ),
            axis=0,
            return_counts=True,
        )
        tokens = widths @ np.array([1, rows])
        fits = (cells[:, None] <= widths[None]).all(axis=2)
        # (cells, shapes): tokens of one group; larger than any other cost if it does not fit.
        self._cost = np.where(fits, tokens[None], tokens.max() + 1)
        self._min_groups = 2 * np.array([shape.groups for shape in self.shapes])

    @property
    def largest(self) -> int:
        """Index of the shape that fits all groups."""
        return len(self.shapes) - 1

    def cost(self, chosen: Sequence[int]) -> npt.NDArray[np.int64]:
        """Tokens of each cell's groups in the smallest chosen shape that fits, (cells,)."""
        cost: npt.NDArray[np.int64] = self._count * self._cost[:, list(chosen)].min(axis=1)
        return cost

    def best_addition(self, chosen: Sequence[int]) -> int | None:
        """The shape that saves most in addition to the chosen ones, if enough groups use one."""
        now = self._cost[:, list(chosen)].min(axis=1)[:, None]
        saved = np.maximum(now - self._cost, 0)
        enough = self._count @ (saved > 0) >= self._min_groups
        total = np.where(enough, self._count @ saved, 0)
        best = int(total.argmax())
        return best if total[best] > 0 else None


def _widths(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Candidate widths: quantiles of the rounded lengths, including the longest."""
    rounded = -(-lengths // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return np.unique(np.quantile(rounded, np.linspace(0, 1, CANDIDATES), method="higher"))


def group_lengths(group: TokenizedGroup) -> tuple[int, int]:
    """Tokens of the prompt and of the longest completion."""
    return len(group.prompt), max(len(completion) for completion in group.completions)


def packed_lengths(group: TokenizedGroup) -> tuple[int, int]:
    """Tokens of the prompt and of all completions together."""
    return len(group.prompt), sum(len(completion) for completion in group.completions)


def microbatch_tokens(shape: AnyShape, rows: int) -> int:
    """Tokens of a microbatch whose groups have `rows` completions, including padding."""
    if isinstance(shape, PackedShape):
        return shape.prompt + shape.completion
    return shape.groups * group_tokens(shape, rows)


def group_tokens(shape: Shape, rows: int) -> int:
    """Tokens of one group of `rows` completions in a shape, including padding."""
    return shape.prompt + rows * shape.completion
