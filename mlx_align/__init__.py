"""Preference alignment of language models on Apple Silicon, with MLX."""

from typing import TYPE_CHECKING, Any

from mlx_align.losses.pairwise import dpo_loss
from mlx_align.losses.reward import bt_loss

if TYPE_CHECKING:
    from mlx_align.inference.rerank import Reranker
    from mlx_align.inference.reward_model import RewardModel

__version__ = "0.1.0"
__all__ = ["Reranker", "RewardModel", "bt_loss", "dpo_loss"]


def __getattr__(name: str) -> Any:
    """`Reranker` and `RewardModel`, when asked for: they bring mlx-lm, which takes seconds."""
    if name == "Reranker":
        from mlx_align.inference.rerank import Reranker

        return Reranker
    if name == "RewardModel":
        from mlx_align.inference.reward_model import RewardModel

        return RewardModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
