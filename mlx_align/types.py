"""The data types of the package: text, tokens, batches of arrays.

Everything is a *group*: one prompt and its completions. A pair has two (chosen, rejected), a
supervised row one, a ranked row K. A pair is a `PromptGroup` (text), a `TokenizedGroup` (tokens),
part of a `PairBatch` (arrays) and part of a `PairLogps` (what a loss takes).

Text and tokens are frozen dataclasses. Batches are NamedTuples, because `mx.compile` accepts those
but not dataclasses.

Units: log-probs are in nats, lengths in tokens. Shape letters: B groups in a batch, N completions
in a batch, P prompt positions, C completion positions, D hidden size, V vocabulary.

Arrays of log-probs are called `logps`, as in TRL: `token_logps` has one entry per token,
`sequence_logps` their sum over a completion. Functions that compute them are called `…_logprobs`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]
Logps = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function by the assistant.

    Attributes:
        name: The function.
        arguments: Its arguments, as JSON text.
        id: The identifier that the tool's answer refers to, if the data has one.
    """

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        content: The text; may be empty if there are tool calls.
        reasoning: The thinking before the content, if the data has a field for it.
        tool_calls: The functions that the assistant calls.
        name: The name of the tool that answers, or of the speaker.
        tool_call_id: The call that a tool answers.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None

    def to_dict(self, reasoning_key: str = "reasoning_content") -> dict[str, Any]:
        """The message as chat templates and JSON files take it; fields that are empty left out.

        Args:
            reasoning_key: The field for the reasoning.
        """
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            fields[reasoning_key] = self.reasoning
        if self.tool_calls:
            fields["tool_calls"] = [
                {
                    **({} if call.id is None else {"id": call.id}),
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.loads(call.arguments)},
                }
                for call in self.tool_calls
            ]
        if self.name is not None:
            fields["name"] = self.name
        if self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        return fields


# A plain string, or the turns of a conversation.
Text = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """One prompt and its completions, as text.

    Attributes:
        prompt: The model's input. Conversations end with a user (or tool) turn.
        completions: The possible answers; for a pair (chosen, rejected).
        source: File and line of the row, for error messages: `train.jsonl:17`.
        scores: A rating per completion if the data has one; higher is better.
        label: For unpaired data, whether the one completion is desirable.
        soft_label: For pairs, the probability that chosen is better, if known; for unpaired data,
            the probability that the completion is desirable.
        margin: For pairs, the minimum difference of the reward model's scores, if the data has one.
        columns: The row's other fields, unchanged, for reward functions.
        tools: Descriptions of the functions that the assistant may call, for the chat template.
        strength: For pairs, how much better chosen is, in the data's own units; 0 for a tie.
        votes: For pairs, the votes for chosen and for rejected, if the data counts them.
    """

    prompt: Text
    completions: tuple[Text, ...]
    source: str
    scores: tuple[float, ...] | None = None
    label: bool | None = None
    soft_label: float | None = None
    margin: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    strength: float | None = None
    votes: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class TokenizedGroup:
    """One prompt and its completions, as token ids.

    Attributes:
        prompt: Prompt ids, at least one: nothing predicts the first token of an empty prompt.
        completions: Completion ids, each at least one. Each ends with the end-of-turn or EOS
            token exactly once, unless it was truncated.
        source: As in `PromptGroup`.
        scores: As in `PromptGroup`.
        label: As in `PromptGroup`.
        soft_label: As in `PromptGroup`.
        margin: As in `PromptGroup`.
        loss_masks: Per completion, which tokens count in the loss; None if all do. (Supervised
            training on every assistant turn masks the user's turns in the completion.)
        text: The prompt as text, of held-out groups, whose samples are shown; else None.
    """

    prompt: TokenIds
    completions: tuple[TokenIds, ...]
    source: str
    scores: tuple[float, ...] | None = None
    label: bool | None = None
    soft_label: float | None = None
    margin: float | None = None
    loss_masks: tuple[npt.NDArray[np.bool_], ...] | None = None
    text: Text | None = None


class Packing(NamedTuple):
    """The completions of a packed batch: N completions in one row of T tokens, padding last.

    Losses take arrays of shape (N, C); `place` maps such a position to the token in the row.
    """

    tokens: mx.array  # (T,) int32
    completion: mx.array  # (T,) int32, index of the completion of a token; -1 for padding
    step: mx.array  # (T,) int32, position of the token in its completion: 0, 1, …
    place: mx.array  # (N, C) int32, position in the row; 0 where there is no token


class GroupBatch(NamedTuple):
    """B prompts and their N completions, both padded on the right.

    Every prompt has N / B completions, which are next to each other, in the order of the prompts.
    Lengths and masks tell which positions are real, never token ids: pad may equal EOS.

    A *packed* batch has all prompts in one row, (1, P), and its completions in the row of
    `packing`. Its fillers have prompts of length 0.
    """

    prompt_tokens: mx.array  # (B, P) int32
    prompt_lengths: mx.array  # (B,) int32, at least 1
    completion_tokens: mx.array  # (N, C) int32
    completion_mask: mx.array  # (N, C) bool, true where a token counts in the loss
    packing: Packing | None = None

    def for_each_completion(self, by_prompt: mx.array) -> mx.array:
        """Repeat rows of prompts (B, …) for each of their completions, (N, …)."""
        each = self.completion_tokens.shape[0] // self.prompt_lengths.shape[0]
        return mx.repeat(by_prompt, each, axis=0)


class PairBatch(NamedTuple):
    """A microbatch of B pairs. Completions alternate: chosen 0, rejected 0, chosen 1, and so on."""

    groups: GroupBatch
    reference_logps: mx.array  # (N, C) float32 nats per token; zeros for reference-free losses
    weight: mx.array  # (B,) float32, 0 for the fillers of a batch that is not full
    soft_label: mx.array  # (B,) float32, probability that chosen is better; 1 where not given


class LabelledBatch(NamedTuple):
    """A microbatch of B prompts with one labelled completion each."""

    groups: GroupBatch
    reference_logps: mx.array  # (B, C) float32 nats per token
    weight: mx.array  # (B,) float32, 0 for fillers
    desirable: mx.array  # (B,) bool
    probability: mx.array  # (B,) float32, probability that the completion is desirable


class Comparisons(NamedTuple):
    """Labels of all pairs among the K completions of each of B groups.

    The P = K·(K − 1)/2 columns are the pairs (0, 1), (0, 2), …, (1, 2), … of the completions.
    """

    probability: mx.array  # (B, P) probability that the first of the two is better
    margin: mx.array  # (B, P) minimum difference that their scores should have
    weight: mx.array  # (B, P) weight of the pair within its group; 0 where not compared


class RewardBatch(NamedTuple):
    """A microbatch of B prompts with K completions each, for a reward model."""

    groups: GroupBatch
    comparisons: Comparisons
    weight: mx.array  # (B,) float32, 0 for the fillers of a batch that is not full
    member_mask: mx.array  # (B, members) float32, 1 where a member is trained on the group


class PairLogps(NamedTuple):
    """Log-probs of B pairs, the argument of every pairwise loss.

    The log-ratios are sums of per-token differences. In float32 the difference of two sums near
    −1,000 nats would lose 1e-4.
    """

    chosen: mx.array  # (B,) nats, policy log-prob of the chosen completion, summed over tokens
    rejected: mx.array  # (B,)
    chosen_logratio: mx.array  # (B,) nats, policy − reference, summed over tokens
    rejected_logratio: mx.array  # (B,)
    chosen_length: mx.array  # (B,) float32, tokens that count
    rejected_length: mx.array  # (B,)
    soft_label: mx.array  # (B,) probability that chosen is better


class PolicySample(NamedTuple):
    """N sampled completions, the argument of a policy-gradient loss.

    Log-probs are in nats, at the sampling temperature. Values off the mask may be anything, and a
    row with an empty mask is skipped.
    """

    logps: mx.array  # (N, C) policy, with gradient
    old_logps: mx.array  # (N, C) the policy before the updates on this rollout batch
    reference_logps: mx.array  # (N, C) anything if the method has no reference
    advantages: mx.array  # (N, C); constant along a row in group methods
    mask: mx.array  # (N, C) nonzero where a token counts
    correction: mx.array  # (N, C) importance weight of the sampler's tokens, usually 1
    entropies: mx.array | None = None  # (N, C) nats; with gradient for an entropy bonus


class PolicyBatch(NamedTuple):
    """A microbatch of B prompts with sampled completions, for the policy."""

    groups: GroupBatch
    sample: PolicySample  # its `logps` are replaced by the step's


class ValueBatch(NamedTuple):
    """A microbatch of B prompts with sampled completions, for the critic."""

    groups: GroupBatch
    old_values: mx.array  # (N, C) values before the first update
    returns: mx.array  # (N, C) targets of the values
    mask: mx.array  # (N, C) float32, 1 where a token counts
