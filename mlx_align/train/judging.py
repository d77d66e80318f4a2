"""What completions earn: reward functions and reward models, each with its weight.

A reward model that was trained on the policy's own base is a tree on it, and is swapped in; any
other is a second model in memory, which is said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from mlx_align.data.shapes import AnyShape
from mlx_align.errors import ConfigError, ModelError
from mlx_align.inference.reward_model import RewardModel
from mlx_align.inference.score import make_reward_scorer, score_groups
from mlx_align.models.adapters import (
    ADAPTER_CONFIG,
    AdapterLayout,
    fingerprint_folder,
    load_tree,
    read_layout,
)
from mlx_align.models.heads import HEAD_NAME, has_head, put_head, read_head
from mlx_align.models.loading import LanguageModel, ModelFolder, open_model
from mlx_align.models.roles import Tree
from mlx_align.rollout.experience import Rollouts
from mlx_align.rollout.rewards import (
    CompletionFacts,
    RewardFunctions,
    RewardTable,
    combine,
    open_rewards,
    parse_rewards,
)
from mlx_align.types import Message, PromptGroup

# What a reward model's column is called in metrics.
MODEL_NAME = "reward_model"
ScoreModel = Callable[[Rollouts], npt.NDArray[np.float64]]


class Wanted(NamedTuple):
    """What is to judge, as options name it."""

    functions: tuple[str, ...]
    model: str | None
    weight: float
    timeout: float


def same_base(run: Path, folder: ModelFolder, layout: AdapterLayout) -> bool:
    """Whether a reward model's run can be swapped into the policy's base.

    Raises:
        ModelError: The run can't be read.
    """
    if read_layout(run).fine_tune_type != layout.fine_tune_type:
        return False
    return base_of(run).resolve() == folder.path.resolve()


def base_of(run: Path) -> Path:
    """The model folder that a run was trained on.

    Raises:
        ModelError: The run does not say.
    """
    try:
        content = json.loads((run / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return Path(str(content["model"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{run / ADAPTER_CONFIG}: names no base model") from error


def reward_tree(run: Path, model: LanguageModel, fresh: Tree, layout: AdapterLayout) -> Tree:
    """The reward model of `run` as a tree on the policy's base, at its own rank.

    Args:
        run: Of `mlx-align reward`.
        model: The policy's base, with adapters wherever policy or reward model have some.
        fresh: Such adapters, as they were made.
        layout: What they were made by.

    Raises:
        ModelError: It does not fit.
    """
    tree = load_tree(run, fresh, layout, keep_rank=True)
    head = put_head(model.anatomy, read_head(run))
    # It is no part of what is trained here; see `ValueHead`.
    head.freeze()
    return {**tree, HEAD_NAME: {"weight": head.weight}}


def swapped(model: LanguageModel, tree: Tree, shapes: Sequence[AnyShape]) -> ScoreModel:
    """Scores by a reward model on the policy's own base: the mean of its members."""
    scorer = make_reward_scorer(model)

    def score(rollouts: Rollouts) -> npt.NDArray[np.float64]:
        found = score_groups(scorer, tree, rollouts.groups, shapes, per_token=False)
        return np.array([row.mean() for group in found for row in group], np.float64)

    return score


def apart(model: RewardModel) -> ScoreModel:
    """Scores by a reward model with a base of its own, which reads the completions as text."""

    def score(rollouts: Rollouts) -> npt.NDArray[np.float64]:
        size = rollouts.group_size
        groups = [
            _answered(prompt.text, rollouts.texts[place * size : (place + 1) * size])
            for place, prompt in enumerate(rollouts.prompts)
        ]
        out: list[float] = []
        for scored in model.score_groups(groups):
            none = [float("nan")] * size
            out += none if scored.scores is None else [float(value) for value in scored.scores]
        return np.array(out, np.float64)

    return score


def _answered(group: PromptGroup, texts: Sequence[str]) -> PromptGroup:
    if isinstance(group.prompt, str):
        return PromptGroup(group.prompt, tuple(texts), group.source)
    turns = tuple((Message("assistant", text),) for text in texts)
    return PromptGroup(group.prompt, turns, group.source)


def open_second_model(name: str) -> RewardModel:
    """A reward model with a base of its own: a run of another model, or a classifier.

    Raises:
        ModelError: It is neither.
    """
    run = Path(name).expanduser()
    if has_head(run):
        return RewardModel.load(str(base_of(run)), run)
    return RewardModel.load(name)


def fingerprint_rewards(wanted: Wanted, name: str, folder: ModelFolder) -> dict[str, str]:
    """Hashes of what judges: a model, called `name`, and the files of functions.

    What a file imports, and what modules hold, is not looked at.

    Args:
        wanted: What is to judge.
        name: What its model is called.
        folder: The policy's base, which a reward model on it is not hashed with again.

    Raises:
        ModelError: The model can't be opened.
        ConfigError: A file can't be read.
    """
    found = {}
    if wanted.model is not None:
        run = Path(wanted.model).expanduser()
        if has_head(run):
            base = base_of(run)
            own = repr(read_layout(run)) + fingerprint_folder(run, "*.safetensors")
            apart = base.resolve() != folder.path.resolve()
            parts = own + (fingerprint_folder(open_model(str(base)).path) if apart else "")
        else:
            parts = fingerprint_folder(open_model(wanted.model).path)
        found[name] = _digest(parts.encode())
    for spec in parse_rewards(wanted.functions):
        if spec.module.endswith(".py"):
            try:
                content = Path(spec.module).expanduser().read_bytes()
            except OSError as error:
                reason = error.strerror or error
                raise ConfigError(f"--reward {spec.text}: can't be read ({reason})") from error
            found[f"reward file {spec.module}"] = _digest(content)
    return found


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class Judge(AbstractContextManager["Judge"]):
    """Rewards of rollouts; as a context, ends the process of the user's functions."""

    def __init__(self, wanted: Wanted, score_model: ScoreModel | None) -> None:
        self._wanted, self._score_model = wanted, score_model
        self._functions: RewardFunctions = open_rewards(
            parse_rewards(wanted.functions), wanted.timeout
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._functions.close()

    def check(self, groups: Sequence[PromptGroup]) -> None:
        """Whether the data has what the rewards need.

        Raises:
            ConfigError: It has not.
        """
        self._functions.check(groups)

    def __call__(self, rollouts: Rollouts) -> RewardTable:
        """What each completion gets.

        Raises:
            TrainingError: A reward function failed.
        """
        size, limit = rollouts.group_size, rollouts.mask.shape[1]
        facts = [
            CompletionFacts(int(length), bool(ended), limit)
            for length, ended in zip(rollouts.lengths, rollouts.ended, strict=True)
        ]
        table = self._functions(
            [prompt.text for prompt in rollouts.prompts],
            by_prompt(rollouts.texts, size),
            by_prompt(facts, size),
        )
        if self._score_model is None:
            return table
        values = np.column_stack([table.values, self._score_model(rollouts)])
        weights = [*table.weights, self._wanted.weight]
        return combine([*table.names, MODEL_NAME], values, weights)


def by_prompt(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Items of all completions, prompt by prompt."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def wanted_rewards(
    functions: tuple[str, ...] | None, model: str | None, weight: float, timeout: float
) -> Wanted | None:
    """What options name as rewards; None where they name nothing.

    Raises:
        ConfigError: A function's spec can't be read.
    """
    if not functions and model is None:
        return None
    parse_rewards(functions or ())
    return Wanted(functions or (), model, weight, timeout)


def require_rewards(wanted: Wanted | None) -> Wanted:
    """The rewards to train on.

    Raises:
        ConfigError: None is named.
    """
    if wanted is None:
        raise ConfigError(
            "--reward or --reward-model is missing: name what is to be optimised, like "
            "--reward exact_answer or --reward-model runs/rm"
        )
    return wanted
