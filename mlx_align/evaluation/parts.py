"""Finished parts of an evaluation, kept in a file, so that one which was interrupted continues."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_align.errors import ConfigError
from mlx_align.system.keyed_log import KeyedLog, hash_key
from mlx_align.system.row_file import check_same_inputs, is_being_written

PARTS_FILE = "evaluation.partial.jsonl"
_INPUTS = "inputs"


class FinishedParts:
    """Results by name: batches of log-probs, sampled completions, scores.

    Args:
        folder: The folder with the file; None to keep nothing.
        resume: Whether the file of an earlier command may be there.

    Raises:
        ConfigError: There is one, and it isn't resumed, or another command is writing it.
    """

    def __init__(self, folder: Path | None = None, *, resume: bool = False) -> None:
        self._log: KeyedLog | None = None
        if folder is None:
            return
        file = folder / PARTS_FILE
        if file.exists() and not resume:
            if is_being_written(file):
                raise ConfigError(
                    f"--output {folder}: another command is writing it; wait for it, or name "
                    "another output"
                )
            raise ConfigError(
                f"--output {folder}: has an unfinished evaluation; add --resume to continue it, or "
                "name a new folder"
            )
        self._log = KeyedLog(file)

    @property
    def is_kept(self) -> bool:
        """Whether results are kept."""
        return self._log is not None

    def begin(self, inputs: Mapping[str, str]) -> int:
        """Record what the results depend on, by flag; returns the number of finished parts.

        Raises:
            ConfigError: The earlier command had other inputs.
        """
        if self._log is None:
            return 0
        earlier = self._log.get(_INPUTS)
        if earlier is None:
            self._log.add([{"key": _INPUTS, _INPUTS: dict(inputs)}])
        else:
            check_same_inputs(self._log.file, earlier[_INPUTS], inputs)
        return len(self._log) - 1

    def get(self, *name: Any) -> Any:
        """The result of a part; None if it isn't finished."""
        row = None if self._log is None else self._log.get(hash_key(*name))
        return None if row is None else row["value"]

    def add(self, *name: Any, value: Any) -> None:
        """Keep the result of a part: a value that JSON has, or arrays as `pack` makes them.

        Raises:
            WriteError: The file can't be written.
        """
        if self._log is not None:
            self._log.add([{"key": hash_key(*name), "value": value}])

    def remove(self) -> None:
        """Remove the file, because the evaluation is complete."""
        if self._log is not None:
            self._log.file.unlink(missing_ok=True)

    def close(self) -> int:
        """After an interruption: the number of parts that are kept; without any, no file is."""
        if self._log is None or not self._log.file.exists():
            return 0
        kept = max(len(self._log) - 1, 0)
        if not kept:
            with suppress(OSError):
                self._log.file.unlink()
        return kept


def pack(arrays: Sequence[npt.NDArray[np.float32]]) -> list[str]:
    """Arrays (float32) as text, without rounding."""
    return [base64.b64encode(array.astype("<f4").tobytes()).decode() for array in arrays]


def unpack(texts: Sequence[str]) -> tuple[npt.NDArray[np.float32], ...]:
    """The arrays that `pack` made text of."""
    return tuple(np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32) for text in texts)
