"""Adapters: installing them in a model, and reading and writing mlx-lm's adapter folders.

All adapter weights of a run have one layout, because `LoRALinear.scale` is not a parameter and
belongs to the module. An adapter with another scale is loaded with the scale folded into lora_b, a
smaller rank is padded with zeros, and layers it does not cover get zeros. An adapter that can't be
mapped without changing the function is refused.
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
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_align.errors import ConfigError, ModelError
from mlx_align.models.checkpointing import Dropout
from mlx_align.models.heads import REWARD_HEAD_FILE, split_head
from mlx_align.models.peft import (
    PEFT_WEIGHTS,
    covered_names,
    in_block,
    is_peft,
    match_names,
    read_peft_layout,
    read_peft_weights,
)
from mlx_align.models.weights import AdapterWeights, read_tensors, tensor_shapes
from mlx_align.system.atomic_io import write_tensors, write_text
from mlx_align.system.regular_files import (
    finite_number,
    irregular_file,
    list_of_names,
    read_json,
    whole_number,
)

ADAPTER_FILE = "adapters.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
# Bounds of what an adapter's configuration may say; the largest in use are a fraction of these.
MAX_RANK = 1 << 16
MAX_SCALE = 1e9
MAX_BLOCKS = 1 << 16
MAX_KEYS = 1 << 16


@dataclass(frozen=True)
class AdapterLayout:
    """The type, rank and layers of an adapter, under mlx-lm's names.

    Attributes:
        fine_tune_type: lora, dora or full (all weights of the last `num_layers` blocks).
        rank: Rank of every adapter.
        scale: Multiplier of the low-rank update, alpha / rank.
        dropout: Probability of dropping an adapter's input in training mode.
        num_layers: Number of blocks to adapt, counted from the last; −1 for all.
        keys: Names of the layers to adapt within a block; None for all linear layers.
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


def install_adapters(model: nn.Module, layout: AdapterLayout) -> AdapterWeights:
    """Freeze `model`, add new adapters to it and return their weights.

    The model computes the same function afterwards (lora_b is zero). lora_a is drawn from mlx's
    global generator. Full fine-tuning of a 16-bit model returns float32 masters: in bfloat16,
    nine in ten of its updates would round away. The model itself keeps its 16 bits.

    Raises:
        ConfigError: The model does not have the blocks or layers that the layout names, or they
            can't be trained.
        ModelError: mlx-lm has no such adapter for this model.
    """
    model.freeze()
    if layout.num_layers > len(model.layers) or layout.num_layers < -1 or not layout.num_layers:
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
                f"--fine-tune-type {layout.fine_tune_type}: {error}; use lora, or choose other "
                "layers with --lora-keys"
            ) from error
        for module in model.modules():
            if "lora_a" in module and isinstance(module.dropout, nn.Dropout):
                module.dropout = Dropout(layout.dropout)
    weights: AdapterWeights = tree_map(_master, model.trainable_parameters())
    mx.eval(weights)
    return weights


def _master(weight: mx.array) -> mx.array:
    return weight.astype(mx.float32) if weight.dtype in (mx.bfloat16, mx.float16) else weight


def trained_dtypes(model: nn.Module, layout: AdapterLayout) -> dict[str, mx.Dtype]:
    """The dtypes in which full fine-tuning's float32 masters compute, by name.

    {} for adapters; tensors that the model itself stores in float32 are left out.

    Args:
        model: The model after `install_adapters`.
        layout: The layout to train.
    """
    if layout.fine_tune_type != "full":
        return {}
    flat = tree_flatten(model.trainable_parameters())
    return {name: one.dtype for name, one in flat if one.dtype in (mx.bfloat16, mx.float16)}


def covering_layout(layout: AdapterLayout, others: Sequence[AdapterLayout]) -> AdapterLayout:
    """`layout`, extended to all layers that `others` adapt."""
    every = [layout, *others]
    keys: tuple[str, ...] | None = None
    if all(one.keys is not None for one in every):
        keys = tuple(sorted({key for one in every for key in one.keys or ()}))
    blocks = [one.num_layers for one in every]
    return replace(layout, keys=keys, num_layers=-1 if -1 in blocks else max(blocks))


def common_layout(layouts: Sequence[AdapterLayout]) -> AdapterLayout | None:
    """The smallest layout that holds adapters of all `layouts`, at the scale of the first.

    None if they are adapters of different types.
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


def select_weights(weights: AdapterWeights, layout: AdapterLayout) -> AdapterWeights:
    """The part of `weights` that belongs to `layout`.

    Args:
        weights: The weights from `install_adapters`, for a layout that covers `layout`.
        layout: Which blocks and layers to keep.
    """
    flat = dict(tree_flatten(weights))
    part = [(name, array) for name, array in flat.items() if _covers(layout, name, flat)]
    selected: AdapterWeights = tree_unflatten(part)
    return selected


def resolve_adapter_dtype(name: str, model_dtypes: Collection[mx.Dtype]) -> mx.Dtype | None:
    """The dtype that `--adapter-dtype name` casts adapters to; None for float32, no cast.

    Raises:
        ConfigError: The model does not compute in that dtype, so it would only round the adapters.
    """
    if name == "float32":
        return None
    if mx.bfloat16 not in model_dtypes:
        raise ConfigError(
            f"--adapter-dtype {name}: the model does not compute in it, so nothing would be "
            "saved; leave it out, or use a bf16 model (mlx_lm.convert --dtype bfloat16)"
        )
    return mx.bfloat16


def cast_adapters(weights: AdapterWeights, dtype: mx.Dtype | None) -> AdapterWeights:
    """The weights with LoRA matrices cast to `dtype`; their gradients stay in the original dtype.

    With bf16 activations and bf16 adapters, the arrays kept for the backward pass are bf16 too.
    """
    if dtype is None:
        return weights

    def cast(name: str, weight: mx.array) -> mx.array:
        return weight.astype(dtype) if name.endswith(("lora_a", "lora_b")) else weight

    result: AdapterWeights = tree_map_with_path(cast, weights)
    return result


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
    """Read the layout of an adapter folder written by mlx-lm, PEFT or this package.

    Raises:
        ModelError: The folder holds no adapter, or its configuration is invalid.
    """
    if folder.is_dir() and (problem := irregular_file(folder)):
        raise ModelError(f"{folder}: {problem}")
    if is_peft(folder):
        return AdapterLayout(**read_peft_layout(folder))
    config_file = folder / ADAPTER_CONFIG_FILE
    if not (folder / ADAPTER_FILE).is_file() or not config_file.is_file():
        raise ModelError(
            f"{folder}: not an adapter folder (expected {ADAPTER_CONFIG_FILE} with {ADAPTER_FILE}, "
            f"or {PEFT_WEIGHTS} from PEFT)"
        )
    try:
        config = read_json(config_file)
        kind = config.get("fine_tune_type", "lora")
        if kind not in ("lora", "dora", "full"):
            raise ValueError(f"fine_tune_type {kind!r:.40}, expected lora, dora or full")
        if kind == "full":
            blocks = whole_number(config, "num_layers", -1, MAX_BLOCKS, -1)
            return AdapterLayout("full", num_layers=blocks or -1)
        lora = config["lora_parameters"]
        layout = AdapterLayout(
            fine_tune_type=kind,
            rank=whole_number(lora, "rank", 1, MAX_RANK),
            scale=finite_number(lora, "scale", -MAX_SCALE, MAX_SCALE),
            dropout=finite_number(lora, "dropout", 0.0, 1.0, 0.0),
            num_layers=whole_number(config, "num_layers", -1, MAX_BLOCKS) or -1,
            keys=list_of_names(lora, "keys", MAX_KEYS),
        )
        if layout.scale == 0:
            raise ValueError("scale is 0, so the adapter changes nothing")
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        what = what.removeprefix("ValueError: ")
        raise ModelError(f"{config_file}: not mlx-lm's adapter format ({what})") from error
    rank = _stored_rank(folder / ADAPTER_FILE)
    if rank is not None and layout.rank != rank:
        raise ModelError(
            f"{config_file}: rank is {layout.rank}, but the tensors in {ADAPTER_FILE} have rank "
            f"{rank}; restore the file that belongs to them"
        )
    return layout


def _stored_rank(file: Path) -> int | None:
    """The largest rank of the LoRA matrices in a file, from its header; None without any."""
    ranks = []
    for name, shape in tensor_shapes(file).items():
        axis = _RANK_AXIS.get((name.rsplit(".", 1)[-1], len(shape)))
        if axis is not None:
            ranks.append(shape[axis])
    return max(ranks, default=None)


def read_weights(folder: Path) -> dict[str, mx.array]:
    """Read the tensors of an adapter folder, under mlx-lm's names.

    Raises:
        ModelError: The file is damaged, or from PEFT and can't be mapped.
    """
    if is_peft(folder):
        return read_peft_weights(folder)
    return read_tensors(folder / ADAPTER_FILE)


def load_adapter(
    folder: Path, fresh: AdapterWeights, layout: AdapterLayout, *, keep_rank: bool = False
) -> AdapterWeights:
    """Load an adapter into the run's layout, without changing the function it computes.

    Args:
        folder: An adapter folder written by mlx-lm, PEFT or this package.
        fresh: The weights from `install_adapters`: names, shapes, and the values of lora_a in ranks
            and layers that the adapter does not have. (lora_b is zero there, so they change
            nothing at first and can still learn.)
        layout: The run's layout.
        keep_rank: Keep the adapter's own rank instead of padding it to the run's.

    Raises:
        ModelError: The adapter can't be expressed in the run's layout.
    """
    source = read_layout(folder)
    weights = read_weights(folder)
    if source.fine_tune_type != layout.fine_tune_type:
        raise ModelError(
            f"{folder}: a {source.fine_tune_type} adapter can't start a {layout.fine_tune_type} "
            f"run; leave out --fine-tune-type, or fuse it first with mlx-align fuse"
        )
    names = dict(tree_flatten(fresh))
    if is_peft(folder):
        weights = match_names(weights, names)
        covered = covered_names(folder, weights, names)
    else:
        covered = {name for name in names if _covers(source, name, names)}
    if unknown := sorted(set(weights) - set(names)):
        raise ModelError(
            f"{folder}: it adapts {unknown[0]} (and {len(unknown) - 1} more), which this run does "
            "not; leave out --lora-keys and --num-layers, or widen them, and check that --model "
            "is its base model"
        )
    if extra := sorted(set(weights) - covered):
        raise ModelError(
            f"{folder}: {extra[0]} is not in the layers that its {ADAPTER_CONFIG_FILE} names "
            f"({len(extra)} such tensors)"
        )
    if missing := sorted(covered - set(weights)):
        raise ModelError(
            f"{folder}: {missing[0]} is missing ({len(missing)} such tensors); check that --model "
            f"is its base model, and that num_layers and keys in its {ADAPTER_CONFIG_FILE} are "
            "right"
        )
    for name, weight in weights.items():
        if not bool(mx.isfinite(weight).all()):
            raise ModelError(
                f"{folder}: {name} holds numbers that are not finite; the run that wrote it "
                "diverged, or the file is damaged"
            )
    rescale = source.scale / layout.scale
    mapped = {}
    for name, own in names.items():
        leaf = name.rsplit(".", 1)[-1]
        if name not in weights:
            mapped[name] = mx.zeros_like(own) if leaf == "lora_b" else own
            continue
        given = weights[name].astype(own.dtype)
        if leaf == "lora_b":
            given = given * rescale
            own = mx.zeros_like(own)
        mapped[name] = _pad_rank(given, own, folder, name, keep_rank=keep_rank)
    loaded: AdapterWeights = tree_unflatten(list(mapped.items()))
    mx.eval(loaded)
    return loaded


def _covers(layout: AdapterLayout, tensor: str, names: Collection[str]) -> bool:
    """Whether `layout` trains this tensor; `names` are the model's, its last block among them."""
    block, inside = in_block(tensor)
    if block is None:
        return layout.keys is not None and tensor.rpartition(".")[0] in layout.keys
    last = max(number for number, _ in map(in_block, names) if number is not None)
    if 0 <= layout.num_layers <= last - block:
        return False
    module = inside.rpartition(".")[0]
    whole = tensor.rpartition(".")[0]
    return layout.keys is None or module in layout.keys or whole in layout.keys


# The axis of a LoRA matrix that is its rank: (input, r) and (r, output), with experts (E, r, input)
# and (E, output, r).
_RANK_AXIS = {("lora_a", 2): 1, ("lora_b", 2): 0, ("lora_a", 3): 1, ("lora_b", 3): 2}


def _pad_rank(
    given: mx.array, own: mx.array, folder: Path, name: str, *, keep_rank: bool
) -> mx.array:
    """Pad the rank of `given` with values of `own`; no other axis may differ.

    Raises:
        ModelError: Another axis differs: the adapter belongs to another model.
    """
    if given.shape == own.shape:
        return given
    axis = _RANK_AXIS.get((name.rsplit(".", 1)[-1], own.ndim))
    wider = [i for i, (g, o) in enumerate(zip(given.shape, own.shape, strict=False)) if g != o]
    fits = given.ndim == own.ndim and wider == [axis]
    if axis is None or not fits or given.shape[axis] > own.shape[axis]:
        raise ModelError(
            f"{folder}: {name} has shape {given.shape}; this model and --lora-rank need "
            f"{own.shape}; check that --model is its base model"
        )
    if keep_rank:
        return given
    rest = mx.split(own, [given.shape[axis]], axis=axis)[1]
    return mx.concatenate([given, rest], axis=axis)


def save_adapter(folder: Path, weights: AdapterWeights, layout: AdapterLayout, model: str) -> None:
    """Write an adapter folder that stock mlx-lm loads.

    Tensors are sorted by name, so that equal weights give equal bytes. A reward head goes into a
    separate file, which mlx-lm does not read.

    Args:
        folder: The folder, which must exist.
        weights: The weights.
        layout: The layout of the weights.
        model: Name of the base model, for information; mlx-lm ignores it.

    Raises:
        WriteError: The folder can't be written to, or the disk is full.
    """
    tensors, head = split_head(dict(tree_flatten(weights)))
    config = {"model": model, **layout.to_mlx_lm()}
    # The weights come last: without them the folder does not count as an adapter.
    write_text(folder / ADAPTER_CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    if head:
        write_tensors(folder / REWARD_HEAD_FILE, head)
    write_tensors(folder / ADAPTER_FILE, tensors)


def fingerprint_folder(folder: Path, names: str = "*") -> str:
    """Hash of the contents of a folder's weight and configuration files."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.glob(names)):
        known = file.suffix in (".safetensors", ".json") and "tokenizer" not in file.name
        if known and file.is_file():
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


def fingerprint_adapters(config: Any) -> dict[str, str]:
    """Hashes of the adapters that options name, by the name of the option."""
    found = {}
    for name in ("adapter_path", "reference_adapter"):
        if (path := getattr(config, name, None)) is not None:
            folder = Path(path).expanduser()
            parts = (fingerprint_folder(folder, n) for n in ("*.safetensors", ADAPTER_CONFIG_FILE))
            found[name] = "".join(parts)
    return found
