"""The files that come with the package: a starter model, pairs, and a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

# --model and --data accept this name, unless there is a local folder of that name.
STARTER = "starter"


def shipped_file(name: str) -> Path:
    """A file or folder of `data/`, in an installed package or in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "_shipped" / name
    return installed if installed.exists() else package.parent / "data" / name


def resolve_starter(name: str, kind: Literal["model", "data"]) -> str:
    """The path of the starter's model or data if `name` is "starter"; else `name` itself."""
    if name != STARTER or Path(name).exists():
        return name
    return str(shipped_file(f"{STARTER}/model" if kind == "model" else STARTER))
