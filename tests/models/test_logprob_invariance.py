"""Log-probs of a completion depend on its prompt and its own tokens, not on the batch."""

from dataclasses import replace

import numpy as np
from helpers.oracle import trainable_weights
from helpers.strategies import NO_PADDING, PADDINGS, PROPERTY, microbatch, orders, ragged_groups
from hypothesis import given
from hypothesis import strategies as st

from mlx_align.data.batching import collate_groups
from mlx_align.data.buckets import PackedShape


def logprobs(model, groups, shape):
    """Per group and completion, the log-probs of its tokens."""
    batch = collate_groups(groups, shape)
    rows = np.array(model.token_logprobs(trainable_weights(model), batch))
    size = len(groups[0].completions)
    return [
        [rows[i * size + k, : len(ids)] for k, ids in enumerate(group.completions)]
        for i, group in enumerate(groups)
    ]


def assert_close(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


@PROPERTY
@given(ragged_groups(completions=2), PADDINGS)
def test_padding_and_fillers(tiny_policy, groups, padding):
    everything = range(len(groups))
    plain = microbatch(groups, everything, NO_PADDING).shape
    padded = microbatch(groups, everything, padding).shape
    expected = logprobs(tiny_policy, groups, plain)
    assert_close(logprobs(tiny_policy, groups, padded), expected)


@PROPERTY
@given(st.data(), ragged_groups(completions=2))
def test_order_of_the_groups(tiny_policy, data, groups):
    order = data.draw(orders(len(groups)))
    shape = microbatch(groups, order, NO_PADDING).shape
    expected = logprobs(tiny_policy, groups, shape)
    moved = logprobs(tiny_policy, [groups[i] for i in order], shape)
    assert_close(moved, [expected[i] for i in order])


@PROPERTY
@given(st.data(), ragged_groups(completions=3))
def test_order_of_the_completions(tiny_policy, data, groups):
    order = data.draw(orders(3))
    shape = microbatch(groups, range(len(groups)), NO_PADDING).shape
    moved = [replace(g, completions=tuple(g.completions[k] for k in order)) for g in groups]
    expected = logprobs(tiny_policy, groups, shape)
    assert_close(
        logprobs(tiny_policy, moved, shape), [[rows[k] for k in order] for rows in expected]
    )


@PROPERTY
@given(ragged_groups(completions=2))
def test_other_groups_of_the_batch(tiny_policy, groups):
    everything = range(len(groups))
    together = logprobs(tiny_policy, groups, microbatch(groups, everything, NO_PADDING).shape)
    for i in everything:
        shape = microbatch(groups, [i], NO_PADDING).shape
        assert_close(logprobs(tiny_policy, [groups[i]], shape), [together[i]])


@PROPERTY
@given(ragged_groups(completions=2), st.integers(0, 9), st.integers(0, 9))
def test_packing(tiny_policy, groups, more_prompt, more_completion):
    expected = logprobs(
        tiny_policy, groups, microbatch(groups, range(len(groups)), NO_PADDING).shape
    )
    lengths = [len(ids) for group in groups for ids in group.completions]
    packed = PackedShape(
        sum(len(group.prompt) for group in groups) + more_prompt,
        sum(lengths) + more_completion,
        len(groups),
        max(lengths),
    )
    assert_close(logprobs(tiny_policy, groups, packed), expected)
