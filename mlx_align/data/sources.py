"""Reading rows: from a folder of splits, a single file, or a dataset of the `datasets` library.

A row is a JSON object and keeps where it stood (`train.jsonl:17`), so that every later complaint
can name it. Everything that can be wrong with a file ends in one `DataError` of one line; what a
row *means* is decided in `mlx_align.data.formats`.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mlx_align.errors import DataError

# The names a split goes by, best first. `test` never stands in for `valid`: it would be spent on
# choosing between runs, and no longer tell anything about the one chosen.
SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "train_prefs", "train_sft"),
    "valid": ("valid", "validation", "val", "dev", "eval", "valid_prefs", "validation_prefs"),
    "test": ("test", "test_prefs", "test_sft"),
}
_ALL_SPLIT_NAMES = frozenset(name for names in SPLIT_NAMES.values() for name in names)
SUFFIXES = (".jsonl", ".json", ".parquet")

# Deeper rows than this are nobody's data, and would overflow the stack of whoever walks them.
MAX_DEPTH = 64

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file: its fields (those that are null left out) and where it stands."""

    source: str
    fields: Mapping[str, Any]


def read_rows(data: str | os.PathLike[str], split: str = "train") -> list[Row]:
    """Read the rows of one split.

    Args:
        data: A folder with `train`/`valid`/`test` files (`.jsonl`, `.json` or `.parquet`, taken
            in this order), one such file (which is the train split), a folder in the `datasets`
            library's layout, or a hub dataset `owner/name` or `owner/name:config`.
        split: `train`, `valid` or `test`; each is found under its usual other names too.

    Raises:
        DataError: The data doesn't exist, lacks the split, is empty or can't be read.
    """
    found = _locate(data, split)
    if found is None:
        names = ", ".join(_splits_present(data)) or "none"
        raise DataError(
            f"{os.fspath(data)}: has no {split} split (found: {names}); expected a file such as "
            f"{split}.jsonl"
        )
    rows = list(_read_file(found)) if isinstance(found, Path) else _library_rows(data, found)
    if not rows:
        name = found.name if isinstance(found, Path) else f"{os.fspath(data)}/{found}"
        raise DataError(f"{name}: holds no rows; expected at least one")
    return rows


def has_split(data: str | os.PathLike[str], split: str) -> bool:
    """Whether `data` (as in `read_rows`) has this split; where `valid` is missing, split `train`.

    Raises:
        DataError: The data doesn't exist or can't be opened.
    """
    return _locate(data, split) is not None


def check_data(data: str | os.PathLike[str]) -> None:
    """Refuse a `data` that can't be right, without downloading or reading anything.

    Raises:
        DataError: It is neither an existing file or folder nor a possible hub name.
    """
    name = os.fspath(data)
    path = _path(data)
    if not name or not os.path.exists(path):
        if path.suffix not in SUFFIXES and _HUB_NAME.fullmatch(name) and name[0] not in ".-":
            return
        raise DataError(
            f"--data {name!r}: no such file or folder, and not the name of a hub dataset either "
            "(those read owner/name)"
        )
    if os.path.isfile(path):
        if path.suffix not in SUFFIXES:
            raise DataError(f"{name}: expected a file ending in {', '.join(SUFFIXES)}")
    elif not os.path.isdir(path):
        raise DataError(f"{name}: neither a regular file nor a folder")


def _path(data: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(os.fspath(data)))


def _locate(data: str | os.PathLike[str], split: str) -> Path | str | None:
    """The split's file, or its name in a library dataset, or None where there is none."""
    if split not in SPLIT_NAMES:
        raise DataError(f"split {split!r}: expected one of {', '.join(SPLIT_NAMES)}")
    check_data(data)
    path = _path(data)
    if os.path.isfile(path):
        return path if split == "train" else None
    if not _is_library_dataset(path):
        for name in SPLIT_NAMES[split]:
            for suffix in SUFFIXES:
                if os.path.exists(path / f"{name}{suffix}"):
                    return path / f"{name}{suffix}"
        return None
    loaded = _load_library(os.fspath(data))
    return next((name for name in SPLIT_NAMES[split] if name in loaded), None)


def _splits_present(data: str | os.PathLike[str]) -> list[str]:
    path = _path(data)
    if os.path.isfile(path):
        return [path.name]
    if _is_library_dataset(path):
        return sorted(map(str, _load_library(os.fspath(data))))
    return sorted(name for name in _listing(path) if name.endswith(SUFFIXES))


def _listing(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from None


def _is_library_dataset(path: Path) -> bool:
    """Whether `datasets` has to read it: a hub name, a saved dataset, or a folder of shards."""
    if not os.path.isdir(path):
        return True
    names = _listing(path)
    if any(Path(n).stem in _ALL_SPLIT_NAMES and n.endswith(SUFFIXES) for n in names):
        return False
    if {"dataset_dict.json", "dataset_info.json", "state.json"} & set(names):
        return True
    if os.path.isdir(path / "data"):
        names += _listing(path / "data")
    return any(re.match(r"(train|test|valid)\w*-\d+-of-\d+\.", name) for name in names)


@functools.lru_cache(maxsize=2)
def _load_library(name: str) -> Mapping[str, Any]:
    """The splits of a saved, sharded or hub dataset, by the library's own names."""
    import datasets  # slow to import, and most runs read a plain file

    path = _path(name)
    try:
        if os.path.isdir(path) and {"dataset_dict.json", "state.json"} & set(_listing(path)):
            loaded = datasets.load_from_disk(str(path))
        elif os.path.isdir(path):
            loaded = datasets.load_dataset(str(path))
        else:
            repo, _, config = name.partition(":")
            loaded = datasets.load_dataset(repo, config or None)
    # The library passes on the errors of a dozen others (network, hub, arrow, yaml, json), and
    # all of them mean the same to the user.
    except Exception as error:
        where = "" if os.path.isdir(path) else " from the hub, and there is no such local path"
        raise DataError(f"--data {name!r}: can't be loaded{where} ({one_line(error)})") from None
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def _library_rows(data: str | os.PathLike[str], split: str) -> list[Row]:
    name = os.fspath(data)
    label = f"{_path(data).name if os.path.isdir(_path(data)) else name}/{split}"
    rows = []
    try:
        for number, fields in enumerate(_load_library(name)[split], 1):
            rows.append(_row(f"{label}:row {number}", dict(fields)))
    except DataError:
        raise
    except Exception as error:  # decoding errors of whatever the columns hold
        raise DataError(f"{label}:row {len(rows) + 1}: can't be read ({one_line(error)})") from None
    return rows


def _read_file(path: Path) -> Iterator[Row]:
    check_data(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path.name}: can't be read ({error.strerror or error})") from None
    content = content.removeprefix(b"\xef\xbb\xbf")
    return (_read_array if content.lstrip()[:1] == b"[" else _read_lines)(path.name, content)


def _read_lines(name: str, content: bytes) -> Iterator[Row]:
    # Lines end at \n only: JSON strings may hold the other separators that splitlines() knows.
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            source = f"{name}:{number}"
            yield _row(source, _parse(source, _decode(source, line)))


def _read_array(name: str, content: bytes) -> Iterator[Row]:
    text = _decode(name, content)
    values = _parse(name, text)
    if not isinstance(values, list):
        raise DataError(f"{name}: expected an array of JSON objects, or one object a line")
    for number, value in enumerate(values, 1):
        yield _row(f"{name}:row {number}", value)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        # A handle of our own: by path, pyarrow would take `split=x` in folder names for columns.
        with path.open("rb") as handle:
            for batch in pyarrow.parquet.ParquetFile(handle).iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield _row(f"{path.name}:row {number}", fields)
    except DataError:
        raise
    # A broken file surfaces as ArrowException, OSError, ValueError, UnicodeDecodeError, …
    except Exception as error:
        raise DataError(f"{path.name}: not a readable parquet file ({one_line(error)})") from None


def _decode(source: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = "" if ":" in source else f":{content.count(bytes([10]), 0, error.start) + 1}"
        raise DataError(
            f"{source}{line}: not UTF-8 (byte 0x{content[error.start]:02x} at column "
            f"{error.start - content.rfind(bytes([10]), 0, error.start)}); save the file as UTF-8"
        ) from None


def _parse(source: str, text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        line = "" if ":" in source else f":{error.lineno}"
        raise DataError(f"{source}{line}: not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise DataError(f"{source}: nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # NaN and infinity, and integers of thousands of digits
        raise DataError(f"{source}: not JSON ({one_line(error)})") from None


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number; use null or leave the field out")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


def _row(source: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{source}: expected a JSON object {{…}}, found {type(value).__name__}")
    _check_value(source, value)
    return Row(source, {str(key): field for key, field in value.items() if field is not None})


def _check_value(source: str, value: Any) -> None:
    """Refuse nesting without end, and half surrogate pairs, which no file or tokenizer takes."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if not item.isascii():
                    _check_text(source, item)
            elif isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            return
        level = below
    raise DataError(f"{source}: nested deeper than {MAX_DEPTH} levels")


def _check_text(source: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{source}: half a surrogate pair (\\u{ord(text[error.start]):04x}) in a string; "
            "write the character itself, or both halves"
        ) from None


def one_line(error: BaseException, limit: int = 200) -> str:
    """An exception's text on one line, shortened; its type's name where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
