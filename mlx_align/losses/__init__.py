"""Losses, estimators and masks: pure functions of arrays, and the tables of their names."""
