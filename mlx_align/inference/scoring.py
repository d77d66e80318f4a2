"""Scores of given completions: from text to tokens to per-token log-probs or reward scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_align.data.batching import collate_groups, epoch_order
from mlx_align.data.buckets import LENGTH_MULTIPLE, AnyShape, Shape
from mlx_align.data.chat_template import ChatTemplate
from mlx_align.data.messages import as_text
from mlx_align.data.readers import Row
from mlx_align.data.tokenization import TOO_LONG, try_tokenize_group
from mlx_align.errors import DataError
from mlx_align.models.forward import token_logprobs
from mlx_align.models.heads import completion_scores
from mlx_align.models.loading import LanguageModel
from mlx_align.models.weights import AdapterWeights
from mlx_align.types import GroupBatch, Logps, Message, PromptGroup, Text, TokenizedGroup

# (adapter weights, batch) -> (N, C) log-probs or (N, members) scores.
Scorer = Callable[[AdapterWeights, GroupBatch], mx.array]
# A prompt or a completion as a Python caller gives it: text, or {"role": …, "content": …} messages.
TextOrMessages = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class GroupScores:
    """Scores of the K completions of one group.

    Attributes:
        scores: (K,) one per completion; None if the group could not be scored.
        members: (K, members) scores by the members of a reward model.
        reason: Why the group could not be scored.
        tokens: The group as the model read it; None if it could not be tokenized.
        policy_logps: (K,) summed log-probs under the policy, nats; None for a reward model.
        reference_logps: (K,) summed log-probs under the reference; None without one.
    """

    scores: npt.NDArray[np.floating[Any]] | None
    members: npt.NDArray[np.float32] | None = None
    reason: str = ""
    tokens: TokenizedGroup | None = None
    policy_logps: npt.NDArray[np.float64] | None = None
    reference_logps: npt.NDArray[np.float64] | None = None


def make_logprob_scorer(model: LanguageModel) -> Scorer:
    """A compiled function (adapter weights, batch) -> token log-probs (N, C), without dropout.

    The same scorer works for policy and reference: the weights are an argument, not compiled in.
    """
    return compile_forward(model, token_logprobs)


def make_reward_scorer(model: LanguageModel) -> Scorer:
    """A compiled function (adapter weights, batch) -> reward scores (N, members), without dropout.

    `model` must have a reward head.
    """
    return compile_forward(model, completion_scores)


def compile_forward(
    model: LanguageModel, forward: Callable[..., Any]
) -> Callable[[AdapterWeights, GroupBatch], Any]:
    """Compile a forward function in evaluation mode, with adapter weights as an argument.

    Args:
        model: The base model.
        forward: (backbone, batch, shared=…) -> arrays, like `forward.token_logprobs`.

    Returns:
        (adapter weights, batch) -> the arrays of `forward`.
    """

    def run(weights: AdapterWeights, batch: GroupBatch) -> Any:
        with model.use_adapter(weights):
            return forward(model.backbone, batch, shared=model.shared)

    compiled = mx.compile(run)

    def in_evaluation_mode(weights: AdapterWeights, batch: GroupBatch) -> Any:
        was_training = model.module.training
        model.module.eval()
        try:
            return compiled(weights, batch)
        finally:
            model.module.train(was_training)

    return in_evaluation_mode


def score_groups(
    scorer: Scorer,
    weights: AdapterWeights,
    groups: Sequence[TokenizedGroup],
    shapes: Sequence[AnyShape],
    on_batch: Callable[[list[int], list[tuple[Logps, ...]]], None] | None = None,
    *,
    per_token: bool = True,
    skip: Callable[[list[int]], bool] | None = None,
) -> list[tuple[Logps, ...]]:
    """Score groups in batches of planned shapes, with a compiled scorer.

    Args:
        scorer: As made by `make_logprob_scorer` or `make_reward_scorer`.
        weights: Adapter weights of the role that scores.
        groups: Groups with the same number of completions.
        shapes: Batch shapes, as `plan_shapes` makes them.
        on_batch: Called after each batch with the groups' indices and scores.
        per_token: Whether the columns of the scorer's output are tokens. If not (the members of a
            reward model), whole rows are returned.
        skip: Called with the indices of each batch; if true, the batch is not run and the scores
            of its groups are ().

    Returns:
        For each group and completion, the log-prob of each token, nats, in the order of `groups`.
    """
    scores: list[tuple[Logps, ...]] = [()] * len(groups)
    for batch in epoch_order(groups, shapes, seed=None):
        if skip is not None and skip(list(batch.indices)):
            continue
        members = [groups[i] for i in batch.indices]
        logps = np.array(scorer(weights, collate_groups(members, batch.shape)))
        rows = len(members[0].completions)
        for b, (index, group) in enumerate(zip(batch.indices, members, strict=True)):
            scores[index] = tuple(
                logps[b * rows + k, : len(completion) if per_token else None].astype(np.float32)
                for k, completion in enumerate(group.completions)
            )
        if on_batch is not None:
            on_batch(list(batch.indices), [scores[i] for i in batch.indices])
    return scores


def map_groups(
    groups: Sequence[TokenizedGroup], forward: Callable[[GroupBatch], mx.array], batch_size: int
) -> list[npt.NDArray[np.float32]]:
    """Run groups of any size in small batches, uncompiled.

    Groups with the same number of completions and similar lengths are batched together.

    Args:
        groups: Groups of any number of completions.
        forward: A batch of N completions -> (N, …).
        batch_size: Prompts per batch.

    Returns:
        For each group, the rows (K, …) of its K completions, in the order of `groups`.
    """
    found: list[npt.NDArray[np.float32]] = [np.zeros((0, 0), np.float32)] * len(groups)

    def size(index: int) -> tuple[int, int, int]:
        group = groups[index]
        longest = max(len(completion) for completion in group.completions)
        return len(group.completions), len(group.prompt), longest

    waiting = sorted(range(len(groups)), key=size)
    while waiting:
        count = size(waiting[0])[0]
        batch = [i for i in waiting[:batch_size] if size(i)[0] == count]
        waiting = waiting[len(batch) :]
        sizes = [size(index) for index in batch]
        prompt, completion = (
            -(-max(s[k] for s in sizes) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE for k in (1, 2)
        )
        shape = Shape(prompt, completion, len(batch))
        rows = np.array(forward(collate_groups([groups[i] for i in batch], shape)))
        for place, index in enumerate(batch):
            found[index] = rows[place * count : (place + 1) * count]
    return found


def tokenize_for_scoring(
    groups: Sequence[PromptGroup], style: ChatTemplate, max_seq_length: int
) -> list[TokenizedGroup | GroupScores]:
    """Tokenize each group; one that can't be scored becomes `GroupScores` with the reason."""
    found: list[TokenizedGroup | GroupScores] = []
    for group in groups:
        result = try_tokenize_group(
            group, style, max_seq_length=max_seq_length, drop_identical=False
        )
        if result.group is not None:
            found.append(result.group)
            continue
        reason = result.dropped or ""
        if reason == TOO_LONG:
            reason += f" ({result.length} tokens, at most {max_seq_length})"
        reason += result.detail and f": {result.detail}"
        found.append(GroupScores(None, reason=reason))
    return found


def make_group(
    source: str, prompt: TextOrMessages, completions: Sequence[TextOrMessages]
) -> PromptGroup:
    """A group from a prompt and completions as a Python caller gives them.

    If any of them are messages, text becomes messages too: a prompt becomes the user's message, a
    completion the assistant's.

    Args:
        source: Name for error messages.
        prompt: Text or messages.
        completions: Text or messages, at least one.

    Raises:
        DataError: The prompt or a completion is neither, or there are no completions.
    """
    row = Row(source, {})
    if isinstance(completions, str) or not completions:
        raise DataError(f"{source}: completions must be a list with at least one completion")
    question = make_prompt(source, prompt)
    answers: list[Text] = [as_text(row, "completions", _to_plain(text)) for text in completions]
    if not isinstance(question, str) or any(not isinstance(text, str) for text in answers):
        question = (Message("user", question),) if isinstance(question, str) else question
        answers = [
            (Message("assistant", text),) if isinstance(text, str) else text for text in answers
        ]
    return PromptGroup(question, tuple(answers), source)


def make_prompt(source: str, prompt: TextOrMessages) -> Text:
    """A prompt as a Python caller gives it.

    Raises:
        DataError: It is neither text nor messages.
    """
    return as_text(Row(source, {}), "prompt", _to_plain(prompt))


def _to_plain(value: Any) -> Any:
    return value if isinstance(value, str) else [dict(turn) for turn in value]
