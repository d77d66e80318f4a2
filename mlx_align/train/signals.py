"""SIGINT, SIGTERM and SIGHUP: when a run may be stopped, and what is said of it.

Between updates, and where there is nothing to finish, a signal stops at once. Within the training
loop the first one lets the update and its checkpoint be finished; a second one stops at once.
Every file is written whole or not at all, so at once tears nothing.
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

# A terminal that is closed sends SIGHUP; under nohup it is ignored and stays so.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAID = "\nstopping after this update, with a checkpoint; once more to stop at once\n"


class Interrupted(BaseException):
    """A signal ended the run; `signum` says which. No `except Exception` may take it for its own.

    Attributes:
        signum: The signal; the exit code is 128 more.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextmanager
def interrupting() -> Iterator[None]:
    """Within the block a signal raises `Interrupted` at once."""

    def stop(signum: int, _frame: FrameType | None) -> None:
        raise Interrupted(signum)

    with _handled(stop):
        yield


@contextmanager
def deferring() -> Iterator[list[int]]:
    """A list that the first signal is put into, to be acted on; a second one stops at once."""
    pending: list[int] = []

    def note(signum: int, _frame: FrameType | None) -> None:
        if pending:
            raise Interrupted(signum)
        pending.append(signum)
        # No print: the signal may have come in the middle of one.
        with suppress(OSError, ValueError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, SAID.encode())

    with _handled(note):
        yield pending


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals go to `handler` within the block; only the main thread may ask for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    try:
        for signum in STOPPING:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                before[signum] = signal.signal(signum, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
