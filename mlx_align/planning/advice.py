"""Options that make a run fit the available memory, cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from mlx_align.data.buckets import AnyShape, BatchLimit, PackedShape
from mlx_align.planning.memory import Workload, plan_memory
from mlx_align.planning.model_shape import ModelShape

# Fractions of --max-seq-length that are tried, and the shortest length worth training on, tokens.
LENGTH_FRACTIONS = (0.75, 0.5, 0.25, 0.125)
MIN_LENGTH = 64
RANKS = (8, 4)
# Divisors of --batch-tokens that are tried.
BATCH_DIVISORS = (2, 4, 8, 16)
LAYER_FRACTIONS = (0.5, 0.25)
BITS = (8, 4, 3)
# Bits per weight for the scale and the bias, of 16 bits each, of a group of 64 quantised weights.
GROUP_OVERHEAD_BITS = 32 / 64
# Changes that save less than this fraction of the peak are not suggested.
MIN_SAVING = 0.01
# The shortest completions worth sampling, tokens.
MIN_SAMPLED_LENGTH = 16

# (length, limit) -> the batch shapes of all rows of at most `length` tokens; for an on-policy run,
# the shapes of rollouts with completions of at most `length` tokens.
ShapesWithin = Callable[[int, BatchLimit], Sequence[AnyShape]]


@dataclass(frozen=True)
class Suggestion:
    """One change of options, applied after the suggestions before it.

    Attributes:
        options: The options to add.
        cost: The cost of the change, in words.
        peak_bytes: Peak memory with this and all earlier suggestions.
        fits: Whether that fits.
    """

    options: str
    cost: str
    peak_bytes: int
    fits: bool


class Change(NamedTuple):
    """A change of options, and the model and workload that result from it."""

    options: str
    cost: str
    model: ModelShape
    workload: Workload


def advise(
    model: ModelShape,
    workload: Workload,
    max_seq_length: int | None,
    shapes_within: ShapesWithin,
    available_bytes: int,
) -> list[Suggestion]:
    """The cheapest changes that together make a run fit.

    Changes that would save almost nothing are left out. If all changes together are not enough,
    all are returned, and the last one does not fit.

    Args:
        model: Sizes of the model.
        workload: The computation of the run.
        max_seq_length: The limit on the length of rows, tokens; None if it has no effect (an
            on-policy run with --max-prompt-length).
        shapes_within: Batch shapes under a smaller limit.
        available_bytes: Memory the run may use.

    Returns:
        The suggestions in order; empty if the run fits as it is.
    """
    lengths: dict[str, Any] = {"max_seq_length": max_seq_length, "shapes_within": shapes_within}
    changes: list[Callable[[ModelShape, Workload], Iterator[Change]]] = [
        _use_lora,
        _use_checkpointing,
        _reduce_batch,
        _reduce_group_size,
        partial(_shorten_rows, **lengths),
        partial(_shorten_completions, **lengths),
        _lower_rank,
        _train_fewer_layers,
        _quantise,
    ]
    if workload.fine_tune_type == "full":
        # If LoRA is suggested, its rank stays at the default.
        changes.remove(_lower_rank)
    suggestions: list[Suggestion] = []
    before = plan_memory(model, workload)
    for proposals in changes:
        best: tuple[Change, Suggestion] | None = None
        smallest = before
        for change in proposals(model, workload):
            if before.peak_bytes <= available_bytes:
                return suggestions
            after = plan_memory(change.model, change.workload)
            # Compared without headroom, most of which is the same for all small runs.
            if after.needed_bytes > smallest.needed_bytes * (1 - MIN_SAVING):
                continue
            fits = after.peak_bytes <= available_bytes
            smallest = after
            best = change, Suggestion(change.options, change.cost, after.peak_bytes, fits)
            if fits:
                break
        if best is not None:
            before = smallest
            model, workload = best[0].model, best[0].workload
            suggestions.append(best[1])
    return suggestions


def _use_lora(model: ModelShape, workload: Workload) -> Iterator[Change]:
    if workload.fine_tune_type != "lora":
        full = workload.fine_tune_type == "full"
        cost = "adapters instead of all weights" if full else "a different kind of adapter"
        yield Change("--fine-tune-type lora", cost, model, replace(workload, fine_tune_type="lora"))


def _use_checkpointing(model: ModelShape, workload: Workload) -> Iterator[Change]:
    if not workload.grad_checkpoint:
        changed = replace(workload, grad_checkpoint=True)
        yield Change("--grad-checkpoint", "a third slower", model, changed)


def _reduce_batch(model: ModelShape, workload: Workload) -> Iterator[Change]:
    tokens, largest = workload.limit.tokens, max(shape.groups for shape in workload.shapes)
    if largest == 1:
        return
    if tokens is None:
        accumulation = workload.limit.groups * workload.accumulation
        yield Change(
            f"--batch-size 1 --grad-accumulation-steps {accumulation}",
            "the same update, a little slower",
            model,
            _divide_batch(workload, largest, BatchLimit(), accumulation),
        )
        return
    for divisor in BATCH_DIVISORS:
        accumulation = divisor * workload.accumulation
        limit = BatchLimit(tokens=max(1, tokens // divisor))
        yield Change(
            f"--batch-tokens {limit.tokens} --grad-accumulation-steps {accumulation}",
            "about the same update, a little slower",
            model,
            _divide_batch(workload, divisor, limit, accumulation),
        )


def _divide_batch(
    workload: Workload, divisor: int, limit: BatchLimit, accumulation: int
) -> Workload:
    """The workload with the number of prompts per batch divided by `divisor`, at least one."""

    def divide(shape: AnyShape) -> AnyShape:
        groups = max(1, shape.groups // divisor)
        if isinstance(shape, PackedShape):
            rows = shape.prompt // divisor, max(shape.completion // divisor, shape.longest)
            return PackedShape(*rows, groups, shape.longest)
        return shape._replace(groups=groups)

    shapes = tuple(divide(shape) for shape in workload.shapes)
    return replace(workload, shapes=shapes, limit=limit, accumulation=accumulation)


def _reduce_group_size(model: ModelShape, workload: Workload) -> Iterator[Change]:
    if workload.sampling is None:
        return
    size = workload.sampling.group_size // 2
    while size >= workload.sampling.min_group_size:
        sampling = replace(workload.sampling, group_size=size)
        # Updates may use fewer completions than are sampled.
        changed = replace(workload, sampling=sampling, rows=min(workload.rows, size))
        yield Change(f"--group-size {size}", "fewer completions of each prompt", model, changed)
        size //= 2


def _shorten_rows(
    model: ModelShape, workload: Workload, max_seq_length: int | None, shapes_within: ShapesWithin
) -> Iterator[Change]:
    if workload.sampling is not None or max_seq_length is None:
        return
    for fraction in LENGTH_FRACTIONS:
        length = int(max_seq_length * fraction) // 8 * 8
        if length < MIN_LENGTH:
            continue
        shapes = tuple(shapes_within(length, workload.limit))
        if shapes:
            changed = replace(workload, shapes=shapes)
            yield Change(f"--max-seq-length {length}", "longer rows are dropped", model, changed)


def _shorten_completions(
    model: ModelShape, workload: Workload, max_seq_length: int | None, shapes_within: ShapesWithin
) -> Iterator[Change]:
    if workload.sampling is None:
        return
    longest = workload.sampling.completion
    for fraction in LENGTH_FRACTIONS:
        length = int(longest * fraction) // 8 * 8
        if length < MIN_SAMPLED_LENGTH:
            continue
        options = f"--max-completion-length {length}"
        if max_seq_length is not None:
            # Otherwise longer prompts would be allowed.
            options += f" --max-seq-length {max_seq_length - longest + length}"
        changed = replace(
            workload,
            shapes=tuple(shapes_within(length, workload.limit)),
            sampling=replace(workload.sampling, completion=length),
        )
        yield Change(options, "completions are truncated earlier", model, changed)


def _lower_rank(model: ModelShape, workload: Workload) -> Iterator[Change]:
    for rank in RANKS:
        if rank < workload.rank:
            changed = replace(workload, rank=rank)
            yield Change(f"--lora-rank {rank}", "learns a little less", model, changed)


def _train_fewer_layers(model: ModelShape, workload: Workload) -> Iterator[Change]:
    trained = model.blocks if workload.num_layers < 0 else workload.num_layers
    for fraction in LAYER_FRACTIONS:
        layers = max(1, int(model.blocks * fraction))
        if layers < trained:
            changed = replace(workload, num_layers=layers)
            yield Change(f"--num-layers {layers}", "learns less", model, changed)


def _quantise(model: ModelShape, workload: Workload) -> Iterator[Change]:
    weights = sum(linear.inputs * linear.outputs * linear.experts for linear in model.linears)
    for bits in BITS:
        nbytes = int(weights * (bits + GROUP_OVERHEAD_BITS) / 8)
        if nbytes < model.linear_bytes:
            smaller = replace(
                model,
                weights_bytes=model.weights_bytes - (model.linear_bytes - nbytes),
                linear_bytes=nbytes,
                bits=bits,
            )
            options = f"a {bits}-bit model (mlx_lm.convert -q --q-bits {bits})"
            cost = "the model gets worse" if bits < 4 else "the model changes a little"
            yield Change(options, cost, smaller, workload)
