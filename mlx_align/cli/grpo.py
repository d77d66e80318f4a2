"""`mlx-align grpo`: train a policy on its answers, each compared with the others of its prompt."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from mlx_align.cli.training import Run, run_training, training_options
from mlx_align.config import GrpoConfig


@click.command(short_help="Train on the policy's own answers, compared in groups (GRPO, RLOO …).")
@training_options(GrpoConfig)
def grpo(config_file: str | None, resume: str | None, json: bool, **options: Any) -> None:
    """Train a policy by GRPO or a method like it on prompts and rewards, and write a run folder.

    --loss names the method: grpo, rloo, dr_grpo, dapo, gspo, reinforce++, reinforce++-baseline,
    cispo, sapo, vespo, luspo; or online_dpo, which learns from the best and the worst completion
    of each prompt as a pair. Rewards are functions (--reward, several times), a reward model
    (--reward-model), or both. A reward function runs with your rights, in a process of its own.

    --iters, --steps-per-* and --save-every count rollout batches: --batch-size x
    --grad-accumulation-steps x --minibatches prompts with --group-size completions each.
    """
    run_training(
        GrpoConfig,
        "grpo",
        _make_run,
        options,
        config_file=config_file,
        resume=resume,
        json=json,
    )


def _make_run(config: GrpoConfig) -> Run:
    from mlx_align.train.grpo import GroupLearner, check_group_options
    from mlx_align.train.on_policy import run_on_policy
    from mlx_align.train.on_policy_setup import check_shared_options
    from mlx_align.train.online_dpo import ONLINE_DPO, PairLearner, check_pair_options

    check_shared_options(config)
    if config.loss == ONLINE_DPO:
        check_pair_options(config)
        return partial(run_on_policy, PairLearner, "grpo")
    check_group_options(config)
    return partial(run_on_policy, GroupLearner, "grpo")
