"""The scalar head of a reward model: one linear projection of the last completion token's state.

The head is a submodule of the language model, so it is part of the tree that is trained, swapped
and saved like any adapter; in a folder it has a file of its own, because mlx-lm refuses tensors
that it does not know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_align.errors import ModelError
from mlx_align.models.compat import Anatomy, read_tensors
from mlx_align.models.trunk import completion_hidden, packed_hidden
from mlx_align.types import GroupBatch

HEAD_NAME = "reward_head"
VALUE_NAME = "value_head"
HEAD_WEIGHTS = "reward_head.safetensors"
# The one tensor of that file, (members, hidden size) float32.
HEAD_TENSOR = f"{HEAD_NAME}.weight"


class RewardHead(nn.Module):
    """Linear map of hidden states to one score per member, float32 whatever the model's dtype.

    No bias: Bradley–Terry sees differences only.
    """

    def __init__(self, width: int, members: int = 1) -> None:
        super().__init__()
        # Scores of unit-variance states then start with a variance of about 1 (Stiennon et al.
        # 2020, appendix B). Draws from mlx's global generator.
        self.weight = mx.random.normal((members, width)) / math.sqrt(width + 1)

    def __call__(self, hidden: mx.array) -> mx.array:
        """Scores (…, members) of hidden states (…, D)."""
        return hidden.astype(mx.float32) @ self.weight.T


class ValueHead(nn.Module):
    """Linear map of hidden states to the expected return, float32 whatever the model's dtype.

    Starts at zero, or as the reward that it is to predict: see `value_tree`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = mx.zeros((1, width))
        self.bias = mx.zeros((1,))

    def __call__(self, hidden: mx.array) -> mx.array:
        """Values (…,) of hidden states (…, D)."""
        return (hidden.astype(mx.float32) @ self.weight.T)[..., 0] + self.bias


def value_tree(
    width: int, reward: mx.array | None, mean: float, scale: float
) -> dict[str, mx.array]:
    """Weights of a value head: zeros, or those with which it says what a reward model would.

    Args:
        width: D.
        reward: Weight (members, D) of a reward model's head; its members' mean is what it says.
        mean: What is subtracted from scores before they become rewards.
        scale: What they are then divided by.
    """
    if reward is None:
        return {"weight": mx.zeros((1, width)), "bias": mx.zeros((1,))}
    weight = reward.astype(mx.float32).mean(axis=0, keepdims=True) / scale
    return {"weight": weight, "bias": mx.array([-mean / scale])}


def put_value_head(anatomy: Anatomy) -> None:
    """Give the model a place for a value head; its weights come with the critic's tree."""
    head = ValueHead(hidden_width(anatomy))
    # Trained through the critic's tree; as a trainable part of the module it would be taken for
    # one of the vocabulary head's.
    head.freeze()
    anatomy.model[VALUE_NAME] = head


def token_values(
    anatomy: Anatomy, batch: GroupBatch, *, shared: bool = True, grad_checkpoint: bool = False
) -> mx.array:
    """Values (N, C) float32 before each completion token is said; 0 where the mask is false."""
    hidden = completion_hidden(anatomy, batch, shared=shared, grad_checkpoint=grad_checkpoint)
    return mx.where(batch.completion_mask, anatomy.model[VALUE_NAME](hidden), 0)


def hidden_width(anatomy: Anatomy) -> int:
    """D, the size of the model's hidden states."""
    return int(anatomy.hidden(mx.zeros((1, 1), mx.int32)).shape[-1])


def put_head(anatomy: Anatomy, weight: mx.array | None = None, *, members: int = 1) -> RewardHead:
    """Give the model a head: a fresh one of so many members, or one with `weight` (members, D).

    Raises:
        ModelError: The weight is of another width than the model's hidden states.
    """
    width = hidden_width(anatomy)
    if weight is None:
        head = RewardHead(width, members)
    else:
        if weight.ndim != 2 or weight.shape[1] != width:
            raise ModelError(
                f"the reward head has shape {weight.shape}, but this model's hidden states are "
                f"{width} wide; is it another base model?"
            )
        head = RewardHead(width, weight.shape[0])
        head.weight = weight.astype(mx.float32)
    anatomy.model[HEAD_NAME] = head
    mx.eval(head.parameters())
    return head


def completion_scores(
    anatomy: Anatomy, batch: GroupBatch, *, shared: bool = True, grad_checkpoint: bool = False
) -> mx.array:
    """Scores (N, members) float32 of the completions, each read at its last unmasked token.

    Where that is follows from the mask, never from token ids: pad may equal EOS. A completion
    without tokens (a filler) gets a finite number that means nothing.

    Args:
        anatomy: A model with a head, and whatever adapter it holds now.
        batch: B prompts and N completions.
        shared: Run each prompt once for all its completions.
        grad_checkpoint: Recompute activations in the backward pass.
    """
    mask = batch.completion_mask
    ends = mx.where(mask, mx.arange(1, mask.shape[1] + 1)[None], 0).max(axis=1)
    if batch.packing is not None:
        _, rows = packed_hidden(anatomy, batch, grad_checkpoint=grad_checkpoint)
        at = mx.take_along_axis(batch.packing.place, mx.maximum(ends - 1, 0)[:, None], axis=1)
        return _scores(anatomy, rows[0][at[:, 0]])
    # Hidden state t predicts token t, so the one that has read the last token is the one that
    # would predict what comes after it: one more (padded) column brings it in.
    wider = batch._replace(
        completion_tokens=mx.pad(batch.completion_tokens, [(0, 0), (0, 1)]),
        completion_mask=mx.pad(mask, [(0, 0), (0, 1)]),
    )
    hidden = completion_hidden(anatomy, wider, shared=shared, grad_checkpoint=grad_checkpoint)
    return _scores(anatomy, mx.take_along_axis(hidden, ends[:, None, None], axis=1)[:, 0])


def _scores(anatomy: Anatomy, hidden: mx.array) -> mx.array:
    scores: mx.array = anatomy.model[HEAD_NAME](hidden)
    return scores


def split_head(
    weights: Mapping[str, mx.array],
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """The tensors of a flat tree as (those of the adapter, those of the head)."""
    head = {name: array for name, array in weights.items() if name.startswith(HEAD_NAME + ".")}
    return {name: array for name, array in weights.items() if name not in head}, head


def has_head(folder: Path) -> bool:
    """Whether a run or adapter folder is that of a reward model."""
    return (folder / HEAD_WEIGHTS).is_file()


def read_head(folder: Path) -> mx.array:
    """The head (members, D) of a run folder.

    Raises:
        ModelError: There is none, it is damaged, or the file holds other tensors than the head.
    """
    file = folder / HEAD_WEIGHTS
    if not file.is_file():
        raise ModelError(
            f"{folder}: no {HEAD_WEIGHTS} in it, so it is no reward model; train one with "
            "mlx-align reward"
        )
    weights = read_tensors(file)
    if set(weights) != {HEAD_TENSOR}:
        found = ", ".join(sorted(weights)) or "nothing"
        raise ModelError(f"{file}: expected the tensor {HEAD_TENSOR} alone, found {found}")
    weight = weights[HEAD_TENSOR]
    if weight.ndim != 2:
        raise ModelError(f"{file}: {HEAD_TENSOR} has shape {weight.shape}, expected (members, D)")
    return weight
