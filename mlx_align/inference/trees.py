"""Several finished adapters on one base: a tree for each, all of one layout, swapped at will."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_align.errors import ConfigError, ModelError
from mlx_align.models.adapters import AdapterLayout, install, load_tree, read_layout, read_weights
from mlx_align.models.heads import HEAD_NAME
from mlx_align.models.loading import LanguageModel, ModelFolder, load_language_model
from mlx_align.models.roles import Tree


def common_layout(layouts: Sequence[AdapterLayout]) -> AdapterLayout | None:
    """The smallest layout that holds adapters of all of `layouts`, at the scale of the first.

    None where there is none: adapters of several kinds.
    """
    first = layouts[0]
    if any(layout.fine_tune_type != first.fine_tune_type for layout in layouts):
        return None
    numbers = [layout.num_layers for layout in layouts]
    return replace(
        first,
        rank=max(layout.rank for layout in layouts),
        dropout=0.0,
        num_layers=-1 if min(numbers) < 0 else max(numbers),
        keys=None
        if any(layout.keys is None for layout in layouts)
        else tuple(dict.fromkeys(key for layout in layouts for key in layout.keys or ())),
    )


def load_trees(
    folder: ModelFolder, adapters: Sequence[Path | None]
) -> tuple[LanguageModel, list[Tree]]:
    """Load a base that writes text, and a tree per adapter; None is the bare base.

    The model holds the bare base; play a role with `acting_as`.

    Raises:
        ModelError: The base can't be loaded, is a classifier, or an adapter is not one of it or
            has no layout in common with the others.
    """
    layouts = [read_layout(path) for path in adapters if path is not None]
    layout = common_layout(layouts) if layouts else None
    if layouts and layout is None:
        names = " and ".join(str(path) for path in adapters if path is not None)
        raise ModelError(f"{names}: adapters of different kinds can't take turns on one model")
    model = load_language_model(folder)
    if HEAD_NAME in model.module:
        raise ModelError(f"--model {folder.name}: a sequence classifier, which writes no text")
    if layout is None:
        model.module.freeze()
        return model, [{} for _ in adapters]
    trees = []
    bare: Tree | None = None
    for path in adapters:
        try:
            bare = install(model.module, layout) if bare is None else bare
            trees.append(bare if path is None else _load(path, bare, layout))
        except (ModelError, ConfigError) as error:
            raise ModelError(f"{path}: is --model {folder.name} its base? {error}") from error
    # Nothing is trained here: the vocabulary head takes its plain way, whatever was adapted.
    model.module.freeze()
    model.module.eval()
    mx.eval(model.module.parameters(), trees)
    return model, trees


def _load(path: Path, bare: Tree, layout: AdapterLayout) -> Tree:
    tree = load_tree(path, bare, layout)
    if read_layout(path) == replace(layout, dropout=read_layout(path).dropout):
        missing = {name for name, _ in tree_flatten(bare)} - set(read_weights(path))
        if missing:
            raise ModelError(f"{sorted(missing)[0]} is missing (of {len(missing)} such tensors)")
    return tree
