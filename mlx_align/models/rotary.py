"""Rotary embeddings: what a configuration asks for, compared with what the model computes.

mlx-lm builds each family's rotary embeddings from the options that its code knows. An option that
it ignores (a scaling, a partial rotation) would change every log-prob without an error. So after
loading, each layer's own module rotates a vector, which is compared with the frequencies that
transformers derives from the same configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_align.errors import ModelError
from mlx_align.models.model_config import rope_of_layers, text_config

# Positions at which rotations are compared, the second within the trained length: slow frequencies
# show only there.
_NEAR, _FAR = 1, 1000
# Largest difference of a coordinate of the rotated vector of ones. Rounding of angles in float32
# is 1e-4 at the second position.
_TOLERANCE = 2e-3


class Rotation(NamedTuple):
    """Rotary embeddings: angles in radians per position, and a factor on what is rotated."""

    frequencies: npt.NDArray[np.float64]
    factor: float = 1.0


def rotation_of(rope: Mapping[str, Any], width: int, longest: int) -> Rotation | None:
    """The rotation that transformers derives from rotary parameters.

    For rows within the trained length, where `dynamic` is unscaled and `longrope` uses its short
    factors.

    Args:
        rope: As `rope_of_layers` returns them.
        width: Number of coordinates of a head that are rotated.
        longest: `max_position_embeddings`, 0 if unknown.

    Returns:
        None for a type that is not known here.
    """
    plain = float(rope["rope_theta"]) ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    kind = rope.get("rope_type", "default")
    factor = float(rope.get("factor") or 1.0)
    trained = float(rope.get("original_max_position_embeddings") or longest)
    if "alpha" in rope or "mrope_section" in rope:
        return None
    if kind in ("default", "dynamic"):
        return Rotation(plain)
    if kind == "linear":
        return Rotation(plain / factor)
    if trained < 2:
        return None
    if kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        turns = trained * plain / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return Rotation(plain * (smooth + (1 - smooth) / factor))
    if kind == "yarn":
        return Rotation(_yarn(rope, plain, width, trained), _yarn_factor(rope, factor))
    if kind == "longrope":
        ratio = factor if rope.get("factor") else longest / trained
        scale = rope.get("attention_factor")
        if scale is None:
            scale = math.sqrt(1 + math.log(ratio) / math.log(trained)) if ratio > 1 else 1.0
        return Rotation(plain / np.array(rope["short_factor"], np.float64), float(scale))
    return None


def correct_rotations(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Compare the rotary embeddings of all layers with the configuration.

    mlx-lm's yarn rounds the bounds of its ramp and ignores `attention_factor`. Where the
    configuration says otherwise its frequencies are replaced. So is the number of coordinates that
    are rotated, where mlx-lm's code (glm) rotates all.

    Args:
        model: As mlx-lm loads it.
        config: The normalised configuration.

    Returns:
        Sentences about what was replaced.

    Raises:
        ModelError: The family's code computes something else than the configuration asks for.
    """
    text = text_config(config)
    ropes = rope_of_layers(text)
    longest = text.get("max_position_embeddings") or 0
    kinds = text.get("layer_types")
    notes = set()
    for index, layer in enumerate(getattr(model, "layers", ())):
        kind = kinds[index] if isinstance(kinds, list) and index < len(kinds) else None
        # Where the kind of the layer isn't known, it may be any.
        candidates = list(ropes.values()) if kind is None else [ropes.get(kind) or ropes.get("")]
        for name, module in layer.named_modules():
            width = getattr(module, "dims", getattr(module, "dim", None))
            if name.split(".")[-1] != "rope" or not isinstance(width, int):
                continue
            found = [_compare(module, text, rope, width, longest) for rope in candidates if rope]
            if not found or "" in found:
                continue
            rope = candidates[-1]
            narrower = _rotated_width(text, rope) if rope else None
            if rope and narrower is not None and narrower < width and type(module) is nn.RoPE:
                module.dims = narrower
                if not _compare(module, text, rope, narrower, longest):
                    notes.add(
                        f"{narrower} of a head's {width} coordinates are rotated, as config.json "
                        "says; mlx-lm alone rotates all"
                    )
                    continue
                module.dims = width
            wanted = rotation_of(rope, width, longest) if rope else None
            if (
                rope is None
                or wanted is None
                or rope.get("rope_type") != "yarn"
                or not hasattr(module, "mscale")
                or _rotated_width(text, rope) not in (None, width)
            ):
                raise ModelError(found[-1])
            module._freqs = mx.array((1 / wanted.frequencies).astype(np.float32))
            module.mscale = wanted.factor
            notes.add(
                "rotary embeddings (yarn) are computed as config.json says; mlx-lm rounds them"
            )
    return sorted(notes)


def _compare(
    module: Any, config: Mapping[str, Any], rope: Mapping[str, Any], width: int, longest: int
) -> str:
    """How a layer's rotation differs from its parameters; "" if it doesn't, or isn't known here."""
    expected = _rotated_width(config, rope)
    wanted = rotation_of(rope, width, longest)
    if expected in (None, width) and (wanted is None or _matches(module, width, wanted, longest)):
        return ""
    return _difference(config, rope, width, expected)


def _rotated_width(config: Mapping[str, Any], rope: Mapping[str, Any]) -> int | None:
    """Number of coordinates of a head that are rotated, if the configuration says."""
    partial = rope.get("partial_rotary_factor")
    if partial is None or "qk_rope_head_dim" in config or rope.get("rope_type") == "proportional":
        return None
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(head * partial)


def _matches(module: Any, width: int, wanted: Rotation, longest: int) -> bool:
    for position in (_NEAR, min(_FAR, longest - 1) if longest > 1 else _FAR):
        # On the CPU: GPUs approximate the cosine of large angles.
        with mx.stream(mx.cpu):
            out = np.array(module(mx.ones((1, 1, 1, width)), offset=position))[0, 0, 0]
        if getattr(module, "traditional", False):
            first, second = out[0::2], out[1::2]
        else:
            first, second = out[: width // 2], out[width // 2 :]
        angles = wanted.frequencies * position
        cos, sin = np.cos(angles) * wanted.factor, np.sin(angles) * wanted.factor
        gap = max(np.abs(first - (cos - sin)).max(), np.abs(second - (sin + cos)).max())
        if not gap <= _TOLERANCE * wanted.factor:
            return False
    return True


def _difference(
    config: Mapping[str, Any], rope: Mapping[str, Any], width: int, expected: int | None
) -> str:
    family = config.get("model_type")
    if expected not in (None, width):
        return (
            f"config.json rotates {expected} of a head's coordinates (partial_rotary_factor "
            f"{rope['partial_rotary_factor']}), mlx-lm's {family} rotates {width}: its log-probs "
            "would be wrong; use a model of another family"
        )
    kind = rope.get("rope_type", "default")
    parameters = ", ".join(
        f"{key} {value}" for key, value in sorted(rope.items()) if isinstance(value, int | float)
    )
    unscaled = "; remove the scaling from config.json to run the model without it"
    return (
        f"config.json asks for rotary embeddings of type {kind} ({parameters}), mlx-lm's {family} "
        f"computes others: its log-probs would be wrong{unscaled if kind != 'default' else ''}"
    )


# Yarn (Peng et al. 2023, arXiv:2309.00071)


def _yarn(
    rope: Mapping[str, Any], plain: npt.NDArray[np.float64], width: int, trained: float
) -> npt.NDArray[np.float64]:
    """Frequencies: plain where they turn often in the trained length, divided where they don't."""
    base, factor = float(rope["rope_theta"]), float(rope.get("factor") or 1.0)

    def dimension(turns: float) -> float:
        return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(float(rope.get("beta_fast") or 32))
    high = dimension(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
    frequencies: npt.NDArray[np.float64] = plain * (1 - ramp) + plain / factor * ramp
    return frequencies


def _yarn_factor(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    mscale, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(mscale) / scale(of_all) if mscale and of_all else scale(1)
