"""Caches that let completions attend to their prompt's keys and values, gradients included.

mlx-lm's layers call these like its own caches (`offset`, `update_and_fetch`, `make_mask`). Its own
can't be used: they write in place, so no gradient passes through them.

There are two layouts. *Padded*: each prompt and each completion is a row (`PromptKV`, then
`CompletionKV`; `StateCache` for recurrent layers). *Packed*: all prompts one after the other in
one row, all completions in another, so that no row is padded to another's length (`PackedKV`).
Masks keep the groups of a packed row separate: a token sees its own prompt and completion only.
Positions start anew with every prompt and continue in each of its completions.

Shape letters: B prompts, N completions, H heads of keys and values, P prompt positions,
C completion positions, T tokens of a packed row, E size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache

from mlx_align.errors import ModelError
from mlx_align.models.attention import packed_attention
from mlx_align.models.device import on_gpu
from mlx_align.models.patches import CausalMask
from mlx_align.types import GroupBatch, Packing

# Indices for padding. The two differ, so that padding of the completions' row does not see padding
# of the prompts' row.
_NO_PROMPT, _NO_COMPLETION = -1, -2

FOREIGN_KEYS = "its blocks attend to keys that are not their cache's"


# Padded rows


class PromptKV:
    """Cache of an attention layer while the prompts run: records their keys and values.

    Attributes:
        window: Size of the layer's sliding window, tokens; None without one.
        keys: (B, H, P, E), once the layer has run.
        values: (B, H, P, E), likewise.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.offset = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Record the prompts' keys and values (B, H, P, E) and return them."""
        self.keys, self.values = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[mx.array | None, mx.array | None]:
        """The recorded keys and values, for layers that borrow another layer's (gemma3n)."""
        return self.keys, self.values

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Causal mask. It hides padding too, which comes after the prompt."""
        window = window_size or self.window
        if window is not None and n > window:
            if on_gpu() and not return_array:
                return CausalMask(window)
            return create_causal_mask(n, window_size=window)
        if return_array:
            return create_causal_mask(n)
        return "causal" if n > 1 else None

    def completion_cache(self, rows: int, lengths: mx.array, mask_axes: int) -> CompletionKV:
        """The cache with which `rows` completions attend to these prompts of `lengths` (B,)."""
        # A layer that borrows another layer's keys never fills its own cache.
        return CompletionKV(self.keys, self.values, lengths, rows, self.window, mask_axes)

    def arrays(self) -> list[mx.array]:
        """The arrays that a checkpointed layer returns."""
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    def with_arrays(self, arrays: Sequence[mx.array]) -> PromptKV:
        """A copy of this cache that holds `arrays`."""
        copy = PromptKV(self.window)
        if arrays:
            copy.keys, copy.values = arrays
        return copy


class CompletionKV:
    """Cache of an attention layer while the completions run: the prompt's keys, then their own.

    Prompts differ in length: `offset` (N,) is the length of each row's prompt, so that positions
    continue after the prompt, and the mask hides the prompt's padding.

    Attributes:
        keys: The prompts' keys (B, H, P, E); None where the layer borrows another layer's.
        values: The prompts' values, likewise.
        lengths: The prompts' lengths (B,).
        own: Keys and values of the completions (N, H, C, E), once the layer has run.
    """

    # The cache that was updated last, and the keys it returned: attention finds its cache by them.
    _last: ClassVar[tuple[mx.array, CompletionKV] | None] = None

    def __init__(
        self,
        keys: mx.array | None,
        values: mx.array | None,
        lengths: mx.array,
        rows: int,
        window: int | None,
        mask_axes: int,
    ) -> None:
        self.keys = keys
        self.values = values
        self.lengths = lengths
        self.rows = rows
        self.window = window
        self.mask_axes = mask_axes
        self.own: tuple[mx.array, mx.array] | None = None

    @property
    def offset(self) -> mx.array:
        """Position of each row's first completion token, (N,)."""
        return self._repeat(self.lengths)

    def _repeat(self, by_prompt: mx.array) -> mx.array:
        return mx.repeat(by_prompt, self.rows // self.lengths.shape[0], axis=0)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return keys and values of prompt and completion, (N, H, P + C, E).

        They are never computed if attention reads the prompts' and `own` instead.
        """
        assert self.keys is not None
        assert self.values is not None
        self.own = (keys, values)
        all_keys = mx.concatenate([self._repeat(self.keys), keys], axis=-2)
        CompletionKV._last = (all_keys, self)
        return all_keys, mx.concatenate([self._repeat(self.values), values], axis=-2)

    @classmethod
    def find_by_keys(cls, keys: mx.array) -> CompletionKV:
        """The cache that returned `keys`, to which its layer now attends.

        Raises:
            ModelError: The keys are not a cache's, so it is unknown which of them are padding.
        """
        found = cls.find(keys)
        if found is None:
            raise ModelError(FOREIGN_KEYS)
        return found

    @classmethod
    def find(cls, keys: mx.array) -> CompletionKV | None:
        """As `find_by_keys`; None if the keys are not a cache's."""
        return cls._last[1] if cls._last is not None and cls._last[0] is keys else None

    @classmethod
    def clear_last(cls) -> None:
        """Drop the reference to the last cache, which keeps arrays and their graph alive."""
        cls._last = None

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str:
        """Mask (N, 1…, n, P + n): the prompt's real positions and the completion's own past.

        Or the string "causal", in families whose attention accepts it.
        """
        assert self.keys is not None
        window = window_size or self.window
        width = self.keys.shape[-2]
        if window is not None and width + n <= window:
            window = None
        if self.mask_axes == 0 and not return_array:
            if on_gpu():
                return CausalMask(window, self.lengths)
            if window is None:
                return "causal"
        query = mx.arange(n)[:, None]
        past = mx.arange(width)[None, None]
        length = self.offset[:, None, None]
        to_prompt = mx.broadcast_to(past < length, (self.rows, n, width))
        to_self = query >= query.T
        if window is not None:
            to_prompt = to_prompt & (length + query[None] - past < window)
            to_self = to_self & (query - query.T < window)
        to_self = mx.broadcast_to(to_self[None], (self.rows, n, n))
        mask = mx.concatenate([to_prompt, to_self], axis=-1)
        return mask.reshape(self.rows, *[1] * max(1, self.mask_axes), n, width + n)

    def arrays(self) -> list[mx.array]:
        """The arrays that a checkpointed layer is given."""
        if self.keys is None or self.values is None:
            return [self.lengths]
        return [self.lengths, self.keys, self.values]

    def with_arrays(self, arrays: Sequence[mx.array]) -> CompletionKV:
        """A copy of this cache that holds `arrays`."""
        keys, values = arrays[1:] if len(arrays) > 1 else (None, None)
        return CompletionKV(keys, values, arrays[0], self.rows, self.window, self.mask_axes)


class StateCache(ArraysCache):
    """Cache of a recurrent layer (convolution and state), which mlx-lm's layers index."""

    def completion_cache(self, rows: int, lengths: mx.array, mask_axes: int) -> StateCache:
        """A cache in which each of `rows` completions starts from its prompt's state."""
        each = rows // lengths.shape[0]
        copy = StateCache(len(self.cache))
        copy.cache = [
            None if state is None else mx.repeat(state, each, axis=0) for state in self.cache
        ]
        return copy

    def arrays(self) -> list[mx.array]:
        """The states and, while the prompts run, the lengths at which each row's states stop."""
        states = [state for state in self.cache if state is not None]
        return states if self.lengths is None else [self.lengths, *states]

    def with_arrays(self, arrays: Sequence[mx.array]) -> StateCache:
        """A copy of this cache that holds `arrays`."""
        copy = StateCache(len(self.cache))
        states = list(arrays)
        if self.lengths is not None:
            copy.lengths, *states = states
        copy.cache = states or [None] * len(self.cache)
        return copy


def prompt_caches(model: nn.Module, prompt_lengths: mx.array) -> list[PromptKV | StateCache]:
    """Recording caches for the prompts, one for each entry of `model`'s own cache list.

    Raises:
        ModelError: The family's caches can't be shared between completions.
    """
    caches: list[PromptKV | StateCache] = []
    for own in make_prompt_cache(model):
        if type(own) is KVCache:
            caches.append(PromptKV(None))
        elif type(own) is RotatingKVCache and own.keep == 0:
            caches.append(PromptKV(own.max_size))
        elif type(own) is ArraysCache:
            state = StateCache(len(own.cache))
            state.lengths = prompt_lengths + 0  # a copy: the layers count it down in place
            caches.append(state)
        else:
            raise ModelError(f"its {type(own).__name__} can't be shared between completions")
    return caches


# Packed rows


class PackedTokens(NamedTuple):
    """The prompt, sequence and position of each of the T tokens of a packed row."""

    prompt: mx.array  # (T,) int32, index of the prompt that a token belongs to
    sequence: mx.array  # (T,) int32, within the row: tokens of one sequence see each other
    position: mx.array  # (T,) int32, counted through prompt and completion


class PackedKV:
    """Cache of an attention layer for a packed row, of prompts or of completions.

    Attributes:
        tokens: Prompt, sequence and position of the row's tokens.
        longest: Number of tokens of the longest sequence, where known.
        prompt: For completions, the filled cache of the prompts' row.
        keys: The row's own keys (1, H, T, E), once the layer has run.
        values: The row's own values, likewise.
    """

    # The cache that was updated last: attention recognises it by the keys it returned.
    _last: ClassVar[PackedKV | None] = None

    def __init__(
        self, tokens: PackedTokens, longest: int | None = None, prompt: PackedKV | None = None
    ) -> None:
        self.tokens = tokens
        self.longest = longest
        self.prompt = prompt
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> mx.array:
        """Position of every token, (T,) (see `patches.rope_per_token`)."""
        return self.tokens.position

    @property
    def is_prompt(self) -> bool:
        """Whether the row is that of the prompts, whose keys completions read from this cache."""
        return self.prompt is None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Record the row's keys and values and return them; `attend` adds the prompts'."""
        self.keys, self.values = keys, values
        PackedKV._last = self
        return keys, values

    @classmethod
    def find_by_keys(cls, keys: mx.array) -> PackedKV:
        """The cache that returned `keys`, to which its layer now attends.

        Raises:
            ModelError: The keys are not a cache's, so it is unknown which of them to hide.
        """
        if cls._last is None or cls._last.keys is not keys:
            raise ModelError(FOREIGN_KEYS)
        return cls._last

    @classmethod
    def clear_last(cls) -> None:
        """Drop the reference to the last cache, which keeps arrays and their graph alive."""
        cls._last = None

    def make_mask(self, _n: int, return_array: bool = False, window_size: int | None = None) -> str:
        """The string "causal"; `attend` does the masking.

        Raises:
            ModelError: The family needs an array, or a window.
        """
        if return_array or window_size is not None:
            raise ModelError("its blocks need masks as arrays")
        return "causal"

    def attend(self, queries: mx.array, scale: float) -> mx.array:
        """Attention of the row's queries (1, heads, T, E) to all that its tokens may see."""
        assert self.keys is not None
        assert self.values is not None
        prompt = None
        if self.prompt is not None:
            assert self.prompt.keys is not None
            assert self.prompt.values is not None
            prompt = (
                self.prompt.keys,
                self.prompt.values,
                self.tokens.prompt[:, None] == self.prompt.tokens.prompt[None],
            )
        own = (self.keys, self.values)
        return packed_attention(queries, own, self.tokens.sequence, scale, prompt, self.longest)

    def arrays(self) -> list[mx.array]:
        """The arrays that a checkpointed layer is given, and returns for the prompts' row."""
        filled = [array for array in (self.keys, self.values) if array is not None]
        below = [] if self.prompt is None else self.prompt.arrays()
        return [*self.tokens, *below, *filled]

    def with_arrays(self, arrays: Sequence[mx.array]) -> PackedKV:
        """A copy of this cache that holds `arrays`."""
        count = len(self.tokens)
        rest = list(arrays[count:])
        prompt = None
        if self.prompt is not None:
            size = len(self.prompt.arrays())
            prompt, rest = self.prompt.with_arrays(rest[:size]), rest[size:]
        copy = PackedKV(PackedTokens(*arrays[:count]), self.longest, prompt)
        if rest:
            copy.keys, copy.values = rest
        return copy


def packed_prompt_caches(model: nn.Module, batch: GroupBatch) -> list[PackedKV]:
    """Caches for the row of prompts, one for each entry of `model`'s own cache list.

    Raises:
        ModelError: The family's caches don't hold keys and values of all tokens.
    """
    ends = mx.cumsum(batch.prompt_lengths)
    position = mx.arange(batch.prompt_tokens.shape[1])
    prompt = (position[:, None] >= ends[None]).sum(axis=1).astype(mx.int32)
    real = prompt < ends.shape[0]
    starts = ends - batch.prompt_lengths
    within = mx.where(real, position - starts[mx.minimum(prompt, ends.shape[0] - 1)], 0)
    prompt = mx.where(real, prompt, _NO_PROMPT)
    tokens = PackedTokens(prompt, prompt, within.astype(mx.int32))
    for own in make_prompt_cache(model):
        if type(own) is not KVCache:
            raise ModelError(f"its {type(own).__name__} can't hold several prompts in one row")
    return [PackedKV(tokens) for _ in make_prompt_cache(model)]


def packed_completion_caches(
    batch: GroupBatch, packing: Packing, prompts: Sequence[PackedKV]
) -> list[PackedKV]:
    """Caches for the row of completions, given the filled caches of their prompts."""
    rows, longest = packing.place.shape
    each = rows // batch.prompt_lengths.shape[0]
    real = packing.completion >= 0
    prompt = mx.maximum(packing.completion, 0) // each
    tokens = PackedTokens(
        mx.where(real, prompt, _NO_COMPLETION),
        packing.completion,
        mx.where(real, batch.prompt_lengths[prompt], 0) + packing.step,
    )
    return [PackedKV(tokens, longest, cache) for cache in prompts]
