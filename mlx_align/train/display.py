"""What long work tells of itself. The command line shows it; a library user may keep it quiet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Display(Protocol):
    """Where a run speaks."""

    def note(self, text: str) -> None:
        """A finished line, or several."""

    def bar(self, label: str, total: int, done: int = 0) -> AbstractContextManager[Bar]:
        """Count to `total` within a with block."""


class Bar(Protocol):
    """One piece of counted work."""

    def advance(self, count: int = 1) -> None:
        """So much more is done."""


class Quiet:
    """Says nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    @contextmanager
    def bar(self, label: str, total: int, done: int = 0) -> Iterator[Quiet]:
        """Count nothing."""
        yield self

    def advance(self, count: int = 1) -> None:
        """Count nothing."""
