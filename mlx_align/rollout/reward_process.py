"""Our end of the process that runs a user's reward functions: started, asked, timed, ended.

The functions run apart from training so that one that hangs can be stopped, and one that takes its
process down (a segmentation fault, `os._exit`, memory) takes nothing else with it. The process is
a fresh interpreter, never a fork of ours: a fork of a process that uses the GPU is not safe.
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

# How often a wait looks whether the process still lives: what it started may hold its end of the
# connection open. Nothing but the wait depends on it.
_LOOK = 0.2
# What a process has for its own exit handlers once the connection is closed.
_EXIT_SECONDS = 2.0
_LIBRARIES = ("<", *(sysconfig.get_paths()[kind] for kind in ("stdlib", "purelib", "platlib")))
_FRAME = re.compile(r'File "(.+)", line (\d+)')


class WorkerFailure(Exception):
    """The process hung or died; the text says which, and in which line where that is known."""


class RewardProcess:
    """A process for reward functions, in a session of its own: Ctrl-C reaches only us."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        lifeline_end, self._lifeline = os.pipe()
        self._trace, trace_end = os.pipe()
        os.set_blocking(self._trace, False)
        passed = (theirs.fileno(), lifeline_end, trace_end)
        # -P: the folder of the file that is run, ours, is no place to look for modules.
        command = [sys.executable, "-P", reward_worker.__file__, *map(str, passed)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout is the command's own, for its results
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
        """Its process id, which is its group's too."""
        return self._process.pid

    def ask(self, do: str, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and wait for the reply.

        Args:
            do: A method of `reward_worker.Worker`.
            request: What it gets.
            seconds: The longest wait; then, and when the process dies, it is ended.

        Raises:
            WorkerFailure: It hung or died.
        """
        if not self._open:
            raise WorkerFailure("its process is closed")
        deadline = time.monotonic() + seconds
        try:
            self._connection.settimeout(seconds)
            write_frame(self._connection, {"do": do, "seconds": seconds, **request})
            header = self._read(HEADER_SIZE, deadline)
            return dict(json.loads(self._read(frame_size(header), deadline)))
        except TimeoutError:
            failure = f"no answer within {seconds:g} s{self._where(interrupt=True)}"
        except (EOFError, OSError):
            failure = f"its process {self._ending()}{self._where()}"
        except BaseException:  # Ctrl-C, say: the next reply would be the answer to this request
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
            gone = self._process.poll() is not None
            self._connection.settimeout(min(left, _LOOK))
            try:
                part = self._connection.recv(min(size - len(received), 1 << 20))
            except TimeoutError:
                if gone:
                    raise EOFError from None
                continue
            if not part:
                raise EOFError
            received += part
        return bytes(received)

    def _ending(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_SECONDS)
        code = self._process.returncode
        if code is None:
            return "closed the connection"
        if code >= 0:
            return f"exited with {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{hint}"

    def _where(self, interrupt: bool = False) -> str:
        """The innermost line of Python it was in, as its fault handler wrote it."""
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
        """End the process and all it started, after `seconds` at most; twice does no more."""
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
