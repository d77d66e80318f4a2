"""The interface through which long-running work reports progress.

The command line implements it with `rich`; library users can pass `SilentConsole`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Console(Protocol):
    """Prints the messages and shows the progress bars of a run."""

    def note(self, text: str) -> None:
        """Print one or more complete lines."""

    def bar(self, label: str, total: int, done: int = 0) -> AbstractContextManager[ProgressBar]:
        """Show a progress bar within a `with` block."""


class ProgressBar(Protocol):
    """The progress of one piece of work."""

    def advance(self, count: int = 1) -> None:
        """Count `count` more items as done."""


class SilentConsole:
    """A `Console` that prints nothing; it is its own progress bar."""

    def note(self, text: str) -> None:
        """Discard the text."""

    @contextmanager
    def bar(self, label: str, total: int, done: int = 0) -> Iterator[SilentConsole]:
        """Yield a progress bar that shows nothing."""
        yield self

    def advance(self, count: int = 1) -> None:
        """Discard the count."""
