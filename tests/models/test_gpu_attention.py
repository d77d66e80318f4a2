"""Attention on a GPU: its mathematics on the CPU, and what a training step would call on a Mac."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from helpers import gpu
from helpers.families import FAMILIES, FLAT_FAMILIES, LORA_KEYS, VOCAB, make_model
from helpers.forward import difference, gradient, plain_logps, ragged_batch, scramble
from mlx.utils import tree_flatten, tree_unflatten

from mlx_align.errors import ModelError
from mlx_align.models import gpu_attention, patches, verification
from mlx_align.models.adapters import AdapterLayout, install_adapters
from mlx_align.models.attention import shared_prompt_attention
from mlx_align.models.backbone import split_backbone
from mlx_align.models.forward import token_logprobs
from mlx_align.models.patches import CausalMask
from mlx_align.models.prefix_cache import CompletionKV
from mlx_align.models.verification import packed_batch, verify_forward, verify_gradient
from mlx_align.models.weights import use_adapter
from mlx_align.types import GroupBatch

SCALE = 0.4
MLX_ATTENTION = mx.fast.scaled_dot_product_attention


def random(*shape, seed=0, dtype=mx.float32):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def value_and_gradients(function, arrays):
    cotangent = random(*function(*arrays).shape, seed=9)

    def scalar(*arrays):
        return (function(*arrays).astype(mx.float32) * cotangent).sum()

    value, gradients = mx.value_and_grad(scalar, tuple(range(len(arrays))))(*arrays)
    return value.item(), [np.array(g.astype(mx.float32)) for g in gradients]


def assert_equal(ours, theirs, arrays, tolerance=1e-5):
    value, gradients = value_and_gradients(ours, arrays)
    expected, expected_gradients = value_and_gradients(theirs, arrays)
    assert value == pytest.approx(expected, rel=tolerance, abs=tolerance)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert got.shape == wanted.shape
        assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted)


def plain_attention(q, k, v, mask, sinks=None, softcap=None):
    """All scores at once, in a few lines."""
    each = q.shape[1] // k.shape[1]
    k, v = (mx.repeat(array, each, axis=1) for array in (k, v))
    scores = q @ k.swapaxes(-1, -2) * SCALE
    if softcap is not None:
        scores = softcap * mx.tanh(scores / softcap)
    scores = mx.where(mask, scores, -mx.inf)
    if sinks is not None:
        column = mx.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
        return mx.softmax(mx.concatenate([scores, column], axis=-1), axis=-1)[..., :-1] @ v
    return mx.softmax(scores, axis=-1) @ v


def causal(length, window=None):
    position = mx.arange(length)
    seen = position[:, None] >= position
    return seen if window is None else seen & (position[:, None] - position < window)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of five queries: most rows here have several."""
    monkeypatch.setattr(gpu_attention, "MIN_BLOCK_LENGTH", 5)
    monkeypatch.setattr(gpu_attention, "BLOCK_SCORES", 1)


@pytest.fixture(params=["one kernel", "blocks"])
def on_gpu(request, monkeypatch, small_blocks):
    """The package takes its paths for GPUs; mlx's attention is computed on the CPU."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    fused = request.param == "one kernel"
    monkeypatch.setattr(gpu_attention, "has_fused_backward", lambda *_: fused)
    # Shapes that a kernel would not take are padded, up to a length that no row here has.
    monkeypatch.setattr(gpu_attention, "FEWEST_QUERIES", 30)


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_in_blocks(small_blocks, window, softcap, with_sinks):
    q = random(2, 6, 13, 8, seed=1)
    k, v = random(2, 2, 13, 8, seed=2), random(2, 2, 13, 5, seed=3)
    arrays = [q, k, v, *([random(6, seed=4)] if with_sinks else [])]

    def ours(q, k, v, sinks=None):
        return gpu_attention.gpu_attention(
            q, k, v, SCALE, CausalMask(window), sinks, softcap, MLX_ATTENTION
        )

    def theirs(q, k, v, sinks=None):
        return plain_attention(q, k, v, causal(13, window), sinks, softcap)

    assert_equal(ours, theirs, arrays)


@pytest.mark.parametrize("shape", [(13, 13), (1, 13, 13), (2, 1, 13, 13), (2, 1, 1, 13)])
def test_masks_as_arrays_in_blocks(small_blocks, shape):
    mask = mx.random.uniform(shape=shape, key=mx.random.key(4)) < 0.6
    mask[..., 0] = True  # every query sees a key
    arrays = [random(2, 6, 13, 8, seed=1), *(random(2, 2, 13, 8, seed=s) for s in (2, 3))]

    def ours(q, k, v):
        return gpu_attention.gpu_attention(q, k, v, SCALE, mask, None, None, MLX_ATTENTION)

    whole = mask[:, None] if mask.ndim == 3 else mask
    assert_equal(ours, lambda q, k, v: plain_attention(q, k, v, whole), arrays)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("width", [7, 90])
def test_completions_of_ragged_prompts(monkeypatch, small_blocks, fused, foreign, each, width):
    monkeypatch.setattr(gpu_attention, "has_fused_backward", lambda *_: True)
    length, lengths, rows = 4, mx.array([3, width]), 2 * each
    arrays = [
        random(rows, 6, length, 8, seed=1),
        *(random(rows, 2, length, 8, seed=seed) for seed in (2, 3)),
        *(random(2, 2, width, 8, seed=seed) for seed in (4, 5)),
    ]

    def ours(q, k, v, prompt_k, prompt_v):
        prompts = CompletionKV(prompt_k, prompt_v, lengths, rows, None, 0)
        keys, values = prompts.update_and_fetch(k, v)
        if foreign:  # a block that changes its keys, as stablelm does
            keys = keys + 0
        mask = CausalMask(None, lengths)
        return gpu_attention.gpu_attention(
            q, keys, values, SCALE, mask, None, None, MLX_ATTENTION, fused=fused
        )

    def theirs(q, k, v, prompt_k, prompt_v):
        return shared_prompt_attention(q, (k, v), (prompt_k, prompt_v), lengths, SCALE)

    assert_equal(ours, theirs, arrays)
    # The padding of a prompt is never seen, even if it is not zero.
    arrays[3][0, :, 3:] = arrays[4][0, :, 3:] = 1e4
    assert_equal(ours, theirs, arrays)
    CompletionKV.clear_last()


def test_bf16_in_blocks_is_as_close_to_float32_as_mlxs(small_blocks):
    arrays = [random(1, 4, 40, 16, seed=s, dtype=mx.bfloat16) for s in (1, 2, 3)]

    def ours(q, k, v):
        return gpu_attention.gpu_attention(
            q, k, v, SCALE, "causal", None, None, MLX_ATTENTION, fused=False
        )

    def theirs(q, k, v):
        return MLX_ATTENTION(q, k, v, scale=SCALE, mask="causal")

    exact = np.concatenate(
        [g.ravel() for g in value_and_gradients(theirs, [a.astype(mx.float32) for a in arrays])[1]]
    )
    gaps = [
        np.linalg.norm(np.concatenate([g.ravel() for g in found]) - exact)
        for found in (value_and_gradients(way, arrays)[1] for way in (ours, theirs))
    ]
    assert gaps[0] <= 1.2 * gaps[1]


# One of each kind of attention: plain, soft caps, windows, sinks, latent (two kinds), keys that a
# block changes or borrows, recurrent layers, whole rows.
KINDS = (
    "llama",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "gemma4_text",
    "stablelm",
    "kimi_linear",
    "llama4",
)


@pytest.mark.parametrize("family", KINDS)
def test_gradients_equal_plain_rows(on_gpu, family):
    model = make_model(family)
    install_adapters(model, AdapterLayout(rank=4))
    scramble(model, 0.2)
    batch = ragged_batch()
    backbone, shared, note = verify_forward(split_backbone(model), VOCAB)
    assert shared == (family in FAMILIES), note
    assert backbone.mask_axes == (0 if shared else 1), note
    model.train()
    value, wanted = gradient(model, partial(plain_logps, model), batch)
    # kimi_linear amplifies rounding: the CPU's path is off by 2.6e-5 of the plain one.
    tolerance = 1e-4 if family == "kimi_linear" else 1e-5
    ways = [(shared, True), (False, False)]
    for together, checkpoint in ways:
        way = partial(token_logprobs, backbone, shared=together, grad_checkpoint=checkpoint)
        got_value, got = gradient(model, way, batch)
        assert got_value == pytest.approx(value, rel=1e-5)
        assert difference(got, wanted) < tolerance, (family, together, checkpoint)


def test_packed_rows(on_gpu):
    model = make_model("llama")
    install_adapters(model, AdapterLayout(rank=4))
    scramble(model, 0.2)
    backbone, _, _ = verify_forward(split_backbone(model), VOCAB)
    assert backbone.packs
    model.train()
    batch = ragged_batch()
    value, wanted = gradient(model, partial(plain_logps, model), batch)
    way = partial(token_logprobs, backbone, grad_checkpoint=True)
    got_value, got = gradient(model, way, packed_batch(batch, pad=3))
    assert got_value == pytest.approx(value, rel=1e-5)
    assert difference(got, wanted) < 1e-5


def test_compiled(on_gpu):
    # Attention alone: on a CPU, each new kernel of a compiled model takes a C++ compiler a second.
    q, k, v = (random(1, 2, 8, 8, seed=seed) for seed in (1, 2, 3))

    def total(q, k, v):
        out = gpu_attention.gpu_attention(q, k, v, SCALE, "causal", None, None, MLX_ATTENTION)
        return mx.square(out).sum()

    expected = mx.value_and_grad(total, (0, 1, 2))(q, k, v)
    got = mx.compile(mx.value_and_grad(total, (0, 1, 2)))(q, k, v)
    assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    for a, b in zip(got[1], expected[1], strict=True):
        assert np.linalg.norm(np.array(a - b)) <= 1e-5 * np.linalg.norm(np.array(b))


def test_a_cpu_has_no_fused_backward():
    assert not gpu_attention.has_fused_backward(4, 2, 64, 64, 128, mx.float32)
    q = random(1, 4, 20, 64)
    assert gpu_attention.fused_length(q, q, q) is None


# What a training step would call


def batch_of(length, completion=None):
    """One padded prompt of `length` tokens with two completions about as long."""
    width = length + 1 if completion is None else completion
    return GroupBatch(
        mx.ones((1, length), mx.int32),
        mx.array([length - 3]),
        mx.ones((2, width), mx.int32),
        mx.ones((2, width), mx.bool_),
    )


@pytest.fixture
def mac(monkeypatch):
    """The rules of mlx's Metal backend, for the tiny heads of these models too."""
    monkeypatch.setattr(gpu, "FUSED_SIZES", gpu.FUSED_SIZES | {(16, 16)})
    monkeypatch.setattr(gpu_attention, "BLOCK_SCORES", 1 << 10)
    return monkeypatch


def trained(family):
    model = make_model(family)
    install_adapters(model, AdapterLayout(rank=4, keys=LORA_KEYS.get(family)))
    # On a GPU, verification at load finds these for all families (see KINDS above).
    return replace(split_backbone(model), mask_axes=0)


def step(monkeypatch, backbone, shared, batch):
    """The arrays of a gradient's graph on a Mac, and what was called for it."""
    backbone.model.train()
    flat = tree_flatten(backbone.model.trainable_parameters())

    def scalar(*arrays):
        weights = tree_unflatten([(n, a) for (n, _), a in zip(flat, arrays[4:], strict=True)])
        with use_adapter(backbone.model, weights):
            rows = GroupBatch(*arrays[:4])
            return token_logprobs(backbone, rows, shared=shared, grad_checkpoint=True).sum()

    arrays = [*batch[:4], *(array for _, array in flat)]
    with gpu.as_on_a_mac(monkeypatch, gradient=True) as spy:
        return gpu.trace_gradient(monkeypatch, scalar, arrays), spy


# Layers without attention, or with sizes of heads that mlx has no kernel for.
NOT_FUSED = {
    "gemma2": "soft caps",
    "gpt_oss": "sinks",
    "gemma4_text": "32 per head",
    "deepseek_v2": "24 and 16 per head",
    "deepseek_v3": "24 and 16 per head",
    "glm4_moe_lite": "24 and 16 per head",
    "minicpm3": "24 and 16 per head",
    "deepseek_v32": "24 and 16 per head",
    "kimi_linear": "24 and 16 per head",
    "mamba2": "no attention",
    "mamba": "no attention",
    "rwkv7": "no attention",
}
# Its indexer scores every query and key.
QUADRATIC = {"deepseek_v32"}
# mlx-lm runs their layers token by token.
LOOPS = {"rwkv7", "mamba", "jamba"}
# Their scores are those of chunks of 256 tokens.
CHUNKS = {"mamba2", "nemotron_h", "falcon_h1"}


@pytest.mark.parametrize("family", [*FAMILIES, *FLAT_FAMILIES])
def test_a_step_on_a_mac(mac, family):
    backbone = trained(family)
    largest = []
    length = 12 if family in LOOPS else 512 if family in CHUNKS else 64
    for size in (length, 2 * length):
        # A kernel without a gradient raises here.
        traced, spy = step(mac, backbone, family in FAMILIES, batch_of(size))
        largest.append(gpu.largest(traced))
    assert not spy.kernels
    assert bool(spy.fused) == (family not in NOT_FUSED), spy
    assert bool(spy.unfused) == (family == "deepseek_v32"), spy
    if family not in QUADRATIC:
        # An array with an entry for every query and key would be four times as large.
        assert largest[1] <= 2.1 * largest[0], max(traced, key=lambda a: math.prod(a.shape))


def test_the_spy_sees_score_matrices(mac):
    # As it was: attention.py keeps the exponentials of the scores.
    backbone = trained("llama")
    mac.setattr("mlx_align.models.forward.on_gpu", lambda: False)
    mac.setattr("mlx_align.models.prefix_cache.on_gpu", lambda: False)
    largest = []
    for length in (64, 128):
        traced, spy = step(mac, backbone, True, batch_of(length))
        largest.append(gpu.largest(traced))
    assert not spy.fused
    assert largest[1] > 3 * largest[0]


def test_the_spy_sees_kernels_without_a_gradient(mac):
    mac.setattr(patches, "without_custom_kernels", nullcontext)
    with pytest.raises(ValueError, match="Not implemented for CustomKernel"):
        step(mac, trained("rwkv7"), False, batch_of(6))
    # A single token behind its prompt's state.
    with pytest.raises(ValueError, match="Not implemented for CustomKernel"):
        step(mac, trained("mamba2"), True, batch_of(6, completion=2))


def test_short_rows_avoid_the_kernel_for_decoding(mac):
    for length in (1, 3, 4):
        batch = batch_of(length + 3, completion=2)._replace(prompt_lengths=mx.array([length]))
        _, spy = step(mac, trained("llama"), True, batch)
        assert all(call.queries[2] > gpu.DECODING_QUERIES for call in spy.fused)


@pytest.mark.parametrize("family", ["llama", "rwkv7", "mamba2", "gpt_oss"])
def test_log_probs_without_a_gradient_on_a_mac(mac, family):
    backbone = trained(family)
    with gpu.as_on_a_mac(mac, gradient=False) as spy:
        out = token_logprobs(backbone, batch_of(12), shared=family in FAMILIES)
    assert out.shape == (2, 13)
    # Without a gradient, mlx-lm's kernels are welcome.
    assert bool(spy.kernels) == (family == "rwkv7")
    assert bool(spy.fused) == (family == "llama")


# The check at load


def test_the_kernel_is_used_if_its_gradient_is_right(on_gpu, monkeypatch):
    backbone = trained("llama")
    assert verify_gradient(backbone, VOCAB).fused
    assert not backbone.model.training

    def wrong(q, k, v, **others):
        return MLX_ATTENTION(q, mx.stop_gradient(k), v, **others)

    def failing(*_args, **_others):
        raise RuntimeError("NYI: attention sinks")

    fused = gpu_attention.has_fused_backward()
    for broken in (wrong, failing):
        monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", broken)
        assert verify_gradient(backbone, VOCAB).fused == (not fused)


def test_dropout_does_not_disturb_the_check(on_gpu):
    model = make_model("llama")
    install_adapters(model, AdapterLayout(rank=4, dropout=0.5))
    key = patches.random_key()
    assert verify_gradient(split_backbone(model), VOCAB).fused
    assert patches.random_key() == key


def test_a_model_without_a_gradient_is_refused(on_gpu, monkeypatch):
    def kernel(*_args, **_others):
        raise ValueError("[Primitive::vjp] Not implemented for CustomKernel.\nMore lines.")

    monkeypatch.setattr(verification, "token_logprobs", kernel)
    with pytest.raises(ModelError) as error:
        verify_gradient(trained("llama"), VOCAB)
    assert "can't be trained on a GPU" in str(error.value)
    assert "\n" not in str(error.value)
