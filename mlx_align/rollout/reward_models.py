"""Score completions by a reward model.

A reward model trained on the policy's own base is an adapter on it and shares its memory. Any
other reward model is a second model in memory.

Scores are read at the end token, as in training. A truncated completion gets an end token appended
for this, as `score` and `rerank` append one to text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from mlx_align.data.buckets import LENGTH_MULTIPLE, AnyShape, Shape
from mlx_align.data.chat_template import inspect_chat_template
from mlx_align.inference.reward_model import RewardModel
from mlx_align.inference.scoring import make_reward_scorer, score_groups
from mlx_align.models.loading import LanguageModel
from mlx_align.models.weights import AdapterWeights
from mlx_align.rollout.sampler import Completions
from mlx_align.types import Message, PromptGroup, TokenizedGroup

Scores = npt.NDArray[np.float64]
# N completions -> (N,) scores, NaN for a completion that can't be scored.
CompletionScorer = Callable[[Completions], Scores]


class AdapterRewardModel:
    """A reward model that is an adapter on the policy's base.

    Args:
        model: The policy's base.
        weights: The reward model's adapter and head.
        shapes: Shapes of the microbatches.
    """

    def __init__(
        self, model: LanguageModel, weights: AdapterWeights, shapes: Sequence[AnyShape]
    ) -> None:
        self._scorer = make_reward_scorer(model)
        self._weights = weights
        # A truncated completion of the longest length is one token longer with its end token.
        widest = max(shape.completion for shape in shapes)
        wider = [
            shape._replace(completion=widest + LENGTH_MULTIPLE)
            for shape in shapes
            if isinstance(shape, Shape) and shape.completion == widest
        ]
        self._shapes = [*shapes, *wider]
        self._style = inspect_chat_template(model.folder.tokenizer)

    def __call__(self, completions: Completions) -> Scores:
        """(N,) scores; of an ensemble, the mean of its members."""
        groups = self._append_end_tokens(completions)
        found = score_groups(self._scorer, self._weights, groups, self._shapes, per_token=False)
        return np.array([row.mean() for group in found for row in group], np.float64)

    def _append_end_tokens(self, completions: Completions) -> list[TokenizedGroup]:
        """The groups, with an end token after every truncated completion."""
        size, groups = completions.group_size, []
        for place, (prompt, group) in enumerate(
            zip(completions.prompts, completions.groups, strict=True)
        ):
            finished = completions.finished[place * size : (place + 1) * size]
            end = self._style.eos
            if not isinstance(prompt.text.prompt, str) and self._style.ending:
                end = self._style.ending[0]
            if finished.all() or end is None:
                groups.append(group)
                continue
            with_end = tuple(
                ids if done else np.append(ids, np.int32(end))
                for ids, done in zip(group.completions, finished, strict=True)
            )
            groups.append(replace(group, completions=with_end))
        return groups


class SeparateRewardModel:
    """A reward model that reads completions as text, with its own tokenizer and chat template.

    Args:
        model: The reward model.
    """

    def __init__(self, model: RewardModel) -> None:
        self._model = model

    def __call__(self, completions: Completions) -> Scores:
        """(N,) scores; NaN for prompts that can't be scored."""
        size = completions.group_size
        groups = [
            _with_completions(prompt.text, completions.texts[place * size : (place + 1) * size])
            for place, prompt in enumerate(completions.prompts)
        ]
        out: list[float] = []
        for scored in self._model.score_groups(groups):
            missing = [float("nan")] * size
            out += missing if scored.scores is None else [float(value) for value in scored.scores]
        return np.array(out, np.float64)


def _with_completions(group: PromptGroup, texts: Sequence[str]) -> PromptGroup:
    if isinstance(group.prompt, str):
        return PromptGroup(group.prompt, tuple(texts), group.source)
    turns = tuple((Message("assistant", text),) for text in texts)
    return PromptGroup(group.prompt, turns, group.source)
