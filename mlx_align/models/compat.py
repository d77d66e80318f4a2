"""What touches mlx-lm's internals: model anatomy and loading.

Its caches are touched in `caches.py`, its generator in `generation.py`: an mlx-lm release that
moves something breaks these three files and no other. What is assumed of a
model is proven when it is loaded (`selfcheck.py`), not kept in a table of families.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as _load_tokenizer
from mlx_lm.utils import (
    _download,
    load_config,
    load_model,
    maybe_set_recommended_wired_limit,
)

from mlx_align.errors import ModelError

# Freed buffers kept for reuse. Without a bound, every new padded length leaves its own behind.
CACHE_LIMIT_BYTES = 1 << 30

# Attributes under which mlx-lm's families keep the part that ends with the final norm.
_INNER_NAMES = ("model", "transformer", "backbone", "decoder")


@dataclass(frozen=True)
class Anatomy:
    """A language model taken apart at its last hidden state.

    Attributes:
        model: The whole model, as mlx-lm loads it.
        owner: The module whose `__call__` runs the trunk and then the vocabulary head; the model
            itself, or its `language_model`.
        inner: The trunk: token ids (and caches) in, hidden states after the final norm out.
        inner_name: The attribute of `owner` that holds the trunk.
        mask_axes: Head axes of the masks that completions of a shared prompt get: 0 for no mask but
            the word "causal", where the family leaves the rest to attention; else 1, or 2 where
            it splits heads into groups before masking (gemma2), so that a mask per row lines up.
        flat_caches: Whether whole rows need caches: later layers of some families (gemma3n) borrow
            keys, and find them nowhere else.
        packs: Whether several groups may run one behind the other in one row.
    """

    model: nn.Module
    owner: nn.Module
    inner: nn.Module
    inner_name: str
    mask_axes: int = 1
    flat_caches: bool = False
    packs: bool = False

    def hidden(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Hidden states (rows, length, D) that the vocabulary head reads."""
        out = self.inner(tokens, cache=cache)
        return out[0] if isinstance(out, tuple) else out

    def generation_logits(self, tokens: mx.array) -> mx.array:
        """Logits (rows, length, V) as mlx-lm generates with them: through its own caches.

        With some families (gemma3n) these are not the logits of a call without caches.
        """
        return self.model(tokens, cache=make_prompt_cache(self.model))

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits (…, V) of hidden states (…, D): all that the model does after its trunk.

        The owner's own `__call__` runs with the trunk replaced by one that returns `hidden`, so
        head scaling, soft caps and tied weights are the family's own code, never a copy.
        """
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        tokens = mx.zeros(flat.shape[:2], mx.int32)
        # An instance attribute shadows the submodule without touching the module's dictionary:
        # the order of its parameters, and so every compiled function's inputs, stay as they were.
        self.owner.__dict__[self.inner_name] = _Passthrough(self.inner, flat)
        try:
            out = self.owner(tokens)
        finally:
            del self.owner.__dict__[self.inner_name]
        return out.reshape(*hidden.shape[:-1], out.shape[-1])

    def trainable_head(self) -> dict[str, Any]:
        """Trainable parameters outside the blocks (an adapter on the head or embeddings)."""
        blocks = {id(p) for layer in self.model.layers for p in _leaves(layer)}
        flat = tree_flatten(self.owner.trainable_parameters())
        outside = [(name, p) for name, p in flat if id(p) not in blocks]
        return tree_unflatten(outside) if outside else {}


class _Passthrough:
    """Stands in for the trunk: returns given hidden states, has all its attributes."""

    def __init__(self, inner: nn.Module, hidden: mx.array) -> None:
        self._inner = inner
        self._hidden = hidden

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def dissect(model: nn.Module) -> Anatomy:
    """Find the trunk and the head of an mlx-lm model.

    Raises:
        ModelError: The model is not built like any family this package knows.
    """
    owner = model
    while "language_model" in owner:
        owner = owner["language_model"]
    for name in _INNER_NAMES:
        if name in owner and isinstance(owner[name], nn.Module):
            return Anatomy(model, owner, owner[name], name)
    raise ModelError(
        f"model type {getattr(model, 'model_type', type(model).__name__)}: no trunk found under "
        f"{', '.join(_INNER_NAMES)}; this family is not supported"
    )


def _leaves(module: nn.Module) -> list[mx.array]:
    return [p for _, p in tree_flatten(module.parameters())]


def resolve_model_path(path_or_name: str) -> Path:
    """The local folder of a model: the path itself, or its snapshot from the hub.

    Raises:
        ModelError: There is no such folder and no such hub model, or it can't be fetched.
    """
    path = Path(path_or_name).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise ModelError(f"--model {path_or_name}: no config.json in it; is it a model folder?")
        return path
    looks_local = path_or_name.startswith((".", "/", "~")) or path_or_name.count("/") != 1
    if looks_local:
        raise ModelError(
            f"--model {path_or_name}: no such folder (a hub model is named owner/name)"
        )
    try:
        return Path(_download(path_or_name))
    except Exception as error:  # the hub client raises a dozen kinds; all mean: not to be had
        raise ModelError(
            f"--model {path_or_name}: no such folder, and the hub did not give it "
            f"({_first_line(error)})"
        ) from error


def read_model_config(path: Path) -> dict[str, Any]:
    """The model's config.json (with the generation config's end tokens, as mlx-lm reads it).

    Raises:
        ModelError: It is not there or no JSON object with a `model_type`.
    """
    try:
        config: dict[str, Any] = load_config(path)
        if not isinstance(config, dict) or "model_type" not in config:
            raise ValueError("no model_type in it")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path / 'config.json'}: {_first_line(error)}") from error
    return config


def load_tokenizer(path: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """The tokenizer of a model folder, as mlx-lm wraps it.

    Raises:
        ModelError: It can't be loaded.
    """
    eos = config.get("eos_token_id")
    try:
        return _load_tokenizer(path, eos_token_ids=[eos] if isinstance(eos, int) else eos)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise ModelError(f"{path}: its tokenizer can't be loaded ({_first_line(error)})") from error


def load_weights(path: Path) -> nn.Module:
    """The model of a folder, in evaluation mode, weights in memory.

    Raises:
        ModelError: mlx-lm can't build or fill it.
    """
    try:
        model, _ = load_model(path)
    except Exception as error:  # mlx-lm raises KeyError, ValueError, TypeError … for bad folders
        raise ModelError(f"{path}: mlx-lm can't load this model ({_first_line(error)})") from error
    model.eval()
    return model


def read_tensors(file: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file, in memory.

    Raises:
        ModelError: The file is damaged.
    """
    try:
        tensors = mx.load(str(file))
        mx.eval(tensors)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{file}: damaged ({str(error).splitlines()[0][:120]})") from error
    assert isinstance(tensors, dict)
    return tensors


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@contextmanager
def layer_calls(model: nn.Module, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block, every block of `model` is called through `wrap(its own __call__)`."""
    kinds = {type(layer) for layer in model.layers}
    originals = {kind: kind.__call__ for kind in kinds}
    for kind, call in originals.items():
        kind.__call__ = wrap(call)
    try:
        yield
    finally:
        for kind, call in originals.items():
            kind.__call__ = call


def set_memory_limits() -> None:
    """Bound what the allocator keeps, and on Metal keep the recommended working set resident."""
    mx.set_cache_limit(CACHE_LIMIT_BYTES)
    maybe_set_recommended_wired_limit()


def random_key() -> tuple[int, int]:
    """The two words of the global generator's state; `restore_random_key` takes them back."""
    state: Any = mx.random.state  # a list of one key, which the stubs call an object
    high, low = state[0].tolist()
    return high, low


def restore_random_key(high: int, low: int) -> None:
    """Put the global generator where it was (assigning to its state is silently wrong)."""
    mx.random.seed((high << 32) | low)
