"""A reward model for the tests of scoring and ranking."""

import mlx.core as mx
import pytest
from helpers.forward import scramble
from helpers.paths import TINY_MODEL

from mlx_align.models.adapters import AdapterLayout, install_adapters, save_adapter
from mlx_align.models.backbone import split_backbone
from mlx_align.models.heads import REWARD_HEAD, add_reward_head
from mlx_align.models.loading import load_module


@pytest.fixture(scope="session")
def reward_run(tmp_path_factory):
    """A run of reward; its rank, scale and layers differ from those of the policies."""
    folder = tmp_path_factory.mktemp("reward") / "run"
    model = load_module(TINY_MODEL)
    mx.random.seed(5)
    layout = AdapterLayout(rank=6, scale=0.7, num_layers=1, keys=("self_attn.q_proj",))
    install_adapters(model, layout)
    scramble(model, 0.3)
    head = add_reward_head(split_backbone(model)).parameters()
    folder.mkdir()
    save_adapter(
        folder, {**model.trainable_parameters(), REWARD_HEAD: head}, layout, str(TINY_MODEL)
    )
    return folder
