"""Rollouts: sampling completions, rewarding them, and turning rewards into advantages."""
