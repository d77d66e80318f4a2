"""Batches: every group once, few shapes, little padding, an order that repeats."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_align.data.batching import (
    collate_groups,
    collate_pairs,
    epoch_order,
    microbatch_stream,
    padding_waste,
)
from mlx_align.data.shapes import MAX_SHAPES, BatchLimit, plan_shapes
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


def test_order_depends_on_seed_and_epoch_alone():
    groups = make_groups(60)
    shapes = plan_shapes(groups, BatchLimit(4))
    first = epoch_order(groups, shapes, seed=0, epoch=0)
    assert first == epoch_order(groups, shapes, seed=0, epoch=0)
    assert first != epoch_order(groups, shapes, seed=0, epoch=1)
    assert first != epoch_order(groups, shapes, seed=1, epoch=0)


def test_stream_can_be_entered_anywhere():
    groups = make_groups(23)
    shapes = plan_shapes(groups, BatchLimit(4))
    stream = microbatch_stream(groups, shapes, seed=5)
    batches = [next(stream) for _ in range(30)]
    for start in (0, 1, 5, 6, 13, 29):
        assert next(microbatch_stream(groups, shapes, seed=5, start=start)) == batches[start]


def test_padding_stays_small_on_ragged_data():
    groups = make_groups(600)
    for batch_size in (1, 4):
        shapes = plan_shapes(groups, BatchLimit(batch_size))
        order = epoch_order(groups, shapes, seed=0)
        one_shape = epoch_order(groups, plan_shapes(groups, BatchLimit(batch_size), 1), seed=0)
        waste = padding_waste(order, groups)
        # The two completions of a pair differ in length: that part no shape can save.
        assert waste < 0.45
        assert waste < 0.6 * padding_waste(one_shape, groups)


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
    shape = plan_shapes(groups, BatchLimit(4))[-1]
    batch = collate_groups(groups, shape)
    assert batch.prompt_lengths.tolist() == [2, 1, 1, 1]
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.completion_mask[:, :3].tolist() == [
        [True, False, False],
        [True, False, False],
        [True, False, True],
        [True, True, False],
        *[[False] * 3] * 4,
    ]
    assert batch.completion_tokens[2, :3].tolist() == [0, 0, 9]


def test_collate_pairs_puts_the_reference_beside_its_tokens():
    groups = make_groups(3, longest=12)
    reference = [
        tuple(np.arange(len(c), dtype=np.float32) + 100 * i for c in group.completions)
        for i, group in enumerate(groups)
    ]
    batch = collate_pairs(groups, reference, plan_shapes(groups, BatchLimit(4))[-1])
    assert batch.weight.tolist() == [1, 1, 1, 0]
    for i, group in enumerate(groups):
        for k, completion in enumerate(group.completions):
            row = batch.reference_logps[2 * i + k]
            assert row[: len(completion)].tolist() == reference[i][k].tolist()
            assert mx.all(row[len(completion) :] == 0)
