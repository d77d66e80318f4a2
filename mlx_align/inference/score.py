"""Log-probs or rewards of given completions under a role, batch after batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_align.data.batching import collate_groups, epoch_order
from mlx_align.data.shapes import ROUND, AnyShape, Shape
from mlx_align.models.heads import completion_scores
from mlx_align.models.loading import LanguageModel
from mlx_align.models.logps import batch_token_logps
from mlx_align.models.roles import Tree
from mlx_align.types import GroupBatch, Logps, TokenizedGroup

Scorer = Callable[[Tree, GroupBatch], mx.array]


def make_scorer(model: LanguageModel) -> Scorer:
    """A compiled function (tree, batch) -> log-probs (N, C) of the role `tree`, no dropout.

    One scorer serves all roles of a run: the tree is an argument, so nothing is baked in.
    """
    return _compiled(model, batch_token_logps)


def make_reward_scorer(model: LanguageModel) -> Scorer:
    """The same of a model with a reward head: (tree, batch) -> scores (N, members)."""
    return _compiled(model, completion_scores)


def _compiled(model: LanguageModel, run: Callable[..., mx.array]) -> Scorer:
    def score(tree: Tree, batch: GroupBatch) -> mx.array:
        with model.acting_as(tree):
            return run(model.anatomy, batch, shared=model.shared)

    compiled = mx.compile(score)

    def scorer(tree: Tree, batch: GroupBatch) -> mx.array:
        was_training = model.module.training
        model.module.eval()
        try:
            return compiled(tree, batch)
        finally:
            model.module.train(was_training)

    return scorer


def score_groups(
    scorer: Scorer,
    tree: Tree,
    groups: Sequence[TokenizedGroup],
    shapes: Sequence[AnyShape],
    on_batch: Callable[[list[int], list[tuple[Logps, ...]]], None] | None = None,
    *,
    per_token: bool = True,
) -> list[tuple[Logps, ...]]:
    """Per group and completion, the log-prob of each token in nats, in the groups' order.

    Where the scorer's columns are no tokens (`per_token` false: a reward model's members), each
    completion's whole row is returned. All groups have equally many completions.

    `on_batch` is told the groups' positions and log-probs as they come, to save or to show.
    """
    scores: list[tuple[Logps, ...]] = [()] * len(groups)
    for batch in epoch_order(groups, shapes, seed=None):
        members = [groups[i] for i in batch.indices]
        logps = np.array(scorer(tree, collate_groups(members, batch.shape)))
        rows = len(members[0].completions)
        for b, (index, group) in enumerate(zip(batch.indices, members, strict=True)):
            scores[index] = tuple(
                logps[b * rows + k, : len(completion) if per_token else None].astype(np.float32)
                for k, completion in enumerate(group.completions)
            )
        if on_batch is not None:
            on_batch(list(batch.indices), [scores[i] for i in batch.indices])
    return scores


def run_groups(
    groups: Sequence[TokenizedGroup], run: Callable[[GroupBatch], mx.array], batch_size: int
) -> list[npt.NDArray[np.float32]]:
    """Per group the rows (K, …) that `run` gives of its completions, in the groups' order.

    Nothing is compiled: made for groups that come few at a time and in any size.

    Args:
        groups: Each with as many completions as it has.
        run: A batch of N completions -> (N, …).
        batch_size: Prompts to run at once.
    """
    found: list[npt.NDArray[np.float32]] = [np.zeros((0, 0), np.float32)] * len(groups)

    def size(index: int) -> tuple[int, int, int]:
        group = groups[index]
        longest = max(len(completion) for completion in group.completions)
        return len(group.completions), len(group.prompt), longest

    # Groups of like size run together: equally many completions have to.
    waiting = sorted(range(len(groups)), key=size)
    while waiting:
        count = size(waiting[0])[0]
        batch = [i for i in waiting[:batch_size] if size(i)[0] == count]
        waiting = waiting[len(batch) :]
        sizes = [size(index) for index in batch]
        prompt, completion = (-(-max(s[k] for s in sizes) // ROUND) * ROUND for k in (1, 2))
        shape = Shape(prompt, completion, len(batch))
        rows = np.array(run(collate_groups([groups[i] for i in batch], shape)))
        for place, index in enumerate(batch):
            found[index] = rows[place * count : (place + 1) * count]
    return found
