"""What a run puts through its model, as far as memory depends on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_align.data.shapes import AnyShape, BatchLimit
from mlx_align.models.generation import ROWS_AT_ONCE

# Adapters are float32 whatever the model's dtype, and what they multiply is float32 with them,
# unless they are cast where they compute.
ADAPTER_BYTES = 4


@dataclass(frozen=True)
class Sampling:
    """What a policy that is trained on its own samples says.

    Attributes:
        prompts: Of a rollout batch.
        held_out: Prompts that evaluations answer, once each.
        group_size: Completions of a prompt.
        prompt: The longest prompt, tokens.
        completion: The longest completion, tokens.
        least_group: The fewest completions of a prompt that can be learned from.
    """

    prompts: int
    held_out: int
    group_size: int
    prompt: int
    completion: int
    least_group: int = 1

    @property
    def rows(self) -> int:
        """Completions that are decoded together."""
        return min(ROWS_AT_ONCE, max(self.prompts * self.group_size, self.held_out))


@dataclass(frozen=True)
class Workload:
    """What a run puts through the model at once, and what it trains.

    Attributes:
        shapes: The shapes of its microbatches.
        limit: What decided how many prompts a shape holds.
        rows: Completions of a prompt that run together: 2 for pairs.
        accumulation: Microbatches of an update.
        fine_tune_type: lora, dora or full.
        rank: Of the adapters.
        num_layers: Blocks trained, from the last; −1 for all.
        keys: Names of the layers adapted within a block; None for all.
        dropout: Whether adapters drop inputs.
        grad_checkpoint: Whether blocks are recomputed in the backward pass.
        shared: Whether completions share their prompt's keys and values.
        adapter_bytes: Of an adapter's number where it computes: 2 if cast to 16 bits.
        vocabulary: Whether completions meet the vocabulary head; a reward model's head is one row.
        sampling: Of a run that is trained on its own samples.
        critic: Whether a critic is trained beside the policy, as large as it.
        further_bytes: What reward models take.
    """

    shapes: tuple[AnyShape, ...]
    limit: BatchLimit = field(default_factory=BatchLimit)
    rows: int = 2
    accumulation: int = 8
    fine_tune_type: str = "lora"
    rank: int = 16
    num_layers: int = -1
    keys: tuple[str, ...] | None = None
    dropout: bool = False
    grad_checkpoint: bool = True
    shared: bool = True
    adapter_bytes: int = ADAPTER_BYTES
    vocabulary: bool = True
    sampling: Sampling | None = None
    critic: bool = False
    further_bytes: int = 0
