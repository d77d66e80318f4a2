"""Evaluation in a run: its result, answers to held-out prompts, and the KL from the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mlx_align.config import TrainConfig
from mlx_align.data.buckets import BatchLimit, plan_shapes
from mlx_align.data.messages import text_as_json
from mlx_align.inference.scoring import Scorer, score_groups
from mlx_align.models.generation import generate_batch
from mlx_align.models.loading import ModelFolder
from mlx_align.models.policy import Policy
from mlx_align.models.weights import AdapterWeights
from mlx_align.types import TokenizedGroup


class EvaluationResult(NamedTuple):
    """Held-out metrics after a step.

    Attributes:
        metrics: The metrics by name, without `eval/`.
        examples: Number of held-out examples.
        is_best: Whether the result is the best so far.
        deviations: Changes of the training reward and the held-out reward since the first
            evaluation, in units of its standard deviation; None if there are not two rewards.
    """

    metrics: dict[str, float]
    examples: int
    is_best: bool
    deviations: tuple[float, float] | None = None


def answers(
    policy: Policy,
    weights: AdapterWeights,
    prompts: Sequence[TokenizedGroup],
    config: TrainConfig,
) -> list[str]:
    """Greedy completions of held-out prompts, without their end tokens."""
    tokenizer = policy.model.folder.tokenizer
    texts = []
    for tokens in _generate(policy, weights, prompts, config, temperature=0.0, seed=config.seed):
        finished = bool(tokens) and tokens[-1] in tokenizer.eos_token_ids
        texts.append(tokenizer.decode(tokens[: len(tokens) - finished]))
    return texts


def _generate(
    policy: Policy,
    weights: AdapterWeights,
    prompts: Sequence[TokenizedGroup],
    config: TrainConfig,
    *,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """Tokens of one completion per prompt."""
    if not prompts:
        return []
    model = policy.model
    model.module.eval()
    with model.use_adapter(weights):
        return generate_batch(
            model.module,
            [group.prompt.tolist() for group in prompts],
            sorted(model.folder.tokenizer.eos_token_ids),
            max_tokens=config.sample_tokens,
            temperature=temperature,
            seed=seed,
        )


def prompt_fields(folder: ModelFolder, group: TokenizedGroup) -> dict[str, Any]:
    """The prompt for samples.jsonl: its text as the model reads it, and its messages, if any."""
    text = folder.tokenizer.decode(group.prompt.tolist(), skip_special_tokens=True)
    turns = None if group.text is None else text_as_json(group.text)
    return {"prompt": text, **({"messages": turns} if isinstance(turns, list) else {})}


def kl_from_reference(
    scorer: Scorer,
    policy: Policy,
    weights: AdapterWeights,
    prompts: Sequence[TokenizedGroup],
    config: TrainConfig,
    limit: BatchLimit,
) -> dict[str, float] | None:
    """KL(policy‖reference) in nats per sequence with its standard error; None without prompts.

    The k1 estimator on the policy's own samples at temperature 1, truncated at `sample_tokens`:
    unbiased for the distribution over such completions.
    """
    if not prompts:
        return None
    sampled = _generate(policy, weights, prompts, config, temperature=1.0, seed=config.seed + 1)
    groups = [
        TokenizedGroup(group.prompt, (np.array(tokens, np.int32),), group.source)
        for group, tokens in zip(prompts, sampled, strict=True)
        if tokens
    ]
    shapes = plan_shapes(groups, limit)
    logps = score_groups(scorer, weights, groups, shapes)
    reference = score_groups(scorer, policy.start, groups, shapes)
    k1 = [(p[0] - r[0]).sum(dtype=np.float64) for p, r in zip(logps, reference, strict=True)]
    return mean_and_error(np.array(k1))


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    """Mean of independent samples, its standard error, and their number."""
    count = len(values)
    error = float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else float("nan")
    return {"mean": float(values.mean()), "standard_error": error, "samples": count}
