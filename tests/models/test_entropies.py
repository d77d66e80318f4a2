"""Entropies and the sampling temperature, against full logits of one row at a time."""

from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.families import VOCAB, make_model
from helpers.forward import difference, ragged_batch, scramble, token_weights

from mlx_align.models import forward as logps_module
from mlx_align.models.adapters import AdapterLayout, install_adapters
from mlx_align.models.backbone import split_backbone
from mlx_align.models.forward import (
    target_logprobs,
    token_logprobs,
    token_logprobs_and_entropies,
    token_logprobs_and_square_sums,
)
from mlx_align.models.verification import packed_batch, verify_forward
from mlx_align.models.weights import use_adapter


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setattr(logps_module, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(logps_module, "CHUNK_ELEMENTS", VOCAB * 7)


def plain(model, temperature, batch):
    """Log-probs and entropies (N, C): one row at a time, all logits, nothing shared."""
    rows = []
    width = batch.completion_tokens.shape[1]
    each = batch.completion_tokens.shape[0] // batch.prompt_tokens.shape[0]
    for n in range(batch.completion_tokens.shape[0]):
        length, start = int(batch.completion_mask[n].sum()), int(batch.prompt_lengths[n // each])
        completion = batch.completion_tokens[n, :length]
        tokens = mx.concatenate([batch.prompt_tokens[n // each, :start], completion])
        logits = model(tokens[None, :-1]).astype(mx.float32)[0, start - 1 :] / temperature
        every = nn.log_softmax(logits, axis=-1)
        logps = mx.take_along_axis(every, completion[:, None], axis=-1)[:, 0]
        entropies = -(mx.exp(every) * every).sum(-1)
        rows.append(mx.pad(mx.stack([logps, entropies]), [(0, 0), (0, width - length)]))
    return mx.stack(rows, axis=1)


def weighted_gradient(model, values_of, batch, weight):
    """Of Σ a·logp + weight·Σ b·entropy, with other factors a, b for every token."""
    a, b = token_weights(batch), mx.random.normal(batch.completion_mask.shape, key=mx.random.key(4))

    def scalar(tree):
        with use_adapter(model, tree):
            logps, entropies = values_of(batch)
        return (logps * a).sum() + weight * (entropies * b).sum()

    value, grads = mx.value_and_grad(scalar)(model.trainable_parameters())
    mx.eval(value, grads)
    return value.item(), grads


def adapted(family, head="frozen", bits=None):
    model = make_model(family)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    install_adapters(model, AdapterLayout(rank=4))
    if head == "trained":
        (model.lm_head if "lm_head" in model else model.model.embed_tokens).unfreeze()
    scramble(model, 0.1)
    backbone, _, _ = verify_forward(split_backbone(model), VOCAB)
    assert bool(backbone.trainable_head()) == (head == "trained")
    model.train()
    return model, backbone


# qwen2: tied embeddings; llama: its own head; gemma2: soft caps behind a tied one.
@pytest.mark.parametrize(
    ("family", "head", "bits"),
    [
        ("qwen2", "frozen", None),
        ("llama", "frozen", None),
        ("gemma2", "frozen", None),
        ("qwen2", "frozen", 4),
        ("llama", "frozen", 4),
        ("llama", "trained", None),
        ("qwen2", "trained", None),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropies_equal_those_of_full_logits(family, head, bits, temperature):
    model, backbone = adapted(family, head, bits)
    backbone, batch = replace(backbone, temperature=temperature), ragged_batch()
    expected = plain(model, temperature, batch)
    for training in (True, False):
        model.train(training)
        got = mx.stack(token_logprobs_and_entropies(backbone, batch))
        assert mx.allclose(got, expected, rtol=1e-5, atol=2e-5)
    model.train()
    # Of entropies alone, so that log-probs can't hide them, and of both.
    for weight in (1.0, 1000.0):
        value, grads = weighted_gradient(model, partial(plain, model, temperature), batch, weight)
        for checkpoint in (False, True):
            way = partial(token_logprobs_and_entropies, backbone, grad_checkpoint=checkpoint)
            got_value, got_grads = weighted_gradient(model, way, batch, weight)
            assert got_value == pytest.approx(value, rel=1e-5, abs=1e-4)  # terms cancel
            # Rows that share nothing differ from the plain ones by up to 0.9e-5 there.
            assert difference(got_grads, grads) < (1e-5 if weight == 1 else 2e-5)


def test_packed_entropies():
    model, backbone = adapted("llama")
    assert backbone.packs
    batch = ragged_batch()
    value, grads = weighted_gradient(model, partial(plain, model, 1.0), batch, 10.0)
    got_value, got_grads = weighted_gradient(
        model, partial(token_logprobs_and_entropies, backbone), packed_batch(batch, 4), 10.0
    )
    assert got_value == pytest.approx(value, rel=1e-5)
    assert difference(got_grads, grads) < 1e-5


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_entropies_without_gradient(head):
    """As numbers to look at: the same numbers, and the gradient is that of log-probs alone."""
    model, backbone = adapted("llama", head)
    batch = ragged_batch()
    look = partial(token_logprobs_and_entropies, backbone, entropy_gradient=False)
    assert mx.allclose(mx.stack(look(batch)), plain(model, 1.0, batch), rtol=1e-5, atol=2e-5)
    _, with_them = weighted_gradient(model, look, batch, 5.0)
    logps_alone = partial(token_logprobs_and_entropies, backbone)
    _, without = weighted_gradient(model, logps_alone, batch, 0.0)
    assert difference(with_them, without) < 1e-6


def test_temperature_reaches_every_function():
    """In eval and in training, with a head that is scaled after the division or before."""
    model, backbone = adapted("gemma2")
    batch, hot = ragged_batch(), replace(backbone, temperature=1.7)
    logps, _ = plain(model, 1.7, batch)
    for training in (True, False):
        model.train(training)
        for values in (
            token_logprobs(hot, batch),
            token_logprobs_and_square_sums(hot, batch)[0],
            token_logprobs_and_entropies(hot, batch)[0],
        ):
            assert mx.allclose(values, logps, rtol=1e-5, atol=1e-5)
    assert mx.abs(token_logprobs(backbone, batch) - logps).max().item() > 0.1


def test_temperature_of_a_bf16_model_divides_in_float32():
    model = make_model("qwen2", mx.bfloat16)
    backbone = split_backbone(model)
    hidden = mx.random.normal((64, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    targets = mx.random.randint(0, VOCAB, (64,), key=mx.random.key(2))
    exact = nn.log_softmax(backbone.logits(hidden).astype(mx.float32) / 0.7, axis=-1)
    exact = mx.take_along_axis(exact, targets[:, None], axis=-1)[:, 0]
    got = target_logprobs(replace(backbone, temperature=0.7), hidden, targets)
    assert mx.abs(got - exact).max().item() < 1e-5


def test_a_certain_distribution_has_no_entropy_and_a_finite_gradient():
    """One logit far above the rest, and words that are ruled out by −∞."""
    _, backbone = adapted("llama")
    ruled_out = mx.where(mx.arange(VOCAB) % 2 == 1, -mx.inf, 0.0)

    class Masked:
        model = backbone.model

        @staticmethod
        def trainable_head():
            return {}

        @staticmethod
        def logits(hidden):
            return hidden * 200 + ruled_out

    hidden = mx.zeros((2, VOCAB))
    hidden[0, 0] = 1.0
    targets = mx.array([0, 0])

    def total(hidden):
        logps, entropies = logps_module._head(Masked, hidden, targets, "entropy")
        return logps.sum() + entropies.sum(), (logps, entropies)

    (_, (logps, entropies)), grads = mx.value_and_grad(total)(hidden)
    assert logps.tolist() == pytest.approx([0.0, -mx.log(mx.array(VOCAB / 2)).item()], abs=1e-5)
    assert entropies.tolist() == pytest.approx([0.0, mx.log(mx.array(VOCAB / 2)).item()], abs=1e-5)
    assert mx.all(mx.isfinite(grads)).item()
