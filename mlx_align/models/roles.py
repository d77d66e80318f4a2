"""Roles as adapter trees: policy and reference are one base model with different adapters in it.

A *tree* is the nested dictionary of a model's trainable parameters; `adapters.py` makes them, all
of one layout, so that swapping one for another is all it takes to play another role.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn

Tree = dict[str, Any]


@contextmanager
def acting_as(module: nn.Module, tree: Tree) -> Iterator[None]:
    """Within the block, `module` holds the weights of `tree`; afterwards, those it had."""
    before = _current(module, tree)
    module.update(tree)
    try:
        yield
    finally:
        module.update(before)


def _current(module: nn.Module, tree: Tree) -> Tree:
    """The weights that `module` holds now where `tree` has some."""

    def pick(own: Any, wanted: Any) -> Any:
        if isinstance(wanted, dict):
            return {key: pick(own[key], value) for key, value in wanted.items()}
        if isinstance(wanted, list):
            return [pick(o, w) for o, w in zip(own, wanted, strict=False)]
        return own

    return {key: pick(module[key], value) for key, value in tree.items()}
