"""What ppo and grpo are to a run: learners that are told when to learn from a rollout batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import mlx.optimizers as optim

from mlx_align.models.roles import Tree
from mlx_align.train.workplace import Experience, Workplace


class Learned(NamedTuple):
    """What the updates of a rollout batch were.

    Attributes:
        metrics: For the report.
        first_deviation: Mean |ratio − 1| in the first update of the policy, None if there was none.
        skipped: Why updates were left out, a line each.
    """

    metrics: dict[str, float]
    first_deviation: float | None
    skipped: Sequence[str] = ()


class Learner(Protocol):
    """What makes ppo and grpo differ from another.

    Attributes:
        title: What the progress bar says.
        dynamic: Whether prompts whose completions all earn the same are replaced by others.
        trees: What is trained, by name; `policy` first.
        optimizers: By name.
    """

    title: str
    dynamic: bool
    trees: dict[str, Tree]
    optimizers: dict[str, optim.Optimizer]

    def begin(self) -> str:
        """Before the first rollout batch of a new run; a line to show."""

    def learn(self, experience: Experience, step: int, rate: float) -> Learned:
        """The updates of the rollout batch `step` (from 0 on)."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold beside trees and optimizers, as JSON has it."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""


# (options, workplace) -> the learner.
MakeLearner = Callable[[Any, Workplace], Learner]
