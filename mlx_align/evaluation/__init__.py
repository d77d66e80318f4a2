"""Evaluation of policies and reward models, with confidence intervals."""
