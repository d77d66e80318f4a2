"""Batches, a plain forward pass and gradients that tests compare the package's with."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from helpers.families import VOCAB
from mlx_align.models.weights import use_adapter
from mlx_align.types import GroupBatch

PROMPTS = (4, 11, 7)
COMPLETIONS = ((9, 5), (1, 8), (6, 3))


def ragged_batch(pad: int = 0, prompts=PROMPTS, completions=COMPLETIONS, vocab: int = VOCAB):
    """Ragged prompts, each with as many completions; the tokens don't depend on pad."""
    rows = sum(len(c) for c in completions)
    prompt_width = max(prompts)
    width = max(max(c) for c in completions)
    key = mx.random.key(7)
    prompt_tokens = mx.random.randint(1, vocab, (len(prompts), prompt_width), key=key)
    tokens = mx.random.randint(1, vocab, (rows, width), key=mx.random.split(key)[0])
    lengths = mx.array([length for c in completions for length in c])
    return GroupBatch(
        mx.pad(prompt_tokens, [(0, 0), (0, pad)]),
        mx.array(prompts),
        mx.pad(tokens, [(0, 0), (0, pad)]),
        mx.arange(width + pad)[None] < lengths[:, None],
    )


def plain_logps(model: nn.Module, batch: GroupBatch) -> mx.array:
    """Log-probs (N, C): one row at a time, all logits, nothing shared."""
    rows = []
    width = batch.completion_tokens.shape[1]
    for n in range(batch.completion_tokens.shape[0]):
        g = n // (batch.completion_tokens.shape[0] // batch.prompt_tokens.shape[0])
        length = int(batch.completion_mask[n].sum())
        start = int(batch.prompt_lengths[g])
        completion = batch.completion_tokens[n, :length]
        tokens = mx.concatenate([batch.prompt_tokens[g, :start], completion])
        logits = model(tokens[None, :-1]).astype(mx.float32)[0, start - 1 :]
        logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        of_token = mx.take_along_axis(logps, completion[:, None], axis=-1)[:, 0]
        rows.append(mx.pad(of_token, [(0, width - length)]))
    return mx.stack(rows)


def scramble(model: nn.Module, size: float = 0.3) -> None:
    """Adapters far from the identity, so that every lora_a has a gradient."""
    mx.random.seed(3)
    model.update(
        tree_map(
            lambda p: p + size * mx.random.normal(p.shape).astype(p.dtype),
            model.trainable_parameters(),
        )
    )
    mx.eval(model.parameters())


def difference(a, b) -> float:
    """Relative distance ‖a − b‖ / ‖b‖ of two trees of gradients."""
    flat_a, flat_b = (dict(tree_flatten(tree)) for tree in (a, b))
    assert set(flat_a) == set(flat_b)
    square = sum(float(((flat_a[k] - flat_b[k]).astype(mx.float32) ** 2).sum()) for k in flat_b)
    norm = sum(float((flat_b[k].astype(mx.float32) ** 2).sum()) for k in flat_b)
    assert norm > 0
    return (square / norm) ** 0.5


def token_weights(batch: GroupBatch) -> mx.array:
    """A different cotangent for every token, so that no mistake cancels."""
    return mx.random.normal(batch.completion_tokens.shape, key=mx.random.key(11))


def gradient(model, logps_of, batch, *, compiled: bool = False):
    """Value and gradient of a weighted sum of log-probs by the trainable parameters."""
    weights = token_weights(batch)

    def scalar(tree, batch):
        with use_adapter(model, tree):
            return (logps_of(batch) * weights).sum()

    function = mx.value_and_grad(scalar)
    if compiled:
        function = mx.compile(function)
    value, grads = function(model.trainable_parameters(), batch)
    mx.eval(value, grads)
    return value.item(), grads
