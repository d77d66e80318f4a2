"""TRL's trainers on top of mlx-align: a TRL script runs here with its import changed.

    from mlx_align.trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=DPOConfig(output_dir="runs/trl", beta=0.1),
        train_dataset=dataset,
    )
    trainer.train()

The classes take TRL's arguments under TRL's names. An argument that has no meaning here is an error
that names it, unless its value has no effect. docs/reference/trl.md, which is generated from the
declarations in `configs.py`, describes them all.

There are three differences to TRL: LoRA is trained, also without `peft_config`; the default
learning rate is one for LoRA; and rows longer than `max_length` are dropped, not truncated.
"""

from mlx_align.trl.configs import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    RewardConfig,
    RLOOConfig,
    SFTConfig,
)
from mlx_align.trl.trainers import (
    DPOTrainer,
    GRPOTrainer,
    KTOTrainer,
    RewardTrainer,
    RLOOTrainer,
    SFTTrainer,
)

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
]
