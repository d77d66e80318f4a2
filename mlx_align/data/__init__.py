"""Datasets: reading, formats, tokenisation and batching."""
