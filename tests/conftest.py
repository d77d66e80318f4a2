"""What every test shares."""

import os

# The hub is never asked: what a test needs, it makes or the repository holds.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
