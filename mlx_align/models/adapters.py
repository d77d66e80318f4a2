"""Adapters: what is trained, put into a model, read from and written to mlx-lm's folders.

All trees of a run have one layout, because `LoRALinear.scale` is no parameter and stays with the
modules: an adapter made at another scale is folded into lora_b, a smaller rank is padded with
zeros, a layer it does not cover contributes zeros. What can't be mapped without changing the
function is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_align.errors import ConfigError, ModelError
from mlx_align.files import write_tensors, write_text
from mlx_align.models.checkpointing import Dropout
from mlx_align.models.compat import read_tensors
from mlx_align.models.heads import HEAD_WEIGHTS, split_head
from mlx_align.models.roles import Tree

ADAPTER_WEIGHTS = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class AdapterLayout:
    """What is trained, in mlx-lm's terms.

    Attributes:
        fine_tune_type: lora, dora or full (all weights of the chosen blocks).
        rank: Rank of every adapter.
        scale: Multiplier of the low-rank update; mlx-lm's word for alpha / rank.
        dropout: Probability of dropping an adapter's input while training.
        num_layers: Blocks to adapt, counted from the last; −1 for all.
        keys: Names of the layers to adapt within a block; None for all linear ones.
    """

    fine_tune_type: str = "lora"
    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.0
    num_layers: int = -1
    keys: tuple[str, ...] | None = None

    def to_mlx_lm(self) -> dict[str, Any]:
        """The content of the adapter_config.json that stock mlx-lm reads."""
        parameters: dict[str, Any] | None = None
        if self.fine_tune_type != "full":
            parameters = {"rank": self.rank, "scale": self.scale, "dropout": self.dropout}
            if self.keys is not None:
                parameters["keys"] = list(self.keys)
        return {
            "fine_tune_type": self.fine_tune_type,
            "num_layers": self.num_layers,
            "lora_parameters": parameters,
        }


def install(model: nn.Module, layout: AdapterLayout) -> Tree:
    """Freeze `model` and put fresh adapters into it; the tree it starts from.

    LoRA starts as the identity (lora_b zero); draws lora_a from mlx's global generator.

    Raises:
        ConfigError: The layout names blocks or layers that the model has not, or nothing that
            can be trained.
        ModelError: mlx-lm has no such adapter for this model.
    """
    model.freeze()
    if layout.num_layers > len(model.layers) or layout.num_layers < -1:
        raise ConfigError(
            f"--num-layers {layout.num_layers}: the model has {len(model.layers)} blocks; "
            f"give 1 to {len(model.layers)}, or -1 for all"
        )
    if layout.fine_tune_type == "full":
        if any(hasattr(module, "bits") for module in model.modules()):
            raise ConfigError(
                "--fine-tune-type full: the model is quantised and its weights can't be trained; "
                "use lora or dora, or a model that is not quantised"
            )
        for layer in model.layers[-max(layout.num_layers, 0) :]:
            layer.unfreeze()
    else:
        parameters: dict[str, Any] = {
            "rank": layout.rank,
            "scale": layout.scale,
            "dropout": layout.dropout,
        }
        if layout.keys is not None:
            _check_keys(model, layout.keys)
            parameters["keys"] = set(layout.keys)
        try:
            linear_to_lora_layers(
                model, layout.num_layers, parameters, layout.fine_tune_type == "dora"
            )
        except ValueError as error:
            raise ModelError(
                f"--fine-tune-type {layout.fine_tune_type}: {error}; use lora, or name other "
                "layers with --lora-keys"
            ) from error
        for module in model.modules():
            if "lora_a" in module and isinstance(module.dropout, nn.Dropout):
                module.dropout = Dropout(layout.dropout)
    tree: Tree = model.trainable_parameters()
    mx.eval(tree)
    return tree


def covering(layout: AdapterLayout, others: Sequence[AdapterLayout]) -> AdapterLayout:
    """`layout`, with adapters also wherever `others` have some."""
    every = [layout, *others]
    keys: tuple[str, ...] | None = None
    if all(one.keys is not None for one in every):
        keys = tuple(sorted({key for one in every for key in one.keys or ()}))
    blocks = [one.num_layers for one in every]
    return replace(layout, keys=keys, num_layers=-1 if -1 in blocks else max(blocks))


def part_within(model: nn.Module, tree: Tree, layout: AdapterLayout) -> Tree:
    """Of the tree that `install` just made by a covering layout, what `layout` would have made."""
    count = len(model.layers) if layout.num_layers == -1 else layout.num_layers
    modules = [pair for layer in model.layers[-count:] for pair in layer.named_modules()]
    if layout.keys is not None:
        modules = [pair for pair in modules if pair[0] in layout.keys]
        modules += [pair for pair in model.named_modules() if pair[0] in layout.keys]
    inside = {id(a) for _, m in modules for _, a in tree_flatten(m.trainable_parameters())}
    part = [(name, array) for name, array in tree_flatten(tree) if id(array) in inside]
    own: Tree = tree_unflatten(part)
    return own


def compute_dtype(name: str, model_dtypes: Collection[mx.Dtype]) -> mx.Dtype | None:
    """The dtype that adapters compute in under `--adapter-dtype name`; None for their own, float32.

    Raises:
        ConfigError: The model does not compute in it, so that it would only round the adapters.
    """
    if name == "float32":
        return None
    if mx.bfloat16 not in model_dtypes:
        raise ConfigError(
            f"--adapter-dtype {name}: the model does not compute in it, so nothing would be "
            "saved; leave it out, or take a bf16 model (mlx_lm.convert --dtype bfloat16)"
        )
    return mx.bfloat16


def cast_adapters(tree: Tree, dtype: mx.Dtype | None) -> Tree:
    """The tree with its LoRA matrices in `dtype`; gradients come back in theirs.

    What multiplies a bf16 activation then is bf16, and so is what is kept for the backward pass.
    """
    if dtype is None:
        return tree

    def cast(name: str, weight: mx.array) -> mx.array:
        return weight.astype(dtype) if name.endswith(("lora_a", "lora_b")) else weight

    cast_tree: Tree = tree_map_with_path(cast, tree)
    return cast_tree


def _check_keys(model: nn.Module, keys: tuple[str, ...]) -> None:
    inside = {name for layer in model.layers for name, _ in layer.named_modules()}
    known = inside | {name for name, _ in model.named_modules()}
    for key in keys:
        if key not in known:
            linear = sorted(
                name
                for name, module in model.layers[-1].named_modules()
                if "weight" in module and name and hasattr(module, "to_quantized")
            )
            raise ConfigError(
                f"--lora-keys {key}: no such layer; the last block has {', '.join(linear)}"
            )


def read_layout(folder: Path) -> AdapterLayout:
    """The layout of an adapter folder that mlx-lm or this package wrote.

    Raises:
        ModelError: The folder holds no adapter, or its configuration makes no sense.
    """
    config_file = folder / ADAPTER_CONFIG
    if not (folder / ADAPTER_WEIGHTS).is_file() or not config_file.is_file():
        raise ModelError(
            f"{folder}: not an adapter folder (expected {ADAPTER_WEIGHTS} and {ADAPTER_CONFIG})"
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        kind = config.get("fine_tune_type", "lora")
        if kind not in ("lora", "dora", "full"):
            raise ValueError(f"fine_tune_type {kind!r}, expected lora, dora or full")
        if kind == "full":
            return AdapterLayout("full", num_layers=int(config.get("num_layers", -1)))
        lora = config["lora_parameters"]
        keys = lora.get("keys")
        layout = AdapterLayout(
            fine_tune_type=kind,
            rank=int(lora["rank"]),
            scale=float(lora["scale"]),
            dropout=float(lora.get("dropout", 0.0)),
            num_layers=int(config["num_layers"]),
            keys=None if keys is None else tuple(str(key) for key in keys),
        )
        if layout.rank < 1 or not np.isfinite(layout.scale) or layout.scale == 0:
            raise ValueError(f"rank {layout.rank} and scale {layout.scale}")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ModelError(f"{config_file}: not mlx-lm's adapter format ({what})") from error
    return layout


def read_weights(folder: Path) -> dict[str, mx.array]:
    """The tensors of an adapter folder.

    Raises:
        ModelError: The file is damaged.
    """
    return read_tensors(folder / ADAPTER_WEIGHTS)


def load_tree(folder: Path, fresh: Tree, layout: AdapterLayout, *, keep_rank: bool = False) -> Tree:
    """The adapter of `folder` as a tree in the run's layout, equal to it as a function.

    Args:
        folder: An adapter that mlx-lm or this package wrote.
        fresh: The tree that `install` returned: names, shapes, and what lora_a starts from where
            the adapter has nothing (its lora_b is zero there, so the function is the adapter's,
            and the added rank can still learn).
        layout: The run's layout.
        keep_rank: Whether the adapter keeps its rank, whatever the run's is: of a role that is
            only looked at, or trained at its own.

    Raises:
        ModelError: The adapter can't be expressed in the run's layout.
    """
    theirs = read_layout(folder)
    weights = read_weights(folder)
    if theirs.fine_tune_type != layout.fine_tune_type:
        raise ModelError(
            f"{folder}: a {theirs.fine_tune_type} adapter can't start a {layout.fine_tune_type} "
            f"run; leave --fine-tune-type out, or fuse it first with mlx-align fuse"
        )
    names = dict(tree_flatten(fresh))
    if strange := sorted(set(weights) - set(names)):
        raise ModelError(
            f"{folder}: it adapts {strange[0]} (and {len(strange) - 1} more) which this run does "
            "not; leave --lora-keys and --num-layers out, or widen them"
        )
    fold = theirs.scale / layout.scale
    mapped = {}
    for name, own in names.items():
        leaf = name.rsplit(".", 1)[-1]
        if name not in weights:
            if leaf == "lora_b":
                own = mx.zeros_like(own)
            elif layout.fine_tune_type == "full":
                raise ModelError(f"{folder}: {name} is missing")
            mapped[name] = own
            continue
        given = weights[name].astype(own.dtype)
        if leaf == "lora_b":
            given = given * fold
            own = mx.zeros_like(own)
        if keep_rank and leaf in ("lora_a", "lora_b") and _differ_in_rank(given, own):
            mapped[name] = given
        else:
            mapped[name] = _padded(given, own, folder, name)
    tree: Tree = tree_unflatten(list(mapped.items()))
    mx.eval(tree)
    return tree


def _differ_in_rank(given: mx.array, own: mx.array) -> bool:
    """Whether two adapters' matrices are of one layer, as far as their shapes tell."""
    same = [g == o for g, o in zip(given.shape, own.shape, strict=False)]
    return given.ndim == own.ndim and same.count(False) <= 1


def _padded(given: mx.array, own: mx.array, folder: Path, name: str) -> mx.array:
    """`given` in the shape of `own`, whose values fill the rank that `given` has not."""
    wider = [i for i, (g, o) in enumerate(zip(given.shape, own.shape, strict=False)) if g != o]
    if not wider and given.ndim == own.ndim:
        return given
    if given.ndim != own.ndim or len(wider) > 1 or given.shape[wider[0]] > own.shape[wider[0]]:
        raise ModelError(
            f"{folder}: {name} has shape {given.shape} where this model and --lora-rank make "
            f"{own.shape}"
        )
    axis = wider[0]
    rest = mx.split(own, [given.shape[axis]], axis=axis)[1]
    return mx.concatenate([given, rest], axis=axis)


def save_adapter(folder: Path, tree: Tree, layout: AdapterLayout, model: str) -> None:
    """Write an adapter that stock mlx-lm loads; tensors sorted by name, so bytes repeat.

    The head of a reward model goes into a file of its own, of which mlx-lm knows nothing.

    Args:
        folder: Must exist.
        tree: The weights.
        layout: What mlx-lm needs to rebuild the modules.
        model: The base model, for people: mlx-lm does not read it.

    Raises:
        WriteError: The folder can't be written to, or the disk is full.
    """
    weights, head = split_head(dict(tree_flatten(tree)))
    config = {"model": model, **layout.to_mlx_lm()}
    # The weights come last: without them the folder is no adapter yet.
    write_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
    if head:
        write_tensors(folder / HEAD_WEIGHTS, head)
    write_tensors(folder / ADAPTER_WEIGHTS, weights)


def fingerprint_folder(folder: Path, names: str = "*") -> str:
    """A hash of the contents of a folder's weights and configuration files."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.glob(names)):
        if file.suffix in (".safetensors", ".json") and "tokenizer" not in file.name:
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()
