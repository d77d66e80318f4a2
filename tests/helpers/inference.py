"""Adapters as a run saves them, and what they score, computed one whole row at a time."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import load as mlx_lm_load

from helpers.forward import scramble
from helpers.paths import TINY_MODEL
from mlx_align.config import DPOConfig
from mlx_align.config.schema import Options, to_yaml
from mlx_align.models.adapters import AdapterLayout, install_adapters, save_adapter
from mlx_align.models.loading import load_module
from mlx_align.types import TokenizedGroup

PROMPT = [{"role": "user", "content": "Is the sun good, or is rain?"}]
ANSWERS = ["yes", "no, never", "the sun is good and the rain is not", "", "yes and no and yes"]


def dpo_config(**options: Any) -> DPOConfig:
    """The options of a run of dpo on the tiny model."""
    return DPOConfig(model=str(TINY_MODEL), data="pairs", **options)


def write_adapter(
    folder: Path,
    layout: AdapterLayout,
    config: Options | None = None,
    *,
    base: Path = TINY_MODEL,
    seed: int = 1,
    size: float = 0.2,
) -> Path:
    """A random adapter in a new folder, with the config.yaml of a run; returns the folder.

    `size` is the standard deviation of what is added to the weights it starts with.
    """
    model = load_module(base)
    mx.random.seed(seed)
    install_adapters(model, layout)
    scramble(model, size)
    folder.mkdir()
    save_adapter(folder, model.trainable_parameters(), layout, str(base))
    if config is not None:
        (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def whole_row_logps(
    group: TokenizedGroup, adapter: Path | None, base: Path = TINY_MODEL
) -> list[np.ndarray]:
    """Per completion the log-probs of its tokens, by stock mlx-lm on one whole row at a time."""
    model, _ = mlx_lm_load(str(base), adapter_path=None if adapter is None else str(adapter))
    rows = []
    for completion in group.completions:
        tokens = np.concatenate([group.prompt, completion])
        logits = np.array(model(mx.array(tokens[None, :-1]))[0].astype(mx.float32), np.float64)
        logits = logits[len(group.prompt) - 1 :]
        peak = logits.max(-1, keepdims=True)
        logps = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
        rows.append(logps[np.arange(len(completion)), completion])
    return rows


def two_model_rewards(
    group: TokenizedGroup,
    policy: Path | None,
    reference: Path | None,
    beta: float,
    base: Path = TINY_MODEL,
) -> np.ndarray:
    """Implicit rewards (N,) of a group, from policy and reference loaded separately."""
    of_policy = whole_row_logps(group, policy, base)
    of_reference = whole_row_logps(group, reference, base)
    pairs = zip(of_policy, of_reference, strict=True)
    return np.array([beta * (ours - theirs).sum() for ours, theirs in pairs])
