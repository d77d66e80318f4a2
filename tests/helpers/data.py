"""Messages, and rows in JSON Lines files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one message by the user."""
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    """A conversation of one message by the assistant."""
    return [{"role": "assistant", "content": text}]


def write_rows(file: Path | str, rows: Iterable[Any]) -> Path:
    """Write a JSON Lines file, and its folder if it doesn't exist; returns the file."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_splits(folder: Path | str, **splits: Iterable[Any]) -> Path:
    """Write FOLDER/SPLIT.jsonl for every split; returns the folder."""
    for name, rows in splits.items():
        write_rows(Path(folder) / f"{name}.jsonl", rows)
    return Path(folder)


def read_rows(file: Path | str) -> list[Any]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in Path(file).read_text().splitlines()]
