"""The browser that the checks of pages use."""

import shutil
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
MAC_BROWSER = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"


def find_browser() -> str | None:
    """The command of an installed Chromium or Chrome; None without one."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    return found or (MAC_BROWSER if Path(MAC_BROWSER).exists() else None)
