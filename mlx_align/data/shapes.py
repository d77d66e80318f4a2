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

from mlx_align.config import DEFAULT_BATCH_SIZE, TrainConfig
from mlx_align.types import TokenizedGroup

MAX_SHAPES = 12
# Widths are rounded up to this many tokens: what vector units like, and fewer odd shapes.
ROUND = 8
# A shape that saves less than this share of all tokens is not worth a compilation.
MIN_SAVING = 0.01
# Widths that are tried, of prompts and of completions. On 1,124 pairs of up to 512 tokens 16 left
# 39.7% padding, 32 38.7%, 64 38.5%.
CANDIDATES = 32
# Widths that prompts and completions of an on-policy run are padded to: 12 shapes, each compiled
# when it is first met.
PROMPT_WIDTHS, COMPLETION_WIDTHS = 3, 4


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


class PackedShape(NamedTuple):
    """What a packed microbatch holds: two rows, filled with whole groups.

    Attributes:
        prompt: Tokens of the row of prompts.
        completion: Tokens of the row of completions.
        groups: The most prompts that can stand in it.
        longest: The longest completion that can.
    """

    prompt: int
    completion: int
    groups: int
    longest: int


AnyShape = Shape | PackedShape


@dataclass(frozen=True)
class BatchLimit:
    """How many groups a microbatch holds: always as many, or as many as fit.

    Attributes:
        groups: The number, whatever their shape.
        tokens: Where it is set, what decides instead: as many groups as fit so many tokens, at
            least one. Padding counts, and so do all completions of a group, those that do not run
            beside each other too (KTO's mismatched ones).
        packed: Whether groups then stand one behind the other, instead of padded to one length.
    """

    groups: int = 1
    tokens: int | None = None
    packed: bool = False

    def of(self, tokens: int) -> int:
        """Groups of a microbatch whose groups take `tokens` each, padding counted."""
        return self.groups if self.tokens is None else max(1, self.tokens // tokens)


def batch_limit(config: TrainConfig, *, packs: bool = False) -> BatchLimit:
    """What --batch-size or --batch-tokens says; `packs` is whether model and task can be packed."""
    if config.batch_tokens is not None:
        return BatchLimit(tokens=config.batch_tokens, packed=packs)
    return BatchLimit(config.batch_size or DEFAULT_BATCH_SIZE)


def plan_shapes(
    groups: Sequence[TokenizedGroup], limit: BatchLimit, max_shapes: int = MAX_SHAPES
) -> list[AnyShape]:
    """At most `max_shapes` shapes that hold every group with little padding, cheapest first."""
    if limit.packed and limit.tokens is not None:
        return [*_plan_packed(groups, limit.tokens, max_shapes)]
    lengths = np.array([lengths_of(group) for group in groups])
    rows = max(len(group.completions) for group in groups)
    shapes = _choose(_Table(lengths, rows, limit), max_shapes)
    return [*sorted(shapes, key=lambda shape: tokens_of(shape, rows))]


def rollout_shapes(
    prompts: Sequence[TokenizedGroup], max_completion: int, batch_size: int
) -> list[AnyShape]:
    """The shapes that microbatches of a run come in, cheapest first.

    Prompt widths are quantiles of the prompts' lengths; what completions will be like, nobody
    knows, so their widths are equal parts of the longest.
    """
    lengths = -(-np.array([len(group.prompt) for group in prompts]) // ROUND) * ROUND
    quantiles = np.linspace(0, 1, PROMPT_WIDTHS + 1)[1:]
    widths = np.unique(np.quantile(lengths, quantiles, method="higher"))
    shares = np.arange(1, COMPLETION_WIDTHS + 1) / COMPLETION_WIDTHS
    parts = np.unique(np.ceil(max_completion * shares / ROUND).astype(int) * ROUND)
    # As wide as the arrays at most.
    parts = np.unique(np.minimum(parts, max_completion))
    shapes = [Shape(int(p), int(c), batch_size) for c in parts for p in widths]
    return [*sorted(shapes, key=lambda shape: shape.prompt + shape.completion)]


def _plan_packed(
    groups: Sequence[TokenizedGroup], tokens: int, max_shapes: int
) -> list[PackedShape]:
    """One shape of so many tokens, and shapes for the groups that don't fit its rows, after it.

    The rows share the tokens as prompts and completions do in all of the data, so both fill up.
    Shapes of longer groups are chosen like padded ones, and have the tokens of the first at least:
    what a group leaves is room for short ones. They may have more, even where no group has.
    """
    lengths = np.array([packed_lengths(group) for group in groups])
    in_all = lengths.sum(axis=0)
    split = round(tokens * in_all[0] / in_all.sum() / ROUND) * ROUND
    widths = np.array([split, tokens // ROUND * ROUND - split])
    widths = np.minimum(widths, -(-in_all // ROUND) * ROUND)
    found = []
    fitting = (lengths <= widths).all(axis=1)
    if fitting.any():
        found.append((int(widths[0]), int(widths[1])))
    # Apart, or one shape would have to be as wide as the longest prompt and the longest answers.
    long_prompts = lengths[:, 0] > widths[0]
    for long, kind in ((True, long_prompts), (False, ~long_prompts & ~fitting)):
        if not kind.any():
            continue
        chosen = _choose(_Table(lengths[kind], 1, BatchLimit()), (max_shapes - 1) // 2)
        for prompt, completion, _ in sorted(chosen, key=lambda shape: tokens_of(shape, 1)):
            spare = max(0, tokens - prompt - completion) // ROUND * ROUND
            found.append((prompt + spare * (not long), completion + spare * long))
    longest = np.array([lengths_of(group)[1] for group in groups])
    shapes = []
    for prompt, completion in dict.fromkeys(found):
        inside = (lengths <= [prompt, completion]).all(axis=1)
        filled = np.sort(lengths[inside], axis=0).cumsum(axis=0) <= [prompt, completion]
        widest = int(-(-longest[inside].max() // ROUND) * ROUND)
        shapes.append(PackedShape(prompt, completion, int(filled.sum(axis=0).min()), widest))
    return shapes


def _choose(table: _Table, max_shapes: int) -> list[Shape]:
    """At most `max_shapes` shapes of the table that hold all its groups with little padding.

    From one shape that holds all, the shape is added that saves most padded tokens, until it
    would save less than `MIN_SAVING`; then each in turn is exchanged for whatever serves better
    beside the others, until nothing does. No shape has fewer groups than two of its batches: with
    filler in a batch that is never full it would cost what it saves.
    """
    chosen = [table.largest]
    while len(chosen) < max_shapes:
        paid = table.paid(chosen)
        best = table.best_beside(chosen)
        if best is None or paid.sum() - table.paid([*chosen, best]).sum() < MIN_SAVING * paid.sum():
            break
        chosen.append(best)
    improved = True
    while improved:
        improved = False
        for place in range(1, len(chosen)):
            rest = chosen[:place] + chosen[place + 1 :]
            best = table.best_beside(rest)
            if best is not None and table.paid([*rest, best]).sum() < table.paid(chosen).sum():
                chosen[place] = best
                improved = True
    return [table.shapes[index] for index in chosen]


class _Table:
    """What groups would cost in shapes of candidate widths, tokens.

    Groups whose lengths have the same candidate widths above them are one *cell*: so the table
    stays small however many groups there are.
    """

    def __init__(self, lengths: npt.NDArray[np.int64], rows: int, limit: BatchLimit) -> None:
        prompts, completions = (_widths(column) for column in lengths.T)
        grid = [(int(p), int(c)) for p in prompts for c in completions]
        most = len(lengths)
        self.shapes = [Shape(p, c, min(limit.of(p + rows * c), most)) for p, c in grid]
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
        # (cells, shapes): tokens of one group, more than any where it does not fit.
        self._cost = np.where(fits, tokens[None], tokens.max() + 1)
        self._least = 2 * np.array([shape.groups for shape in self.shapes])

    @property
    def largest(self) -> int:
        """The shape that holds all."""
        return len(self.shapes) - 1

    def paid(self, chosen: Sequence[int]) -> npt.NDArray[np.int64]:
        """Per cell, the tokens of its groups, each in the cheapest of the chosen shapes."""
        paid: npt.NDArray[np.int64] = self._count * self._cost[:, list(chosen)].min(axis=1)
        return paid

    def best_beside(self, chosen: Sequence[int]) -> int | None:
        """The shape that saves most beside the chosen ones; None if none has groups enough."""
        now = self._cost[:, list(chosen)].min(axis=1)[:, None]
        saved = np.maximum(now - self._cost, 0)
        enough = self._count @ (saved > 0) >= self._least
        total = np.where(enough, self._count @ saved, 0)
        best = int(total.argmax())
        return best if total[best] > 0 else None


def _widths(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Candidate widths: quantiles of the lengths rounded up, the longest among them."""
    rounded = -(-lengths // ROUND) * ROUND
    return np.unique(np.quantile(rounded, np.linspace(0, 1, CANDIDATES), method="higher"))


def lengths_of(group: TokenizedGroup) -> tuple[int, int]:
    """Tokens of a group's prompt and of its longest completion."""
    return len(group.prompt), max(len(completion) for completion in group.completions)


def packed_lengths(group: TokenizedGroup) -> tuple[int, int]:
    """Tokens of a group's prompt and of all its completions together."""
    return len(group.prompt), sum(len(completion) for completion in group.completions)


def tokens_run(shape: AnyShape, rows: int) -> int:
    """Tokens, padding counted, of a microbatch of groups of `rows` completions."""
    if isinstance(shape, PackedShape):
        return shape.prompt + shape.completion
    return shape.groups * tokens_of(shape, rows)


def tokens_of(shape: Shape, rows: int) -> int:
    """Tokens, padding counted, of one group of `rows` completions in a shape."""
    return shape.prompt + rows * shape.completion
