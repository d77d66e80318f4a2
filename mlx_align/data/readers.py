"""Read rows from files, folders, `datasets` datasets and Python objects.

Each row is a mapping of fields with its location (`train.jsonl:17`), so that every later error can
name it. Anything wrong with a file raises a one-line `DataError`. What the fields mean is decided
in `mlx_align.data.formats`.
"""

from __future__ import annotations

import csv
import difflib
import functools
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import numpy as np
import yaml

from mlx_align.errors import DataError
from mlx_align.system.regular_files import (
    MAX_JSON_BYTES,
    irregular_file,
    leaves,
    read_regular_file,
)

# Names of each split, in order of preference. `test` is never used as `valid`: choosing between
# runs by their score on the test split would make it useless for reporting.
SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "train_prefs", "train_sft"),
    "valid": ("valid", "validation", "val", "dev", "eval", "valid_prefs", "validation_prefs"),
    "test": ("test", "test_prefs", "test_sft"),
}
_ALL_SPLIT_NAMES = frozenset(name for names in SPLIT_NAMES.values() for name in names)
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

# A row's size: beyond it, reading a row takes gigabytes. Columns for reward functions, such as the
# tests of a program, are a part of it.
MAX_ROW_BYTES = 64 << 20
# Rows nested deeper than this are refused: real data is not, and recursive code could overflow.
MAX_DEPTH = 64

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", re.ASCII)
# Columns of a CSV file whose cells are JSON (numbers, true and false, lists), not text.
_CSV_JSON_COLUMNS = re.compile(
    r"label|kto_tag|margin|soft_label|chosen_prob|votes_.*|scores?|.*[_-]score|score_.*|ratings?|"
    r".*[_-]rating|ranks?|messages|conversations|completions|responses|history"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of data.

    Attributes:
        source: The location, for error messages: `train.jsonl:17`, `data[17]`.
        fields: The fields that are not null.
        extra: Further columns, for reward functions only; None if no mapping told them from the
            fields.
        answers: The columns that a mapping took the completions from, if there are several.
    """

    source: str
    fields: Mapping[str, Any]
    extra: Mapping[str, Any] | None = None
    answers: tuple[str, ...] = ()


@runtime_checkable
class DataSource(Protocol):
    """A dataset with named splits."""

    @property
    def name(self) -> str:
        """The path or name of the dataset, for messages."""

    def has_split(self, split: str) -> bool:
        """Whether it has `train`, `valid` or `test`, also under another usual name."""

    def rows(self, split: str) -> list[Row]:
        """Read all rows of a split, at least one.

        Raises:
            DataError: The data lacks the split, the split is empty, or a row can't be read.
        """


# What every reader accepts: a path, the name of a hub dataset, or an opened source.
Data = str | os.PathLike[str] | DataSource


def open_data(data: object) -> DataSource:
    """Open a dataset given as a path, a hub name, or Python objects.

    Args:
        data: One of

            - a folder with `train`/`valid`/`test` files (`.jsonl`, `.json`, `.csv` or `.parquet`,
              in this order of preference), or one such file, which is the train split;
            - a folder in the layout of the `datasets` library, or a hub dataset `owner/name` or
              `owner/name:config`;
            - a list of dicts or a `datasets.Dataset`, which is the train split;
            - a mapping of split names to these, such as a `datasets.DatasetDict`;
            - a `DataSource`, which is returned unchanged.

    Raises:
        DataError: It does not exist, or is of another type.
    """
    if isinstance(data, str | os.PathLike):
        return _open_path(os.fspath(data))
    if isinstance(data, Mapping):
        return MemorySource(_check_splits(data), lambda split: f"data[{split!r}]")
    if _is_table(data):
        return MemorySource({"train": data}, lambda split: "data")
    if isinstance(data, DataSource):
        return data
    raise DataError(
        f"data is of type {type(data).__name__}; expected a path, a hub name, a list of dicts, a "
        "datasets.Dataset, or a dict of these by split name"
    )


def read_rows(data: Data, split: str = "train") -> list[Row]:
    """Read all rows of one split.

    Args:
        data: As for `open_data`.
        split: `train`, `valid` or `test`; other usual names of the split are recognised.

    Raises:
        DataError: The data doesn't exist, lacks the split, is empty or can't be read.
    """
    _check_split_name(split)
    return open_data(data).rows(split)


def has_split(data: Data, split: str) -> bool:
    """Whether the data has this split. Arguments as for `read_rows`.

    Raises:
        DataError: The data doesn't exist or can't be opened.
    """
    _check_split_name(split)
    return open_data(data).has_split(split)


def check_data(data: str | os.PathLike[str]) -> None:
    """Check that a path or name can be data, without downloading or reading anything.

    Raises:
        DataError: It is neither an existing file or folder nor a valid hub name.
    """
    name = os.fspath(data)
    path = _expand(name)
    if not name or not os.path.exists(path):
        if path.suffix not in FILE_SUFFIXES and _HUB_NAME.fullmatch(name) and name[0] not in ".-":
            return
        close = _nearest_name(path)
        hint = "" if close is None else f"; did you mean {path.with_name(close)}?"
        raise DataError(
            f"--data {name!r}: no such file or folder, and not the name of a hub dataset "
            f"(owner/name){hint}"
        )
    if os.path.isfile(path):
        if path.suffix not in FILE_SUFFIXES:
            raise DataError(f"{name}: expected a file ending in {', '.join(FILE_SUFFIXES)}")
    elif not os.path.isdir(path):
        raise DataError(f"{name}: is neither a regular file nor a folder")


def _nearest_name(path: Path) -> str | None:
    """The name in a path's folder that is most like the path's, not counting the suffix."""
    names = _names_in(path.parent)
    stems = difflib.get_close_matches(path.stem, {Path(name).stem for name in names}, n=1)
    found = sorted(name for name in names if stems and Path(name).stem == stems[0])
    same_kind = [name for name in found if Path(name).suffix == path.suffix]
    return next(iter(same_kind + found), None)


def _names_in(folder: Path) -> list[str]:
    """The data files and folders in a folder; [] if it can't be read."""
    try:
        found = list(folder.iterdir())
    except OSError:
        return []
    return [one.name for one in found if one.suffix in FILE_SUFFIXES or one.is_dir()]


def container_of(source: str) -> str:
    """The file or object that a row's location is in: `train.jsonl` of `train.jsonl:17`."""
    return re.sub(r"(:row \d+|:\d+|\[\d+\])\Z", "", source)


def one_line(error: BaseException, limit: int = 200) -> str:
    """An exception's text on one line, shortened; the name of its type if it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _check_split_name(split: str) -> None:
    if split not in SPLIT_NAMES:
        raise DataError(f"split {split!r}: expected one of {', '.join(SPLIT_NAMES)}")


def _missing_split(name: str, split: str, found: Iterable[str], hint: str = "") -> DataError:
    return DataError(f"{name}: has no {split} split (found: {', '.join(found) or 'nothing'}){hint}")


def _non_empty(rows: Iterable[Row], label: str) -> list[Row]:
    rows = list(rows)
    if not rows:
        raise DataError(f"{label}: has no rows; expected at least one")
    return rows


class ReadOnce:
    """A data source that keeps the rows it has read, for data that is read in several ways."""

    def __init__(self, source: DataSource) -> None:
        self.name = source.name
        self._source = source
        self._rows: dict[str, list[Row]] = {}

    def has_split(self, split: str) -> bool:
        """As the source's."""
        return self._source.has_split(split)

    def rows(self, split: str) -> list[Row]:
        """The rows of a split, in a new list; errors are the source's."""
        if split not in self._rows:
            self._rows[split] = self._source.rows(split)
        return list(self._rows[split])


# --- Python objects ---


class MemorySource:
    """Rows from Python: lists of dicts or `datasets.Dataset` objects, by split name.

    Args:
        splits: The rows of each split.
        label: The expression for a split in messages: `data` or `data['valid']`.
    """

    name = "data"

    def __init__(self, splits: Mapping[str, Any], label: Callable[[str], str]) -> None:
        self._splits = splits
        self._label = label

    def has_split(self, split: str) -> bool:
        """Whether a key is one of the names of this split."""
        return self._find(split) is not None

    def rows(self, split: str) -> list[Row]:
        """Read a split; row i is at `data[i]`, counted from 0 as in Python."""
        key = self._find(split)
        if key is None:
            raise _missing_split(self.name, split, self._splits)
        label = self._label(key)
        try:
            return _non_empty(self._read(label, self._splits[key]), label)
        except DataError:
            raise
        except Exception as error:  # decoding errors of a `datasets` column
            raise DataError(f"{label}: can't be read ({one_line(error)})") from None

    def _find(self, split: str) -> str | None:
        return next((name for name in SPLIT_NAMES[split] if name in self._splits), None)

    def _read(self, label: str, table: Iterable[Any]) -> Iterator[Row]:
        for index, fields in enumerate(table):
            source = f"{label}[{index}]"
            if not isinstance(fields, Mapping):
                raise DataError(
                    f"{source}: expected a dict of fields, found {type(fields).__name__}"
                )
            yield _row(source, _to_json(source, fields))


def _is_table(value: object) -> bool:
    """Whether this is a list of rows or a `datasets.Dataset` (not imported: that takes seconds)."""
    if isinstance(value, str | bytes | Mapping):
        return False
    return isinstance(value, Sequence) or hasattr(value, "column_names")


def _check_splits(data: Mapping[Any, Any]) -> Mapping[str, Any]:
    if not any(name in _ALL_SPLIT_NAMES for name in data):
        found = ", ".join(map(repr, data))[:120] or "nothing"
        raise DataError(
            f"data is a dict with the keys {found}; expected split names (train, valid, test). For "
            "a dict of columns use datasets.Dataset.from_dict; for one row, put it into a list"
        )
    for name, table in data.items():
        if not _is_table(table):
            raise DataError(
                f"data[{name!r}] is of type {type(table).__name__}; expected a list of dicts or a "
                "datasets.Dataset"
            )
    return data


def _to_json(source: str, value: Any, depth: int = 0) -> Any:
    """Convert a Python value to the types that JSON has: dicts, lists, strings, numbers."""
    if depth > MAX_DEPTH:
        raise DataError(f"{source}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _to_json(source, item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(source, item, depth + 1) for item in value]
    return value


# --- files and folders ---


class _FileSource:
    """One file, which is the train split."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._path = path

    def has_split(self, split: str) -> bool:
        return split == "train"

    def rows(self, split: str) -> list[Row]:
        if split != "train":
            raise _missing_split(self.name, split, [self._path.name], _file_hint(split))
        return _non_empty(_read_file(self._path), self._path.name)


class _FolderSource:
    """A folder with a file for each split."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._path = path

    def has_split(self, split: str) -> bool:
        return self._find(split) is not None

    def rows(self, split: str) -> list[Row]:
        file = self._find(split)
        if file is None:
            found = sorted(name for name in _listing(self._path) if name.endswith(FILE_SUFFIXES))
            raise _missing_split(self.name, split, found, _file_hint(split))
        if leaves(file, self._path):
            raise DataError(
                f"{file}: is a link that leaves the data folder (to {file.resolve()}); copy the "
                "file, or name it as --data"
            )
        return _non_empty(_read_file(file), file.name)

    def _find(self, split: str) -> Path | None:
        files = (
            self._path / f"{n}{suffix}" for n in SPLIT_NAMES[split] for suffix in FILE_SUFFIXES
        )
        return next((file for file in files if os.path.exists(file)), None)


def _file_hint(split: str) -> str:
    return f"; expected a file such as {split}.jsonl"


def _open_path(name: str) -> DataSource:
    check_data(name)
    path = _expand(name)
    if os.path.isfile(path):
        return _FileSource(name, path)
    return _LibrarySource(name) if _is_library_dataset(path) else _FolderSource(name, path)


def _expand(name: str) -> Path:
    return Path(os.path.expanduser(name))


def _listing(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from None


def _read_file(path: Path) -> Iterator[Row]:
    check_data(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        content = read_regular_file(path)
    except OSError as error:
        raise DataError(f"{path.name}: can't be read ({error.strerror or error})") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    content = content.removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".csv":
        return _read_csv(path.name, content)
    return (_read_array if content.lstrip()[:1] == b"[" else _read_lines)(path.name, content)


def _read_lines(name: str, content: bytes) -> Iterator[Row]:
    # Split at \n only: JSON strings may contain the other separators that splitlines() splits at.
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            source = f"{name}:{number}"
            _check_size(source, len(line))
            yield _row(source, _parse(source, _decode(source, line)))


def _read_array(name: str, content: bytes) -> Iterator[Row]:
    text = _decode(name, content)
    values = _parse(name, text)
    if not isinstance(values, list):
        raise DataError(f"{name}: expected an array of JSON objects, or one object per line")
    for number, value in enumerate(values, 1):
        yield _row(f"{name}:row {number}", value)


def _read_csv(name: str, content: bytes) -> Iterator[Row]:
    """Read a CSV file with a header row.

    Cells are text, except that columns of labels, scores and lists may hold JSON values. Empty
    cells are null. A row's location is the line on which it ends.
    """
    reader = csv.reader(io.StringIO(_decode(name, content), newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or not all(header):
            raise DataError(f"{name}:1: expected a header row of unique column names")
        for cells in reader:
            source = f"{name}:{reader.line_num}"
            if len(cells) > len(header):
                raise DataError(f"{source}: {len(cells)} cells, but {len(header)} columns")
            if any(cells):
                pairs = zip(header, cells, strict=False)
                yield _row(source, {key: _cell(key, cell) for key, cell in pairs})
    except csv.Error as error:
        raise DataError(f"{name}:{reader.line_num}: not CSV ({error})") from None


def _cell(column: str, cell: str) -> Any:
    if _CSV_JSON_COLUMNS.fullmatch(column):
        with suppress(DataError):  # not JSON: text, which the converter of the column may refuse
            return _parse(column, cell.lower() if cell.lower() in ("true", "false") else cell)
    return cell or None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        # Pass an open file: given a path, pyarrow reads `split=x` in folder names as columns.
        with path.open("rb") as handle:
            for batch in pyarrow.parquet.ParquetFile(handle).iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield _row(f"{path.name}:row {number}", fields)
    except DataError:
        raise
    # A broken file raises ArrowException, OSError, ValueError, UnicodeDecodeError, …
    except Exception as error:
        raise DataError(f"{path.name}: not a readable parquet file ({one_line(error)})") from None


# --- the `datasets` library ---


class _LibrarySource:
    """A dataset that the `datasets` library reads: from the hub, saved to disk, or in shards."""

    def __init__(self, name: str) -> None:
        self.name = name

    def has_split(self, split: str) -> bool:
        return self._find(split) is not None

    def rows(self, split: str) -> list[Row]:
        found = self._find(split)
        if found is None:
            present = sorted(map(str, _load_library(self.name)))
            raise _missing_split(self.name, split, present, _file_hint(split))
        path = _expand(self.name)
        label = f"{path.name if os.path.isdir(path) else self.name}/{found}"
        rows: list[Row] = []
        try:
            for number, fields in enumerate(_load_library(self.name)[found], 1):
                rows.append(_row(f"{label}:row {number}", dict(fields)))
        except DataError:
            raise
        except Exception as error:  # decoding errors of any type of column
            where = f"{label}:row {len(rows) + 1}"
            raise DataError(f"{where}: can't be read ({one_line(error)})") from None
        return _non_empty(rows, f"{self.name}/{found}")

    def _find(self, split: str) -> str | None:
        loaded = _load_library(self.name)
        return next((name for name in SPLIT_NAMES[split] if name in loaded), None)


def _is_library_dataset(path: Path) -> bool:
    """Whether this is a hub name, a saved dataset, or a folder of shards."""
    if not os.path.isdir(path):
        return True
    names = _listing(path)
    if any(Path(n).stem in _ALL_SPLIT_NAMES and n.endswith(FILE_SUFFIXES) for n in names):
        return False
    if {"dataset_dict.json", "dataset_info.json", "state.json"} & set(names):
        return True
    if os.path.isdir(path / "data"):
        names += _listing(path / "data")
    return any(re.match(r"(train|test|valid)\w*-\d+-of-\d+\.", name) for name in names)


@functools.lru_cache(maxsize=2)
def _load_library(name: str) -> Mapping[str, Any]:
    """The splits of a saved, sharded or hub dataset, by the library's own names."""
    import datasets  # takes seconds to import, and most runs read a plain file

    path = _expand(name)
    if os.path.isdir(path):
        _check_library_folder(path)
    try:
        if os.path.isdir(path) and {"dataset_dict.json", "state.json"} & set(_listing(path)):
            loaded = datasets.load_from_disk(str(path))
        elif os.path.isdir(path):
            loaded = datasets.load_dataset(str(path))
        else:
            repo, _, config = name.partition(":")
            loaded = datasets.load_dataset(repo, config or None)
    # The library passes on the exceptions of a dozen others (network, hub, arrow, yaml, json); to
    # the user they all mean that the dataset can't be loaded.
    except Exception as error:
        where = "" if os.path.isdir(path) else " from the hub, and there is no such local path"
        raise DataError(f"--data {name!r}: can't be loaded{where} ({one_line(error)})") from None
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def _check_library_folder(folder: Path) -> None:
    """Refuse pipes and devices, links out of the folder, and lists of files that are outside.

    Raises:
        DataError: There is one; the message names it.
    """
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            file = Path(place, name)
            if file.is_symlink() and leaves(file, folder):
                raise DataError(f"{file}: is a link that leaves the data folder; copy the file")
        if problem := irregular_file(Path(place)):
            raise DataError(f"{place}: {problem}")
        for name in {"state.json", "dataset_dict.json", "README.md"} & set(names):
            for text in _file_names(Path(place, name)):
                outside = "://" in text or os.path.isabs(text) or ".." in Path(text).parts
                if outside:
                    raise DataError(f"{Path(place, name)}: names {text!r:.100}, outside the folder")


def _file_names(file: Path) -> Iterator[str]:
    """The files that a description of a dataset names: of `datasets`, or of a dataset card."""
    try:
        text = read_regular_file(file, MAX_JSON_BYTES).decode("utf-8", "replace")
        if file.suffix == ".md":
            head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
            content = yaml.safe_load(head[1]) if head else None
            found: Any = content.get("configs") if isinstance(content, dict) else None
        else:
            content = json.loads(text)
            found = [content.get("_data_files"), content.get("splits")]
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
        return  # the library says what is wrong
    waiting = [found]
    for _ in range(100_000):
        if not waiting:
            return
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


# --- parsing and checking one row ---


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


def _check_size(source: str, size: int) -> None:
    if size > MAX_ROW_BYTES:
        raise DataError(
            f"{source}: a row of {size / 1e6:,.1f} MB; rows of more than "
            f"{MAX_ROW_BYTES / 1e6:,.1f} MB are refused: split or shorten it"
        )


def _row(source: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{source}: expected a JSON object {{…}}, found {type(value).__name__}")
    _check_value(source, value)
    return Row(source, {str(key): field for key, field in value.items() if field is not None})


def _check_value(source: str, value: Any) -> None:
    """Refuse deep nesting, size, and unpaired surrogates, which no file or tokenizer accepts."""
    level, size = [value], 0
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                size += len(item)
                if not item.isascii():
                    _check_text(source, item)
            elif isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            _check_size(source, size)
            return
        level = below
    raise DataError(f"{source}: nested deeper than {MAX_DEPTH} levels")


def _check_text(source: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{source}: a string contains half a surrogate pair (\\u{ord(text[error.start]):04x}); "
            "write the character itself, or both halves"
        ) from None
