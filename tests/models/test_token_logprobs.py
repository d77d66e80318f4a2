"""The chunked head: chunks, dtypes and dropout don't change what is computed."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.families import make_model
from helpers.forward import difference, gradient, plain_logps, ragged_batch, scramble
from mlx.utils import tree_flatten, tree_map

from mlx_align.models import forward as logps_module
from mlx_align.models.adapters import AdapterLayout, install_adapters
from mlx_align.models.backbone import split_backbone
from mlx_align.models.forward import target_logprobs, token_logprobs
from mlx_align.models.verification import verify_forward
from mlx_align.models.weights import use_adapter


def prepared(family="qwen2", dtype=mx.float32, bits=None, **layout):
    model = make_model(family, dtype)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    install_adapters(model, AdapterLayout(rank=4, **layout))
    scramble(model, 0.1)
    return model, split_backbone(model)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_chunk_size_changes_nothing(monkeypatch, family):
    model, backbone = prepared(family)
    backbone, shared, _ = verify_forward(backbone, 160)
    assert shared
    model.train()
    results = []
    monkeypatch.setattr(logps_module, "MIN_CHUNK_ROWS", 1)
    for rows in (5, 23, 1000):
        monkeypatch.setattr(logps_module, "CHUNK_ELEMENTS", 160 * rows)
        results.append(gradient(model, partial(token_logprobs, backbone), ragged_batch()))
    for value, grads in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-6)
        assert difference(grads, results[0][1]) < 2e-6


def test_log_softmax_is_float32_in_a_bf16_model():
    _, backbone = prepared(dtype=mx.bfloat16)
    hidden = mx.random.normal((64, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    targets = mx.random.randint(0, 160, (64,), key=mx.random.key(2))
    logits = backbone.logits(hidden)
    assert logits.dtype == mx.bfloat16

    def logps(logits):
        every = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.take_along_axis(every, targets[:, None], axis=-1)[:, 0].astype(mx.float32)

    exact = logps(logits.astype(mx.float32))
    assert mx.abs(logps(logits) - exact).max().item() > 0.03  # what it would lose in bf16
    got = target_logprobs(backbone, hidden, targets)
    assert got.dtype == mx.float32
    assert mx.abs(got - exact).max().item() < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_model_with_quantised_head(bits):
    model, backbone = prepared(bits=bits)
    model.train()
    value, grads = gradient(model, partial(plain_logps, model), ragged_batch())
    for checkpoint in (False, True):
        way = partial(token_logprobs, backbone, grad_checkpoint=checkpoint)
        got_value, got = gradient(model, way, ragged_batch(), compiled=True)
        assert got_value == pytest.approx(value, rel=1e-5)
        assert difference(got, grads) < 1e-5


def test_log_probs_do_not_depend_on_padding_and_batch_mates():
    _, backbone = prepared()
    alone = ragged_batch(prompts=(4,), completions=((9, 5),))
    padded = alone._replace(
        prompt_tokens=mx.pad(alone.prompt_tokens, [(0, 0), (0, 9)], constant_values=3),
        completion_tokens=mx.pad(alone.completion_tokens, [(0, 0), (0, 6)], constant_values=3),
        completion_mask=mx.pad(alone.completion_mask, [(0, 0), (0, 6)]),
    )
    expected = token_logprobs(backbone, alone)
    got = token_logprobs(backbone, padded)
    assert mx.allclose(got[:, :9], expected, atol=1e-5)
    assert mx.all(got[:, 9:] == 0)


def test_recomputed_blocks_use_the_same_dropout():
    # The derivative along a direction, by differences with the same draws, knows no checkpoint.
    model, backbone = prepared(dropout=0.4)
    model.train()
    batch = ragged_batch()
    tree = model.trainable_parameters()
    direction = tree_map(lambda p: mx.random.normal(p.shape, key=mx.random.key(5)), tree)

    def value(tree):
        mx.random.seed(9)
        with use_adapter(model, tree):
            return token_logprobs(backbone, batch, grad_checkpoint=True).sum()

    _, grads = mx.value_and_grad(value)(tree)
    along = sum(
        (g * d).sum().item() for g, d in zip(_leaves(grads), _leaves(direction), strict=True)
    )
    h = 1e-3
    up, down = (
        value(tree_map(lambda p, d, s=s: p + s * h * d, tree, direction)).item() for s in (1, -1)
    )
    assert along == pytest.approx((up - down) / (2 * h), rel=0.02)
    assert value(tree).item() == value(tree).item()
    model.eval()
    assert value(tree).item() != pytest.approx(along)


def _leaves(tree):
    return [leaf for _, leaf in tree_flatten(tree)]


def test_a_family_that_cannot_share_falls_back_and_says_so(monkeypatch):
    from mlx_align.models import prefix_cache

    model, backbone = prepared()
    monkeypatch.setattr(
        prefix_cache, "make_prompt_cache", lambda _: [object() for _ in model.layers]
    )
    _, shared, note = verify_forward(backbone, 160)
    assert not shared
    assert "once per completion" in note
    monkeypatch.undo()
    # Sharing that is wrong (positions that don't continue) is found out too.
    monkeypatch.setattr(
        prefix_cache.PromptKV,
        "completion_cache",
        lambda self, rows, lengths, axes: prefix_cache.CompletionKV(
            self.keys, self.values, lengths + 2, rows, None, axes
        ),
    )
    _, shared, note = verify_forward(backbone, 160)
    assert not shared
    assert "sharing changes log-probs" in note


def test_a_layer_that_cannot_be_adapted_is_a_one_line_error():
    from helpers.families import make_model as make

    from mlx_align.errors import ModelError
    from mlx_align.models.verification import verify_adapters

    model = make("gemma3n")
    backbone = split_backbone(model)
    install_adapters(model, AdapterLayout(rank=4))
    with pytest.raises(ModelError, match="--lora-keys"):
        verify_adapters(backbone, 160)
