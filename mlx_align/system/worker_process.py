"""A separate process for code that may hang, crash or use too much memory.

A user's reward functions and the chat templates of models run there, so that a call that hangs can
be stopped, and one that ends its process (a segmentation fault, `os._exit`, out of memory) doesn't
end the run. The process is a new interpreter, never a fork: forking a process that uses the GPU is
not safe. `multiprocessing` is not used, because its children import the main module, and with it
mlx.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_align.system.worker import HEADER_SIZE, encode_frame, frame_size

# Interval of checks that the process is alive: its children may keep the connection open after its
# death.
_POLL_SECONDS = 0.2
# Time for the process's own exit handlers once the connection is closed.
_EXIT_SECONDS = 2.0
_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARIES = (
    *("<", str(_PACKAGE)),
    *(sysconfig.get_paths()[kind] for kind in ("stdlib", "purelib", "platlib")),
)
_FRAME = re.compile(r'File "(.+)", line (\d+)')
# This package is found where it was imported from, also if it is not installed.
_START = (
    "import sys; from importlib import import_module; sys.path.insert(0, sys.argv[1]); "
    "module = import_module(sys.argv[2]); del sys.path[0]; module.main(sys.argv[3:])"
)


class WorkerFailure(Exception):
    """The process hung or died; the message says which, and at which line if that is known."""


class _TooLarge(Exception):
    """The process uses more memory than it may."""


class _AwakeClock:
    """Counts down the seconds in which this process ran.

    After Ctrl-Z and `fg`, or a night with the lid closed, a reply that is there must not count as
    late. So no more than a few polls count at a time.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, time.monotonic()
        self.used = 0.0

    def left(self) -> float:
        """The seconds that are left.

        Raises:
            TimeoutError: None.
        """
        now = time.monotonic()
        self.used += min(now - self._last, 5 * _POLL_SECONDS)
        self._last = now
        if self.used >= self._seconds:
            raise TimeoutError
        return self._seconds - self.used


def _memory_of(pid: int) -> int:
    """Bytes of memory that a process uses now; 0 if unknown."""
    pages = Path(f"/proc/{pid}/statm")
    try:
        if pages.exists():
            return int(pages.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
        found = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True)
        return int(found.stdout) * 1024  # macOS
    except (OSError, ValueError, IndexError):
        return 0


class WorkerProcess:
    """A process that answers requests, in a separate session, so that Ctrl-C does not reach it.

    Args:
        module: The module of this package whose `main` calls `worker.serve`.
        max_bytes: The memory that it may use; None for any.
    """

    def __init__(self, module: str, max_bytes: int | None = None) -> None:
        self._max_bytes = max_bytes
        ours, theirs = socket.socketpair()
        lifeline_end, self._lifeline = os.pipe()
        self._trace, trace_end = os.pipe()
        os.set_blocking(self._trace, False)
        passed = (theirs.fileno(), lifeline_end, trace_end)
        # -P: don't search modules in the current folder.
        command = [sys.executable, "-P", "-c", _START, str(_PACKAGE.parent), module]
        command += map(str, passed)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout is for the results of the command
                pass_fds=passed,
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            os.close(self._lifeline)
            os.close(self._trace)
            raise
        finally:
            theirs.close()
            os.close(lifeline_end)
            os.close(trace_end)
        self._connection = ours
        self._open = True

    @property
    def pid(self) -> int:
        """Its process id, which is also its process group's."""
        return self._process.pid

    def request(self, method: str, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and wait for the reply.

        Args:
            method: A method of the worker.
            message: Its argument.
            seconds: The timeout. Time in which this process was stopped, or the computer was
                asleep, does not count. On a timeout, or if it dies, the process is closed.

        Raises:
            WorkerFailure: It hung, died or used too much memory.
        """
        if not self._open:
            raise WorkerFailure("its process is closed")
        clock = _AwakeClock(seconds)
        try:
            body = memoryview(encode_frame({"method": method, "seconds": seconds, **message}))
            while body:
                self._wait(clock)
                with contextlib.suppress(TimeoutError):
                    body = body[self._connection.send(body[: 1 << 16]) :]
            header = self._read(HEADER_SIZE, clock)
            return dict(json.loads(self._read(frame_size(header), clock)))
        except TimeoutError:
            failure = f"no answer within {seconds:g} s{self._current_line(interrupt=True)}"
        except _TooLarge as error:
            failure = str(error)
        except (EOFError, OSError):
            failure = f"its process {self._describe_exit()}{self._current_line()}"
        except BaseException:  # after Ctrl-C, the next reply would be the one to this request
            self.close(0)
            raise
        self.close(0)
        raise WorkerFailure(failure)

    def _read(self, size: int, clock: _AwakeClock) -> bytes:
        received = bytearray()
        while len(received) < size:
            dead = self._process.poll() is not None
            self._wait(clock)
            try:
                part = self._connection.recv(min(size - len(received), 1 << 20))
            except TimeoutError:
                if dead:
                    raise EOFError from None
                continue
            if not part:
                raise EOFError
            received += part
        return bytes(received)

    def _wait(self, clock: _AwakeClock) -> None:
        """Let the next operation of the connection wait for a moment; raise if a limit is over."""
        self._connection.settimeout(min(_POLL_SECONDS, clock.left()))
        if self._max_bytes is not None and clock.used > _POLL_SECONDS:
            used = _memory_of(self.pid)
            if used > self._max_bytes:
                raise _TooLarge(
                    f"it uses {used / 1e9:.1f} GB of memory (allowed: {self._max_bytes / 1e9:.1f})"
                )

    def _describe_exit(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_SECONDS)
        code = self._process.returncode
        if code is None:
            return "closed the connection"
        if code >= 0:
            return f"exited with {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{hint}"

    def _current_line(self, interrupt: bool = False) -> str:
        """The innermost Python line that it is running, from the traceback of its faulthandler."""
        text = b""
        if interrupt:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGUSR1)
        for _ in range(20 if interrupt else 1):
            with contextlib.suppress(BlockingIOError):
                text += os.read(self._trace, 1 << 16)
            if b"\n" in text.strip() or not interrupt:
                break
            time.sleep(0.02)
        found = _FRAME.findall(text.decode("utf-8", "replace"))
        places = [place for place in found if not place[0].startswith(str(_PACKAGE))]
        places = [place for place in places if not place[0].startswith(_LIBRARIES)] or places
        return f" ({places[0][0]}:{places[0][1]})" if places else ""

    def close(self, seconds: float = _EXIT_SECONDS) -> None:
        """End the process and its children after at most `seconds`; does nothing if closed."""
        if not self._open:
            return
        self._open = False
        self._connection.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            os.close(self._lifeline)
            os.close(self._trace)
