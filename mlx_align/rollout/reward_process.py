"""Run a user's reward functions in a separate process.

The functions run outside the training process, so that one that hangs can be stopped, and one that
ends its process (a segmentation fault, `os._exit`, out of memory) doesn't end the run. The process
is a new interpreter, never a fork: forking a process that uses the GPU is not safe.
`multiprocessing` is not used, because its children import the main module, and with it mlx.
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
from typing import Any

from mlx_align.rollout import reward_worker
from mlx_align.rollout.reward_worker import HEADER_SIZE, frame_size, write_frame

# Interval of checks that the process is alive: its children may keep the connection open after its
# death.
_POLL_SECONDS = 0.2
# Time for the process's own exit handlers once the connection is closed.
_EXIT_SECONDS = 2.0
_LIBRARIES = ("<", *(sysconfig.get_paths()[kind] for kind in ("stdlib", "purelib", "platlib")))
_FRAME = re.compile(r'File "(.+)", line (\d+)')


class WorkerFailure(Exception):
    """The process hung or died; the message says which, and at which line if that is known."""


class RewardProcess:
    """A process for reward functions, in a separate session, so that Ctrl-C does not reach it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        lifeline_end, self._lifeline = os.pipe()
        self._trace, trace_end = os.pipe()
        os.set_blocking(self._trace, False)
        passed = (theirs.fileno(), lifeline_end, trace_end)
        # -P: don't search modules in the folder of the script, which belongs to this package.
        command = [sys.executable, "-P", reward_worker.__file__, *map(str, passed)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout is for the results of the command
                pass_fds=passed,
                start_new_session=True,
            )
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
            method: A method of `reward_worker.Worker`.
            message: Its argument.
            seconds: The timeout. On a timeout, or if it dies, the process is closed.

        Raises:
            WorkerFailure: It hung or died.
        """
        if not self._open:
            raise WorkerFailure("its process is closed")
        deadline = time.monotonic() + seconds
        try:
            self._connection.settimeout(seconds)
            write_frame(self._connection, {"method": method, "seconds": seconds, **message})
            header = self._read(HEADER_SIZE, deadline)
            return dict(json.loads(self._read(frame_size(header), deadline)))
        except TimeoutError:
            failure = f"no answer within {seconds:g} s{self._current_line(interrupt=True)}"
        except (EOFError, OSError):
            failure = f"its process {self._describe_exit()}{self._current_line()}"
        except BaseException:  # after Ctrl-C, the next reply would be the one to this request
            self.close(0)
            raise
        self.close(0)
        raise WorkerFailure(failure)

    def _read(self, size: int, deadline: float) -> bytes:
        received = bytearray()
        while len(received) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            dead = self._process.poll() is not None
            self._connection.settimeout(min(left, _POLL_SECONDS))
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
        places = [place for place in found if place[0] != reward_worker.__file__]
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
