"""The reference as data: its log-probs per token, computed once before step 1 and kept.

A step needs no reference forward, and full fine-tuning no second copy of the weights. The store
is one SQLite file per (base weights, adapter); a row is keyed by its tokens. So an interrupted
pass goes on where it was, data that grew costs only its new rows, and other data, another
adapter or another model never meets stale numbers.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from mlx_align.data.shapes import AnyShape
from mlx_align.errors import ConfigError
from mlx_align.inference.score import Scorer, score_groups
from mlx_align.models.adapters import fingerprint_folder
from mlx_align.models.roles import Tree
from mlx_align.types import Logps, TokenizedGroup

# Part of every key: raised when the numbers would come out otherwise for the same inputs.
VERSION = 1


def default_cache_folder() -> Path:
    """Where reference log-probs are kept unless told otherwise."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mlx-align" / "reference"


def reference_key(model_folder: Path, adapter_folder: Path | None, adapter_dtype: str) -> str:
    """Identity of a reference: a hash of the base's weights and of the adapter it started from.

    Together with what the adapter computes in.
    """
    parts = [f"v{VERSION}", fingerprint_folder(model_folder)]
    if adapter_folder is not None:
        parts.append(fingerprint_folder(adapter_folder, "adapter*"))
    if adapter_dtype != "float32":
        parts.append(adapter_dtype)
    return hashlib.blake2b("/".join(parts).encode(), digest_size=16).hexdigest()


class ReferenceCache:
    """Log-probs of one reference on disk, by tokens. Close it after use."""

    def __init__(self, folder: Path, key: str) -> None:
        self.file = folder / f"{key}.sqlite"
        with self._used():
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.file)
            self._db.execute("CREATE TABLE IF NOT EXISTS logps (row BLOB PRIMARY KEY, nats BLOB)")

    @contextmanager
    def _used(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"--reference-cache {self.file.parent}: can't be used ({error}); name a folder you "
                "can write to and that has room, or empty it with mlx-align cache --purge"
            ) from error

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.file.stat().st_size

    def get(self, group: TokenizedGroup) -> tuple[Logps, ...] | None:
        """The log-probs of a group's completions, or None if one is not there."""
        found = []
        for k, completion in enumerate(group.completions):
            with self._used():
                row = self._db.execute(
                    "SELECT nats FROM logps WHERE row = ?", (_row_key(group, k),)
                ).fetchone()
            if row is None or not isinstance(row[0], bytes) or len(row[0]) != 4 * len(completion):
                return None
            found.append(np.frombuffer(row[0], np.float32))
        return tuple(found)

    def put(self, groups: Sequence[TokenizedGroup], logps: Sequence[tuple[Logps, ...]]) -> None:
        """Keep the log-probs of some groups; all of them or, if interrupted, none.

        What is there already stays: rows of one text in several batches get the first one's digits.
        """
        rows = [
            (_row_key(group, k), nats.tobytes())
            for group, per_completion in zip(groups, logps, strict=True)
            for k, nats in enumerate(per_completion)
        ]
        with self._used(), self._db:
            self._db.executemany(
                "INSERT INTO logps VALUES (?, ?) ON CONFLICT (row) DO UPDATE SET "
                "nats = excluded.nats WHERE length(nats) != length(excluded.nats)",
                rows,
            )


def _row_key(group: TokenizedGroup, k: int) -> bytes:
    """Identity of completion `k`: its prompt, its tokens, and which of them are scored."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(len(group.prompt).to_bytes(4, "little"))
    digest.update(np.ascontiguousarray(group.prompt, np.int32).tobytes())
    digest.update(np.ascontiguousarray(group.completions[k], np.int32).tobytes())
    if group.loss_masks is not None and not group.loss_masks[k].all():
        digest.update(np.packbits(group.loss_masks[k]).tobytes())
    return digest.digest()


def missing_groups(cache: ReferenceCache, groups: Sequence[TokenizedGroup]) -> list[int]:
    """The positions of the groups whose log-probs have yet to be computed."""
    return [i for i, group in enumerate(groups) if cache.get(group) is None]


def reference_logps(
    scorer: Scorer,
    start: Tree,
    groups: Sequence[TokenizedGroup],
    shapes: Sequence[AnyShape],
    cache: ReferenceCache,
    missing: Sequence[int],
    on_progress: Callable[[int], None] | None = None,
) -> list[tuple[Logps, ...]]:
    """Per group and completion, the reference's log-prob of each token (nats).

    Their last digits depend on which rows run together. So an interrupted pass goes on in the
    batches it was begun in: it is given the `missing` of its beginning, and skips what is done.

    Args:
        scorer: How a role is scored; the reference is scored in evaluation mode.
        start: The tree the policy starts from, which is the reference.
        groups: Tokenised data.
        shapes: The shapes of training, so that both see the same padding and batches.
        cache: Where they are looked up and kept.
        missing: Positions of the groups to compute, as `missing_groups` gave them when the pass
            was begun; what else is missing by now is computed after them.
        on_progress: Told how many more groups are there, as they come.
    """
    tell = on_progress or (lambda _: None)

    def compute(wanted: Sequence[int]) -> None:
        def keep(positions: list[int], logps: list[tuple[Logps, ...]]) -> None:
            cache.put([groups[wanted[p]] for p in positions], logps)
            tell(len(positions))

        def done(positions: list[int]) -> bool:
            there = all(cache.get(groups[wanted[p]]) is not None for p in positions)
            tell(len(positions) if there else 0)
            return there

        score_groups(scorer, start, [groups[i] for i in wanted], shapes, keep, skip=done)

    tell(len(groups) - len(missing))
    if missing:
        compute(missing)
    if rest := missing_groups(cache, groups):
        compute(rest)
    found = (cache.get(group) for group in groups)
    return [logps for logps in found if logps is not None]


def stored_caches(folder: Path) -> list[tuple[Path, int, int]]:
    """Every store in `folder`: its file, bytes, and completions held."""
    stores = []
    for file in sorted(folder.glob("*.sqlite")):
        try:
            with closing(sqlite3.connect(file)) as db:
                rows = db.execute("SELECT COUNT(*) FROM logps").fetchone()[0]
        except sqlite3.Error:
            rows = 0
        stores.append((file, file.stat().st_size, rows))
    return stores
