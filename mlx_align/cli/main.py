"""The program `mlx-align`: runs a command, and turns every end into a line and an exit code.

Exit codes: 0 success; 1 an error that the user can fix, one line on standard error; 70 an error in
this package, one line with the path of a crash report; 130 interrupted and 143 terminated, after
writing a checkpoint if there is progress to keep.

This module imports only what Python has loaded at its start, so that signals are handled from the
first moments on. The rest follows in `main` and `run`.
"""

from __future__ import annotations

import os
import sys

# What the module signal is made of. That one imports enum, which takes long enough for a Ctrl-C.
from _signal import (  # type: ignore[import-not-found]
    SIG_IGN,
    SIGHUP,
    SIGINT,
    SIGTERM,
    getsignal,
    signal,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

LONGEST_LINE = 1500
# EX_SOFTWARE of sysexits.h.
INTERNAL_ERROR = 70
# Set by the script that `mlx-align completion` prints.
COMPLETION = "_MLX_ALIGN_COMPLETE"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    _exit_on_signal(None)
    code = run(arguments)
    _exit_on_signal(code)
    sys.exit(code)


def _exit_on_signal(code: int | None) -> None:
    """From now on, end the process at once when a signal arrives.

    For the moments in which an exception would end in a traceback: while modules are imported, and
    while Python ends.

    Args:
        code: The exit code; None for "stopped" and 128 + the signal's number.
    """

    def leave(signum: int, _frame: object) -> None:
        if code is None:
            os.write(2, b"stopped\n")
        os._exit(128 + signum if code is None else code)

    for signum in (SIGINT, SIGTERM, SIGHUP):
        if getsignal(signum) != SIG_IGN:
            signal(signum, leave)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    from mlx_align.system.interrupts import Interrupted, raise_on_signal
    from mlx_align.system.terminal import safe_output

    if COMPLETION in os.environ:  # the shell reads what is printed; click ends the process
        from mlx_align.cli.group import cli

        cli.main(args=arguments, prog_name="mlx-align", standalone_mode=False)
    with safe_output():
        received: list[int] = []
        try:
            with raise_on_signal(received):
                # Imported here, where Ctrl-C is handled: it takes some tenths of a second.
                from mlx_align.cli.group import cli

                cli.main(args=arguments, prog_name="mlx-align", standalone_mode=False)
                if sys.stdout is not None:  # closed, as by >&-
                    sys.stdout.flush()
        except BaseException as error:
            if received and not isinstance(error, Interrupted):
                # A library caught the interruption and raised another error.
                error = Interrupted(received[0])
            return _exit_code(error, sys.argv[1:] if arguments is None else arguments)
        return 0


def _exit_code(error: BaseException, arguments: Sequence[str]) -> int:
    """Say in one line how a command ended; returns its exit code."""
    from mlx_align.errors import MlxAlignError
    from mlx_align.system.interrupts import Interrupted, ReaderGone

    if isinstance(error, Interrupted | KeyboardInterrupt):
        if not (isinstance(error, Interrupted) and error.explained):
            _print_error("stopped")
        return 128 + (error.signum if isinstance(error, Interrupted) else SIGINT)
    if isinstance(error, MlxAlignError):
        return _report_error(str(error))

    import click

    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.Abort):
        _print_error("stopped")
        return 128 + SIGINT
    if isinstance(error, click.ClickException):
        return _report_error(error.format_message())
    if isinstance(error, BrokenPipeError | ReaderGone):
        # The reader (head, less) has exited. Further writes, also those at exit, would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    if isinstance(error, FileNotFoundError) and not _has_working_folder():
        return _report_error("the working folder was deleted; change to another folder")
    if isinstance(error, OSError):
        # Not a file that `system/atomic_io.py` writes, whose errors name it, but a log or a pipe.
        file = f"{error.filename}: " if error.filename else ""
        return _report_error(f"{file}{error.strerror or error}")
    if isinstance(error, MemoryError):
        return _report_error("out of memory; close other programs, or use a smaller model or batch")
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return _report_error("there is no home folder for a path with ~; set HOME, or write it out")
    return _report_crash(error, arguments)


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _report_crash(error: BaseException, arguments: Sequence[str]) -> int:
    """Write a crash report, and say where it is."""
    from mlx_align.system.crash_report import write_crash_report

    file = write_crash_report(error, arguments)
    where = "no report could be written" if file is None else f"details (no data) are in {file}"
    message = f"{type(error).__name__}: {error}".removesuffix(": ")
    shown = message if len(message) <= 300 else message[:299] + "…"
    _report_error(f"this is a bug in mlx-align; {where}; please report it ({shown})")
    return INTERNAL_ERROR


def _report_error(message: str) -> int:
    """Print an error on one line; returns the exit code."""
    # Text from a damaged file may be very long.
    line = " ".join(message.split())
    _print_error(f"error: {line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 1] + '…'}")
    return 1


def _print_error(line: str) -> None:
    # Standard error may be closed, or its reader gone.
    try:
        if sys.stderr.isatty():
            import shutil
            import textwrap

            width = shutil.get_terminal_size().columns
            # Paths and options stay whole, to be copied.
            line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        print(line, file=sys.stderr, flush=True)
    except (AttributeError, OSError, ValueError):
        return


if __name__ == "__main__":
    main()
