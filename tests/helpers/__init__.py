"""Helpers that several tests import: tiny models, data, runs of commands, plain computations."""
