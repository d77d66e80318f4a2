"""Tiny random models of mlx-lm's families: the configurations, and how one is made.

Small enough that a test of one takes a second, wide enough that every part is there: grouped
heads, tied and untied heads, sliding windows shorter than the rows, experts, latent attention,
recurrent layers, soft caps, head scaling, partial rope, layers without rope.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

VOCAB = 160
# Shorter than most rows of the tests: both the prompt and its completions cross it.
WINDOW = 6
_COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "head_dim": 16,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
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
_LATENT = {
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "routed_scaling_factor": 1.0,
    "rope_scaling": _YARN,
}
_DELTA = {
    "num_hidden_layers": 4,
    # The outputs of linear attention are normalised, and those of a tiny random model may be nearly
    # zero: with an epsilon of 1e-5, summing in another order changed gradients by up to 6e-5.
    "rms_norm_eps": 1e-2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "tie_word_embeddings": True,
}
_GRANITE = {
    "intermediate_size": 128,  # its experts and MLP are quantised in groups of 64
    "logits_scaling": 3.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.6,
}
_SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]
_MAMBA2 = {
    "n_groups": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_limit": [0.0, 100.0],
    "time_step_rank": "auto",
    "layer_norm_epsilon": 1e-5,
}

# Families whose completions share their prompt.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {
        "tie_word_embeddings": False,
        "sliding_window": WINDOW,
        "layer_types": _SLIDING_THEN_FULL,
    },
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "qwen3_next": {
        **_DELTA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "partial_rotary_factor": 0.5,
        "norm_topk_prob": True,
    },
    "qwen3_5": _DELTA,
    "kimi_linear": {
        "num_hidden_layers": 3,
        "linear_attn_config": {
            "kda_layers": [1, 2],
            "full_attn_layers": [3],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 32,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "model_max_length": 512,
        "moe_router_activation_func": "sigmoid",
        "moe_renormalize": True,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
    },
    "gemma": {},
    "gemma2": {
        "num_hidden_layers": 4,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16.0,
    },
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 16.0,
        "rope_global_base_freq": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_traditional": False,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 32,
        "final_logit_softcapping": 5.0,
    },
    "phi": {"num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    "phi3": {"partial_rotary_factor": 1.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral3": {
        "sliding_window": WINDOW,
        "layer_types": _SLIDING_THEN_FULL,
        "rope_parameters": {
            "type": "default",
            "rope_type": "default",
            "rope_theta": 10000.0,
            # The scale of queries changes with the position, within these rows too.
            "llama_4_scaling_beta": 0.3,
            "original_max_position_embeddings": 5,
        },
    },
    "deepseek_v2": {**_LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**_LATENT, "n_group": 2, "topk_group": 1},
    "glm4_moe_lite": {**_LATENT, "n_group": 1, "topk_group": 1},
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": {
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "tie_word_embeddings": False,
        "partial_rotary_factor": 0.5,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "sliding_window": WINDOW,
        "layer_types": _SLIDING_THEN_FULL,
    },
    "olmo2": {"tie_word_embeddings": False},
    "olmo3": {"sliding_window": WINDOW, "layer_types": _SLIDING_THEN_FULL},
    "granite": _GRANITE,
    "granitemoe": {**_GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.25, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "starcoder2": {"norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "minicpm": {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 3.0},
    "minicpm3": {
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        "dim_model_base": 32,
        "scale_depth": 1.4,
        "scale_emb": 3.0,
        "q_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "kv_lora_rank": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "internlm2": {"bias": False},
    "exaone4": {
        "sliding_window": WINDOW,
        "sliding_window_pattern": "LG",
        "tie_word_embeddings": False,
    },
    "smollm3": {"no_rope_layer_interval": 2, "tie_word_embeddings": True},
    "seed_oss": {"tie_word_embeddings": False},
    "ernie4_5": {"use_bias": False, "tie_word_embeddings": True},
    "hunyuan_v1_dense": {
        "use_qk_norm": True,
        "rope_scaling": {"alpha": 50.0, "factor": 1.0, "type": "dynamic"},
    },
    "nemotron": {"hidden_act": "relu2", "partial_rotary_factor": 0.5},
    "helium": {"tie_word_embeddings": False},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gpt2": {
        "n_ctx": 128,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 128,
        "layer_norm_epsilon": 1e-5,
        "num_key_value_heads": 4,
    },
    "mamba2": {
        **_MAMBA2,
        "num_heads": 8,
        "intermediate_size": 128,
        "state_size": 16,
        "tie_word_embeddings": True,
    },
    "lfm2": {
        "num_hidden_layers": 3,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": 96,
        "layer_types": ["conv", "full_attention", "conv"],
    },
}

# Families that run every completion as a whole row, and why: a word of the check's own reason.
FLAT_FAMILIES: dict[str, dict[str, Any]] = {
    "mamba": {
        "intermediate_size": 128,
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": "auto",
    },
    "nemotron_h": {
        **_MAMBA2,
        "num_hidden_layers": 4,
        "hybrid_override_pattern": ["M", "-", "*", "M"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "falcon_h1": {
        "lm_head_multiplier": 1.0,
        "mamba_d_ssm": 64,
        "mamba_d_state": 16,
        "mamba_d_head": 16,
        "mamba_n_heads": 4,
        "mamba_chunk_size": 16,
    },
    "baichuan_m1": {
        "sliding_window": WINDOW,
        "sliding_window_layers": [0],
        "conv_window": 2,
        "num_swa_attention_heads": 4,
        "num_swa_key_value_heads": 2,
    },
    "deepseek_v32": {
        **_LATENT,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_topk": 4,
        "n_group": 1,
        "topk_group": 1,
    },
    "gemma3n": {
        "text_config": {
            **_COMMON,
            "model_type": "gemma3n_text",
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "sliding_window": WINDOW,
            "rope_local_base_freq": 1e4,
            "final_logit_softcapping": 5.0,
            "layer_types": _SLIDING_THEN_FULL * 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 32,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 16,
        }
    },
    "llama4": {
        "text_config": {
            **_COMMON,
            "model_type": "llama4_text",
            "num_hidden_layers": 4,
            "attention_chunk_size": WINDOW,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 96,
            "num_experts_per_tok": 1,
            "num_local_experts": 4,
            "use_qk_norm": True,
        }
    },
    "rwkv7": {
        "intermediate_size": 128,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    # Within its trained length: beyond that the frequencies, and so the log-probs, depend on how
    # far the rows are padded.
    "internlm2-dynamic": {
        "model_type": "internlm2",
        "bias": False,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
}

# Refused when they are loaded, with a word of the message.
REFUSED_FAMILIES: dict[str, dict[str, Any]] = {
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
}

# Where not every linear layer can take an adapter: gemma3n's own code reads the weights of its
# alternating updates directly, which mlx-lm's adapters don't have.
LORA_KEYS: dict[str, tuple[str, ...]] = {
    "gemma3n": (
        "self_attn.q_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "per_layer_input_gate",
        "per_layer_projection",
    )
}


def config_of(family: str) -> dict[str, Any]:
    """The config.json content of a tiny model of `family`."""
    own = (FAMILIES | FLAT_FAMILIES | REFUSED_FAMILIES)[family]
    return {"model_type": family, **_COMMON, **own}


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
