"""Write files completely or not at all.

A process that is killed, a full disk or a power cut never leaves half a file: the new content is
written to a temporary file in the same folder, flushed to disk, and renamed. The temporary file is
locked (`flock`), so that two processes that write the same file take turns.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import mlx.core as mx

from mlx_align.errors import ConfigError, WriteError
from mlx_align.system.regular_files import NOT_UTF8, is_utf8

# mlx reports that a file could not be written, but not why. With less free space than this, the
# disk is reported as full.
FULL_BYTES = 1 << 20
# Writing a page or a summary takes less; a process that holds a file for longer writes for minutes.
LOCK_SECONDS = 5.0


@contextmanager
def wrap_write_errors(
    path: Path, errors: tuple[type[Exception], ...] = (OSError, RuntimeError)
) -> Iterator[None]:
    """Turn errors raised in the block into a `WriteError` that names `path`.

    Args:
        path: The file or folder that the block writes.
        errors: The exceptions to convert; mlx raises RuntimeError when a write fails.

    Raises:
        WriteError: The disk is full, the quota is used up, or permission is denied.
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


def check_can_create(output: str | Path) -> None:
    """Raise a ConfigError if the file or folder of `--output` can't be created or written."""
    path = Path(output).expanduser().absolute()
    if path.is_symlink() and not path.exists():
        raise ConfigError(
            f"--output {output}: is a link to {path.readlink()}, which doesn't exist; name another "
            "output"
        )
    nearest = next(one for one in (path, *path.parents) if one.exists())
    if nearest != path and not nearest.is_dir():
        raise ConfigError(f"--output {output}: {nearest} is not a folder that can be written to")
    if not os.access(nearest, os.W_OK):
        what = "folder" if nearest.is_dir() else "file"
        raise ConfigError(f"--output {output}: {nearest} is not a {what} that can be written to")


def check_new_folder(output: str | Path) -> None:
    """Raise a ConfigError if the folder of `--output` has content, or can't be created."""
    path = Path(output).expanduser()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--output {output}: is a file; name a new folder")
    if not is_utf8(path):
        raise ConfigError(f"--output {output}: {NOT_UTF8}")
    check_can_create(output)
    if path.exists() and any(path.iterdir()):
        raise ConfigError(f"--output {output}: is not empty; choose a new folder")


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, from the system's cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        # On macOS, fsync leaves data in the drive's own cache, which is lost in a power cut.
        if (full := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
            with suppress(OSError):  # not supported by network drives
                fcntl.fcntl(descriptor, full)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically: readers see the old file or the new one.

    Raises:
        WriteError: The file can't be written; the old file is unchanged.
    """
    partial = file.with_name(f".{file.name}.partial")
    with _replace(file, partial):
        partial.write_text(text, encoding="utf-8")


def write_tensors(file: Path, tensors: Mapping[str, mx.array]) -> None:
    """Write a safetensors file atomically, with the tensors sorted by name.

    Raises:
        WriteError: The file can't be written; the old file is unchanged.
    """
    partial = file.with_name(f".{file.stem}.partial.safetensors")
    with _replace(file, partial):
        ordered = dict(sorted(tensors.items()))
        mx.save_safetensors(str(partial), ordered, metadata={"format": "mlx"})


@contextmanager
def open_atomic(file: Path) -> Iterator[TextIO]:
    """Open a text stream that replaces `file` when the block ends without an error.

    Raises:
        WriteError: The file can't be written; the old file is unchanged.
    """
    partial = file.with_name(f".{file.name}.partial")
    # A RuntimeError in the block comes from the work whose results are written, not from writing.
    with _replace(file, partial, (OSError,)), partial.open("w", encoding="utf-8") as stream:
        yield stream
        stream.flush()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill; it is renamed to `folder` when the block ends without an error.

    `folder` must be empty or not exist.

    Raises:
        WriteError: The folder can't be written; no new folder is left behind.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with wrap_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(partial, folder, is_folder=True):
        try:
            with wrap_write_errors(folder):
                for left in partial.iterdir():  # by a process that was killed
                    left.unlink()
            try:
                yield partial
            except WriteError as error:
                # Of a file in the temporary folder, whose name means nothing to the user.
                raise WriteError(str(error).replace(str(partial), str(folder))) from error
            with wrap_write_errors(folder):
                for file in partial.iterdir():
                    flush_to_disk(file)
                if folder.is_dir():
                    folder.rmdir()
                partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def _locked(partial: Path, target: Path, *, is_folder: bool = False) -> Iterator[None]:
    """Create a temporary file or folder, and hold its lock within the block.

    Raises:
        WriteError: It can't be created, or another process has held the lock for `LOCK_SECONDS`.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        with wrap_write_errors(target):
            if is_folder:
                partial.mkdir(exist_ok=True)
                descriptor = os.open(partial, os.O_RDONLY)
            else:
                descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() >= deadline:
                raise WriteError(
                    f"{target}: another command is writing it; wait for it, or name another output"
                ) from None
            time.sleep(0.02)
            continue
        except OSError:
            pass  # a network drive without locks
        except BaseException:
            os.close(descriptor)
            raise
        # The process that held the lock may have renamed the file in the meantime.
        with suppress(OSError):
            if os.path.samestat(os.stat(partial), os.fstat(descriptor)):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _replace(
    file: Path, partial: Path, errors: tuple[type[Exception], ...] = (OSError, RuntimeError)
) -> Iterator[None]:
    if file.exists() and not file.is_file():
        # It would be replaced: by root even /dev/null.
        kind = "a folder" if file.is_dir() else "not a regular file"
        raise WriteError(f"{file}: can't be written (it is {kind})")
    with _locked(partial, file), wrap_write_errors(file, errors):
        try:
            yield
            flush_to_disk(partial)
            partial.replace(file)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        flush_to_disk(file.parent)
