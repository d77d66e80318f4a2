"""Caches of a shared prompt: what lets completions attend to keys and values with gradients.

mlx-lm's layers call them like its own caches (`offset`, `update_and_fetch`, `make_mask`), which
can't serve here: those write in place and pad to steps, and a gradient can't pass that.
"""

from __future__ import annotations

from collections.abc import Sequence

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

    def completion_cache(
        self, group: mx.array, prompt_lengths: mx.array, mask_axes: int
    ) -> CompletionKV:
        """The cache with which completions attend to this prompt; `group` (N,) names its row."""
        # A layer that borrows another layer's keys never fills its own cache.
        keys = None if self.keys is None else self.keys[group]
        values = None if self.values is None else self.values[group]
        return CompletionKV(keys, values, prompt_lengths[group], self.window, mask_axes)

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
    """

    def __init__(
        self,
        keys: mx.array | None,
        values: mx.array | None,
        offset: mx.array,
        window: int | None,
        mask_axes: int,
    ) -> None:
        self.keys = keys
        self.values = values
        self.offset = offset
        self.window = window
        self.mask_axes = mask_axes

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Prompt and completion keys and values, (rows, heads, P + C, head size)."""
        assert self.keys is not None
        assert self.values is not None
        return (
            mx.concatenate([self.keys, keys], axis=-2),
            mx.concatenate([self.values, values], axis=-2),
        )

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Mask (rows, 1…, n, P + n): true prompt positions, and the completion's own past."""
        assert self.keys is not None
        rows = self.offset.shape[0]
        window = window_size or self.window
        query = mx.arange(n)[:, None]
        past = mx.arange(self.keys.shape[-2])[None, None]
        length = self.offset[:, None, None]
        to_prompt = mx.broadcast_to(past < length, (rows, n, past.shape[-1]))
        to_self = query >= query.T
        if window is not None:
            to_prompt = to_prompt & (length + query[None] - past < window)
            to_self = to_self & (query - query.T < window)
        to_self = mx.broadcast_to(to_self[None], (rows, n, n))
        mask = mx.concatenate([to_prompt, to_self], axis=-1)
        return mask.reshape(rows, *[1] * self.mask_axes, n, mask.shape[-1])

    def arrays(self) -> list[mx.array]:
        """What a checkpointed layer must be given."""
        if self.keys is None or self.values is None:
            return [self.offset]
        return [self.offset, self.keys, self.values]

    def with_arrays(self, arrays: Sequence[mx.array]) -> CompletionKV:
        """The same cache holding `arrays`."""
        keys, values = arrays[1:] if len(arrays) > 1 else (None, None)
        return CompletionKV(keys, values, arrays[0], self.window, self.mask_axes)


class StateCache(ArraysCache):
    """Cache of a recurrent layer (convolution and state), which mlx-lm's layers index."""

    def completion_cache(
        self, group: mx.array, prompt_lengths: mx.array, mask_axes: int
    ) -> StateCache:
        """Each completion starts from its prompt's state."""
        copy = StateCache(len(self.cache))
        copy.cache = [None if state is None else state[group] for state in self.cache]
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
