"""Scalar heads: the reward model's score of a completion, the critic's value of each token.

A head is a submodule of the language model, so its parameters are trained, swapped and saved along
with the adapter weights. On disk the reward head has its own file, because mlx-lm refuses adapter
files with tensors that it doesn't know.

Shape letters: N completions, C completion positions, D hidden size. A reward head has one or more
*members*, which are separate linear projections (an ensemble on one backbone).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_align.errors import ModelError
from mlx_align.models.backbone import Backbone
from mlx_align.models.forward import (
    completion_hidden_states,
    packed_hidden_states,
    target_logprobs,
)
from mlx_align.models.weights import read_tensors
from mlx_align.types import GroupBatch

REWARD_HEAD = "reward_head"
VALUE_HEAD = "value_head"
REWARD_HEAD_FILE = "reward_head.safetensors"
# The one tensor of that file, (members, D) float32.
REWARD_HEAD_TENSOR = f"{REWARD_HEAD}.weight"


class RewardHead(nn.Module):
    """Linear map of hidden states to one score per member, computed in float32.

    It has no bias: the Bradley–Terry loss sees only differences of scores.
    """

    def __init__(self, width: int, members: int = 1) -> None:
        super().__init__()
        # Scores of unit-variance states start with a variance of about 1 (Stiennon et al. 2020,
        # appendix B). Draws from mlx's global generator.
        self.weight = mx.random.normal((members, width)) / math.sqrt(width + 1)

    def __call__(self, hidden: mx.array) -> mx.array:
        """Scores (…, members) of hidden states (…, D)."""
        return hidden.astype(mx.float32) @ self.weight.T


class ValueHead(nn.Module):
    """Linear map of hidden states to the expected return, computed in float32.

    It starts at zero or as a reward model's head: see `value_head_weights`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = mx.zeros((1, width))
        self.bias = mx.zeros((1,))

    def __call__(self, hidden: mx.array) -> mx.array:
        """Values (…,) of hidden states (…, D)."""
        return (hidden.astype(mx.float32) @ self.weight.T)[..., 0] + self.bias


def hidden_width(backbone: Backbone) -> int:
    """D, the size of the model's hidden states."""
    return int(backbone.hidden(mx.zeros((1, 1), mx.int32)).shape[-1])


# Reward models


def add_reward_head(
    backbone: Backbone, weight: mx.array | None = None, *, members: int = 1
) -> RewardHead:
    """Add a reward head to the model: one with `weight` (members, D), or a fresh one.

    Raises:
        ModelError: The weight does not fit the model's hidden size.
    """
    width = hidden_width(backbone)
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
    backbone.model[REWARD_HEAD] = head
    mx.eval(head.parameters())
    return head


def completion_scores(
    backbone: Backbone, batch: GroupBatch, *, shared: bool = True, grad_checkpoint: bool = False
) -> mx.array:
    """Scores of the completions, read at each one's last unmasked token.

    The last token is found by the mask, never by token ids: pad may equal EOS. The score of a
    completion without tokens (a filler) is finite and has no meaning.

    Args:
        backbone: A model with a reward head, with the adapter weights it holds now.
        batch: B prompts and N completions.
        shared: As in `forward.token_logprobs`.
        grad_checkpoint: As in `forward.token_logprobs`.

    Returns:
        (N, members) float32.
    """
    mask = batch.completion_mask
    ends = mx.where(mask, mx.arange(1, mask.shape[1] + 1)[None], 0).max(axis=1)
    if batch.packing is not None:
        _, rows = packed_hidden_states(backbone, batch, grad_checkpoint=grad_checkpoint)
        at = mx.take_along_axis(batch.packing.place, mx.maximum(ends - 1, 0)[:, None], axis=1)
        return _scores(backbone, rows[0][at[:, 0]])
    # Hidden state t predicts token t. The state that has read the last token is the next one, so
    # the batch is widened by one column of padding.
    wider = batch._replace(
        completion_tokens=mx.pad(batch.completion_tokens, [(0, 0), (0, 1)]),
        completion_mask=mx.pad(mask, [(0, 0), (0, 1)]),
    )
    hidden = completion_hidden_states(
        backbone, wider, shared=shared, grad_checkpoint=grad_checkpoint
    )
    return _scores(backbone, mx.take_along_axis(hidden, ends[:, None, None], axis=1)[:, 0])


def _scores(backbone: Backbone, hidden: mx.array) -> mx.array:
    scores: mx.array = backbone.model[REWARD_HEAD](hidden)
    return scores


def split_head(
    weights: Mapping[str, mx.array],
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """Split flat weights into those of the adapter and those of the reward head."""
    head = {name: array for name, array in weights.items() if name.startswith(REWARD_HEAD + ".")}
    return {name: array for name, array in weights.items() if name not in head}, head


def has_reward_head(folder: Path) -> bool:
    """Whether a run or adapter folder is that of a reward model."""
    return (folder / REWARD_HEAD_FILE).is_file()


def read_reward_head(folder: Path) -> mx.array:
    """The weight (members, D) of the reward head in a run folder.

    Raises:
        ModelError: The folder has no head, or its file is damaged or has other tensors.
    """
    file = folder / REWARD_HEAD_FILE
    if not file.is_file():
        raise ModelError(
            f"{folder}: not a reward model (it has no {REWARD_HEAD_FILE}); train one with "
            "mlx-align reward"
        )
    weights = read_tensors(file)
    if set(weights) != {REWARD_HEAD_TENSOR}:
        found = ", ".join(sorted(weights)) or "nothing"
        raise ModelError(f"{file}: expected the tensor {REWARD_HEAD_TENSOR} alone, found {found}")
    weight = weights[REWARD_HEAD_TENSOR]
    if weight.ndim != 2:
        raise ModelError(
            f"{file}: {REWARD_HEAD_TENSOR} has shape {weight.shape}, expected (members, D)"
        )
    return weight


# Critics


def add_value_head(backbone: Backbone) -> None:
    """Add a value head of zeros to the model; its real weights come with the critic's weights."""
    head = ValueHead(hidden_width(backbone))
    # It is trained as part of the critic's weights. As a trainable part of the module it would
    # count as part of the vocabulary head.
    head.freeze()
    backbone.model[VALUE_HEAD] = head


def value_head_weights(width: int, reward: mx.array | None) -> dict[str, mx.array]:
    """Initial weights of a value head: zeros, or such that it predicts a reward model's score.

    Args:
        width: D.
        reward: Weight (members, D) of a reward model's head, whose score is the members' mean.
    """
    if reward is None:
        weight = mx.zeros((1, width))
    else:
        weight = reward.astype(mx.float32).mean(axis=0, keepdims=True)
    return {"weight": weight, "bias": mx.zeros((1,))}


def token_values(
    backbone: Backbone, batch: GroupBatch, *, shared: bool = True, grad_checkpoint: bool = False
) -> mx.array:
    """Values (N, C) float32 of the states before each completion token; 0 where the mask is false.

    Arguments as in `forward.token_logprobs`; the model must have a value head.
    """
    hidden = completion_hidden_states(
        backbone, batch, shared=shared, grad_checkpoint=grad_checkpoint
    )
    return mx.where(batch.completion_mask, backbone.model[VALUE_HEAD](hidden), 0)


def token_logprobs_and_values(
    backbone: Backbone,
    batch: GroupBatch,
    *,
    value_gradient: mx.array,
    shared: bool = True,
    grad_checkpoint: bool = False,
) -> tuple[mx.array, mx.array]:
    """Log-probs and values of a policy and a critic that share a backbone, in one pass.

    Args:
        backbone: A model with a value head.
        batch: As in `forward.token_logprobs`.
        value_gradient: Scalar, 1 or 0: whether the values' gradient reaches the backbone.
        shared: As in `forward.token_logprobs`.
        grad_checkpoint: As in `forward.token_logprobs`.

    Returns:
        Two (N, C) float32 arrays; 0 where the mask is false.
    """
    hidden = completion_hidden_states(
        backbone, batch, shared=shared, grad_checkpoint=grad_checkpoint
    )
    logps = target_logprobs(backbone, hidden, batch.completion_tokens)
    held = mx.stop_gradient(hidden)
    values = backbone.model[VALUE_HEAD](
        held + value_gradient.astype(hidden.dtype) * (hidden - held)
    )
    mask = batch.completion_mask
    return mx.where(mask, logps, 0), mx.where(mask, values, 0)
