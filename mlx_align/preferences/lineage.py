"""The lineage of a model: hashes of its weights, of what it was initialised from, and of its base.

What it is for: `mlx_align.data.provenance`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mlx_align.data.provenance import Lineage
from mlx_align.models.adapters import fingerprint_folder
from mlx_align.tracking.run_dir import CHECKPOINTS, CONFIG_FILE, FINGERPRINTS_FILE, INIT_ADAPTER

ADAPTER_FILES = "*adapter*"
# Runs that were initialised from each other; a longer chain is a loop of folders.
_MAX_GENERATIONS = 32


def model_lineage(model: Path, adapter: Path | None = None) -> Lineage:
    """The lineage of a base model with an adapter, newest first.

    Args:
        model: Folder of the base model.
        adapter: Folder of the run or adapter; None for the base model alone.
    """
    return (*_adapter_lineage(adapter), fingerprint_folder(model))


def _adapter_lineage(adapter: Path | None) -> Lineage:
    found: list[str] = []
    while adapter is not None and len(found) < _MAX_GENERATIONS:
        own = fingerprint_folder(adapter, ADAPTER_FILES)
        if own not in found:
            found.append(own)
        run = adapter.parent.parent if adapter.parent.name == CHECKPOINTS else adapter
        recorded = _read_json(run / FINGERPRINTS_FILE).get("hashes", {}).get(INIT_ADAPTER)
        if not isinstance(recorded, str) or recorded in found:
            break
        found.append(recorded)
        adapter = _init_adapter(run)
    return tuple(found)


def _init_adapter(run: Path) -> Path | None:
    """The folder that a run was initialised from, if it still exists."""
    try:
        values = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
        folder = Path(values["init_adapter"]).expanduser()
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return folder if folder.is_dir() else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
