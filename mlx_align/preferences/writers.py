"""The models that write answers, critiques and revisions: one of mlx-lm, or an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from mlx_align.data.chat_template import inspect_chat_template
from mlx_align.inference.generate import TextGenerator
from mlx_align.inference.scoring import tokenize_for_scoring
from mlx_align.preferences.endpoint import Endpoint, reply_text
from mlx_align.types import Message, PromptGroup, TokenizedGroup


class Written(NamedTuple):
    """What a writer wrote.

    Attributes:
        text: The text; "" if it wrote nothing.
        problem: Why it can't be used: too long a prompt, a truncated or an empty text; else "".
    """

    text: str
    problem: str = ""


class Writer(Protocol):
    """Writes the next turn of conversations."""

    @property
    def name(self) -> str:
        """The writer's name in the data."""

    def write(
        self,
        conversations: Sequence[tuple[Message, ...]],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[Written]:
        """The assistant's next turn of each conversation.

        Raises:
            MlxAlignError: The writer can't be used.
        """


@dataclass(frozen=True)
class ModelWriter:
    """A model of mlx-lm, with an adapter or without.

    Attributes:
        name: Model and adapter as given.
        generator: The loaded model.
        max_seq_length: Longest conversation with its next turn, tokens.
    """

    name: str
    generator: TextGenerator
    max_seq_length: int = 4096

    @classmethod
    def load(cls, model: str, adapter_path: str | None = None) -> ModelWriter:
        """Load a model, with a run's adapter if given. It writes without thinking first.

        Raises:
            ModelError: Model or run can't be loaded.
        """
        generator = TextGenerator.load(model, adapter_path)
        style = inspect_chat_template(generator.model.folder.tokenizer, "off")
        name = model if adapter_path is None else f"{model} + {adapter_path}"
        return cls(name, replace(generator, style=style))

    def write(
        self,
        conversations: Sequence[tuple[Message, ...]],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[Written]:
        """Sample the assistant's next turn of each conversation."""
        folder = self.generator.model.folder
        limit = min(self.max_seq_length, folder.max_positions or self.max_seq_length)
        room = max(limit - max_tokens, 1)
        groups = [PromptGroup(turns, (), "a conversation") for turns in conversations]
        results = tokenize_for_scoring(groups, self.generator.style, room)
        prompts = [one for one in results if isinstance(one, TokenizedGroup)]
        sampled = iter(
            self.generator.sample(
                prompts, 1, max_tokens=max_tokens, temperature=temperature, seed=seed
            )
            if prompts
            else ()
        )
        found = []
        for result in results:
            if not isinstance(result, TokenizedGroup):
                found.append(Written("", result.reason))
                continue
            (one,) = next(sampled)
            turn = Message("assistant", self.generator.decode(one))
            text = self.generator.style.split_reasoning(turn)[1]
            found.append(_written(text, one.finished, max_tokens))
        return found


@dataclass(frozen=True)
class EndpointWriter:
    """A model behind an OpenAI-compatible endpoint.

    Attributes:
        endpoint: The endpoint.
    """

    endpoint: Endpoint

    @property
    def name(self) -> str:
        """The model's name and the address."""
        return f"{self.endpoint.model} at {self.endpoint.url}"

    def write(
        self,
        conversations: Sequence[tuple[Message, ...]],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[Written]:
        """Request the assistant's next turn of each conversation."""
        choices = self.endpoint.complete(
            conversations, max_tokens=max_tokens, temperature=temperature, seed=seed
        )
        return [
            _written(reply_text(choice) or "", choice.get("finish_reason") != "length", max_tokens)
            for choice in choices
        ]


def _written(text: str, finished: bool, max_tokens: int) -> Written:
    text = text.strip()
    problem = "" if finished else f"truncated at {max_tokens:,} tokens"
    return Written(text, problem if text else "empty")
