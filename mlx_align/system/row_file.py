"""JSON Lines files that are written row by row, and continued after an interruption.

A command that is stopped, or meets a full disk, keeps the rows that are finished, as whole lines.
Next to the file, `.NAME.progress.json` has a hash of everything that the rows are made of, and the
number of inputs whose rows are in the file; it is removed when the file is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from mlx_align.errors import ConfigError, WriteError
from mlx_align.system.atomic_io import check_can_create, wrap_write_errors, write_text
from mlx_align.system.interrupts import Interrupted
from mlx_align.system.json_text import to_json


class RowFile:
    """An open JSON Lines file; made by `open_rows`.

    Attributes:
        file: Its path.
        done: The number of inputs whose rows are in the file.
        rows: The number of rows in the file.
    """

    def __init__(self, file: Path, descriptor: int, inputs: Mapping[str, str]) -> None:
        self.file, self.done, self.rows = file, 0, 0
        self._descriptor, self._inputs = descriptor, dict(inputs)
        self._bytes = 0

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row.

        Raises:
            WriteError: It can't be written; the file ends with the row before it.
        """
        self._write(to_json(row, ascii=False).encode() + b"\n")
        self.rows += 1

    def _write(self, line: bytes) -> None:
        with wrap_write_errors(self.file, (OSError,)):
            _write_all(self._descriptor, line, self._bytes)
        self._bytes += len(line)

    def commit(self, done: int) -> None:
        """Record that the rows of `done` inputs are in the file.

        Raises:
            WriteError: That can't be written; a resumed command continues from the record before.
        """
        with wrap_write_errors(self.file, (OSError,)):
            os.fsync(self._descriptor)
        content = {
            "inputs": self._inputs,
            "done": done,
            "rows": self.rows,
            "bytes": self._bytes,
        }
        progress = progress_file(self.file)
        try:
            write_text(progress, json.dumps(content, indent=2) + "\n")
        except WriteError as error:
            raise WriteError(str(error).replace(str(progress), str(self.file))) from error
        self.done = done

    def read(self) -> Iterator[dict[str, Any]]:
        """The rows that are in the file."""
        with self.file.open("rb") as stream:
            for line in stream.read(self._bytes).split(b"\n")[:-1]:
                yield json.loads(line)

    def restore(self, content: Mapping[str, Any]) -> None:
        """Continue after the rows of the last `commit`; what was written later is removed."""
        self.done, self.rows = int(content["done"]), int(content["rows"])
        self._bytes = int(content["bytes"])
        with wrap_write_errors(self.file, (OSError,)):
            os.ftruncate(self._descriptor, self._bytes)
            os.lseek(self._descriptor, self._bytes, os.SEEK_SET)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


@contextmanager
def open_rows(
    file: Path,
    inputs: Mapping[str, str],
    *,
    resume: bool = False,
    total: int | None,
    note: Callable[[str], None],
) -> Iterator[RowFile]:
    """Open a new file, or one that an interrupted command began.

    Args:
        file: The file. Without `resume` it must not exist.
        inputs: Hashes or values of all that the rows depend on, by the option that names it.
        resume: Continue the file if it exists.
        total: The number of inputs; None if the file can't be continued, because the inputs are
            typed in.
        note: Called with a line when an error or a signal ends the block.

    Raises:
        ConfigError: The file is complete, of other inputs, or another process writes it.
        WriteError: It can't be written.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if resume else os.O_EXCL)
    try:
        with wrap_write_errors(file, (OSError,)):
            descriptor = os.open(file, flags, 0o666)
    except WriteError as error:
        if isinstance(error.__cause__, FileExistsError):  # it wasn't there when the command began
            raise ConfigError(
                f"--output {file}: another command has just created it; name a new file"
            ) from None
        raise
    rows = RowFile(file, descriptor, inputs)
    try:
        _lock(file, descriptor)
        earlier = read_progress(file) if resume else None
        if earlier is not None:
            _check_same(file, earlier, inputs, os.fstat(descriptor).st_size)
            rows.restore(earlier)
            note(f"Resuming after {rows.done:,} of {total or 0:,}.")
        elif os.fstat(descriptor).st_size:
            raise ConfigError(
                f"--resume: {file} is complete, or is not a file that this command began; name "
                "another --output"
            )
        try:
            if total is not None:
                rows.commit(rows.done)
            yield rows
        except BaseException as error:
            if _keep(rows, total, note) and isinstance(error, Interrupted):
                error.explained = True
            raise
        with wrap_write_errors(file, (OSError,)):
            os.fsync(descriptor)
            progress_file(file).unlink(missing_ok=True)
    finally:
        rows.close()


def _keep(rows: RowFile, total: int | None, note: Callable[[str], None]) -> bool:
    """Say what an interrupted command leaves; remove files without a row.

    Returns whether a line was printed.
    """
    if rows.rows and total is None:
        return False
    if rows.rows or rows.done:
        note(
            f"stopped after {rows.done:,} of {total:,}; {rows.file} keeps its rows: continue with "
            "the same command and --resume"
        )
        return True
    with suppress(OSError):
        rows.file.unlink(missing_ok=True)
        progress_file(rows.file).unlink(missing_ok=True)
    return False


def _lock(file: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"--output {file}: another command is writing it; wait for it, or name another output"
        ) from None
    except OSError:
        pass  # a network drive without locks


def _write_all(descriptor: int, data: bytes, start: int) -> None:
    """Write at the end of a file, which has `start` bytes, all of `data` or nothing."""
    view, written = memoryview(data), 0
    try:
        while written < len(view):  # a disk that is almost full takes a part, without an error
            written += os.write(descriptor, view[written:])
    except BaseException:
        os.ftruncate(descriptor, start)
        os.lseek(descriptor, start, os.SEEK_SET)
        raise


def append_rows(file: Path, rows: Iterable[Mapping[str, Any]], *, shared: bool = False) -> None:
    """Add rows to a JSON Lines file, all or none, and flush them to the disk.

    Args:
        file: The file; created if it doesn't exist.
        rows: The rows.
        shared: Whether other processes may add to the file at the same time: they take turns.

    Raises:
        WriteError: They can't be written; the file ends with the rows before them.
    """
    data = "".join(to_json(row, ascii=False) + "\n" for row in rows).encode()
    with wrap_write_errors(file, (OSError,)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            if shared:
                with suppress(OSError):  # a network drive without locks
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            _write_all(descriptor, data, os.fstat(descriptor).st_size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_partial_line(file: Path, *, shared: bool = False) -> None:
    """Remove a last line without an end, which a process that was killed may have left.

    Args:
        file: The file.
        shared: As for `append_rows`.

    Raises:
        WriteError: The file can't be changed.
    """
    with wrap_write_errors(file, (OSError,)):
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        try:
            if shared:
                with suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            with open(descriptor, "rb", closefd=False) as stream:
                content = stream.read()
            complete = content.rfind(b"\n") + 1
            if complete < len(content):
                os.ftruncate(descriptor, complete)
        finally:
            os.close(descriptor)


class OutputLock:
    """Keeps other processes from writing the same output, until it is garbage collected.

    Within a process, all users of a file share one lock.

    Attributes:
        file: The file, which exists.
    """

    _held: ClassVar[WeakValueDictionary[Path, OutputLock]] = WeakValueDictionary()

    def __init__(self, file: Path, descriptor: int) -> None:
        self.file = file
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def take(cls, file: Path) -> OutputLock:
        """The lock of a file or folder.

        Raises:
            ConfigError: Another process has it.
            WriteError: The file can't be opened.
        """
        path = file.resolve()
        if (held := cls._held.get(path)) is not None:
            return held
        with wrap_write_errors(file, (OSError,)):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _lock(file, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        lock = cls._held[path] = cls(path, descriptor)
        return lock


def is_being_written(file: Path) -> bool:
    """Whether another process has `file` open in `open_rows`."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def progress_file(file: Path) -> Path:
    """The file next to `file` that says how far it is."""
    return file.with_name(f".{file.name}.progress.json")


def read_progress(file: Path) -> dict[str, Any] | None:
    """The last `commit` of an unfinished file; None if the file doesn't exist.

    Raises:
        ConfigError: It is damaged.
    """
    progress = progress_file(file)
    if not progress.exists():
        return None
    try:
        content = json.loads(progress.read_text(encoding="utf-8"))
        numbers = [content[name] for name in ("done", "rows", "bytes")]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(numbers)
        return {**content, "inputs": dict(content["inputs"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"--resume: {progress} is damaged; remove it and {file}, and start again"
        ) from error


def _check_same(
    file: Path, earlier: Mapping[str, Any], inputs: Mapping[str, str], size: int
) -> None:
    check_same_inputs(file, earlier["inputs"], inputs)
    if size < earlier["bytes"]:
        raise ConfigError(
            f"--resume: {file} is shorter than when it was stopped; remove it and "
            f"{progress_file(file)}, and start again"
        )


def check_same_inputs(file: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise a ConfigError that names the options which differ from those `file` was begun with."""
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise ConfigError(
            f"--resume: {', '.join(changed)} changed since {file} was begun; restore that, or name "
            "another --output"
        )


def hash_rows(rows: Iterable[Any]) -> str:
    """A hash of rows of data; values that JSON lacks are hashed as their text."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def unused_file(file: Path) -> Path:
    """`file` if it doesn't exist or isn't complete, else the first free one of NAME-2, NAME-3."""
    found, number = file, 1
    while found.exists() and not progress_file(found).exists():
        number += 1
        found = file.with_name(f"{file.stem}-{number}{file.suffix}")
    return found


def new_file(output: str, *, resume: bool = False) -> Path:
    """The file that `--output` names, which must not exist, unless the command is resumed.

    Raises:
        ConfigError: It exists, another command is writing it, or its folder can't be written.
    """
    file = Path(output).expanduser()
    check_can_create(output)
    if file.exists():
        if not file.is_file():
            raise ConfigError(f"--output {output}: is not a regular file; name a new file")
        if is_being_written(file):
            raise ConfigError(
                f"--output {output}: another command is writing it; wait for it, or name another "
                "output"
            )
        if not resume:
            hint = "name a new file"
            if progress_file(file).exists():
                hint = "it is not complete: add --resume to continue it, or name a new file"
            raise ConfigError(f"--output {output}: exists already; {hint}")
    folder = file.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {folder}; create it first")
    return file
