"""Which options make a run fit, cheapest first: each step costs more than the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mlx_align.data.shapes import AnyShape, BatchLimit, PackedShape
from mlx_align.plan.headers import ModelShape
from mlx_align.plan.memory import MemoryPlan, plan_memory
from mlx_align.plan.workload import Workload

# Shares of --max-seq-length that are tried, and the shortest worth training on, tokens.
SHORTER = (0.75, 0.5, 0.25, 0.125)
SHORTEST = 64
RANKS = (8, 4)
# So many times fewer --batch-tokens are tried.
SMALLER = (2, 4, 8, 16)
LAYER_SHARES = (0.5, 0.25)
BITS = (8, 4, 3)
GROUP_SIZE = 64
# A scale and a bias of 16 bits each per group of weights.
GROUP_OVERHEAD_BITS = 32 / GROUP_SIZE
# A step that saves less than this share of the peak is not worth what it costs.
WORTH = 0.01

# The shortest completions worth sampling, tokens.
SHORTEST_SAMPLED = 16

# The batch shapes that are left when rows longer than so many tokens are dropped; of a run that is
# trained on its own samples, those of completions of at most so many.
ShapesWithin = Callable[[int, BatchLimit], Sequence[AnyShape]]


@dataclass(frozen=True)
class Step:
    """One change of options, on top of those before it.

    Attributes:
        options: What to type.
        cost: What it costs.
        peak_bytes: The peak with this and all steps before it.
        fits: Whether that fits.
    """

    options: str
    cost: str
    peak_bytes: int
    fits: bool


def advise(
    model: ModelShape,
    work: Workload,
    max_seq_length: int | None,
    shapes_within: ShapesWithin,
    available_bytes: int,
) -> list[Step]:
    """The cheapest steps that together make a run fit; [] where it fits as it is.

    `max_seq_length` is None where it limits nothing: of a run on samples whose prompts have a
    limit of their own.

    Steps that would save next to nothing are left out. Where all of them together are not enough,
    they are all returned, and the last one does not fit.
    """
    before = plan_memory(model, work)
    steps: list[Step] = []
    for ladder in (
        _to_lora(work),
        _checkpoint(work),
        _smaller_batch(work),
        _smaller_groups(work),
        _shorter(work, max_seq_length, shapes_within),
        _shorter_completions(work, max_seq_length, shapes_within),
        _lower_rank(work),
        _fewer_layers(model, work),
        _fewer_bits(model),
    ):
        best: tuple[MemoryPlan, Step, ModelShape, Workload] | None = None
        for options, cost, change_model, change_work in ladder:
            if before.peak_bytes <= available_bytes:
                return steps
            now_model, now_work = change_model(model), change_work(work)
            now = plan_memory(now_model, now_work)
            # Without the room to run ahead, most of which is the same for all small runs.
            if now.needed_bytes > (best[0] if best else before).needed_bytes * (1 - WORTH):
                continue
            fits = now.peak_bytes <= available_bytes
            best = now, Step(options, cost, now.peak_bytes, fits), now_model, now_work
            if fits:
                break
        if best is not None:
            before, step, model, work = best
            steps.append(step)
    return steps


ChangeModel = Callable[[ModelShape], ModelShape]
ChangeWork = Callable[[Workload], Workload]
Ladder = Iterator[tuple[str, str, ChangeModel, ChangeWork]]


def _same(model: ModelShape) -> ModelShape:
    return model


def _same_work(work: Workload) -> Workload:
    return work


def _to_lora(work: Workload) -> Ladder:
    if work.fine_tune_type != "lora":
        yield (
            "--fine-tune-type lora",
            "adapters instead of all weights"
            if work.fine_tune_type == "full"
            else "another adapter",
            _same,
            lambda now: replace(now, fine_tune_type="lora"),
        )


def _checkpoint(work: Workload) -> Ladder:
    if not work.grad_checkpoint:
        yield (
            "--grad-checkpoint",
            "a third slower",
            _same,
            lambda now: replace(now, grad_checkpoint=True),
        )


def _smaller_batch(work: Workload) -> Ladder:
    tokens, most = work.limit.tokens, max(shape.groups for shape in work.shapes)
    if most == 1:
        return
    if tokens is None:
        accumulation = work.limit.groups * work.accumulation
        yield (
            f"--batch-size 1 --grad-accumulation-steps {accumulation}",
            "the same update, a little slower",
            _same,
            partial(_divided, parts=most, limit=BatchLimit(), accumulation=accumulation),
        )
        return
    for parts in SMALLER:
        accumulation = parts * work.accumulation
        limit = BatchLimit(tokens=max(1, tokens // parts))
        yield (
            f"--batch-tokens {limit.tokens} --grad-accumulation-steps {accumulation}",
            "about the same update, a little slower",
            _same,
            partial(_divided, parts=parts, limit=limit, accumulation=accumulation),
        )


def _divided(work: Workload, *, parts: int, limit: BatchLimit, accumulation: int) -> Workload:
    """The workload with so many times fewer prompts in its shapes, at least one."""

    def part(shape: AnyShape) -> AnyShape:
        groups = max(1, shape.groups // parts)
        if isinstance(shape, PackedShape):
            rows = shape.prompt // parts, max(shape.completion // parts, shape.longest)
            return PackedShape(*rows, groups, shape.longest)
        return shape._replace(groups=groups)

    shapes = tuple(part(shape) for shape in work.shapes)
    return replace(work, shapes=shapes, limit=limit, accumulation=accumulation)


def _smaller_groups(work: Workload) -> Ladder:
    if work.sampling is None:
        return
    size = work.sampling.group_size // 2
    while size >= work.sampling.least_group:

        def change(now: Workload, size: int = size) -> Workload:
            assert now.sampling is not None
            said = replace(now.sampling, group_size=size)
            # Those that are learned from may be fewer than those that are sampled.
            return replace(now, sampling=said, rows=min(now.rows, size))

        yield f"--group-size {size}", "fewer completions of each prompt", _same, change
        size //= 2


def _shorter_completions(
    work: Workload, max_seq_length: int | None, shapes_within: ShapesWithin
) -> Ladder:
    if work.sampling is None:
        return
    longest = work.sampling.completion
    for share in SHORTER:
        length = int(longest * share) // 8 * 8
        if length >= SHORTEST_SAMPLED:

            def change(now: Workload, length: int = length) -> Workload:
                assert now.sampling is not None
                said = replace(now.sampling, completion=length)
                return replace(now, shapes=tuple(shapes_within(length, now.limit)), sampling=said)

            options = f"--max-completion-length {length}"
            if max_seq_length is not None:
                # Or prompts might be longer in return.
                options += f" --max-seq-length {max_seq_length - longest + length}"
            yield options, "completions are cut earlier", _same, change


def _shorter(work: Workload, max_seq_length: int | None, shapes_within: ShapesWithin) -> Ladder:
    if work.sampling is not None or max_seq_length is None:
        return
    for share in SHORTER:
        length = int(max_seq_length * share) // 8 * 8
        if length >= SHORTEST and shapes_within(length, work.limit):

            def change(now: Workload, length: int = length) -> Workload:
                # The limit may be a smaller one by now.
                return replace(now, shapes=tuple(shapes_within(length, now.limit)))

            yield f"--max-seq-length {length}", "longer rows are dropped", _same, change


def _lower_rank(work: Workload) -> Ladder:
    if work.fine_tune_type == "full":
        return
    for rank in RANKS:
        if rank < work.rank:

            def change(now: Workload, rank: int = rank) -> Workload:
                return replace(now, rank=rank)

            yield f"--lora-rank {rank}", "learns a little less", _same, change


def _fewer_layers(model: ModelShape, work: Workload) -> Ladder:
    trained = model.blocks if work.num_layers < 0 else work.num_layers
    for share in LAYER_SHARES:
        layers = max(1, int(model.blocks * share))
        if layers < trained:

            def change(now: Workload, layers: int = layers) -> Workload:
                return replace(now, num_layers=layers)

            yield f"--num-layers {layers}", "learns less", _same, change


def _fewer_bits(model: ModelShape) -> Ladder:
    weights = sum(linear.inputs * linear.outputs * linear.experts for linear in model.linears)
    for bits in BITS:
        nbytes = int(weights * (bits + GROUP_OVERHEAD_BITS) / 8)
        if nbytes < model.linear_bytes:

            def change(now: ModelShape, nbytes: int = nbytes, bits: int = bits) -> ModelShape:
                saved = now.linear_bytes - nbytes
                return replace(
                    now, weights_bytes=now.weights_bytes - saved, linear_bytes=nbytes, bits=bits
                )

            yield (
                f"a {bits}-bit model (mlx_lm.convert -q --q-bits {bits})",
                "the model itself gets worse" if bits < 4 else "the model itself changes a little",
                change,
                _same_work,
            )
