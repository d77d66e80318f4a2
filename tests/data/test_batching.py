"""Batches: every group once, few shapes, little padding, a reproducible order."""

from collections import Counter
from itertools import islice

import mlx.core as mx
import numpy as np
import pytest

from mlx_align.config import DPOConfig
from mlx_align.data import batching
from mlx_align.data.batching import (
    collate_groups,
    collate_pairs,
    epoch_order,
    groups_per_batch,
    microbatch_stream,
    padding_fraction,
)
from mlx_align.data.buckets import MAX_SHAPES, BatchLimit, Shape, plan_shapes
from mlx_align.training.offline import total_microbatches
from mlx_align.types import TokenizedGroup


def make_groups(n, seed=0, longest=400):
    random = np.random.default_rng(seed)
    groups = []
    for i in range(n):
        lengths = np.clip(random.lognormal(4, 0.8, 3), 1, longest).astype(int)
        prompt, *completions = (random.integers(1, 90, k).astype(np.int32) for k in lengths)
        groups.append(TokenizedGroup(prompt, tuple(completions), f"train.jsonl:{i + 1}"))
    return groups


@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (3, 8), (97, 4), (500, 1), (500, 8)])
def test_every_group_once_per_epoch(n, batch_size):
    groups = make_groups(n)
    shapes = plan_shapes(groups, BatchLimit(batch_size))
    assert len(shapes) <= MAX_SHAPES
    assert {shape.groups for shape in shapes} == {min(batch_size, n)}
    for seed in (None, 0, 1):
        batches = epoch_order(groups, shapes, seed=seed)
        seen = [index for batch in batches for index in batch.indices]
        assert sorted(seen) == list(range(n))
        assert sum(len(batch.indices) < batch.shape.groups for batch in batches) <= 1
        for batch in batches:
            for index in batch.indices:
                assert len(groups[index].prompt) <= batch.shape.prompt
                longest = max(len(c) for c in groups[index].completions)
                assert longest <= batch.shape.completion


@pytest.mark.parametrize("epochs", [3.0, 4.5])
def test_a_run_of_packed_epochs_visits_every_row_as_often(epochs, monkeypatch):
    """Also where the order decides how many microbatches an epoch has."""
    monkeypatch.setattr(batching, "PACKING_WINDOW", 32)  # the ends of windows make the difference
    groups = make_groups(150, longest=200)
    shapes = plan_shapes(groups, BatchLimit(tokens=1500, packed=True))
    whole = int(epochs)
    lengths = [len(epoch_order(groups, shapes, seed=0, epoch=e)) for e in range(whole)]
    assert sum(lengths) != whole * lengths[0]
    total = total_microbatches(DPOConfig(epochs=epochs), groups, shapes)
    run = islice(microbatch_stream(groups, shapes, seed=0), total)
    visits = Counter(index for batch in run for index in batch.indices)
    assert len(visits) == 150
    assert set(visits.values()) == {whole, whole + (epochs > whole)}
    assert total == pytest.approx(epochs * sum(lengths) / whole, abs=0.5)
    # Without end, but not counted without end.
    many = total_microbatches(DPOConfig(epochs=1e5), groups, shapes)
    assert many == pytest.approx(1e5 * lengths[0], rel=0.1)


@pytest.mark.parametrize("tokens", [1, 700, 3000, 20_000])
def test_batch_tokens_limits_the_groups_of_a_batch(tokens):
    groups = make_groups(300)
    limit = BatchLimit(tokens=tokens)
    shapes = plan_shapes(groups, limit)
    assert len(shapes) <= MAX_SHAPES
    for shape in shapes:
        one = shape.prompt + 2 * shape.completion
        assert shape.groups == max(1, tokens // one)
    sizes = [shape.groups for shape in shapes]
    assert sizes == sorted(sizes, reverse=True)
    if tokens == 3000:
        assert len(set(sizes)) > 3
    order = epoch_order(groups, shapes, seed=0)
    assert sorted(i for batch in order for i in batch.indices) == list(range(300))
    # Leftover groups of a shape fill batches of larger ones: at most one batch is not full.
    assert sum(len(batch.indices) < batch.shape.groups for batch in order) <= 1
    assert groups_per_batch(groups, limit) == pytest.approx(300 / len(order), rel=0.05)
    batch = collate_groups([groups[i] for i in order[0].indices], order[0].shape)
    assert batch.prompt_tokens.shape == (order[0].shape.groups, order[0].shape.prompt)
    assert batch.completion_tokens.shape[0] == 2 * order[0].shape.groups


def test_shapes_hold_at_most_the_number_of_groups():
    for limit in (BatchLimit(64), BatchLimit(tokens=10**6)):
        assert plan_shapes(make_groups(5), limit)[-1].groups == 5


def test_shapes_minimise_padding():
    """Compared with all choices of two shapes from a few lengths."""
    random = np.random.default_rng(3)
    lengths = random.choice([8, 16, 40, 80], (40, 2))
    groups = [
        TokenizedGroup(np.ones(p, np.int32), (np.ones(c, np.int32),) * 2, "") for p, c in lengths
    ]
    lengths[0] = (80, 80)
    groups[0] = TokenizedGroup(np.ones(80, np.int32), (np.ones(80, np.int32),) * 2, "")

    def waste(shapes):
        return padding_fraction(epoch_order(groups, shapes, seed=0), groups)

    largest = Shape(80, 80, 1)
    tried = [
        waste([Shape(p, c, 1), largest])
        for p in (8, 16, 40, 80)
        for c in (8, 16, 40, 80)
        if (p, c) != (80, 80)
    ]
    assert waste(plan_shapes(groups, BatchLimit(), 2)) == pytest.approx(min(tried))
    assert waste(plan_shapes(groups, BatchLimit(), 3)) < min(tried)


def test_the_last_batch_has_the_shape_with_the_fewest_tokens():
    small = [TokenizedGroup(np.ones(8, np.int32), (np.ones(8, np.int32),) * 2, "") for _ in "abc"]
    shapes = [Shape(8, 8, 2), Shape(80, 80, 2)]
    order = epoch_order(small, shapes, seed=None)
    assert [(batch.indices, batch.shape) for batch in order] == [
        ((0, 1), shapes[0]),
        ((2,), shapes[0]),
    ]


def test_order_depends_only_on_seed_and_epoch():
    groups = make_groups(60)
    shapes = plan_shapes(groups, BatchLimit(4))
    first = epoch_order(groups, shapes, seed=0, epoch=0)
    assert first == epoch_order(groups, shapes, seed=0, epoch=0)
    assert first != epoch_order(groups, shapes, seed=0, epoch=1)
    assert first != epoch_order(groups, shapes, seed=1, epoch=0)


@pytest.mark.parametrize("limit", [BatchLimit(4), BatchLimit(tokens=700)])
def test_stream_can_start_anywhere(limit):
    groups = make_groups(300)
    shapes = plan_shapes(groups, limit)
    epochs = [epoch_order(groups, shapes, seed=5, epoch=epoch) for epoch in range(4)]
    if limit.tokens:
        assert len({len(epoch) for epoch in epochs}) > 1  # the leftover groups differ
    batches = [batch for epoch in epochs for batch in epoch]
    ends = np.cumsum([len(epoch) for epoch in epochs[:-1]])
    for start in [0, 1, 50, *ends - 1, *ends, *ends + 1]:
        assert next(microbatch_stream(groups, shapes, seed=5, start=start)) == batches[start]


def test_padding_stays_small_on_ragged_data():
    groups = make_groups(600)
    for batch_size in (1, 4):
        shapes = plan_shapes(groups, BatchLimit(batch_size))
        order = epoch_order(groups, shapes, seed=0)
        one_shape = epoch_order(groups, plan_shapes(groups, BatchLimit(batch_size), 1), seed=0)
        waste = padding_fraction(order, groups)
        # The two completions of a pair differ in length: no shape can avoid that padding.
        assert waste < 0.45
        assert waste < 0.6 * padding_fraction(one_shape, groups)


def test_collate_pads_and_masks():
    groups = [
        TokenizedGroup(np.array([5, 6], np.int32), (np.array([7], np.int32),) * 2, "a"),
        TokenizedGroup(
            np.array([5], np.int32),
            (np.array([0, 0, 9], np.int32), np.array([4, 4], np.int32)),
            "b",
            loss_masks=(np.array([True, False, True]), np.array([True, True])),
        ),
    ]
    shape = Shape(8, 8, 4)
    batch = collate_groups(groups, shape)
    assert batch.prompt_lengths.tolist() == [2, 1, 1, 1]
    assert batch.for_each_completion(mx.arange(4)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.completion_mask[:, :3].tolist() == [
        [True, False, False],
        [True, False, False],
        [True, False, True],
        [True, True, False],
        *[[False] * 3] * 4,
    ]
    assert batch.completion_tokens[2, :3].tolist() == [0, 0, 9]


def test_collate_pairs_aligns_reference_logps_with_tokens():
    groups = make_groups(3, longest=12)
    reference = [
        tuple(np.arange(len(c), dtype=np.float32) + 100 * i for c in group.completions)
        for i, group in enumerate(groups)
    ]
    batch = collate_pairs(groups, reference, Shape(16, 16, 4))
    assert batch.weight.tolist() == [1, 1, 1, 0]
    for i, group in enumerate(groups):
        for k, completion in enumerate(group.completions):
            row = batch.reference_logps[2 * i + k]
            assert row[: len(completion)].tolist() == reference[i][k].tolist()
            assert mx.all(row[len(completion) :] == 0)
