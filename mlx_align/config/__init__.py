"""The options of every command: names, types, ranges, defaults and help.

The config classes declare the options, and give reasons for the defaults; `schema.py` checks them.
"""

from mlx_align.config.evaluation import (
    ChatConfig,
    EvalConfig,
    RerankConfig,
    SampleConfig,
    ScoreConfig,
    ScorerConfig,
)
from mlx_align.config.judges import ConstitutionConfig, ImproveConfig, JudgeConfig, SelectConfig
from mlx_align.config.labels import AgreementConfig, LabelConfig
from mlx_align.config.offline import (
    DEFAULT_BATCH_SIZE,
    DPOConfig,
    KTOConfig,
    LabelOptions,
    LossConfig,
    RewardConfig,
    SFTConfig,
    TrainConfig,
)
from mlx_align.config.on_policy import GRPOConfig, OnPolicyConfig, PPOConfig
from mlx_align.config.schema import Options, make_config
from mlx_align.config.tools import (
    AdapterExportConfig,
    CacheConfig,
    CheckDataConfig,
    ConvertDataConfig,
    ExportConfig,
    FuseConfig,
    PlanConfig,
    ReportConfig,
    SelftestConfig,
)

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "TRAINING_CONFIGS",
    "AdapterExportConfig",
    "AgreementConfig",
    "CacheConfig",
    "ChatConfig",
    "CheckDataConfig",
    "ConstitutionConfig",
    "ConvertDataConfig",
    "DPOConfig",
    "EvalConfig",
    "ExportConfig",
    "FuseConfig",
    "GRPOConfig",
    "ImproveConfig",
    "JudgeConfig",
    "KTOConfig",
    "LabelConfig",
    "LabelOptions",
    "LossConfig",
    "OnPolicyConfig",
    "Options",
    "PPOConfig",
    "PlanConfig",
    "ReportConfig",
    "RerankConfig",
    "RewardConfig",
    "SFTConfig",
    "SampleConfig",
    "ScoreConfig",
    "ScorerConfig",
    "SelectConfig",
    "SelftestConfig",
    "TrainConfig",
    "make_config",
]

# The training commands by name.
TRAINING_CONFIGS: dict[str, type[TrainConfig]] = {
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "sft": SFTConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
}
