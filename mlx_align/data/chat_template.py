r"""Convert conversations and strings to token ids, exactly as generation does.

Conversations go through the tokenizer's chat template as in `mlx_lm.generate`: a BOS token that
the template leaves out is not added, and one that is written twice is reduced to one. Tokenizers
without a template get `\n\nHuman: …\n\nAssistant: …`. Strings are tokenised without changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_align.data.readers import one_line
from mlx_align.errors import MlxAlignError
from mlx_align.types import Message

Ids = list[int]

_PLAIN_NAMES = {"user": "Human", "assistant": "Assistant", "tool": "Tool"}
# Texts of the conversations that are rendered to inspect a template.
_PROBE_USER = "Qx0w"
_PROBE_ASSISTANT = ("Zq7", "Xw9")
_PROBE_SYSTEM = "Sv3k"
_PROBE_REASONING = "Rk4t"
# Fields in which templates look for the thinking of a turn: most; gpt-oss; a few.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# The reasoning goes into the content, as <think>…</think>.
_INLINE = "content"

Tools = Sequence[Mapping[str, Any]]
# Whether to render assistant turns with the template's thinking on; auto: where there is some.
Thinking = Literal["auto", "on", "off"]

_USER = ({"role": "user", "content": _PROBE_USER},)


@dataclass(frozen=True, slots=True)
class FinishedConversation:
    """A rendered conversation whose last turn is the assistant's.

    Attributes:
        ids: Its token ids, up to the end token.
        text: The text that was tokenised.
        appended: The template writes no end token, so EOS was appended.
    """

    ids: Ids
    text: str
    appended: bool


class TemplateError(Exception):
    """The chat template raised an error for a conversation; the text is its message."""


TEXT_NOTE = (
    "The prompts are plain text, so the model's chat template is not used. A chat model needs "
    "messages: mlx-align data convert --as-messages writes them."
)


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
        stops: The ids at which generation stops.
        switches_thinking: Whether the start of an assistant turn depends on `enable_thinking`.
        reasoning_key: The field of a message from which the template takes the reasoning;
            "content" if it has none, and the reasoning is written into the content as
            <think>…</think>; empty if the tokenizer doesn't know thinking at all.
        thinking: Whether groups are rendered with thinking on; see `mlx_align.data.tokenization`.
    """

    tokenizer: Any
    has_template: bool
    folds_system: bool
    ending: tuple[int, ...]
    eos: int | None
    notes: tuple[str, ...]
    chat_notes: tuple[str, ...] = ()
    stops: frozenset[int] = frozenset()
    switches_thinking: bool = False
    reasoning_key: str = _INLINE
    thinking: Thinking = "auto"

    def notes_on(self, *, chats: bool, text: bool) -> tuple[str, ...]:
        """The notes that users of some data should know.

        Args:
            chats: Whether the data has conversations.
            text: Whether it has prompts that are plain text.
        """
        notes = self.notes + (self.chat_notes if chats else ())
        return (*notes, TEXT_NOTE) if text and self.has_template else notes

    @property
    def think_tags(self) -> tuple[str, str]:
        """What opens and closes the thinking."""
        tags = (getattr(self.tokenizer, name, None) for name in ("think_start", "think_end"))
        start, end = tags
        return start or "<think>", end or "</think>"

    def split_reasoning(self, turn: Message) -> tuple[str | None, str]:
        """The reasoning of an assistant turn, None if it has none, and the rest of its content.

        The reasoning is in its own field, or before `</think>` in the content; what opens it may
        be missing there, because some templates write it into the prompt.
        """
        if turn.reasoning is not None or turn.role != "assistant":
            return turn.reasoning, turn.content
        start, end = self.think_tags
        head, found, rest = turn.content.partition(end)
        if not found:
            return None, turn.content
        return head.lstrip().removeprefix(start), rest

    def fold_system(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Put system turns in front of the first user turn if the template needs that."""
        system = [turn.content for turn in messages if turn.role == "system"]
        rest = [turn for turn in messages if turn.role != "system"]
        first = next((i for i, turn in enumerate(rest) if turn.role == "user"), None)
        if not self.folds_system or not system or first is None:
            return tuple(messages)
        content = "\n\n".join([*system, rest[first].content])
        rest[first] = replace(rest[first], content=content)
        return tuple(rest)

    def render(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        thinking: bool | None = None,
        tools: Tools = (),
    ) -> Ids:
        """Render a conversation as token ids.

        Args:
            messages: The turns, after `fold_system`.
            generation_prompt: Whether to append the start of an assistant turn.
            thinking: The value of `enable_thinking` for the template; None is mlx-lm's default.
            tools: Descriptions of functions for the template.

        Raises:
            TemplateError: The template raised an error.
        """
        if self.has_template:
            turns = self._turns(messages)
            ids: Ids = list(_apply(self.tokenizer, turns, generation_prompt, thinking, tools=tools))
            return self._single_bos(ids)
        return self.encode(self.render_text(messages, generation_prompt=generation_prompt))

    def render_text(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        thinking: bool | None = None,
        tools: Tools = (),
    ) -> str:
        """Render a conversation as the text that `render` tokenises. Arguments and errors as there.

        A BOS that the tokenizer adds is not in it.
        """
        turns = self._turns(messages)
        if self.has_template:
            return str(
                _apply(self.tokenizer, turns, generation_prompt, thinking, False, tools=tools)
            )
        text = "".join(
            f"\n\n{_PLAIN_NAMES[turn['role']]}: {turn['content']}"
            if turn["role"] != "system"
            else turn["content"]
            for turn in turns
        )
        return text + ("\n\nAssistant:" if generation_prompt else "")

    def render_finished(
        self, messages: Sequence[Message], thinking: bool | None = None, tools: Tools = ()
    ) -> FinishedConversation:
        """Render a conversation that ends with an assistant turn, cut after its end token.

        Some templates (DeepSeek-R1's) remove the reasoning from every assistant turn, also from
        the last one. If their generation prompt opens the thinking, the last turn is rendered as
        generation would write it: the generation prompt, the reasoning, the answer.

        Raises:
            TemplateError: The template raised an error.
        """
        ids, appended = self.trim_to_end_token(
            self.render(messages, thinking=thinking, tools=tools)
        )
        text = self.render_text(messages, thinking=thinking, tools=tools)
        reasoning, answer = self.split_reasoning(messages[-1])
        if reasoning is None or squeeze(reasoning) in squeeze(text) or not self.has_template:
            return FinishedConversation(ids, text, appended)
        start, end = self.think_tags
        head = self.render_text(
            messages[:-1], generation_prompt=True, thinking=thinking, tools=tools
        )
        if not head.rstrip().endswith(start):
            return FinishedConversation(ids, text, appended)
        if messages[-1].reasoning is not None:
            reasoning, answer = f"{reasoning.strip()}\n", f"\n\n{answer.lstrip()}"
        elif head[-1].isspace():
            reasoning = reasoning.lstrip()
        text = f"{head}{reasoning}{end}{answer}"
        ids = self._single_bos(list(self.tokenizer.encode(text, add_special_tokens=False)))
        last = self.ending[0] if self.ending else self.eos
        if last is not None and ids[-1] != last:
            ids.append(last)
        return FinishedConversation(ids, text, not self.ending)

    def _turns(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        key = self.reasoning_key if self.has_template else _INLINE
        return [_as_dict(turn, key, self.think_tags) for turn in messages]

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


def inspect_chat_template(tokenizer: Any, thinking: Thinking = "auto") -> ChatTemplate:
    """Find out how a tokenizer renders conversations, by rendering two short ones.

    Args:
        tokenizer: An mlx-lm `TokenizerWrapper` or a Hugging Face tokenizer.
        thinking: As in `ChatTemplate`.
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
    return ChatTemplate(
        tokenizer,
        has_template=True,
        folds_system=not _supports_system(tokenizer),
        ending=ending,
        eos=eos,
        notes=notes,
        chat_notes=chat_notes,
        stops=frozenset(stops),
        switches_thinking=_switches_thinking(tokenizer),
        reasoning_key=_reasoning_key(tokenizer),
        thinking=thinking,
    )


def squeeze(text: str) -> str:
    """The text without white space, which templates strip and add."""
    return "".join(text.split())


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
    turns = [[*_USER, {"role": "assistant", "content": text}] for text in _PROBE_ASSISTANT]
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
    turns = [{"role": "system", "content": _PROBE_SYSTEM}, *_USER]
    try:
        return _PROBE_SYSTEM in str(_apply(tokenizer, turns, tokenize=False))
    except TemplateError:
        return False


def _switches_thinking(tokenizer: Any) -> bool:
    """Whether an assistant turn starts differently with thinking off."""
    try:
        on, off = (_apply(tokenizer, _USER, True, mode, tokenize=False) for mode in (None, False))
    except TemplateError:
        return False
    return bool(on != off)


def _reasoning_key(tokenizer: Any) -> str:
    """See `ChatTemplate.reasoning_key`."""
    for key in _REASONING_KEYS:
        answer = {"role": "assistant", "content": _PROBE_ASSISTANT[0], key: _PROBE_REASONING}
        try:
            if _PROBE_REASONING in str(_apply(tokenizer, [*_USER, answer], tokenize=False)):
                return key
        except TemplateError:
            continue
    try:
        heads = [str(_apply(tokenizer, _USER, True, mode, tokenize=False)) for mode in (None, True)]
    except TemplateError:
        return ""
    known = getattr(tokenizer, "has_thinking", False)
    opens = any(head.rstrip().endswith("<think>") for head in heads)
    return _INLINE if known or opens else ""


def _as_dict(turn: Message, key: str, tags: tuple[str, str]) -> dict[str, Any]:
    """A message for the template, with its reasoning in the field `key`."""
    if turn.reasoning is None or key not in (_INLINE, ""):
        return turn.to_dict(key)
    content = turn.content
    if key:
        content = f"{tags[0]}\n{turn.reasoning.strip()}\n{tags[1]}\n\n{content.lstrip()}"
    return replace(turn, content=content, reasoning=None).to_dict()


def _apply(
    tokenizer: Any,
    turns: Sequence[Mapping[str, Any]],
    generation_prompt: bool = False,
    thinking: bool | None = None,
    tokenize: bool = True,
    tools: Tools = (),
) -> Any:
    options: dict[str, Any] = {}
    if thinking is not None:
        options["enable_thinking"] = thinking
        # DeepSeek-V3.1 and Granite call the switch `thinking`.
        template = getattr(tokenizer, "chat_template", None)
        if isinstance(template, str) and re.search(r"(?<![\w.])thinking\b", template):
            options["thinking"] = thinking
    if tools:
        options["tools"] = list(tools)
    try:
        return tokenizer.apply_chat_template(
            list(turns), tokenize=tokenize, add_generation_prompt=generation_prompt, **options
        )
    except MlxAlignError:  # it exceeds a limit
        raise
    # A template is a program that comes with the model and may raise anything.
    except Exception as error:
        raise TemplateError(one_line(error, 100)) from None
