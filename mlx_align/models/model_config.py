"""Model configurations, translated into the names and forms that mlx-lm reads.

transformers 5 writes rotary options into `rope_parameters` (for some families one entry per kind of
layer), lists the kinds of layers instead of a pattern, and has renamed options. mlx-lm 0.32 reads
the older names; for many families it ignores the new ones without a word and takes its defaults.
`normalize_config` adds the older names and keeps the new ones, so that a folder written with the
result is read alike by mlx-lm and by both versions of transformers.

What a family's code in mlx-lm computes up to some length only is listed by `length_limits`, what it
can't compute by `unsupported_reason`. Rotary embeddings are compared in `rotary.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, dataclass, fields
from math import isnan
from typing import Any

from mlx_lm.utils import _get_classes

from mlx_align.models.patches import ACTIVATIONS
from mlx_align.system.regular_files import whole_number

# Rope types whose parameters are defined relative to the length that the model was trained with.
_WITH_TRAINED_LENGTH = ("llama3", "yarn", "longrope")
# Options that mlx-lm requires of some family, and what they are where transformers leaves them out.
# transformers 4 leaves out what equals the default of its base class.
_LEFT_OUT: dict[str, Any] = {
    "tie_word_embeddings": True,
    "rope_scaling": None,
    "mlp_bias": False,
    "post_norm": False,
    "qk_norm": True,
}
# Other names of the same option.
_SYNONYMS = {
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
    "n_ctx": "n_positions",
}
# Options that a family's code in mlx-lm does not read, and the only value it computes.
_ONLY = {"qwen2_moe": {"norm_topk_prob": False}}
# The option that names a family's activation, and what it is where config.json leaves it out.
_ACTIVATION = {
    "gemma": ("hidden_act", "gelu_pytorch_tanh"),
    **dict.fromkeys(("gemma2", "gemma3_text"), ("hidden_activation", "gelu_pytorch_tanh")),
    **dict.fromkeys(("gpt2", "gptj"), ("activation_function", "gelu_new")),
    "gpt_bigcode": ("activation_function", "gelu_pytorch_tanh"),
    "gpt_neox": ("hidden_act", "gelu"),
    "phi": ("hidden_act", "gelu_new"),
    "starcoder2": ("hidden_act", "gelu_pytorch_tanh"),
}
# Families whose code in mlx-lm computes one activation, under the names that transformers has.
_ONE_ACTIVATION = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "mixtral", "ministral3", "qwen2", "qwen2_moe", "qwen3"),
            *("qwen3_moe", "qwen3_next", "phi3", "phimoe", "olmo", "olmo2", "olmo3", "olmoe"),
            *("granite", "granitemoe", "cohere", "cohere2", "stablelm", "exaone4", "smollm3"),
            *("seed_oss", "ernie4_5", "hunyuan_v1_dense", "helium", "glm", "glm4", "glm4_moe"),
            *("deepseek_v2", "deepseek_v3", "dots1", "internlm2", "internlm3", "minicpm"),
        ),
        ("silu", "swish"),
    ),
    **dict.fromkeys(("nemotron", "bitnet"), ("relu2",)),
}
# Families whose sliding window transformers computes, and mlx-lm does not.
_ALL_LAYERS_SLIDE = ("mistral", "mixtral", "phi3", "phimoe", "starcoder2")
_WINDOW_BY_OPTION = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
# Bounds of a configuration. The largest open models have 126 blocks, a hidden size of 18,432 and
# 256,000 tokens.
_BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SIZES = (
    *("hidden_size", "n_embd", "d_model", "intermediate_size", "moe_intermediate_size"),
    *("vocab_size", "head_dim", "num_attention_heads", "n_head", "num_key_value_heads"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
    *("max_position_embeddings", "n_positions", "sliding_window", "group_size", "bits"),
)
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("architectures", "layer_types"), (list,)),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "id2label", "text_config"), (dict,)),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), (int, list)),
    **dict.fromkeys(("rope_theta", "rms_norm_eps", "layer_norm_eps"), (int, float)),
    **dict.fromkeys(("partial_rotary_factor", "rope_local_base_freq"), (int, float)),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "use_sliding_window"), (bool,)),
    **dict.fromkeys(("dtype", "torch_dtype", "hidden_act", "model_type"), (str,)),
}
_MOST_BLOCKS = 4096
_LARGEST_SIZE = (1 << 31) - 1
_LARGEST = 1 << 100
_MOST_VALUES = 1_000_000
_SLIDING = "sliding_attention"
_FULL = "full_attention"


@dataclass(frozen=True)
class LengthLimit:
    """A length up to which a model is computed as its configuration says.

    Attributes:
        tokens: The longest row, prompt and completion together, that is computed exactly.
        reason: What is different beyond that, for the user.
        refused: Whether longer rows can't be computed at all.
    """

    tokens: int
    reason: str
    refused: bool = False


def check_config(config: Mapping[str, Any]) -> None:
    """Check the types and bounds of a configuration before anything is computed from it.

    Raises:
        ValueError: An option is of another type, or out of bounds.
    """
    waiting: list[Any] = [config]
    count = 0
    while waiting:
        item = waiting.pop()
        count += 1
        if count > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES:,} values in it")
        if isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, float) and isnan(item):  # infinity is a limit of Mamba's
            raise ValueError(f"a number in it is {item}")
        elif isinstance(item, int) and abs(item) > _LARGEST:
            raise ValueError(f"a number in it has more than {len(str(_LARGEST))} digits")
    for part in (config, config.get("text_config"), config.get("quantization")):
        if part is None:
            continue
        if not isinstance(part, Mapping):
            raise ValueError("text_config and quantization have to be objects")
        for names, most in ((_BLOCK_COUNTS, _MOST_BLOCKS), (_SIZES, _LARGEST_SIZE)):
            for name in names:
                if part.get(name) is not None and not isinstance(part[name], list):
                    whole_number(part, name, 0, most)
        for name, kinds in _TYPES.items():
            value = part.get(name)
            wrong_bool = isinstance(value, bool) and bool not in kinds
            if value is not None and (wrong_bool or not isinstance(value, kinds)):
                raise ValueError(f"{name} is {value!r:.40}, which is of another type")
    if not isinstance(config.get("model_type"), str):
        raise ValueError("model_type is no text")
    if not all(isinstance(name, str) for name in config.get("architectures") or ()):
        raise ValueError("architectures is no list of names")


def block_count(config: Mapping[str, Any]) -> int | None:
    """The number of blocks that a configuration asks for; None if it has another name."""
    text = text_config(config)
    found = [text[name] for name in _BLOCK_COUNTS if isinstance(text.get(name), int)]
    return max(found, default=None)


def normalize_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with all options under the names that mlx-lm reads.

    Nothing is taken away. The text part of a multimodal model is translated as well. Translating
    twice changes nothing.
    """
    result = deepcopy(dict(config))
    text = result.get("text_config")
    if isinstance(text, dict):
        result["text_config"] = _normalize_text(text)
    return _normalize_text(result)


def loading_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The normalised configuration as mlx-lm builds the model from it.

    It has substitutes that are exact within `length_limits` but must not be written to disk.
    """
    options = deepcopy(dict(config))
    scaling = options.get("rope_scaling")
    if isinstance(scaling, dict) and "short_factor" in scaling:
        # mlx-lm always divides by the long factors, which are for rows beyond the trained length.
        scaling["long_factor"] = scaling["short_factor"]
    if options.get("model_type") == "deepseek_v2" and not scaling:
        # Its code needs a scaling; this one changes nothing.
        options["rope_scaling"] = {"type": "yarn", "rope_type": "yarn", "factor": 1.0}
    return options


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that describes the language model."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def size_in(config: Mapping[str, Any], *names: str) -> int:
    """The value of the first of `names` that is a number in `config`, or 0."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return int(value)
    return 0


def hidden_size(config: Mapping[str, Any]) -> int:
    """Width of the residual stream (of the text part); 0 if it is not in the configuration."""
    text = {**config, **(config.get("text_config") or {})}
    return size_in(text, "hidden_size", "n_embd", "d_model", "dim")


def rope_of_layers(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rotary parameters by kind of layer; the kind "" means all others.

    Args:
        config: The text part of a normalised configuration.

    Returns:
        As transformers 5 has them: `rope_type`, `rope_theta` and the parameters of the type. Empty
        if the configuration doesn't say.
    """
    nested = {
        kind: dict(parameters)
        for kind, parameters in (config.get("rope_parameters") or {}).items()
        if isinstance(parameters, Mapping)
    }
    if nested:
        return nested
    theta = config.get("rope_theta", config.get("rotary_emb_base"))
    if theta is None:
        return {}
    scaling = config.get("rope_scaling") or {}
    rope = {**scaling, "rope_theta": theta}
    rope["rope_type"] = scaling.get("rope_type", scaling.get("type", "default"))
    partial = config.get("partial_rotary_factor", config.get("rotary_pct"))
    if partial is not None:
        rope["partial_rotary_factor"] = partial
    found = {"": rope}
    local = config.get("rope_local_base_freq")
    if local is not None:
        found[_SLIDING] = {"rope_type": "default", "rope_theta": local}
    elif config.get("model_type") == "olmo3":
        found[_SLIDING] = {"rope_type": "default", "rope_theta": theta}
    return found


def activation_of(config: Mapping[str, Any]) -> str | None:
    """The activation of the MLPs that a configuration names, by transformers' name.

    None for families whose code in mlx-lm computes one only, or reads the option itself.
    """
    text = text_config(config)
    option, default = _ACTIVATION.get(str(text.get("model_type")), ("", ""))
    if not option:
        return None
    name = text.get(option) or default
    # Google's first releases say gelu and mean its tanh form; transformers 5 reads them so too.
    return default if text["model_type"] == "gemma" and name == "gelu" else str(name)


def length_limits(config: Mapping[str, Any]) -> tuple[LengthLimit, ...]:
    """Lengths up to which the model is computed as a normalised configuration says."""
    text = text_config(config)
    family = str(text.get("model_type", config.get("model_type")))
    limits = []
    window = _uncomputed_window(text, family)
    if window:
        limits.append(
            LengthLimit(
                window,
                f"the model has a sliding window of {window} tokens, which mlx-lm's {family} does "
                "not compute: later tokens see everything before them",
            )
        )
    longest = text.get("max_position_embeddings")
    longest = longest if isinstance(longest, int) and longest > 0 else None
    ropes = rope_of_layers(text)
    rope = ropes.get("", ropes.get(_FULL, {}))
    trained = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "dynamic" and "alpha" not in rope and longest:
        limits.append(
            LengthLimit(
                longest,
                "its rotary embeddings (dynamic) then depend on the length of each row, and mlx-lm "
                "takes the length of the padded batch",
                refused=True,
            )
        )
    elif "short_factor" in rope and isinstance(trained, int):
        limits.append(
            LengthLimit(
                trained,
                "the model has other rotary embeddings (longrope) for such rows; they are computed "
                "with those of shorter rows",
            )
        )
    positions = text.get("n_positions") if family in ("gpt2", "gpt_bigcode") else None
    if isinstance(positions, int):
        limits.append(
            LengthLimit(positions, "the model has no embeddings for later positions", refused=True)
        )
    elif longest:
        limits.append(
            LengthLimit(
                longest, "the model was not trained on later positions (max_position_embeddings)"
            )
        )
    return tuple(limits)


def unsupported_reason(config: Mapping[str, Any]) -> str:
    """Why mlx-lm's code of a family can't compute a normalised configuration; "" if it can."""
    text = text_config(config)
    family = str(text.get("model_type", config.get("model_type")))
    for option, value in _ONLY.get(family, {}).items():
        if text.get(option, value) != value:
            return (
                f"config.json has {option} {text[option]}, mlx-lm's {family} computes {value} only"
            )
    named = activation_of(config)
    if named is not None and named not in ACTIVATIONS:
        return f"config.json has the activation {named}, which is not known here"
    activation = text.get("hidden_act")
    computed = _ONE_ACTIVATION.get(family)
    if activation is not None and computed and activation not in computed:
        return (
            f"config.json has hidden_act {activation}, mlx-lm's {family} computes {computed[0]} "
            "only"
        )
    kinds = text.get("layer_types")
    known = set().union(*_arguments(text))
    if not isinstance(kinds, list) or not kinds or "layer_types" in known:
        return ""
    if family == "exaone4":
        if set(kinds) == {_SLIDING}:
            return "every layer has a sliding window, mlx-lm's exaone4 needs one without"
        return ""
    for option in ("sliding_window_pattern", "full_attention_interval"):
        if option not in known:
            continue
        every = text.get(option) if _FULL in kinds else None
        if not isinstance(every, int) or any(
            (kind == _FULL) != ((i + 1) % every == 0) for i, kind in enumerate(kinds)
        ):
            return f"layer_types follows no regular pattern, mlx-lm's {family} reads {option}"
    return ""


# Translation


def _normalize_text(config: dict[str, Any]) -> dict[str, Any]:
    required, optional = _arguments(config)
    known = required | optional
    _flatten_rope(config, known)
    for name in required - config.keys():
        other = _SYNONYMS.get(name)
        if other in config:
            config[name] = config[other]
        elif name in _LEFT_OUT:
            config[name] = _LEFT_OUT[name]
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and kinds and known and "layer_types" not in known:
        _add_patterns(config, kinds, known)
    if config.get("model_type") == "gemma4_text":
        _flatten_gemma4(config)
    return config


def _flatten_rope(config: dict[str, Any], known: set[str]) -> None:
    """Add `rope_theta`, `rope_scaling`, … for what is in `rope_parameters`.

    Where both forms are there, `rope_scaling` wins over `rope_parameters`, and a `rope_theta`
    inside of either wins over the one outside, as in transformers 5.
    """
    stored = config.get("rope_parameters")
    stored = stored if isinstance(stored, Mapping) else {}
    nested = {kind: v for kind, v in stored.items() if isinstance(v, Mapping)}
    own = config.get("rope_scaling") or nested.get(_FULL) or ({} if nested else stored)
    if not isinstance(own, Mapping) or not own:
        return
    rope = dict(own)
    theta = rope.pop("rope_theta", None)
    partial = rope.pop("partial_rotary_factor", None)
    if not nested:
        theta = stored.get("rope_theta") if theta is None else theta
        partial = stored.get("partial_rotary_factor") if partial is None else partial
    for name, value in (("rope_theta", theta), ("partial_rotary_factor", partial)):
        if value is not None:
            config[name] = value
    if config.get("model_type") == "gpt_neox":
        config["rotary_emb_base"] = config.get("rope_theta", config.get("rotary_emb_base", 10000))
        config["rotary_pct"] = config.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    local = nested.get(_SLIDING, {})
    if local.get("rope_type", "default") == "default" and "rope_theta" in local:
        config["rope_local_base_freq"] = local["rope_theta"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        if not set(rope) - {"rope_type", "type"}:
            config["rope_scaling"] = None
        return
    rope["rope_type"] = rope["type"] = kind
    if kind in _WITH_TRAINED_LENGTH and "max_position_embeddings" in config:
        trained = config.get("original_max_position_embeddings", config["max_position_embeddings"])
        rope.setdefault("original_max_position_embeddings", trained)
        if "original_max_position_embeddings" in known:
            config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if isinstance(rope.get("factor"), int):
        rope["factor"] = float(rope["factor"])
    config["rope_scaling"] = rope


def _arguments(config: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Names of the options that mlx-lm requires of this family, and that it also reads."""
    try:
        _, arguments = _get_classes(dict(config))
        found = fields(arguments)
    except (Exception, SystemExit):  # unknown, or its code needs another package: refused at load
        return set(), set()
    required = {
        field.name
        for field in found
        if field.default is MISSING and field.default_factory is MISSING
    }
    return required, {field.name for field in found} - required


def _add_patterns(config: dict[str, Any], kinds: Sequence[str], known: set[str]) -> None:
    """Add the pattern that mlx-lm reads instead of the kinds of layers.

    For kinds without a pattern it is wrong; `unsupported_reason` then refuses the model.
    """
    if config.get("model_type") == "exaone4":
        names = {_SLIDING: "L", _FULL: "G"}
        text = "".join(names.get(kind, "?") for kind in kinds)
        config["sliding_window_pattern"] = text if "L" in text and "G" in text else None
        return
    for option in ("sliding_window_pattern", "full_attention_interval"):
        if option in known and _FULL in kinds:
            config[option] = kinds.index(_FULL) + 1


def _flatten_gemma4(config: dict[str, Any]) -> None:
    """Options of the layers with full attention, which transformers 5 stores by layer."""
    layers = config.get("per_layer_config")
    if not isinstance(layers, Mapping):
        return
    kinds = enumerate(config.get("layer_types") or [])
    full = [layers[str(i)] for i, kind in kinds if kind == _FULL and str(i) in layers]
    for name, own in (
        ("global_head_dim", "head_dim"),
        ("num_global_key_value_heads", "num_key_value_heads"),
    ):
        if full and own in full[0]:
            config[name] = full[0][own]


def _uncomputed_window(config: Mapping[str, Any], family: str) -> int | None:
    """The sliding window of some layer that mlx-lm computes with full attention."""
    window = config.get("sliding_window")
    if not isinstance(window, int) or window < 1:
        return None
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and "layer_types" in set().union(*_arguments(config)):
        return None
    if family == "gemma2":
        slides = not isinstance(kinds, list) or _SLIDING in kinds
    elif family in _WINDOW_BY_OPTION:
        layers = int(config.get("num_hidden_layers", 0))
        some = config.get("max_window_layers", 0) < layers
        slides = bool(config.get("use_sliding_window")) and (
            _SLIDING in kinds if isinstance(kinds, list) else some
        )
    else:
        slides = family in _ALL_LAYERS_SLIDE
    return window if slides else None
