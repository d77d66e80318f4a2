"""What a run asks of its reference, before the first step: log-probs of all that it will see."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mlx_align.config import TrainConfig
from mlx_align.data.batching import microbatch_stream
from mlx_align.data.shapes import AnyShape, BatchLimit, plan_shapes
from mlx_align.inference.score import Scorer
from mlx_align.train import runlog
from mlx_align.train.display import Display
from mlx_align.train.reference import (
    ReferenceCache,
    default_cache_folder,
    missing_groups,
    reference_key,
    reference_logps,
)
from mlx_align.train.setup import Policy
from mlx_align.train.task import GroupLogps
from mlx_align.types import Logps, TokenizedGroup

# What was missing when the run began, and a hash of what came of it.
REFERENCE_FILE = "reference.json"


class References(NamedTuple):
    """Log-probs of training data (None where no group is used) and of held-out data."""

    train: GroupLogps | None
    valid: GroupLogps


def used_groups(
    config: TrainConfig,
    groups: Sequence[TokenizedGroup],
    shapes: Sequence[AnyShape],
    microbatches: int,
) -> list[int]:
    """The groups that training will see; a short run leaves most of a large data set alone."""
    stream = microbatch_stream(groups, shapes, seed=config.seed)
    used: set[int] = set()
    for batch in islice(stream, microbatches):
        used.update(batch.indices)
        if len(used) == len(groups):
            break
    return sorted(used)


def run_references(
    run: Path,
    config: TrainConfig,
    policy: Policy,
    scorer: Scorer,
    train_groups: Sequence[TokenizedGroup],
    used: Sequence[int],
    held_out: Sequence[TokenizedGroup],
    shapes: Sequence[AnyShape],
    limit: BatchLimit,
    display: Display,
) -> References:
    """The reference's log-probs of used training and held-out groups, cached or computed now."""
    cache_folder = Path(getattr(config, "reference_cache", None) or default_cache_folder())
    adapter = Path(config.init_adapter) if config.init_adapter else None
    key = reference_key(policy.model.folder.path, adapter, config.adapter_dtype)
    cache = ReferenceCache(cache_folder.expanduser(), key)
    parts = {
        "training data": ([train_groups[i] for i in used], shapes),
        "held-out data": (held_out, plan_shapes(held_out, limit) if held_out else []),
    }
    try:
        known = _read(run)
        begun = known.get("missing")
        if begun is None:
            begun = {name: missing_groups(cache, groups) for name, (groups, _) in parts.items()}
            runlog.write_json(run / REFERENCE_FILE, {"missing": begun})
        found: dict[str, GroupLogps] = {}
        for name, (groups, of) in parts.items():
            missing = [i for i in begun.get(name, []) if i < len(groups)]
            if groups:
                with display.bar(f"Reference, {name}", len(groups)) as bar:
                    found[name] = reference_logps(
                        scorer, policy.start, groups, of, cache, missing, bar.advance
                    )
        display.note(f"Reference log-probs: {cache.nbytes / 1e6:.1f} MB in {cache.file.parent}.")
    finally:
        cache.close()
    checksum = _checksum(found)
    if known.get("checksum", checksum) != checksum:
        display.note(
            "! The reference's log-probs were computed anew and differ in their last digits from "
            "those the run began with; so may the result."
        )
    runlog.write_json(run / REFERENCE_FILE, {"missing": begun, "checksum": checksum})
    on_valid = found.get("held-out data", [])
    if not used:
        return References(None, on_valid)
    reference: list[tuple[Logps, ...]] = [()] * len(train_groups)
    for index, logps in zip(used, found["training data"], strict=True):
        reference[index] = logps
    return References(reference, on_valid)


def _read(run: Path) -> dict[str, Any]:
    """What an earlier start of this run noted; {} where nothing of use is there."""
    try:
        known = json.loads((run / REFERENCE_FILE).read_text(encoding="utf-8"))
        lists = [list(positions) for positions in known["missing"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    whole = all(type(i) is int and i >= 0 for positions in lists for i in positions)
    return dict(known) if whole else {}


def _checksum(found: dict[str, GroupLogps]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for groups in found.values():
        for logps in groups:
            for row in logps:
                digest.update(row.tobytes())
    return digest.hexdigest()
