"""The training run: setup, loop, evaluation, checkpoints, metrics and callbacks."""
