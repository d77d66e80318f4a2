"""A judge or writer behind an OpenAI-compatible endpoint (`mlx_lm.server`, vLLM, a provider)."""

from __future__ import annotations

import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from mlx_align.errors import ConfigError, ModelError
from mlx_align.preferences.verdicts import (
    LABELS,
    TOKEN_SPACES,
    Comparison,
    Verdict,
    invalid_verdict,
    judge_prompt,
    label_of_token,
    parse_reply,
    verdict_from_probabilities,
)
from mlx_align.types import Message

# mlx_lm.server gives at most 10 alternatives, OpenAI 20.
TOP_LOGPROBS = 10
# A verdict is one letter; some models write a newline or a quote before it.
VERDICT_TOKENS = 8
ATTEMPTS = 4
# Errors of a server that may be gone at the next attempt.
_TEMPORARY = (408, 409, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint for chat completions.

    Attributes:
        url: Base address, up to and with `/v1`.
        model: Name of the model there.
        key_variable: Environment variable with the API key; None for none. The key is read when
            needed and never written.
        timeout: Seconds that a request may take.
        concurrency: Requests at a time.
        retry_seconds: Wait before the second attempt; doubled for each further one.
    """

    url: str
    model: str
    key_variable: str | None = None
    timeout: float = 120.0
    concurrency: int = 4
    retry_seconds: float = 1.0
    # Options that the server refused, left out of later requests.
    _refused: set[str] = field(default_factory=set, compare=False, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(
                f"--url {self.url}: expected an address such as http://127.0.0.1:8080/v1"
            )
        if self.key_variable is not None and not os.environ.get(self.key_variable):
            raise ConfigError(
                f"--api-key-variable {self.key_variable}: no such environment variable; set it to "
                "the API key"
            )

    def complete(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_tokens: int,
        temperature: float,
        logprobs: bool = False,
        seed: int | None = None,
    ) -> list[dict[str, Any]]:
        """One reply per conversation: the first choice, as the endpoint gives it.

        Raises:
            ModelError: The endpoint can't be reached, refuses the request, or gives no choices.
        """

        def one(index: int) -> dict[str, Any]:
            body: dict[str, Any] = {
                "model": self.model,
                "messages": [turn.to_dict() for turn in conversations[index]],
                "max_tokens": max_tokens,
                "temperature": temperature,
            }
            if seed is not None:
                body["seed"] = seed + index
            if logprobs:
                body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
            return self._request(body)

        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(one, range(len(conversations))))

    def _request(self, body: dict[str, Any]) -> dict[str, Any]:
        delay = self.retry_seconds
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._choice(self._send(self._supported(body)))
            except _HTTPError as error:
                if self._drop_refused(error):
                    continue
                if error.code not in _TEMPORARY or attempt == ATTEMPTS:
                    raise ModelError(
                        f"{self.url}: answered {error.code} for model {self.model} "
                        f"({error.text or 'no message'})"
                    ) from None
            except (OSError, ValueError) as error:
                if attempt == ATTEMPTS:
                    reason = getattr(error, "reason", None) or error
                    raise ModelError(
                        f"{self.url}: no usable answer after {ATTEMPTS} attempts ({reason}); is "
                        "the server running?"
                    ) from error
            time.sleep(delay)
            delay *= 2
        raise ModelError(f"{self.url}: refused every form of the request")

    def _supported(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request without what the server has refused before."""
        kept = {name: value for name, value in body.items() if name not in self._refused}
        if "max_tokens" in self._refused:
            kept["max_completion_tokens"] = body["max_tokens"]
        return kept

    def _drop_refused(self, error: _HTTPError) -> bool:
        """Whether the server refused an option that can be left out."""
        if error.code not in (400, 422):
            return False
        for name, names in (
            ("max_tokens", ("max_tokens",)),
            ("logprobs", ("logprobs", "top_logprobs")),
            ("temperature", ("temperature",)),
            ("seed", ("seed",)),
        ):
            if name in error.text and not self._refused >= set(names):
                self._refused.update(names)
                return True
        return False

    def _send(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self.key_variable, '')}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions",
            data=json.dumps(body).encode(),
            headers=headers,
            method="POST",
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                text = error.read(2000).decode("utf-8", "replace")
            raise _HTTPError(error.code, " ".join(text.split())[:300]) from None

    def _choice(self, reply: Any) -> dict[str, Any]:
        try:
            choice = reply["choices"][0]
            if not isinstance(choice["message"], dict):
                raise TypeError
        except (KeyError, IndexError, TypeError):
            raise ValueError("its reply has no choices") from None
        return dict(choice)


class _HTTPError(Exception):
    """The server's answer was an error."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


@dataclass(frozen=True)
class EndpointJudge:
    """A model behind an endpoint.

    The verdict is the probabilities of the letters where the server gives log-probs, and the
    letter alone where it doesn't.

    Attributes:
        endpoint: The endpoint.
        min_mass: The least probability of all verdicts together.
    """

    endpoint: Endpoint
    min_mass: float = 0.5

    ignores_order = False

    @property
    def name(self) -> str:
        """The model's name and the address."""
        return f"{self.endpoint.model} at {self.endpoint.url}"

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """The verdicts, from log-probs or replies.

        Raises:
            ModelError: The endpoint can't be used.
        """
        choices = self.endpoint.complete(
            [judge_prompt(one) for one in comparisons],
            max_tokens=VERDICT_TOKENS,
            temperature=0.0,
            logprobs=True,
        )
        return [self._verdict(choice) for choice in choices]

    def _verdict(self, choice: dict[str, Any]) -> Verdict:
        probabilities = _label_probabilities(choice.get("logprobs"))
        if probabilities is not None:
            return verdict_from_probabilities(probabilities, self.min_mass)
        text = reply_text(choice)
        return invalid_verdict("empty reply") if text is None else parse_reply(text)


def reply_text(choice: dict[str, Any]) -> str | None:
    """The text of a reply; None for a reply without text, such as a refusal."""
    content = choice["message"].get("content")
    return content if isinstance(content, str) else None


def _label_probabilities(logprobs: Any) -> list[float] | None:
    """The probabilities of A, B and C at the first token that is not only space; None without."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    for position in content if isinstance(content, list) else ():
        alternatives = position.get("top_logprobs") if isinstance(position, dict) else None
        if not alternatives:
            return None
        if not str(position.get("token", "")).strip(TOKEN_SPACES):
            continue
        found = dict.fromkeys(LABELS, 0.0)
        for one in alternatives:
            label = label_of_token(str(one.get("token", "")))
            logprob = one.get("logprob")
            if label is not None and isinstance(logprob, int | float):
                found[label] += math.exp(min(float(logprob), 0.0))
        return list(found.values())
    return None
