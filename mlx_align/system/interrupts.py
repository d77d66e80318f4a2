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
# A signal is delivered again after this time if the command still runs: cleaning up takes less.
REDELIVER_SECONDS = 5.0
# The same, if Python has ignored the exception: after it has left the callback.
IGNORED_SECONDS = 0.02
STOP_MESSAGE = "\nstopping after this update with a checkpoint; interrupt again to stop at once\n"


class Interrupted(BaseException):
    """A signal ended the run. A BaseException, so that `except Exception` does not catch it.

    Attributes:
        signum: The signal number; the exit code is 128 + signum.
        explained: Whether a line was printed that says what is kept, and how to continue.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.explained = False


class ReaderGone(BaseException):
    """What reads the output of the command (`head`, `less`) has ended."""


@contextmanager
def raise_on_signal(received: list[int] | None = None) -> Iterator[None]:
    """Raise `Interrupted` at once when a signal arrives within the block.

    Python ignores exceptions in callbacks such as `__del__`, and a library may catch them. So the
    signal is delivered again until the block has ended.

    Args:
        received: Signals that arrived are appended.
    """
    arrived = [] if received is None else received
    again = _Redelivery()
    unraisable = sys.unraisablehook

    def stop(signum: int, _frame: FrameType | None) -> None:
        arrived.append(signum)
        again.later(signum, REDELIVER_SECONDS)
        raise Interrupted(signum)

    def ignored(found: Any) -> None:
        if arrived and issubclass(found.exc_type, Interrupted):
            again.later(arrived[-1], IGNORED_SECONDS)
        else:
            unraisable(found)

    sys.unraisablehook = ignored
    try:
        with _handle_signals(stop):
            try:
                yield
            finally:
                again.stop()
    finally:
        sys.unraisablehook = unraisable


class _Redelivery:
    """Sends a signal to the main thread again, from another thread."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None
        self._stopped = False

    def later(self, signum: int, seconds: float) -> None:
        """Send it after `seconds`, in place of an earlier request."""
        if self._timer is not None:
            self._timer.cancel()
        if self._stopped:
            return
        main = threading.main_thread().ident
        self._timer = threading.Timer(seconds, lambda: signal.pthread_kill(main or 0, signum))
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """Send nothing more."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()


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
def stop_on_interrupt() -> Iterator[list[int]]:
    """Yield a list to which the first Ctrl-C is appended; the next one does what it did before.

    Does nothing where Ctrl-C is ignored, or outside the main thread.
    """
    pending: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield pending
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if pending and callable(before):
            before(signum, frame)
        pending.append(signum)

    signal.signal(signal.SIGINT, note)
    try:
        yield pending
    finally:
        signal.signal(signal.SIGINT, before)


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
