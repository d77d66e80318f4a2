"""Tiny random models of mlx-lm's families: the configurations, and how one is made.

Small enough that a test of one takes a second, wide enough that every part is there: grouped
heads, tied and untied heads, sliding windows shorter than the rows, experts, latent attention,
recurrent layers, soft caps.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

VOCAB = 160
_COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "head_dim": 16,
}
_YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {
        "num_hidden_layers": 4,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16.0,
    },
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": 6,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 16.0,
        "rope_global_base_freq": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_traditional": False,
    },
    "phi3": {"partial_rotary_factor": 1.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {
        "moe_intermediate_size": 48,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "rope_scaling": _YARN,
        "attention_bias": False,
    },
    "qwen3_5": {
        "num_hidden_layers": 4,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "tie_word_embeddings": True,
    },
}


def config_of(family: str) -> dict[str, Any]:
    """The config.json content of a tiny model of `family`."""
    return {"model_type": family, **_COMMON, **FAMILIES[family]}


def make_model(family: str, dtype: mx.Dtype = mx.float32, seed: int = 0) -> nn.Module:
    """A tiny random model, in evaluation mode, whose log-probs are far from uniform."""
    mx.random.seed(seed)
    config = config_of(family)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    if hasattr(model, "sanitize"):
        # Families that tie late decide it while sanitising.
        model.sanitize(dict(tree_flatten(model.parameters())))

    def spread(name: str, array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        keep = array.dtype if name.endswith("A_log") else dtype
        if array.ndim < 2:
            return (array + 0.1 * mx.random.normal(array.shape)).astype(keep)
        width = 1.0 if "embed" in name else 1.5 / array.shape[-1] ** 0.5
        return (mx.random.normal(array.shape) * width).astype(keep)

    flat = [(name, spread(name, array)) for name, array in tree_flatten(model.parameters())]
    model.update(tree_unflatten(flat))
    model.eval()
    mx.eval(model.parameters())
    return model
