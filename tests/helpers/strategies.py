"""Hypothesis strategies: ragged groups, and the ways in which an update can be laid out."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from helpers.families import VOCAB
from mlx_align.data.batching import Microbatch
from mlx_align.data.buckets import Shape, group_lengths
from mlx_align.types import TokenizedGroup

# The same examples in every run; an example that runs a model may take long on a busy machine.
PROPERTY = settings(derandomize=True, deadline=None, max_examples=8)


@st.composite
def ragged_groups(
    draw: st.DrawFn, completions: int, fewest: int = 2, most: int = 5
) -> list[TokenizedGroup]:
    """Prompts of 1 to 8 tokens, each with as many completions of 1 to 10 tokens."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def ids(longest: int) -> np.ndarray:
        return random.integers(1, VOCAB, draw(st.integers(1, longest))).astype(np.int32)

    return [
        TokenizedGroup(
            ids(8), tuple(ids(10) for _ in range(completions)), f"row {i}", label=i % 2 > 0
        )
        for i in range(draw(st.integers(fewest, most)))
    ]


def orders(count: int) -> st.SearchStrategy[list[int]]:
    """Orders of `count` groups."""
    return st.permutations(range(count))


@st.composite
def splits(draw: st.DrawFn, order: Sequence[int]) -> list[list[int]]:
    """The groups of `order` in consecutive parts of at least one group."""
    inner = draw(st.sets(st.integers(1, max(1, len(order) - 1))))
    ends = sorted({0, len(order)} | {end for end in inner if end < len(order)})
    return [list(order[start:end]) for start, end in pairwise(ends)]


def microbatch(
    groups: Sequence[TokenizedGroup], indices: Sequence[int], padding: tuple[int, int, int]
) -> Microbatch:
    """The groups at `indices` in the smallest shape that fits them.

    `padding` is added to the shape: tokens of the prompts, tokens of the completions, groups.
    """
    lengths = [group_lengths(groups[i]) for i in indices]
    prompt, completion = (max(widths) for widths in zip(*lengths, strict=True))
    shape = Shape(prompt + padding[0], completion + padding[1], len(indices) + padding[2])
    return Microbatch(tuple(indices), shape)


PADDINGS = st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 2))
NO_PADDING = (0, 0, 0)
