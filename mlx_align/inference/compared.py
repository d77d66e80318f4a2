"""Policy and reference of a run on one base, and their log-probs of the same completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from mlx_align.data.batching import scored
from mlx_align.data.shapes import BatchLimit, plan_shapes
from mlx_align.errors import ModelError
from mlx_align.inference.finished import Finished
from mlx_align.inference.implicit import computing_as_trained
from mlx_align.inference.score import Scorer, score_groups
from mlx_align.inference.statistics import Floats
from mlx_align.inference.trees import load_trees
from mlx_align.models.loading import LanguageModel, ModelFolder
from mlx_align.models.roles import Tree
from mlx_align.types import TokenizedGroup

# Tokens of a microbatch, padding counted; one group at least, whatever its size.
BATCH_TOKENS = 2048


class Roles(NamedTuple):
    """One base in memory, and the two trees that it plays."""

    model: LanguageModel
    policy: Tree
    reference: Tree


def load_roles(folder: ModelFolder, run: Finished) -> Roles:
    """Load the base once, with the run's policy and the reference it was held to.

    The reference is the tree the run started from: its init adapter, or the bare base.

    Raises:
        ModelError: The model can't be loaded, the run is not one of it, or the adapter that the
            run started from is gone.
    """
    model, (policy, reference) = load_trees(folder, [run.folder, _init_adapter(run)])
    return Roles(computing_as_trained(model, run), policy, reference)


def _init_adapter(run: Finished) -> Path | None:
    if run.config is None or run.config.init_adapter is None:
        return None
    init = Path(run.config.init_adapter).expanduser()
    if not init.is_dir():
        raise ModelError(
            f"{run.folder}: started from --init-adapter {init}, which is not there (seen from "
            f"{Path.cwd()}), and without it there is no reference; put it back, or run this from "
            "where the run was started"
        )
    return init


class Bar(Protocol):
    """One piece of counted work."""

    def advance(self, count: int = 1) -> None:
        """So much more is done."""


Bars = Callable[[str, int], AbstractContextManager[Bar]]


def compared_logps(
    scorer: Scorer, roles: Roles, groups: Sequence[TokenizedGroup], label: str, bars: Bars
) -> tuple[Floats, Floats]:
    """Log-probs of the reference, and log-ratios policy − reference: nats, (groups, completions).

    A log-ratio is the sum of differences per token; all groups have equally many completions.
    """
    shapes = plan_shapes(groups, BatchLimit(tokens=BATCH_TOKENS))
    found = []
    with bars(label, 2 * len(groups)) as bar:
        for tree in (roles.policy, roles.reference):
            found.append(
                score_groups(
                    scorer, tree, groups, shapes, on_batch=lambda at, _: bar.advance(len(at))
                )
            )
    policy, reference = found
    size = len(groups), len(groups[0].completions)
    logps, logratios = np.zeros(size), np.zeros(size)
    for i, group in enumerate(groups):
        for k in range(size[1]):
            mask = scored(group, k)
            theirs = reference[i][k][mask].astype(np.float64)
            logps[i, k] = theirs.sum()
            logratios[i, k] = (policy[i][k][mask] - theirs).sum()
    return logps, logratios
