"""The training algorithms."""
