"""Finding and opening reward models: runs, classifiers, and a base shared with the policy."""

import json

import numpy as np
import pytest
from helpers.inference import PROMPT, dpo_config, write_adapter
from helpers.paths import CLASSIFIERS, TINY_MODEL

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
CLASSIFIER = CLASSIFIERS / "qwen2"


def test_a_run_is_found_with_the_base_it_names(reward_run):
    source = find_reward_model(reward_run)
    assert source.run == reward_run
    assert source.base.path == TINY_MODEL
    folder = open_model(str(TINY_MODEL))
    assert find_reward_model(reward_run, folder).base is folder
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
def test_a_policy_and_a_reward_model_score_as_they_do_alone(tmp_path, reward_run, kind):
    policy = None
    if kind is not None:
        policy = write_adapter(
            tmp_path / "policy", AdapterLayout(kind, rank=4), dpo_config(), size=0.05
        )
    folder = open_model(str(TINY_MODEL))
    _, _, reward = load_policy_and_reward_model(
        folder, policy, find_reward_model(reward_run, folder)
    )
    # An adapter of another kind can't take turns with LoRA on one model.
    assert (reward.weights is None) == (kind == "dora")
    alone = open_reward_model(reward_run).score(PROMPT, ANSWERS)
    np.testing.assert_allclose(reward.score(PROMPT, ANSWERS), alone, atol=1e-5)


def test_folders_that_are_no_reward_model_are_refused(tmp_path, reward_run):
    with pytest.raises(ModelError, match=r"--reward-model .*policy: neither a run of mlx-align"):
        find_reward_model(str(TINY_MODEL))
    with pytest.raises(ModelError, match=r"^--eval-reward-model nowhere"):
        find_reward_model("nowhere", option="--eval-reward-model")
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in reward_run.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    content = json.loads((moved / "adapter_config.json").read_text())
    del content["model"]
    (moved / "adapter_config.json").write_text(json.dumps(content))
    assert read_layout(moved) == read_layout(reward_run)
    with pytest.raises(ModelError, match='"model" is missing'):
        find_reward_model(moved)
    folder = open_model(str(TINY_MODEL))
    assert find_reward_model(moved, folder).base is folder
