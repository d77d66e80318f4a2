"""Rejection sampling: the best of several completions of a prompt, as rows to train on.

Source: Touvron et al. 2023, "Llama 2", section 3.2.3 (rejection sampling fine-tuning).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_align.data.converters import QUESTIONS
from mlx_align.data.pair_converters import COMPLETION_LISTS, RATING_LISTS
from mlx_align.inference.finished import read_run
from mlx_align.inference.implicit import computing_as_trained
from mlx_align.inference.rerank import Reranker
from mlx_align.inference.trees import load_trees
from mlx_align.models.loading import LanguageModel, ModelFolder
from mlx_align.models.roles import Tree, acting_as
from mlx_align.rollout.experience import Prompt, Rollouts, roll_out
from mlx_align.rollout.rewards import as_data
from mlx_align.train.judging import Judge, ScoreModel, apart

# Prompts whose completions are sampled together.
WINDOW = 16
# Fields that a written row has, and those by which another format than its own would be seen in it.
_OWN = {"prompt", "completion", "chosen", "rejected", "score", "n", "score_chosen"}
_OWN |= {"score_rejected", "messages", "conversations", "text", "output", "label", "kto_tag"}
_OWN |= {"preferred_output", "non_preferred_output", *QUESTIONS, *COMPLETION_LISTS, *RATING_LISTS}


@dataclass(frozen=True)
class Wish:
    """What is to be sampled, and kept.

    Attributes:
        n: Completions of a prompt.
        keep: The most that are kept of a prompt; with `pairs`, the best and the worst are.
        threshold: The least score of what is kept; None for any.
        pairs: Write preference rows instead of demonstrations.
        max_tokens: Longest completion.
        temperature: Of the draws.
        seed: Of the draws.
    """

    n: int
    keep: int
    threshold: float | None
    pairs: bool
    max_tokens: int
    temperature: float
    seed: int


def load_sampler(
    folder: ModelFolder, adapter_path: str | None, reward_model: str | None
) -> tuple[LanguageModel, Tree, ScoreModel | None]:
    """The model, the tree that answers, and what scores by a reward model if there is one.

    A reward model on the same base is swapped into it.

    Raises:
        ModelError: A model or run can't be used.
    """
    if reward_model is None:
        run = None if adapter_path is None else read_run(adapter_path)
        model, (policy,) = load_trees(folder, [None if run is None else run.folder])
        return (model if run is None else computing_as_trained(model, run)), policy, None
    both = Reranker.load(folder.name, adapter_path, reward_model)
    score, tree = apart(both.reward_model), both.reward_tree
    if tree is None:
        return both.model, both.policy, score

    def swapped(rollouts: Rollouts) -> npt.NDArray[np.float64]:
        with acting_as(both.model.module, tree):
            return score(rollouts)

    return both.model, both.policy, swapped


def sampled_rows(
    model: LanguageModel,
    policy: Tree,
    judge: Judge,
    prompts: Sequence[Prompt],
    wish: Wish,
    on_prompts: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
    """Rows of the prompts, in their order; the same for the same prompts, model and wish.

    Args:
        model: The base.
        policy: The tree that answers.
        judge: What completions earn.
        prompts: To answer.
        wish: What is sampled and kept.
        on_prompts: Told when so many more prompts are done.

    Raises:
        TrainingError: A reward function failed.
    """
    for start in range(0, len(prompts), WINDOW):
        part = prompts[start : start + WINDOW]
        entropy = np.random.SeedSequence((wish.seed, start))
        rollouts = roll_out(
            model,
            policy,
            part,
            group_size=wish.n,
            max_tokens=wish.max_tokens,
            temperature=wish.temperature,
            seed=int(entropy.generate_state(1, np.uint64)[0]),
        )
        scores = judge(rollouts).total.reshape(-1, wish.n)
        for place, prompt in enumerate(part):
            texts = rollouts.texts[place * wish.n : (place + 1) * wish.n]
            yield from rows_of_prompt(prompt, texts, scores[place], wish)
        on_prompts(len(part))


def rows_of_prompt(
    prompt: Prompt, texts: Sequence[str], scores: npt.NDArray[np.float64], wish: Wish
) -> list[dict[str, Any]]:
    """What is kept of one prompt's completions, best first.

    Empty completions and those without a score are left out, and equal ones count once.
    """
    found: dict[str, float] = {}
    for text, score in zip(texts, scores, strict=True):
        if text.strip() and not np.isnan(score):
            found.setdefault(text, float(score))
    ranked = sorted(found.items(), key=lambda item: -item[1])
    good = [item for item in ranked if wish.threshold is None or item[1] >= wish.threshold]
    group = prompt.text
    chat = not isinstance(group.prompt, str)
    columns = {name: value for name, value in group.columns.items() if name not in _OWN}
    row = {**columns, "prompt": as_data(group.prompt)}

    def said(text: str) -> Any:
        return [{"role": "assistant", "content": text}] if chat else text

    if not wish.pairs:
        return [
            {**row, "completion": said(text), "score": score, "n": wish.n}
            for text, score in good[: wish.keep]
        ]
    if not good or good[0][1] == ranked[-1][1]:
        return []
    (best, high), (worst, low) = good[0], ranked[-1]
    scored = {"score_chosen": high, "score_rejected": low, "n": wish.n}
    return [{**row, "chosen": said(best), "rejected": said(worst), **scored}]
