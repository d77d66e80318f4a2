"""SIGINT, SIGTERM and SIGHUP: when a run stops, and what it prints.

Outside the training loop a signal stops the command at once. Inside the loop the first signal lets
the current update finish and a checkpoint be written; a second one stops at once. Stopping at once
is safe, because every file is written completely or not at all.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

# Closing a terminal sends SIGHUP. Under nohup it is ignored, and stays ignored.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP_MESSAGE = "\nstopping after this update with a checkpoint; interrupt again to stop at once\n"


class Interrupted(BaseException):
    """A signal ended the run. A BaseException, so that `except Exception` does not catch it.

    Attributes:
        signum: The signal number; the exit code is 128 + signum.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextmanager
def raise_on_signal() -> Iterator[None]:
    """Raise `Interrupted` at once when a signal arrives within the block."""

    def stop(signum: int, _frame: FrameType | None) -> None:
        raise Interrupted(signum)

    with _handle_signals(stop):
        yield


@contextmanager
def defer_signals() -> Iterator[list[int]]:
    """Yield a list to which the first signal is appended; a second one raises `Interrupted`."""
    pending: list[int] = []

    def note(signum: int, _frame: FrameType | None) -> None:
        if pending:
            raise Interrupted(signum)
        pending.append(signum)
        # os.write instead of print: the signal may arrive in the middle of a print.
        with suppress(OSError, ValueError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, STOP_MESSAGE.encode())

    with _handle_signals(note):
        yield pending


@contextmanager
def _handle_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Install `handler` for the block. Does nothing outside the main thread (a Python limit)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    try:
        for signum in STOP_SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                before[signum] = signal.signal(signum, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
