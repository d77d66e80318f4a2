"""Loss and gradient of an update don't depend on padding, order and split into microbatches."""

import pytest
from helpers.oracle import assert_same_update, reference_near, trainable_weights, update
from helpers.strategies import (
    NO_PADDING,
    PADDINGS,
    PROPERTY,
    microbatch,
    orders,
    ragged_groups,
    splits,
)
from hypothesis import given
from hypothesis import strategies as st

from mlx_align.algorithms.dpo import PreferenceObjective
from mlx_align.algorithms.kto import KtoLoss, UnpairedObjective
from mlx_align.algorithms.reward_modeling import RewardObjective
from mlx_align.algorithms.sft import SupervisedObjective
from mlx_align.config import RewardConfig
from mlx_align.data.transforms import add_mismatched
from mlx_align.inference.scoring import make_logprob_scorer
from mlx_align.losses.registry import UNPAIRED_LOSSES, combine, parse_losses, resolve_options
from mlx_align.models.heads import add_reward_head

# `aot` sorts over the pairs of an update; `sigmoid_norm` and `simpo` divide by lengths.
LOSSES = ("sigmoid", "sigmoid_norm", "simpo", "aot", "kto", "nll", "reward")


@pytest.fixture(scope="module")
def model(tiny_policy):
    """The tiny policy with a reward head, which only the reward objective uses."""
    add_reward_head(tiny_policy.backbone)
    return tiny_policy


def objective_of(loss, model, groups):
    scorer, checkpoint = make_logprob_scorer(model), {"grad_checkpoint": False}
    if loss == "nll":
        return SupervisedObjective(model, loss, groups, **checkpoint)
    if loss == "reward":
        return RewardObjective(model, groups, RewardConfig(grad_checkpoint=False))
    if loss == "kto":
        kto = KtoLoss(loss, UNPAIRED_LOSSES[loss], resolve_options(loss, {}))
        groups = add_mismatched(groups, seed=0)
        reference = reference_near(model, groups)
        return UnpairedObjective(model, kto, groups, reference, scorer, **checkpoint)
    pair_loss = combine(parse_losses(loss), {})
    reference = reference_near(model, groups) if pair_loss.needs_reference else None
    return PreferenceObjective(model, pair_loss, groups, reference, scorer, **checkpoint)


def assert_same(model, loss, groups, parts, padding=NO_PADDING):
    """The update in microbatches of these groups equals that of one batch without padding."""
    objective, weights = objective_of(loss, model, groups), trainable_weights(model)
    groups = objective.groups  # KTO adds mismatched completions
    micro = [microbatch(groups, part, padding) for part in parts]
    plain = [microbatch(groups, range(len(groups)), NO_PADDING)]
    expected = update(model, objective, weights, plain)
    assert_same_update(update(model, objective, weights, micro), expected)


def groups_for(loss):
    return ragged_groups(completions=1 if loss in ("kto", "nll") else 2)


@pytest.mark.parametrize("loss", LOSSES)
@PROPERTY
@given(st.data())
def test_padding_and_fillers(model, loss, data):
    groups = data.draw(groups_for(loss))
    assert_same(model, loss, groups, [range(len(groups))], data.draw(PADDINGS))


@pytest.mark.parametrize("loss", LOSSES)
@PROPERTY
@given(st.data())
def test_order(model, loss, data):
    groups = data.draw(groups_for(loss))
    assert_same(model, loss, groups, [data.draw(orders(len(groups)))])


@pytest.mark.parametrize("loss", LOSSES)
@PROPERTY
@given(st.data())
def test_microbatches(model, loss, data):
    """Of any size, each with its own shape, and the groups in any order."""
    groups = data.draw(groups_for(loss))
    parts = data.draw(splits(data.draw(orders(len(groups)))))
    assert_same(model, loss, groups, parts, data.draw(PADDINGS))
