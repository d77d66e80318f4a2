"""Gradient checkpointing that is exact with a shared prompt and with dropout.

mlx-lm's own checkpointing closes over the cache and loses the gradient through the shared prompt:
the loss is right, the gradient wrong. Here a block's keys and values are explicit inputs and
outputs of the checkpointed function. So is the key from which dropout draws: a block that is
recomputed in the backward pass drops the same units.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_align.models.patches import wrap_blocks
from mlx_align.models.prefix_cache import CompletionKV, PackedKV, PromptKV, StateCache
from mlx_align.models.weights import use_adapter

# Random keys of the blocks that are being (re)computed, innermost last; empty outside of them.
_keys: list[mx.array] = []


class Dropout(nn.Module):
    """Dropout that drops the same units again when a checkpointed block is recomputed."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def __call__(self, x: mx.array) -> mx.array:
        """Zero each element with probability p in training mode; scale the others by 1/(1−p)."""
        if self.p == 0 or not self.training:
            return x
        key = None
        if _keys:
            _keys[-1], key = mx.random.split(_keys[-1])
        keep = mx.random.bernoulli(1 - self.p, x.shape, key=key)
        return mx.where(keep, x / (1 - self.p), mx.array(0, x.dtype))


# Returns the context in which blocks run (see `patches.apply_patches`).
Patches = Callable[[], AbstractContextManager[None]]


def checkpointed(model: nn.Module, patches: Patches) -> AbstractContextManager[None]:
    """Within the block, every layer of `model` keeps only its inputs for the backward pass.

    The backward pass recomputes the layers after the block has ended, so it needs the `patches`
    under which their code runs.
    """
    has_dropout = any(isinstance(m, Dropout) and m.p > 0 for m in model.modules())

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        return _checkpoint_layer(call, has_dropout and model.training, patches)

    return wrap_blocks(model, wrap)


def _checkpoint_layer(
    call: Callable[..., Any], random: bool, patches: Patches
) -> Callable[..., Any]:
    def checkpointed_call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given, rebuild = _extract_arrays((args, kwargs))
        caches = _written_caches((args, kwargs))
        output_structure: list[
            Any
        ] = []  # filled while tracing: the structure of the layer's output

        def run(parameters: Any, key: mx.array, arrays: list[mx.array]) -> list[mx.array]:
            # Lengths and masks are inputs too, but have no gradient.
            constants = [
                a if mx.issubdtype(a.dtype, mx.floating) else mx.stop_gradient(a) for a in arrays
            ]
            inner_args, inner_kwargs = rebuild(constants)
            inner_caches = _written_caches((inner_args, inner_kwargs))
            _keys.append(mx.stop_gradient(key))
            try:
                with use_adapter(layer, parameters), patches():
                    out = call(layer, *inner_args, **inner_kwargs)
            finally:
                _keys.pop()
            outputs, rebuild_output = _extract_arrays(out)
            kept = [cache.arrays() for cache in inner_caches]
            output_structure[:] = [rebuild_output, len(outputs), [len(k) for k in kept]]
            # mx.checkpoint keeps one cotangent per output array, but a block may return the keys
            # that its cache records too (gemma4 passes them to later blocks). A view, which costs
            # nothing, makes the outputs separate arrays.
            every = [*outputs, *(array for arrays in kept for array in arrays)]
            return [mx.expand_dims(array, 0) for array in every]

        # Without dropout, a constant key leaves the generator's state untouched.
        key = _fresh_key() if random else mx.zeros((2,), mx.uint32)
        wrapped = mx.checkpoint(run)(layer.trainable_parameters(), key, given)
        results = [mx.squeeze(array, 0) for array in wrapped]
        rebuild_output, n_outputs, kept_sizes = output_structure
        position = n_outputs
        for cache, size in zip(caches, kept_sizes, strict=True):
            _refill(cache, results[position : position + size])
            position += size
        return rebuild_output(results[:n_outputs])

    return checkpointed_call


def _fresh_key() -> mx.array:
    bits = mx.random.randint(0, 2**31 - 1, shape=(2,))
    return mx.stop_gradient(bits.astype(mx.uint32))


def _is_cache(leaf: Any) -> bool:
    return isinstance(leaf, PromptKV | CompletionKV | StateCache | PackedKV)


def _is_leaf(node: Any) -> bool:
    return not isinstance(node, tuple | list | dict)


def _written_caches(nested: Any) -> list[Any]:
    """The caches that a layer writes to; those of completions are only read."""
    leaves = (leaf for _, leaf in tree_flatten(nested, is_leaf=_is_leaf))
    return [leaf for leaf in leaves if _is_written(leaf)]


def _is_written(leaf: Any) -> bool:
    return isinstance(leaf, PromptKV | StateCache) or (
        isinstance(leaf, PackedKV) and leaf.is_prompt
    )


def _extract_arrays(nested: Any) -> tuple[list[mx.array], Callable[[list[mx.array]], Any]]:
    """All arrays in `nested` and its caches, and a function that rebuilds it with other arrays."""
    arrays: list[mx.array] = []
    sizes: list[int] = []  # arrays of each leaf at this time: the caller's caches fill up later

    def take(leaf: Any) -> Any:
        own = [leaf] if isinstance(leaf, mx.array) else leaf.arrays() if _is_cache(leaf) else []
        arrays.extend(own)
        sizes.append(len(own))
        return leaf

    tree_map(take, nested, is_leaf=_is_leaf)

    def rebuild(replacements: list[mx.array]) -> Any:
        rest, counts = iter(replacements), iter(sizes)

        def put(leaf: Any) -> Any:
            own = [next(rest) for _ in range(next(counts))]
            if _is_cache(leaf):
                return leaf.with_arrays(own)
            return own[0] if own else leaf

        return tree_map(put, nested, is_leaf=_is_leaf)

    return arrays, rebuild


def _refill(cache: PromptKV | StateCache | PackedKV, arrays: list[mx.array]) -> None:
    """Put the arrays that a checkpointed layer returned into the caller's cache."""
    filled = cache.with_arrays(arrays)
    cache.__dict__.update(filled.__dict__)
