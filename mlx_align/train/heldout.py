"""What a run looks at beside its training data: held-out metrics, answers, and the KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_align.config import TrainConfig
from mlx_align.data.batching import groups_per_batch
from mlx_align.data.shapes import BatchLimit, batch_limit, plan_shapes
from mlx_align.inference.score import Scorer, score_groups
from mlx_align.models.loading import ModelFolder
from mlx_align.models.roles import Tree
from mlx_align.rollout.sample import Samples, as_groups, sample
from mlx_align.train import runlog
from mlx_align.train.display import Display
from mlx_align.train.setup import Policy
from mlx_align.train.task import GroupLogps, Task
from mlx_align.types import TokenizedGroup


def held_out_groups(valid: Sequence[TokenizedGroup], config: TrainConfig) -> list[TokenizedGroup]:
    """The held-out groups an evaluation looks at: the same ones every time."""
    if config.val_batches == -1 or not valid:
        return list(valid)
    wanted = round(config.val_batches * groups_per_batch(valid, batch_limit(config)))
    order = np.random.default_rng(config.seed).permutation(len(valid))
    return [valid[i] for i in sorted(order[:wanted])]


class Evaluation:
    """Measures the policy on held-out groups, writes the metrics and says them.

    Attributes:
        best: The `step` and the `loss` of the lowest held-out loss after an update; None before.
    """

    def __init__(
        self,
        task: Task,
        limit: BatchLimit,
        scorer: Scorer,
        groups: Sequence[TokenizedGroup],
        reference: GroupLogps,
        run: Path,
        display: Display,
    ) -> None:
        self.task, self.scorer = task, scorer
        self.groups, self.reference = groups, reference
        self.run, self.display = run, display
        self.shapes = plan_shapes(groups, limit) if groups else []
        self.best: dict[str, float] | None = None

    def __call__(self, step: int, tree: Tree) -> bool:
        """Score the held-out groups under `tree` and record it, as `record` says."""
        if not self.groups:
            return False
        per_token = self.task.per_token
        found = score_groups(self.scorer, tree, self.groups, self.shapes, per_token=per_token)
        return self.record(step, found)

    def record(self, step: int, logps: GroupLogps) -> bool:
        """Write the metrics after update `step` that follow from the policy's log-probs.

        Whether their loss is the lowest so far.
        """
        if not self.groups:
            return False
        metrics = self.task.measure(logps, self.reference, self.groups)
        runlog.append_row(
            self.run, {"step": step, **{f"eval/{name}": v for name, v in metrics.items()}}
        )
        if step:
            self.display.note(f"  held-out after {step}: {runlog.say_metrics(metrics)}")
        lowest = math.inf if self.best is None else self.best["loss"]
        if not step or not metrics["loss"] < lowest:
            return False
        self.best = {"step": step, "loss": metrics["loss"]}
        return True


def answers(
    policy: Policy, tree: Tree, prompts: Sequence[TokenizedGroup], config: TrainConfig
) -> Samples:
    """What the role says to held-out prompts, greedily."""
    if not prompts:
        return Samples([], [])
    return sample(
        policy.model,
        tree,
        prompts,
        max_tokens=config.sample_tokens,
        temperature=0.0,
        seed=config.seed,
    )


def prompt_texts(folder: ModelFolder, groups: Sequence[TokenizedGroup]) -> list[str]:
    """The prompts as people read them, without special tokens."""
    decode = folder.tokenizer.decode
    return [decode(group.prompt.tolist(), skip_special_tokens=True) for group in groups]


def kl_from_reference(
    scorer: Scorer,
    policy: Policy,
    tree: Tree,
    prompts: Sequence[TokenizedGroup],
    config: TrainConfig,
    limit: BatchLimit,
) -> dict[str, float] | None:
    """KL(policy‖reference) in nats per sequence, with its standard error, from own samples.

    The k1 estimator on samples at temperature 1, cut at `sample_tokens`: unbiased for the
    distribution over such completions.
    """
    if not prompts:
        return None
    drawn = sample(
        policy.model,
        tree,
        prompts,
        max_tokens=config.sample_tokens,
        temperature=1.0,
        seed=config.seed + 1,
    )
    groups = as_groups(prompts, drawn)
    shapes = plan_shapes(groups, limit)
    ours = score_groups(scorer, tree, groups, shapes)
    theirs = score_groups(scorer, policy.start, groups, shapes)
    k1 = np.array([(o[0] - t[0]).sum(dtype=np.float64) for o, t in zip(ours, theirs, strict=True)])
    spread = float(k1.std(ddof=1) / math.sqrt(len(k1))) if len(k1) > 1 else float("nan")
    return {"mean": float(k1.mean()), "standard_error": spread, "samples": len(k1)}
