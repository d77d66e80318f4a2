"""Answers of policy and reference to the same prompts, and what a reward model thinks of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_align.config import EvalConfig
from mlx_align.errors import ModelError
from mlx_align.inference.compared import Bars, Roles, compared_logps
from mlx_align.inference.held_out import Question
from mlx_align.inference.reward_model import RewardModel, base_of
from mlx_align.inference.score import Scorer
from mlx_align.inference.statistics import Floats
from mlx_align.models.classifiers import is_classifier
from mlx_align.models.generation import Generated, generate_groups
from mlx_align.models.heads import has_head
from mlx_align.models.loading import LanguageModel, ModelFolder, open_model
from mlx_align.models.roles import Tree
from mlx_align.types import Message, PromptGroup, Text, TokenizedGroup

# Answers that are asked for between two steps of the progress bar, and prompts judged likewise.
ANSWERS_AT_ONCE = 64
PROMPTS_AT_ONCE = 16


class Answers(NamedTuple):
    """K answers of each role to P prompts.

    Attributes:
        policy: Texts.
        reference: Texts; None where nobody judges them.
        policy_lengths: (P, K) tokens.
        reference_lengths: (P, K) tokens.
        logratios: (P, K) of the policy's answers, policy − reference, nats.
        cut: Share of the policy's answers that were cut at the longest allowed.
    """

    policy: list[list[str]]
    reference: list[list[str]] | None
    policy_lengths: Floats
    reference_lengths: Floats
    logratios: Floats
    cut: float


def draw_answers(
    config: EvalConfig,
    scorer: Scorer,
    roles: Roles,
    questions: Sequence[Question],
    bars: Bars,
) -> Answers:
    """Both roles asked the same, with the same draws; the reference only if somebody judges.

    A single answer of each is drawn apart: nothing could be left out of their comparison.
    """
    drawn = _generate(
        config, roles.model, roles.policy, questions, (config.seed, 0), "policy", bars
    )
    groups = [
        TokenizedGroup(
            question.tokens.prompt,
            tuple(np.array(one.tokens, np.int32) for one in answers),
            question.tokens.source,
        )
        for question, answers in zip(questions, drawn, strict=True)
    ]
    _, logratios = compared_logps(scorer, roles, groups, "KL", bars)
    theirs = None
    if config.reward_model is not None:
        seed = config.seed, int(config.n == 1)
        theirs = _generate(config, roles.model, roles.reference, questions, seed, "reference", bars)

    def texts(every: list[list[Generated]]) -> list[list[str]]:
        return [
            [answer_text(roles.model.folder, question, one) for one in answers]
            for question, answers in zip(questions, every, strict=True)
        ]

    return Answers(
        policy=texts(drawn),
        reference=None if theirs is None else texts(theirs),
        policy_lengths=_lengths(drawn),
        reference_lengths=_lengths(theirs or []),
        logratios=logratios,
        cut=float(np.mean([not one.ended for answers in drawn for one in answers])),
    )


def _generate(
    config: EvalConfig,
    model: LanguageModel,
    tree: Tree,
    questions: Sequence[Question],
    seed: tuple[int, int],
    role: str,
    bars: Bars,
) -> list[list[Generated]]:
    stop = sorted(model.folder.tokenizer.eos_token_ids)
    model.module.eval()
    answers: list[list[Generated]] = []
    step = max(1, ANSWERS_AT_ONCE // config.n)
    with bars(f"Answers of the {role}", len(questions)) as bar, model.acting_as(tree):
        for start in range(0, len(questions), step):
            part = questions[start : start + step]
            answers += generate_groups(
                model.module,
                [question.tokens.prompt.tolist() for question in part],
                config.n,
                stop,
                max_tokens=config.sample_tokens,
                temperature=1.0,
                seed=int(np.random.SeedSequence([*seed, start]).generate_state(1)[0]),
            )
            bar.advance(len(part))
    return answers


def answer_text(folder: ModelFolder, question: Question, answer: Generated) -> str:
    """An answer as text that, behind its prompt, is what was sampled."""
    decode = folder.tokenizer.decode
    tokens = answer.tokens[: len(answer.tokens) - answer.ended]
    if not isinstance(question.text.prompt, str):
        # A chat template, or plain turns, write what stands between prompt and answer.
        return str(decode(tokens)).strip()
    # Decoded alone, a first token would lose the space it begins with.
    prompt = question.tokens.prompt.tolist()
    return str(decode(prompt + tokens))[len(str(decode(prompt))) :]


def _lengths(every: list[list[Generated]]) -> Floats:
    return np.array([[len(one.tokens) for one in answers] for answers in every], np.float64)


def load_judge(config: EvalConfig) -> RewardModel:
    """A run of `mlx-align reward`, on --model or the other base that it names, or a classifier.

    Raises:
        ModelError: It is neither, or can't be loaded.
    """
    assert config.reward_model is not None
    assert config.model is not None
    run = Path(config.reward_model).expanduser()
    if has_head(run):
        return RewardModel.load(base_of(run, open_model(config.model)).name, run)
    try:
        classifier = is_classifier(open_model(config.reward_model).config)
    except ModelError as error:
        raise ModelError(f"--reward-model {str(error).removeprefix('--model ')}") from error
    if not classifier:
        raise ModelError(
            f"--reward-model {config.reward_model}: neither a run of mlx-align reward nor a "
            "*ForSequenceClassification model"
        )
    return RewardModel.load(config.reward_model)


def judge_answers(
    config: EvalConfig, questions: Sequence[Question], texts: list[list[str]], bars: Bars
) -> Floats:
    """Scores (P, answers), NaN where a prompt's answers could not be scored.

    Answers that read the same are scored once: they have one score, whoever gave them.
    """
    judge = load_judge(config)
    different = [list(dict.fromkeys(answers)) for answers in texts]
    groups = [
        PromptGroup(
            question.text.prompt,
            tuple(_as_completion(question, text) for text in answers),
            question.text.source,
        )
        for question, answers in zip(questions, different, strict=True)
    ]
    scores = np.full((len(groups), len(texts[0])), np.nan)
    with bars("Judging", len(groups)) as bar:
        for start in range(0, len(groups), PROMPTS_AT_ONCE):
            part = groups[start : start + PROMPTS_AT_ONCE]
            for row, scored in enumerate(judge.score_groups(part), start):
                if scored.scores is not None:
                    by_text = dict(zip(different[row], scored.scores.tolist(), strict=True))
                    scores[row] = [by_text[text] for text in texts[row]]
            bar.advance(len(part))
    return scores


def _as_completion(question: Question, text: str) -> Text:
    return text if isinstance(question.text.prompt, str) else (Message("assistant", text),)


def answer_rows(
    questions: Sequence[Question],
    answers: Answers,
    scores: Floats,
    reference_scores: Floats | None,
) -> list[dict[str, Any]]:
    """A row per prompt: the prompt, and each role's answers with their scores."""
    rows = []
    for i, question in enumerate(questions):
        prompt = question.text.prompt
        row = {
            "source": question.text.source,
            "prompt": prompt if isinstance(prompt, str) else [asdict(turn) for turn in prompt],
            "policy": _scored(answers.policy[i], scores[i]),
        }
        if answers.reference is not None and reference_scores is not None:
            row["reference"] = _scored(answers.reference[i], reference_scores[i])
        rows.append(row)
    return rows


def _scored(texts: list[str], scores: Floats) -> list[dict[str, Any]]:
    return [
        {"text": text, "score": float(score) if np.isfinite(score) else None}
        for text, score in zip(texts, scores, strict=True)
    ]
