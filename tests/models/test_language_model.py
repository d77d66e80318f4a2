"""The methods of LanguageModel: what they compute for given weights, and what they leave behind."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.families import VOCAB, make_model
from helpers.forward import ragged_batch, scramble
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import activations, llama

from mlx_align.models import forward, heads
from mlx_align.models.adapters import AdapterLayout, install_adapters
from mlx_align.models.backbone import split_backbone
from mlx_align.models.loading import LanguageModel
from mlx_align.models.patches import apply_patches
from mlx_align.models.verification import verify_forward
from mlx_align.models.weights import use_adapter


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    module = make_model("llama")
    install_adapters(module, AdapterLayout(rank=4))
    backbone, shared, note = verify_forward(split_backbone(module), VOCAB)
    heads.add_reward_head(backbone, members=2)
    heads.add_value_head(backbone)
    module[heads.VALUE_HEAD].weight = mx.random.normal((1, 64), key=mx.random.key(1))
    scramble(module)
    return LanguageModel(None, backbone, shared, note)


@pytest.mark.parametrize(
    ("method", "function"),
    [
        ("token_logprobs", forward.token_logprobs),
        ("token_logprobs_and_square_sums", forward.token_logprobs_and_square_sums),
        ("token_logprobs_and_entropies", forward.token_logprobs_and_entropies),
        ("scores", heads.completion_scores),
        ("values", heads.token_values),
    ],
)
def test_methods_use_the_given_weights_and_restore_the_others(model, method, function):
    before = model.module.trainable_parameters()
    weights = tree_map(lambda w: 0.5 * w, before)
    batch = ragged_batch()
    own = function(model.backbone, batch)
    with use_adapter(model.module, weights):
        expected = function(model.backbone, batch)
    for checkpoint in (False, True):
        found = getattr(model, method)(weights, batch, grad_checkpoint=checkpoint)
        for a, b in zip(tree_flatten(found), tree_flatten(expected), strict=True):
            assert np.allclose(a[1], b[1], atol=1e-6)
    assert not np.allclose(tree_flatten(own)[0][1], tree_flatten(expected)[0][1], atol=1e-3)
    after = dict(tree_flatten(model.module.trainable_parameters()))
    assert all(after[name] is array for name, array in tree_flatten(before))


@pytest.mark.parametrize("reaches", [0.0, 1.0])
def test_log_probs_and_values_share_one_pass(model, reaches):
    """Both are those of a pass of their own; the values' gradient is multiplied by `reaches`."""
    weights, batch = model.module.trainable_parameters(), ragged_batch()
    gradient = mx.array(reaches)
    logps, values = model.token_logprobs_and_values(weights, batch, value_gradient=gradient)
    assert mx.array_equal(logps, model.token_logprobs(weights, batch))
    assert np.allclose(values, model.values(weights, batch), atol=1e-6)

    def of_both(weights):
        return model.token_logprobs_and_values(weights, batch, value_gradient=gradient)[1].sum()

    def alone(weights):
        return model.values(weights, batch).sum()

    both, separate = (dict(tree_flatten(mx.grad(f)(weights))) for f in (of_both, alone))
    for name in both:
        assert np.allclose(both[name], reaches * separate[name], rtol=1e-4, atol=1e-5), name


def test_patches_are_gone_after_the_block(model):
    def patched():
        return (mx.fast.scaled_dot_product_attention, mx.fast.rope, llama.swiglu)

    before = patched()
    assert llama.swiglu is activations.swiglu
    with apply_patches(model.module, lambda *_: None, packed=True):
        assert all(now is not then for now, then in zip(patched(), before, strict=True))
    assert patched() == before


def test_patches_are_gone_after_an_error(model):
    original = mx.fast.rope

    def fails():
        with apply_patches(model.module, lambda *_: None, packed=True):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert mx.fast.rope is original
