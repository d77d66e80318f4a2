"""The judges: language models, reward models and reward functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_align.data.chat_template import ChatTemplate, TemplateError, inspect_chat_template
from mlx_align.errors import ModelError
from mlx_align.inference.reward_model import RewardModel, find_reward_model
from mlx_align.inference.scoring import map_groups
from mlx_align.inference.trained_run import match_adapter_dtype, read_trained_run
from mlx_align.models.forward import token_logprobs
from mlx_align.models.loading import LanguageModel, ModelFolder, load_adapters, open_model
from mlx_align.models.weights import AdapterWeights
from mlx_align.preferences.verdicts import (
    LABELS,
    Comparison,
    Verdict,
    as_plain_text,
    invalid_verdict,
    judge_prompt,
    label_of_token,
    verdict_from_probabilities,
)
from mlx_align.rollout.builtin_rewards import CompletionFacts
from mlx_align.rollout.reward_functions import (
    RewardFunctions,
    RewardSource,
    open_rewards,
    parse_rewards,
)
from mlx_align.types import Message, PromptGroup, Text, TokenizedGroup

MIN_MASS = 0.5
# A verdict must be among the first tokens that a model writes; others are not looked up.
_BATCH_SIZE = 4


@dataclass(frozen=True)
class LanguageModelJudge:
    """A model of mlx-lm, with an adapter or without; make one with `LanguageModelJudge.load`.

    Its prompt demands one letter, and the verdict is the probabilities of the letters as the next
    token. Nothing is sampled.

    Attributes:
        name: Model and adapter as given.
        model: The base model.
        weights: Adapter weights; {} for the base model itself.
        style: Chat template of its tokenizer.
        tokens: Ids of the tokens that are a verdict, and the index of their label.
        min_mass: The least probability of all verdicts together.
        max_seq_length: Longest prompt of a comparison, tokens; longer ones are invalid.
        batch_size: Comparisons per forward pass.
    """

    name: str
    model: LanguageModel
    weights: AdapterWeights
    style: ChatTemplate
    tokens: tuple[tuple[int, int], ...]
    min_mass: float = MIN_MASS
    max_seq_length: int = 4096
    batch_size: int = _BATCH_SIZE

    ignores_order = False

    @classmethod
    def load(
        cls,
        model: str,
        adapter_path: str | Path | None = None,
        *,
        min_mass: float = MIN_MASS,
        max_seq_length: int = 4096,
        batch_size: int = _BATCH_SIZE,
    ) -> LanguageModelJudge:
        """Load a model, with a run's adapter if given.

        Raises:
            ModelError: Model or run can't be loaded, or the tokenizer has no tokens for verdicts.
        """
        run = None if adapter_path is None else read_trained_run(adapter_path)
        folder = open_model(model)
        _find_tokens(folder)  # before the weights are loaded
        loaded, (weights,) = load_adapters(folder, [None if run is None else run.folder])
        if run is not None:
            loaded = match_adapter_dtype(loaded, run)
        return cls.of_loaded(
            model if adapter_path is None else f"{model} + {adapter_path}",
            loaded,
            weights,
            min_mass=min_mass,
            max_seq_length=max_seq_length,
            batch_size=batch_size,
        )

    @classmethod
    def of_loaded(
        cls,
        name: str,
        model: LanguageModel,
        weights: AdapterWeights,
        *,
        min_mass: float = MIN_MASS,
        max_seq_length: int = 4096,
        batch_size: int = _BATCH_SIZE,
    ) -> LanguageModelJudge:
        """A judge of a model in memory, with the weights that it judges with.

        Raises:
            ModelError: The tokenizer has no tokens for verdicts.
        """
        style = inspect_chat_template(model.folder.tokenizer)
        tokens = _find_tokens(model.folder)
        return cls(name, model, weights, style, tokens, min_mass, max_seq_length, batch_size)

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """The verdicts, from the probabilities of the next token."""
        found: list[Verdict | None] = [None] * len(comparisons)
        groups, places = [], []
        # One token each: `map_groups` runs the prompt once for all of them.
        continuations = tuple(np.array([token], np.int32) for token, _ in self.tokens)
        for place, comparison in enumerate(comparisons):
            ids = self._render(comparison)
            if isinstance(ids, str):
                found[place] = invalid_verdict(ids)
                continue
            prompt = np.array(ids, np.int32)
            groups.append(TokenizedGroup(prompt, continuations, comparison.source))
            places.append(place)
        backbone, shared = self.model.backbone, self.model.shared
        labels = np.array([label for _, label in self.tokens])
        with self.model.use_adapter(self.weights):
            rows = map_groups(
                groups,
                lambda batch: token_logprobs(backbone, batch, shared=shared),
                self.batch_size,
            )
        for place, logps in zip(places, rows, strict=True):
            probabilities = np.exp(logps[:, 0].astype(np.float64))
            by_label = [float(probabilities[labels == k].sum()) for k in range(len(LABELS))]
            found[place] = verdict_from_probabilities(by_label, self.min_mass)
        return [verdict for verdict in found if verdict is not None]

    def _render(self, comparison: Comparison) -> list[int] | str:
        """The ids of the judge's prompt, or why it can't be used."""
        thinking = False if self.style.switches_thinking else None
        try:
            ids = self.style.render(
                self.style.fold_system(judge_prompt(comparison)),
                generation_prompt=True,
                thinking=thinking,
            )
        except TemplateError as error:
            return f"the judge's chat template: {error}"
        limit = min(self.max_seq_length, self.model.folder.max_positions or self.max_seq_length)
        if len(ids) + 1 > limit:
            return f"too long for the judge ({len(ids):,} tokens, at most {limit - 1:,})"
        return ids


def _find_tokens(folder: ModelFolder) -> tuple[tuple[int, int], ...]:
    tokens = verdict_tokens(folder.tokenizer.get_vocab(), folder.vocab_size)
    missing = [label for k, label in enumerate(LABELS) if k not in dict(tokens).values()]
    if missing:
        raise ModelError(
            f"{folder.name}: its tokenizer has no token for {', '.join(missing)}, so it can't give "
            "verdicts; use another judge"
        )
    return tokens


def verdict_tokens(vocabulary: dict[str, int], size: int) -> tuple[tuple[int, int], ...]:
    """(id, index of its label) of all tokens that are a verdict, sorted.

    Args:
        vocabulary: Ids by token.
        size: Rows of the model's embedding; ids beyond are left out.
    """
    found = []
    for token, index in vocabulary.items():
        label = label_of_token(token)
        if label is not None and index < size:
            found.append((index, LABELS.index(label)))
    return tuple(sorted(found))


@dataclass(frozen=True)
class RewardModelJudge:
    """A reward model: P(first is better) = σ(difference of the scores), as it was trained.

    It scores each answer alone, so there is no order. Criteria are not used.

    Attributes:
        name: The run folder or the classifier as given.
        model: The reward model.
    """

    name: str
    model: RewardModel

    ignores_order = True

    @classmethod
    def load(
        cls, name: str, *, max_seq_length: int = 4096, batch_size: int = _BATCH_SIZE
    ) -> RewardModelJudge:
        """Load a run of `mlx-align reward` or a classifier.

        Raises:
            ModelError: It is neither, or can't be loaded.
        """
        source = find_reward_model(name)
        model = RewardModel.load(
            source.base.name, source.run, max_seq_length=max_seq_length, batch_size=batch_size
        )
        return cls(name, model)

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """The verdicts, from the difference of the scores."""
        groups = [
            _as_messages(PromptGroup(one.prompt, (one.first, one.second), one.source))
            for one in comparisons
        ]
        found = []
        for scored in self.model.score_groups(groups):
            if scored.scores is None:
                found.append(invalid_verdict(scored.reason))
                continue
            difference = float(scored.scores[0]) - float(scored.scores[1])
            first = float(0.5 * (1 + np.tanh(0.5 * difference)))
            found.append(Verdict(first, 1 - first, 0.0))
        return found


def _as_messages(group: PromptGroup) -> PromptGroup:
    """The group with answers of the kind of its prompt, text or messages."""
    if isinstance(group.prompt, str):
        return replace(group, completions=tuple(as_plain_text(one) for one in group.completions))
    completions: list[Text] = [
        (Message("assistant", one),) if isinstance(one, str) else one for one in group.completions
    ]
    return replace(group, completions=tuple(completions))


@dataclass(frozen=True)
class RewardFunctionJudge:
    """Reward functions as a judge: the answer with the higher total reward wins; equal is a tie.

    For rules that can be checked, and for exact tests. Verdicts are certain. As no tokenizer is
    involved, built-in rewards that count tokens count words. Made by `open_reward_judge`.

    Attributes:
        name: The functions' names.
        functions: The functions, opened.
    """

    name: str
    functions: RewardFunctions

    ignores_order = True

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """The verdicts; invalid where an answer has no reward.

        Raises:
            TrainingError: A function failed.
        """
        groups = [
            PromptGroup(one.prompt, (), one.source, columns=one.columns or {})
            for one in comparisons
        ]
        texts = [[as_plain_text(one.first), as_plain_text(one.second)] for one in comparisons]
        facts = [
            [CompletionFacts(len(text.split()), True, len(text.split()) + 1) for text in pair]
            for pair in texts
        ]
        totals = self.functions(groups, texts, facts).total.reshape(-1, 2)
        found = []
        for first, second in totals:
            if np.isnan(first) or np.isnan(second):
                found.append(invalid_verdict("an answer has no reward"))
                continue
            found.append(
                Verdict(float(first > second), float(first < second), float(first == second))
            )
        return found


@contextmanager
def open_reward_judge(
    specs: Sequence[RewardSource], timeout: float = 60.0
) -> Iterator[RewardFunctionJudge]:
    """Open reward functions as a judge within the block.

    Args:
        specs: Reward functions as for `--reward`.
        timeout: Seconds that a call may take.

    Raises:
        ConfigError: A function can't be read or imported.
    """
    parsed = parse_rewards(specs)
    with open_rewards(parsed, timeout) as functions:
        yield RewardFunctionJudge("reward " + ", ".join(spec.text for spec in parsed), functions)
