"""Token log-probs of the reference, computed once before step 1 and cached.

So steps need no forward pass of the reference, and full fine-tuning needs no second copy of the
weights. The cache is one SQLite file per (base weights, adapter), with rows keyed by their tokens.
An interrupted pass resumes, data with new rows costs only those, and another adapter or model has
another file.
"""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_align.algorithms.base import CompletionLogps
from mlx_align.config import TrainConfig
from mlx_align.data.batching import microbatch_stream
from mlx_align.data.buckets import AnyShape, BatchLimit, plan_shapes
from mlx_align.errors import ConfigError
from mlx_align.inference.scoring import Scorer, score_groups
from mlx_align.models.adapters import fingerprint_folder
from mlx_align.models.loading import LanguageModel
from mlx_align.models.policy import Policy
from mlx_align.models.weights import AdapterWeights
from mlx_align.system.progress import Console
from mlx_align.system.regular_files import read_json
from mlx_align.system.user_folders import cache_folder
from mlx_align.tracking.run_dir import REFERENCE_FILE, package_versions, write_json
from mlx_align.types import Logps, TokenizedGroup

# Part of every key; to be increased when the same inputs give other numbers.
VERSION = 1


class References(NamedTuple):
    """Log-probs of the training data (None if no group is used) and of the held-out data."""

    train: CompletionLogps | None
    valid: CompletionLogps


def default_cache_folder() -> Path:
    """The cache folder unless `--reference-cache` names another."""
    return cache_folder() / "reference"


def reference_key(
    model_folder: Path, adapter_folder: Path | None, adapter_dtype: str, computed: str = ""
) -> str:
    """A hash of everything that the log-probs depend on, except the tokens.

    It includes the versions of mlx and mlx-lm: a family's code, and so its log-probs, may change
    between them.

    Args:
        model_folder: The base model; its weights and configuration are hashed.
        adapter_folder: The adapter that training starts from.
        adapter_dtype: The dtype in which it computes.
        computed: The settings of the forward pass, from `describe_computation`.
    """
    parts = [f"v{VERSION}", fingerprint_folder(model_folder)]
    versions = package_versions()
    parts += [f"{name} {versions[name]}" for name in ("mlx", "mlx-lm")]
    parts.append(computed)
    if adapter_folder is not None:
        parts.append(fingerprint_folder(adapter_folder, "adapter*"))
    if adapter_dtype != "float32":
        parts.append(adapter_dtype)
    return hashlib.blake2b("/".join(parts).encode(), digest_size=16).hexdigest()


def describe_computation(model: LanguageModel) -> str:
    """The settings of a model's forward pass: shared prompts, packing, device and others."""
    backbone = model.backbone
    return (
        f"shared {model.shared}, packed {backbone.packs}, mask axes {backbone.mask_axes}, caches "
        f"{backbone.flat_caches}, temperature {backbone.temperature:g}, {mx.default_device()}"
    )


class StoredCache(NamedTuple):
    """A cache file of `mlx-align cache`.

    Attributes:
        file: The file.
        bytes: Its size.
        completions: Number of completions in it.
        model: Base model as it was named; "" in files of versions that didn't write it.
        adapter: Adapter that the reference is; "" for the base model, or if it is unknown.
        changed: Time of the last change, seconds since 1970.
    """

    file: Path
    bytes: int
    completions: int
    model: str
    adapter: str
    changed: float


class ReferenceCache:
    """Log-probs of one reference on disk, keyed by tokens, with checksums. Close it after use.

    Args:
        folder: Folder of the file.
        key: What the log-probs depend on, from `reference_key`.
        model: Base model, for `mlx-align cache`.
        adapter: Adapter of the reference, likewise; "" for none.
    """

    def __init__(self, folder: Path, key: str, model: str = "", adapter: str = "") -> None:
        self.file = folder / f"{key}.sqlite"
        with self._convert_errors():
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.file)
            self._db.execute("CREATE TABLE IF NOT EXISTS logps (row BLOB PRIMARY KEY, nats BLOB)")
            if model:
                self._db.execute("CREATE TABLE IF NOT EXISTS names (model TEXT, adapter TEXT)")
                self._db.execute("DELETE FROM names")
                self._db.execute("INSERT INTO names VALUES (?, ?)", (model, adapter))
                self._db.commit()

    @contextmanager
    def _convert_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"--reference-cache {self.file.parent}: can't be used ({error}); name a writable "
                "folder with free space, or empty it with mlx-align cache --purge"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.file.stat().st_size

    def get(self, group: TokenizedGroup) -> tuple[Logps, ...] | None:
        """The log-probs of a group's completions, or None if one is missing."""
        found = []
        for k, completion in enumerate(group.completions):
            key = _row_key(group, k)
            with self._convert_errors():
                row = self._db.execute("SELECT nats FROM logps WHERE row = ?", (key,)).fetchone()
            nats = None if row is None else _verified(key, row[0], len(completion))
            if nats is None:
                if row is not None:
                    self._delete(key)
                return None
            found.append(np.frombuffer(nats, np.float32))
        return tuple(found)

    def _delete(self, key: bytes) -> None:
        """Delete a damaged row, so that its values are computed again."""
        with self._convert_errors(), self._db:
            self._db.execute("DELETE FROM logps WHERE row = ?", (key,))

    def put(self, groups: Sequence[TokenizedGroup], logps: Sequence[tuple[Logps, ...]]) -> None:
        """Store the log-probs of groups in one transaction.

        Existing rows are kept: a text that is in several batches keeps the values of the first.
        """
        rows = [
            (key := _row_key(group, k), nats.tobytes() + _checksum_of(key, nats.tobytes()))
            for group, per_completion in zip(groups, logps, strict=True)
            for k, nats in enumerate(per_completion)
        ]
        with self._convert_errors(), self._db:
            self._db.executemany(
                "INSERT INTO logps VALUES (?, ?) ON CONFLICT (row) DO UPDATE SET "
                "nats = excluded.nats WHERE length(nats) != length(excluded.nats)",
                rows,
            )


# Bytes of the checksum after the values. Rows of earlier versions have none.
_CHECKSUM_BYTES = 8


def _checksum_of(key: bytes, nats: bytes) -> bytes:
    return hashlib.blake2b(key + nats, digest_size=_CHECKSUM_BYTES).digest()


def _verified(key: bytes, stored: Any, tokens: int) -> bytes | None:
    """The values of a row; None if it is damaged, or belongs to another key."""
    size = 4 * tokens
    if not isinstance(stored, bytes) or len(stored) not in (size, size + _CHECKSUM_BYTES):
        return None
    nats, checksum = stored[:size], stored[size:]
    return nats if checksum in (b"", _checksum_of(key, nats)) else None


def _row_key(group: TokenizedGroup, k: int) -> bytes:
    """The key of completion `k`: a hash of its prompt, its tokens and its loss mask."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(len(group.prompt).to_bytes(4, "little"))
    digest.update(np.ascontiguousarray(group.prompt, np.int32).tobytes())
    digest.update(np.ascontiguousarray(group.completions[k], np.int32).tobytes())
    if group.loss_masks is not None and not group.loss_masks[k].all():
        digest.update(np.packbits(group.loss_masks[k]).tobytes())
    return digest.digest()


def missing_groups(cache: ReferenceCache, groups: Sequence[TokenizedGroup]) -> list[int]:
    """The positions of the groups whose log-probs are not in the cache."""
    return [i for i, group in enumerate(groups) if cache.get(group) is None]


def cached_logprobs(
    scorer: Scorer,
    start: AdapterWeights,
    groups: Sequence[TokenizedGroup],
    shapes: Sequence[AnyShape],
    cache: ReferenceCache,
    missing: Sequence[int],
    on_progress: Callable[[int], None] | None = None,
) -> list[tuple[Logps, ...]]:
    """The reference's log-prob of each token (nats), for each group and completion.

    The last digits depend on which rows run together. To resume an interrupted pass with the same
    batches, it runs the groups that were missing when it began, and skips batches that are done.

    Args:
        scorer: Runs the reference, in evaluation mode.
        start: The weights that the policy starts from, which are the reference.
        groups: Tokenised data.
        shapes: The batch shapes of training, so that both see the same padding.
        cache: The cache of log-probs.
        missing: Positions of the groups to compute, from `missing_groups` when the pass began.
            Other groups that are missing now are computed after them.
        on_progress: Called with the number of groups that were completed.
    """
    report = on_progress or (lambda _: None)

    def compute(wanted: Sequence[int]) -> None:
        def keep(positions: list[int], logps: list[tuple[Logps, ...]]) -> None:
            cache.put([groups[wanted[p]] for p in positions], logps)
            report(len(positions))

        def done(positions: list[int]) -> bool:
            cached = all(cache.get(groups[wanted[p]]) is not None for p in positions)
            report(len(positions) if cached else 0)
            return cached

        score_groups(scorer, start, [groups[i] for i in wanted], shapes, keep, skip=done)

    report(len(groups) - len(missing))
    if missing:
        compute(missing)
    if rest := missing_groups(cache, groups):
        compute(rest)
    found = (cache.get(group) for group in groups)
    return [logps for logps in found if logps is not None]


def reference_logprobs(
    policy: Policy,
    scorer: Scorer,
    config: TrainConfig,
    run: Path,
    train: tuple[Sequence[TokenizedGroup], Sequence[AnyShape]],
    held_out: Sequence[TokenizedGroup],
    limit: BatchLimit,
    microbatches: int,
    console: Console,
) -> References:
    """Token log-probs of all completions that a run uses, under its reference.

    Looked up in the cache; missing ones are computed in evaluation mode and stored.

    Args:
        policy: Its start is the reference.
        scorer: Runs the reference.
        config: Names the cache folder and the init adapter.
        run: The run folder.
        train: The training groups and their batch shapes.
        held_out: The held-out groups.
        limit: The limit of batches of held-out groups.
        microbatches: The number of microbatches that the run trains on.
        console: Shows progress.

    Raises:
        ConfigError: The cache folder can't be used.
    """
    groups, shapes = train
    used = used_groups(config, groups, shapes, microbatches)
    named = getattr(config, "reference_cache", None)
    folder = Path(named or default_cache_folder()).expanduser()
    if named is None and (problem := _unwritable(folder)):
        console.note(f"! {folder} can't be written ({problem}): log-probs are stored in the run.")
        folder = run / "reference-cache"
    adapter = Path(config.init_adapter) if config.init_adapter else None
    key = reference_key(
        policy.model.folder.path,
        adapter,
        config.adapter_dtype,
        describe_computation(policy.model),
    )
    cache = ReferenceCache(folder, key, str(config.model), str(config.init_adapter or ""))
    parts = {
        "training data": ([groups[i] for i in used], shapes),
        "held-out data": (held_out, plan_shapes(held_out, limit) if held_out else []),
    }
    try:
        known = _read(run)
        before = known.get("microbatches", microbatches)
        if before != microbatches:
            # The run is to be longer or shorter, so other rows are used. Those that were used
            # before have to be as they were.
            used_before = set(used_groups(config, groups, shapes, before))
            known.pop("missing", None)
            if before > microbatches:
                known.pop("checksum", None)
        missing_at_start = known.get("missing")
        if missing_at_start is None:
            missing_at_start = {
                name: missing_groups(cache, part) for name, (part, _) in parts.items()
            }
            if before == microbatches:
                start = {"microbatches": microbatches, "missing": missing_at_start}
                write_json(run / REFERENCE_FILE, start)
        found: dict[str, CompletionLogps] = {}
        for name, (part, part_shapes) in parts.items():
            missing = [i for i in missing_at_start.get(name, []) if i < len(part)]
            if part:
                with console.bar(f"Reference, {name}", len(part)) as bar:
                    found[name] = cached_logprobs(
                        scorer, policy.start, part, part_shapes, cache, missing, bar.advance
                    )
        console.note(f"Reference log-probs: {cache.nbytes / 1e6:.1f} MB in {cache.file.parent}.")
    finally:
        cache.close()
    checksum = _checksum(found)
    again = checksum
    if before != microbatches and "training data" in found:
        pairs = zip(used, found["training data"], strict=True)
        again = _checksum({**found, "training data": [n for i, n in pairs if i in used_before]})
    if known.get("checksum", again) != again:
        console.note(
            "! The reference's log-probs were computed again and differ in their last digits from "
            "those at the start of the run; the result may differ too."
        )
    state = {"microbatches": microbatches, "missing": missing_at_start, "checksum": checksum}
    write_json(run / REFERENCE_FILE, state)
    valid = found.get("held-out data", [])
    if not used:
        return References(None, valid)
    reference: list[tuple[Logps, ...]] = [()] * len(groups)
    for index, logps in zip(used, found["training data"], strict=True):
        reference[index] = logps
    return References(reference, valid)


def _unwritable(folder: Path) -> str:
    """Why no file can be made in a folder, which may not exist yet; "" if one can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return str(error.strerror or error).lower()


def used_groups(
    config: TrainConfig,
    groups: Sequence[TokenizedGroup],
    shapes: Sequence[AnyShape],
    microbatches: int,
) -> list[int]:
    """Positions of the groups in the run's microbatches; a short run doesn't use all groups."""
    stream = microbatch_stream(groups, shapes, seed=config.seed)
    used: set[int] = set()
    for batch in islice(stream, microbatches):
        used.update(batch.indices)
        if len(used) == len(groups):
            break
    return sorted(used)


def _read(run: Path) -> dict[str, Any]:
    """The reference file of an earlier start of this run; {} if it is missing or damaged."""
    try:
        known = read_json(run / REFERENCE_FILE)
        lists = [list(positions) for positions in known["missing"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    numbers = [i for positions in lists for i in positions] + [known.get("microbatches", 0)]
    valid = all(type(i) is int and i >= 0 for i in numbers)
    return dict(known) if valid else {}


def _checksum(found: dict[str, CompletionLogps]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for groups in found.values():
        for logps in groups:
            for row in logps:
                digest.update(row.tobytes())
    return digest.hexdigest()


def stored_caches(folder: Path) -> list[StoredCache]:
    """Every cache in `folder`, the last used first."""
    stores = []
    for file in folder.glob("*.sqlite"):
        rows, model, adapter = 0, "", ""
        with suppress(sqlite3.Error), closing(sqlite3.connect(file)) as db:
            rows = db.execute("SELECT COUNT(*) FROM logps").fetchone()[0]
            model, adapter = db.execute("SELECT model, adapter FROM names").fetchone() or ("", "")
        about = file.stat()
        stores.append(StoredCache(file, about.st_size, rows, model, adapter, about.st_mtime))
    return sorted(stores, key=lambda store: -store.changed)
