"""The `mlx-align` command with all its subcommands."""

from __future__ import annotations

import click

from mlx_align import __version__
from mlx_align.cli.cache import cache
from mlx_align.cli.chat import chat
from mlx_align.cli.completion import completion
from mlx_align.cli.constitution import constitution
from mlx_align.cli.data import data
from mlx_align.cli.evaluate import evaluate
from mlx_align.cli.export import export
from mlx_align.cli.fuse import fuse
from mlx_align.cli.improve import improve
from mlx_align.cli.judge import judge
from mlx_align.cli.label import label
from mlx_align.cli.options import Group
from mlx_align.cli.plan import plan
from mlx_align.cli.report import report
from mlx_align.cli.rerank import rerank
from mlx_align.cli.score import score
from mlx_align.cli.selftest import selftest
from mlx_align.cli.train import dpo, grpo, kto, ppo, reward, sft
from mlx_align.config.other_names import LOSS_COMMANDS

SECTIONS = {
    "Train": ("dpo", "kto", "sft", "reward", "ppo", "grpo"),
    "Use and evaluate a run": ("chat", "eval", "score", "rerank", "fuse", "export", "report"),
    "Make preferences": ("label", "judge", "constitution", "improve"),
    "Prepare": ("plan", "data", "cache", "selftest", "completion"),
}

# Names that a user may expect to be commands, and the command to use.
ELSEWHERE = {
    **LOSS_COMMANDS,
    "sigmoid": "mlx-align dpo",
    "cdpo": "mlx-align dpo --label-smoothing 0.1",
    "bco": "mlx-align dpo --loss bco_pair",
    "lora": "mlx-align sft, or mlx-align dpo for preference pairs",
    "train": "mlx-align dpo for preference pairs, sft for demonstrations, grpo for rewards",
    "finetune": "mlx-align sft, or mlx-align dpo for preference pairs",
    "fine_tune": "mlx-align sft, or mlx-align dpo for preference pairs",
    "resume": "the command that trained the run, with --resume RUN",
    "test": "mlx-align eval RUN --split test",
    "compare": "mlx-align report RUN RUN",
    "serve": "mlx_lm.server --model MODEL --adapter-path RUN",
    "server": "mlx_lm.server --model MODEL --adapter-path RUN",
    "rm": "mlx-align reward",
    "reward_model": "mlx-align reward",
    "evaluate": "mlx-align eval",
    "generate": "mlx-align chat",
    "talk": "mlx-align chat",
    "merge": "mlx-align fuse",
    "best_of_n": "mlx-align rerank",
    "check": "mlx-align data check",
    "convert": "mlx-align data convert",
    "sample": "mlx-align data sample",
    "agreement": "mlx-align data agreement",
    "annotate": "mlx-align label",
}


@click.group(
    cls=Group,
    sections=SECTIONS,
    elsewhere=ELSEWHERE,
    invoke_without_command=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        # Else click removes some escape sequences, which are to be shown.
        "color": True,
    },
)
@click.version_option(__version__, prog_name="mlx-align")
@click.pass_context
def cli(context: click.Context) -> None:
    """Align language models with preferences on one Mac, with MLX.

    `mlx-align dpo` without arguments trains a small model that comes with the package.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (
    dpo,
    kto,
    sft,
    reward,
    ppo,
    grpo,
    chat,
    evaluate,
    score,
    rerank,
    fuse,
    export,
    report,
    label,
    judge,
    constitution,
    improve,
    plan,
    data,
    cache,
    selftest,
    completion,
):
    cli.add_command(command)
