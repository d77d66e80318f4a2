r"""Convert conversations and strings to token ids, exactly as generation does.

Conversations go through the tokenizer's chat template as in `mlx_lm.generate`: a BOS token that
the template leaves out is not added, and one that is written twice is reduced to one. Tokenizers
without a template get `\n\nHuman: …\n\nAssistant: …`. Strings are tokenised without changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_align.data.readers import one_line
from mlx_align.types import Message

Ids = list[int]

_PLAIN_NAMES = {"user": "Human", "assistant": "Assistant", "tool": "Tool"}
# Texts of the conversations that are rendered to inspect a template.
_PROBE_USER = "Qx0w"
_PROBE_ASSISTANT = ("Zq7", "Xw9")
_PROBE_SYSTEM = "Sv3k"


class TemplateError(Exception):
    """The chat template raised an error for a conversation; the text is its message."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A tokenizer's rendering of conversations and strings.

    Attributes:
        tokenizer: The tokenizer, wrapped by mlx-lm.
        has_template: False if conversations are rendered as plain Human/Assistant turns.
        folds_system: The template rejects or ignores system turns, so their text is put in front
            of the first user turn.
        ending: The ids that the template writes after a completion, starting with the end-of-turn
            token; empty if it writes none.
        eos: The id that ends a completion if the template writes no end token.
        notes: Sentences about the tokenizer that users should know.
        chat_notes: The same, for data with conversations.
    """

    tokenizer: Any
    has_template: bool
    folds_system: bool
    ending: tuple[int, ...]
    eos: int | None
    notes: tuple[str, ...]
    chat_notes: tuple[str, ...] = ()

    def fold_system(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Put system turns in front of the first user turn if the template needs that."""
        system = [turn.content for turn in messages if turn.role == "system"]
        rest = [turn for turn in messages if turn.role != "system"]
        first = next((i for i, turn in enumerate(rest) if turn.role == "user"), None)
        if not self.folds_system or not system or first is None:
            return tuple(messages)
        rest[first] = Message("user", "\n\n".join([*system, rest[first].content]))
        return tuple(rest)

    def render(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        thinking: bool | None = None,
    ) -> Ids:
        """Render a conversation as token ids.

        Args:
            messages: The turns, after `fold_system`.
            generation_prompt: Whether to append the start of an assistant turn.
            thinking: The value of `enable_thinking` for the template; None is mlx-lm's default.

        Raises:
            TemplateError: The template raised an error.
        """
        if self.has_template:
            ids: Ids = list(_apply(self.tokenizer, messages, generation_prompt, thinking))
            return self._single_bos(ids)
        text = "".join(
            f"\n\n{_PLAIN_NAMES[turn.role]}: {turn.content}"
            if turn.role != "system"
            else turn.content
            for turn in messages
        )
        return self.encode(text + ("\n\nAssistant:" if generation_prompt else ""))

    def encode(self, text: str) -> Ids:
        """Tokenise a string: one BOS if the tokenizer adds it, no EOS at the end."""
        ids: Ids = self._single_bos(list(self.tokenizer.encode(text)))
        while len(ids) > 1 and ids[-1] == self.eos:
            ids.pop()
        return ids

    def trim_to_end_token(self, ids: Ids) -> tuple[Ids, bool]:
        r"""Cut a rendered conversation right after the token that ends its completion.

        Removes what the template writes after that token (a "\n", the start of the next turn)
        and an end token that is part of the data.

        Returns:
            The ids, and whether the end token had to be appended.
        """
        size = len(self.ending)
        if size and tuple(ids[-size:]) == self.ending:
            ids = ids[: len(ids) - size + 1]
            while len(ids) > 1 and ids[-2] == ids[-1]:
                ids.pop(-2)
            return ids, False
        end = self.ending[0] if size else self.eos
        if end is None:
            return ids, False
        if size and end in ids[-size - 1 :]:
            return ids[: len(ids) - ids[::-1].index(end)], False
        return [*ids, end], True

    def _single_bos(self, ids: Ids) -> Ids:
        bos = self.tokenizer.bos_token_id
        start = 0
        while bos is not None and ids[start : start + 2] == [bos, bos]:
            start += 1
        return ids[start:]


def inspect_chat_template(tokenizer: Any) -> ChatTemplate:
    """Find out how a tokenizer renders conversations, by rendering two short ones.

    Args:
        tokenizer: An mlx-lm `TokenizerWrapper` or a Hugging Face tokenizer.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    # Rows that are too long are counted and reported later. The warning of transformers would name
    # another limit.
    warned = getattr(tokenizer, "deprecation_warnings", {})
    warned["sequence-length-is-longer-than-the-specified-maximum"] = True
    stops = set(tokenizer.eos_token_ids)
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(stops, default=None)
    notes: tuple[str, ...] = ()
    if eos is None:
        notes = ("The tokenizer has no EOS token: completions end without one.",)
    if not tokenizer.has_chat_template:
        plain = (
            "The tokenizer has no chat template: conversations are written as plain "
            "Human/Assistant turns."
        )
        return ChatTemplate(tokenizer, False, False, (), eos, notes, (plain,))
    ending = _ending(tokenizer, stops)
    chat_notes: tuple[str, ...] = ()
    if ending and ending[0] not in stops:
        token = tokenizer.convert_ids_to_tokens(ending[0])
        chat_notes = (
            f"Completions end with {token}, but generation does not stop there: add it to "
            "eos_token_id in the model's generation_config.json.",
        )
    folds = not _supports_system(tokenizer)
    return ChatTemplate(tokenizer, True, folds, ending, eos, notes, chat_notes)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix of two sequences."""
    limit = min(len(one), len(other))
    if one[:limit] == other[:limit]:
        return limit
    return next(i for i in range(limit) if one[i] != other[i])


def _ending(tokenizer: Any, stops: set[int]) -> tuple[int, ...]:
    """The ids that the template writes after a completion, starting with the end token.

    Two completions with different last characters are rendered; their common suffix is written by
    the template. The end token is the first one in it at which generation stops, or else the first
    special token.
    """
    user = Message("user", _PROBE_USER)
    turns = [(user, Message("assistant", text)) for text in _PROBE_ASSISTANT]
    try:
        one, other = (_apply(tokenizer, pair) for pair in turns)
        text = _apply(tokenizer, turns[0], tokenize=False)
    except TemplateError:
        return ()
    written = str(text).rpartition(_PROBE_ASSISTANT[0])[2]
    tail = one[len(one) - common_prefix(one[::-1], other[::-1]) :]
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = set(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
    special.discard(tokenizer.unk_token_id)
    for ends in (stops, special):
        for place, token in enumerate(tail):
            if token in ends and str(tokenizer.convert_ids_to_tokens(token)) in written:
                return tuple(tail[place:])
    return ()


def _supports_system(tokenizer: Any) -> bool:
    turns = (Message("system", _PROBE_SYSTEM), Message("user", _PROBE_USER))
    try:
        return _PROBE_SYSTEM in str(_apply(tokenizer, turns, tokenize=False))
    except TemplateError:
        return False


def _apply(
    tokenizer: Any,
    messages: Sequence[Message],
    generation_prompt: bool = False,
    thinking: bool | None = None,
    tokenize: bool = True,
) -> Any:
    turns = [{"role": turn.role, "content": turn.content} for turn in messages]
    options = {} if thinking is None else {"enable_thinking": thinking}
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=tokenize, add_generation_prompt=generation_prompt, **options
        )
    # A template is a program that comes with the model and may raise anything.
    except Exception as error:
        raise TemplateError(one_line(error, 100)) from None
