"""One run per folder: a lock that dies with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_align.errors import ConfigError
from mlx_align.files import writing

LOCK_FILE = ".lock"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Within the block, no other process can hold the lock of the folder `run`.

    Raises:
        ConfigError: Another process holds it; the text names it.
        WriteError: The folder can't be written to.
    """
    file = run / LOCK_FILE
    with writing(file):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(descriptor, 32).decode("ascii", "replace").strip()
            raise ConfigError(
                f"{run}: another process trains in it (pid {pid or 'unknown'}); wait for it, stop "
                "it, or name another --output"
            ) from None
        except OSError:
            pass  # a network drive without locks: nobody can be kept out
        os.ftruncate(descriptor, 0)
        with writing(file):
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # which unlocks
