"""Fixtures of the tests of models."""

from oracle_helpers import tiny

__all__ = ["tiny"]
