"""How the user's shell finds the command `mlx-align`, for programs that print commands."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

PROGRAM = "mlx-align"


def activation_command() -> str | None:
    """The command that makes the shell find this environment's `mlx-align`.

    None if it is found already, or this Python is not in a virtual environment.
    """
    folder = Path(sys.prefix) / "bin"
    script = folder / "activate"
    found = shutil.which(PROGRAM)
    if found is not None and Path(found).parent.resolve() == folder.resolve():
        return None
    if sys.prefix == sys.base_prefix or not script.is_file():
        return None
    near = os.path.relpath(script)
    return f"source {shlex.quote(str(script) if near.startswith('..') else near)}"
