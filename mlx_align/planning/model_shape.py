"""Sizes of a model, read from config.json and the headers of its safetensors files.

Weights are never loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlx_align.errors import ModelError
from mlx_align.models.model_config import hidden_size, size_in

# The limit of the safetensors format; a longer header means a damaged file.
MAX_HEADER_BYTES = 100_000_000
_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)\.weight$")
_BLOCK_DECAY = re.compile(r"(?:^|\.)layers\.(\d+)\..*\bA_log$")
_EXPERT = re.compile(r"\bexperts?\.\d+\.")
# mlx's default group sizes; 64 for the affine mode.
_GROUP_SIZES = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
# Parts of multimodal checkpoints that are not loaded for text.
_NOT_TEXT = ("vision", "visual", "audio", "image", "multi_modal_projector", "embed_vision")


class Tensor(NamedTuple):
    """One entry of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Linear(NamedTuple):
    """A linear layer of a block; `experts` is how many of that shape are stacked."""

    block: int
    name: str
    inputs: int
    outputs: int
    experts: int


class LinearAttention(NamedTuple):
    """The gated delta rule of a hybrid model (Qwen3.5, Qwen3-Next, Kimi-Linear, OLMo hybrid).

    Attributes:
        blocks: Numbers of the blocks that have it instead of attention.
        key_width: Elements of all heads of keys per token; queries have as many.
        value_width: Elements of all heads of values per token.
        state: Elements of the state of a row: heads of values × both head sizes.
        gate_per_key: Whether each key element has its own gate, instead of each head.
    """

    blocks: frozenset[int]
    key_width: int
    value_width: int
    state: int
    gate_per_key: bool


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model. Widths are numbers of elements; `*_bytes` are bytes.

    Attributes:
        weights_bytes: Bytes of all tensors that are loaded.
        blocks: Number of blocks.
        hidden: Width of the residual stream.
        intermediate: Width of the MLP; in a mixture of experts, of all experts active per token.
        heads: Number of attention heads.
        kv_width: Key (or value) elements per token: key-value heads × head size.
        query_width: Query elements per token: heads × head size.
        vocabulary: Rows of the vocabulary head.
        activation_bytes: Bytes per element of the hidden states: 2 or 4.
        activation_dtype: Dtype of the hidden states as safetensors names it: F32, F16 or BF16.
        quantised: Whether the linear layers are quantised.
        bits: Bits per quantised weight; None if the configuration does not say.
        linears: The linear layers of all blocks.
        linear_bytes: Bytes they take in the file.
        linear_attention: What a hybrid has in some blocks; None for other models.
        active_experts: Routed experts per token; 0 without experts.
    """

    weights_bytes: int
    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_width: int
    query_width: int
    vocabulary: int
    activation_bytes: int
    activation_dtype: str
    quantised: bool
    bits: int | None
    linears: tuple[Linear, ...]
    linear_bytes: int
    linear_attention: LinearAttention | None = None
    active_experts: int = 0

    @property
    def linear_blocks(self) -> frozenset[int]:
        """Numbers of the blocks that have linear attention."""
        return frozenset() if self.linear_attention is None else self.linear_attention.blocks


def read_header(file: Path) -> dict[str, Tensor]:
    """Read the header of a safetensors file: its tensors by name.

    Raises:
        ModelError: The file is not in the safetensors format, or is truncated.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"its header claims {length} of {size} bytes")
            header = json.loads(stream.read(length))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (int(offset) for offset in entry["data_offsets"])
            if not 0 <= begin <= end <= size - 8 - length:
                raise ValueError(f"{name} extends past the end; fetch the file again")
            shape = tuple(int(n) for n in entry["shape"])
            tensors[name] = Tensor(str(entry["dtype"]), shape, end - begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise ModelError(f"{file}: not a complete safetensors file ({what})") from error
    return tensors


def read_model_shape(folder: Path, config: Mapping[str, Any]) -> ModelShape:
    """Read the sizes of the model in `folder`; `config` is the content of its config.json.

    Raises:
        ModelError: There are no weights, a file is damaged, or a size is missing in `config`.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder}: no model*.safetensors found; without it memory can't be estimated"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read_header(file))
    text = {**config, **(config.get("text_config") or {})}
    if text.get("tie_word_embeddings"):
        # Some checkpoints contain a copy of the embedding, which mlx-lm drops.
        tensors = {name: t for name, t in tensors.items() if not name.endswith("lm_head.weight")}
    tensors = {n: t for n, t in tensors.items() if not any(part in n for part in _NOT_TEXT)}
    linears, linear_bytes = _linears(tensors, config.get("quantization") or {})
    embedding = next(
        (t for n, t in tensors.items() if re.search(r"(embed_tokens|wte|embeddings?)\.weight$", n)),
        None,
    )
    blocks = size_in(text, "num_hidden_layers", "n_layer", "n_layers") or (
        1 + max((linear.block for linear in linears), default=0)
    )
    hidden = hidden_size(config)
    vocabulary = size_in(text, "vocab_size") or (embedding.shape[0] if embedding else 0)
    if not hidden or not vocabulary:
        missing = "vocab_size" if hidden else "hidden_size"
        raise ModelError(f"{folder / 'config.json'}: {missing} is missing")
    heads = size_in(text, "num_attention_heads", "n_head", "n_heads") or 1
    head = size_in(text, "head_dim") or hidden // heads
    if "qk_nope_head_dim" in text:  # multi-head latent attention
        head = size_in(text, "qk_nope_head_dim") + size_in(text, "qk_rope_head_dim")
    dtype = _activation_dtype(tensors)
    kv_heads = size_in(text, "num_key_value_heads", "num_kv_heads") or heads
    return ModelShape(
        weights_bytes=sum(t.nbytes for t in tensors.values()),
        blocks=blocks,
        hidden=hidden,
        intermediate=_intermediate(text, linears, hidden),
        heads=heads,
        kv_width=kv_heads * head,
        query_width=heads * head,
        vocabulary=vocabulary,
        activation_bytes=min(4, _FLOAT_BYTES[dtype]),
        activation_dtype=dtype,
        quantised=any(name.endswith(".scales") for name in tensors),
        bits=size_in(config.get("quantization") or {}, "bits") or None,
        linears=tuple(linears),
        linear_bytes=linear_bytes,
        linear_attention=_linear_attention(text, tensors),
        active_experts=_active_experts(text, linears),
    )


def _linears(
    tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]
) -> tuple[list[Linear], int]:
    found, nbytes = [], 0
    for name, tensor in tensors.items():
        match = _BLOCK.search(name)
        if (
            match is None
            or len(tensor.shape) not in (2, 3)
            or "conv" in match[2].rsplit(".", 1)[-1]
        ):
            continue
        base = name.removesuffix(".weight")
        scales = tensors.get(base + ".scales")
        inputs = tensor.shape[-1]
        if scales is not None:
            own = quantization.get(base)
            own = {**quantization, **(own if isinstance(own, dict) else {})}
            # mlx_lm.convert writes null for a mode's default, for example with mixed_3_6.
            group = own.get("group_size") or _GROUP_SIZES.get(str(own.get("mode")), 64)
            inputs = scales.shape[-1] * int(group)
            nbytes += scales.nbytes + getattr(tensors.get(base + ".biases"), "nbytes", 0)
        nbytes += tensor.nbytes
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        found.append(Linear(int(match[1]), match[2], inputs, tensor.shape[-2], experts))
    return found, nbytes


def _linear_attention(
    text: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> LinearAttention | None:
    """The gated delta rule that the configuration describes, in the blocks that have its decay."""
    blocks = frozenset(
        int(match[1]) for name in tensors if (match := _BLOCK_DECAY.search(name)) is not None
    )
    values = size_in(text, "linear_num_value_heads")
    value_size = key_size = size_in(text, "linear_value_head_dim")
    keys = size_in(text, "linear_num_key_heads")
    per_key = not values
    if values:
        key_size = size_in(text, "linear_key_head_dim")
    elif isinstance(kimi := text.get("linear_attn_config"), dict):
        keys = values = size_in(kimi, "num_heads")
        key_size = value_size = size_in(kimi, "head_dim")
    if not (blocks and values and key_size and value_size):
        return None
    state = values * key_size * value_size
    return LinearAttention(blocks, keys * key_size, values * value_size, state, per_key)


def _active_experts(text: Mapping[str, Any], linears: list[Linear]) -> int:
    """Routed experts per token."""
    if not any(_EXPERT.search(linear.name) or linear.experts > 1 for linear in linears):
        return 0
    return size_in(text, "num_experts_per_tok", "num_experts_per_token", "top_k_experts")


def _intermediate(text: Mapping[str, Any], linears: list[Linear], hidden: int) -> int:
    if active := _active_experts(text, linears):
        width = size_in(text, "moe_intermediate_size", "intermediate_size")
        shared = size_in(text, "shared_expert_intermediate_size") or width * size_in(
            text, "n_shared_experts"
        )
        return active * width + shared
    width = size_in(text, "intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim")
    return width or max((linear.outputs for linear in linears), default=4 * hidden)


def _activation_dtype(tensors: Mapping[str, Tensor]) -> str:
    """The dtype of the hidden states, which is that of the embedding's output."""
    for suffix in ("embed_tokens.scales", "wte.scales", "embed_tokens.weight", "wte.weight"):
        for name, tensor in tensors.items():
            if name.endswith(suffix) and tensor.dtype in _FLOAT_BYTES:
                return tensor.dtype
    found = {t.dtype for t in tensors.values() if t.dtype in _FLOAT_BYTES}
    return max(found, key=lambda dtype: _FLOAT_BYTES[dtype], default="BF16")
