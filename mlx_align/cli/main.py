"""`mlx-align`: the commands, and the exit codes of errors and signals.

Exit codes: 0 success; 1 an error that the user can fix, one line on standard error; 130
interrupted and 143 terminated, after writing a checkpoint if there is progress to keep.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import click

from mlx_align import __version__
from mlx_align.cli.cache import cache
from mlx_align.cli.completion import completion
from mlx_align.cli.data import data
from mlx_align.cli.evaluate import evaluate
from mlx_align.cli.export import export
from mlx_align.cli.fuse import fuse
from mlx_align.cli.options import Group
from mlx_align.cli.plan import plan
from mlx_align.cli.report import report
from mlx_align.cli.rerank import rerank
from mlx_align.cli.score import score
from mlx_align.cli.train import dpo, grpo, kto, ppo, reward, sft
from mlx_align.errors import MlxAlignError
from mlx_align.losses.policy import POLICY_METHODS
from mlx_align.losses.registry import PAIRWISE_LOSSES
from mlx_align.system.interrupts import Interrupted, raise_on_signal

LONGEST_LINE = 1500
SECTIONS = {
    "Train": ("dpo", "kto", "sft", "reward", "ppo", "grpo"),
    "Use and evaluate a run": ("eval", "score", "rerank", "fuse", "export", "report"),
    "Prepare": ("plan", "data", "cache", "completion"),
}
# Names that a user may expect to be commands, and the command to use.
ELSEWHERE = {
    **{name: f"mlx-align dpo --loss {name}" for name in PAIRWISE_LOSSES},
    **{name: f"mlx-align grpo --loss {name}" for name in POLICY_METHODS},
    "online_dpo": "mlx-align grpo --loss online_dpo",
    "sigmoid": "mlx-align dpo",
    "cdpo": "mlx-align dpo --label-smoothing 0.1",
    "bco": "mlx-align dpo --loss bco_pair",
    "lora": "mlx-align sft",
    "rm": "mlx-align reward",
    "reward_model": "mlx-align reward",
    "evaluate": "mlx-align eval",
    "merge": "mlx-align fuse",
    "best_of_n": "mlx-align rerank",
    "check": "mlx-align data check",
    "convert": "mlx-align data convert",
    "sample": "mlx-align data sample",
}


@click.group(
    cls=Group,
    sections=SECTIONS,
    elsewhere=ELSEWHERE,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
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
    evaluate,
    score,
    rerank,
    fuse,
    export,
    report,
    plan,
    data,
    cache,
    completion,
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    try:
        with raise_on_signal():
            cli.main(args=arguments, prog_name="mlx-align", standalone_mode=False)
    except click.exceptions.Exit as exit:
        return exit.exit_code
    except click.ClickException as error:
        return _report_error(error.format_message())
    except MlxAlignError as error:
        return _report_error(str(error))
    except Interrupted as error:
        print("stopped", file=sys.stderr)
        return 128 + error.signum
    except (KeyboardInterrupt, click.Abort):
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (head, less) has exited. Further writes, also those at exit, would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # Not a file that `system/atomic_io.py` writes, whose errors name it, but a log or a pipe.
        file = f"{error.filename}: " if error.filename else ""
        return _report_error(f"{file}{error.strerror or error}")
    return 0


def _report_error(message: str) -> int:
    """Print an error on one line; returns the exit code."""
    # Text from a damaged file may be very long.
    line = " ".join(message.split())
    shown = line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 1] + "…"
    print(f"error: {shown}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
