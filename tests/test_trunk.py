"""The way through the model against a plain one: flat rows, full logits, eager, float32 softmax."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from families import FAMILIES, VOCAB, make_model
from mlx.utils import tree_flatten, tree_map

from mlx_align.models.adapters import AdapterLayout, install
from mlx_align.models.compat import dissect
from mlx_align.models.logps import batch_token_logps
from mlx_align.models.roles import acting_as
from mlx_align.models.selfcheck import check_paths
from mlx_align.types import GroupBatch

PROMPTS = (4, 11, 7)
COMPLETIONS = ((9, 5), (1, 8), (6, 3, 2))


def ragged_batch(pad: int = 0, prompts=PROMPTS, completions=COMPLETIONS, vocab: int = VOCAB):
    """Three prompts with 2, 2 and 3 completions of many lengths; the tokens don't depend on pad."""
    rows = sum(len(c) for c in completions)
    prompt_width = max(prompts)
    width = max(max(c) for c in completions)
    key = mx.random.key(7)
    prompt_tokens = mx.random.randint(1, vocab, (len(prompts), prompt_width), key=key)
    tokens = mx.random.randint(1, vocab, (rows, width), key=mx.random.split(key)[0])
    lengths = mx.array([length for c in completions for length in c])
    group = mx.array([g for g, c in enumerate(completions) for _ in c])
    return GroupBatch(
        mx.pad(prompt_tokens, [(0, 0), (0, pad)]),
        mx.array(prompts),
        mx.pad(tokens, [(0, 0), (0, pad)]),
        mx.arange(width + pad)[None] < lengths[:, None],
        group,
    )


def plain_logps(model: nn.Module, batch: GroupBatch) -> mx.array:
    """Log-probs (N, C): one row at a time, all logits, nothing shared."""
    rows = []
    width = batch.completion_tokens.shape[1]
    for n in range(batch.completion_tokens.shape[0]):
        g = int(batch.group[n])
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


def weights_of(batch: GroupBatch) -> mx.array:
    """A different cotangent for every token, so that no mistake cancels."""
    return mx.random.normal(batch.completion_tokens.shape, key=mx.random.key(11))


def gradient(model, logps_of, batch, *, compiled: bool = False):
    """Value and gradient of a weighted sum of log-probs by the trainable parameters."""
    weights = weights_of(batch)

    def scalar(tree, batch):
        with acting_as(model, tree):
            return (logps_of(batch) * weights).sum()

    function = mx.value_and_grad(scalar)
    if compiled:
        function = mx.compile(function)
    value, grads = function(model.trainable_parameters(), batch)
    mx.eval(value, grads)
    return value.item(), grads


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompt_equals_plain_rows(family):
    model = make_model(family)
    install(model, AdapterLayout(rank=4))
    scramble(model)
    anatomy = dissect(model)
    batch = ragged_batch()
    anatomy, shared, note = check_paths(anatomy, VOCAB)
    assert shared, note
    expected = plain_logps(model, batch)
    for pad in (0, 5):
        got = batch_token_logps(anatomy, ragged_batch(pad))[:, : expected.shape[1]]
        assert mx.allclose(got, expected, rtol=1e-5, atol=1e-5), (family, pad)

    model.train()
    value, grads = gradient(model, partial(plain_logps, model), batch)
    for shared in (True, False):
        for checkpoint in (False, True):
            for compiled in (False, True):
                way = partial(batch_token_logps, anatomy, shared=shared, grad_checkpoint=checkpoint)
                got_value, got = gradient(model, way, batch, compiled=compiled)
                assert got_value == pytest.approx(value, rel=1e-5)
                gap = difference(got, grads)
                assert gap < 1e-5, (family, shared, checkpoint, compiled, gap)
