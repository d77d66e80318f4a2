"""Preference alignment of language models on Apple Silicon, with MLX."""

from mlx_align.losses.pairwise import dpo_loss
from mlx_align.losses.reward import bt_loss

__version__ = "0.1.0"
__all__ = ["bt_loss", "dpo_loss"]
