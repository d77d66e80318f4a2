"""The way through the model against a plain one: flat rows, full logits, eager, float32 softmax."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import pytest
from helpers.families import FAMILIES, FLAT_FAMILIES, REFUSED_FAMILIES, VOCAB, make_model
from helpers.forward import difference, gradient, plain_logps, ragged_batch, scramble
from helpers.scripts import load_script

from mlx_align.errors import ModelError
from mlx_align.models import attention
from mlx_align.models.adapters import AdapterLayout, install_adapters
from mlx_align.models.backbone import split_backbone
from mlx_align.models.forward import token_logprobs
from mlx_align.models.verification import verify_forward

# One of each kind, for the tests that go every way.
KINDS = (
    "llama",
    "qwen2",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mixtral",
    "deepseek_v2",
    "qwen3_5",
)

# Compiled on a CPU without a GPU, every new kernel is a C++ compiler's run of a second: few of
# them here, all in the script.
COMPILED = ("llama", "gemma2")


@pytest.mark.parametrize("family", KINDS)
def test_shared_prompt_equals_plain_rows(family, monkeypatch):
    monkeypatch.setattr(attention, "MIN_BLOCK_LENGTH", 3)  # the longest prompt is four of them
    model = make_model(family)
    install_adapters(model, AdapterLayout(rank=4))
    # Larger ones make attention choose single keys, where float32's own error nears 1e-5.
    scramble(model, 0.2)
    backbone = split_backbone(model)
    batch = ragged_batch()
    backbone, shared, note = verify_forward(backbone, VOCAB)
    assert shared, note
    expected = plain_logps(model, batch)
    for pad in (0, 5):
        got = token_logprobs(backbone, ragged_batch(pad))[:, : expected.shape[1]]
        assert mx.allclose(got, expected, rtol=1e-5, atol=1e-5), (family, pad)

    model.train()
    value, grads = gradient(model, partial(plain_logps, model), batch)
    for shared in (True, False):
        for checkpoint in (False, True):
            for compiled in {False, family in COMPILED}:
                way = partial(token_logprobs, backbone, shared=shared, grad_checkpoint=checkpoint)
                got_value, got = gradient(model, way, batch, compiled=compiled)
                assert got_value == pytest.approx(value, rel=1e-5)
                gap = difference(got, grads)
                assert gap < 1e-5, (family, shared, checkpoint, compiled, gap)


def test_many_completions_of_a_prompt():
    model = make_model("qwen2")
    install_adapters(model, AdapterLayout(rank=4))
    scramble(model, 0.2)
    batch = ragged_batch(prompts=(4, 11), completions=((9, 5, 1, 2), (1, 8, 3, 3)))
    model.train()
    value, grads = gradient(model, partial(plain_logps, model), batch)
    for checkpoint in (False, True):
        way = partial(token_logprobs, split_backbone(model), grad_checkpoint=checkpoint)
        got_value, got = gradient(model, way, batch)
        assert got_value == pytest.approx(value, rel=1e-5)
        assert difference(got, grads) < 1e-5


def test_only_gemma2_needs_an_array_as_mask():
    # Where it is an array, prompts' keys are copied for every completion: right, but for nothing.
    axes = {}
    for family in KINDS:
        backbone, _, _ = verify_forward(split_backbone(make_model(family)), VOCAB)
        axes[family] = backbone.mask_axes
    assert {name for name, n in axes.items() if n} == {"gemma2"}, axes


@pytest.fixture(scope="module")
def script():
    return load_script("verify_families")


# Why a family's rows are run whole: a part of what the check at load says.
REASONS = {
    "mamba": "sharing changes log-probs",
    "nemotron_h": "sharing changes log-probs",
    "jamba": "sharing changes log-probs",
    "rwkv7": "sharing changes log-probs",
    "falcon_h1": "CacheList",
    "baichuan_m1": "CacheList",
    "deepseek_v32": "CacheList",
    "llama4": "ChunkedKVCache",
    "gemma3n": "keys_and_values",
    "internlm2-dynamic": "can't run them together",
}


@pytest.mark.parametrize("family", [*FAMILIES, *FLAT_FAMILIES])
def test_dpo_gradient_of_every_family(script, family):
    # The whole product of ways is the script's; here, two opposite corners of it.
    ways = [script.Way(checkpoint=c, compiled=False, accumulated=c) for c in (False, True)]
    result = script.verify(family, "float32", ways)
    assert result.shared == (family in FAMILIES), result.note
    assert REASONS.get(family, "prompts are shared") in result.note
    assert result.passed, (result.gaps, result.allowed)
    assert result.allowed <= 1e-5
    assert result.loss_gap <= 1e-5


@pytest.mark.parametrize("family", COMPILED)
def test_dpo_gradient_checkpointed_compiled_and_accumulated(script, family):
    result = script.verify(family, "float32", [script.Way(True, True, True)])
    assert result.worst <= 1e-5, result.gaps


@pytest.mark.parametrize("precision", ["bf16", "4-bit"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_dpo_gradient_in_low_precision(script, family, precision):
    ways = [script.Way(False, False, False), script.Way(True, False, True)]
    result = script.verify(family, precision, ways)
    assert result.shared, result.note
    assert result.passed, result
    # In bf16 the plain formula is off by some percent: more would prove nothing.
    assert result.allowed < (0.2 if precision == "bf16" else 1.1e-5)


def test_filler_groups_do_not_change_the_gradient(script):
    model = script.prepare("qwen3_5", "float32")
    pairs = script.make_pairs()
    tree = model.module.trainable_parameters()
    reference = script.reference_near(model.module, pairs)
    model.module.train()
    loss, grads = script.plain_gradient(model.module, tree, pairs, reference)
    way = script.Way(checkpoint=True, compiled=False, accumulated=True)
    got_loss, got = script.package_gradient(model, tree, pairs, reference, way, batch_size=3)
    # The gated delta rule is summed in chunks, in mlx-lm token by token: a gap of 1.04e-6.
    assert got_loss == pytest.approx(loss, rel=2e-6)
    assert difference(got, grads) < 1e-5


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_a_family_that_cannot_be_run_is_refused(script, family):
    with pytest.raises(ModelError, match="this model is not supported"):
        script.prepare(family, "float32")
