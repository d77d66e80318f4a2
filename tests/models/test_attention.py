"""Attention in segments against mlx's own: values and gradients, every mask, every way to share."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.families import make_model
from mlx_lm.models import activations, llama

from mlx_align.models import attention, patches
from mlx_align.models.attention import blockwise_causal_attention, shared_prompt_attention
from mlx_align.models.patches import replace_attention, replace_swiglu

SCALE = 0.4


def random(*shape, seed=0, dtype=mx.float32):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def compare(ours, theirs, arrays, rtol=2e-5):
    """Both functions' values and gradients by all `arrays`, under a random cotangent."""
    cotangent = random(*theirs(*arrays).shape, seed=9)

    def scalar(function):
        return lambda *arrays: (function(*arrays).astype(mx.float32) * cotangent).sum()

    argnums = tuple(range(len(arrays)))
    for wrap in (lambda f: f, mx.compile):
        value, grads = wrap(mx.value_and_grad(scalar(ours), argnums))(*arrays)
        expected, expected_grads = mx.value_and_grad(scalar(theirs), argnums)(*arrays)
        assert value.item() == pytest.approx(expected.item(), rel=rtol, abs=rtol)
        for got, wanted in zip(grads, expected_grads, strict=True):
            assert got.shape == wanted.shape
            assert got.dtype == wanted.dtype
            got, wanted = (np.array(a.astype(mx.float32)) for a in (got, wanted))
            assert np.linalg.norm(got - wanted) <= rtol * np.linalg.norm(wanted)


@pytest.mark.parametrize("length", [1, 5, 8, 21, 64])
@pytest.mark.parametrize(("heads", "groups", "value_size"), [(4, 4, 8), (6, 2, 8), (4, 1, 5)])
def test_causal_self_attention(monkeypatch, length, heads, groups, value_size):
    monkeypatch.setattr(attention, "MIN_BLOCK_LENGTH", 5)
    arrays = [
        random(2, heads, length, 8, seed=1),
        random(2, groups, length, 8, seed=2),
        random(2, groups, length, value_size, seed=3),
    ]

    def theirs(q, k, v):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask="causal")

    compare(lambda q, k, v: blockwise_causal_attention(q, k, v, SCALE), theirs, arrays)


@pytest.mark.parametrize("each", [1, 2, 3])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_completions_of_ragged_prompts(each, heads, groups):
    width, length, lengths = 7, 4, mx.array([3, 7])
    rows = 2 * each
    arrays = [
        random(rows, heads, length, 8, seed=1),
        *(random(rows, groups, length, 8, seed=seed) for seed in (2, 3)),
        *(random(2, groups, width, 8, seed=seed) for seed in (4, 5)),
    ]
    inside = mx.repeat(mx.arange(width) < lengths[:, None], each, axis=0)[:, None, None]
    causal = mx.arange(length)[:, None] >= mx.arange(length)
    mask = mx.concatenate(
        [
            mx.broadcast_to(inside, (rows, 1, length, width)),
            mx.broadcast_to(causal, (rows, 1, length, length)),
        ],
        axis=-1,
    )

    def ours(q, k, v, prompt_k, prompt_v):
        return shared_prompt_attention(q, (k, v), (prompt_k, prompt_v), lengths, SCALE)

    def theirs(q, k, v, prompt_k, prompt_v):
        keys, values = (
            mx.concatenate([mx.repeat(prompt, each, axis=0), own], axis=-2)
            for prompt, own in ((prompt_k, k), (prompt_v, v))
        )
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=SCALE, mask=mask)

    compare(ours, theirs, arrays)
    # The padding of a prompt is never seen, even if it is not zero.
    arrays[3][0, :, 3:] = arrays[4][0, :, 3:] = 1e4
    compare(ours, theirs, arrays)


def test_large_score_differences_neither_overflow_nor_vanish():
    arrays = [random(1, 2, 6, 8, seed=s) * 60 for s in (1, 2)] + [random(1, 2, 6, 8, seed=3)]

    def theirs(q, k, v):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask="causal")

    compare(lambda q, k, v: blockwise_causal_attention(q, k, v, SCALE), theirs, arrays, rtol=1e-4)


def test_bf16_is_as_close_to_float32_as_mlxs():
    arrays = [random(1, 4, 40, 16, seed=s, dtype=mx.bfloat16) for s in (1, 2, 3)]
    cotangent = random(1, 4, 40, 16, seed=4)

    def theirs(q, k, v):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask="causal")

    def grads(function, arrays):
        def scalar(*arrays):
            return (function(*arrays).astype(mx.float32) * cotangent).sum()

        found = mx.grad(scalar, (0, 1, 2))(*arrays)
        return np.concatenate([np.array(g.astype(mx.float32)).ravel() for g in found])

    exact = grads(theirs, [a.astype(mx.float32) for a in arrays])
    ours = grads(lambda q, k, v: blockwise_causal_attention(q, k, v, SCALE), arrays)
    assert np.linalg.norm(ours - exact) <= 1.2 * np.linalg.norm(grads(theirs, arrays) - exact)


def test_only_causal_calls_are_replaced():
    q = random(1, 2, 6, 8)
    seen = []

    def ours(q, k, v, scale):
        seen.append(scale)
        return q * 0

    before = mx.fast.scaled_dot_product_attention
    with replace_attention(ours):
        call = mx.fast.scaled_dot_product_attention
        assert mx.all(call(q, q, q, scale=1.0, mask="causal") == 0)
        array = mx.ones((6, 6), mx.bool_)
        assert not mx.all(call(q, q, q, scale=2.0, mask=array) == 0)
        assert not mx.all(call(q, q, q, scale=3.0, mask="causal", sinks=mx.zeros(2)) == 0)
        assert not mx.all(call(q, q, q, scale=4.0) == 0)
    assert seen == [1.0]
    assert mx.fast.scaled_dot_product_attention is before


def test_memory_saving_swiglu_equals_mlx_lms():
    arrays = [random(3, 5, seed=1) * 20, random(3, 5, seed=2)]
    compare(patches.swiglu, activations.swiglu, arrays, rtol=1e-5)


def test_memory_saving_swiglu_is_removed_after_the_block():
    theirs = llama.swiglu
    with replace_swiglu(make_model("llama")):
        assert llama.swiglu is patches.swiglu
    assert llama.swiglu is theirs
