"""A language model split into its backbone and its vocabulary head.

The backbone maps token ids to hidden states after the final norm, the head maps those to logits.
`verification.py` checks these assumptions when a model is loaded, so there is no table of families.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_align.errors import ModelError
from mlx_align.models.patches import replace_backbone

# Attributes under which mlx-lm's families keep the part that ends with the final norm.
_INNER_NAMES = ("model", "transformer", "backbone", "decoder")


@dataclass(frozen=True)
class Backbone:
    """A language model, split at its last hidden state.

    Attributes:
        model: The whole model, as mlx-lm loads it.
        owner: The module whose `__call__` runs the backbone and then the vocabulary head: the model
            itself, or its `language_model`.
        inner: The backbone: token ids (and caches) in, hidden states after the final norm out.
        inner_name: The attribute of `owner` that holds the backbone.
        mask_axes: Number of head axes in the masks for completions of a shared prompt. 1 for most
            families; 2 for those that split heads into groups before masking (gemma2); 0 if the
            mask is the string "causal", so that attention does the masking.
        flat_caches: Whether full rows need caches: in some families (gemma3n), later layers read
            the keys of earlier ones from them.
        packs: Whether several groups may be packed into one row.
        fused: Whether mlx's own attention kernel may be used on a GPU, where it has a gradient.
        temperature: Logits are divided by it. It differs from 1 when training on samples that
            were drawn at another temperature.
    """

    model: nn.Module
    owner: nn.Module
    inner: nn.Module
    inner_name: str
    mask_axes: int = 1
    flat_caches: bool = False
    packs: bool = False
    fused: bool = True
    temperature: float = 1.0

    def hidden(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Hidden states (N, L, D) of `tokens` (N, L), as the vocabulary head reads them."""
        out = self.inner(tokens, cache=cache)
        return out[0] if isinstance(out, tuple) else out

    def generation_logits(self, tokens: mx.array) -> mx.array:
        """Logits (N, L, V) of `tokens` (N, L) through mlx-lm's own caches, as it generates.

        In some families (gemma3n) they differ from the logits of a call without caches.
        """
        return self.model(tokens, cache=make_prompt_cache(self.model))

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits (…, V) of hidden states (…, D), divided by the temperature.

        Computed by the model's own code, with the backbone replaced by one that returns `hidden`,
        so that head scaling, soft caps and tied weights need no copy here. float32 if the
        temperature is not 1.
        """
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        tokens = mx.zeros(flat.shape[:2], mx.int32)
        with replace_backbone(self.owner, self.inner_name, flat):
            out = self.owner(tokens)
        out = out.reshape(*hidden.shape[:-1], out.shape[-1])
        # In bf16 the quotient would be off by 0.4%, and log-probs by a tenth of a nat.
        return out if self.temperature == 1 else out.astype(mx.float32) / self.temperature

    def trainable_head(self) -> dict[str, Any]:
        """Trainable parameters outside the blocks: an adapter on the head or the embeddings."""
        blocks = {id(p) for layer in self.model.layers for p in _leaves(layer)}
        flat = tree_flatten(self.owner.trainable_parameters())
        outside = [(name, p) for name, p in flat if id(p) not in blocks]
        return tree_unflatten(outside) if outside else {}


def split_backbone(model: nn.Module) -> Backbone:
    """Find the backbone and the head of an mlx-lm model.

    Raises:
        ModelError: The model has no backbone under any of the known names.
    """
    owner = model
    while "language_model" in owner:
        owner = owner["language_model"]
    for name in _INNER_NAMES:
        if name in owner and isinstance(owner[name], nn.Module):
            return Backbone(model, owner, owner[name], name)
    raise ModelError(
        f"model type {getattr(model, 'model_type', type(model).__name__)} is not supported: no "
        f"backbone found under {', '.join(_INNER_NAMES)}"
    )


def _leaves(module: nn.Module) -> list[mx.array]:
    return [p for _, p in tree_flatten(module.parameters())]
