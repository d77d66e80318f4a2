"""What a policy said, and what the roles make of it: ragged completions as padded arrays.

One rollout batch is B prompts with G completions each, N = B·G in the prompts' order. Arrays here
are numpy's, (N, C) with C the longest completion allowed, so that advantages and whitening see the
whole batch at once, whatever microbatches it is learned from in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_align.data.batching import collate_groups, epoch_order
from mlx_align.data.shapes import AnyShape, Shape
from mlx_align.models.generation import generate_groups
from mlx_align.models.loading import LanguageModel
from mlx_align.models.roles import Tree
from mlx_align.types import GroupBatch, PromptGroup, TokenizedGroup

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prompt:
    """One prompt as text, with the fields of its row, and as tokens."""

    text: PromptGroup
    tokens: TokenizedGroup


@dataclass(frozen=True)
class Rollouts:
    """What the policy said to B prompts, G times each.

    Attributes:
        prompts: The prompts.
        groups: The prompts with their G completions, tokens.
        texts: (N,) completions without end token.
        ended: (N,) whether the policy ended the completion itself; else it was cut.
        sampler_logps: (N, C) nats, what the sampler says it drew its tokens with.
        mask: (N, C) bool, true where there is a token.
    """

    prompts: Sequence[Prompt]
    groups: list[TokenizedGroup]
    texts: list[str]
    ended: npt.NDArray[np.bool_]
    sampler_logps: Floats
    mask: npt.NDArray[np.bool_]

    @property
    def group_size(self) -> int:
        """G, completions of a prompt."""
        return len(self.texts) // len(self.groups)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens."""
        lengths: npt.NDArray[np.int64] = self.mask.sum(axis=1)
        return lengths

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and completions, each once."""
        return sum(len(group.prompt) for group in self.groups) + int(self.mask.sum())

    def completions(self) -> list[npt.NDArray[np.int32]]:
        """(N,) token ids."""
        return [ids for group in self.groups for ids in group.completions]


def roll_out(
    model: LanguageModel,
    tree: Tree,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    on_token: Callable[[], None] | None = None,
) -> Rollouts:
    """Sample `group_size` completions of each prompt by the role `tree`; no truncated sampling.

    The same seed, prompts and tree give the same completions.
    """
    stop = sorted(model.folder.tokenizer.eos_token_ids)
    ids = [[int(token) for token in prompt.tokens.prompt] for prompt in prompts]
    model.module.eval()
    with model.acting_as(tree):
        drawn = generate_groups(
            model.module,
            ids,
            group_size,
            stop,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            on_token=on_token,
        )
    flat = [one for group in drawn for one in group]
    decode = model.folder.tokenizer.decode
    groups = [
        TokenizedGroup(
            prompt.tokens.prompt,
            tuple(np.array(one.tokens, np.int32) for one in group),
            prompt.tokens.source,
        )
        for prompt, group in zip(prompts, drawn, strict=True)
    ]
    return Rollouts(
        prompts=prompts,
        groups=groups,
        texts=[decode(one.tokens[: len(one.tokens) - one.ended]) for one in flat],
        ended=np.array([one.ended for one in flat], np.bool_),
        sampler_logps=padded([one.logps for one in flat], max_tokens),
        mask=np.arange(max_tokens)[None] < np.array([len(one.tokens) for one in flat])[:, None],
    )


def join(parts: Sequence[Rollouts]) -> Rollouts:
    """Rollouts of several lots of prompts as one."""
    return Rollouts(
        prompts=[prompt for part in parts for prompt in part.prompts],
        groups=[group for part in parts for group in part.groups],
        texts=[text for part in parts for text in part.texts],
        ended=np.concatenate([part.ended for part in parts]),
        sampler_logps=np.concatenate([part.sampler_logps for part in parts]),
        mask=np.concatenate([part.mask for part in parts]),
    )


def select(rollouts: Rollouts, chosen: Sequence[int]) -> Rollouts:
    """The rollouts of some of the prompts."""
    size = rollouts.group_size
    rows = [index * size + k for index in chosen for k in range(size)]
    return Rollouts(
        prompts=[rollouts.prompts[index] for index in chosen],
        groups=[rollouts.groups[index] for index in chosen],
        texts=[rollouts.texts[row] for row in rows],
        ended=rollouts.ended[rows],
        sampler_logps=rollouts.sampler_logps[rows],
        mask=rollouts.mask[rows],
    )


def padded(rows: Sequence[Sequence[float] | Floats], width: int) -> Floats:
    """Ragged rows as (N, width); 0 where there is nothing."""
    out = np.zeros((len(rows), width), np.float32)
    for n, row in enumerate(rows):
        out[n, : len(row)] = row
    return out


def by_role(
    function: Callable[[Tree, GroupBatch], Any],
    tree: Tree,
    rollouts: Rollouts,
    shapes: Sequence[AnyShape],
) -> list[Floats]:
    """What `function` gives for every completion under a role: each output as (N, C).

    Args:
        function: (tree, batch) -> one array (n, c), or several; a compiled scorer.
        tree: The role.
        rollouts: All completions.
        shapes: Of the microbatches.
    """
    size, width = rollouts.group_size, rollouts.mask.shape[1]
    outputs: list[Floats] = []
    for micro in epoch_order(rollouts.groups, shapes, seed=None):
        members = [rollouts.groups[index] for index in micro.indices]
        found = function(tree, collate_groups(members, micro.shape))
        found = [found] if isinstance(found, mx.array) else list(found)
        if not outputs:
            outputs = [np.zeros((len(rollouts.texts), width), np.float32) for _ in found]
        rows = rows_of(micro.indices, size)
        for output, array in zip(outputs, found, strict=True):
            values = np.array(array.astype(mx.float32))[: len(rows)]
            output[rows, : values.shape[1]] = values[:, :width]
    return outputs


def rows_of(groups: Sequence[int], size: int) -> list[int]:
    """The completions of some groups, as rows of (N, C)."""
    return [index * size + k for index in groups for k in range(size)]


def laid_out(values: npt.NDArray[Any], rows: Sequence[int], shape: Shape, size: int) -> mx.array:
    """Rows of (N, C) as a microbatch of `shape` has them, (groups·G, c); fillers are 0."""
    out = np.zeros((shape.groups * size, shape.completion), np.float32)
    out[: len(rows)] = values[list(rows), : shape.completion]
    return mx.array(out)
