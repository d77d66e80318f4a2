"""A conversation with a run's policy, and with the model it started from."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from mlx_align.data.chat_template import ChatTemplate, Thinking, inspect_chat_template
from mlx_align.errors import ConfigError, DataError
from mlx_align.inference.generate import MAX_SEQ_LENGTH
from mlx_align.inference.scoring import tokenize_for_scoring
from mlx_align.inference.trained_run import match_adapter_dtype, read_trained_run
from mlx_align.models.loading import LanguageModel, load_adapters, open_model
from mlx_align.models.row_limits import check_rows
from mlx_align.models.weights import AdapterWeights
from mlx_align.types import Message, PromptGroup, TokenizedGroup

BEFORE, AFTER, ANSWER = "before", "after", "answer"
_FIND_REFERENCE = "restore it, or leave --compare out"


@dataclass
class Speaker:
    """One model in a conversation, with its own answers.

    Attributes:
        name: "before" for the model that a run started from, "after" for the run; "answer" if
            there is only one.
        weights: Its adapter weights; {} for the base model itself.
        turns: The conversation so far.
        truncated: Whether its last answer reached the limit of tokens.
    """

    name: str
    weights: AdapterWeights
    turns: tuple[Message, ...] = ()
    truncated: bool = False
    cache: list[Any] | None = field(default=None, repr=False)
    seen: list[int] = field(default_factory=list, repr=False)


class Chat:
    """A conversation; all speakers share one copy of the base model's weights.

    Args:
        model: The base model.
        style: Its chat template.
        speakers: Who answers, in this order.
        system: System prompt of the conversation.
        max_tokens: Longest answer, tokens.
        max_seq_length: Longest conversation, tokens.
        temperature: 0 takes the likeliest token.
        seed: Random seed for sampling.
    """

    def __init__(
        self,
        model: LanguageModel,
        style: ChatTemplate,
        speakers: list[Speaker],
        *,
        system: str | None = None,
        max_tokens: int = 256,
        max_seq_length: int = MAX_SEQ_LENGTH,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.model, self.style, self.speakers = model, style, speakers
        self.max_tokens, self.max_seq_length = max_tokens, max_seq_length
        self._system, self._sampler = system, make_sampler(temperature)
        mx.random.seed(seed)
        self.reset()

    @classmethod
    def load(
        cls,
        model: str,
        adapter_path: str | Path | None = None,
        *,
        compare: bool = False,
        thinking: Thinking | None = None,
        max_seq_length: int | None = None,
        **options: Any,
    ) -> Chat:
        """Load a model, with a run's adapter if given.

        Args:
            model: The base model, folder or hub name.
            adapter_path: The run folder; None to talk to the base model.
            compare: Whether the model that the run started from answers too.
            thinking: Thinking of the chat template; None for the run's.
            max_seq_length: Longest conversation, tokens; None for what the model was made for.
            **options: As for `Chat`.

        Raises:
            ConfigError: There is no run to compare, or the run is a reward model.
            ModelError: Model or run can't be loaded.
        """
        if adapter_path is None and compare:
            raise ConfigError("--compare needs a run, RUN or --adapter-path; or leave it out")
        run = None if adapter_path is None else read_trained_run(adapter_path)
        if run is not None and run.command == "reward":
            raise ConfigError(
                f"{adapter_path}: is a reward model, which gives no answers; use mlx-align score"
            )
        folder = open_model(model)
        adapters = [None if run is None else run.folder]
        if run is not None and compare:
            adapters.insert(0, run.find_reference(_FIND_REFERENCE))
        loaded, weights = load_adapters(folder, adapters)
        if run is not None:
            loaded = match_adapter_dtype(loaded, run)
        names = (BEFORE, AFTER) if len(weights) == 2 else (ANSWER,)
        default: Thinking = "auto" if run is None else run.sampling_thinking
        style = inspect_chat_template(folder.tokenizer, thinking or default)
        longest = max_seq_length or folder.max_positions or MAX_SEQ_LENGTH
        speakers = [Speaker(name, one) for name, one in zip(names, weights, strict=True)]
        return cls(loaded, style, speakers, max_seq_length=longest, **options)

    def reset(self) -> None:
        """Begin a new conversation."""
        system = (Message("system", self._system),) if self._system else ()
        for speaker in self.speakers:
            speaker.turns, speaker.cache, speaker.seen = system, None, []

    def answer(self, speaker: Speaker, question: str) -> Generator[str, None, None]:
        """Ask one speaker; yields its answer in pieces as they are generated.

        Question and answer become part of the conversation. If the caller stops early, the answer
        ends there.

        Raises:
            DataError: The conversation is too long, or the model can't read it. It is as before.
        """
        turns = (*speaker.turns, Message("user", question))
        prompt = self._tokenize(turns)
        pieces: list[str] = []
        speaker.truncated = False
        cache, rest = self._resume_cache(speaker, prompt)
        generated: list[int] = []
        try:
            with self.model.use_adapter(speaker.weights):
                for piece in stream_generate(
                    self.model.module,
                    self.model.folder.tokenizer,
                    rest,
                    max_tokens=self.max_tokens,
                    sampler=self._sampler,
                    prompt_cache=cache,
                ):
                    generated.append(piece.token)
                    speaker.truncated = piece.finish_reason == "length"
                    if piece.text:
                        pieces.append(piece.text)
                        yield piece.text
        finally:
            speaker.turns = (*turns, Message("assistant", "".join(pieces).strip()))
            speaker.cache, speaker.seen = cache, [*prompt, *generated]

    def _tokenize(self, turns: tuple[Message, ...]) -> list[int]:
        group = PromptGroup(turns, (), "the conversation")
        limit = self.max_seq_length - self.max_tokens
        (tokens,) = tokenize_for_scoring([group], self.style, max(limit, 1))
        if not isinstance(tokens, TokenizedGroup):
            raise DataError(f"the conversation can't be continued: {tokens.reason}; /reset it")
        check_rows(self.model.folder, [tokens], self.max_tokens, source="the conversation")
        ids: list[int] = tokens.prompt.tolist()
        return ids

    def _resume_cache(self, speaker: Speaker, prompt: list[int]) -> tuple[list[Any], list[int]]:
        """The cache of the conversation so far, and the part of the prompt that is not in it.

        Only plain caches are used again: others can't be cut to the part that is the same.
        """
        cache = speaker.cache
        if cache is None or not all(type(layer) is KVCache for layer in cache):
            return make_prompt_cache(self.model.module), prompt
        held = speaker.seen[: cache[0].offset]
        same = next(
            (i for i, (a, b) in enumerate(zip(held, prompt, strict=False)) if a != b),
            min(len(held), len(prompt)),
        )
        same = min(same, len(prompt) - 1)  # the last token predicts the answer
        for layer in cache:
            layer.trim(layer.offset - same)
        return cache, prompt[same:]
