"""The program of the process in which reward functions run.

It imports only the standard library, the built-in rewards and the user's modules: no mlx, no model.
The functions' output goes to stderr.

`expand_batch`, `accepted_parameters`, `call_function` and `as_rewards` are also used for functions
that are called without a process.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_align.errors import ConfigError
from mlx_align.rollout.builtin_rewards import BUILTIN_REWARDS, CompletionFacts, Reward
from mlx_align.system.worker import RequestError, serve

# The arguments that every function gets; columns of these names are not passed.
RESERVED = ("prompts", "completions", "completion_ids")


def expand_batch(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The arguments of a reward function, one entry per completion, from a batch by prompts.

    Args:
        batch: `prompts`, `completions` (a list per prompt), `columns` (name → one value per
            prompt), and `completion_ids` (as `completions`) if a function takes them.
    """
    counts = [len(texts) for texts in batch["completions"]]

    def repeated(values: Sequence[Any]) -> list[Any]:
        pairs = zip(values, counts, strict=True)
        return [value for value, count in pairs for _ in range(count)]

    arguments = {name: repeated(values) for name, values in batch["columns"].items()}
    arguments["prompts"] = repeated(batch["prompts"])
    arguments["completions"] = [text for texts in batch["completions"] for text in texts]
    if "completion_ids" in batch:
        arguments["completion_ids"] = [list(ids) for row in batch["completion_ids"] for ids in row]
    return arguments


class InvalidReward(RequestError):
    """A function or its return value can't be used.

    Attributes:
        index: The completion concerned, if there is one.
    """

    def __init__(self, text: str, index: int | None = None) -> None:
        super().__init__(text)
        self.index = index


def _one_line(error: BaseException, limit: int = 200) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def describe_error(error: BaseException, file: str | None) -> str:
    """An exception on one line, with the innermost line of its traceback, in `file` if possible."""
    return f"{_one_line(error)}{_error_location(error, file)}"


def _error_location(error: BaseException, file: str | None) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    lines, trace = [], error.__traceback__
    while trace is not None:
        lines.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    lines = [line for line in lines if line[0] != __file__ and not line[0].startswith("<")]
    own = [line for line in lines if line[0] == file] or lines
    return f" ({own[-1][0]}:{own[-1][1]})" if own else ""


def _load_module(target: str) -> ModuleType:
    if not target.endswith(".py"):
        return importlib.import_module(target)
    path = Path(target).expanduser().resolve()
    name = path.stem
    for known in list(sys.modules.values()):
        if getattr(known, "__file__", None) == str(path):
            return known
    while name in sys.modules:
        name += "_"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidReward(f"{target} can't be imported")
    # As for a script: modules in the same folder can be imported.
    sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load(target: str, name: str) -> tuple[Callable[..., Any], str | None]:
    """The function `name` of a module or file, and the file that defines it."""
    try:
        module = _load_module(target)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{target}.".startswith(f"{error.name}."):
            text = (
                f"no module {error.name!r}; expected an importable module, or a file ending in .py"
            )
        else:
            text = f"{target} can't be imported: {describe_error(error, None)}"
        raise InvalidReward(text) from None
    function = getattr(module, name, None)
    if not callable(function):
        own = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        has = ", ".join(own) or "no functions"
        raise InvalidReward(f"{target} has no function {name!r} (it has: {has})")
    return function, getattr(module, "__file__", None)


def accepted_parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that a function accepts.

    Returns:
        `names`, those without a default (`required`), and whether it has `**kwargs` (`any`).

    Raises:
        InvalidReward: An argument can only be given by position.
    """
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {"names": [], "required": [], "any": True}
    named = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    nameless = [p.name for p in found if p.kind == p.POSITIONAL_ONLY and p.default is p.empty]
    if nameless:
        raise InvalidReward(
            f"takes {nameless[0]!r} by position only, but arguments are passed by name"
        )
    return {
        "names": [p.name for p in named],
        "required": [p.name for p in named if p.default is p.empty],
        "any": any(p.kind == p.VAR_KEYWORD for p in found),
    }


def call_function(
    function: Callable[..., Any], arguments: Mapping[str, Any], accepted: Mapping[str, Any]
) -> Any:
    """Call a function with the arguments it accepts, and await the result if it is awaitable.

    `completion_ids` are passed only to functions that name them: `**columns` are columns.

    Args:
        function: The function.
        arguments: All arguments there are, by name.
        accepted: From `accepted_parameters`.
    """
    if not accepted["any"]:
        arguments = {name: arguments[name] for name in accepted["names"] if name in arguments}
    elif "completion_ids" not in accepted["names"]:
        arguments = {name: arguments[name] for name in arguments if name != "completion_ids"}
    returned = function(**arguments)
    return _run_awaitable(returned) if inspect.isawaitable(returned) else returned


def _run_awaitable(awaitable: Awaitable[Any]) -> Any:
    # Imported here: few functions need them, and the process starts faster without.
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    # In a notebook, this thread runs an event loop already.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, wait()).result()


def as_rewards(returned: Any, count: int) -> list[float | None]:
    """Convert a function's return value to `count` numbers or None.

    Scalars of NumPy or mlx are numbers.

    Raises:
        InvalidReward: It is something else; the message says what.
    """
    kind = type(returned).__name__
    unordered = isinstance(returned, str | bytes | dict | set | frozenset)
    if unordered or not hasattr(returned, "__len__"):
        raise InvalidReward(f"returned {kind}; expected a list of {count} numbers or None")
    values = list(returned)
    if len(values) != count:
        raise InvalidReward(f"returned a list of {len(values)} for {count} completions")
    return [_as_reward(value, index) for index, value in enumerate(values)]


def _as_reward(value: Any, index: int) -> float | None:
    if value is None:
        return None
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise InvalidReward(f"returned {type(value).__name__}; expected a number or None", index)
    try:
        number = float(value)
    except Exception as error:
        raise InvalidReward(
            f"returned a value that is no number ({_one_line(error)})", index
        ) from None
    if not abs(number) < float("inf"):
        raise InvalidReward(f"returned {number}; expected a finite number, or None", index)
    return number


class Worker:
    """The loaded functions, and the batch they are called on."""

    def __init__(self) -> None:
        self._functions: list[tuple[Callable[..., Any], str | None, dict[str, Any]]] = []
        self._builtins: list[Reward] = []
        self._batch = ""

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Import one more function; replies with its parameters."""
        function, file = load(request["target"], request["name"])
        accepted = accepted_parameters(function)
        self._functions.append((function, file, accepted))
        return accepted

    def load_builtin(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Make a built-in reward."""
        self._builtins.append(BUILTIN_REWARDS[request["name"]](**request["options"]))
        return {}

    def call_builtin(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Call a built-in reward on each completion; replies with the values.

        In place of `values`, `wrong_column` is the problem of a column, of the prompt `index`.
        """
        reward = self._builtins[request["function"]]
        batch = json.loads(self._batch)
        values: list[float | None] = []
        rows = zip(batch["completions"], batch["facts"], strict=True)
        for index, (texts, facts) in enumerate(rows):
            columns = {name: column[index] for name, column in batch["columns"].items()}
            try:
                values += [
                    reward(text, CompletionFacts(*known), columns)
                    for text, known in zip(texts, facts, strict=True)
                ]
            except ConfigError as error:
                return {"wrong_column": str(error), "index": index}
        return {"values": values}

    def batch(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Store the batch for the calls that follow."""
        # As text: every call gets new lists, which it may change.
        self._batch = json.dumps(request)
        return {}

    def call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Call a function on the whole batch; replies with one value per completion."""
        function, file, accepted = self._functions[request["function"]]
        arguments = expand_batch(json.loads(self._batch))
        count = len(arguments["completions"])
        try:
            return {"values": as_rewards(call_function(function, arguments, accepted), count)}
        except InvalidReward as error:
            return {"error": str(error), "index": error.index}
        except BaseException as error:  # a function may call sys.exit
            return {
                "error": f"raised {describe_error(error, file)}",
                "index": None,
                "raised": type(error).__name__,
            }

    def locate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Find the completion at which a function raised, by calling it on one after the other."""
        function, _, accepted = self._functions[request["function"]]
        arguments = expand_batch(json.loads(self._batch))
        for index in range(len(arguments["completions"])):
            one = {name: values[index : index + 1] for name, values in arguments.items()}
            try:
                call_function(function, one, accepted)
            except BaseException as error:
                return {"index": index if type(error).__name__ == request["raised"] else None}
        return {"index": None}


def main(arguments: Sequence[str]) -> None:
    """Answer the requests of `RewardFunctions`."""
    sys.path.insert(0, os.getcwd())
    serve(Worker(), arguments)
