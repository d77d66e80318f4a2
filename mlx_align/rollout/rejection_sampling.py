"""Rejection sampling: keep the best of several completions of a prompt, as rows to train on.

Source: Touvron et al. 2023, "Llama 2", section 3.2.3 (rejection sampling fine-tuning).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_align.data.converters import COMPLETION_LIST_FIELDS, QUESTION_FIELDS, RATING_LIST_FIELDS
from mlx_align.inference.reward_model import (
    find_reward_model,
    load_policy_and_reward_model,
)
from mlx_align.inference.trained_run import match_adapter_dtype, read_trained_run
from mlx_align.models.loading import LanguageModel, ModelFolder, load_adapters
from mlx_align.models.weights import AdapterWeights
from mlx_align.rollout.reward_functions import as_data
from mlx_align.rollout.reward_models import CompletionScorer, SeparateRewardModel
from mlx_align.rollout.rewards import Rewards
from mlx_align.rollout.sampler import Prompt, sample_completions

# Prompts whose completions are sampled together.
PROMPTS_PER_BATCH = 16
# Columns of the written rows, and columns that would make a reader detect another format.
_RESERVED = {"prompt", "completion", "chosen", "rejected", "score", "n", "score_chosen"}
_RESERVED |= {"score_rejected", "messages", "conversations", "text", "output", "label", "kto_tag"}
_RESERVED |= {"preferred_output", "non_preferred_output"}
_RESERVED |= {*QUESTION_FIELDS, *COMPLETION_LIST_FIELDS, *RATING_LIST_FIELDS}


@dataclass(frozen=True)
class RejectionSamplingConfig:
    """Options of rejection sampling.

    Attributes:
        n: Completions per prompt.
        keep: Maximum number of completions to keep per prompt; `pairs` keeps the best and worst.
        threshold: Minimum score of completions to keep; None to keep any.
        pairs: Write preference pairs instead of demonstrations.
        max_tokens: Longest completion, in tokens.
        temperature: Sampling temperature.
        seed: Random seed.
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
) -> tuple[LanguageModel, AdapterWeights, CompletionScorer | None]:
    """Load the model, the weights that sample, and the reward model's scorer if there is one.

    A reward model on the same base shares its memory.

    Raises:
        ModelError: A model or run can't be used.
    """
    if reward_model is None:
        run = None if adapter_path is None else read_trained_run(adapter_path)
        model, (policy,) = load_adapters(folder, [None if run is None else run.folder])
        return (model if run is None else match_adapter_dtype(model, run)), policy, None
    run = None if adapter_path is None else read_trained_run(adapter_path)
    model, policy, reward = load_policy_and_reward_model(
        folder, None if run is None else run.folder, find_reward_model(reward_model, folder)
    )
    if run is not None:
        model = match_adapter_dtype(model, run)
    return model, policy, SeparateRewardModel(reward)


def sample_rows(
    model: LanguageModel,
    policy: AdapterWeights,
    rewards: Rewards,
    prompts: Sequence[Prompt],
    config: RejectionSamplingConfig,
    on_prompts: Callable[[int], None],
    done: int = 0,
) -> Iterator[dict[str, Any]]:
    """Sample, reward and select, in the order of the prompts; deterministic for a config.

    Args:
        model: The base model.
        policy: The weights that sample.
        rewards: Rewards the completions.
        prompts: The prompts.
        config: The options.
        on_prompts: Called with the number of prompts just finished, after their rows.
        done: Prompts to leave out at the start: a multiple of `PROMPTS_PER_BATCH`, or all.

    Raises:
        TrainingError: A reward function failed.
    """
    for start in range(done, len(prompts), PROMPTS_PER_BATCH):
        part = prompts[start : start + PROMPTS_PER_BATCH]
        entropy = np.random.SeedSequence((config.seed, start))
        completions = sample_completions(
            model,
            policy,
            part,
            group_size=config.n,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=int(entropy.generate_state(1, np.uint64)[0]),
        )
        scores = rewards(completions).total.reshape(-1, config.n)
        for place, prompt in enumerate(part):
            texts = completions.texts[place * config.n : (place + 1) * config.n]
            yield from select_rows(prompt, texts, scores[place], config)
        on_prompts(len(part))


def select_rows(
    prompt: Prompt,
    texts: Sequence[str],
    scores: npt.NDArray[np.float64],
    config: RejectionSamplingConfig,
) -> list[dict[str, Any]]:
    """The rows kept of one prompt's completions, best first.

    Empty completions and those without a score are dropped, and duplicates count once. A
    completion that scored 0, the least of its prompt, earned nothing and is no demonstration;
    `threshold` decides instead if it is given.
    """
    found: dict[str, float] = {}
    for text, score in zip(texts, scores, strict=True):
        if text.strip() and not np.isnan(score):
            found.setdefault(text, float(score))
    ranked = sorted(found.items(), key=lambda item: -item[1])
    if config.threshold is not None:
        good = [item for item in ranked if item[1] >= config.threshold]
    elif ranked and ranked[-1][1] == 0:
        good = [item for item in ranked if item[1] > 0]
    else:
        good = ranked
    group = prompt.text
    chat = not isinstance(group.prompt, str)
    columns = {name: value for name, value in group.columns.items() if name not in _RESERVED}
    row = {**columns, "prompt": as_data(group.prompt)}

    def as_completion(text: str) -> Any:
        return [{"role": "assistant", "content": text}] if chat else text

    if not config.pairs:
        return [
            {**row, "completion": as_completion(text), "score": score, "n": config.n}
            for text, score in good[: config.keep]
        ]
    if not good or good[0][1] == ranked[-1][1]:
        return []
    (best, high), (worst, low) = good[0], ranked[-1]
    scored = {"score_chosen": high, "score_rejected": low, "n": config.n}
    return [{**row, "chosen": as_completion(best), "rejected": as_completion(worst), **scored}]
