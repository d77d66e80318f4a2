"""`mlx-align ppo`: train a policy on what it says, with a critic."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from mlx_align.cli.training import Run, run_training, training_options
from mlx_align.config import PpoConfig


@click.command(short_help="Train on the policy's own answers, with a critic (PPO).")
@training_options(PpoConfig)
def ppo(config_file: str | None, resume: str | None, json: bool, **options: Any) -> None:
    """Train a policy by PPO on prompts and rewards, and write a run folder.

    Policy, reference, reward model and critic are adapters on one base. Rewards are a reward
    model (--reward-model), functions (--reward, several times), or both. A reward function runs
    with your rights, in a process of its own.

    --iters, --steps-per-*, --save-every and --critic-warmup count rollout batches: --batch-size x
    --grad-accumulation-steps x --minibatches prompts with --group-size completions each.
    """
    run_training(
        PpoConfig,
        "ppo",
        _make_run,
        options,
        config_file=config_file,
        resume=resume,
        json=json,
    )


def _make_run(config: PpoConfig) -> Run:
    from mlx_align.train.on_policy import run_on_policy
    from mlx_align.train.on_policy_setup import check_shared_options
    from mlx_align.train.ppo import PpoLearner, check_ppo_options

    check_shared_options(config)
    check_ppo_options(config)
    return partial(run_on_policy, PpoLearner, "ppo")
