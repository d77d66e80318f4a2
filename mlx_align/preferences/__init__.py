"""Preferences before training: answers, judgements by people and models, and their quality."""
