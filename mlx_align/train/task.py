"""What makes one offline command differ from another."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_align.data.shapes import BatchLimit
from mlx_align.data.splits import Reader
from mlx_align.inference.score import Scorer, make_scorer
from mlx_align.models.loading import LanguageModel, ModelFolder
from mlx_align.models.roles import Tree
from mlx_align.train.display import Display
from mlx_align.train.loop import Objective
from mlx_align.train.setup import Policy, PreparedData
from mlx_align.types import Logps, TokenizedGroup

# Per group and completion, the log-prob of each token, nats.
GroupLogps = Sequence[tuple[Logps, ...]]


def how_to_talk(folder: ModelFolder, run: Path) -> str:
    """The command that lets a person try the result with stock mlx-lm."""
    where = f"--model {shlex.quote(folder.name)} --adapter-path {shlex.quote(str(run))}"
    if folder.tokenizer.has_chat_template:
        return f"mlx_lm.chat {where}"
    return f"mlx_lm.generate {where} --prompt 'Once upon a time'"


class Conclusion(NamedTuple):
    """What is said of a finished run's held-out data, where answers of its own say nothing.

    Attributes:
        facts: For the summary, under `held_out`.
        samples: Rows of samples.jsonl.
        text: For people.
    """

    facts: dict[str, Any]
    samples: list[dict[str, Any]]
    text: str


# (scorer, trained tree, model folder, held-out groups, limit of their batches, display) -> what is
# said of them.
Conclude = Callable[
    [Scorer, Tree, ModelFolder, Sequence[TokenizedGroup], BatchLimit, Display], Conclusion
]


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
        scorer: Makes what runs held-out data (and the reference).
        packs: Whether a microbatch's completions all run together, so that they can be packed.
        per_token: Whether that gives a number per token: log-probs, not rewards.
        conclude: What to say at the end of all held-out data; None for a policy, whose answers
            before and after and whose KL say it.
        afterwards: The command with which a person tries the result.
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
    scorer: Callable[[LanguageModel], Scorer] = make_scorer
    packs: bool = True
    per_token: bool = True
    conclude: Conclude | None = None
    afterwards: Callable[[ModelFolder, Path], str] = how_to_talk
