"""The language model: loading, adapters, the way through it."""
