r"""Make tests/oracle/transformers: tiny models as transformers saves them, and its log-probs.

    pip install torch "transformers>=5"
    python scripts/make_oracle_transformers.py --output tests/oracle/transformers [--only REGEX]
    pip install "transformers<5"    # in another environment
    python scripts/make_oracle_transformers.py --output tests/oracle/transformers [--only REGEX]

Each case is a configuration of a small random model, in float32. Run with transformers 5, the
script writes for each case

    weights/<weights>.safetensors   as save_pretrained writes them; several cases may share a file
    configs/<case>.5.json           config.json as save_pretrained writes it
    logprobs.json                   rows of token ids, and for each case the log-prob of each token

Run with transformers 4 afterwards, it loads the same weights, writes configs/<case>.4.json, and
stores its log-probs as well. Nothing is added to a configuration by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

MAJOR = int(transformers.__version__.split(".")[0])
VOCAB, WINDOW = 64, 8
# The first is within every window, the last beyond the trained length of the scaled ropes.
LENGTHS = (5, 13, 21, 40)
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 32,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
}
ROUTED: dict[str, Any] = {
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT: dict[str, Any] = {
    **ROUTED,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
    "head_dim": None,
}
GRANITE = {
    "logits_scaling": 3.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.6,
}
GEMMA2 = {
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 12,
}
WINDOW_BY_OPTION = {
    "tie_word_embeddings": True,
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "max_window_layers": 1,
}
SLIDING = {"sliding_window": WINDOW, "layer_types": SLIDING_THEN_FULL}


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        family: Its `model_type`.
        options: What differs from `COMMON`; None takes an option away.
        rope: Content of `rope_parameters`; None for the family's default.
        weights: Name of the weights, if it uses those of an earlier case.
        old: Whether transformers 4 has this.
    """

    family: str
    options: dict[str, Any] = field(default_factory=dict)
    rope: dict[str, Any] | None = None
    weights: str = ""
    old: bool = True


def rope(theta: float, **more: Any) -> dict[str, Any]:
    """Unscaled rotary embeddings."""
    return {"rope_type": "default", "rope_theta": theta, **more}


UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
CASES: dict[str, Case] = {
    "llama": Case("llama", UNTIED),
    "llama-theta": Case("llama", UNTIED, rope(5e5), "llama"),
    "llama-llama3": Case("llama", UNTIED, LLAMA3, "llama"),
    "llama-linear": Case("llama", UNTIED, LINEAR, "llama"),
    "llama-yarn": Case("llama", UNTIED, YARN, "llama"),
    "llama-yarn-exact": Case(
        "llama",
        UNTIED,
        {**YARN, "truncate": False, "attention_factor": 1.3, "beta_fast": 8.0},
        "llama",
    ),
    "llama-dynamic": Case("llama", UNTIED, DYNAMIC, "llama"),
    "llama-longrope": Case("llama", UNTIED, LONGROPE, "llama", old=False),
    "llama-tied": Case("llama", TIED, rope(5e5)),
    "llama-bias": Case("llama", {"attention_bias": True, "mlp_bias": True}, rope(5e5)),
    "mistral": Case("mistral", {"sliding_window": None}, rope(1e6)),
    "mistral-window": Case("mistral", {"sliding_window": WINDOW}, rope(1e6), "mistral"),
    "mixtral": Case("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, rope(1e6)),
    "ministral3": Case(
        "ministral3",
        {},
        {**YARN, "llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0},
        old=False,
    ),
    "qwen2": Case("qwen2", TIED, rope(3e5)),
    "qwen2-window": Case("qwen2", WINDOW_BY_OPTION, rope(3e5), "qwen2"),
    "qwen2-yarn": Case("qwen2", TIED, YARN, "qwen2"),
    "qwen3": Case("qwen3", TIED, rope(1e6)),
    "qwen3-yarn": Case("qwen3", TIED, YARN, "qwen3"),
    "qwen3-window": Case("qwen3", WINDOW_BY_OPTION, rope(1e6), "qwen3"),
    "qwen2_moe": Case(
        "qwen2_moe",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 8,
            "mlp_only_layers": [],
            "norm_topk_prob": False,
        },
        rope(1e6),
    ),
    "qwen3_moe": Case("qwen3_moe", EXPERTS, rope(1e6)),
    "qwen3_moe-yarn": Case("qwen3_moe", EXPERTS, YARN, "qwen3_moe"),
    "qwen3_next": Case(
        "qwen3_next",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 8,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 1,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
        rope(1e5, partial_rotary_factor=0.5),
    ),
    "gemma": Case("gemma", {}, rope(1e4)),
    "gemma2": Case("gemma2", {**GEMMA2, "sliding_window": 64}, rope(2e4)),
    "gemma2-window": Case("gemma2", {**GEMMA2, "sliding_window": WINDOW}, rope(2e4), "gemma2"),
    "gemma3_text": Case(
        "gemma3_text",
        {"query_pre_attn_scalar": 12, **SLIDING},
        {
            "sliding_attention": rope(2e4),
            "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
        },
    ),
    "gemma4_text": Case(
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "layer_types": SLIDING_THEN_FULL * 2,
            "num_kv_shared_layers": 2,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "final_logit_softcapping": 3.0,
        },
        {
            "sliding_attention": rope(2e4),
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 5e5,
                "partial_rotary_factor": 0.25,
            },
        },
        old=False,
    ),
    "phi": Case("phi", {}, rope(3e4, partial_rotary_factor=0.5)),
    "phi3": Case("phi3", {"sliding_window": None}, rope(3e4, partial_rotary_factor=1.0)),
    "phi3-window": Case(
        "phi3", {"sliding_window": WINDOW}, rope(3e4, partial_rotary_factor=1.0), "phi3"
    ),
    "phi3-longrope": Case(
        "phi3",
        {"sliding_window": None, "original_max_position_embeddings": 32},
        {**LONGROPE, "partial_rotary_factor": 1.0},
        "phi3",
    ),
    "olmo2": Case("olmo2", {}, rope(5e5)),
    "olmo3": Case("olmo3", SLIDING, rope(5e5)),
    "olmo3-yarn": Case(
        "olmo3",
        SLIDING,
        {
            "full_attention": {**YARN, "rope_theta": 5e5, "attention_factor": 1.2},
            "sliding_attention": rope(5e5),
        },
        "olmo3",
    ),
    "olmoe": Case("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, rope(3e4)),
    "granite": Case("granite", GRANITE, rope(1e6)),
    "granitemoe": Case(
        "granitemoe", {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2}, rope(1e6)
    ),
    "cohere": Case("cohere", {"logit_scale": 0.25, "use_qk_norm": True}, rope(8e4)),
    "cohere2": Case("cohere2", {"logit_scale": 0.25, **SLIDING}, rope(5e4)),
    "starcoder2": Case("starcoder2", {"sliding_window": None}, rope(1e5)),
    "starcoder2-window": Case("starcoder2", {"sliding_window": WINDOW}, rope(1e5), "starcoder2"),
    "stablelm": Case("stablelm", {"use_qkv_bias": True}, rope(3e4, partial_rotary_factor=0.5)),
    "exaone4": Case("exaone4", {"sliding_window_pattern": "LG", **SLIDING}, rope(1e6)),
    "smollm3": Case("smollm3", {"no_rope_layers": [1, 0]}, rope(2e6)),
    "seed_oss": Case("seed_oss", {}, rope(1e7)),
    "ernie4_5": Case("ernie4_5", {}, rope(5e5)),
    "hunyuan_v1_dense": Case(
        "hunyuan_v1_dense",
        {},
        {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0},
    ),
    "nemotron": Case("nemotron", {}, rope(3e4, partial_rotary_factor=0.5)),
    "helium": Case("helium", {}, rope(1e5)),
    "gpt_neox": Case("gpt_neox", {"intermediate_size": 64}, rope(3e4, partial_rotary_factor=0.5)),
    "glm": Case("glm", {}, rope(3e4, partial_rotary_factor=0.5)),
    "glm4": Case("glm4", {}, rope(3e4, partial_rotary_factor=0.5)),
    "glm4_moe": Case(
        "glm4_moe", {**ROUTED, "use_qk_norm": True}, rope(3e5, partial_rotary_factor=0.5)
    ),
    "deepseek_v2": Case("deepseek_v2", {**LATENT, "topk_method": "greedy"}, rope(3e4)),
    "deepseek_v3": Case("deepseek_v3", LATENT, rope(3e4)),
    "deepseek_v3-yarn": Case(
        "deepseek_v3",
        LATENT,
        {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1},
        "deepseek_v3",
    ),
    "gpt_oss": Case(
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING},
        {**YARN, "rope_theta": 1.5e5, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
    ),
    "gpt2": Case("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64}),
    "mamba2": Case(
        "mamba2",
        {
            "num_heads": 4,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,
            "expand": 2,
            "chunk_size": 8,
            "conv_kernel": 4,
            **UNTIED,
        },
    ),
    "lfm2": Case(
        "lfm2",
        {
            "layer_types": ["conv", "full_attention"],
            "conv_L_cache": 3,
            "block_dim": 16,
            "block_ff_dim": 24,
            "block_auto_adjust_ff_dim": False,
        },
        rope(1e6),
    ),
    # transformers 4 computes its activation differently, by .008 nats.
    "apertus": Case("apertus", {}, {**LLAMA3, "rope_theta": 1.2e7}, old=False),
    "dots1": Case("dots1", {**ROUTED, "layer_types": ["full_attention"] * 2}, rope(1e5)),
}


def arguments(case: Case) -> dict[str, Any]:
    """Arguments of the family's configuration class, in this version's form."""
    every = {**COMMON, **case.options}
    options = {k: v for k, v in every.items() if not (v is None and k == "head_dim")}
    if case.rope is None:
        return options
    if MAJOR >= 5:
        return {**options, "rope_parameters": case.rope}
    own = dict(case.rope.get("full_attention", case.rope))
    if case.family == "gemma3_text":
        options["rope_local_base_freq"] = case.rope["sliding_attention"]["rope_theta"]
    theta, partial = own.pop("rope_theta"), own.pop("partial_rotary_factor", None)
    if case.family == "gpt_neox":
        return {**options, "rotary_emb_base": theta, "rotary_pct": partial}
    options["rope_theta"] = theta
    if partial is not None:
        options["partial_rotary_factor"] = partial
    if own["rope_type"] == "longrope":
        own = {"type": "longrope", **{key: own[key] for key in ("short_factor", "long_factor")}}
    if own.get("rope_type") != "default":
        options["rope_scaling"] = own
    return options


def make_weights(model: Any) -> None:
    """Random weights, so that every part has an effect that would be missed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def rows() -> list[list[int]]:
    """Token ids of rows of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def logprobs(model: Any) -> list[list[float]]:
    """The log-prob of each token but the first, each row by itself; nats."""
    found = []
    for row in rows():
        ids = torch.tensor([row])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        values = torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None])[:, 0]
        found.append([round(value, 6) for value in values.tolist()])
    return found


def make(name: str, case: Case, output: Path) -> list[list[float]]:
    """Write a case with this version of transformers; its log-probs."""
    auto = transformers.AutoModelForCausalLM
    config = transformers.AutoConfig.for_model(case.family, **arguments(case))
    weights = output / "weights" / f"{case.weights or name}.safetensors"
    eager: dict[str, Any] = {"attn_implementation": "eager"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        model = auto.from_config(config, **eager).float().eval()
        if MAJOR >= 5 and not case.weights:
            make_weights(model)
            model.save_pretrained(folder)
            shutil.copy(folder / "model.safetensors", weights)
        else:
            # Saved with the model, because that adds the architecture and the dtype.
            model.save_pretrained(folder)
            shutil.copy(weights, folder / "model.safetensors")
        model, info = auto.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **eager
        )
        if info["missing_keys"] or info["unexpected_keys"]:
            raise ValueError(f"{name}: {info}")
        shutil.copy(folder / "config.json", output / "configs" / f"{name}.{MAJOR}.json")
    return logprobs(model.eval())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for folder in ("weights", "configs"):
        (options.output / folder).mkdir(parents=True, exist_ok=True)
    file = options.output / "logprobs.json"
    content = json.loads(file.read_text()) if file.exists() else {"cases": {}}
    content["rows"] = rows()
    content[f"transformers {MAJOR}"] = transformers.__version__
    failed = False
    for name, case in CASES.items():
        if not re.search(options.only, name) or (MAJOR < 5 and not case.old):
            continue
        try:
            found = make(name, case, options.output)
        except Exception as error:  # a family that this version does not have, or can't run
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            failed = True
            continue
        entry = content["cases"].setdefault(name, {"weights": case.weights or name})
        entry[str(MAJOR)] = found
        spread = torch.tensor([v for row in found for v in row]).std().item()
        print(f"{name}: std of log-probs {spread:.2f}", flush=True)
    file.write_text(json.dumps(content) + "\n", encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    main()
