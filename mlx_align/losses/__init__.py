"""Losses, KL estimators and masking: pure functions of arrays, and registries of their names."""
