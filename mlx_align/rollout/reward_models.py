"""Score completions by a reward model.

A reward model trained on the policy's own base is an adapter on it and shares its memory. Any
other reward model is a second model in memory.

A reward model is read at the end token, where it was trained. A completion that was truncated gets
an end token appended for it, as `score` and `rerank` append one to text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_align.data.buckets import LENGTH_MULTIPLE, AnyShape, Shape
from mlx_align.data.chat_template import inspect_chat_template
from mlx_align.errors import ModelError
from mlx_align.inference.reward_model import RewardModel
from mlx_align.inference.scoring import make_reward_scorer, score_groups
from mlx_align.models.adapters import ADAPTER_CONFIG, AdapterLayout, load_adapter, read_layout
from mlx_align.models.heads import HEAD_NAME, add_reward_head, has_reward_head, read_reward_head
from mlx_align.models.loading import LanguageModel, ModelFolder
from mlx_align.models.weights import AdapterWeights, use_adapter
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
        room = [
            shape._replace(completion=widest + LENGTH_MULTIPLE)
            for shape in shapes
            if isinstance(shape, Shape) and shape.completion == widest
        ]
        self._shapes = [*shapes, *room]
        self._style = inspect_chat_template(model.folder.tokenizer)

    def __call__(self, completions: Completions) -> Scores:
        """(N,) scores; of an ensemble, the mean of its members."""
        groups = self._ended(completions)
        found = score_groups(self._scorer, self._weights, groups, self._shapes, per_token=False)
        return np.array([row.mean() for group in found for row in group], np.float64)

    def _ended(self, completions: Completions) -> list[TokenizedGroup]:
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
            ended = tuple(
                ids if done else np.append(ids, np.int32(end))
                for ids, done in zip(group.completions, finished, strict=True)
            )
            groups.append(replace(group, completions=ended))
        return groups


class SeparateRewardModel:
    """A reward model that reads completions as text, with a tokenizer and template of its own.

    Args:
        model: The reward model.
        adapter: The weights to score with, where its base is shared with a policy; else None.
    """

    def __init__(self, model: RewardModel, adapter: AdapterWeights | None = None) -> None:
        self._model, self._adapter = model, adapter

    def __call__(self, completions: Completions) -> Scores:
        """(N,) scores; NaN for prompts that can't be scored."""
        if self._adapter is None:
            return self._score(completions)
        with use_adapter(self._model.model.module, self._adapter):
            return self._score(completions)

    def _score(self, completions: Completions) -> Scores:
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


def shares_base(run: Path, folder: ModelFolder, layout: AdapterLayout) -> bool:
    """Whether a reward run can be loaded as an adapter on the policy's base.

    Raises:
        ModelError: The run can't be read.
    """
    if read_layout(run).fine_tune_type != layout.fine_tune_type:
        return False
    return base_model_of(run).resolve() == folder.path.resolve()


def base_model_of(run: Path) -> Path:
    """The model folder that a run was trained on.

    Raises:
        ModelError: The run does not say.
    """
    try:
        content = json.loads((run / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return Path(str(content["model"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{run / ADAPTER_CONFIG}: names no base model") from error


def load_reward_adapter(
    run: Path, model: LanguageModel, fresh: AdapterWeights, layout: AdapterLayout
) -> AdapterWeights:
    """The adapter and head of a reward run, on the policy's base and at the run's own rank.

    Args:
        run: The run folder of `mlx-align reward`.
        model: The policy's base, with LoRA layers wherever policy or reward model have some.
        fresh: Newly initialised weights of these layers.
        layout: The layout of `fresh`.

    Raises:
        ModelError: The run does not fit the base.
    """
    weights = load_adapter(run, fresh, layout, keep_rank=True)
    head = add_reward_head(model.backbone, read_reward_head(run))
    # The head is not trained here; see `ValueHead`.
    head.freeze()
    return {**weights, HEAD_NAME: {"weight": head.weight}}


def open_separate_reward_model(name: str) -> RewardModel:
    """Load a reward model with a base of its own: a run on another model, or a classifier.

    Raises:
        ModelError: It is neither.
    """
    run = Path(name).expanduser()
    if has_reward_head(run):
        return RewardModel.load(str(base_model_of(run)), run)
    return RewardModel.load(name)
