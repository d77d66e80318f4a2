"""The objective of reward models: Bradley–Terry over every two completions of a prompt.

A pair is a ranked list of two, so both take one way. Several members are several heads on one
adapted model, each learning from all prompts but those of its own fold: what they disagree on is
what the data decides only by chance. The report at the end is of all held-out data, by the mean
of the members.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_align.config import RewardConfig
from mlx_align.data.batching import Microbatch
from mlx_align.data.comparisons import (
    Compared,
    collate_rewards,
    compare,
    filled_up,
    members_that_learn,
)
from mlx_align.data.formats import read_preferences
from mlx_align.data.shapes import BatchLimit, plan_shapes
from mlx_align.errors import ConfigError
from mlx_align.inference.evaluate import RewardReport, render_report
from mlx_align.inference.judge import judge
from mlx_align.inference.score import Scorer, make_reward_scorer, score_groups
from mlx_align.losses.masking import weighted_sum
from mlx_align.losses.reward import differences, every_two, kwise_loss
from mlx_align.models.loading import LanguageModel, ModelFolder
from mlx_align.models.roles import Tree
from mlx_align.train.display import Display
from mlx_align.train.loop import Objective
from mlx_align.train.setup import Policy, PreparedData
from mlx_align.train.shares import role_scores, size_of, weighted_metrics
from mlx_align.train.task import Conclusion, GroupLogps, Task
from mlx_align.train.update import Sums
from mlx_align.types import Comparisons, RewardBatch, TokenizedGroup


class Totals(NamedTuple):
    """What an update's microbatches divide by."""

    lessons: mx.array  # groups, each once per member that learns from it


def reward_objective(
    model: LanguageModel, groups: Sequence[TokenizedGroup], config: RewardConfig
) -> Objective:
    """The objective of comparisons.

    Args:
        model: The base, with adapters and a head of `config.members`.
        groups: The training groups, filled up to equally many completions.
        config: Weights of the loss, folds.
    """
    compared = [_compare(group, config) for group in groups]
    learns = members_that_learn(groups, config.members, config.seed)

    def collate(micro: Microbatch) -> RewardBatch:
        members = list(micro.indices)
        return collate_rewards(
            [groups[i] for i in members],
            [compared[i] for i in members],
            learns[members],
            micro.shape,
        )

    def totals(batches: Sequence[RewardBatch]) -> Totals:
        # Fillers learn nothing: their rows are zeros.
        return Totals(mx.array(sum(batch.learns.sum() for batch in batches)))

    def share(tree: Tree, batch: RewardBatch, totals: Totals) -> tuple[mx.array, Sums]:
        flat = role_scores(model, tree, batch.groups, grad_checkpoint=config.grad_checkpoint)
        scores = flat.reshape(batch.weight.shape[0], -1, config.members)
        loss = mx.array(0.0)
        for member in range(config.members):
            values = _loss(scores[:, :, member], batch.comparisons, config)
            loss = loss + weighted_sum(values, batch.learns[:, member])
        metrics = reward_metrics(scores.mean(axis=-1), batch.comparisons)
        return loss / totals.lessons, weighted_metrics(metrics, batch.weight)

    return Objective(
        collate=collate,
        totals=totals,
        loss=share,
        size=lambda micro: size_of(groups, micro),
        sources=lambda micro: [groups[i].source for i in micro.indices],
    )


def _compare(group: TokenizedGroup, config: RewardConfig) -> Compared:
    return compare(group, rating_margin=config.rating_margin, ties=config.ties)


def _loss(scores: mx.array, comparisons: Comparisons, config: RewardConfig) -> mx.array:
    return kwise_loss(
        scores,
        comparisons,
        center=config.center_rewards_coefficient,
        label_smoothing=config.label_smoothing,
    )


def reward_metrics(scores: mx.array, comparisons: Comparisons) -> dict[str, mx.array]:
    """Per-group metrics (B,), means over its comparisons, from scores (B, K).

    `rewards/chosen` and `rewards/rejected` are the scores of the better and of the worse
    completion; an undecided comparison, or equal scores, count half in the accuracy.
    """
    weight = comparisons.weight / mx.maximum(comparisons.weight.sum(axis=1, keepdims=True), 1e-9)
    side = mx.sign(comparisons.probability - 0.5)
    delta = differences(scores, comparisons)
    first, second = (scores[:, mx.array(column)] for column in every_two(scores.shape[1]))
    chosen = mx.where(side < 0, second, first)

    def mean(values: mx.array) -> mx.array:
        return mx.where(weight > 0, weight * values, 0.0).sum(axis=1)

    margins = mx.where(side < 0, -delta, delta)
    return {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(first + second - chosen),
        "rewards/accuracies": mean(0.5 * (1 + mx.sign(side * delta))),
        "rewards/margins": mean(margins),
    }


def evaluate_comparisons(
    scores: GroupLogps, groups: Sequence[TokenizedGroup], config: RewardConfig
) -> dict[str, float]:
    """Loss and metrics, means over groups, of the members' mean scores."""
    rows = np.array([[row.mean() for row in group] for group in scores], np.float32)
    compared = [_compare(group, config) for group in groups]
    columns = (np.stack(column) for column in zip(*compared, strict=True))
    comparisons = Comparisons(*(mx.array(column) for column in columns))
    values = {"loss": _loss(mx.array(rows), comparisons, config)}
    values.update(reward_metrics(mx.array(rows), comparisons))
    return {name: float(np.array(value).mean()) for name, value in values.items()}


def reward_task(config: RewardConfig) -> Task:
    """What `mlx-align reward` trains and measures.

    Raises:
        ConfigError: An option would have no effect, or take the end token away.
    """
    if config.max_completion_length is not None:
        raise ConfigError(
            "--max-completion-length: a score is read at the end token, which a cut completion "
            "has lost; leave it out, and rows longer than --max-seq-length are dropped"
        )

    def objective(
        policy: Policy,
        groups: Sequence[TokenizedGroup],
        _reference: GroupLogps | None,
        _scorer: Scorer,
    ) -> Objective:
        return reward_objective(policy.model, groups, config)

    return Task(
        command="reward",
        title="Reward model" if config.members == 1 else f"Reward model ({config.members} heads)",
        read=read_preferences,
        check=lambda data: check_comparisons(data, config),
        needs_reference=False,
        objective=objective,
        measure=lambda scores, _, groups: evaluate_comparisons(scores, groups, config),
        arrange=filled_up,
        has_reference=False,
        unit="groups",
        scorer=make_reward_scorer,
        per_token=False,
        conclude=partial(_conclude, config),
        afterwards=how_to_score,
    )


def how_to_score(folder: ModelFolder, run: Path) -> str:
    """The command that scores completions with the result."""
    where = f"--model {shlex.quote(folder.name)} --adapter-path {shlex.quote(str(run))}"
    return f"mlx-align score {where} --data FILE --output scores.jsonl"


def check_comparisons(data: PreparedData, config: RewardConfig) -> list[str]:
    """Lines on what the data says beside which completion is better.

    Raises:
        ConfigError: An option has no effect on this data.
    """
    groups = data.train
    lists = [group for group in groups if len(group.completions) > 2]
    tied = any(len(set(g.scores or ())) < len(g.completions) for g in lists)
    if config.ties != "skip" and not tied:
        raise ConfigError("--ties half: the data has no list with equal ratings; leave it out")
    if config.rating_margin and all(group.scores is None for group in groups):
        raise ConfigError("--rating-margin: the data has no ratings; leave it out")
    prompts = len({group.prompt.tobytes() for group in groups})
    if config.members > prompts:
        raise ConfigError(
            f"--members {config.members}: each leaves a fold of prompts out, and there are "
            f"{prompts}; give at most that"
        )
    lines = []
    if lists:
        most = max(len(group.completions) for group in lists)
        lines.append(
            f"{len(lists):,} ranked lists of up to {most} completions; every two of one are "
            "compared, and each prompt counts once"
        )
    soft = sum(group.soft_label is not None for group in groups)
    if soft:
        lines.append(f"{soft:,} pairs have a soft label")
    margins = [group.margin for group in groups if group.margin is not None]
    if margins:
        mean = sum(margins) / len(margins)
        lines.append(f"{len(margins):,} pairs name their margin ({mean:.3g} on average)")
    if not data.valid:
        lines.append("! nothing is held out: how good the reward model is will not be known")
    return lines


def _conclude(
    config: RewardConfig,
    scorer: Scorer,
    tree: Tree,
    folder: ModelFolder,
    groups: Sequence[TokenizedGroup],
    limit: BatchLimit,
    display: Display,
) -> Conclusion:
    """The report on all held-out data, and what the model thinks of a few groups."""
    with display.bar("Held-out data", len(groups)) as bar:
        found = score_groups(
            scorer,
            tree,
            groups,
            plan_shapes(groups, limit),
            on_batch=lambda positions, _: bar.advance(len(positions)),
            per_token=False,
        )
    compared = [_compare(group, config) for group in groups]
    scores = [np.stack(rows) for rows in found]
    judged = judge(groups, compared, scores, seed=config.seed)
    if judged is None:
        return Conclusion({}, [], "! no held-out comparison is decided: nothing to report")
    facts: dict[str, Any] = judged.as_json()
    text = "\n" + render_report(judged)
    if config.members > 1:
        facts["members"], line = _say_members(groups, compared, scores, config)
        text += "\n" + line
    samples = [
        _sample(folder, group, rows.mean(axis=1), config.sample_tokens)
        for group, rows in list(zip(groups, scores, strict=True))[: config.samples]
    ]
    return Conclusion(facts, samples, text)


def _say_members(
    groups: Sequence[TokenizedGroup],
    compared: Sequence[Compared],
    scores: Sequence[np.ndarray],
    config: RewardConfig,
) -> tuple[dict[str, Any], str]:
    """What tells the members apart: each one's accuracy, and how far their scores spread."""
    single: list[RewardReport | None] = [
        judge(groups, compared, [rows[:, m : m + 1] for rows in scores], seed=config.seed)
        for m in range(config.members)
    ]
    accuracies = [one.accuracy for one in single if one is not None]
    gaps = np.concatenate([rows[:1] - rows[1:2] for rows in scores])
    spread = float(gaps.std(axis=1).mean())
    shown = ", ".join(f"{accuracy:.1%}" for accuracy in accuracies)
    return (
        {"accuracies": accuracies, "spread": spread},
        f"members alone: {shown}; their score differences spread by {spread:.3f} on average",
    )


def _sample(
    folder: ModelFolder, group: TokenizedGroup, scores: np.ndarray, limit: int
) -> dict[str, Any]:
    def text(ids: np.ndarray) -> str:
        return str(folder.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    return {
        "source": group.source,
        "prompt": text(group.prompt[-limit:]),
        "completions": [
            {"text": text(ids[:limit]), "score": float(score)}
            for ids, score in zip(group.completions, scores, strict=True)
            if len(ids)
        ],
    }
