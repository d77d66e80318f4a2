r"""The reward functions of `trl.rewards`, with the built-in rewards of this package.

They take completions as TRL passes them, as lists of messages; text works too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_align.errors import ConfigError
from mlx_align.rollout.builtin_rewards import CompletionFacts, exact_answer

Completion = str | Sequence[Mapping[str, str]]

_THINK = re.compile(r"<think>(?!.*<think>).*?</think>.*", re.DOTALL)
_FACTS = CompletionFacts(0, True, 0)


def accuracy_reward(
    completions: Sequence[Completion], solution: Sequence[str], **columns: Any
) -> list[float | None]:
    r"""1 for the right final answer, 0 for another, None without a solution.

    Answers are compared by `exact_answer`: numbers as numbers, and everything else as text without
    whitespace and case. TRL compares formulas by the math_verify package, which also knows that
    x + 1 equals 1 + x.

    Args:
        completions: Messages, or text.
        solution: A column of the data: answers, or texts with one in `\boxed{}`, in `$…$`, or
            after `####`.
        **columns: Other columns, which are not used.
    """
    reward = exact_answer(column="solution")
    return [
        reward(_text(completion), _FACTS, {"solution": _without_dollars(gold)})
        for completion, gold in zip(completions, solution, strict=True)
    ]


def reasoning_accuracy_reward(
    completions: Sequence[Completion],
    solution: Sequence[str],
    reasoning_delimiters: Sequence[str] | None = None,
    **columns: Any,
) -> list[float | None]:
    """As `accuracy_reward`, of what follows the reasoning; 0 if the reasoning has no end.

    Args:
        completions: Messages, or text.
        solution: As in `accuracy_reward`.
        reasoning_delimiters: Ends of the reasoning; by default </think>.
        **columns: Other columns, which are not used.
    """
    found: list[float | None] = []
    for completion, gold in zip(completions, solution, strict=True):
        text = _text(completion)
        ends = [end for end in reasoning_delimiters or ["</think>"] if end in text]
        if ends:
            found += accuracy_reward([text.rpartition(ends[0])[2]], [gold])
        else:
            found.append(0.0)
    return found


def think_format_reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1 if the completion begins with one <think>…</think>, else 0."""
    return [float(_THINK.match(_text(completion)) is not None) for completion in completions]


def get_soft_overlong_punishment(
    max_completion_len: int, soft_punish_cache: int
) -> Callable[..., list[float]]:
    """DAPO's penalty of long completions: 0 to -1 over the last `soft_punish_cache` tokens.

    Args:
        max_completion_len: Longest completion, tokens.
        soft_punish_cache: Tokens before that over which the penalty grows.

    Source: Yu et al. 2025, "DAPO", equation 13.
    """

    def soft_overlong_punishment_reward(
        completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        free = max_completion_len - soft_punish_cache
        return [
            -1.0
            if len(ids) > max_completion_len
            else min(0.0, (free - len(ids)) / soft_punish_cache)
            if soft_punish_cache
            else 0.0
            for ids in completion_ids
        ]

    return soft_overlong_punishment_reward


def get_repetition_penalty_reward(
    ngram_size: int = 3, max_penalty: float = -1.0
) -> Callable[..., list[float]]:
    """A penalty in proportion to the fraction of token n-grams that repeat an earlier one.

    Args:
        ngram_size: Length of the n-grams, tokens.
        max_penalty: The penalty if all were repeated; at most 0.

    Source: Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning in LLMs", appendix C.
    """
    if max_penalty > 0:
        raise ConfigError(f"max_penalty={max_penalty}: must be at most 0")

    def penalty(ids: Sequence[int]) -> float:
        grams = [tuple(ids[i : i + ngram_size]) for i in range(len(ids) - ngram_size + 1)]
        return (1 - len(set(grams)) / len(grams)) * max_penalty if grams else 0.0

    def repetition_penalty_reward(
        completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        return [penalty(ids) for ids in completion_ids]

    return repetition_penalty_reward


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable[..., list[float | None]]:
    """`accuracy_reward` scaled by length along half a cosine: short right answers earn most.

    Args:
        max_len: The length at which the scale ends, tokens.
        min_value_wrong: Reward of the shortest wrong completion.
        max_value_wrong: Reward of the longest wrong completion.
        min_value_correct: Reward of the longest right completion.
        max_value_correct: Reward of the shortest right completion.

    Source: Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning in LLMs", appendix C.
    """

    def cosine_scaled_reward(
        completions: Sequence[Completion],
        solution: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]:
        found: list[float | None] = []
        right = accuracy_reward(completions, solution)
        for correct, ids in zip(right, completion_ids, strict=True):
            if correct is None:
                found.append(None)
                continue
            short, long = min_value_wrong, max_value_wrong
            if correct:
                short, long = max_value_correct, min_value_correct
            share = (1 + math.cos(math.pi * min(1.0, len(ids) / max_len))) / 2
            found.append(long + (short - long) * share)
        return found

    return cosine_scaled_reward


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def _without_dollars(gold: str) -> str:
    """A solution without the dollar signs that LaTeX has around formulas."""
    found = re.fullmatch(r"\s*\$+(.*?)\$+\s*", gold, re.DOTALL) if isinstance(gold, str) else None
    return gold if found is None else found[1]
