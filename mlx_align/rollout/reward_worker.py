"""The process that runs a user's reward functions; started by `reward_process`.

It is run as a file, in an interpreter of its own, and imports nothing but the standard library and
what the user named: no mlx, no model. Requests and replies are frames of JSON over a socket that
nothing else writes to; what functions print goes to stderr. It ends when its parent does.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import inspect
import json
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_HEADER = struct.Struct(">Q")
# A watchdog of C ends a process whose parent is gone while its interpreter is stuck in one long
# call (a regular expression, say), which no thread of Python could.
_GRACE = 5.0
# Columns that the data may have under the names of the two arguments every function gets.
RESERVED = ("prompts", "completions")


def write_frame(connection: socket.socket, message: Any) -> None:
    """Send a message: its length in 8 bytes, then JSON in ASCII (half surrogates pass too).

    What JSON doesn't know, a date in a Parquet file say, goes as its `str()`.

    Raises:
        OSError: The other side is gone, or the connection's timeout is over.
    """
    body = json.dumps(message, default=str).encode("ascii")
    connection.sendall(_HEADER.pack(len(body)))
    connection.sendall(body)


def frame_size(header: bytes) -> int:
    """How many bytes follow a frame's header."""
    (size,) = _HEADER.unpack(header)
    return int(size)


HEADER_SIZE = _HEADER.size


def expand(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
    """A batch by prompts as the arguments of a reward function: one entry a completion.

    Args:
        batch: `prompts`, `completions` (a list per prompt) and `columns` (name → one value per
            prompt).
    """
    counts = [len(texts) for texts in batch["completions"]]

    def repeated(values: Sequence[Any]) -> list[Any]:
        pairs = zip(values, counts, strict=True)
        return [value for value, count in pairs for _ in range(count)]

    arguments = {name: repeated(values) for name, values in batch["columns"].items()}
    arguments["prompts"] = repeated(batch["prompts"])
    arguments["completions"] = [text for texts in batch["completions"] for text in texts]
    return arguments


class _Refusal(Exception):
    """What is wrong with a function or its answer; `index` is the completion, where one is."""

    def __init__(self, text: str, index: int | None = None) -> None:
        super().__init__(text)
        self.index = index


def _one_line(error: BaseException, limit: int = 200) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _place(error: BaseException, file: str | None) -> str:
    """The innermost line of the user's file that an exception passed, else the innermost line."""
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
        raise _Refusal(f"{target} can't be imported")
    # As if it were run: it finds the modules beside it.
    sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load(target: str, name: str) -> tuple[Callable[..., Any], str | None]:
    """The function `name` of a module or file, and the file it stands in."""
    try:
        module = _load_module(target)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{target}.".startswith(f"{error.name}."):
            text = f"no module {error.name!r}; expected one that Python can import, or a file.py"
        else:
            text = f"{target} can't be imported: {_one_line(error)}{_place(error, None)}"
        raise _Refusal(text) from None
    function = getattr(module, name, None)
    if not callable(function):
        own = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        has = ", ".join(own) or "no functions"
        raise _Refusal(f"{target} has no function {name!r} (it has: {has})")
    return function, getattr(module, "__file__", None)


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Which arguments a function takes: names, those without default, whether any others."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {"names": [], "required": [], "any": True}
    named = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    nameless = [p.name for p in found if p.kind == p.POSITIONAL_ONLY and p.default is p.empty]
    if nameless:
        raise _Refusal(f"takes {nameless[0]!r} by position only; arguments are passed by name")
    return {
        "names": [p.name for p in named],
        "required": [p.name for p in named if p.default is p.empty],
        "any": any(p.kind == p.VAR_KEYWORD for p in found),
    }


def as_rewards(returned: Any, count: int) -> list[float | None]:
    """What a function returned as `count` numbers or None; NumPy and other scalars are numbers."""
    kind = type(returned).__name__
    unordered = isinstance(returned, str | bytes | dict | set | frozenset)
    if unordered or not hasattr(returned, "__len__"):
        raise _Refusal(f"returned {kind}; expected a list of {count} numbers or None")
    values = list(returned)
    if len(values) != count:
        raise _Refusal(f"returned a list of {len(values)} for {count} completions")
    return [_as_reward(value, index) for index, value in enumerate(values)]


def _as_reward(value: Any, index: int) -> float | None:
    if value is None:
        return None
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise _Refusal(f"returned {type(value).__name__}; expected a number or None", index)
    try:
        number = float(value)
    except Exception as error:
        raise _Refusal(f"returned no number ({_one_line(error)})", index) from None
    if not abs(number) < float("inf"):
        raise _Refusal(f"returned {number}; expected a finite number, or None for none", index)
    return number


class Worker:
    """The loaded functions and the batch they are called on."""

    def __init__(self) -> None:
        self._functions: list[tuple[Callable[..., Any], str | None, dict[str, Any]]] = []
        self._batch = ""

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Import one more function; replies with its parameters."""
        function, file = load(request["target"], request["name"])
        found = parameters(function)
        self._functions.append((function, file, found))
        return found

    def batch(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Keep what the next calls are about."""
        # As text: every call gets lists of its own, and may change them.
        self._batch = json.dumps(request)
        return {}

    def call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Call a function on the whole batch; replies with one value a completion."""
        function, file, takes = self._functions[request["function"]]
        arguments = expand(json.loads(self._batch))
        count = len(arguments["completions"])
        if not takes["any"]:
            arguments = {name: arguments[name] for name in takes["names"] if name in arguments}
        try:
            return {"values": as_rewards(function(**arguments), count)}
        except _Refusal as refusal:
            return {"error": str(refusal), "index": refusal.index}
        except BaseException as error:  # a function may call sys.exit, too
            return {
                "error": f"raised {_one_line(error)}{_place(error, file)}",
                "index": None,
                "raised": type(error).__name__,
            }

    def locate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Call a function that raised on one completion after the other, until it raises again."""
        function, _, takes = self._functions[request["function"]]
        arguments = expand(json.loads(self._batch))
        for index in range(len(arguments["completions"])):
            one = {name: values[index : index + 1] for name, values in arguments.items()}
            if not takes["any"]:
                one = {name: one[name] for name in takes["names"] if name in one}
            try:
                function(**one)
            except BaseException as error:
                return {"index": index if type(error).__name__ == request["raised"] else None}
        return {"index": None}


def _read(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)  # returns when the parent, who never writes, is gone
    os.killpg(0, signal.SIGKILL)


def main(arguments: Sequence[str]) -> None:
    """Answer requests until the connection closes.

    Args:
        arguments: File descriptors of the connection, of the lifeline, and of the pipe that is
            told where the process was when it hung or crashed.
    """
    descriptors = [int(text) for text in arguments]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    connection, lifeline, trace = socket.socket(fileno=descriptors[0]), *descriptors[1:]
    sys.path.insert(0, os.getcwd())
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    faulthandler.enable(trace, all_threads=False)
    faulthandler.register(signal.SIGUSR1, trace, all_threads=False)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    worker = Worker()
    while True:
        try:
            request = json.loads(_read(connection, frame_size(_read(connection, HEADER_SIZE))))
        except (EOFError, OSError):
            return
        faulthandler.dump_traceback_later(request["seconds"] + _GRACE, exit=True, file=trace)
        try:
            reply = getattr(worker, request["do"])(request)
        except _Refusal as refusal:
            reply = {"error": str(refusal)}
        faulthandler.cancel_dump_traceback_later()
        try:
            write_frame(connection, reply)
        except OSError:
            return


if __name__ == "__main__":
    main(sys.argv[1:])
