"""A log of model outputs by key, so that work which was interrupted continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_align.errors import DataError
from mlx_align.system.atomic_io import wrap_write_errors
from mlx_align.system.json_text import to_json


class KeyedLog:
    """A JSONL file of rows with a `key`; rows are added and never changed.

    Args:
        file: The file; created with the first row. Rows in it are kept.
        required: Fields that every row has.

    Raises:
        DataError: A line, other than an incomplete last one, can't be read.
    """

    def __init__(self, file: Path, required: Sequence[str] = ()) -> None:
        self.file = file
        self._rows: dict[str, dict[str, Any]] = {}
        if not file.is_file():
            return
        content = file.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(complete.decode("utf-8", "replace").split("\n")[:-1], 1):
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
        if complete != content:
            # The process ended while it wrote the last line.
            with wrap_write_errors(file), file.open("r+b") as stream:
                stream.truncate(len(complete))

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> dict[str, Any] | None:
        """The row with this key; None if it isn't there yet."""
        return self._rows.get(key)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, which have a `key`, and flush them to the disk.

        Raises:
            WriteError: The file can't be written.
        """
        text = "".join(to_json(row, ascii=False) + "\n" for row in rows)
        with wrap_write_errors(self.file), self.file.open("ab", buffering=0) as stream:
            # Unpaired surrogates, which a model may write as bytes, have no UTF-8.
            stream.write(text.encode("utf-8", "replace"))
            os.fsync(stream.fileno())
        self._rows.update((str(row["key"]), dict(row)) for row in rows)


def hash_key(*parts: Any) -> str:
    """A hash of JSON-serialisable parts."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()
