"""Chat templates and patterns of strangers, evaluated in a process with limits.

A chat template is a program that comes with a model folder: nested loops run for days, and
`'a'.center(10**10)` takes all memory. So it is rendered in a separate process, with limits of time,
memory and length. The text is the same as transformers' own, which does the rendering there.
"""

from __future__ import annotations

import atexit
import hashlib
import inspect
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mlx_align.errors import ModelError
from mlx_align.system.worker_process import WorkerFailure, WorkerProcess

# Of one conversation. A real one of 100,000 characters takes 2 ms.
MAX_SECONDS = 5.0
MAX_BYTES = 1 << 30
# The longest text, characters. At 4 per token it is a million tokens.
MAX_LENGTH = 1 << 22
# Starting the process, on a busy machine.
_START_SECONDS = 120.0
_WORKER = "mlx_align.models.template_worker"
# Renders a text that was rendered before.
_RENDERED = "{{ rendered_text }}"


class SandboxError(Exception):
    """A template raised an error, or a pattern is wrong; the text is the message."""


class Sandbox:
    """The process that renders templates, started when it is first used and again after a failure.

    Args:
        templates: Whether it renders templates; patterns need no import that takes half a second.
    """

    def __init__(self, *, templates: bool) -> None:
        self._templates = templates
        self._process: WorkerProcess | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.close(0)
            self._process = None

    def request(self, method: str, message: Mapping[str, Any]) -> dict[str, Any]:
        """A method's reply.

        Raises:
            WorkerFailure: It exceeded the time or the memory.
        """
        with self._lock:
            try:
                if self._process is None:
                    # Numbers and libraries of the process itself take up to 0.3 GB.
                    self._process = WorkerProcess(_WORKER, MAX_BYTES + (1 << 29))
                    start = {"templates": self._templates, "bytes": MAX_BYTES}
                    self._process.request("start", start, _START_SECONDS)
                return self._process.request(method, message, MAX_SECONDS)
            except BaseException:
                self.close()
                raise


_TEMPLATES, _PATTERNS = Sandbox(templates=True), Sandbox(templates=False)

# Parts of the patterns below: English contractions, marks and line ends.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
# Patterns that take time in proportion to the text. Before a tokenizer with other patterns encodes
# a text, the process with limits does.
KNOWN_PATTERNS = frozenset(
    (
        # GPT-2, Llama 3, Qwen 2 and 3, Qwen 3.5, GPT-4o, Mistral, DeepSeek
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        _WORDS + "|" + _FIRST + r"\p{L}+|\p{N}{1,3}|" + _MARKS,
        _WORDS + "|" + _FIRST + r"\p{L}+|\p{N}|" + _MARKS,
        _WORDS + "|" + _FIRST + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES,
        f"{_FIRST}{_UPPER}*{_LOWER}+{_WORDS}?|{_FIRST}{_UPPER}+{_LOWER}*{_WORDS}?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES,
        rf"{_FIRST}{_UPPER}*{_LOWER}+|{_FIRST}{_UPPER}+{_LOWER}*|\p{{N}}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES,
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
        r" ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
        r"[一-龥぀-ゟ゠-ヿ]+",
        # Digits
        r"\p{N}{1,3}",
        r"\p{N}",
        r"\d",
        r"[0-9]",
        r"[0-9][0-9][0-9]",
    )
)


def matching_names(pattern: str, names: Sequence[str]) -> set[str]:
    """The names that a stranger's regular expression matches as a whole.

    Raises:
        SandboxError: It is not a regular expression, or takes too long.
    """
    if re.fullmatch(r"[\w.]*", pattern):  # a name, as in most adapters
        return {name for name in names if re.fullmatch(pattern, name)}
    try:
        reply = _PATTERNS.request("match", {"pattern": pattern, "names": list(names)})
    except WorkerFailure as failure:
        raise SandboxError(str(failure)) from None
    if "raised" in reply:
        raise SandboxError(reply["raised"])
    return set(reply["names"])


def limit_template(tokenizer: Any, folder: Path) -> None:
    """Let a Hugging Face tokenizer render its chat template in the process with limits.

    Args:
        tokenizer: The tokenizer, changed in place. One whose class has its own rendering, without
            a template, is left as it is.
        folder: The model's folder, for messages.
    """
    if type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template:
        tokenizer.apply_chat_template = _LimitedTemplate(tokenizer, folder)


def limit_patterns(tokenizer: Any, folder: Path) -> None:
    """Let a Hugging Face tokenizer with unknown patterns encode texts in the process first.

    A regular expression in tokenizer.json may take days. A text that the process encodes within the
    limit is then encoded here, so that the tokens are the tokenizer's own.

    Args:
        tokenizer: The tokenizer, changed in place.
        folder: The model's folder, for messages.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    # Without the vocabulary, which may have megabytes.
    parts = [one.__getstate__() for one in (backend.normalizer, backend.pre_tokenizer) if one]
    if not set(_patterns([json.loads(part) for part in parts])) <= KNOWN_PATTERNS:
        tokenizer.encode = _LimitedEncoding(tokenizer, folder, backend.to_str())


def _patterns(part: Any) -> Iterator[str]:
    """The regular expressions in a part of tokenizer.json."""
    if isinstance(part, Mapping):
        if isinstance(part.get("Regex"), str):
            yield part["Regex"]
        part = list(part.values())
    if isinstance(part, list):
        for item in part:
            yield from _patterns(item)


class _LimitedEncoding:
    """Replaces `encode` of a tokenizer."""

    def __init__(self, tokenizer: Any, folder: Path, content: str) -> None:
        self._encode, self._folder, self._content = tokenizer.encode, folder, content
        self._name = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def __call__(self, text: Any, *arguments: Any, **options: Any) -> Any:
        """As the tokenizer's own.

        Raises:
            ModelError: A pattern takes too long on the text.
        """
        if isinstance(text, str):
            self._check(text)
        return self._encode(text, *arguments, **options)

    def _check(self, text: str) -> None:
        message = {"name": self._name, "text": text}
        try:
            reply = _PATTERNS.request("encode", message)
            if "unknown" in reply:
                _PATTERNS.request("load_tokenizer", {"name": self._name, "content": self._content})
                reply = _PATTERNS.request("encode", message)
        except WorkerFailure as failure:
            reply = {"raised": str(failure).partition(" (")[0]}
        if "raised" in reply:
            raise ModelError(
                f"{self._folder}: its tokenizer was given up on a text of {len(text):,} "
                f"characters: {reply['raised']}; are the patterns in its tokenizer.json as they "
                "were published?"
            )


class _LimitedTemplate:
    """Replaces `apply_chat_template` of a tokenizer."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        self._tokenizer, self._folder = tokenizer, folder
        own = inspect.signature(type(tokenizer).apply_chat_template).parameters
        self._own = set(own) - {"self", "kwargs"}

    def __call__(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> Any:
        """As `PreTrainedTokenizerBase.apply_chat_template`, for one conversation.

        Raises:
            ModelError: The template exceeds a limit.
            SandboxError: The template raised an error.
        """
        own = {name: value for name, value in options.items() if name in self._own}
        message = {
            "conversation": list(conversation),
            "tools": None if tools is None else list(tools),
            "template": self._tokenizer.get_chat_template(chat_template, tools),
            "generation_prompt": add_generation_prompt,
            "variables": {
                **self._tokenizer.special_tokens_map,
                **{name: value for name, value in options.items() if name not in self._own},
            },
            "length": MAX_LENGTH,
        }
        try:
            reply = _TEMPLATES.request("render", message)
        except WorkerFailure as failure:
            raise self._error(str(failure).partition(" (")[0]) from None
        if "exceeded" in reply:
            raise self._error(
                f"needs more than {MAX_BYTES >> 30} GB of memory"
                if reply["exceeded"] == "memory"
                else f"writes more than {MAX_LENGTH:,} characters"
            )
        if "raised" in reply:
            raise SandboxError(reply["raised"])
        return type(self._tokenizer).apply_chat_template(
            self._tokenizer,
            [{"role": "user", "content": ""}],
            chat_template=_RENDERED,
            rendered_text=reply["text"],
            **own,
        )

    def _error(self, what: str) -> ModelError:
        return ModelError(f"{self._folder}: its chat template was given up: {what}")
