"""The program of the process in which templates and patterns of strangers are evaluated.

A chat template is a program that comes with a model. It runs in the sandbox of jinja2 as
transformers sets it up, which keeps it from files and from Python's internals, but not from running
forever. Patterns are regular expressions in an adapter's configuration or in tokenizer.json.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_align.system.worker import serve


class Worker:
    """Answers the requests of `templates.Sandbox`."""

    def __init__(self) -> None:
        self._tokenizers: dict[str, Any] = {}

    def start(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Import what rendering needs, then limit the memory to `bytes` more than that."""
        if request["templates"]:
            from transformers.utils.chat_template_utils import render_jinja_template

            self._render = render_jinja_template
        # macOS doesn't enforce it; there, the parent measures.
        if sys.platform == "linux":
            with suppress(OSError, ValueError):
                pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
                limit = pages * resource.getpagesize() + request["bytes"]
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return {}

    def render(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Render a conversation; replies with the text, or with what was `raised` or `exceeded`."""
        try:
            rendered, _ = self._render(
                conversations=[request["conversation"]],
                tools=request["tools"],
                chat_template=request["template"],
                add_generation_prompt=request["generation_prompt"],
                **request["variables"],
            )
        except MemoryError:
            return {"exceeded": "memory"}
        except Exception as error:
            return {"raised": str(error)[:2000] or type(error).__name__}
        text = str(rendered[0])
        return {"exceeded": "length"} if len(text) > request["length"] else {"text": text}

    def load_tokenizer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the tokenizer whose JSON is `content`, as `name`."""
        from tokenizers import Tokenizer

        self._tokenizers[request["name"]] = Tokenizer.from_str(request["content"])
        return {}

    def encode(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Encode a text; replies `unknown` without the tokenizer, and with what was `raised`.

        The tokenizers library ends a match after 10,000,000 steps, by a panic that it prints.
        """
        tokenizer = self._tokenizers.get(request["name"])
        if tokenizer is None:
            return {"unknown": True}
        stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        try:
            tokenizer.encode(request["text"])
        except Exception:  # the tokenizer itself says it
            return {}
        except BaseException as error:  # a panic
            return {"raised": (str(error).splitlines() or [type(error).__name__])[0][:300]}
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            os.close(nowhere)
        return {}

    def match(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The names that a pattern matches as a whole; `raised` if the pattern is wrong."""
        try:
            compiled = re.compile(request["pattern"])
            return {"names": [name for name in request["names"] if compiled.fullmatch(name)]}
        except (re.error, RecursionError, MemoryError, OverflowError) as error:
            return {"raised": str(error) or type(error).__name__}


def main(arguments: Sequence[str]) -> None:
    """Answer requests until the connection closes."""
    serve(Worker(), arguments)
