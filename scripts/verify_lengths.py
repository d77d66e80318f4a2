"""Train on data of real lengths and watch shapes, padding and memory; print them as the run goes.

The steps are those of `mlx-align dpo`: its batches, objective and loop, on pairs that fit
--max-seq-length (longer ones are left out here, however many they are). A shape that was compiled
is never forgotten, so memory may grow until every shape of the run has been seen, and not after.

    python scripts/verify_lengths.py --model stories260K --data hh-helpful --max-seq-length 512
    python scripts/verify_lengths.py … --batch-tokens 2048 --steps 1000

A step is an update of one microbatch, unless --grad-accumulation-steps says otherwise. Every 50
steps: shapes seen so far, padding so far, the least memory in use after one of these steps, and the
peak so far, as mlx counts them. Ends with 1 if, from the first line after every shape was seen on,
the memory in use grows by more than 1%, or the peak by more than mlx may run ahead; if there are
more than 12 shapes; or if more than --max-padding of the tokens are padding. Where rows are padded
(--batch-size, or a family that can't be packed), some is padding in any shape, because the answers
of a pair differ in length and run beside each other: no limit below that, which is printed too, can
be kept.

On Linux float32 is some 60 times faster with LD_PRELOAD naming libopenblas.
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

# The command itself comes first: it tells mlx how to order evaluation, which mlx reads once.

# isort: split
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

from mlx_align.config import DpoConfig  # noqa: E402
from mlx_align.data.batching import microbatch_stream, padding_fraction
from mlx_align.data.buckets import MAX_SHAPES, AnyShape, batch_limit, group_lengths, plan_shapes
from mlx_align.data.chat_template import inspect_chat_template  # noqa: E402
from mlx_align.data.tokenization import try_tokenize_group  # noqa: E402
from mlx_align.inference.score import make_scorer  # noqa: E402
from mlx_align.models.loading import ModelFolder, open_model  # noqa: E402
from mlx_align.settings import resolve  # noqa: E402
from mlx_align.system.memory_limit import headroom_bytes  # noqa: E402
from mlx_align.train.loop import (  # noqa: E402
    LoopHooks,
    LoopSettings,
    Progress,
    make_optimizer,
    make_schedule,
    train,
)
from mlx_align.train.preference import dpo_task, read_pairs  # noqa: E402
from mlx_align.train.setup import make_policy, resolve_layout  # noqa: E402
from mlx_align.types import TokenizedGroup  # noqa: E402

# What memory may grow by once all shapes were seen: allocators round, and free late.
TOLERANCE = 0.01
EVERY = 50
# Shares of padding allowed: of rows padded to one length, and of packed ones.
MAX_PADDING = 0.40
MAX_PADDING_PACKED = 0.15


class Line(NamedTuple):
    """Where a run stands: steps done, shapes seen, bytes in use after steps and at the peak."""

    step: int
    shapes: int
    padding: float
    active: int
    peak: int


@dataclass(frozen=True)
class Watched:
    """What a run showed.

    Attributes:
        lines: One every so many steps.
        planned: Shapes the data was given.
        used: Those among them that the run's batches have.
        unavoidable: Share of the tokens that would be padding if each pair had a shape of its own.
    """

    lines: list[Line]
    planned: list[AnyShape]
    used: int
    unavoidable: float


def fitting_pairs(folder: ModelFolder, data: str, max_seq_length: int) -> list[TokenizedGroup]:
    """The pairs of `data` that are not too long, tokenised."""
    groups, style = [], inspect_chat_template(folder.tokenizer)
    for group in read_pairs(data, "train", None)[0]:
        result = try_tokenize_group(group, style, max_seq_length=max_seq_length)
        if result.group is not None:
            groups.append(result.group)
    return groups


def watch(
    config: DpoConfig, groups: Sequence[TokenizedGroup], steps: int, every: int = EVERY
) -> Watched:
    """Train `steps` updates on `groups`."""
    assert config.model is not None
    policy = make_policy(config, open_model(config.model), resolve_layout(config))
    shapes = plan_shapes(groups, batch_limit(config, packs=policy.model.packs))
    stream = microbatch_stream(groups, shapes, seed=config.seed)
    batches = list(islice(stream, steps * config.grad_accumulation_steps))
    # What the reference says changes no shape and no byte.
    zeros = [tuple(np.zeros(len(c), np.float32) for c in group.completions) for group in groups]
    objective = dpo_task(config).objective(policy, groups, zeros, make_scorer(policy.model))
    lines: list[Line] = []

    # A step's own batch is still held when it ends: the least of many steps is without it, nearly.
    active: list[int] = []

    def tick(_: Progress) -> None:
        active.append(mx.get_active_memory())

    def report(progress: Progress, row: dict[str, float]) -> None:
        if progress.step % every:
            return
        done = batches[: progress.microbatches]
        lines.append(
            Line(
                progress.step,
                len({batch.shape for batch in done}),
                padding_fraction(done, groups),
                min(active),
                int(row["peak_memory_bytes"]),
            )
        )
        active.clear()
        print(say(lines[-1]), flush=True)

    rate = make_schedule(config.lr_schedule, config.learning_rate, steps, config.warmup)
    settings = LoopSettings(steps, config.grad_accumulation_steps, rate, 1.0, every, 0, 0)
    hooks = LoopHooks(report, lambda *_: False, lambda *_: None, tick)
    optimizer = make_optimizer(policy.start, config.weight_decay)
    mx.reset_peak_memory()
    train(
        policy.model, policy.start, optimizer, objective, iter(batches), settings, hooks, Progress()
    )
    return Watched(lines, shapes, len({batch.shape for batch in batches}), unavoidable(groups))


def unavoidable(groups: Sequence[TokenizedGroup]) -> float:
    """Share of padding if each group had a shape of exactly its widths."""
    real = sum(len(group.prompt) + sum(map(len, group.completions)) for group in groups)
    rows = len(groups[0].completions)
    return 1 - real / sum(p + rows * c for p, c in map(group_lengths, groups))


def faults(found: Watched, max_padding: float, tolerance: float = TOLERANCE) -> list[str]:
    """What exceeds its limit, a sentence each."""
    said = []
    if len(found.planned) > MAX_SHAPES:
        said.append(f"{len(found.planned)} shapes, {MAX_SHAPES} allowed")
    if found.lines[-1].padding > max_padding:
        said.append(f"{found.lines[-1].padding:.1%} padding, {max_padding:.1%} allowed")
    after = [line for line in found.lines if line.shapes == found.used]
    if len(after) < 2:
        return [*said, "the last shape came too late to see memory after it: more --steps"]
    for name in ("active", "peak"):
        first, most = getattr(after[0], name), max(getattr(line, name) for line in after)
        # Below its bound, how far mlx runs ahead is chance.
        allowed = first * (1 + tolerance) if name == "active" else first + headroom_bytes(first)
        if most > allowed:
            said.append(f"{name} memory grew from {first:,} to {most:,} bytes")
    return said


def say(line: Line) -> str:
    """A line as a person reads it."""
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
    config = resolve(DpoConfig, {k: v for k, v in arguments.items() if v is not None})
    assert config.model is not None
    assert config.data is not None
    groups = fitting_pairs(open_model(config.model), config.data, config.max_seq_length)
    print(f"{len(groups):,} pairs of at most {config.max_seq_length} tokens")
    print(f"{'step':>6}{'shapes':>8}{'padding':>10}{'active MB':>11}{'peak MB':>11}")
    found = watch(config, groups, steps)
    print("\nprompt, completion, prompts of a batch (of packed rows, at most):")
    print(", ".join(f"{shape.prompt}+{shape.completion}x{shape.groups}" for shape in found.planned))
    print(
        f"Padding: {found.lines[-1].padding:.1%}; pairs padded, each in a shape of its own, "
        f"{found.unavoidable:.1%}."
    )
    for fault in (found_faults := faults(found, max_padding)):
        print(f"FAIL: {fault}")
    sys.exit(bool(found_faults))


if __name__ == "__main__":
    main()
