"""Best-of-n: rank several completions of a prompt, sampled or given.

Completions are ranked by the implicit reward of a run or by a reward model. Policy, reference and
reward model share one base model in memory if possible. A prompt runs once to generate, and once
for each model that scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_align.data.chat_template import ChatTemplate, Thinking, inspect_chat_template
from mlx_align.data.converters import RATING_LIST_FIELDS
from mlx_align.data.formats import LIST_FORMATS, ScorableRow, read_prompts, read_scorable
from mlx_align.data.readers import read_rows
from mlx_align.errors import ConfigError, DataError, ModelError
from mlx_align.inference.generate import MAX_TOKENS, TextGenerator
from mlx_align.inference.implicit_reward import (
    BATCH_SIZE,
    MAX_SEQ_LENGTH,
    ImplicitReward,
    load_implicit_reward,
)
from mlx_align.inference.reward_model import (
    RewardModel,
    find_reward_model,
    load_policy_and_reward_model,
)
from mlx_align.inference.scoring import (
    GroupScores,
    TextOrMessages,
    make_group,
    tokenize_for_scoring,
)
from mlx_align.inference.trained_run import match_adapter_dtype, read_trained_run
from mlx_align.models.generation import Generated
from mlx_align.models.loading import LanguageModel, open_model
from mlx_align.types import Message, PromptGroup, Text, TokenizedGroup

# Field of an output row that says why it has no completions.
NOTE = "rerank_note"
# Prompts of a file whose completions are sampled together.
PROMPTS_AT_ONCE = 16
# Fields of a row that refer to its completions in their original order.
_ORDERED_FIELDS = ("chosen", "rejected", *RATING_LIST_FIELDS)


@dataclass(frozen=True, slots=True)
class RankedCompletion:
    """A completion and its score.

    Attributes:
        text: The text, without its end token.
        score: Higher is better.
        index: Index among the completions as given or sampled; of equal samples, the first.
        count: Number of times it was sampled; 1 for a given completion.
        truncated: Whether it reached the maximum number of tokens, so that it has no end token.
        tokens: Length including the end token, tokens.
        policy_logp: Log-prob under the policy, nats; None with a reward model.
        reference_logp: Log-prob under the reference, nats; None with a reward model.
    """

    text: str
    score: float
    index: int
    count: int = 1
    truncated: bool = False
    tokens: int = 0
    policy_logp: float | None = None
    reference_logp: float | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """The completions of one prompt, best first.

    Attributes:
        prompt: The prompt's group.
        ranked: The completions; empty if the prompt could not be answered or scored.
        reason: Why there are no completions; else empty.
    """

    prompt: PromptGroup
    ranked: tuple[RankedCompletion, ...]
    reason: str = ""

    def completions(self) -> list[RankedCompletion]:
        """The completions, best first.

        Raises:
            DataError: The prompt could not be answered or scored.
        """
        if self.reason:
            raise DataError(f"can't be scored: {self.reason}")
        return list(self.ranked)


@dataclass(frozen=True, slots=True)
class DistinctSample:
    """A sampled completion, the index of its first occurrence, and how often it was sampled."""

    completion: Generated
    index: int
    count: int


class SamplingOptions(NamedTuple):
    """Options of sampling.

    Attributes:
        n: Completions per prompt.
        max_tokens: Maximum length of a completion, tokens.
        temperature: 1 samples from the policy itself; 0 is greedy.
        seed: Random seed for sampling.
    """

    n: int = 8
    max_tokens: int = MAX_TOKENS
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Reranker:
    """A policy that generates completions and a scorer that ranks them.

    Make one with `Reranker.load`.

    Attributes:
        generator: The policy.
        scorer: The implicit reward or the reward model.
        description: A line that describes the scorer.
    """

    generator: TextGenerator
    scorer: ImplicitReward | RewardModel
    description: str

    @classmethod
    def load(
        cls,
        model: str,
        adapter_path: str | Path | None = None,
        reward_model: str | Path | None = None,
        *,
        beta: float | None = None,
        reference_adapter: str | Path | None = None,
        per_token: bool | None = None,
        thinking: Thinking | None = None,
        max_seq_length: int = MAX_SEQ_LENGTH,
        batch_size: int = BATCH_SIZE,
    ) -> Reranker:
        """Load a policy and a scorer.

        Args:
            model: The base model, folder or hub name.
            adapter_path: The run whose policy generates; None for the base model itself.
            reward_model: A run folder of `mlx-align reward`, or a *ForSequenceClassification
                model; None to rank by the run's implicit reward.
            beta: Temperature β of the implicit reward; None for the run's own.
            reference_adapter: Folder of the reference's adapter; None for where the run started.
            per_token: Whether the implicit reward is divided by the completion's length; None to
                do so if the run's loss did.
            thinking: Whether completions start with the chat template's thinking on; None for as
                the run was trained.
            max_seq_length: Maximal length of prompt and completion to score, tokens.
            batch_size: Prompts to score per batch.

        Raises:
            ModelError: A model, run or reference does not exist or does not fit.
            ConfigError: No scorer is given, or an option has no effect.
        """
        run = None if adapter_path is None else read_trained_run(adapter_path)
        folder = open_model(model)
        if reward_model is None:
            if run is None:
                raise ConfigError(
                    "no scorer to rank by: give --adapter-path (a run with an implicit reward) or "
                    "--reward-model"
                )
            implicit = load_implicit_reward(
                folder,
                run,
                beta=beta,
                reference_adapter=reference_adapter,
                per_token=per_token,
                thinking=thinking,
                max_seq_length=max_seq_length,
                batch_size=batch_size,
            )
            style = inspect_chat_template(folder.tokenizer, thinking or run.sampling_thinking)
            generator = TextGenerator(implicit.model, style, implicit.policy)
            return cls(generator, implicit, implicit.description)
        for name, value in (
            ("--beta", beta),
            ("--reference-adapter", reference_adapter),
            ("--per-token", per_token),
        ):
            if value is not None:
                raise ConfigError(f"{name}: has no effect on --reward-model; leave one out")
        loaded, weights, reward = load_policy_and_reward_model(
            folder,
            None if run is None else run.folder,
            find_reward_model(reward_model, folder),
            max_seq_length=max_seq_length,
            batch_size=batch_size,
        )
        shared = reward.weights is not None
        where = "an adapter on the same weights" if shared else "a second model in memory"
        if run is not None:
            loaded = match_adapter_dtype(loaded, run)
        style = inspect_chat_template(
            folder.tokenizer, thinking or ("auto" if run is None else run.sampling_thinking)
        )
        generator = TextGenerator(loaded, style, weights)
        return cls(generator, reward, f"reward model {reward_model}, {where}")

    @property
    def model(self) -> LanguageModel:
        """The policy's model."""
        return self.generator.model

    @property
    def style(self) -> ChatTemplate:
        """The chat template of the policy's tokenizer."""
        return self.generator.style

    def rank(
        self, prompt: TextOrMessages, completions: Sequence[TextOrMessages]
    ) -> list[RankedCompletion]:
        """Rank given completions of one prompt, best first; equal ones are all kept.

        Args:
            prompt: Text, used verbatim as in `RewardModel.score`, or messages ({"role": …,
                "content": …}), rendered with the chat template.
            completions: Text or messages; with a prompt of messages, text is the assistant's.

        Raises:
            DataError: Prompt and completion are too long or can't be rendered.
        """
        (ranking,) = self.rank_groups([make_group("rank()", prompt, completions)])
        return ranking.completions()

    def sample(
        self,
        prompt: TextOrMessages,
        n: int = 8,
        *,
        max_tokens: int = MAX_TOKENS,
        temperature: float = 1.0,
        seed: int = 0,
        apply_chat_template: bool = True,
    ) -> list[RankedCompletion]:
        """Sample `n` completions of a prompt and rank them, best first.

        Equal completions appear once, with their count.

        Args:
            prompt: Text, or messages ({"role": …, "content": …}).
            n: Completions to sample.
            max_tokens: Maximum length of a completion, tokens.
            temperature: 1 samples from the policy itself; 0 is greedy.
            seed: Random seed for sampling.
            apply_chat_template: Whether text becomes a user message if the model has a chat
                template, as with `mlx-align rerank --prompt`; if not, it is used verbatim.

        Raises:
            DataError: The prompt is too long or can't be rendered.
        """
        text = self.generator.as_prompt("sample()", prompt, apply_chat_template=apply_chat_template)
        (ranking,) = self.sample_groups(
            [PromptGroup(text, (), "sample()")],
            n,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
        )
        return ranking.completions()

    def best_of(
        self,
        prompt: TextOrMessages,
        n: int = 8,
        *,
        max_tokens: int = MAX_TOKENS,
        temperature: float = 1.0,
        seed: int = 0,
        apply_chat_template: bool = True,
    ) -> RankedCompletion:
        """Sample `n` completions and return the best; arguments and errors as in `sample`."""
        return self.sample(
            prompt,
            n,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            apply_chat_template=apply_chat_template,
        )[0]

    def rank_groups(self, groups: Sequence[PromptGroup]) -> list[Ranking]:
        """Rank the completions of each group."""
        return [
            make_ranking(group, scores, [_last_text(one) for one in group.completions])
            for group, scores in zip(groups, self.scorer.score_groups(groups), strict=True)
        ]

    def sample_groups(
        self,
        groups: Sequence[PromptGroup],
        n: int,
        *,
        max_tokens: int = MAX_TOKENS,
        temperature: float = 1.0,
        seed: int = 0,
        on_token: Callable[[], None] | None = None,
    ) -> list[Ranking]:
        """Sample `n` completions of each group's prompt and rank them.

        Args:
            groups: Groups whose prompts are completed; their completions are ignored.
            n: Completions per prompt.
            max_tokens: Maximum length of a completion, tokens.
            temperature: 1 samples from the policy itself; 0 is greedy.
            seed: Random seed for sampling.
            on_token: Called after every token.
        """
        bare = [replace(group, completions=(), scores=None) for group in groups]
        prompts = tokenize_for_scoring(bare, self.style, self.scorer.max_seq_length)
        readable = [prompt for prompt in prompts if isinstance(prompt, TokenizedGroup)]
        sampled = self.generator.sample(
            readable,
            n,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            on_token=on_token,
        )
        distinct = [deduplicate(completions) for completions in sampled]
        texts = [[self.generator.decode(s.completion) for s in samples] for samples in distinct]
        if isinstance(self.scorer, ImplicitReward):
            scores = self._score_sampled_tokens(self.scorer, readable, distinct)
        else:
            pairs = zip(bare, prompts, strict=True)
            answered = [group for group, prompt in pairs if isinstance(prompt, TokenizedGroup)]
            scores = self._score_sampled_texts(answered, texts)
        rankings = []
        results = iter(zip(scores, texts, distinct, strict=True))
        for group, prompt in zip(bare, prompts, strict=True):
            if isinstance(prompt, TokenizedGroup):
                rankings.append(make_ranking(group, *next(results)))
            else:
                rankings.append(Ranking(group, (), prompt.reason))
        return rankings

    def _score_sampled_tokens(
        self,
        scorer: ImplicitReward,
        prompts: Sequence[TokenizedGroup],
        distinct: Sequence[Sequence[DistinctSample]],
    ) -> list[GroupScores]:
        """Score the sampled tokens: tokenizing their text again may give others."""
        return scorer.score_tokens(
            [
                replace(
                    prompt,
                    completions=tuple(np.array(s.completion.tokens, np.int32) for s in samples),
                )
                for prompt, samples in zip(prompts, distinct, strict=True)
            ]
        )

    def _score_sampled_texts(
        self, groups: Sequence[PromptGroup], texts: Sequence[Sequence[str]]
    ) -> list[GroupScores]:
        """Score by text: a reward model may have another tokenizer."""
        return self.scorer.score_groups(
            [
                replace(group, completions=tuple(_as_completion(group, text) for text in sampled))
                for group, sampled in zip(groups, texts, strict=True)
            ]
        )


def deduplicate(completions: Sequence[Generated]) -> list[DistinctSample]:
    """The distinct completions, in the order of their first occurrence."""
    found: dict[tuple[int, ...], DistinctSample] = {}
    for index, completion in enumerate(completions):
        key = tuple(completion.tokens)
        first = found.get(key, DistinctSample(completion, index, 0))
        found[key] = replace(first, count=first.count + 1)
    return list(found.values())


def make_ranking(
    group: PromptGroup,
    scores: GroupScores,
    texts: Sequence[str],
    samples: Sequence[DistinctSample] | None = None,
) -> Ranking:
    """Rank the completions of a group by their scores; ties keep their order.

    Args:
        group: The prompt.
        scores: Scores of its completions.
        texts: Texts of its completions.
        samples: The completions as sampled; None if they were given.

    Raises:
        ModelError: A score is not finite.
    """
    if scores.scores is None:
        return Ranking(group, (), scores.reason)
    values = [float(score) for score in scores.scores]
    if not np.isfinite(values).all():
        raise ModelError(f"{group.source}: a completion's score is not a finite number")
    lengths = [] if scores.tokens is None else [len(ids) for ids in scores.tokens.completions]
    ranked = []
    for k in sorted(range(len(values)), key=lambda k: -values[k]):
        sample = None if samples is None else samples[k]
        ranked.append(
            RankedCompletion(
                text=texts[k],
                score=values[k],
                index=k if sample is None else sample.index,
                count=1 if sample is None else sample.count,
                truncated=sample is not None and not sample.completion.finished,
                tokens=lengths[k] if sample is None else len(sample.completion.tokens),
                policy_logp=_element(scores.policy_logps, k),
                reference_logp=_element(scores.reference_logps, k),
            )
        )
    return Ranking(group, tuple(ranked))


def ranking_row(ranking: Ranking) -> dict[str, Any]:
    """A ranking as a JSON row, readable as ranked data for dpo and reward.

    Other fields of the prompt's row are kept, except those that refer to completions in their
    original order.
    """
    group = ranking.prompt
    row = {name: value for name, value in group.columns.items() if name not in _ORDERED_FIELDS}
    row["prompt"] = group.prompt if isinstance(group.prompt, str) else _as_dicts(group.prompt)
    if ranking.reason:
        return {**row, "completions": None, NOTE: ranking.reason}
    completions = []
    for one in ranking.ranked:
        entry = {"cut" if k == "truncated" else k: v for k, v in asdict(one).items()}
        completions.append({name: value for name, value in entry.items() if value is not None})
    row["completions"] = completions
    return row


@dataclass(frozen=True)
class RerankInput:
    """The rows of a file of prompts, or of prompts with completions.

    Attributes:
        rows: The rows in order, each with its group or the reason why it could not be read.
        needs_sampling: Whether the rows have no completions, so that completions are sampled.
        read_as: The data format, one line.
    """

    rows: list[ScorableRow]
    needs_sampling: bool
    read_as: str

    @property
    def readable(self) -> list[PromptGroup]:
        """The groups of all rows that could be read."""
        return [row.group for row in self.rows if row.group is not None]

    def rankings(
        self, reranker: Reranker, options: SamplingOptions, done: int = 0
    ) -> Iterator[Ranking]:
        """Yield a ranking per row, in order, after the first `done` rows.

        `done` is a multiple of `PROMPTS_AT_ONCE`, or the number of rows.
        """
        for start in range(done, len(self.rows), PROMPTS_AT_ONCE):
            rows = self.rows[start : start + PROMPTS_AT_ONCE]
            groups = [row.group for row in rows if row.group is not None]
            if self.needs_sampling:
                rankings = reranker.sample_groups(
                    groups,
                    options.n,
                    max_tokens=options.max_tokens,
                    temperature=options.temperature,
                    # Equal prompts in different parts of the file get different samples.
                    seed=options.seed + start,
                )
            else:
                rankings = reranker.rank_groups(groups)
            found = iter(rankings)
            for row in rows:
                if row.group is not None:
                    yield next(found)
                    continue
                bare = PromptGroup("", (), row.row.source, columns=row.row.fields)
                yield Ranking(bare, (), row.reason)


def read_rerank_input(file: str) -> RerankInput:
    """Open a file of prompts, or of prompts with `completions`.

    Raises:
        DataError: It can't be read, or contains neither.
    """
    if not Path(file).expanduser().exists():
        raise DataError(f"--input {file}: no such file")
    rows = read_rows(file)
    if LIST_FORMATS[0].matches(rows[0]):
        source = read_scorable(file)
        return RerankInput(list(source), False, f"read as: {source.title} ({len(rows):,} rows)")
    groups, reading = read_prompts(file)
    by_source = {row.source: row for row in rows}
    scorable = [ScorableRow(by_source[group.source], group) for group in groups]
    return RerankInput(scorable, True, str(reading))


def _element(values: Any, k: int) -> float | None:
    return None if values is None else float(values[k])


def _last_text(completion: Text) -> str:
    """A completion's text; of several turns, the last one's."""
    return completion if isinstance(completion, str) else completion[-1].content


def _as_completion(group: PromptGroup, text: str) -> Text:
    """A completion in the form of the group's prompt, text or messages."""
    return text if isinstance(group.prompt, str) else (Message("assistant", text),)


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [turn.to_dict() for turn in messages]
