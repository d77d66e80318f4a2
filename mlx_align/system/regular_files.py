"""Reading files of folders that come from others: regular files of a bounded size only.

A pipe would block for ever, a device never ends, and a symbolic link may lead to any file.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Of JSON and YAML files that describe a model, an adapter or a run. Real ones have kilobytes; the
# index of a large model has some megabytes.
MAX_JSON_BYTES = 64 << 20
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


# mlx and the tokenizers library take paths as UTF-8.
NOT_UTF8 = "its path is not UTF-8, and mlx can't open it; rename it"


def is_utf8(path: Path) -> bool:
    """Whether the absolute path is text in UTF-8."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_regular_file(file: Path, max_bytes: int | None = None) -> bytes:
    """The content of a regular file; symbolic links are followed.

    Args:
        file: The file.
        max_bytes: The largest size; None for any.

    Raises:
        OSError: It can't be read.
        ValueError: It is not a regular file, or is too large.
    """
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
            raise ValueError(f"it is {kind}, not a regular file")
        if max_bytes is not None and found.st_size > max_bytes:
            raise ValueError(
                f"it has {found.st_size / 1e6:,.1f} MB, more than {max_bytes / 1e6:,.1f} MB"
            )
        return stream.read() if max_bytes is None else stream.read(max_bytes + 1)[:max_bytes]


def read_json(file: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file. Errors are those of `read_regular_file`.

    Raises:
        ValueError: It is not JSON too, or is nested too deeply.
    """
    try:
        return json.loads(read_regular_file(file, max_bytes).decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def irregular_file(folder: Path) -> str:
    """A sentence about a pipe, socket or device in a folder, or its name; "" without one."""
    if not is_utf8(folder):
        return NOT_UTF8
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                kind = stat.S_IFMT(entry.stat().st_mode)
            except OSError:  # a link to nothing
                continue
            if kind not in (stat.S_IFREG, stat.S_IFDIR):
                return f"{entry.name} is {_KINDS.get(kind, 'something else')}, not a regular file"
    return ""


def leaves(file: Path, folder: Path) -> bool:
    """Whether a path, links followed, is outside of a folder.

    Files of a hub download are links from `snapshots/` to `blobs/` of the same repository.
    """
    target, root = file.resolve(), folder.resolve()
    if target.is_relative_to(root):
        return False
    is_snapshot = root.parent.name == "snapshots"
    return not (is_snapshot and target.is_relative_to(root.parent.parent / "blobs"))


def whole_number(
    content: Mapping[str, Any], name: str, low: int, high: int, default: int | None = None
) -> int:
    """A whole number in a JSON object.

    Raises:
        ValueError: It is missing without a default, of another type, or out of bounds.
    """
    value = content.get(name, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r:.40}, expected a whole number from {low} to {high}")
    return value


def finite_number(
    content: Mapping[str, Any],
    name: str,
    low: float,
    high: float,
    default: float | None = None,
) -> float:
    """A number in a JSON object. Arguments and errors as for `whole_number`."""
    value = content.get(name, default)
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or not known or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r:.40}, expected a number from {low:g} to {high:g}")
    return float(value)


def list_of_names(content: Mapping[str, Any], name: str, most: int) -> tuple[str, ...] | None:
    """A list of names in a JSON object; None if it is missing or null.

    Raises:
        ValueError: It is something else, or longer than `most`.
    """
    value = content.get(name)
    if value is None:
        return None
    names = isinstance(value, list) and all(isinstance(one, str) for one in value)
    if not names or len(value) > most:
        raise ValueError(f"{name} is {value!r:.40}, expected a list of up to {most} names")
    return tuple(value)
