"""A command in a process forked from this one, which has imported everything, and may be killed."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# The command itself comes first: it tells mlx how to order evaluation, which mlx reads once.
from mlx_align.cli import main as command_line


def run_forked(
    arguments: list[str],
    log: Path,
    prepare: Callable[[], None] = lambda: None,
    kill_after: float | None = None,
) -> int:
    """The exit code of a command in a process of its own; −9 if it was killed.

    Args:
        arguments: The command line.
        log: Its output.
        prepare: Called in the process before the command.
        kill_after: Seconds after which the process is killed.
    """
    pid = os.fork()
    if pid == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        prepare()
        code = 99
        try:
            code = command_line.run(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)
