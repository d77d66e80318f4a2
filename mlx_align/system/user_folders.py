"""Folders of the user that are not named by an option."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """The package's folder in the user's cache; one in the temporary folder without a home.

    It may not exist, and may not be writable.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "mlx-align"
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry in the list of users
        return Path(tempfile.gettempdir()) / f"mlx-align-{os.getuid()}"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "mlx-align"
    return home / ".cache" / "mlx-align"
