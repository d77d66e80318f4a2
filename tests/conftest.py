"""What every test shares."""

import os
import signal

import pytest

# The hub is never asked: what a test needs, it makes or the repository holds.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a shell starts in the background ignores Ctrl-C, under nohup a hangup too, and runs respect
# that; tests of being interrupted are not to depend on how they were started.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def own_rates(tmp_path, monkeypatch):
    """Runs remember their speed: here, and not beside the user's own."""
    from mlx_align.planning import duration

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setattr(duration, "rates_file", lambda: tmp_path / "user-cache" / "rates.json")
