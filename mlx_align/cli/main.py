"""`mlx-align`: the commands, and what an error or a signal turns into.

Exit codes: 0 done; 1 a mistake of the user, one line on standard error; 130 interrupted and 143
terminated, after a checkpoint where there is something to keep.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

# Read by mlx when it is imported: a narrow evaluation order holds fewer activations at once
# (a checkpointed peak fell by 42% where it was measured).
os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1")

import click

from mlx_align import __version__
from mlx_align.cli.cache import cache
from mlx_align.cli.data import data
from mlx_align.cli.dpo import dpo
from mlx_align.cli.eval import evaluate
from mlx_align.cli.fuse import fuse
from mlx_align.cli.grpo import grpo
from mlx_align.cli.kto import kto
from mlx_align.cli.plan import plan
from mlx_align.cli.ppo import ppo
from mlx_align.cli.report import report
from mlx_align.cli.rerank import rerank
from mlx_align.cli.reward import reward
from mlx_align.cli.score import score
from mlx_align.cli.sft import sft
from mlx_align.errors import MlxAlignError
from mlx_align.train.signals import Interrupted, interrupting

LONGEST_LINE = 1500


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mlx-align")
def cli() -> None:
    """Align language models with preferences, on one Mac, with MLX.

    mlx-align dpo without arguments trains a small model that comes with the package.
    """


for command in (
    dpo,
    kto,
    sft,
    reward,
    ppo,
    grpo,
    score,
    rerank,
    evaluate,
    fuse,
    data,
    cache,
    plan,
    report,
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    try:
        with interrupting():
            cli.main(args=arguments, prog_name="mlx-align", standalone_mode=False)
    except click.exceptions.Exit as exit:
        return exit.exit_code
    except click.ClickException as error:
        return _fail(error.format_message())
    except MlxAlignError as error:
        return _fail(str(error))
    except Interrupted as error:
        print("stopped", file=sys.stderr)
        return 128 + error.signum
    except (KeyboardInterrupt, click.Abort):
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (head, less) has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # What is written by a run goes through `files.py`; this is what is left (a log, a pipe).
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    return 0


def _fail(message: str) -> int:
    # A line is to be read: what a damaged file holds may have no end.
    line = " ".join(message.split())
    shown = line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 1] + "…"
    print(f"error: {shown}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
