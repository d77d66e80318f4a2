"""What an on-policy run holds in memory, told to the plan: its reward models are found here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_align.config import OnPolicyConfig
from mlx_align.errors import ModelError
from mlx_align.models.adapters import AdapterLayout, read_layout
from mlx_align.models.compat import resolve_model_path
from mlx_align.models.heads import has_head
from mlx_align.models.loading import ModelFolder
from mlx_align.plan.on_policy import RewardModels, check_on_policy_fits
from mlx_align.train.judging import base_of, same_base
from mlx_align.types import TokenizedGroup


def reward_models(
    config: OnPolicyConfig, folder: ModelFolder, layout: AdapterLayout
) -> RewardModels:
    """The reward models of a run: swapped into the policy's base, or beside it.

    Raises:
        ModelError: One is not there, or can't be read.
    """
    swapped, apart = [], []
    for option in ("reward_model", "eval_reward_model"):
        name = getattr(config, option)
        if name is None:
            continue
        run = Path(name).expanduser()
        if has_head(run) and same_base(run, folder, layout):
            swapped.append(read_layout(run))
            continue
        try:
            apart.append(resolve_model_path(str(base_of(run)) if has_head(run) else name))
        except ModelError as error:
            flag = "--" + option.replace("_", "-")
            raise ModelError(
                f"{flag} {name}: neither a run of mlx-align reward whose base is there, nor a model"
            ) from error
    return RewardModels(tuple(swapped), tuple(apart))


def check_memory(
    config: OnPolicyConfig,
    folder: ModelFolder,
    layout: AdapterLayout,
    train: Sequence[TokenizedGroup],
    held_out: Sequence[TokenizedGroup],
) -> str:
    """The line that says what a run will need.

    Raises:
        ConfigError: It does not fit this machine, and --force was not given.
        ModelError: A reward model is not there.
    """
    rewards = reward_models(config, folder, layout)
    return check_on_policy_fits(config, layout, folder, (train, held_out), rewards)
