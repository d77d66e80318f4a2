"""What long work tells of itself. The command line shows it; a library user may keep it quiet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Display(Protocol):
    """Where a run speaks."""

    def note(self, text: str) -> None:
        """A finished line, or several."""

    def bar(self, label: str, total: int, done: int = 0) -> Bar:
        """Begin counting to `total`; enter the bar as a context."""


class Bar(Protocol):
    """One piece of counted work."""

    def __enter__(self) -> Bar:
        """Begin."""

    def __exit__(self, *error: object) -> None:
        """End."""

    def advance(self, count: int = 1, text: str | None = None) -> None:
        """So much more is done; `text` is what to say beside it."""


class Quiet:
    """Says nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    @contextmanager
    def bar(self, label: str, total: int, done: int = 0) -> Iterator[Quiet]:  # noqa: ARG002
        """Count nothing."""
        yield self

    def advance(self, count: int = 1, text: str | None = None) -> None:
        """Count nothing."""
