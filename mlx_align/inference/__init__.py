"""Scoring what models say."""
