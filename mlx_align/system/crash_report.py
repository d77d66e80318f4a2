"""A report of an exception that should not have escaped: versions, command line, traceback.

It has no data: of exceptions only the types, because their messages may quote a row, and no values
of variables.
"""

from __future__ import annotations

import os
import platform
import shlex
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlx_align.system.user_folders import cache_folder

_PACKAGES = (
    *("mlx-align", "mlx", "mlx-lm", "transformers", "tokenizers", "huggingface_hub", "datasets"),
    *("numpy", "pyarrow", "safetensors", "pydantic", "click", "rich", "jinja2"),
)
# Options whose value is text of the user, not a name or a number.
_TEXT_OPTIONS = ("--prompt",)


def write_crash_report(error: BaseException, arguments: Sequence[str]) -> Path | None:
    """Write the report to the user's cache folder, or else to the temporary one.

    Args:
        error: The exception.
        arguments: The command line without the program's name.

    Returns:
        The file; None if it can't be written.
    """
    text = _report(error, arguments)
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (cache_folder() / "crashes", None):
        with suppress(OSError):
            if folder is None:
                descriptor, file = tempfile.mkstemp(prefix="mlx-align-", suffix=f"-{name}")
                os.close(descriptor)
                path = Path(file)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / name
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return path
    return None


def _report(error: BaseException, arguments: Sequence[str]) -> str:
    command = ["mlx-align", *_without_texts(arguments)]
    lines = [
        f"command: {shlex.join(command)}",
        f"python: {platform.python_version()}, {platform.platform()}",
        *(f"{name}: {_version(name)}" for name in _PACKAGES),
        "",
        "traceback, without messages and values:",
        *_traceback(error),
    ]
    return "\n".join(lines) + "\n"


def _without_texts(arguments: Sequence[str]) -> Iterator[str]:
    left_out = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if left_out:
            yield "…"
        else:
            yield f"{name}=…" if equals and name in _TEXT_OPTIONS else argument
        left_out = argument in _TEXT_OPTIONS


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _traceback(error: BaseException) -> Iterator[str]:
    """The frames of an exception and of those that led to it, first to last."""
    chain: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in chain:
        chain.append(found)
        cause = found.__cause__
        found = cause if cause or found.__suppress_context__ else found.__context__
    for one in reversed(chain):
        yield "".join(traceback.format_tb(one.__traceback__)).rstrip()
        yield f"{type(one).__module__}.{type(one).__qualname__}\n"
