"""Estimates of a run's memory and duration before it starts."""
