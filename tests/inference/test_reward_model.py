"""Finding and opening reward models: runs, classifiers, and a base shared with the policy."""

import json

import numpy as np
import pytest
from test_implicit_reward import PROMPT, TINY_MODEL, adapter, config
from test_rerank import CLASSIFIER, judge  # noqa: F401

from mlx_align import RewardModel
from mlx_align.errors import ModelError
from mlx_align.inference.reward_model import (
    find_reward_model,
    load_policy_and_reward_model,
    open_reward_model,
)
from mlx_align.models.adapters import AdapterLayout, read_layout
from mlx_align.models.loading import open_model

ANSWERS = ["yes", "no, never"]


def test_a_run_is_found_with_the_base_it_names(judge):  # noqa: F811
    source = find_reward_model(judge)
    assert source.run == judge
    assert source.base.path == TINY_MODEL
    folder = open_model(str(TINY_MODEL))
    assert find_reward_model(judge, folder).base is folder
    assert source.shares_base(folder)
    assert source.shares_base(folder, AdapterLayout("lora", rank=3))
    assert not source.shares_base(folder, AdapterLayout("dora"))
    assert not source.shares_base(open_model(str(CLASSIFIER)))


def test_a_classifier_has_a_base_of_its_own():
    source = find_reward_model(str(CLASSIFIER))
    assert source.run is None
    assert not source.shares_base(open_model(str(CLASSIFIER)))
    found = open_reward_model(source).score(PROMPT, ANSWERS)
    assert found == RewardModel.load(str(CLASSIFIER)).score(PROMPT, ANSWERS)


@pytest.mark.parametrize("kind", ["lora", "dora", None])
def test_a_policy_and_a_reward_model_score_as_they_do_alone(tmp_path, judge, kind):  # noqa: F811
    policy = None
    if kind is not None:
        policy = adapter(tmp_path / "policy", AdapterLayout(kind, rank=4), config(), size=0.05)
    folder = open_model(str(TINY_MODEL))
    _, _, reward = load_policy_and_reward_model(folder, policy, find_reward_model(judge, folder))
    # An adapter of another kind can't take turns with LoRA on one model.
    assert (reward.weights is None) == (kind == "dora")
    alone = open_reward_model(judge).score(PROMPT, ANSWERS)
    np.testing.assert_allclose(reward.score(PROMPT, ANSWERS), alone, atol=1e-5)


def test_names_that_are_no_reward_model(tmp_path, judge):  # noqa: F811
    with pytest.raises(ModelError, match=r"--reward-model .*policy: neither a run of mlx-align"):
        find_reward_model(str(TINY_MODEL))
    with pytest.raises(ModelError, match=r"^--eval-reward-model nowhere"):
        find_reward_model("nowhere", option="--eval-reward-model")
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in judge.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    content = json.loads((moved / "adapter_config.json").read_text())
    del content["model"]
    (moved / "adapter_config.json").write_text(json.dumps(content))
    assert read_layout(moved) == read_layout(judge)
    with pytest.raises(ModelError, match='"model" is missing'):
        find_reward_model(moved)
    folder = open_model(str(TINY_MODEL))
    assert find_reward_model(moved, folder).base is folder
