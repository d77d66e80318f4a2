"""Compare the package's DPO gradient with a plain one, family by family, and print the table.

For every family of tests/helpers/families.py (tiny, random, adapters far from the identity), in
float32, bf16 and 4-bit, the gradient of one DPO update is computed in eight ways: {plain,
checkpointed} x {eager, compiled} x {one batch of 8 pairs, 8 batches of 1 pair accumulated}, through
`PreferenceObjective` and the training loop's own accumulation. Each is compared with the gradient
of the textbook formula: every row by itself, whole, the model's own full logits as
mlx-lm generates with them, log-softmax in float32, eager. The number is
‖ours − plain‖ / ‖plain‖ over all adapter weights; the table shows the largest of the eight.

The tolerance in float32 is 1e-5. The 4-bit models have float32 scales and activations, so it holds
for them too. A family that exceeds it must be within 3 times the change of the plain formula itself
when the sigmoid of its gates is rounded differently, which
the package does (`sigmoid` in `mlx_align/models/patches.py`): some tiny random models amplify that.
In bf16 the measure is rounding: the error of the plain formula in bf16 against float32 with the
same (bf16) weights, or the difference between two paddings of it, if that is larger (on the CPU two
paddings agree bit for bit). The package's gradient may differ from the plain formula in bf16, and
from float32, by at most 3 times that.

    python scripts/verify_families.py                          # everything, as a text table
    python scripts/verify_families.py --markdown               # the table for the docs
    python scripts/verify_families.py --families llama,qwen3 --ways   # all eight numbers

Exits with 1 if a gradient exceeds its tolerance.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import quantize_model

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.families import (
    FAMILIES,
    FLAT_FAMILIES,
    LORA_KEYS,
    REFUSED_FAMILIES,
    VOCAB,
    config_of,
    make_model,
)

from mlx_align.algorithms.dpo import PreferenceObjective
from mlx_align.algorithms.update import (
    accumulate,
    collate_microbatches,
    compiled_gradient,
)
from mlx_align.data.batching import Microbatch
from mlx_align.data.buckets import Shape
from mlx_align.errors import ModelError
from mlx_align.inference.scoring import make_logprob_scorer
from mlx_align.losses.registry import combine, parse_losses
from mlx_align.models import patches
from mlx_align.models.adapters import AdapterLayout, install_adapters
from mlx_align.models.backbone import split_backbone
from mlx_align.models.loading import LanguageModel, ModelFolder
from mlx_align.models.verification import verify_forward
from mlx_align.models.weights import AdapterWeights, use_adapter
from mlx_align.types import Logps, TokenizedGroup

BETA = 0.1
EXACT = 1e-5
TIMES_ROUNDING = 3.0
PRECISIONS = ("float32", "bf16", "4-bit")
# Ragged, from a prompt of one token and completions of one to rows far beyond every window.
PROMPTS = (1, 4, 12, 7, 9, 3, 14, 6)
COMPLETIONS = ((9, 5), (1, 12), (6, 3), (2, 8), (11, 4), (10, 7), (5, 1), (12, 9))
WIDTH = 16
# What mlx says of experts in bf16 where there is no GPU.
NOT_ON_CPU = "GatherMM::eval] Currently only supports float32"


class Way(NamedTuple):
    """One of the eight ways to a gradient."""

    checkpoint: bool
    compiled: bool
    accumulated: bool

    def __str__(self) -> str:
        return (
            f"{'checkpoint' if self.checkpoint else 'plain'}, "
            f"{'compiled' if self.compiled else 'eager'}, {'8x1' if self.accumulated else '1x8'}"
        )


WAYS = tuple(Way(*flags) for flags in product((False, True), repeat=3))


@dataclass
class Result:
    """Results for one family in one precision.

    Attributes:
        family: Its name in mlx-lm.
        precision: One of `PRECISIONS`.
        shared: Whether its completions share their prompt.
        note: What the verification at load found.
        gaps: Per way, the relative difference of the gradient.
        loss_gap: The largest relative difference of the loss.
        allowed: How much the gaps may be.
        rounding: In bf16: error of the plain formula against float32. Otherwise, where a gap is
            above `EXACT`: the effect of rounding its gates differently.
        error: In bf16: largest error of the package's gradients against float32.
        paddings: In bf16: difference between two paddings of the plain formula.
        refused: The error with which the package refuses the family, if it does.
        seconds: Time for all of it.
    """

    family: str
    precision: str
    shared: bool = False
    note: str = ""
    gaps: dict[str, float] = field(default_factory=dict)
    loss_gap: float = 0.0
    allowed: float = EXACT
    rounding: float = 0.0
    error: float = 0.0
    paddings: float = 0.0
    refused: str = ""
    seconds: float = 0.0

    @property
    def worst(self) -> float:
        """The largest gap; NaN counts as infinite."""
        return max((g if g == g else float("inf") for g in self.gaps.values()), default=0.0)

    @property
    def passed(self) -> bool:
        """Whether the gradients are right, or the family is one that is refused."""
        if self.refused:
            return self.family in REFUSED_FAMILIES or NOT_ON_CPU in self.refused
        return bool(self.gaps) and self.worst <= self.allowed and self.error <= self.allowed


def make_pairs(vocab: int = VOCAB, seed: int = 5) -> list[TokenizedGroup]:
    """Eight ragged pairs of random tokens."""
    random = np.random.default_rng(seed)

    def tokens(length: int) -> np.ndarray:
        return random.integers(1, vocab, length).astype(np.int32)

    return [
        TokenizedGroup(tokens(prompt), tuple(tokens(c) for c in completions), f"pair {i}")
        for i, (prompt, completions) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True))
    ]


def prepare(family: str, precision: str) -> LanguageModel:
    """A tiny model in `precision`, verified as at load, with adapters far from the identity.

    Raises:
        ModelError: The package refuses the family.
    """
    model = make_model(family, mx.bfloat16 if precision == "bf16" else mx.float32)
    if precision == "4-bit":
        with redirect_stdout(sys.stderr):  # it prints what it did
            model, _ = quantize_model(model, config_of(family), group_size=32, bits=4)
    backbone, shared, note = verify_forward(split_backbone(model), VOCAB)
    mx.random.seed(1)
    install_adapters(model, AdapterLayout(rank=4, keys=LORA_KEYS.get(family)))
    # mlx-lm starts lora_b at zero, where no gradient reaches lora_a.
    moved = tree_map(
        lambda p: p + (0.15 * mx.random.normal(p.shape)).astype(p.dtype),
        model.trainable_parameters(),
    )
    model.update(moved)
    mx.eval(model.parameters())
    folder = ModelFolder(family, Path(), config_of(family), None)
    return LanguageModel(folder, backbone, shared, note)


def plain_logps(model: nn.Module, groups: Sequence[TokenizedGroup], width: int) -> list[mx.array]:
    """Per pair and completion, in turn: the token log-probs, by the model's own full logits.

    Every row runs by itself; `width` tokens of padding stand to its right.
    """
    rows = []
    for group in groups:
        for completion in group.completions:
            row = np.concatenate([group.prompt, completion, np.zeros(width, np.int32)])
            first = len(group.prompt) - 1
            logits = model(mx.array(row)[None, :-1], cache=make_prompt_cache(model))
            logits = logits[0, first : first + len(completion)].astype(mx.float32)
            target = mx.take_along_axis(logits, mx.array(completion)[:, None], axis=-1)[:, 0]
            rows.append(target - mx.logsumexp(logits, axis=-1))
    return rows


def plain_gradient(
    model: nn.Module,
    weights: AdapterWeights,
    groups: Sequence[TokenizedGroup],
    reference: Sequence[tuple[Logps, ...]],
    width: int = 1,
) -> tuple[float, AdapterWeights]:
    """DPO's loss, −log σ(β(chosen − rejected log-ratio)), mean over pairs, and its gradient."""

    def loss(weights: AdapterWeights) -> mx.array:
        with use_adapter(model, weights):
            rows = plain_logps(model, groups, width)
        total = mx.array(0.0)
        for i, logps in enumerate(reference):
            chosen, rejected = (
                (row - mx.array(ref)).sum()
                for row, ref in zip(rows[2 * i : 2 * i + 2], logps, strict=True)
            )
            total = total + nn.softplus(-BETA * (chosen - rejected))
        return total / len(groups)

    value, grads = mx.value_and_grad(loss)(weights)
    mx.eval(value, grads)
    return value.item(), grads


def package_gradient(
    model: LanguageModel,
    weights: AdapterWeights,
    groups: Sequence[TokenizedGroup],
    reference: Sequence[tuple[Logps, ...]],
    way: Way,
    batch_size: int | None = None,
) -> tuple[float, AdapterWeights]:
    """The same computed by the package: its objective, accumulated as in training."""
    size = batch_size or (1 if way.accumulated else len(groups))
    objective = PreferenceObjective(
        model,
        combine(parse_losses("sigmoid"), {"beta": BETA}),
        groups,
        reference,
        make_logprob_scorer(model),
        grad_checkpoint=way.checkpoint,
    )
    starts, shape = range(0, len(groups), size), Shape(WIDTH, WIDTH, size)
    micro = [Microbatch(tuple(range(s, min(s + size, len(groups)))), shape) for s in starts]
    batches = [objective.collate(m) for m in micro]
    totals = objective.totals(batches)
    gradient: Callable[..., Any] = mx.value_and_grad(objective.loss)
    if way.compiled:
        gradient = compiled_gradient(objective.loss)
    loss, _, grads = accumulate(
        gradient, weights, collate_microbatches(objective, batches, micro), totals
    )
    return loss, grads


def difference(ours: AdapterWeights, plain: AdapterWeights) -> float:
    """‖ours − plain‖ / ‖plain‖ over all weights."""
    flat_ours, flat_plain = dict(tree_flatten(ours)), dict(tree_flatten(plain))
    assert set(flat_ours) == set(flat_plain)
    off = norm = 0.0
    for name, b in flat_plain.items():
        a, b = (np.array(x.astype(mx.float32), np.float64) for x in (flat_ours[name], b))
        off += ((a - b) ** 2).sum()
        norm += (b**2).sum()
    assert norm > 0
    return float((off / norm) ** 0.5)


def reference_near(model: nn.Module, groups: Sequence[TokenizedGroup]) -> list[tuple[Logps, ...]]:
    """Reference log-probs: near the policy's own, so that no pair's loss is saturated."""
    random = np.random.default_rng(9)
    rows = [np.array(row) for row in plain_logps(model, groups, 1)]
    noisy = [(row + random.normal(0, 0.5, row.shape)).astype(np.float32) for row in rows]
    return [(noisy[2 * i], noisy[2 * i + 1]) for i in range(len(groups))]


def in_float32(model: nn.Module) -> nn.Module:
    """Cast all weights, in place, up to float32."""
    model.update(
        tree_map(
            lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p,
            model.parameters(),
        )
    )
    return model


def swiglu_rounded_otherwise(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) · x with the sigmoid computed in another way than mlx's."""
    return gate / (1 + mx.exp(-gate)) * x


def verify(family: str, precision: str, ways: Sequence[Way] = WAYS) -> Result:
    """All `ways` of one family in one precision."""
    began = time.perf_counter()
    result = Result(family, precision)
    try:
        model = prepare(family, precision)
    except ModelError as error:
        result.refused = str(error)
        return result
    result.shared, result.note = model.shared, model.check
    groups = make_pairs()
    module = model.module
    weights: AdapterWeights = module.trainable_parameters()
    reference = reference_near(module, groups)
    module.train()
    losses: dict[str, float] = {}
    grads: dict[str, AdapterWeights] = {}
    for way in ways:
        losses[str(way)], grads[str(way)] = package_gradient(model, weights, groups, reference, way)
    value, plain = plain_gradient(module, weights, groups, reference)
    result.gaps = {way: difference(g, plain) for way, g in grads.items()}
    if precision == "bf16":
        padded = plain_gradient(module, weights, groups, reference, width=19)[1]
        _, exact = plain_gradient(in_float32(module), weights, groups, reference)
        result.paddings = difference(padded, plain)
        result.rounding = difference(plain, exact)
        result.error = max(difference(g, exact) for g in grads.values())
        result.allowed = TIMES_ROUNDING * max(result.paddings, result.rounding)
    elif result.worst > EXACT:
        with (
            patch.object(patches, "swiglu", swiglu_rounded_otherwise),
            patches.replace_swiglu(module),
        ):
            _, otherwise = plain_gradient(module, weights, groups, reference)
        result.rounding = difference(otherwise, plain)
        result.allowed = max(EXACT, TIMES_ROUNDING * result.rounding)
    result.loss_gap = max(abs(loss - value) / abs(value) for loss in losses.values())
    result.seconds = time.perf_counter() - began
    return result


def _verify(job: tuple[str, str]) -> Result:
    family, precision = job
    try:
        return verify(family, precision)
    except Exception as error:  # one family's crash is a line of the table, not its end
        text = str(error).splitlines()[0] if str(error) else ""
        return Result(family, precision, refused=f"{type(error).__name__}: {text}")


def table(results: Sequence[Result], markdown: bool) -> str:
    """One line per family: the way it runs, and its largest gap in each precision."""
    by_family: dict[str, dict[str, Result]] = {}
    for result in results:
        by_family.setdefault(result.family, {})[result.precision] = result
    precisions = [p for p in PRECISIONS if any(p in found for found in by_family.values())]
    rows = [["family", "prompt", *precisions]]
    for family, found in by_family.items():
        ran = [r for r in found.values() if r.gaps]
        way = "refused"
        if ran:
            way = "shared" if ran[0].shared else "whole rows"
        rows.append([family, way, *(_cell(found.get(p)) for p in precisions)])
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|---|---|" + "---:|" * len(precisions))
    else:
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    reasons = []
    for family, found in by_family.items():
        # A precision may fall back where another does not.
        fallbacks = [r for r in found.values() if not r.shared and NOT_ON_CPU not in r.refused]
        if fallbacks:
            elsewhere = any(r.shared for r in found.values())
            where = f" in {fallbacks[0].precision}" if elsewhere else ""
            reasons.append(f"- {family}{where}: {fallbacks[0].refused or fallbacks[0].note}")
    return "\n".join([*lines, "", *reasons]).rstrip()


def _cell(result: Result | None) -> str:
    if result is None or (result.refused and result.passed):
        return "needs a GPU" if result and NOT_ON_CPU in result.refused else "–"
    if result.refused:
        return "FAILED"
    mark = "" if result.passed else " FAILED"
    if result.allowed > EXACT:
        rounding = result.allowed / TIMES_ROUNDING
        return f"{result.worst:.1e} of {rounding:.1e}{mark}"
    return f"{result.worst:.1e}{mark}"


def main() -> int:
    """Run what the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", help="comma-separated; all by default")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument("--ways", action="store_true", help="also print all eight numbers")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    options = parser.parse_args()
    everything = [*FAMILIES, *FLAT_FAMILIES, *REFUSED_FAMILIES]
    families = options.families.split(",") if options.families else everything
    if strange := [name for name in families if name not in everything]:
        parser.error(f"no such family: {', '.join(strange)}")
    jobs = list(product(families, options.precisions.split(",")))
    began = time.perf_counter()
    results = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for result in pool.map(_verify, jobs):
            results.append(result)
            print(
                f"{result.family} {result.precision}: "
                f"{result.refused or f'{result.worst:.1e} of {result.allowed:.1e}'} "
                f"({result.seconds:.1f} s)",
                file=sys.stderr,
                flush=True,
            )
    print(table(results, options.markdown))
    if options.ways:
        for result in results:
            for way, gap in result.gaps.items():
                print(f"{result.family} {result.precision} {way}: {gap:.2e}")
    if options.json:
        rows = [asdict(r) | {"worst": r.worst, "passed": r.passed} for r in results]
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    failed = [f"{r.family} {r.precision}" for r in results if not r.passed]
    checked = sum(len(r.gaps) for r in results)
    seconds = time.perf_counter() - began
    print(f"\n{checked} gradients of {len(families)} families in {seconds:.0f} s; ", end="")
    print(f"above what is allowed: {', '.join(failed)}" if failed else "all within what is allowed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
