"""Packed rows: groups one behind the other, and not one log-prob or gradient differs for it."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from helpers.families import VOCAB, make_model
from helpers.forward import difference, gradient, plain_logps, ragged_batch, scramble

from mlx_align.algorithms.dpo import PreferenceObjective
from mlx_align.algorithms.update import accumulate, collate_microbatches
from mlx_align.data.batching import (
    Microbatch,
    collate_groups,
    epoch_order,
    microbatch_stream,
    padding_fraction,
)
from mlx_align.data.buckets import (
    MAX_SHAPES,
    BatchLimit,
    PackedShape,
    Shape,
    packed_lengths,
    plan_shapes,
)
from mlx_align.inference.scoring import make_logprob_scorer
from mlx_align.losses.registry import combine, parse_losses
from mlx_align.models import attention
from mlx_align.models.adapters import AdapterLayout, install_adapters
from mlx_align.models.backbone import split_backbone
from mlx_align.models.forward import token_logprobs, token_logprobs_and_square_sums
from mlx_align.models.heads import add_reward_head, completion_scores
from mlx_align.models.loading import LanguageModel
from mlx_align.models.verification import packed_batch, verify_forward
from mlx_align.types import TokenizedGroup


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch):
    monkeypatch.setattr(attention, "MIN_BLOCK_LENGTH", 3)  # rows of some 30 tokens have several


def adapted(family):
    model = make_model(family)
    install_adapters(model, AdapterLayout(rank=4))
    scramble(model, 0.2)
    backbone, _, note = verify_forward(split_backbone(model), VOCAB)
    assert backbone.packs, note
    return model, backbone


def make_groups(n, seed=0, longest=400, mean=4.0):
    random = np.random.default_rng(seed)
    groups = []
    for i in range(n):
        lengths = np.clip(random.lognormal(mean, 0.8, 3), 1, longest).astype(int)
        prompt, *completions = (random.integers(1, VOCAB, k).astype(np.int32) for k in lengths)
        groups.append(TokenizedGroup(prompt, tuple(completions), f"train.jsonl:{i + 1}"))
    return groups


# qwen2: biases and tied embeddings; deepseek_v2: latent attention; glm4: part of a head rotates.
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "mixtral", "deepseek_v2", "glm4"])
def test_packed_rows_equal_plain_ones(family):
    model, backbone = adapted(family)
    batch = ragged_batch()
    expected = plain_logps(model, batch)
    for pad in (0, 5):
        got = token_logprobs(backbone, packed_batch(batch, pad))
        assert mx.allclose(got, expected, rtol=1e-5, atol=1e-5), (family, pad)
    model.train()
    value, grads = gradient(model, partial(plain_logps, model), batch)
    # Compiled on a CPU, every new kernel is a C++ compiler's run: for one family only.
    for compiled in {False, family == "llama"}:
        for checkpoint in (False, True):
            way = partial(token_logprobs, backbone, grad_checkpoint=checkpoint)
            got_value, got = gradient(model, way, packed_batch(batch, 4), compiled=compiled)
            assert got_value == pytest.approx(value, rel=1e-5)
            assert difference(got, grads) < 1e-5, (family, checkpoint, compiled)


def test_no_group_sees_another():
    _, backbone = adapted("llama")
    batch = ragged_batch()
    before = np.array(token_logprobs(backbone, packed_batch(batch, 2)))
    for b in range(3):
        prompts, completions = batch.prompt_tokens + 0, batch.completion_tokens + 0
        prompts[b] = prompts[b] % (VOCAB - 1) + 1
        completions[2 * b + 1] = completions[2 * b + 1] % (VOCAB - 1) + 1
        changed = batch._replace(prompt_tokens=prompts, completion_tokens=completions)
        after = np.array(token_logprobs(backbone, packed_batch(changed, 2)))
        same = [(row == now).all() for row, now in zip(before, after, strict=True)]
        assert same == [n // 2 != b for n in range(6)]


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma2", "its blocks need masks as arrays"),
        ("gemma3_text", "RotatingKVCache"),
        ("qwen3_5", "ArraysCache"),
        ("stablelm", "keys that are not their cache's"),
        ("gpt2", "can't run them in one row"),
    ],
)
def test_families_that_cannot_be_packed_say_so(family, why):
    backbone, shared, note = verify_forward(split_backbone(make_model(family)), VOCAB)
    assert shared
    assert not backbone.packs
    assert "padded, not packed" in note
    assert why in note


def test_a_model_that_leaks_is_not_packed(monkeypatch):
    real = attention.packed_attention

    def blind(queries, own, sequence, *others):
        return real(queries, own, mx.zeros_like(sequence), *others)

    monkeypatch.setattr("mlx_align.models.prefix_cache.packed_attention", blind)
    backbone, shared, note = verify_forward(split_backbone(make_model("llama")), VOCAB)
    assert shared
    assert not backbone.packs
    assert "packing changes log-probs" in note


def test_square_sums_of_packed_rows():
    _, backbone = adapted("qwen2")
    batch = ragged_batch()
    for got, wanted in zip(
        token_logprobs_and_square_sums(backbone, packed_batch(batch, 3)),
        token_logprobs_and_square_sums(backbone, batch),
        strict=True,
    ):
        assert mx.allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_scores_of_packed_rows():
    _, backbone = adapted("llama")
    add_reward_head(backbone, members=2)
    groups = make_groups(3, longest=9, mean=1.5)
    nothing = np.zeros(0, np.int32)  # as a ranked list shorter than others is filled up
    groups[1] = TokenizedGroup(groups[1].prompt, (groups[1].completions[0], nothing), "")
    padded = completion_scores(backbone, collate_groups(groups, Shape(16, 16, 3)))
    (shape,) = plan_shapes(groups, BatchLimit(tokens=96, packed=True))
    for way in (False, True):
        found = completion_scores(backbone, collate_groups(groups, shape), grad_checkpoint=way)
        real = np.array([0, 1, 2, 4, 5])
        assert np.isfinite(np.array(found)).all()
        assert np.abs(np.array(found)[real] - np.array(padded)[real]).max() < 1e-5


def test_dpo_gradient_of_packed_batches():
    """One packed batch, and two that are not full, against one padded one."""
    model, backbone = adapted("llama")
    groups = make_groups(5, longest=20, mean=2.0)
    random = np.random.default_rng(1)
    reference = [
        tuple(random.normal(-5, 0.2, len(c)).astype(np.float32) for c in group.completions)
        for group in groups
    ]
    whole = LanguageModel(None, backbone, True, "")
    objective = PreferenceObjective(
        whole,
        combine(parse_losses("sigmoid"), {"beta": 0.1}),
        groups,
        reference,
        make_logprob_scorer(whole),
        grad_checkpoint=False,
    )
    tree = model.trainable_parameters()
    model.train()

    def run(micro):
        batches = [objective.collate(m) for m in micro]
        totals = objective.totals(batches)
        step = mx.value_and_grad(objective.loss)
        return accumulate(step, tree, collate_microbatches(objective, batches, micro), totals)

    loss, sums, grads = run([Microbatch((0, 1, 2, 3, 4), Shape(24, 24, 5))])
    row = PackedShape(120, 240, 6, 24)
    for micro in (
        [Microbatch((3, 1, 0, 4, 2), row)],
        [Microbatch((4, 1), row), Microbatch((2, 0, 3), row)],
    ):
        got_loss, got_sums, got = run(micro)
        assert got_loss == pytest.approx(loss, rel=1e-5)
        assert got_sums == pytest.approx(sums, rel=1e-4, abs=1e-5)
        assert difference(got, grads) < 1e-5


@pytest.mark.parametrize("tokens", [64, 700, 2048, 20_000])
def test_every_group_once_and_inside_its_rows(tokens):
    groups = make_groups(300)
    shapes = plan_shapes(groups, BatchLimit(tokens=tokens, packed=True))
    assert 1 <= len(shapes) <= MAX_SHAPES
    widest = np.max([packed_lengths(group) for group in groups], axis=0).sum() + 16
    assert all(shape.prompt + shape.completion <= max(tokens, widest) for shape in shapes)
    for seed in (None, 0):
        order = epoch_order(groups, shapes, seed=seed)
        assert sorted(i for batch in order for i in batch.indices) == list(range(300))
        for batch in order:
            filled = np.sum([packed_lengths(groups[i]) for i in batch.indices], axis=0)
            assert (filled <= batch.shape[:2]).all()
            assert len(batch.indices) <= batch.shape.groups
            collate_groups([groups[i] for i in batch.indices], batch.shape)


@pytest.mark.parametrize("tokens", [2048, 4096])
def test_little_padding_on_ragged_data(tokens):
    groups = make_groups(1500)
    shapes = plan_shapes(groups, BatchLimit(tokens=tokens, packed=True))
    for epoch in range(2):
        assert padding_fraction(epoch_order(groups, shapes, seed=0, epoch=epoch), groups) < 0.15


def test_order_is_reproducible_from_any_position():
    groups = make_groups(100)
    shapes = plan_shapes(groups, BatchLimit(tokens=1024, packed=True))
    epochs = [epoch_order(groups, shapes, seed=5, epoch=epoch) for epoch in range(3)]
    assert epochs[0] == epoch_order(groups, shapes, seed=5, epoch=0)
    assert epochs[0] != epochs[1] != epoch_order(groups, shapes, seed=6, epoch=1)
    batches = [batch for epoch in epochs for batch in epoch]
    for start in (0, 1, len(epochs[0]) - 1, len(epochs[0]), len(epochs[0]) + 1):
        assert next(microbatch_stream(groups, shapes, seed=5, start=start)) == batches[start]


def test_packed_rows_map_back_to_their_completions():
    groups = make_groups(4, longest=12)
    mask = np.arange(len(groups[1].completions[0])) > 0
    ones = np.ones(len(groups[1].completions[1]), np.bool_)
    groups[1] = TokenizedGroup(groups[1].prompt, groups[1].completions, "", loss_masks=(mask, ones))
    batch = collate_groups(groups, PackedShape(56, 104, 5, 16))
    assert batch.packing is not None
    padded = collate_groups(groups, Shape(16, 16, 5))
    assert mx.array_equal(batch.completion_mask, padded.completion_mask)
    assert mx.array_equal(batch.completion_tokens, padded.completion_tokens)
    assert batch.prompt_lengths.tolist() == [*(len(g.prompt) for g in groups), 0]
    prompts = np.concatenate([group.prompt for group in groups])
    assert batch.prompt_tokens[0, : len(prompts)].tolist() == prompts.tolist()
    back = np.array(batch.packing.tokens)[np.array(batch.packing.place)]
    for n, completion in enumerate(c for group in groups for c in group.completions):
        assert back[n, : len(completion)].tolist() == completion.tolist()
