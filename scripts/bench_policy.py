"""What an update of the policy costs when a prompt runs once for all its completions.

Times updates by GRPO's loss on a random Llama (34M parameters, 32,000 words) with LoRA of rank 8,
and beside them the same updates with every completion as a whole row; in turns, since machines
are shared. Loss and gradients are compared too.

    python scripts/bench_policy.py
    python scripts/bench_policy.py --completions 16 --prompt 512 --tokens 32 --grad-checkpoint

On Linux float32 is some 60 times faster with LD_PRELOAD naming libopenblas; on a busy machine
OPENBLAS_NUM_THREADS=1 keeps its threads from waiting for each other.
Ends with 1 if the ratio is below --least.
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

# As mlx_align/cli/main.py sets it: mlx reads it when it is imported.
os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1")

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_align.config import GrpoConfig
from mlx_align.data.shapes import Shape
from mlx_align.losses.policy import POLICY_METHODS
from mlx_align.models.adapters import AdapterLayout
from mlx_align.models.loading import LanguageModel, open_model
from mlx_align.models.roles import Tree
from mlx_align.rollout.experience import Prompt, Rollouts
from mlx_align.train.lessons import (
    Lesson,
    policy_batch,
    policy_denominators,
    policy_share,
    ready,
)
from mlx_align.train.loop import make_optimizer
from mlx_align.train.run_ahead import RunAhead
from mlx_align.train.setup import make_policy
from mlx_align.train.update import Updater
from mlx_align.types import PromptGroup, TokenizedGroup

METHOD = POLICY_METHODS["grpo"]


def main() -> None:
    """Make the model, time both ways, print; exit code 1 if sharing saves too little."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="of a completion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grad-checkpoint", action="store_true")
    parser.add_argument("--least", type=float, default=2.5, help="lowest ratio allowed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        maker = Path(__file__).parent / "bench" / "model.py"
        subprocess.run([sys.executable, str(maker), folder], check=True, capture_output=True)
        config = GrpoConfig(
            model=folder,
            group_size=arguments.completions,
            max_completion_length=arguments.tokens,
            grad_checkpoint=arguments.grad_checkpoint,
        )
        policy = make_policy(config, open_model(folder), AdapterLayout(rank=8))
    lesson = random_lesson(arguments, policy.model.folder.vocab_size)
    ways = [replace(policy.model, shared=shared) for shared in (True, False)]
    with RunAhead() as memory:
        steps = [Step(way, policy.start, lesson, config, arguments, memory) for way in ways]
        gradients = [step() for step in steps]  # compiles
        for step in steps:
            step()
        seconds = np.array([[timed(step) for step in steps] for _ in range(arguments.rounds)])
    apart = distance(*gradients)
    ratio = float(np.median(seconds[:, 1] / seconds[:, 0]))
    print(
        f"G = {arguments.completions}, prompt {arguments.prompt}, completions {arguments.tokens}, "
        f"{'checkpointed, ' if arguments.grad_checkpoint else ''}{mx.default_device()}"
    )
    print(f"shared prompts {np.median(seconds[:, 0]):.2f} s, whole rows", end=" ")
    print(f"{np.median(seconds[:, 1]):.2f} s: {ratio:.2f} times as fast (at least", end=" ")
    print(f"{arguments.least:g} wanted); updated weights {apart:.1e} apart")
    sys.exit(ratio < arguments.least)


class Step:
    """One update from where the policy starts, always the same."""

    def __init__(
        self,
        model: LanguageModel,
        start: Tree,
        lesson: Lesson,
        config: GrpoConfig,
        arguments: argparse.Namespace,
        memory: RunAhead,
    ) -> None:
        self._start, self._lesson, self._config = start, lesson, config
        self._shape = Shape(arguments.prompt, arguments.tokens, 1)
        loss = policy_share(model, METHOD, grad_checkpoint=config.grad_checkpoint)
        optimizer = make_optimizer(start, 0.0)
        self._update = Updater(model, optimizer, loss, 1.0, memory)

    def __call__(self) -> Tree:
        """The tree after it."""
        lesson = self._lesson
        micro = ready(lesson.rollouts, [0], [self._shape], lambda m: policy_batch(lesson, m))
        totals = policy_denominators(lesson, [0], METHOD, self._config)
        return self._update(self._start, micro, totals, 1e-3).tree


def random_lesson(arguments: argparse.Namespace, vocabulary: int) -> Lesson:
    """One prompt with its completions, and something to learn from each of their tokens."""
    random = np.random.default_rng(0)
    rows, width = arguments.completions, arguments.tokens

    def ids(count: int) -> np.ndarray:
        return random.integers(4, vocabulary, count).astype(np.int32)

    group = TokenizedGroup(ids(arguments.prompt), tuple(ids(width) for _ in range(rows)), "row 0")
    shape = (rows, width)
    old = random.normal(-9, 1, shape).astype(np.float32)
    rollouts = Rollouts(
        prompts=[Prompt(PromptGroup("", (), "row 0"), group)],
        groups=[group],
        texts=[""] * rows,
        ended=np.ones(rows, np.bool_),
        sampler_logps=old,
        mask=np.ones(shape, np.bool_),
    )
    advantages = np.repeat(random.normal(0, 1, (rows, 1)), width, axis=1).astype(np.float32)
    ones = np.ones(shape, np.float32)
    return Lesson(rollouts, old, old, advantages, ones, ones, ones)


def timed(step: Step) -> float:
    """Seconds of an update."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def distance(ours: Tree, theirs: Tree) -> float:
    """Largest difference of updated weights; Adam's first step has the size of the rate."""
    pairs = zip(tree_flatten(ours), tree_flatten(theirs), strict=True)
    return max(float(mx.abs(a - b).max()) for (_, a), (_, b) in pairs)


if __name__ == "__main__":
    main()
