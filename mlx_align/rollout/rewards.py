"""Rewards of sampled completions, from built-in and from the user's own functions.

A reward is `f(prompts, completions, **columns) -> list[float | None]`: prompts as they are in the
data (text, or a list of {"role", "content"} objects), completions as text without their end token,
and every other field of the data as a list (None where a row lacks it), all with one entry a
completion. They are passed by name, and only those that the function takes. Fields called
`prompts` or `completions` are not passed. None: this completion has no reward of this function.

Nothing runs a function that the command line or the user's own configuration file did not name;
what is named runs with all the user's rights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mlx_align.errors import ConfigError, TrainingError
from mlx_align.rollout.builtin_rewards import CompletionFacts, Reward
from mlx_align.rollout.reward_process import RewardProcess, WorkerFailure
from mlx_align.rollout.reward_specs import RewardSpec, parse_rewards
from mlx_align.rollout.reward_worker import RESERVED
from mlx_align.types import PromptGroup, Text

__all__ = [
    "CompletionFacts",
    "RewardFunctions",
    "RewardSpec",
    "RewardTable",
    "combine",
    "open_rewards",
    "parse_rewards",
]

Values = npt.NDArray[np.float64]

# Importing may mean loading a model of the user's: it may take longer than a call.
IMPORT_SECONDS = 120.0
# Looking for the completion at which a function raised only serves the message.
_LOCATE_SECONDS = 10.0
_SHOWN = 60


@dataclass(frozen=True)
class RewardTable:
    """What N completions got from R rewards.

    Attributes:
        names: Of the rewards.
        values: (N, R) float64, NaN where a reward gave None.
        weights: (R,) float64.
        total: (N,) float64, the sum of weight × value over the rewards that gave one: None counts
            as absent. NaN where no reward of a weight other than 0 gave one.
    """

    names: tuple[str, ...]
    values: Values
    weights: Values
    total: Values

    def by_group(self, size: int) -> tuple[Values, Values]:
        """Rewards (K, B, size) of the K whose weight is not 0, and these weights (K,)."""
        counted = self.weights != 0
        return self.values.T[counted].reshape(int(counted.sum()), -1, size), self.weights[counted]

    def metrics(self) -> dict[str, float]:
        """`rewards/<name>/mean`, `…/std` (n − 1) and `…/none`, the share without a value.

        A mean of no values and a deviation of fewer than two are left out.
        """
        found = {}
        for name, column in zip(self.names, self.values.T, strict=True):
            given = column[~np.isnan(column)]
            if len(given):
                found[f"rewards/{name}/mean"] = float(given.mean())
            if len(given) > 1:
                found[f"rewards/{name}/std"] = float(given.std(ddof=1))
            if len(column):
                found[f"rewards/{name}/none"] = 1 - len(given) / len(column)
        return found


def combine(names: Sequence[str], values: Values, weights: Sequence[float]) -> RewardTable:
    """The table of rewards (N, R) with their weights (R,); NaN among the rewards is None."""
    by_weight = np.asarray(weights, np.float64)
    given = ~np.isnan(values)
    total = np.where(given, values, 0.0) @ by_weight
    total[~(given & (by_weight != 0)).any(axis=1)] = np.nan
    return RewardTable(tuple(names), values, by_weight, total)


class RewardFunctions:
    """Rewards ready to be called; make them with `open_rewards`, and close them.

    User's functions share one process, which lives until then: what they load or remember stays.
    """

    def __init__(self, specs: Sequence[RewardSpec], timeout: float) -> None:
        self.specs = tuple(specs)
        self._timeout = timeout
        self._process: RewardProcess | None = None
        # What each user's function takes: by its place among the specs.
        self._takes: dict[int, Mapping[str, Any]] = {}
        own = [place for place, spec in enumerate(self.specs) if spec.builtin is None]
        if own:
            self._process = RewardProcess()
            try:
                for place in own:
                    self._takes[place] = self._load(self.specs[place], self._process)
            except BaseException:
                self.close()
                raise

    def _load(self, spec: RewardSpec, process: RewardProcess) -> Mapping[str, Any]:
        request = {"target": spec.module, "name": spec.function}
        try:
            reply = process.ask("load", request, max(self._timeout, IMPORT_SECONDS))
        except WorkerFailure as failure:
            raise ConfigError(
                f"--reward {spec.text}: while {spec.module} was imported: {failure}"
            ) from None
        if "error" in reply:
            raise ConfigError(f"--reward {spec.text}: {reply['error']}")
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process of the user's functions, if there is one."""
        if self._process is not None:
            self._process.close()

    @property
    def pid(self) -> int | None:
        """The id of that process."""
        return None if self._process is None else self._process.pid

    def check(self, groups: Sequence[PromptGroup]) -> None:
        """Whether the data has the fields that the rewards need; to be asked before training.

        Raises:
            ConfigError: It lacks one; the text says which reward needs it.
        """
        columns = {name for group in groups for name in group.columns}
        has = ", ".join(sorted(columns)) or "none beside the prompt"
        for place, spec in enumerate(self.specs):
            if spec.builtin is not None:
                needed = [] if spec.column is None else [spec.column]
                for group in groups:
                    _builtin(spec, spec.builtin, "", CompletionFacts(1, True, 1), group)
            else:
                needed = [name for name in self._takes[place]["required"] if name not in RESERVED]
            lacking = next((name for name in needed if name not in columns), None)
            if lacking is not None:
                hint = "" if spec.builtin else "; a function gets prompts, completions and these"
                raise ConfigError(
                    f"--reward {spec.text}: needs {lacking!r}, a field that the data doesn't have "
                    f"(its fields: {has}){hint}"
                )

    def __call__(
        self,
        groups: Sequence[PromptGroup],
        completions: Sequence[Sequence[str]],
        facts: Sequence[Sequence[CompletionFacts]],
    ) -> RewardTable:
        """What completions get.

        Args:
            groups: The prompts with their columns; their own completions are not looked at.
            completions: Per prompt, the texts to reward, without end token.
            facts: Of each completion.

        Returns:
            The rewards, prompt by prompt: N is the number of all completions.

        Raises:
            TrainingError: A user's function raised, returned something else than a finite number
                or None for each completion, took longer than the timeout, or took its process
                down. Then all are closed.
        """
        texts = [list(of_prompt) for of_prompt in completions]
        flat = [text for of_prompt in texts for text in of_prompt]
        values = np.full((len(flat), len(self.specs)), np.nan)
        if flat and self._process is not None:
            self._send(self._process, groups, texts)
        for place, spec in enumerate(self.specs):
            if spec.builtin is not None:
                given = [
                    _builtin(spec, spec.builtin, text, fact, group)
                    for group, of_prompt, known in zip(groups, texts, facts, strict=True)
                    for text, fact in zip(of_prompt, known, strict=True)
                ]
            elif flat and self._process is not None:
                given = self._call(self._process, place, groups, texts)
            else:
                continue
            values[:, place] = [np.nan if value is None else value for value in given]
        return combine(
            [spec.name for spec in self.specs], values, [spec.weight for spec in self.specs]
        )

    def _send(
        self, process: RewardProcess, groups: Sequence[PromptGroup], texts: Sequence[Sequence[str]]
    ) -> None:
        columns = {name for group in groups for name in group.columns} - set(RESERVED)
        batch = {
            "prompts": [as_data(group.prompt) for group in groups],
            "completions": texts,
            "columns": {name: [g.columns.get(name) for g in groups] for name in sorted(columns)},
        }
        try:
            process.ask("batch", batch, max(self._timeout, IMPORT_SECONDS))
        except WorkerFailure as failure:
            raise TrainingError(f"--reward: between two calls, {failure}") from None

    def _call(
        self,
        process: RewardProcess,
        place: int,
        groups: Sequence[PromptGroup],
        texts: Sequence[Sequence[str]],
    ) -> list[float | None]:
        spec, request = self.specs[place], {"function": [*self._takes].index(place)}
        start = time.monotonic()
        try:
            reply = process.ask("call", request, self._timeout)
        except WorkerFailure as failure:
            hint = ""
            if time.monotonic() - start >= self._timeout:
                hint = "; mend it, or allow more with --reward-timeout"
            raise TrainingError(
                f"--reward {spec.text}: {failure}, {_about(groups, texts, None)}{hint}"
            ) from None
        if "error" not in reply:
            return list(reply["values"])
        index = reply["index"]
        if "raised" in reply:
            try:
                search = {**request, "raised": reply["raised"]}
                index = process.ask("locate", search, _LOCATE_SECONDS)["index"]
            except WorkerFailure:
                index = None
        self.close()
        raise TrainingError(
            f"--reward {spec.text}: {reply['error']}, {_about(groups, texts, index)}"
        )


def open_rewards(specs: Sequence[RewardSpec], timeout: float) -> RewardFunctions:
    """Import the user's functions, in a process of their own, and have all rewards ready.

    Args:
        specs: What `parse_rewards` made of `--reward`.
        timeout: The longest that one call of one function may take, seconds.

    Raises:
        ConfigError: A module or file can't be imported or has no such function.
    """
    if not 0 < timeout < float("inf"):
        raise ConfigError(f"--reward-timeout {timeout:g}: expected more than 0 seconds")
    return RewardFunctions(specs, timeout)


def _builtin(
    spec: RewardSpec, reward: Reward, text: str, facts: CompletionFacts, group: PromptGroup
) -> float | None:
    try:
        return reward(text, facts, group.columns)
    except ConfigError as error:  # of a column it can't use
        raise ConfigError(f"--reward {spec.text}: {group.source}: {error}") from None


def as_data(prompt: Text) -> str | list[dict[str, str]]:
    """A prompt as it stands in the data: text, or messages."""
    if isinstance(prompt, str):
        return prompt
    return [{"role": turn.role, "content": turn.content} for turn in prompt]


def _about(groups: Sequence[PromptGroup], texts: Sequence[Sequence[str]], index: int | None) -> str:
    """Which completion of which prompt it was, or where that isn't known, of which it was one."""
    places = [
        (group, place)
        for group, of_prompt in zip(groups, texts, strict=True)
        for place in range(len(of_prompt))
    ]
    group, place = places[index or 0]
    if index is None:
        what = f"on {len(places)} completions, the first of"
    else:
        what = f"at completion {place + 1} of"
    prompt = group.prompt if isinstance(group.prompt, str) else group.prompt[-1].content
    shown = " ".join(prompt.split())
    return f"{what} {group.source} “{shown[:_SHOWN]}{'…' * (len(shown) > _SHOWN)}”"
