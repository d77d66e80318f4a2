"""Sample completions from the policy: as text, token ids and padded arrays.

A rollout batch has B prompts with G completions each: N = B·G rows in the order of the prompts.
Arrays are NumPy's, of shape (N, C), where C is the longest completion allowed. They cover the
whole batch, because advantages are normalised before it is split into microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_align.data.batching import collate_groups, epoch_order
from mlx_align.data.buckets import AnyShape, Shape
from mlx_align.models.generation import generate_groups
from mlx_align.models.loading import LanguageModel
from mlx_align.models.weights import AdapterWeights
from mlx_align.types import GroupBatch, PromptGroup, TokenizedGroup

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prompt:
    """One prompt: its text with the other fields of its row, and its token ids."""

    text: PromptGroup
    tokens: TokenizedGroup


@dataclass(frozen=True)
class Completions:
    """G sampled completions of each of B prompts.

    Attributes:
        prompts: (B,) the prompts.
        groups: (B,) each prompt with its G completions, as token ids.
        texts: (N,) completions, without the end token.
        finished: (N,) True if the policy sampled the end token; False if the completion was
            truncated at the maximum length.
        sampler_logps: (N, C) nats, log-probs of the tokens as reported by the sampler.
        mask: (N, C) bool, True where there is a token.
        opened: (B,) `<think>` for prompts that end with it, else "".
    """

    prompts: Sequence[Prompt]
    groups: list[TokenizedGroup]
    texts: list[str]
    finished: npt.NDArray[np.bool_]
    sampler_logps: Floats
    mask: npt.NDArray[np.bool_]
    opened: Sequence[str] = ()

    @property
    def group_size(self) -> int:
        """G, the number of completions per prompt."""
        return len(self.texts) // len(self.groups)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens per completion, end token included."""
        lengths: npt.NDArray[np.int64] = self.mask.sum(axis=1)
        return lengths

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts and completions; a prompt counts once."""
        return sum(len(group.prompt) for group in self.groups) + int(self.mask.sum())

    def token_ids(self) -> list[npt.NDArray[np.int32]]:
        """(N,) token ids of each completion."""
        return [ids for group in self.groups for ids in group.completions]

    def rows(self, prompts: Sequence[int]) -> list[int]:
        """The rows of (N, C) that belong to these prompts."""
        size = self.group_size
        return [index * size + k for index in prompts for k in range(size)]

    def select(self, prompts: Sequence[int]) -> Completions:
        """The completions of these prompts only."""
        rows = self.rows(prompts)
        return Completions(
            prompts=[self.prompts[index] for index in prompts],
            groups=[self.groups[index] for index in prompts],
            texts=[self.texts[row] for row in rows],
            finished=self.finished[rows],
            sampler_logps=self.sampler_logps[rows],
            mask=self.mask[rows],
            opened=[self.opened[index] for index in prompts] if self.opened else (),
        )

    @staticmethod
    def concatenate(parts: Sequence[Completions]) -> Completions:
        """Several sets of completions as one."""
        return Completions(
            prompts=[prompt for part in parts for prompt in part.prompts],
            groups=[group for part in parts for group in part.groups],
            texts=[text for part in parts for text in part.texts],
            finished=np.concatenate([part.finished for part in parts]),
            sampler_logps=np.concatenate([part.sampler_logps for part in parts]),
            mask=np.concatenate([part.mask for part in parts]),
            opened=[opened for part in parts for opened in part.opened],
        )


def sample_completions(
    model: LanguageModel,
    weights: AdapterWeights,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    on_token: Callable[[], None] | None = None,
) -> Completions:
    """Sample `group_size` completions of each prompt from the full distribution.

    Top-p and top-k are not supported: importance ratios need the probabilities of the samples.
    The same seed, prompts and weights give the same completions.

    Args:
        model: The base model.
        weights: The adapter that samples.
        prompts: The prompts.
        group_size: Completions per prompt.
        max_tokens: Longest completion, in tokens.
        temperature: Sampling temperature.
        seed: Random seed.
        on_token: Called after every generated token; may raise to stop.
    """
    stop = sorted(model.folder.tokenizer.eos_token_ids)
    ids = [[int(token) for token in prompt.tokens.prompt] for prompt in prompts]
    model.module.eval()
    with model.use_adapter(weights):
        sampled = generate_groups(
            model.module,
            ids,
            group_size,
            stop,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            on_token=on_token,
        )
    flat = [one for group in sampled for one in group]
    decode = model.folder.tokenizer.decode
    groups = [
        TokenizedGroup(
            prompt.tokens.prompt,
            tuple(np.array(one.tokens, np.int32) for one in group),
            prompt.tokens.source,
        )
        for prompt, group in zip(prompts, sampled, strict=True)
    ]
    return Completions(
        prompts=prompts,
        groups=groups,
        texts=[decode(one.tokens[: len(one.tokens) - one.finished]) for one in flat],
        finished=np.array([one.finished for one in flat], np.bool_),
        sampler_logps=pad_rows([one.logps for one in flat], max_tokens),
        mask=np.arange(max_tokens)[None] < np.array([len(one.tokens) for one in flat])[:, None],
        opened=[_open_tag(decode(prompt[-_TAIL_TOKENS:])) for prompt in ids],
    )


# `<think>` may be several tokens, with a newline after it.
_TAIL_TOKENS = 12


def _open_tag(tail: str) -> str:
    return "<think>" if tail.rstrip().endswith("<think>") else ""


# --- arrays ---


def pad_rows(rows: Sequence[Sequence[float] | Floats], width: int) -> Floats:
    """Ragged rows as (N, width), padded with 0."""
    out = np.zeros((len(rows), width), np.float32)
    for n, row in enumerate(rows):
        out[n, : len(row)] = row
    return out


def evaluate_tokens(
    function: Callable[[AdapterWeights, GroupBatch], Any],
    weights: AdapterWeights,
    completions: Completions,
    shapes: Sequence[AnyShape],
) -> list[Floats]:
    """Run a model function on all completions; returns each of its outputs as (N, C).

    Args:
        function: (weights, batch) -> one or several arrays (n, c); a compiled scorer.
        weights: The adapter to run with.
        completions: N completions.
        shapes: Shapes of the microbatches.
    """
    width = completions.mask.shape[1]
    outputs: list[Floats] = []
    for micro in epoch_order(completions.groups, shapes, seed=None):
        members = [completions.groups[index] for index in micro.indices]
        found = function(weights, collate_groups(members, micro.shape))
        found = [found] if isinstance(found, mx.array) else list(found)
        if not outputs:
            outputs = [np.zeros((len(completions.texts), width), np.float32) for _ in found]
        rows = completions.rows(micro.indices)
        for output, array in zip(outputs, found, strict=True):
            values = np.array(array.astype(mx.float32))[: len(rows)]
            output[rows, : values.shape[1]] = values[:, :width]
    return outputs


def microbatch_array(
    values: npt.NDArray[Any], rows: Sequence[int], shape: Shape, group_size: int
) -> mx.array:
    """Select rows of (N, C) and pad them to the shape of a microbatch, (groups·G, c), with 0."""
    out = np.zeros((shape.groups * group_size, shape.completion), np.float32)
    out[: len(rows)] = values[list(rows), : shape.completion]
    return mx.array(out)
