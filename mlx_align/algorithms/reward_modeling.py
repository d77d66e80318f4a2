"""Reward models: the Bradley-Terry loss over all pairs of a prompt's completions.

A preference pair is a ranked list of two, so pairs and lists share one code path. An ensemble has
several heads on one adapted model. Each head is trained without one fold of the prompts, so their
disagreement shows where the data doesn't determine the score. The report at the end covers all
held-out data and uses the mean of the heads.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_align.algorithms.base import (
    Algorithm,
    CompletionLogps,
    HeldOutReport,
    MetricSums,
    Objective,
    TrainedPolicy,
    held_out_means,
    weighted_metrics,
)
from mlx_align.config import RewardConfig
from mlx_align.data.batching import Microbatch
from mlx_align.data.buckets import plan_shapes
from mlx_align.data.chat_template import Thinking
from mlx_align.data.comparisons import (
    GroupComparisons,
    collate_rewards,
    compare_completions,
    ensemble_mask,
    pad_completion_lists,
)
from mlx_align.data.formats import ReadReport, read_preferences
from mlx_align.data.messages import text_as_json
from mlx_align.data.readers import Data
from mlx_align.data.statistics import TokenizedDataset
from mlx_align.errors import ConfigError
from mlx_align.evaluation.render import render_reward_report
from mlx_align.evaluation.reward_model import RewardReport, evaluate_reward_model
from mlx_align.inference.scoring import Scorer, make_reward_scorer, score_groups
from mlx_align.losses.masking import weighted_sum
from mlx_align.losses.reward import kwise_loss, pair_indices, score_differences
from mlx_align.models.loading import LanguageModel, ModelFolder
from mlx_align.models.policy import Policy
from mlx_align.models.weights import AdapterWeights
from mlx_align.types import Comparisons, PromptGroup, RewardBatch, TokenizedGroup


class RewardModeling(Algorithm):
    """Reward modeling on pairs and ranked lists.

    Source: Ouyang et al. 2022 (InstructGPT), equation 1.

    Raises:
        ConfigError: An option would have no effect, or cut off the end token.
    """

    command: ClassVar[str] = "reward"
    unit: ClassVar[str] = "groups"
    has_reference: ClassVar[bool] = False
    per_token: ClassVar[bool] = False
    samples_answers: ClassVar[bool] = False
    reports_all: ClassVar[bool] = True

    def __init__(self, config: RewardConfig) -> None:
        if config.max_completion_length is not None:
            raise ConfigError(
                "--max-completion-length can't be used here: a score is read at the end token, "
                "which a truncated completion has lost; leave it out, and rows longer than "
                "--max-seq-length are dropped"
            )
        self._config = config
        heads = "" if config.members == 1 else f" ({config.members} heads)"
        self.title = f"Reward model{heads}"

    def read(
        self, data: Data, split: str, format: str | None
    ) -> tuple[list[PromptGroup], ReadReport]:
        """Read pairs and ranked lists."""
        return read_preferences(data, split, format)

    def check(self, data: TokenizedDataset) -> list[str]:
        """Lines on lists, soft labels and margins; see `check_comparisons`."""
        return check_comparisons(data, self._config)

    def arrange(self, groups: Sequence[TokenizedGroup]) -> list[TokenizedGroup]:
        """Pad the groups to the same number of completions."""
        return pad_completion_lists(groups)

    def objective(
        self,
        policy: Policy,
        groups: Sequence[TokenizedGroup],
        reference: CompletionLogps | None,
        scorer: Scorer,
    ) -> RewardObjective:
        """The objective of the comparisons in `groups`."""
        return RewardObjective(policy.model, groups, self._config)

    def evaluate(
        self,
        logps: CompletionLogps,
        reference: CompletionLogps,
        groups: Sequence[TokenizedGroup],
    ) -> dict[str, float]:
        """Loss and metrics from scores; see `evaluate_comparisons`."""
        return evaluate_comparisons(logps, groups, self._config)

    def make_scorer(self, model: LanguageModel) -> Scorer:
        """A compiled forward pass that returns scores (N, members)."""
        return make_reward_scorer(model)

    def report_held_out(self, trained: TrainedPolicy) -> HeldOutReport:
        """Accuracy and calibration on all held-out data, and the scores of a few groups."""
        config, groups = self._config, trained.groups
        with trained.console.bar("Held-out data", len(groups)) as bar:
            found = score_groups(
                trained.scorer,
                trained.weights,
                groups,
                plan_shapes(groups, trained.limit),
                on_batch=lambda positions, _: bar.advance(len(positions)),
                per_token=False,
            )
        compared = [_compare(group, config) for group in groups]
        scores = [np.stack(rows) for rows in found]
        report = evaluate_reward_model(groups, compared, scores)
        if report is None:
            return HeldOutReport({}, [], "! no held-out comparison is decided: nothing to report")
        facts: dict[str, Any] = report.as_json()
        text = "\n" + render_reward_report(report)
        if config.members > 1:
            facts["members"], line = _compare_members(groups, compared, scores, config)
            text += "\n" + line
        samples = [
            _sample(trained.folder, group, rows.mean(axis=1), config.sample_tokens)
            for group, rows in list(zip(groups, scores, strict=True))[: config.samples]
        ]
        return HeldOutReport(facts, samples, text)

    def next_command(self, folder: ModelFolder, run: Path, thinking: Thinking) -> str:
        """The command that scores completions with the result."""
        return f"mlx-align score {shlex.quote(str(run))}"


class GroupTotals(NamedTuple):
    """The denominator of an update: its groups, counted once per head that trains on them."""

    groups: mx.array


class RewardObjective(Objective):
    """The objective of comparisons.

    Args:
        model: The base model, with adapters and `config.members` heads.
        groups: The training groups, padded to the same number of completions.
        config: Hyperparameters of the loss, and the number of heads.
    """

    def __init__(
        self, model: LanguageModel, groups: Sequence[TokenizedGroup], config: RewardConfig
    ) -> None:
        super().__init__(groups)
        self._model, self._config = model, config
        self._compared = [_compare(group, config) for group in groups]
        self._member_mask = ensemble_mask(groups, config.members, config.seed)

    def collate(self, microbatch: Microbatch) -> RewardBatch:
        """Groups as arrays, with their comparisons."""
        members = list(microbatch.indices)
        return collate_rewards(
            [self.groups[i] for i in members],
            [self._compared[i] for i in members],
            self._member_mask[members],
            microbatch.shape,
        )

    def totals(self, batches: Sequence[RewardBatch]) -> GroupTotals:
        """The number of groups, counted per head; filler groups count 0."""
        return GroupTotals(mx.array(sum(batch.member_mask.sum() for batch in batches)))

    def loss(
        self, weights: AdapterWeights, batch: RewardBatch, totals: GroupTotals
    ) -> tuple[mx.array, MetricSums]:
        """Mean loss over the update's groups and heads: this microbatch's contribution."""
        config = self._config
        flat = self._model.scores(
            weights, batch.groups, grad_checkpoint=bool(config.grad_checkpoint)
        )
        scores = flat.reshape(batch.weight.shape[0], -1, config.members)
        loss = mx.array(0.0)
        for member in range(config.members):
            values = _loss(scores[:, :, member], batch.comparisons, config)
            loss = loss + weighted_sum(values, batch.member_mask[:, member])
        metrics = reward_metrics(scores.mean(axis=-1), batch.comparisons)
        return loss / totals.groups, weighted_metrics(metrics, batch.weight)


def _compare(group: TokenizedGroup, config: RewardConfig) -> GroupComparisons:
    return compare_completions(group, rating_margin=config.rating_margin, ties=config.ties)


def _loss(scores: mx.array, comparisons: Comparisons, config: RewardConfig) -> mx.array:
    return kwise_loss(
        scores,
        comparisons,
        center=config.center_rewards_coefficient,
        label_smoothing=config.label_smoothing,
    )


def reward_metrics(scores: mx.array, comparisons: Comparisons) -> dict[str, mx.array]:
    """Per-group metrics (B,), means over its comparisons, from scores (B, K).

    `rewards/chosen` and `rewards/rejected` are the scores of the better and the worse completion.
    An undecided comparison counts half in the accuracy, and so do equal scores.
    """
    weight = comparisons.weight / mx.maximum(comparisons.weight.sum(axis=1, keepdims=True), 1e-9)
    side = mx.sign(comparisons.probability - 0.5)
    delta = score_differences(scores, comparisons)
    first, second = (scores[:, mx.array(column)] for column in pair_indices(scores.shape[1]))
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
    scores: CompletionLogps, groups: Sequence[TokenizedGroup], config: RewardConfig
) -> dict[str, float]:
    """Loss and metrics, means over groups, of the heads' mean scores."""
    rows = np.array([[row.mean() for row in group] for group in scores], np.float32)
    compared = [_compare(group, config) for group in groups]
    columns = (np.stack(column) for column in zip(*compared, strict=True))
    comparisons = Comparisons(*(mx.array(column) for column in columns))
    values = {"loss": _loss(mx.array(rows), comparisons, config)}
    values.update(reward_metrics(mx.array(rows), comparisons))
    return held_out_means(values, groups)


def check_comparisons(data: TokenizedDataset, config: RewardConfig) -> list[str]:
    """Lines on ranked lists, soft labels and margins in the data.

    Raises:
        ConfigError: An option has no effect on this data.
    """
    groups = data.train
    lists = [group for group in groups if len(group.completions) > 2]
    tied = any(len(set(g.scores or ())) < len(g.completions) for g in lists)
    tied = tied or any(group.soft_label == 0.5 for group in groups)
    if config.ties != "skip" and not tied:
        raise ConfigError("--ties half: the data has no list with equal ratings; leave it out")
    if config.strength == "margin" and all(group.margin is None for group in groups):
        raise ConfigError("--strength margin: the data names no strength; leave it out")
    if config.rating_margin and all(group.scores is None for group in groups):
        raise ConfigError("--rating-margin: the data has no ratings; leave it out")
    prompts = len({group.prompt.tobytes() for group in groups})
    if config.members > prompts:
        raise ConfigError(
            f"--members {config.members}: each member leaves out a fold of the prompts, but there "
            f"are only {prompts}; give at most {prompts}"
        )
    lines = []
    if lists:
        longest = max(len(group.completions) for group in lists)
        lines.append(
            f"{len(lists):,} ranked lists of up to {longest} completions; all pairs of a list are "
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
        lines.append("! nothing is held out: the reward model's accuracy will not be known")
    return lines


def _compare_members(
    groups: Sequence[TokenizedGroup],
    compared: Sequence[GroupComparisons],
    scores: Sequence[np.ndarray],
    config: RewardConfig,
) -> tuple[dict[str, Any], str]:
    """The accuracy of each head, and the spread of their score differences."""
    single: list[RewardReport | None] = [
        evaluate_reward_model(groups, compared, [rows[:, m : m + 1] for rows in scores])
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

    turns = None if group.text is None else text_as_json(group.text)
    return {
        "source": group.source,
        "prompt": text(group.prompt[-limit:]),
        **({} if turns is None or isinstance(turns, str) else {"messages": turns}),
        "completions": [
            {"text": text(ids[:limit]), "score": float(score)}
            for ids, score in zip(group.completions, scores, strict=True)
            if len(ids)
        ],
    }
