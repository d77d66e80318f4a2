"""Generating text with a base model and, if given, the adapter of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_align.data.chat_template import ChatTemplate, inspect_chat_template
from mlx_align.errors import DataError
from mlx_align.inference.scoring import TextOrMessages, make_prompt, tokenize_for_scoring
from mlx_align.inference.trained_run import match_adapter_dtype, read_trained_run
from mlx_align.models.generation import Generated, generate_groups
from mlx_align.models.loading import LanguageModel, load_adapters, open_model
from mlx_align.models.row_limits import check_rows
from mlx_align.models.weights import AdapterWeights
from mlx_align.types import Message, PromptGroup, Text, TokenizedGroup

# The default of mlx_lm.generate.
MAX_TOKENS = 256
MAX_SEQ_LENGTH = 4096


@dataclass(frozen=True)
class TextGenerator:
    """A policy loaded to generate text; make one with `TextGenerator.load`.

    Attributes:
        model: The base model.
        style: Chat template of its tokenizer.
        weights: Adapter weights of the policy; {} for the base model itself.
    """

    model: LanguageModel
    style: ChatTemplate
    weights: AdapterWeights

    @classmethod
    def load(cls, model: str, adapter_path: str | Path | None = None) -> TextGenerator:
        """Load a model, with a run's adapter if given.

        Args:
            model: The base model, folder or hub name.
            adapter_path: The run folder; None for the base model itself.

        Raises:
            ModelError: Model or run can't be loaded, or it generates no text.
        """
        run = None if adapter_path is None else read_trained_run(adapter_path)
        folder = open_model(model)
        loaded, (weights,) = load_adapters(folder, [None if run is None else run.folder])
        if run is not None:
            loaded = match_adapter_dtype(loaded, run)
        style = inspect_chat_template(
            folder.tokenizer, "auto" if run is None else run.sampling_thinking
        )
        return cls(loaded, style, weights)

    def generate(
        self,
        prompt: TextOrMessages,
        *,
        max_tokens: int = MAX_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
        apply_chat_template: bool = True,
    ) -> str:
        """Generate one completion.

        Args:
            prompt: Text, or messages ({"role": …, "content": …}).
            max_tokens: Maximum length of the completion, tokens.
            temperature: 0 for greedy decoding; 1 samples from the policy itself.
            seed: Random seed for sampling.
            apply_chat_template: Whether text becomes a user message if the model has a chat
                template; if not, it is used verbatim.

        Returns:
            The completion's text, without its end token.

        Raises:
            DataError: The prompt is too long or can't be rendered.
        """
        text = self.as_prompt("generate()", prompt, apply_chat_template=apply_chat_template)
        group = PromptGroup(text, (), "generate()")
        (tokens,) = tokenize_for_scoring([group], self.style, MAX_SEQ_LENGTH)
        if not isinstance(tokens, TokenizedGroup):
            raise DataError(f"can't be answered: {tokens.reason}")
        ((completion,),) = self.sample(
            [tokens], 1, max_tokens=max_tokens, temperature=temperature, seed=seed
        )
        return self.decode(completion)

    def sample(
        self,
        prompts: Sequence[TokenizedGroup],
        n: int,
        *,
        max_tokens: int = MAX_TOKENS,
        temperature: float = 1.0,
        seed: int = 0,
        on_token: Callable[[], None] | None = None,
    ) -> list[list[Generated]]:
        """Sample `n` completions of each tokenized prompt.

        Args:
            prompts: Groups whose prompts are completed; their completions are ignored.
            n: Completions per prompt.
            max_tokens: Maximum length of a completion, tokens.
            temperature: 1 samples from the policy itself; 0 is greedy.
            seed: Random seed for sampling.
            on_token: Called after every token.

        Raises:
            DataError: The model doesn't embed one of the tokens, or a row is too long for it.
        """
        check_rows(self.model.folder, prompts, max_tokens, source="a prompt with max_tokens")
        with self.model.use_adapter(self.weights):
            return generate_groups(
                self.model.module,
                [prompt.prompt.tolist() for prompt in prompts],
                n,
                sorted(self.model.folder.tokenizer.eos_token_ids),
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                on_token=on_token,
            )

    def decode(self, completion: Generated) -> str:
        """The text of a sampled completion, without its end token."""
        ids = completion.tokens[: len(completion.tokens) - completion.finished]
        return str(self.model.folder.tokenizer.decode(ids))

    def as_prompt(self, source: str, prompt: TextOrMessages, *, apply_chat_template: bool) -> Text:
        """A prompt as given by a Python caller; text can become a user message.

        Args:
            source: Name for error messages.
            prompt: Text or messages.
            apply_chat_template: Whether to turn text into a user message. Has no effect if the
                model has no chat template.

        Raises:
            DataError: It is neither text nor messages.
        """
        text = make_prompt(source, prompt)
        if isinstance(text, str) and apply_chat_template and self.style.has_template:
            return (Message("user", text),)
        return text
