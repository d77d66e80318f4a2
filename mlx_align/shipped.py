"""What comes with the package: the starter model, its pairs, and the configuration for both."""

from __future__ import annotations

from pathlib import Path

# The name under which --model and --data take it, unless there is a local folder of that name.
STARTER = "starter"


def shipped_file(name: str) -> Path:
    """A file or folder of `data/`: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "_shipped" / name
    return installed if installed.exists() else package.parent / "data" / name


def shipped_or_given(name: str, kind: str) -> str:
    """`name`, or where the starter's model or data lies if it is called that."""
    if name != STARTER or Path(name).exists():
        return name
    return str(shipped_file(f"{STARTER}/model" if kind == "model" else STARTER))
