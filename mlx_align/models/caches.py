"""Caches of a shared prompt: what lets completions attend to keys and values with gradients.

mlx-lm's layers call them like its own caches (`offset`, `update_and_fetch`, `make_mask`), which
can't serve here: those write in place and pad to steps, and a gradient can't pass that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache

from mlx_align.errors import ModelError


class PromptKV:
    """Cache of one attention layer while the prompt runs: records keys and values."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.offset = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Record the prompt's keys and values (rows, heads, P, head size)."""
        self.keys, self.values = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[mx.array | None, mx.array | None]:
        """What was recorded, for layers that borrow it (gemma3n's)."""
        return self.keys, self.values

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Causal mask; padding stands after the prompt, where causality already hides it."""
        window = window_size or self.window
        if window is not None and n > window:
            return create_causal_mask(n, window_size=window)
        if return_array:
            return create_causal_mask(n)
        return "causal" if n > 1 else None

    def completion_cache(self, rows: int, lengths: mx.array, mask_axes: int) -> CompletionKV:
        """The cache with which `rows` completions attend to these prompts of `lengths` (B,)."""
        # A layer that borrows another layer's keys never fills its own cache.
        return CompletionKV(self.keys, self.values, lengths, rows, self.window, mask_axes)

    def arrays(self) -> list[mx.array]:
        """What a checkpointed layer must hand back."""
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    def with_arrays(self, arrays: Sequence[mx.array]) -> PromptKV:
        """The same cache holding `arrays`."""
        copy = PromptKV(self.window)
        if arrays:
            copy.keys, copy.values = arrays
        return copy


class CompletionKV:
    """Cache of one attention layer while the completions run: prompt first, then themselves.

    Prompts are ragged: `offset` (N,) is each row's own prompt length, so positions continue
    where the prompt ended, and the mask hides the prompt's padding.

    Attributes:
        keys: The prompts' keys (B, heads, P, head size); None where the layer borrows them.
        values: Likewise.
        lengths: The prompts' lengths (B,).
        own: Keys and values of the completions (N, heads, C, head size), once the layer has them.
    """

    # The one that a layer filled last, and the keys it was handed: by them, attention knows it.
    _filled: ClassVar[tuple[mx.array, CompletionKV] | None] = None

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
        return self._for_each(self.lengths)

    def _for_each(self, by_prompt: mx.array) -> mx.array:
        return mx.repeat(by_prompt, self.rows // self.lengths.shape[0], axis=0)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Prompt and completion keys and values, (rows, heads, P + C, head size).

        They are never made where attention takes the prompts' and `own` instead.
        """
        assert self.keys is not None
        assert self.values is not None
        self.own = (keys, values)
        every_key = mx.concatenate([self._for_each(self.keys), keys], axis=-2)
        CompletionKV._filled = (every_key, self)
        return every_key, mx.concatenate([self._for_each(self.values), values], axis=-2)

    @classmethod
    def that_handed_out(cls, keys: mx.array) -> CompletionKV | None:
        """The cache whose layer attends to `keys` now; None where they are something else."""
        if cls._filled is None or cls._filled[0] is not keys:
            return None
        return cls._filled[1]

    @classmethod
    def forget(cls) -> None:
        """Let go of the last one, and of the arrays and the graph that hang on it."""
        cls._filled = None

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str:
        """Mask (rows, 1…, n, P + n): true prompt positions, and the completion's own past.

        Where the family takes the word for it: "causal".
        """
        assert self.keys is not None
        window = window_size or self.window
        width = self.keys.shape[-2]
        if window is not None and width + n <= window:
            window = None
        if self.mask_axes == 0 and window is None and not return_array:
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
        """What a checkpointed layer must be given."""
        if self.keys is None or self.values is None:
            return [self.lengths]
        return [self.lengths, self.keys, self.values]

    def with_arrays(self, arrays: Sequence[mx.array]) -> CompletionKV:
        """The same cache holding `arrays`."""
        keys, values = arrays[1:] if len(arrays) > 1 else (None, None)
        return CompletionKV(keys, values, arrays[0], self.rows, self.window, self.mask_axes)


class StateCache(ArraysCache):
    """Cache of a recurrent layer (convolution and state), which mlx-lm's layers index."""

    def completion_cache(self, rows: int, lengths: mx.array, mask_axes: int) -> StateCache:
        """Each of `rows` completions starts from its prompt's state."""
        each = rows // lengths.shape[0]
        copy = StateCache(len(self.cache))
        copy.cache = [
            None if state is None else mx.repeat(state, each, axis=0) for state in self.cache
        ]
        return copy

    def arrays(self) -> list[mx.array]:
        """States and, during the prompt, the lengths that stop them at each row's end."""
        states = [state for state in self.cache if state is not None]
        return states if self.lengths is None else [self.lengths, *states]

    def with_arrays(self, arrays: Sequence[mx.array]) -> StateCache:
        """The same cache holding `arrays`."""
        copy = StateCache(len(self.cache))
        states = list(arrays)
        if self.lengths is not None:
            copy.lengths, *states = states
        copy.cache = states or [None] * len(self.cache)
        return copy


LayerCache = PromptKV | CompletionKV | StateCache


def prompt_caches(model: nn.Module, prompt_lengths: mx.array) -> list[PromptKV | StateCache]:
    """Recording caches, one per layer of `model`'s own cache list.

    Raises:
        ModelError: The family's caches can't be shared (its rows are then run whole).
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
