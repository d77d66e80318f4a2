"""Preference alignment of language models on Apple Silicon, with MLX.

    import mlx_align as ma

    run = ma.dpo(model="mlx-community/Qwen2.5-7B-Instruct-4bit", data=pairs, output="runs/first")
    run.metrics["eval/rewards/accuracies"]
    run.generate("Capital of Australia?")

`sft`, `dpo`, `kto`, `reward`, `ppo` and `grpo` train and return a `Run`; `load_run` opens an
earlier one. `sample`, `judge`, `agreement`, `constitution` and `improve` make preference data;
`evaluate`, `fuse` and `plan` do what the commands of these names do.
`help(mlx_align.dpo)` describes the options. `mlx_align.trl` has TRL's trainers.
"""

from __future__ import annotations

import os
import resource

# mlx reads it at its first evaluation: a narrow evaluation order keeps fewer activations in memory
# (it cut a checkpointed peak by 42%).
os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1")

# mlx-lm raises the limit of open files when it is imported, and fails where 4,096 are not allowed.
if resource.getrlimit(resource.RLIMIT_NOFILE)[1] in range(4096):
    _set_limit = resource.setrlimit

    def _set_allowed_limit(which: int, limits: tuple[int, int]) -> None:
        hard = resource.getrlimit(which)[1]
        if which == resource.RLIMIT_NOFILE:
            limits = (min(limits[0], hard), hard)
        _set_limit(which, limits)

    resource.setrlimit = _set_allowed_limit

# Not from typing, which takes milliseconds in which Ctrl-C would end in a traceback.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from mlx_align.api import (
        agreement,
        constitution,
        dpo,
        evaluate,
        fuse,
        grpo,
        improve,
        judge,
        kto,
        plan,
        ppo,
        reward,
        sample,
        sft,
    )
    from mlx_align.errors import (
        ConfigError,
        DataError,
        MlxAlignError,
        ModelError,
        TrainingError,
        WriteError,
    )
    from mlx_align.inference.generate import TextGenerator
    from mlx_align.inference.rerank import Reranker
    from mlx_align.inference.reward_model import RewardModel
    from mlx_align.losses.pairwise import dpo_loss
    from mlx_align.losses.registry import PairwiseLoss
    from mlx_align.losses.reward import bt_loss
    from mlx_align.run import Run, load_run
    from mlx_align.training.callbacks import Callback
    from mlx_align.types import PairLogps

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "ConfigError",
    "DataError",
    "MlxAlignError",
    "ModelError",
    "PairLogps",
    "PairwiseLoss",
    "Reranker",
    "RewardModel",
    "Run",
    "TextGenerator",
    "TrainingError",
    "WriteError",
    "agreement",
    "bt_loss",
    "constitution",
    "dpo",
    "dpo_loss",
    "evaluate",
    "fuse",
    "grpo",
    "improve",
    "judge",
    "kto",
    "load_run",
    "plan",
    "ppo",
    "reward",
    "sample",
    "sft",
]

# Imported when first used: mlx-lm and the libraries behind it take seconds.
_MODULES = {
    "api": (
        "agreement",
        "constitution",
        "dpo",
        "evaluate",
        "fuse",
        "grpo",
        "improve",
        "judge",
        "kto",
        "plan",
        "ppo",
        "reward",
        "sample",
        "sft",
    ),
    "errors": (
        "ConfigError",
        "DataError",
        "MlxAlignError",
        "ModelError",
        "TrainingError",
        "WriteError",
    ),
    "inference.generate": ("TextGenerator",),
    "inference.rerank": ("Reranker",),
    "inference.reward_model": ("RewardModel",),
    "losses.pairwise": ("dpo_loss",),
    "losses.registry": ("PairwiseLoss",),
    "losses.reward": ("bt_loss",),
    "run": ("Run", "load_run"),
    "training.callbacks": ("Callback",),
    "types": ("PairLogps",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"mlx_align.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
