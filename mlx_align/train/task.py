"""What makes one offline command differ from another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from mlx_align.inference.score import Scorer
from mlx_align.train.loop import Objective
from mlx_align.train.setup import Policy, PreparedData, Reader
from mlx_align.types import Logps, TokenizedGroup

# Per group and completion, the log-prob of each token, nats.
GroupLogps = Sequence[tuple[Logps, ...]]


class Task(NamedTuple):
    """What makes one command differ from another.

    Attributes:
        command: Its name.
        title: What the progress bar says.
        read: (data, split, format) -> groups and how they were read.
        check: Refuses data that the loss can't use, before the model is loaded; lines to show.
        needs_reference: Whether training needs the reference's log-probs.
        objective: What to optimise; the reference is None where it is not needed.
        measure: Log-probs of policy and reference, and the groups -> held-out metrics.
        arrange: What to make of tokenised groups before they are batched.
        refine: Of a row of training metrics, means over the update's weight, what is reported.
        has_reference: Whether the policy is held to where it started: held-out data is measured
            against that, and the KL from it is estimated. Without it `measure` gets no reference.
        unit: What a group is called in the summary.
    """

    command: str
    title: str
    read: Reader
    check: Callable[[PreparedData], list[str]]
    needs_reference: bool
    objective: Callable[[Policy, Sequence[TokenizedGroup], GroupLogps | None, Scorer], Objective]
    measure: Callable[[GroupLogps, GroupLogps, Sequence[TokenizedGroup]], dict[str, float]]
    arrange: Callable[[Sequence[TokenizedGroup]], list[TokenizedGroup]] = list
    refine: Callable[[dict[str, float]], dict[str, float]] = dict
    has_reference: bool = True
    unit: str = "pairs"
