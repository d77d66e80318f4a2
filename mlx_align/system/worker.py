"""The side of the child in a `WorkerProcess`: frames, limits and the loop that answers requests.

Imports only the standard library, so that the process starts fast. Requests and replies are JSON
frames over a socket that nothing else writes to. The process ends when its parent does.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Sequence
from typing import Any

from mlx_align.system.terminal import SafeStream

_HEADER = struct.Struct(">Q")
HEADER_SIZE = _HEADER.size
# Seconds of computing after the timeout at which the kernel ends the process. Without it, a process
# whose interpreter is stuck in one long call, such as a regular expression, would outlive its
# parent: no Python thread gets to run. It counts the time of the processor, so that it does not run
# while the computer sleeps.
_GRACE = 5.0


def encode_frame(message: Any) -> bytes:
    """A message as bytes: their number in 8 bytes, then JSON in ASCII, which keeps surrogates.

    Values that JSON can't represent, such as dates in a Parquet file, are sent as their `str()`.
    """
    body = json.dumps(message, default=str).encode("ascii")
    return _HEADER.pack(len(body)) + body


def frame_size(header: bytes) -> int:
    """The number of bytes that follow a frame's header."""
    (size,) = _HEADER.unpack(header)
    return int(size)


class RequestError(Exception):
    """A method can't answer a request; the text is sent as the `error` of the reply."""


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
    os.read(lifeline, 1)  # the parent never writes: this returns when it is gone
    os.killpg(0, signal.SIGKILL)


def serve(worker: object, arguments: Sequence[str]) -> None:
    """Answer requests by the methods of `worker` until the connection closes.

    Args:
        worker: Its methods take a request and return a reply, both dicts.
        arguments: File descriptors of the connection, of the lifeline, and of the pipe to which a
            traceback is written when the process hangs or crashes.
    """
    descriptors = [int(text) for text in arguments]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    connection, lifeline, trace = socket.socket(fileno=descriptors[0]), *descriptors[1:]
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
        # What a function prints may be a completion.
        setattr(sys, name, SafeStream(stream, bytes_too=True))
    faulthandler.enable(trace, all_threads=False)
    faulthandler.register(signal.SIGUSR1, trace, all_threads=False)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    processors = os.cpu_count() or 1
    while True:
        try:
            request = json.loads(_read(connection, frame_size(_read(connection, HEADER_SIZE))))
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_PROF, (request["seconds"] + _GRACE) * processors)
        try:
            reply = getattr(worker, request["method"])(request)
        except RequestError as error:
            reply = {"error": str(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            connection.sendall(encode_frame(reply))
        except OSError:
            return
