"""Time a policy update whose prompt runs once for all its completions.

Compares updates by GRPO's loss on a random Llama (34M parameters, vocabulary of 32,000) with LoRA
of rank 8: with shared prompts, and with every completion as a full row. The two alternate, because
the machine may be shared. The updated weights are compared too.

    python scripts/bench_policy.py
    python scripts/bench_policy.py --completions 16 --prompt 512 --tokens 32 --grad-checkpoint

On Linux, float32 is about 60 times faster with LD_PRELOAD set to libopenblas; on a busy machine,
set OPENBLAS_NUM_THREADS=1 to keep its threads from waiting for each other.
Exits with 1 if the ratio is below --least.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

# As in mlx_align/cli/main.py. mlx reads it on import.
os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1")

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_align.algorithms.policy_gradient import (
    PolicyObjective,
    split_microbatches,
)
from mlx_align.algorithms.update import Updater, make_optimizer
from mlx_align.config import GRPOConfig
from mlx_align.data.buckets import Shape
from mlx_align.losses.policy import POLICY_METHODS
from mlx_align.models.adapters import AdapterLayout
from mlx_align.models.loading import LanguageModel, open_model
from mlx_align.models.policy import make_policy
from mlx_align.models.weights import AdapterWeights
from mlx_align.rollout.collector import RolloutBatch
from mlx_align.rollout.reward_functions import combine
from mlx_align.rollout.sampler import Completions, Prompt
from mlx_align.system.memory_limit import MemoryLimit
from mlx_align.types import PromptGroup, TokenizedGroup

METHOD = POLICY_METHODS["grpo"]


def main() -> None:
    """Make the model, time both paths, and print; exit with 1 if sharing saves too little."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per completion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grad-checkpoint", action="store_true")
    parser.add_argument("--least", type=float, default=2.5, help="lowest ratio allowed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        maker = Path(__file__).parent / "bench" / "model.py"
        subprocess.run([sys.executable, str(maker), folder], check=True, capture_output=True)
        config = GRPOConfig(
            model=folder,
            group_size=arguments.completions,
            max_completion_length=arguments.tokens,
            grad_checkpoint=arguments.grad_checkpoint,
        )
        policy = make_policy(config, open_model(folder), AdapterLayout(rank=8))
    batch = random_batch(arguments, policy.model.folder.vocab_size)
    models = [replace(policy.model, shared=shared) for shared in (True, False)]
    with MemoryLimit() as memory:
        steps = [Step(model, policy.start, batch, config, arguments, memory) for model in models]
        gradients = [step() for step in steps]  # compiles
        for step in steps:
            step()
        seconds = np.array([[timed(step) for step in steps] for _ in range(arguments.rounds)])
    difference = max_difference(*gradients)
    ratio = float(np.median(seconds[:, 1] / seconds[:, 0]))
    print(
        f"G = {arguments.completions}, prompt {arguments.prompt}, completions {arguments.tokens}, "
        f"{'checkpointed, ' if arguments.grad_checkpoint else ''}{mx.default_device()}"
    )
    print(f"shared prompts {np.median(seconds[:, 0]):.2f} s, full rows", end=" ")
    print(f"{np.median(seconds[:, 1]):.2f} s: {ratio:.2f} times as fast (required:", end=" ")
    print(f"{arguments.least:g}); updated weights differ by {difference:.1e}")
    sys.exit(ratio < arguments.least)


class Step:
    """One update from the initial policy, always the same."""

    def __init__(
        self,
        model: LanguageModel,
        start: AdapterWeights,
        batch: RolloutBatch,
        config: GRPOConfig,
        arguments: argparse.Namespace,
        memory: MemoryLimit,
    ) -> None:
        self._start, self._batch = start, batch
        self._shape = Shape(arguments.prompt, arguments.tokens, 1)
        self._objective = PolicyObjective(model, METHOD, config)
        optimizer = make_optimizer(start, 0.0)
        self._updater = Updater(model, optimizer, self._objective.loss, 1.0, memory)

    def __call__(self) -> AdapterWeights:
        """The updated weights."""
        batch = self._batch
        micro = split_microbatches(batch.completions, [0], [self._shape], batch.collate)
        denominators = self._objective.denominators(batch, [0])
        return self._updater(self._start, micro, denominators, 1e-3).weights


def random_batch(arguments: argparse.Namespace, vocabulary: int) -> RolloutBatch:
    """One prompt with its completions, and random advantages."""
    random = np.random.default_rng(0)
    rows, width = arguments.completions, arguments.tokens

    def ids(count: int) -> np.ndarray:
        return random.integers(4, vocabulary, count).astype(np.int32)

    group = TokenizedGroup(ids(arguments.prompt), tuple(ids(width) for _ in range(rows)), "row 0")
    shape = (rows, width)
    old = random.normal(-9, 1, shape).astype(np.float32)
    completions = Completions(
        prompts=[Prompt(PromptGroup("", (), "row 0"), group)],
        groups=[group],
        texts=[""] * rows,
        finished=np.ones(rows, np.bool_),
        sampler_logps=old,
        mask=np.ones(shape, np.bool_),
    )
    advantages = np.repeat(random.normal(0, 1, (rows, 1)), width, axis=1).astype(np.float32)
    ones = np.ones(shape, np.float32)
    return RolloutBatch(
        completions=completions,
        rewards=combine(["reward"], advantages[:, :1].astype(np.float64), [1.0]),
        old_logps=old,
        reference_logps=old,
        entropies=ones,
        correction=ones,
        advantages=advantages,
        loss_mask=ones,
        sampler_gap=0.0,
        prompts_drawn=1,
    )


def timed(step: Step) -> float:
    """Seconds for one update."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def max_difference(ours: AdapterWeights, theirs: AdapterWeights) -> float:
    """Largest difference of the updated weights. Adam's first step is as long as the rate, 1e-3."""
    pairs = zip(tree_flatten(ours), tree_flatten(theirs), strict=True)
    return max(float(mx.abs(a - b).max()) for (_, a), (_, b) in pairs)


if __name__ == "__main__":
    main()
