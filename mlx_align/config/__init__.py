"""Every command's options: names, defaults, ranges, help, and why a default is what it is.

The only place that knows defaults. The command line and the YAML reader are both made from these
dataclasses (`settings.py`).
"""

from mlx_align.config.evaluation import EvalConfig
from mlx_align.config.offline import (
    DEFAULT_BATCH_SIZE,
    DpoConfig,
    KtoConfig,
    LossConfig,
    RewardConfig,
    SftConfig,
    TrainConfig,
)
from mlx_align.config.on_policy import GrpoConfig, OnPolicyConfig, PpoConfig

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "DpoConfig",
    "EvalConfig",
    "GrpoConfig",
    "KtoConfig",
    "LossConfig",
    "OnPolicyConfig",
    "PpoConfig",
    "RewardConfig",
    "SftConfig",
    "TrainConfig",
]
