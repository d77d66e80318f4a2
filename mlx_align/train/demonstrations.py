"""Demonstrations beside what a policy learns from its own samples: InstructGPT's PPO-ptx.

The mean log-loss of their tokens joins the policy's loss, so that training on rewards does not
unlearn them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_align.config import DEFAULT_BATCH_SIZE, PpoConfig
from mlx_align.data.batching import Microbatch, collate_groups, microbatch_stream
from mlx_align.data.formats import read_supervised
from mlx_align.data.groups import last_answers
from mlx_align.data.shapes import BatchLimit, plan_shapes
from mlx_align.data.tokenize import tokenize_groups
from mlx_align.errors import ConfigError
from mlx_align.losses.masking import masked_sum
from mlx_align.models.loading import LanguageModel
from mlx_align.models.roles import Tree
from mlx_align.train.shares import role_logps
from mlx_align.train.update import Loss, Ready, Sums
from mlx_align.types import GroupBatch, TokenizedGroup

# Their shapes are compiled beside those of the rollouts.
SHAPES = 4


class WithDemonstrations(NamedTuple):
    """What the microbatches of an update share."""

    own: Any  # of the policy's loss
    scale: mx.array  # what a demonstration's token counts: the coefficient by their number


def check_demonstrations(config: PpoConfig) -> None:
    """Refuse one option without the other.

    Raises:
        ConfigError: Only one was given.
    """
    if config.ptx_coef > 0 and config.ptx_data is None:
        raise ConfigError(f"--ptx-coef {config.ptx_coef:g}: of what data? give --ptx-data")
    if config.ptx_data is not None and config.ptx_coef == 0:
        raise ConfigError(f"--ptx-data {config.ptx_data}: has no effect without --ptx-coef")


def joined(loss: Loss, model: LanguageModel, *, grad_checkpoint: bool) -> Loss:
    """`loss`, which also takes demonstrations (a bare GroupBatch) as microbatches.

    Their share is the coefficient times the mean log-loss of all their tokens in the update.

    Source: Ouyang et al. 2022 (InstructGPT), eq. 2.
    """

    def share(tree: Tree, batch: Any, totals: WithDemonstrations) -> tuple[mx.array, Sums]:
        if not isinstance(batch, GroupBatch):
            return loss(tree, batch, totals.own)
        logps = role_logps(model, tree, batch, grad_checkpoint=grad_checkpoint)
        nll = -masked_sum(logps, batch.completion_mask, axis=None)
        sums = {
            "ptx/nll": mx.stop_gradient(nll),
            "ptx/tokens": batch.completion_mask.sum().astype(mx.float32),
        }
        return totals.scale * nll, sums

    return share


def read_demonstrations(config: PpoConfig, tokenizer: Any) -> list[TokenizedGroup]:
    """The demonstrations of `--ptx-data`, tokenised.

    Raises:
        DataError: They can't be used; the text names file and line.
    """
    assert config.ptx_data is not None
    groups, _ = read_supervised(config.ptx_data, "train")
    return tokenize_groups(
        last_answers(groups), tokenizer=tokenizer, max_seq_length=config.max_seq_length
    )[0]


class Demonstrations:
    """The demonstrations of a run, a few with every update.

    Args:
        config: The options.
        groups: The demonstrations, as `read_demonstrations` reads them.

    Attributes:
        taken: Microbatches taken so far, which is the place in the data.
    """

    def __init__(self, config: PpoConfig, groups: Sequence[TokenizedGroup]) -> None:
        self._groups = groups
        size = config.batch_size or DEFAULT_BATCH_SIZE
        self._shapes = plan_shapes(self._groups, BatchLimit(size), SHAPES)
        self._config, self.taken = config, 0

    def take(self) -> tuple[list[Ready], mx.array]:
        """As many microbatches as an update has of the policy's, and what their tokens count."""
        count = self._config.grad_accumulation_steps
        stream: Iterator[Microbatch] = microbatch_stream(
            self._groups, self._shapes, seed=self._config.seed, start=self.taken
        )
        micro = list(islice(stream, count))
        self.taken += count
        batches = [
            Ready(
                collate_groups([self._groups[i] for i in one.indices], one.shape),
                one.shape,
                partial(self._sources, one),
            )
            for one in micro
        ]
        tokens = sum((batch.arrays.completion_mask.sum() for batch in batches), mx.array(0))
        return batches, self._config.ptx_coef / mx.maximum(tokens.astype(mx.float32), 1.0)

    def _sources(self, micro: Microbatch) -> list[str]:
        return [self._groups[i].source for i in micro.indices]
