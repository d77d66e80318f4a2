"""The interfaces that training algorithms implement.

`Algorithm` trains on given completions (DPO, KTO, SFT, reward modeling): it reads data and makes an
`Objective`, which turns microbatches into loss contributions. `OnPolicyAlgorithm` trains on
completions that the policy samples itself (PPO, GRPO, online DPO): it gets one rollout batch after
the other. `training/` runs both in one loop.
"""

from __future__ import annotations

import copy
import math
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from mlx_align.config import TrainConfig
from mlx_align.data.batching import Microbatch, prompt_numbers
from mlx_align.data.buckets import BatchLimit
from mlx_align.data.chat_template import Thinking
from mlx_align.data.formats import ReadReport
from mlx_align.data.readers import Data
from mlx_align.data.statistics import TokenizedDataset
from mlx_align.evaluation.statistics import standard_error
from mlx_align.inference.scoring import Scorer, make_logprob_scorer
from mlx_align.losses.masking import weighted_sum
from mlx_align.models.loading import LanguageModel, ModelFolder
from mlx_align.models.policy import Policy
from mlx_align.models.weights import AdapterWeights
from mlx_align.system.intervals import RATES
from mlx_align.system.progress import Console
from mlx_align.types import Logps, PromptGroup, TokenizedGroup

# Training on given completions runs without this part of the package.
if TYPE_CHECKING:
    from mlx_align.rollout.collector import RolloutBatch, RolloutCollector

# Sums of metrics over the rows of a microbatch. `weight` is the sum of the rows' weights; the other
# entries divided by it are means.
MetricSums = dict[str, mx.array]
# (weights, batch, totals) -> (loss contribution, metric sums). The contributions of an update's
# microbatches add up to the loss of one large batch.
Loss = Callable[[AdapterWeights, Any, Any], tuple[mx.array, MetricSums]]
# Per group and completion, the log-prob of each token, in nats. (Reward models: scores.)
CompletionLogps = Sequence[tuple[Logps, ...]]


class Objective(ABC):
    """The loss of a run, computed from microbatches of its training groups.

    An update calls `collate` for each microbatch, then `totals`, then `prepare`, and then
    differentiates `loss` for one microbatch after the other.

    Attributes:
        groups: The training groups; microbatches hold indices into them.
    """

    def __init__(self, groups: Sequence[TokenizedGroup]) -> None:
        self.groups = groups

    @abstractmethod
    def collate(self, microbatch: Microbatch) -> Any:
        """The arrays of a microbatch: a NamedTuple, which `mx.compile` accepts."""

    @abstractmethod
    def totals(self, batches: Sequence[Any]) -> Any:
        """The denominators of an update, from all its microbatches (pairs, tokens …)."""

    @abstractmethod
    def loss(self, weights: AdapterWeights, batch: Any, totals: Any) -> tuple[mx.array, MetricSums]:
        """A microbatch's contribution to the loss of the update, and its metric sums.

        Differentiated with respect to `weights` and compiled once per shape.
        """

    def prepare(self, weights: AdapterWeights, batches: Sequence[Any], totals: Any) -> list[Any]:
        """The batches, completed by what depends on the whole update.

        Overridden for losses whose value for one pair depends on the update's other pairs.
        """
        return list(batches)

    def size(self, microbatch: Microbatch) -> tuple[int, int]:
        """The number of groups in a microbatch, and of tokens without padding."""
        return count_tokens(self.groups, microbatch)

    def sources(self, microbatch: Microbatch) -> list[str]:
        """`file:line` of each row of a microbatch, for error messages."""
        return [self.groups[i].source for i in microbatch.indices]


class TrainedPolicy(NamedTuple):
    """What a report on held-out data is made of.

    Attributes:
        scorer: Runs the groups.
        start: The weights before training.
        weights: The weights that are kept.
        folder: The base model.
        groups: All held-out groups, or those of evaluations (`Algorithm.reports_all`).
        limit: The limit of batches.
        console: Shows progress.
    """

    scorer: Scorer
    start: AdapterWeights
    weights: AdapterWeights
    folder: ModelFolder
    groups: Sequence[TokenizedGroup]
    limit: BatchLimit
    console: Console


class HeldOutReport(NamedTuple):
    """A report on all held-out data at the end of a run.

    Attributes:
        facts: The entry `held_out` of summary.json.
        samples: Rows of samples.jsonl; None for those of the run.
        text: Text for the terminal; may be empty.
    """

    facts: dict[str, Any]
    samples: list[dict[str, Any]] | None
    text: str


class Algorithm(ABC):
    """A method that trains on given completions.

    Attributes:
        command: Name of its command.
        title: Label of the progress bar.
        unit: The name of groups in summary.json (pairs, rows, groups).
        needs_reference: Whether training needs the reference's log-probs.
        has_reference: Whether held-out data is measured relative to the reference, and the KL from
            it is estimated at the end.
        packs: Whether the completions of a microbatch run together, so that they can be packed.
        per_token: Whether scorers give a number per token (log-probs), or per completion.
        samples_answers: Whether held-out prompts are completed before and after training.
        reports_all: Whether the report at the end is on all held-out data, however much it is.
    """

    command: ClassVar[str]
    unit: ClassVar[str] = "pairs"
    has_reference: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    samples_answers: ClassVar[bool] = True
    reports_all: ClassVar[bool] = False
    title: str
    needs_reference: bool = False
    _config: Any

    def with_options(self, config: TrainConfig) -> Self:
        """The same algorithm with the options of a run in which every default is chosen."""
        resolved = copy.copy(self)
        resolved._config = config
        return resolved

    @abstractmethod
    def read(
        self, data: Data, split: str, format: str | None
    ) -> tuple[list[PromptGroup], ReadReport]:
        """Read a split of the data; the groups, and how they were read.

        Raises:
            DataError: The data can't be used; the message names file and line.
        """

    @abstractmethod
    def objective(
        self,
        policy: Policy,
        groups: Sequence[TokenizedGroup],
        reference: CompletionLogps | None,
        scorer: Scorer,
    ) -> Objective:
        """The objective of training on `groups`.

        Args:
            policy: The base model with adapters.
            groups: The training groups, as `arrange` returned them.
            reference: Token log-probs of the reference; None if `needs_reference` is false.
            scorer: For objectives that run completions without a gradient first.
        """

    @abstractmethod
    def evaluate(
        self,
        logps: CompletionLogps,
        reference: CompletionLogps,
        groups: Sequence[TokenizedGroup],
    ) -> dict[str, float]:
        """Held-out metrics, with `loss` among them, and their deviations (`held_out_means`).

        Args:
            logps: The policy's log-probs, or a reward model's scores, from `make_scorer`.
            reference: The reference's log-probs; empty if `has_reference` is false.
            groups: The held-out groups.
        """

    def check(self, data: TokenizedDataset) -> list[str]:
        """Check the data before the model is loaded; returns lines to show.

        Raises:
            MlxAlignError: The data doesn't fit the options.
        """
        return []

    def arrange(self, groups: Sequence[TokenizedGroup]) -> list[TokenizedGroup]:
        """The groups to batch, made from the tokenised ones."""
        return list(groups)

    def report(self, row: dict[str, float]) -> dict[str, float]:
        """A row of metrics.jsonl, from means over the updates of a report."""
        return row

    def make_scorer(self, model: LanguageModel) -> Scorer:
        """A compiled forward pass for held-out data and the reference."""
        return make_logprob_scorer(model)

    def report_held_out(self, trained: TrainedPolicy) -> HeldOutReport | None:
        """A report on held-out data at the end of the run; None without one."""
        return None

    def next_command(self, folder: ModelFolder, run: Path, thinking: Thinking) -> str:
        """The command to try the result with, with thinking as in training."""
        return chat_command(folder, run, thinking)


class UpdateResult(NamedTuple):
    """The result of the updates on one rollout batch.

    Attributes:
        metrics: Metrics for the report.
        first_ratio_deviation: Mean |ratio − 1| of new to old policy in the first update; None if
            no update of the policy was made. It must be 0 up to rounding.
        skipped: One reason per update that was skipped.
    """

    metrics: dict[str, float]
    first_ratio_deviation: float | None
    skipped: Sequence[str] = ()


class OnPolicyAlgorithm(Protocol):
    """A method that trains on completions sampled from the policy.

    Attributes:
        title: Label of the progress bar.
        dynamic_sampling: Whether prompts whose completions all get the same reward are replaced.
        weights: The trained weights, by name; `policy` comes first.
        optimizers: The optimizers, by name.
    """

    title: str
    dynamic_sampling: bool
    weights: dict[str, AdapterWeights]
    optimizers: dict[str, optim.Optimizer]

    def prepare(self, console: Console) -> str:
        """Called before the first rollout batch of a new run; returns a line to show, or ""."""

    def update(self, batch: RolloutBatch, step: int, learning_rate: float) -> UpdateResult:
        """Make the updates of rollout batch `step` (counted from 0)."""

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint besides weights and optimizers, JSON-serialisable."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state` returned."""


@dataclass(frozen=True)
class OnPolicyMethod:
    """An on-policy method before its policy is loaded.

    Attributes:
        command: Name of its command.
        make: (config, collector) -> algorithm.
    """

    command: str
    make: Callable[[Any, RolloutCollector], OnPolicyAlgorithm]


def held_out_means(
    rows: Mapping[str, Any], groups: Sequence[TokenizedGroup] = ()
) -> dict[str, float]:
    """Means of held-out metrics, and the standard deviation of each that is not a rate.

    If several groups have the same prompt, as the pairs of a ranked list do, their values are not
    independent. Then the deviation is the standard error over prompts times √n, rates have one too,
    and `prompts` is their number.

    Args:
        rows: Per metric an array with a value per example.
        groups: The examples; () if each has its own prompt.

    Returns:
        `<name>` and `<name>_std`, for `system.intervals.metric_interval`.
    """
    prompt = prompt_numbers(groups)
    prompts = len(set(prompt.tolist()))
    clustered = prompts < len(groups)
    found: dict[str, float] = {}
    for name, column in rows.items():
        values = np.array(column)
        found[name] = float(values.mean())
        if clustered:
            error = standard_error(values.astype(np.float64), prompt)
            if error is not None:
                found[f"{name}_std"] = error * math.sqrt(values.size)
        elif name not in RATES and values.size > 1:
            found[f"{name}_std"] = float(values.std(ddof=1, dtype=np.float64))
    return {**found, "prompts": float(prompts)} if clustered else found


def weighted_metrics(metrics: Mapping[str, mx.array], weight: mx.array) -> MetricSums:
    """Weighted sums of per-row metrics (B,), and the sum of the weights (B,)."""
    sums = {name: weighted_sum(mx.stop_gradient(v), weight) for name, v in metrics.items()}
    return {**sums, "weight": weight.sum()}


def count_tokens(
    groups: Sequence[TokenizedGroup], microbatch: Microbatch, completions: int | None = None
) -> tuple[int, int]:
    """Groups of a microbatch and their tokens, without padding.

    Args:
        groups: The groups that the microbatch's indices refer to.
        microbatch: The microbatch.
        completions: Count only this many completions of each group; None for all.
    """
    members = [groups[i] for i in microbatch.indices]
    tokens = sum(len(g.prompt) + sum(map(len, g.completions[:completions])) for g in members)
    return len(members), tokens


def chat_command(folder: ModelFolder, run: Path, thinking: Thinking) -> str:
    """The command to try the trained policy with in stock mlx-lm, with thinking as in training.

    `mlx_lm.chat` has no option for the chat template, so without thinking it is `mlx_lm.generate`.
    """
    where = f"--model {shlex.quote(folder.name)} --adapter-path {shlex.quote(str(run))}"
    if not folder.tokenizer.has_chat_template:
        return f"mlx_lm.generate {where} --prompt 'Once upon a time'"
    if thinking == "off":
        switch = """--chat-template-config '{"enable_thinking": false}'"""
        return f"mlx_lm.generate {where} {switch} --prompt 'Hello'"
    return f"mlx_lm.chat {where}"
