"""Makes the benchmark's model: a random Llama with a tokenizer, always the same for one size."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<pad>", "<|bos|>", "<|im_start|>", "<|im_end|>"]


def make_model(folder: Path, size: argparse.Namespace) -> int:
    """Write configuration, weights and tokenizer; the number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(size)
    mx.random.seed(0)
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    # A fresh model's logits are nearly flat; these have a spread like a trained one's.
    for name, scale in (("embed_tokens", 1.0), ("lm_head", 1.5 / size.hidden**0.5)):
        key = next(k for k in weights if name in k)
        weights[key] = mx.random.normal(weights[key].shape) * scale
    weights = {name: weight.astype(mx.float32) for name, weight in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    _tokenizer(size.vocabulary).save_pretrained(folder)
    # Last: a folder with a configuration in it is a finished one.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return sum(weight.size for weight in weights.values())


def _config(size: argparse.Namespace) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.hidden // size.heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": SPECIALS.index("<|bos|>"),
        "eos_token_id": SPECIALS.index("<|im_end|>"),
        "torch_dtype": "float32",
    }


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; it is there because the packages want one, and reads nothing."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 300),
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["user asks, assistant answers"] * 8, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<|bos|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, default in (
        ("vocabulary", 32000),
        ("hidden", 384),
        ("layers", 6),
        ("intermediate", 1024),
        ("heads", 6),
        ("kv-heads", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    size = parser.parse_args(argv)
    print(f"{size.folder}: {make_model(size.folder, size):,} parameters")


if __name__ == "__main__":
    main()
