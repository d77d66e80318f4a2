"""Files, signals, memory limits and progress: shared by every part of the package."""
