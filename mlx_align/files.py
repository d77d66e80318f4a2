"""Files written whole or not at all, so that no kill, full disk or power cut leaves half of one.

What is new is written beside its final name, brought to the disk, and renamed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import mlx.core as mx

from mlx_align.errors import WriteError

# Less room than this is none: mlx says that it could not write, but not why.
FULL_BYTES = 1 << 20


@contextmanager
def writing(
    path: Path, errors: tuple[type[Exception], ...] = (OSError, RuntimeError)
) -> Iterator[None]:
    """Within the block, `path` is written.

    Args:
        path: For messages.
        errors: What it means that it could not be; mlx raises RuntimeError.

    Raises:
        WriteError: The disk is full, or the folder can't be written to.
    """
    try:
        yield
    except errors as error:
        raise WriteError(f"{path}: can't be written ({_reason(path, error)})") from error


def _reason(path: Path, error: BaseException) -> str:
    full = "no space left on the disk; make room"
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno == errno.ENOSPC:
            return full
        if error.errno == errno.EDQUOT:
            return "the quota is used up; make room"
        return os.strerror(error.errno).lower()
    with suppress(OSError):
        if shutil.disk_usage(path.parent).free < FULL_BYTES:
            return full
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, from the system's memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        # macOS's fsync leaves data in the drive's own cache, which a power cut empties.
        if (full := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
            with suppress(OSError):  # network drives have no such thing
                fcntl.fcntl(descriptor, full)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Write text so that a reader sees the old file or the new one, never half.

    Raises:
        WriteError: It can't be written; the old file is as it was.
    """
    partial = file.with_name(f".{file.name}.partial")
    with _replacing(file, partial):
        partial.write_text(text, encoding="utf-8")


def write_tensors(file: Path, tensors: Mapping[str, mx.array]) -> None:
    """Write a safetensors file whole or not at all, tensors sorted by name.

    Raises:
        WriteError: It can't be written; the old file is as it was.
    """
    partial = file.with_name(f".{file.stem}.partial.safetensors")
    with _replacing(file, partial):
        ordered = dict(sorted(tensors.items()))
        mx.save_safetensors(str(partial), ordered, metadata={"format": "mlx"})


@contextmanager
def writing_whole(file: Path) -> Iterator[TextIO]:
    """A stream of text that becomes `file` at the end of the block, if that is reached.

    Raises:
        WriteError: It can't be written; there is no new file then.
    """
    partial = file.with_name(f".{file.name}.partial")
    # A RuntimeError is one of the work whose results are written.
    with _replacing(file, partial, (OSError,)), partial.open("w", encoding="utf-8") as stream:
        yield stream
        stream.flush()


@contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes `folder`, which is empty or not there, if the block ends.

    Raises:
        WriteError: It can't be written; there is no new folder then.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        yield partial
        with writing(folder):
            for file in partial.iterdir():
                sync(file)
            if folder.is_dir():
                folder.rmdir()
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _replacing(
    file: Path, partial: Path, errors: tuple[type[Exception], ...] = (OSError, RuntimeError)
) -> Iterator[None]:
    with writing(file, errors):
        try:
            yield
            sync(partial)
            partial.replace(file)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        sync(file.parent)
