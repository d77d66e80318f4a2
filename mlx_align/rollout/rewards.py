"""Reward completions: reward functions and a reward model, each with its weight."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from mlx_align.errors import ConfigError, RewardError
from mlx_align.inference.reward_model import RewardModelSource
from mlx_align.models.adapters import fingerprint_folder, read_layout
from mlx_align.models.loading import ModelFolder
from mlx_align.rollout.builtin_rewards import CompletionFacts
from mlx_align.rollout.reward_functions import (
    MAX_REWARD,
    RewardSource,
    RewardTable,
    combine,
    open_rewards,
    parse_rewards,
)
from mlx_align.rollout.reward_models import CompletionScorer
from mlx_align.rollout.sampler import Completions
from mlx_align.types import PromptGroup

# The name of the reward model's column in metrics.
MODEL_NAME = "reward_model"


@dataclass(frozen=True)
class RewardSettings:
    """The rewards of a run.

    Attributes:
        functions: Reward functions: specs as on the command line, or Python callables.
        model: A reward model: a run folder, or the folder or hub name of a classifier.
        model_weight: The weight of the reward model in the total.
        timeout: Seconds that one call of a function given by its spec may take.
    """

    functions: tuple[RewardSource, ...]
    model: str | None
    model_weight: float
    timeout: float


def reward_settings(
    functions: Sequence[RewardSource] | None, model: str | None, weight: float, timeout: float
) -> RewardSettings | None:
    """The rewards that the options name, or None.

    Raises:
        ConfigError: A reward function can't be read.
    """
    if not functions and model is None:
        return None
    parse_rewards(functions or ())
    return RewardSettings(tuple(functions or ()), model, weight, timeout)


def require_rewards(settings: RewardSettings | None) -> RewardSettings:
    """The rewards to train on.

    Raises:
        ConfigError: The options name no reward.
    """
    if settings is None:
        raise ConfigError(
            "--reward or --reward-model is missing: name the reward to optimise, for example "
            "--reward exact_answer or --reward-model runs/rm"
        )
    return settings


class Rewards(AbstractContextManager["Rewards"]):
    """Turns completions into a `RewardTable`; as a context, ends the reward process on exit.

    Args:
        settings: The rewards.
        score_model: Scores completions by the reward model; None without one. It can be set later
            (`score_model`), so that functions are imported before models are loaded.
        note: Called with a line when a function raised and is called again. It can be set later.

    Raises:
        ConfigError: A reward function can't be imported.
    """

    def __init__(
        self,
        settings: RewardSettings,
        score_model: CompletionScorer | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._settings, self.score_model, self.note = settings, score_model, note
        self._functions = open_rewards(
            parse_rewards(settings.functions), settings.timeout, lambda line: self.note(line)
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
        """Check that the data has the columns that the rewards need.

        Raises:
            ConfigError: A column is missing.
        """
        self._functions.check(groups)

    def __call__(self, completions: Completions) -> RewardTable:
        """The rewards of N completions.

        Raises:
            RewardError: A reward function failed, or rewards are too large.
        """
        size, limit = completions.group_size, completions.mask.shape[1]
        facts = [
            CompletionFacts(
                len(ids),
                bool(finished),
                limit,
                tuple(ids.tolist()),
                completions.opened[n // size] if completions.opened else "",
            )
            for n, (ids, finished) in enumerate(
                zip(completions.token_ids(), completions.finished, strict=True)
            )
        ]
        table = self._functions(
            [prompt.text for prompt in completions.prompts],
            by_prompt(completions.texts, size),
            by_prompt(facts, size),
        )
        if self.score_model is None:
            return table
        scores = self.score_model(completions)
        weight = self._settings.model_weight
        if not np.abs(scores[~np.isnan(scores)] * weight).max(initial=0.0) <= MAX_REWARD:
            raise RewardError(
                f"--reward-model {self._settings.model}: a score times its weight {weight:g} is "
                f"above {MAX_REWARD:g}, which overflows in training; lower --reward-model-weight"
            )
        values = np.column_stack([table.values, scores])
        weights = [*table.weights, weight]
        return combine([*table.names, MODEL_NAME], values, weights)


def by_prompt(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Items of N completions as one list per prompt."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def fingerprint_reward_model(model: RewardModelSource, folder: ModelFolder) -> str:
    """Hash of a reward model, without its base if that is the policy's, in `folder`."""
    if model.run is None:
        content = fingerprint_folder(model.base.path)
    else:
        content = repr(read_layout(model.run)) + fingerprint_folder(model.run, "*.safetensors")
        if model.base.path.resolve() != folder.path.resolve():
            content += fingerprint_folder(model.base.path)
    return _hash(content.encode())


def fingerprint_rewards(
    settings: RewardSettings,
    model: RewardModelSource | None,
    model_name: str,
    folder: ModelFolder,
) -> dict[str, str]:
    """Hashes of the rewards, to detect changes when a run is resumed.

    They cover the reward model, files of reward functions, and the source of Python callables, but
    not the modules that these import.

    Args:
        settings: The rewards.
        model: The reward model that the settings name; None if they name none.
        model_name: What the reward model is called in messages.
        folder: The policy's base, which is not part of these hashes.

    Raises:
        ModelError: The reward model can't be read.
        ConfigError: A file can't be read.
    """
    found = {}
    if model is not None:
        found[model_name] = fingerprint_reward_model(model, folder)
    for spec in parse_rewards(settings.functions):
        if spec.module.endswith(".py"):
            try:
                source = Path(spec.module).expanduser().read_bytes()
            except OSError as error:
                reason = error.strerror or error
                raise ConfigError(f"{spec.label}: can't be read ({reason})") from error
            found[f"reward file {spec.module}"] = _hash(source)
        elif spec.callable is not None:
            try:
                text = inspect.getsource(spec.callable)
            except (OSError, TypeError):  # an object, or typed into a plain interpreter
                continue
            found[spec.label] = _hash(text.encode())
    return found


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
