"""A finished run measured: against its reference, on what it did not learn from.

One model is in memory at a time. A reward model is loaded before anything else, so that a wrong
one is found at once, let go of, and loaded again when the answers are there.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_align.config import EvalConfig, TrainConfig
from mlx_align.data.rendering import ChatStyle, chat_style
from mlx_align.data.tokenize import tokenize_groups
from mlx_align.errors import DataError
from mlx_align.inference.answers import (
    Answers,
    answer_rows,
    draw_answers,
    judge_answers,
    load_judge,
)
from mlx_align.inference.compared import Bars, compared_logps, load_roles
from mlx_align.inference.finished import Finished, read_run
from mlx_align.inference.held_out import (
    HeldOut,
    Question,
    choose_questions,
    read_documents,
    read_held_out,
    stretches,
)
from mlx_align.inference.measures import (
    BestOf,
    Divergence,
    Perplexity,
    Preferences,
    Wins,
    best_of_curve,
    compare_answers,
    divergence,
    perplexity_change,
    preferences,
)
from mlx_align.inference.score import make_scorer
from mlx_align.models.loading import ModelFolder, open_model
from mlx_align.types import PromptGroup, TokenizedGroup


@dataclass(frozen=True)
class Evaluation:
    """What was measured; a part that the data or the options don't allow is None.

    Attributes:
        run: The run folder.
        model: Its base.
        reference: What it is compared with, in words.
        data: Which rows were held out, in words.
        judge: The reward model; None where there was none.
        seed: Of prompts, answers and intervals.
        preferences: On held-out pairs.
        divergence: On own answers.
        wins: By the judge.
        best_of: By the judge, or else by the implicit reward.
        perplexity: On the text named.
        warnings: What its reader should know, a sentence each.
    """

    run: str
    model: str
    reference: str
    data: str
    judge: str | None
    seed: int
    preferences: Preferences | None
    divergence: Divergence
    wins: Wins | None
    best_of: list[BestOf]
    perplexity: Perplexity | None
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


class _Measured(NamedTuple):
    """What needs policy and reference in memory."""

    preferences: Preferences | None
    answers: Answers
    perplexity: Perplexity | None


class Evaluated(NamedTuple):
    """An evaluation and the answers it rests on.

    Attributes:
        found: The numbers.
        rows: A row per prompt: the prompt, and each role's answers with their scores.
    """

    found: Evaluation
    rows: list[dict[str, Any]]


def evaluate_run(config: EvalConfig, bars: Bars) -> Evaluated:
    """Measure a run against its reference.

    Args:
        config: Options; `model` and `adapter_path` are set.
        bars: (label, total) -> a progress bar, as a context.

    Raises:
        MlxAlignError: Something is the user's to mend.
    """
    assert config.model is not None
    assert config.adapter_path is not None
    run = read_run(config.adapter_path)
    held_out = read_held_out(run, config.data, config.format)
    documents = None if config.perplexity_data is None else read_documents(config.perplexity_data)
    folder = open_model(config.model)
    style = chat_style(folder.tokenizer)
    limits = run.config or TrainConfig()
    max_length = config.max_seq_length or limits.max_seq_length
    questions = choose_questions(
        held_out.prompts, style, count=config.samples, max_length=max_length, seed=config.seed
    )
    pairs = _tokenized_pairs(held_out, folder, limits, max_length)
    if config.reward_model is not None:
        load_judge(config)
        _let_go()
    measured = _measure(config, folder, run, style, pairs, questions, documents, max_length, bars)
    _let_go()
    answers = measured.answers
    beta = 1.0 if run.beta is None else run.beta
    scores = beta * answers.logratios
    wins = reference_scores = None
    judged = np.ones(len(questions), np.bool_)
    if answers.reference is not None:
        texts = [
            ours + theirs for ours, theirs in zip(answers.policy, answers.reference, strict=True)
        ]
        both = judge_answers(config, questions, texts, bars)
        judged = np.asarray(np.isfinite(both).all(axis=1))
        if not judged.any():
            raise DataError(
                f"--reward-model {config.reward_model}: none of the {len(questions)} prompts' "
                "answers could be scored (too long for it, or refused by its chat template)"
            )
        scores, reference_scores = both[:, : config.n], both[:, config.n :]
        wins = compare_answers(
            scores[judged],
            reference_scores[judged],
            answers.policy_lengths[judged],
            answers.reference_lengths[judged],
            unjudged=int((~judged).sum()),
            seed=config.seed,
        )
    prompt = np.repeat(np.arange(len(questions)), config.n)
    found = Evaluation(
        run=str(run.folder),
        model=config.model,
        reference=_reference_words(run),
        data=held_out.title,
        judge=config.reward_model,
        seed=config.seed,
        preferences=measured.preferences,
        divergence=divergence(
            answers.logratios.ravel(), answers.policy_lengths.ravel(), prompt, answers.cut
        ),
        wins=wins,
        best_of=best_of_curve(scores[judged], seed=config.seed),
        perplexity=measured.perplexity,
        warnings=_warnings(config, run, folder, answers, len(questions)),
    )
    return Evaluated(found, answer_rows(questions, answers, scores, reference_scores))


def _tokenized_pairs(
    held_out: HeldOut, folder: ModelFolder, limits: TrainConfig, max_length: int
) -> list[TokenizedGroup]:
    if not held_out.pairs:
        return []
    return tokenize_groups(
        held_out.pairs,
        folder.tokenizer,
        max_seq_length=max_length,
        max_completion_length=limits.max_completion_length,
    )[0]


def _measure(
    config: EvalConfig,
    folder: ModelFolder,
    run: Finished,
    style: ChatStyle,
    pairs: Sequence[TokenizedGroup],
    questions: Sequence[Question],
    documents: Sequence[PromptGroup] | None,
    max_length: int,
    bars: Bars,
) -> _Measured:
    """All that needs the two roles; they are let go of when this returns."""
    roles = load_roles(folder, run)
    scorer = make_scorer(roles.model)
    beta = 1.0 if run.beta is None else run.beta
    preferred = perplexity = None
    if pairs:
        reference, logratios = compared_logps(scorer, roles, pairs, "Held-out pairs", bars)
        prompts: dict[bytes, int] = {}
        of = [prompts.setdefault(pair.prompt.tobytes(), len(prompts)) for pair in pairs]
        preferred = preferences(reference, logratios, np.array(of), beta, seed=config.seed)
    answers = draw_answers(config, scorer, roles, questions, bars)
    if documents is not None:
        groups, of = stretches(documents, style, max_length)
        reference, logratios = compared_logps(scorer, roles, groups, "Perplexity", bars)
        tokens = np.array([len(group.completions[0]) for group in groups], np.float64)
        perplexity = perplexity_change(
            reference[:, 0], logratios[:, 0], tokens, np.array(of), seed=config.seed
        )
    return _Measured(preferred, answers, perplexity)


def _let_go() -> None:
    """Free the memory of a model that nobody holds any more."""
    gc.collect()
    mx.clear_cache()


def _reference_words(run: Finished) -> str:
    if run.config is not None and run.config.init_adapter is not None:
        return f"the adapter the run started from, {run.config.init_adapter}"
    return "the base model"


def _warnings(
    config: EvalConfig, run: Finished, folder: ModelFolder, answers: Answers, prompts: int
) -> tuple[str, ...]:
    found = []
    named = None if run.config is None or run.base is None else Path(run.base).expanduser()
    if named is not None and named.resolve() != folder.path.resolve():
        found.append(f"the run was trained on {run.base}: has --model the same weights?")
    if answers.cut > 0.1:
        found.append(
            f"{answers.cut:.0%} of the policy's answers were cut at --sample-tokens "
            f"{config.sample_tokens}: a judge sees them unfinished"
        )
    if prompts < 30:
        found.append(f"{prompts} prompts are few: intervals from so few are too narrow")
    return tuple(found)
