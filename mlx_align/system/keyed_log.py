"""A log of model outputs by key, so that work which was interrupted continues where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_align.errors import DataError
from mlx_align.system.row_file import OutputLock, append_rows, remove_partial_line


class KeyedLog:
    """A JSONL file of rows with a `key`; rows are added and never changed.

    Args:
        file: The file; created with the first row. Rows in it are kept.
        required: Fields that every row has.

    Raises:
        ConfigError: Another command is writing the file.
        DataError: A line, other than an incomplete last one, can't be read.
    """

    def __init__(self, file: Path, required: Sequence[str] = ()) -> None:
        self.file = file
        self._rows: dict[str, dict[str, Any]] = {}
        self._lock: OutputLock | None = None
        if not file.is_file():
            return
        self._lock = OutputLock.take(file)
        remove_partial_line(file)
        content = file.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(content.split("\n")[:-1], 1):
            try:
                row = json.loads(line)
                missing = [name for name in ("key", *required) if name not in row]
            except (ValueError, TypeError):
                row, missing = {}, ["key"]
            if missing:
                raise DataError(
                    f"{file}:{number}: damaged (no {missing[0]!r}); delete the line, and what it "
                    "held is computed again"
                )
            self._rows[str(row["key"])] = row

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> dict[str, Any] | None:
        """The row with this key; None if it isn't there yet."""
        return self._rows.get(key)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, which have a `key`, all or none, and flush them to the disk.

        Raises:
            ConfigError: Another command is writing the file.
            WriteError: The file can't be written.
        """
        if self._lock is None:
            append_rows(self.file, ())  # creates the file
            self._lock = OutputLock.take(self.file)
        append_rows(self.file, rows)
        self._rows.update((str(row["key"]), dict(row)) for row in rows)


def hash_key(*parts: Any) -> str:
    """A hash of JSON-serialisable parts."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()
