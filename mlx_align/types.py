"""The shapes that travel through the package: text first, then tokens, then arrays.

Every job is a *group*: one prompt and N completions. Pairs have N = 2 (chosen, rejected),
supervised rows N = 1, ranked rows N = K. Text and tokens are frozen dataclasses; batches of
arrays are NamedTuples, because `mx.compile` takes those and refuses dataclasses.

Units: log-probabilities are in nats, lengths in tokens. Shape letters: B groups in a batch,
N completion rows in a batch, P prompt positions, C completion positions, D hidden size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]
Logps = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation: `role` is system, user, assistant or tool."""

    role: str
    content: str


# Text as it stands in the data: a plain string, or the turns of a conversation.
Text = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """One prompt and its completions, as text.

    Attributes:
        prompt: What the model is given. Conversations end on a user (or tool) turn.
        completions: What it may answer; for a pair (chosen, rejected).
        source: Where the row stands, for messages: `train.jsonl:17`.
        scores: A rating per completion, where the data has one (higher is better).
        label: For unpaired data: whether the one completion is desirable.
        soft_label: For pairs: the probability that chosen is the better one, where known.
        margin: For pairs: by how much chosen should outscore rejected, where the data says it.
        columns: The row's other fields, untouched (reward functions get them).
    """

    prompt: Text
    completions: tuple[Text, ...]
    source: str
    scores: tuple[float, ...] | None = None
    label: bool | None = None
    soft_label: float | None = None
    margin: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenizedGroup:
    """One prompt and its completions, as token ids.

    Attributes:
        prompt: Prompt ids, at least one (a model can score nothing from an empty prompt).
        completions: Completion ids, each at least one; each ends with the end-of-turn or EOS
            token exactly once, unless it was cut.
        source: Where the row stands in the data.
        scores: As in `PromptGroup`.
        label: As in `PromptGroup`.
        soft_label: As in `PromptGroup`.
        margin: As in `PromptGroup`.
        loss_masks: Per completion, which tokens count; None where all do. (Supervised training
            on every assistant turn leaves the user's turns in the completion, unscored.)
    """

    prompt: TokenIds
    completions: tuple[TokenIds, ...]
    source: str
    scores: tuple[float, ...] | None = None
    label: bool | None = None
    soft_label: float | None = None
    margin: float | None = None
    loss_masks: tuple[npt.NDArray[np.bool_], ...] | None = None


class Packing(NamedTuple):
    """The completions of a packed batch as they run: one behind the other in one row.

    Those of N completions in their order, T tokens with the padding at the end; `place` leads from
    a token in the layout (N, C), which losses see, to its own in the row.
    """

    tokens: mx.array  # (T,) int32
    completion: mx.array  # (T,) int32, the completion that a token is of; -1 for padding
    step: mx.array  # (T,) int32, which of its completion's tokens it is: 0, 1 …
    place: mx.array  # (N, C) int32; 0 where there is no token


class GroupBatch(NamedTuple):
    """B prompts, padded on the right, and their N completions, padded on the right.

    Every prompt has as many completions, N / B, and they stand together, in the prompts' order.
    Which positions are real is told by lengths and masks, never by token ids: pad may equal EOS.

    A *packed* batch has its prompts one behind the other in one row, (1, P), and runs its
    completions as `packing` says; the fillers it ends with have prompts of length 0.
    """

    prompt_tokens: mx.array  # (B, P) int32
    prompt_lengths: mx.array  # (B,) int32, at least 1
    completion_tokens: mx.array  # (N, C) int32
    completion_mask: mx.array  # (N, C) bool, true where a token counts
    packing: Packing | None = None

    def for_each_completion(self, by_prompt: mx.array) -> mx.array:
        """Of something by prompt (B, …), each completion's own, (N, …)."""
        each = self.completion_tokens.shape[0] // self.prompt_lengths.shape[0]
        return mx.repeat(by_prompt, each, axis=0)


class PairBatch(NamedTuple):
    """B pairs ready for a step. Completion rows alternate: chosen, rejected, chosen, rejected."""

    groups: GroupBatch
    reference_logps: mx.array  # (N, C) float32 nats per token; zeros for reference-free losses
    weight: mx.array  # (B,) float32, 0 for the filler groups of a batch that is not full
    soft_label: mx.array  # (B,) float32, probability that chosen is better; 1 where not given


class LabelledBatch(NamedTuple):
    """B prompts with one labelled completion each, ready for a step."""

    groups: GroupBatch
    reference_logps: mx.array  # (B, C) float32 nats per token
    weight: mx.array  # (B,) float32, 0 for fillers
    desirable: mx.array  # (B,) bool


class Comparisons(NamedTuple):
    """What is known of every two of a group's K completions, for B groups.

    The P = K·(K − 1)/2 columns are the pairs (0, 1), (0, 2) … (1, 2) … of the group's completions.
    """

    probability: mx.array  # (B, P) that the first of the two is the better one
    margin: mx.array  # (B, P) by how much the better one should outscore the other, at least
    weight: mx.array  # (B, P) what the pair counts within its group; 0 where not compared


class RewardBatch(NamedTuple):
    """B prompts with K completions each, ready for a step of a reward model."""

    groups: GroupBatch
    comparisons: Comparisons
    weight: mx.array  # (B,) float32, 0 for the filler groups of a batch that is not full
    learns: mx.array  # (B, members) float32, 1 where a member learns from the group


class PairLogps(NamedTuple):
    """What a pairwise loss sees of B pairs.

    The log-ratios are sums of per-token differences, which is not the same in float32 as the
    difference of the sums: near −1,000 nats that loses 1e-4.
    """

    chosen: mx.array  # (B,) nats, policy log-prob of the chosen completion, summed over tokens
    rejected: mx.array  # (B,)
    chosen_logratio: mx.array  # (B,) nats, policy − reference, summed over tokens
    rejected_logratio: mx.array  # (B,)
    chosen_length: mx.array  # (B,) float32, scored tokens
    rejected_length: mx.array  # (B,)
    soft_label: mx.array  # (B,) probability that chosen is the better one


class PolicySample(NamedTuple):
    """What a policy-gradient loss sees of N completions; a row may be skipped by an empty mask.

    Log-probs are in nats, at the sampling temperature. What stands off the mask may be anything.
    """

    logps: mx.array  # (N, C) policy, with gradient
    old_logps: mx.array  # (N, C) the policy before this rollout's updates
    reference_logps: mx.array  # (N, C) anything where the method has no reference
    advantages: mx.array  # (N, C); group methods repeat one number along a row
    mask: mx.array  # (N, C) nonzero where a token counts; a row of zeros is skipped or filler
    correction: mx.array  # (N, C) importance weight of the sampler's tokens, ones as a rule
    entropies: mx.array | None = None  # (N, C) nats; with gradient where an entropy bonus is used


class PolicyBatch(NamedTuple):
    """B prompts with G sampled completions each, ready for an update of the policy."""

    groups: GroupBatch
    sample: PolicySample  # its logps stand in until the step makes them


class ValueBatch(NamedTuple):
    """B prompts with G sampled completions each, ready for an update of the critic."""

    groups: GroupBatch
    old_values: mx.array  # (N, C) before the first update
    returns: mx.array  # (N, C) what they should have been
    mask: mx.array  # (N, C) float32, 1 where a token counts
