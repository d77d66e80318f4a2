"""Train on data of realistic lengths and record shapes, padding and memory.

The steps are those of `mlx-align dpo`: the same batches, objective and loop, on pairs that fit
--max-seq-length (any number of longer ones is left out). A compiled shape is never evicted, so
memory may grow until every shape of the run has occurred, but not after that.

    python scripts/verify_lengths.py --model stories260K --data hh-helpful --max-seq-length 512
    python scripts/verify_lengths.py … --batch-tokens 2048 --steps 1000

A step is an update of one microbatch, unless --grad-accumulation-steps is given. Every 50 steps, a
line shows the shapes and the padding so far, the minimum memory in use after one of these steps,
and the peak memory so far, as reported by mlx.

The exit code is 1 if

- after every shape has occurred, the memory in use grows by more than 1%, or the peak by more than
  mlx may schedule ahead;
- there are more than 12 shapes;
- more than --max-padding of the tokens are padding. If rows are padded (--batch-size, or a family
  that can't be packed), the two completions of a pair run side by side and differ in length, so
  some padding is unavoidable; it is printed as well.

On Linux, float32 is about 60 times faster with LD_PRELOAD set to libopenblas.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The package comes first: it sets how mlx orders evaluation, which mlx reads only once.

# isort: split
import mlx.core as mx
import numpy as np

from mlx_align.algorithms.dpo import DPO, read_pairs
from mlx_align.algorithms.update import make_optimizer, make_schedule
from mlx_align.config import DPOConfig
from mlx_align.config.schema import make_config
from mlx_align.data.batching import microbatch_stream, padding_fraction
from mlx_align.data.buckets import (
    MAX_SHAPES,
    AnyShape,
    batch_limit,
    group_lengths,
    plan_shapes,
)
from mlx_align.data.chat_template import inspect_chat_template
from mlx_align.data.tokenization import try_tokenize_group
from mlx_align.inference.scoring import make_logprob_scorer
from mlx_align.models.loading import ModelFolder, open_model
from mlx_align.models.policy import make_policy
from mlx_align.system.memory_limit import headroom_bytes
from mlx_align.training.defaults import resolve_offline
from mlx_align.training.metrics import Progress
from mlx_align.training.offline import OfflineTrainer
from mlx_align.training.setup import resolve_layout
from mlx_align.types import TokenizedGroup

# Allowed growth of memory after all shapes have occurred: allocators round, and free late.
TOLERANCE = 0.01
EVERY = 50
# Allowed fraction of padding, for padded rows and for packed rows.
MAX_PADDING = 0.40
MAX_PADDING_PACKED = 0.15


class Line(NamedTuple):
    """The state after some steps: steps, shapes, padding, bytes in use, peak bytes."""

    step: int
    shapes: int
    padding: float
    active: int
    peak: int


@dataclass(frozen=True)
class Measurements:
    """The measurements of a run.

    Attributes:
        lines: The printed lines.
        planned: The shapes planned for the data.
        used: Number of shapes that the run's batches have.
        unavoidable: Fraction of padding if each pair had its own shape.
    """

    lines: list[Line]
    planned: list[AnyShape]
    used: int
    unavoidable: float


def fitting_pairs(folder: ModelFolder, data: str, max_seq_length: int) -> list[TokenizedGroup]:
    """The tokenised pairs of `data` that fit `max_seq_length`."""
    groups, template = [], inspect_chat_template(folder.tokenizer)
    for group in read_pairs(data, "train", None)[0]:
        result = try_tokenize_group(group, template, max_seq_length=max_seq_length)
        if result.group is not None:
            groups.append(result.group)
    return groups


def measure(
    config: DPOConfig, groups: Sequence[TokenizedGroup], steps: int, every: int = EVERY
) -> Measurements:
    """Train for `steps` updates on `groups` and measure."""
    assert config.model is not None
    layout = resolve_layout(config)
    config, _ = resolve_offline(config, layout, groups, valid=0)
    assert config.learning_rate is not None
    policy = make_policy(config, open_model(config.model), layout)
    shapes = plan_shapes(groups, batch_limit(config, packs=policy.model.packs))
    stream = microbatch_stream(groups, shapes, seed=config.seed)
    batches = list(islice(stream, steps * config.accumulation))
    # Reference log-probs change neither shapes nor memory.
    zeros = [tuple(np.zeros(len(c), np.float32) for c in group.completions) for group in groups]
    objective = DPO(config).objective(policy, groups, zeros, make_logprob_scorer(policy.model))
    lines: list[Line] = []

    # At the end of a step its batch is still in memory. The minimum over many steps excludes most
    # of that.
    active: list[int] = []
    rate = make_schedule(config.lr_schedule, config.learning_rate, steps, config.warmup)
    trainer = OfflineTrainer(
        policy.model,
        objective,
        lambda start: iter(batches[start:]),
        policy.start,
        make_optimizer(policy.start, config.weight_decay),
        accumulation=config.accumulation,
        max_grad_norm=1.0,
    )
    progress = Progress()
    mx.reset_peak_memory()
    with trainer.memory:
        for step in range(steps):
            progress.add(trainer.step(progress, rate(step)))
            active.append(mx.get_active_memory())
            if progress.step % every:
                continue
            done = batches[: progress.microbatches]
            lines.append(
                Line(
                    progress.step,
                    len({batch.shape for batch in done}),
                    padding_fraction(done, groups),
                    min(active),
                    trainer.memory.peak_bytes,
                )
            )
            active.clear()
            print(format_line(lines[-1]), flush=True)
    return Measurements(lines, shapes, len({batch.shape for batch in batches}), unavoidable(groups))


def unavoidable(groups: Sequence[TokenizedGroup]) -> float:
    """Fraction of padding if each group had a shape of exactly its own widths."""
    real = sum(len(group.prompt) + sum(map(len, group.completions)) for group in groups)
    rows = len(groups[0].completions)
    return 1 - real / sum(p + rows * c for p, c in map(group_lengths, groups))


def violations(found: Measurements, max_padding: float, tolerance: float = TOLERANCE) -> list[str]:
    """The limits that were exceeded, one sentence each."""
    exceeded = []
    if len(found.planned) > MAX_SHAPES:
        exceeded.append(f"{len(found.planned)} shapes, {MAX_SHAPES} allowed")
    if found.lines[-1].padding > max_padding:
        exceeded.append(f"{found.lines[-1].padding:.1%} padding, {max_padding:.1%} allowed")
    after = [line for line in found.lines if line.shapes == found.used]
    if len(after) < 2:
        return [
            *exceeded,
            "the last shape occurred too late to measure memory after it: more --steps",
        ]
    for name in ("active", "peak"):
        first, most = getattr(after[0], name), max(getattr(line, name) for line in after)
        # How far mlx schedules ahead varies between steps, up to this limit.
        allowed = first * (1 + tolerance) if name == "active" else first + headroom_bytes(first)
        if most > allowed:
            exceeded.append(f"{name} memory grew from {first:,} to {most:,} bytes")
    return exceeded


def format_line(line: Line) -> str:
    """Format a line of the table."""
    return (
        f"{line.step:>6}{line.shapes:>8}{line.padding:>10.1%}"
        f"{line.active / 1e6:>11.2f}{line.peak / 1e6:>11.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--max-seq-length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--grad-accumulation-steps", type=int, default=1)
    parser.add_argument(
        "--max-padding", type=float, help="[default: 0.15 with --batch-tokens, else 0.40]"
    )
    arguments = vars(parser.parse_args())
    steps, max_padding = arguments.pop("steps"), arguments.pop("max_padding")
    if max_padding is None:
        max_padding = MAX_PADDING if arguments["batch_tokens"] is None else MAX_PADDING_PACKED
    config = make_config(DPOConfig, {k: v for k, v in arguments.items() if v is not None})
    assert config.model is not None
    assert config.data is not None
    groups = fitting_pairs(open_model(config.model), config.data, config.max_seq_length)
    print(f"{len(groups):,} pairs of at most {config.max_seq_length} tokens")
    print(f"{'step':>6}{'shapes':>8}{'padding':>10}{'active MB':>11}{'peak MB':>11}")
    found = measure(config, groups, steps)
    print("\nprompt, completion, prompts of a batch (of packed rows, at most):")
    print(", ".join(f"{shape.prompt}+{shape.completion}x{shape.groups}" for shape in found.planned))
    print(
        f"Padding: {found.lines[-1].padding:.1%}; if each pair were padded to its own shape: "
        f"{found.unavoidable:.1%}."
    )
    for violation in (exceeded := violations(found, max_padding)):
        print(f"FAIL: {violation}")
    sys.exit(bool(exceeded))


if __name__ == "__main__":
    main()
