r"""Reward functions: built in, named on the command line, or given as Python callables.

A reward function is `f(prompts, completions, **columns) -> list[float | None]`, as in TRL. It gets
the prompts as they are in the data (text, or a list of {"role", "content"} dicts), the completions
as text without the end token, and every other column of the data as a list (None where a row lacks
it). A function with an argument `completion_ids` gets the token ids too, end token included. All
lists have one entry per completion. Arguments are passed by name, and only those that the function
accepts. Columns with the names of these arguments are not passed. None means that a completion has
no reward from this function. `async def` functions are awaited.

A function given by its spec (`module:function`, `file.py:function`), and a built-in reward with a
pattern (a regular expression may take forever), runs in a separate process: a call that hangs is
stopped after the timeout, and a crash doesn't affect the training process. The other built-in
rewards take linear time. A Python callable runs in this process, without isolation and without a
timeout.

Only functions named on the command line, in the user's own configuration file, or by the calling
program are run. They run with the user's permissions.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mlx_align.errors import ConfigError, RewardError
from mlx_align.rollout.builtin_rewards import BUILTIN_REWARDS, CompletionFacts, Reward
from mlx_align.rollout.reward_worker import (
    RESERVED,
    InvalidReward,
    accepted_parameters,
    as_rewards,
    call_function,
    describe_error,
    expand_batch,
)
from mlx_align.system.worker_process import WorkerFailure, WorkerProcess
from mlx_align.types import PromptGroup, Text

Values = npt.NDArray[np.float64]
RewardFunction = Callable[..., Any]
# A spec as on the command line, a function, or a function with its weight.
RewardSource = str | RewardFunction | tuple[RewardFunction, float]
# The token ids of each prompt's completions.
TokenIds = Sequence[Sequence[Sequence[int]]]

# Importing a module may load a model, so it may take longer than a call.
IMPORT_SECONDS = 120.0
WORKER = "mlx_align.rollout.reward_worker"
# Finding the completion at which a function raised only improves the error message.
_LOCATE_SECONDS = 10.0
# Pause before a function that raised is called once more: its cause may be a service that was busy.
_RETRY_SECONDS = 1.0
# Largest reward. Losses square rewards and advantages in float32, whose largest number is 3e38.
MAX_REWARD = 1e18
_MAX_SHOWN = 60

_BUILTIN = re.compile(r"(\w+)\s*(?:\((.*)\))?(?:\s*=([^()]*))?", re.DOTALL)
_FUNCTION = re.compile(r"([^=]+):\s*([^:=]*?)\s*(?:=(.*))?", re.DOTALL)


# --- specs ---


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """One reward function.

    Attributes:
        text: The spec as given; for a callable, its name.
        name: The name in metrics: the function's name, with a number if it is not the first
            function of that name (`regex`, `regex_2`).
        weight: Weight in the total; 0 to log the reward only.
        builtin: A built-in reward, ready to call; else None.
        options: The options of the built-in reward.
        column: The column that a built-in reward compares with; None if it needs none.
        callable: A Python callable, to be called in this process; else None.
        module: The module, or the file ending in .py, of a function given by its spec.
        function: The name of the function there, or of the built-in reward.
    """

    text: str
    name: str
    weight: float = 1.0
    builtin: Reward | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    column: str | None = None
    callable: RewardFunction | None = None
    module: str = ""
    function: str = ""

    @property
    def label(self) -> str:
        """The name in messages."""
        return f"--reward {self.text}" if self.callable is None else f"reward function {self.text}"


def parse_rewards(sources: Sequence[RewardSource]) -> tuple[RewardSpec, ...]:
    r"""Parse reward functions, without running the user's code.

    Args:
        sources: Specs, callables, or (callable, weight) tuples. A spec is `name`,
            `name(option=value)`, `module:function` or `file.py:function`, followed by `=weight`
            if that is not 1. Options are written as in Python: `regex(pattern=r'\d+')=0.5`.

    Raises:
        ConfigError: A spec can't be read, names no built-in reward, option or file, or has a
            wrong weight; or all weights are 0.
    """
    parsed: list[RewardSpec] = []
    for source in sources:
        spec = _parse_spec(source.strip()) if isinstance(source, str) else _parse_callable(source)
        taken = {other.name for other in parsed}
        name, number = spec.name, 1
        while name in taken:
            number += 1
            name = f"{spec.name}_{number}"
        parsed.append(replace(spec, name=name))
    if parsed and not any(spec.weight for spec in parsed):
        raise ConfigError(f"{parsed[0].label}: all weights are 0, so no reward counts")
    return tuple(parsed)


def _parse_callable(source: RewardFunction | tuple[RewardFunction, float]) -> RewardSpec:
    function: Any = source
    weight: Any = 1.0
    if isinstance(source, tuple) and len(source) == 2:
        function, weight = source
    if not callable(function):
        raise ConfigError(
            f"reward {source!r}: expected text such as 'length(target=200)=0.5', a function, or "
            "(function, weight)"
        )
    inner = getattr(function, "func", function)  # functools.partial
    name = getattr(inner, "__name__", type(inner).__name__).strip("<>")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ConfigError(
            f"reward function {name}: weight {weight!r}; expected a number, such as 0.5"
        )
    return RewardSpec(name, name, float(weight), callable=function)


def _parse_spec(text: str) -> RewardSpec:
    builtin = _BUILTIN.fullmatch(text)
    if builtin is not None:
        return _parse_builtin(text, *builtin.groups())
    function = _FUNCTION.fullmatch(text)
    if function is not None:
        return _parse_function(text, *function.groups())
    if "," in text and (several := _separate(text)):
        raise ConfigError(f"--reward {text}: expected one reward; write {several}")
    raise ConfigError(
        f"--reward {text}: expected a built-in reward ({', '.join(BUILTIN_REWARDS)}), with options "
        "as in length(target=200), module:function or file.py:function; =weight may follow"
    )


def _separate(text: str) -> str:
    """Rewards with commas between them as one --reward each; "" if a part can't be one."""
    parts = []
    for part in text.split(","):
        name, *rest = re.split(r"(?=[=(])", part.strip(), maxsplit=1)
        close = [name] if ":" in name else get_close_matches(name, BUILTIN_REWARDS, n=1)
        if not close:
            return ""
        parts.append("--reward " + "".join([close[0], *rest]))
    return " ".join(parts)


def _parse_builtin(text: str, name: str, written: str | None, weight: str | None) -> RewardSpec:
    maker = BUILTIN_REWARDS.get(name)
    if maker is None:
        close = get_close_matches(name, BUILTIN_REWARDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "your own function is module:function"
        raise ConfigError(
            f"--reward {text}: no built-in reward {name!r} (choose from "
            f"{', '.join(BUILTIN_REWARDS)}); {hint}"
        )
    accepted = inspect.signature(maker).parameters
    try:
        call = ast.parse(f"f({written or ''})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    # MemoryError and RecursionError: from ast, for very deep nesting.
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        example = ", ".join(f"{option}=…" for option in accepted)
        raise ConfigError(
            f"--reward {text}: can't read its options; expected {name}({example}), text in quotes"
        ) from None
    unknown = next((option for option in options if option not in accepted), None)
    if unknown is not None:
        raise ConfigError(
            f"--reward {text}: no option {unknown!r}; {name} has {', '.join(accepted)}"
        )
    required = [key for key, option in accepted.items() if option.default is option.empty]
    missing = next((key for key in required if key not in options), None)
    if missing is not None:
        raise ConfigError(f"--reward {text}: {name} needs {missing}, as in {name}({missing}=…)")
    try:
        reward = maker(**options)
    except ConfigError as error:
        raise ConfigError(f"--reward {text}: {error}") from None
    column = options.get("column", accepted["column"].default) if "column" in accepted else None
    return RewardSpec(
        text, name, _parse_weight(text, weight), reward, options, column, function=name
    )


def _parse_function(text: str, module: str, function: str, weight: str | None) -> RewardSpec:
    module = module.strip()
    if not function.isidentifier():
        raise ConfigError(
            f"--reward {text}: {function!r} is not a function name; expected {module}:function, "
            "followed by =weight if it is not 1"
        )
    if module.endswith(".py"):
        if not Path(module).expanduser().is_file():
            raise ConfigError(f"--reward {text}: there is no file {module} in {Path.cwd()}")
    elif not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(
            f"--reward {text}: {module!r} is not a module name; a file name must end in .py"
        )
    return RewardSpec(text, function, _parse_weight(text, weight), module=module, function=function)


def _parse_weight(text: str, weight: str | None) -> float:
    if weight is None:
        return 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(
            f"--reward {text}: weight {weight.strip()!r}; expected a number, such as 0.5"
        )
    return value


# --- results ---


@dataclass(frozen=True)
class RewardTable:
    """R rewards of N completions.

    Attributes:
        names: (R,) names of the rewards.
        values: (N, R) float64, NaN where a reward is None.
        weights: (R,) float64.
        total: (N,) float64, the sum of weight × value over the rewards that are not None; NaN for
            completions without any reward of nonzero weight.
    """

    names: tuple[str, ...]
    values: Values
    weights: Values
    total: Values

    def by_group(self, size: int) -> tuple[Values, Values]:
        """Rewards (K, B, size) and weights (K,) of the K rewards whose weight is not 0."""
        counted = self.weights != 0
        return self.values.T[counted].reshape(int(counted.sum()), -1, size), self.weights[counted]

    def metrics(self) -> dict[str, float]:
        """`rewards/<name>/mean`, `…/std` (n − 1) and `…/none`, the fraction without a value.

        Means without values and deviations of fewer than two are left out.
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
    """The table of rewards (N, R), NaN for None, with weights (R,)."""
    by_weight = np.asarray(weights, np.float64)
    given = ~np.isnan(values)
    total = np.where(given, values, 0.0) @ by_weight
    total[~(given & (by_weight != 0)).any(axis=1)] = np.nan
    return RewardTable(tuple(names), values, by_weight, total)


# --- calls ---


class RewardFunctions:
    """Reward functions ready to call; made by `open_rewards`, and closed by `close`.

    The functions given by specs share one process until then, so they can keep models and other
    state between calls.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        timeout: float,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.specs = tuple(specs)
        self._timeout, self._note = timeout, note
        self._process: WorkerProcess | None = None
        # The parameters of each function that is not built in, by its index among the specs.
        self._parameters: dict[int, Mapping[str, Any]] = {}
        # Indices of the functions in the process, in the order in which it loaded them.
        self._loaded: list[int] = []
        # The same for built-in rewards with a pattern.
        self._builtins: list[int] = []
        try:
            for place, spec in enumerate(self.specs):
                if spec.builtin is not None and "pattern" not in spec.options:
                    continue
                if spec.callable is not None:
                    self._parameters[place] = _parameters_of(spec, spec.callable)
                    continue
                self._process = self._process or WorkerProcess(WORKER)
                if spec.builtin is None:
                    self._parameters[place] = self._load(spec, self._process)
                    self._loaded.append(place)
                else:
                    message = {"name": spec.function, "options": spec.options}
                    self._request(spec, self._process, "load_builtin", message)
                    self._builtins.append(place)
        except BaseException:
            self.close()
            raise

    def _load(self, spec: RewardSpec, process: WorkerProcess) -> Mapping[str, Any]:
        message = {"target": spec.module, "name": spec.function}
        reply = self._request(spec, process, "load", message)
        if "error" in reply:
            raise ConfigError(f"{spec.label}: {reply['error']}")
        return reply

    def _request(
        self, spec: RewardSpec, process: WorkerProcess, method: str, message: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Load a function into the process."""
        try:
            return process.request(method, message, max(self._timeout, IMPORT_SECONDS))
        except WorkerFailure as failure:
            what = spec.module or "the process"
            began = "was imported" if spec.module else "was started"
            raise ConfigError(f"{spec.label}: while {what} {began}: {failure}") from None

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
        """End the reward process, if there is one."""
        if self._process is not None:
            self._process.close()

    @property
    def pid(self) -> int | None:
        """The id of the reward process; None without one."""
        return None if self._process is None else self._process.pid

    def check(self, groups: Sequence[PromptGroup]) -> None:
        """Check, before training, that the data has the columns that the rewards need.

        Raises:
            ConfigError: A column is missing; the message names it and the reward.
        """
        columns = {name for group in groups for name in group.columns}
        known = ", ".join(sorted(columns)) or "only the prompt"
        for place, spec in enumerate(self.specs):
            if spec.builtin is not None:
                needed = [] if spec.column is None else [spec.column]
                for group in groups:
                    _call_builtin(spec, spec.builtin, "", CompletionFacts(1, True, 1), group)
            else:
                needed = [
                    name for name in self._parameters[place]["required"] if name not in RESERVED
                ]
            missing = next((name for name in needed if name not in columns), None)
            if missing is not None:
                hint = "" if spec.builtin else "; functions get prompts, completions and these"
                raise ConfigError(
                    f"{spec.label}: needs {missing!r}, a column that the data doesn't have "
                    f"(its columns: {known}){hint}"
                )

    def __call__(
        self,
        groups: Sequence[PromptGroup],
        completions: Sequence[Sequence[str]],
        facts: Sequence[Sequence[CompletionFacts]],
    ) -> RewardTable:
        """Reward completions.

        Args:
            groups: The prompts with their columns; their own completions are ignored.
            completions: The texts to reward, for each prompt, without the end token.
            facts: The facts about each completion.

        Returns:
            The rewards of all N completions, in the order of the prompts.

        Raises:
            RewardError: A function raised twice, did not return a finite number or None per
                completion, exceeded the timeout, or ended its process; or rewards are too large.
                All functions are closed then.
        """
        texts = [list(of_prompt) for of_prompt in completions]
        count = sum(map(len, texts))
        values = np.full((count, len(self.specs)), np.nan)
        ids = None
        if any("completion_ids" in known["names"] for known in self._parameters.values()):
            ids = [[fact.token_ids for fact in of_prompt] for of_prompt in facts]
        if count and self._process is not None:
            batch = _as_batch(groups, texts, ids)
            if self._builtins:
                # Without the tokens, which they don't read.
                batch["facts"] = [
                    [astuple(replace(fact, token_ids=())) for fact in of_prompt]
                    for of_prompt in facts
                ]
            self._send(self._process, batch)
        for place, spec in enumerate(self.specs):
            if not count:
                break
            given: Sequence[float | None]
            if spec.builtin is not None and place not in self._builtins:
                given = [
                    _call_builtin(spec, spec.builtin, text, fact, group)
                    for group, of_prompt, known in zip(groups, texts, facts, strict=True)
                    for text, fact in zip(of_prompt, known, strict=True)
                ]
            elif spec.callable is not None:
                given = self._call_directly(spec.callable, place, groups, texts, ids)
            else:
                assert self._process is not None
                given = self._call_in_process(self._process, place, groups, texts)
            values[:, place] = [np.nan if value is None else value for value in given]
            _check_size(spec, values[:, place], groups, texts)
        return combine(
            [spec.name for spec in self.specs], values, [spec.weight for spec in self.specs]
        )

    def _call_directly(
        self,
        function: RewardFunction,
        place: int,
        groups: Sequence[PromptGroup],
        texts: Sequence[Sequence[str]],
        ids: TokenIds | None,
        *,
        again: bool = False,
    ) -> list[float | None]:
        label = self.specs[place].label
        # Made for every call: a function may change its arguments.
        arguments = expand_batch(_as_batch(groups, texts, ids))
        try:
            returned = call_function(function, arguments, self._parameters[place])
            return as_rewards(returned, sum(map(len, texts)))
        except InvalidReward as error:
            self.close()
            where = _location(groups, texts, error.index)
            raise RewardError(f"{label}: {error}, {where}") from None
        except (Exception, SystemExit) as error:
            code = getattr(inspect.unwrap(function), "__code__", None)
            text = describe_error(error, None if code is None else code.co_filename)
            if not again:
                self._note(f"! {label}: raised {text}; calling it again.")
                time.sleep(_RETRY_SECONDS)
                return self._call_directly(function, place, groups, texts, ids, again=True)
            self.close()
            where = _location(groups, texts, None)
            raise RewardError(f"{label}: raised {text}, {where}") from error

    def _send(self, process: WorkerProcess, batch: Mapping[str, Any]) -> None:
        try:
            process.request("batch", batch, max(self._timeout, IMPORT_SECONDS))
        except WorkerFailure as failure:
            raise RewardError(f"--reward: {failure}, between two calls") from None

    def _call_in_process(
        self,
        process: WorkerProcess,
        place: int,
        groups: Sequence[PromptGroup],
        texts: Sequence[Sequence[str]],
        *,
        again: bool = False,
    ) -> list[float | None]:
        label, builtin = self.specs[place].label, place in self._builtins
        message = {"function": (self._builtins if builtin else self._loaded).index(place)}
        start = time.monotonic()
        try:
            method = "call_builtin" if builtin else "call"
            reply = process.request(method, message, self._timeout)
        except WorkerFailure as failure:
            hint = ""
            if time.monotonic() - start >= self._timeout:
                hint = "; fix it, or allow more time with --reward-timeout"
            raise RewardError(
                f"{label}: {failure}, {_location(groups, texts, None)}{hint}"
            ) from None
        if "wrong_column" in reply:
            source = groups[reply["index"]].source
            raise ConfigError(f"{label}: {source}: {reply['wrong_column']}")
        if "error" not in reply:
            return list(reply["values"])
        index = reply["index"]
        if "raised" in reply and not again:
            self._note(f"! {label}: {reply['error']}; calling it again.")
            time.sleep(_RETRY_SECONDS)
            return self._call_in_process(process, place, groups, texts, again=True)
        if "raised" in reply:
            try:
                search = {**message, "raised": reply["raised"]}
                index = process.request("locate", search, _LOCATE_SECONDS)["index"]
            except WorkerFailure:
                index = None
        self.close()
        raise RewardError(f"{label}: {reply['error']}, {_location(groups, texts, index)}")


def _check_size(
    spec: RewardSpec,
    values: Values,
    groups: Sequence[PromptGroup],
    texts: Sequence[Sequence[str]],
) -> None:
    """Raise a RewardError if a reward (N,) is too large to compute with, times its weight."""
    large = np.flatnonzero(np.abs(values) > MAX_REWARD / max(abs(spec.weight), 1.0))
    if len(large):
        index = int(large[0])
        times = "" if spec.weight == 1 else f" with weight {spec.weight:g}"
        raise RewardError(
            f"{spec.label}: returned {values[index]:.3g}{times}, "
            f"{_location(groups, texts, index)}; rewards above {MAX_REWARD:g} overflow in "
            "training: scale them down"
        )


def open_rewards(
    specs: Sequence[RewardSpec], timeout: float, note: Callable[[str], None] = lambda _: None
) -> RewardFunctions:
    """Prepare reward functions for calls; those given by specs are imported in a new process.

    Args:
        specs: From `parse_rewards`.
        timeout: Seconds that one call of one function may take, unless it is a Python callable.
        note: Called with a line when a function raised and is called again.

    Raises:
        ConfigError: A module or file can't be imported or does not have the function.
    """
    if not 0 < timeout < float("inf"):
        raise ConfigError(f"--reward-timeout {timeout:g}: expected more than 0 seconds")
    return RewardFunctions(specs, timeout, note)


def _parameters_of(spec: RewardSpec, function: RewardFunction) -> Mapping[str, Any]:
    try:
        return accepted_parameters(function)
    except InvalidReward as error:
        raise ConfigError(f"{spec.label}: {error}") from None


def _as_batch(
    groups: Sequence[PromptGroup],
    texts: Sequence[Sequence[str]],
    token_ids: TokenIds | None,
) -> dict[str, Any]:
    """Prompts, completions, token ids if there are any, and columns: one entry per prompt."""
    columns = {name for group in groups for name in group.columns} - set(RESERVED)
    return {
        **({} if token_ids is None else {"completion_ids": token_ids}),
        "prompts": [as_data(group.prompt) for group in groups],
        "completions": [list(of_prompt) for of_prompt in texts],
        "columns": {name: [g.columns.get(name) for g in groups] for name in sorted(columns)},
    }


def _call_builtin(
    spec: RewardSpec, reward: Reward, text: str, facts: CompletionFacts, group: PromptGroup
) -> float | None:
    try:
        return reward(text, facts, group.columns)
    except ConfigError as error:  # a column of the wrong type
        raise ConfigError(f"{spec.label}: {group.source}: {error}") from None


def as_data(prompt: Text) -> str | list[dict[str, str]]:
    """A prompt as it is in the data: text, or messages."""
    if isinstance(prompt, str):
        return prompt
    return [turn.to_dict() for turn in prompt]


def _location(
    groups: Sequence[PromptGroup], texts: Sequence[Sequence[str]], index: int | None
) -> str:
    """Describe the completion `index` and its prompt; if unknown, the first of the batch."""
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
    return f"{what} {group.source} “{shown[:_MAX_SHOWN]}{'…' * (len(shown) > _MAX_SHOWN)}”"
