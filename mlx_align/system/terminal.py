"""Text for a terminal: control characters escaped, what the encoding lacks replaced.

Data, answers, chat templates, errors and file names may hold escape sequences that clear the
screen, rename the window or hide a line. `safe_output` escapes them in everything that a command
prints, and `Console` (in `console.py`) in everything that is printed through rich.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

# C0 without tab and newline, DEL, C1, embeddings and overrides of the writing direction, and halves
# of surrogate pairs (bytes of a file name that are not UTF-8).
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# The cursor movements of progress bars (tqdm): written alone, or a return at the start.
_CURSOR = re.compile("(\n|\x1b\\[A)+")


def escape_controls(text: str) -> str:
    r"""The text with control characters as `\x1b` or `\u202e`; tabs and newlines stay."""
    if text.isascii() and text.isprintable():
        return text
    return _CONTROLS.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def encodable(text: str, encoding: str | None) -> str:
    """The text with `?` for the characters that an encoding doesn't have."""
    if text.isascii():
        return text
    try:
        return text.encode(encoding or "ascii", "replace").decode(encoding or "ascii")
    except LookupError:
        return text.encode("ascii", "replace").decode("ascii")


class SafeStream:
    r"""A text stream that escapes control characters, in front of another stream.

    Progress bars of other libraries still work: `\r` at the start of a write, and cursor movements
    written alone, pass.
    """

    def __init__(self, stream: TextIO, *, bytes_too: bool = False) -> None:
        """Stand in front of `stream`; with `bytes_too`, bytes can be written to its buffer."""
        self._stream = stream
        # click would go around this stream to the bytes of the one behind it.
        self.buffer = stream.buffer if bytes_too else None

    @property
    def rich_proxied_file(self) -> TextIO:
        """The stream that rich writes its own sequences to; `Console` escapes the text."""
        return self._stream

    def write(self, text: str) -> int:
        """Write the text, escaped."""
        start = "\r" if text.startswith("\r") else ""
        if not _CURSOR.fullmatch(text):
            rest = escape_controls(text[len(start) :])
            self._stream.write(start + encodable(rest, self._stream.encoding))
        else:
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts, escaped."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_output() -> Iterator[None]:
    """Within the block, everything printed to stdout and stderr is escaped."""
    before = sys.stdout, sys.stderr
    for name, stream in zip(("stdout", "stderr"), before, strict=True):
        if stream is not None and not isinstance(stream, SafeStream):
            setattr(sys, name, cast(TextIO, SafeStream(stream)))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
