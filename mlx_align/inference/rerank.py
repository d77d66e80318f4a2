"""Best-of-n: completions of a prompt, sampled or given, ranked by what alignment learned.

By the implicit reward of a run, or by a reward model. All of them are adapters on one base where
they can be: the prompt is run once to generate and once for each role that scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_align.data.rendering import ChatStyle, chat_style
from mlx_align.errors import ConfigError, ModelError
from mlx_align.inference.finished import Finished, read_run
from mlx_align.inference.implicit import (
    BATCH_SIZE,
    MAX_SEQ_LENGTH,
    ImplicitReward,
    computing_as_trained,
)
from mlx_align.inference.ranking import (
    Ranked,
    Ranking,
    Sample,
    as_answer,
    different,
    ranked_or_error,
    ranking_of,
    text_of,
)
from mlx_align.inference.reward_model import RewardModel, base_of
from mlx_align.inference.scored import Prompt, Scored, as_group, as_prompt, tokenize_to_score
from mlx_align.inference.terms import Terms, terms_of
from mlx_align.inference.trees import common_layout, load_trees
from mlx_align.models.adapters import read_layout
from mlx_align.models.classifiers import is_classifier
from mlx_align.models.generation import Generated, generate_groups
from mlx_align.models.heads import has_head, put_head, read_head
from mlx_align.models.loading import LanguageModel, ModelFolder, open_model
from mlx_align.models.roles import Tree, acting_as
from mlx_align.types import PromptGroup, TokenizedGroup

# What mlx-lm generates at most, unless told otherwise.
MAX_TOKENS = 256


@dataclass(frozen=True)
class Reranker:
    """A policy that answers and what ranks its answers; make one with `Reranker.load`.

    Attributes:
        model: The policy's base.
        style: How its tokenizer writes conversations.
        policy: The tree that answers.
        implicit: What ranks, unless a reward model does.
        reward: The reward model that ranks.
        reward_tree: Its tree where it is an adapter of `model`; None where it is a model apart.
        said: What ranks, for people.
    """

    model: LanguageModel
    style: ChatStyle
    policy: Tree
    implicit: ImplicitReward | None
    reward: RewardModel | None
    reward_tree: Tree | None
    said: str

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
        max_seq_length: int = MAX_SEQ_LENGTH,
        batch_size: int = BATCH_SIZE,
    ) -> Reranker:
        """Load what answers and what ranks.

        Args:
            model: The base model, folder or hub name.
            adapter_path: The run whose policy answers; None for the base itself.
            reward_model: A run folder of `mlx-align reward`, or a *ForSequenceClassification
                model; None to rank by the implicit reward of the run.
            beta: Of the implicit reward; None for the run's own.
            reference_adapter: Where the adapter is that the run started from; None for where the
                run says.
            per_token: Whether the implicit reward is divided by the completion's length; None
                where the run's loss did.
            max_seq_length: Longest row to score, tokens.
            batch_size: Prompts to run at once.

        Raises:
            ModelError: A model, a run or a reference is not there or does not fit.
            ConfigError: There is nothing to rank by, or an option has no effect.
        """
        run = None if adapter_path is None else read_run(adapter_path)
        folder = open_model(model)
        if reward_model is None:
            if run is None:
                raise ConfigError(
                    "nothing to rank by: give --adapter-path, a run with an implicit reward, or "
                    "--reward-model"
                )
            terms = terms_of(
                run, beta=beta, reference_adapter=reference_adapter, per_token=per_token
            )
            return _ranking_by_itself(folder, run, terms, max_seq_length, batch_size)
        given = {
            "--beta": beta,
            "--reference-adapter": reference_adapter,
            "--per-token": per_token,
        }
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"{name}: has no effect on --reward-model; leave one out")
        return _ranking_by_model(folder, run, str(reward_model), max_seq_length, batch_size)

    def rank(
        self, prompt: Prompt, completions: Sequence[str | Sequence[Mapping[str, str]]]
    ) -> list[Ranked]:
        """Completions of one prompt, best first; equal ones stay as they are, each with its score.

        Args:
            prompt: Text as it stands, or messages ({"role": …, "content": …}) for the model's
                chat template.
            completions: Text, beside messages the assistant's answer; or messages.

        Raises:
            DataError: The prompt and a completion are too long together, or can't be rendered.
        """
        (ranking,) = self.rank_groups([as_group("rank()", prompt, completions)])
        return ranked_or_error(ranking)

    def sample(
        self,
        prompt: Prompt,
        n: int = 8,
        *,
        max_tokens: int = MAX_TOKENS,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[Ranked]:
        """Sample `n` completions and rank them, best first; equal ones are one, with its count.

        Raises:
            DataError: The prompt is too long, or can't be rendered.
        """
        group = PromptGroup(as_prompt("sample()", prompt), (), "sample()")
        (ranking,) = self.sample_groups(
            [group], n, max_tokens=max_tokens, temperature=temperature, seed=seed
        )
        return ranked_or_error(ranking)

    def best_of(
        self,
        prompt: Prompt,
        n: int = 8,
        *,
        max_tokens: int = MAX_TOKENS,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Ranked:
        """The best of `n` sampled completions; arguments and errors as in `sample`."""
        return self.sample(prompt, n, max_tokens=max_tokens, temperature=temperature, seed=seed)[0]

    def rank_groups(self, groups: Sequence[PromptGroup]) -> list[Ranking]:
        """The completions that each group has, best first."""
        found = []
        for group, scored in zip(groups, self._score(groups), strict=True):
            texts = [text_of(completion) for completion in group.completions]
            found.append(ranking_of(group, scored, texts))
        return found

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
        """For each prompt `n` completions sampled from the policy, best first.

        Args:
            groups: Prompts; completions that they have are not looked at.
            n: How many to sample of each.
            max_tokens: Longest completion.
            temperature: 1 samples from the policy itself; 0 is greedy.
            seed: Of the draws.
            on_token: Called after every token.
        """
        bare = [replace(group, completions=(), scores=None) for group in groups]
        limit = (self.implicit or self.reward_model).max_seq_length
        prompts = tokenize_to_score(bare, self.style, limit)
        readable = [prompt for prompt in prompts if isinstance(prompt, TokenizedGroup)]
        stop = sorted(self.model.folder.tokenizer.eos_token_ids)
        with self.model.acting_as(self.policy):
            sampled = generate_groups(
                self.model.module,
                [prompt.prompt.tolist() for prompt in readable],
                n,
                stop,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                on_token=on_token,
            )
        distinct = [different(completions) for completions in sampled]
        texts = [[self._text(one) for one, _, _ in several] for several in distinct]
        scores = iter(self._score_sampled(readable, bare, prompts, distinct, texts))
        found, place = [], 0
        for group, prompt in zip(bare, prompts, strict=True):
            if not isinstance(prompt, TokenizedGroup):
                found.append(Ranking(group, (), prompt.reason))
                continue
            found.append(ranking_of(group, next(scores), texts[place], distinct[place]))
            place += 1
        return found

    @property
    def reward_model(self) -> RewardModel:
        """The reward model that ranks."""
        assert self.reward is not None
        return self.reward

    def _text(self, completion: Generated) -> str:
        ids = completion.tokens[: len(completion.tokens) - completion.ended]
        return str(self.model.folder.tokenizer.decode(ids))

    def _score_sampled(
        self,
        readable: Sequence[TokenizedGroup],
        bare: Sequence[PromptGroup],
        prompts: Sequence[TokenizedGroup | Scored],
        distinct: Sequence[Sequence[Sample]],
        texts: Sequence[Sequence[str]],
    ) -> list[Scored]:
        """By the policy's own tokens; a reward model reads the text, as any tokenizer would."""
        if self.implicit is not None:
            return self.implicit.score_tokens(
                [
                    replace(
                        prompt,
                        completions=tuple(np.array(one.tokens, np.int32) for one, _, _ in several),
                    )
                    for prompt, several in zip(readable, distinct, strict=True)
                ]
            )
        asked = [g for g, p in zip(bare, prompts, strict=True) if isinstance(p, TokenizedGroup)]
        return self._score(
            [
                replace(group, completions=tuple(as_answer(group, text) for text in several))
                for group, several in zip(asked, texts, strict=True)
            ]
        )

    def _score(self, groups: Sequence[PromptGroup]) -> list[Scored]:
        if self.implicit is not None:
            return self.implicit.score_groups(groups)
        if self.reward_tree is None:
            return self.reward_model.score_groups(groups)
        with acting_as(self.model.module, self.reward_tree):
            return self.reward_model.score_groups(groups)


def _ranking_by_itself(
    folder: ModelFolder, run: Finished, terms: Terms, max_seq_length: int, batch_size: int
) -> Reranker:
    model, (policy, reference) = load_trees(folder, [run.folder, terms.reference])
    model = computing_as_trained(model, run)
    style = chat_style(folder.tokenizer)
    implicit = ImplicitReward(
        model,
        style,
        policy,
        reference,
        beta=terms.beta,
        per_token=terms.per_token,
        max_seq_length=max_seq_length,
        batch_size=batch_size,
    )
    return Reranker(model, style, policy, implicit, None, None, terms.said)


def _ranking_by_model(
    folder: ModelFolder, run: Finished | None, given: str, max_seq_length: int, batch_size: int
) -> Reranker:
    """A reward model beside the policy: on its weights, if it is an adapter of the same base."""
    answering = None if run is None else run.folder
    path = Path(given).expanduser()
    is_run = has_head(path)
    base = base_of(path, folder) if is_run else None
    layouts = [read_layout(p) for p in (answering, path if is_run else None) if p is not None]
    if base is not None and base.path == folder.path and common_layout(layouts) is not None:
        model, (policy, reward_tree) = load_trees(folder, [answering, path])
        put_head(model.anatomy, read_head(path)).freeze()
        style = chat_style(folder.tokenizer)
        reward = RewardModel(model, style, max_seq_length=max_seq_length, batch_size=batch_size)
        said = f"reward model {given}, an adapter on the same weights"
    else:
        if base is None and not is_classifier(open_model(given).config):
            raise ModelError(
                f"--reward-model {given}: neither a run of mlx-align reward nor a "
                "*ForSequenceClassification model"
            )
        model, (policy,) = load_trees(folder, [answering])
        style = chat_style(folder.tokenizer)
        reward = RewardModel.load(
            given if base is None else base.name,
            None if base is None else path,
            max_seq_length=max_seq_length,
            batch_size=batch_size,
        )
        reward_tree = None
        said = f"reward model {given}, a second model in memory"
    if run is not None:
        model = computing_as_trained(model, run)
    return Reranker(model, style, policy, None, reward, reward_tree, said)
