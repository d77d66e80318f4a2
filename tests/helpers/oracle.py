"""TRL's recorded numbers (tests/oracle), and how tests run losses and objectives on their batches.

`scripts/make_oracle.py` wrote them with TRL 1.16, on the CPU in float32, for a tiny random llama.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from helpers.families import VOCAB
from helpers.paths import ORACLE
from mlx_align.data.batching import Microbatch
from mlx_align.data.buckets import Shape
from mlx_align.inference.scoring import make_logprob_scorer, score_groups
from mlx_align.losses.registry import combine
from mlx_align.models.backbone import split_backbone
from mlx_align.models.loading import LanguageModel
from mlx_align.types import TokenizedGroup

BATCHES = json.loads((ORACLE / "batches.json").read_text())
DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}


class Row(NamedTuple):
    """One flat row: what is given, what is scored, and which of its tokens count."""

    prompt: list[int]
    completion: list[int]
    mask: list[bool]


TokenLogps = Callable[[nn.Module, list[Row]], mx.array]


def flat_token_logps(model: nn.Module, rows: list[Row]) -> mx.array:
    """(N, C) float32: the log-prob of every completion token, rows one by one, all logits."""
    return _stacked(_logps_and_square_sums(model, row)[0] for row in rows)


def flat_log_square_sums(model: nn.Module, rows: list[Row]) -> mx.array:
    """(N, C) float32: log Σ_v p_v² of the distribution of every completion token."""
    return _stacked(_logps_and_square_sums(model, row)[1] for row in rows)


def _logps_and_square_sums(model: nn.Module, row: Row) -> tuple[mx.array, mx.array]:
    tokens = mx.array([row.prompt + row.completion])
    logits = model(tokens[:, :-1])[0, len(row.prompt) - 1 :].astype(mx.float32)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logps, mx.array(row.completion)[:, None], axis=-1)[:, 0]
    return chosen, mx.logsumexp(2 * logps, axis=-1)


def _stacked(rows: Any) -> mx.array:
    rows = list(rows)
    width = max(len(row) for row in rows)
    return mx.stack([mx.pad(row, (0, width - len(row))) for row in rows])


def collated_rows(batch: dict[str, Any], prefix: str = "", limit: int | None = None) -> list[Row]:
    """Unpadded rows of a padded batch: what is scored starts the completion."""
    ids, attention = batch[prefix + "input_ids"], batch[prefix + "attention_mask"]
    if prefix + "labels" in batch:
        scored = [[label != -100 for label in row] for row in batch[prefix + "labels"]]
    else:
        scored = [[bool(flag) for flag in row] for row in batch[prefix + "completion_mask"]]
    rows = []
    for tokens, real, flags in zip(ids, attention, scored, strict=True):
        end = min(sum(real), limit or sum(real))
        start = max(1, flags.index(True))  # the first token of a row has nothing to predict it
        rows.append(Row(tokens[:start], tokens[start:end], flags[start:end]))
    return rows


def pair_rows(key: str, limit: int | None = None) -> list[Row]:
    """The batch's rows as chosen 0, rejected 0, chosen 1 … (there: all chosen first)."""
    batch = BATCHES[key]["collated"]
    if key.startswith(("cpo", "orpo")):
        chosen, rejected = collated_rows(batch, "chosen_"), collated_rows(batch, "rejected_")
    else:
        rows = collated_rows(batch, limit=limit)
        chosen, rejected = rows[:4], rows[4:]
    return [row for pair in zip(chosen, rejected, strict=True) for row in pair]


def mask_of(rows: list[Row]) -> mx.array:
    return _stacked(mx.array(row.mask) for row in rows) != 0


def load(name: str) -> nn.Module:
    model, _ = mlx_lm.load(str(ORACLE / "models" / name))
    return model


def case(name: str) -> dict[str, Any]:
    return json.loads((ORACLE / "cases" / f"{name}.json").read_text())


def check(name: str, model: nn.Module, loss_fn: Callable[[], mx.array], loss_tol: float = 1e-5):
    """Hold loss and gradients of `loss_fn`, a closure over `model`, to the recorded case."""
    record = case(name)
    loss, tree = nn.value_and_grad(model, loss_fn)()
    gradient = dict(tree_flatten(tree))
    mx.eval(loss, gradient)
    check_numbers(record, name, loss.item(), gradient, loss_tol)


def check_numbers(
    record: dict[str, Any],
    name: str,
    loss: float,
    gradient: dict[str, mx.array],
    loss_tol: float = 1e-5,
) -> None:
    assert loss == pytest.approx(record["loss"], rel=loss_tol)
    norms = {key: math.sqrt(mx.sum(mx.square(g)).item()) for key, g in gradient.items()}
    assert norms == pytest.approx(record["grad_norms"], rel=1e-4)
    path = ORACLE / "grads" / f"{name}.safetensors"
    if path.exists():
        whole = mx.load(str(path))
        assert whole.keys() == gradient.keys()
        differences = [mx.sum(mx.square(gradient[key] - g)) for key, g in whole.items()]
        assert math.sqrt(sum(differences).item()) < 1e-4 * record["grad_norm"]


DPO_CASES = sorted(
    path.stem for path in (ORACLE / "cases").glob("dpo_*.json") if "lora" not in path.stem
)


def dpo_loss_of(config: dict[str, Any]):
    """Our combined loss for a recorded configuration."""
    names = config.get("loss_type", ["sigmoid"])
    weights = config.get("loss_weights", [1.0] * len(names))
    given = {k: v for k, v in config.items() if k in ("beta", "label_smoothing")}
    if "f_divergence_type" in config:
        given["f_divergence"] = DIVERGENCES[config["f_divergence_type"]]
    return combine(tuple(zip(names, weights, strict=True)), given)


# Objectives on the recorded batches

SHAPE = Shape(32, 40, 4)
# How the four groups of a recorded batch come: at once, or one after the other.
TOGETHER, ONE_BY_ONE = (4,), (1, 1, 1, 1)
WAYS = pytest.mark.parametrize("sizes", [TOGETHER, ONE_BY_ONE], ids=["batch", "accumulated"])


def language_model(module) -> LanguageModel:
    """A loaded module as the package holds it, its prompts shared."""
    return LanguageModel(None, split_backbone(module), True, "")


def microbatches(sizes, shape=SHAPE, room=None) -> list[Microbatch]:
    """Consecutive groups in microbatches of such sizes, each with room for the largest."""
    starts, shape = np.cumsum([0, *sizes]), shape._replace(groups=room or max(sizes))
    return [
        Microbatch(tuple(range(start, start + size)), shape)
        for start, size in zip(starts, sizes, strict=False)
    ]


def update(model, objective, tree, micro) -> tuple[float, dict[str, mx.array], dict[str, float]]:
    """Loss, gradient and metric sums of one update, as the loop accumulates them."""
    batches = [objective.collate(m) for m in micro]
    totals = objective.totals(batches)
    if objective.prepare is not None:
        batches = objective.prepare(tree, batches, totals)
    model.module.train()
    loss, sums, grads = 0.0, {}, None
    for batch in batches:
        (share, metrics), part = mx.value_and_grad(objective.loss)(tree, batch, totals)
        grads = part if grads is None else tree_map(mx.add, grads, part)
        mx.eval(share, grads)
        loss += share.item()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    model.module.eval()
    return loss, dict(tree_flatten(grads)), sums


def scores(model, tree, groups):
    return score_groups(make_logprob_scorer(model), tree, groups, [SHAPE])


def trainable_weights(model) -> dict[str, Any]:
    return model.module.trainable_parameters()


def group_of(rows, **fields) -> TokenizedGroup:
    """Flat rows of one prompt as a group."""
    assert all(row.prompt == rows[0].prompt for row in rows)
    return TokenizedGroup(
        np.array(rows[0].prompt, np.int32),
        tuple(np.array(row.completion, np.int32) for row in rows),
        "oracle",
        loss_masks=tuple(np.array(row.mask) for row in rows),
        **fields,
    )


def pair_groups(key, limit=None) -> list[TokenizedGroup]:
    rows = pair_rows(key, limit)
    return [group_of(pair) for pair in zip(rows[0::2], rows[1::2], strict=True)]


def zeros_like(groups):
    return [tuple(np.zeros(len(c), np.float32) for c in g.completions) for g in groups]


def random_groups(count: int, completions: int, seed: int = 0) -> list[TokenizedGroup]:
    """Groups of unequal lengths."""
    random = np.random.default_rng(seed)

    def ids(low, high):
        return random.integers(1, VOCAB, random.integers(low, high)).astype(np.int32)

    return [
        TokenizedGroup(
            ids(2, 9), tuple(ids(1, 14) for _ in range(completions)), f"row {i}", label=i % 3 > 0
        )
        for i in range(count)
    ]


SMALL = Shape(16, 16, 8)
# Seven groups: one batch of 8 with a filler, two of 4 with one, and seven of 1.
SPLITS = ((8, (7,)), (4, (4, 3)), (1, (1,) * 7))


def assert_accumulation_is_exact(model, objective):
    """The update is the same however its groups are split into microbatches."""
    results = [
        update(model, objective, trainable_weights(model), microbatches(sizes, SMALL, room))
        for room, sizes in SPLITS
    ]
    for result in results[1:]:
        assert_same_update(result, results[0])


def assert_same_update(result, expected):
    """Loss and gradient to 1e-5, and the sums of metrics."""
    (loss, gradient, sums), (whole, whole_gradient, whole_sums) = result, expected
    norm = sum(mx.sum(mx.square(g)).item() for g in whole_gradient.values()) ** 0.5
    assert norm > 0
    assert loss == pytest.approx(whole, rel=1e-5)
    gaps = [mx.sum(mx.square(g - whole_gradient[name])).item() for name, g in gradient.items()]
    assert sum(gaps) ** 0.5 < 1e-5 * max(norm, 1.0)
    assert sums == pytest.approx(whole_sums, rel=1e-4, abs=1e-4)


def reference_near(model, groups):
    """Reference log-probs a little off the model's own."""
    own = score_groups(make_logprob_scorer(model), trainable_weights(model), groups, [SMALL])
    noise = np.random.default_rng(5)
    return [
        tuple(row + noise.normal(0, 0.1, row.shape).astype(np.float32) for row in rows)
        for rows in own
    ]
