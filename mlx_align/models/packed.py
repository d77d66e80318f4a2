"""Rows that hold several groups: all prompts in one, all their completions in another.

No row is padded to another's length. What keeps groups apart are masks (a token attends to its own
prompt and completion alone) and positions, which start anew with every prompt and go on from it in
each of its completions. The caches of a packed row bring both to the model's code: their `offset`
is the position of every token, which mlx's rotary embedding, as it is, refuses for a single row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_align.errors import ModelError
from mlx_align.models.attention import attend_among, causal_attention
from mlx_align.types import GroupBatch, Packing

# Owners of padding: of no prompt, and of no completion, so of none that is anything's prompt.
_NO_PROMPT, _NO_COMPLETION = -1, -2


class Tokens(NamedTuple):
    """What the tokens of a packed row are, T of them."""

    owner: mx.array  # (T,) int32, the prompt that a token belongs to
    member: mx.array  # (T,) int32, within the row: tokens of one member see each other
    position: mx.array  # (T,) int32, within prompt and completion together


class PackedKV:
    """Cache of one attention layer for a packed row: of prompts, or of completions on top of them.

    Attributes:
        tokens: What the row's tokens are.
        longest: The most tokens of a member, where something less than the row is known.
        prompt: For completions, the filled cache of the prompts' row.
        keys: The row's own keys (1, heads, T, head size), once the layer has them.
        values: Likewise.
    """

    # The one that a layer filled last: by the keys it was handed, attention knows it.
    _filled: ClassVar[PackedKV | None] = None

    def __init__(
        self, tokens: Tokens, longest: int | None = None, prompt: PackedKV | None = None
    ) -> None:
        self.tokens = tokens
        self.longest = longest
        self.prompt = prompt
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> mx.array:
        """The position of every token, (T,)."""
        return self.tokens.position

    @property
    def fills(self) -> bool:
        """Whether others read what a layer writes here."""
        return self.prompt is None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Record the row's keys and values; attention takes the prompts' from here too."""
        self.keys, self.values = keys, values
        PackedKV._filled = self
        return keys, values

    @classmethod
    def that_handed_out(cls, keys: mx.array) -> PackedKV:
        """The cache whose layer attends to `keys` now.

        Raises:
            ModelError: They are something else, of which nobody knows what to hide.
        """
        cache = cls._filled
        if cache is None or cache.keys is not keys:
            raise ModelError("its blocks attend to keys that are not their cache's")
        return cache

    def make_mask(self, _n: int, return_array: bool = False, window_size: int | None = None) -> str:
        """The word for what attention then does as this cache says.

        Raises:
            ModelError: The family wants an array, or a window.
        """
        if return_array or window_size is not None:
            raise ModelError("its blocks want masks of their own")
        return "causal"

    def attend(self, queries: mx.array, scale: float) -> mx.array:
        """Attention (1, heads, T, E) of the row to all that its tokens may see."""
        assert self.keys is not None
        assert self.values is not None
        prompt = None
        if self.prompt is not None:
            assert self.prompt.keys is not None
            assert self.prompt.values is not None
            prompt = (
                self.prompt.keys,
                self.prompt.values,
                self.tokens.owner[:, None] == self.prompt.tokens.owner[None],
            )
        own = (self.keys, self.values)
        return attend_among(queries, own, self.tokens.member, scale, prompt, self.longest)

    def arrays(self) -> list[mx.array]:
        """What a checkpointed layer must be given, and hand back where it fills this."""
        filled = [array for array in (self.keys, self.values) if array is not None]
        below = [] if self.prompt is None else self.prompt.arrays()
        return [*self.tokens, *below, *filled]

    def with_arrays(self, arrays: Sequence[mx.array]) -> PackedKV:
        """The same cache holding `arrays`."""
        count = len(self.tokens)
        rest = list(arrays[count:])
        prompt = None
        if self.prompt is not None:
            size = len(self.prompt.arrays())
            prompt, rest = self.prompt.with_arrays(rest[:size]), rest[size:]
        copy = PackedKV(Tokens(*arrays[:count]), self.longest, prompt)
        if rest:
            copy.keys, copy.values = rest
        return copy


def packed_prompt_caches(model: nn.Module, batch: GroupBatch) -> list[PackedKV]:
    """Caches for the row of prompts, one per layer of `model`'s own cache list.

    Raises:
        ModelError: The family's caches hold something else than keys and values of all tokens.
    """
    ends = mx.cumsum(batch.prompt_lengths)
    position = mx.arange(batch.prompt_tokens.shape[1])
    owner = (position[:, None] >= ends[None]).sum(axis=1).astype(mx.int32)
    real = owner < ends.shape[0]
    starts = ends - batch.prompt_lengths
    within = mx.where(real, position - starts[mx.minimum(owner, ends.shape[0] - 1)], 0)
    owner = mx.where(real, owner, _NO_PROMPT)
    tokens = Tokens(owner, owner, within.astype(mx.int32))
    for own in make_prompt_cache(model):
        if type(own) is not KVCache:
            raise ModelError(f"its {type(own).__name__} holds one prompt's past at a time")
    return [PackedKV(tokens) for _ in make_prompt_cache(model)]


def packed_completion_caches(
    batch: GroupBatch, packing: Packing, prompts: Sequence[PackedKV]
) -> list[PackedKV]:
    """Caches for the row of completions, on top of the filled ones of their prompts."""
    rows, longest = packing.place.shape
    each = rows // batch.prompt_lengths.shape[0]
    real = packing.completion >= 0
    prompt = mx.maximum(packing.completion, 0) // each
    tokens = Tokens(
        mx.where(real, prompt, _NO_COMPLETION),
        packing.completion,
        mx.where(real, batch.prompt_lengths[prompt], 0) + packing.step,
    )
    return [PackedKV(tokens, longest, cache) for cache in prompts]


def predicting_states(
    batch: GroupBatch, packing: Packing, prompts: mx.array, completions: mx.array
) -> mx.array:
    """Of the states of both rows, (1, P, D) and (1, T, D), those before each token, (T, D)."""
    each = packing.place.shape[0] // batch.prompt_lengths.shape[0]
    last = mx.cumsum(batch.prompt_lengths) - 1
    before = mx.arange(packing.step.shape[0]) + prompts.shape[1] - 1
    of_prompt = last[mx.maximum(packing.completion, 0) // each]
    both = mx.concatenate([prompts[0], completions[0]])
    return both[mx.where(packing.step == 0, of_prompt, before)]


@contextmanager
def packed_rows() -> Iterator[None]:
    """Within the block, attention and positions of the models' code are those of packed rows."""

    def attention(
        queries: mx.array, keys: mx.array, _values: mx.array, scale: float
    ) -> mx.array | None:
        return PackedKV.that_handed_out(keys).attend(queries, scale)

    theirs = mx.fast.rope

    def rope(a: mx.array, *args: Any, offset: Any, **others: Any) -> mx.array:
        if not (isinstance(offset, mx.array) and offset.ndim == 1 and a.shape[0] == 1):
            return theirs(a, *args, offset=offset, **others)
        # Every token a row of its own: those have offsets.
        apart = a.transpose(2, 1, 0, 3)
        return theirs(apart, *args, offset=offset, **others).transpose(2, 1, 0, 3)

    mx.fast.rope = rope
    try:
        with causal_attention(attention):
            yield
    finally:
        mx.fast.rope = theirs
        PackedKV._filled = None  # and the arrays and the graph that hang on it
