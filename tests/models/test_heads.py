"""The scalar head: scores and gradients against TRL and against one plain row at a time."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.families import VOCAB, make_model
from helpers.forward import difference
from helpers.paths import ORACLE
from mlx.utils import tree_flatten, tree_map

from mlx_align.algorithms.reward_modeling import RewardObjective
from mlx_align.algorithms.update import accumulate, collate_microbatches, compiled_gradient
from mlx_align.config import RewardConfig
from mlx_align.data.batching import Microbatch, collate_groups
from mlx_align.data.buckets import Shape
from mlx_align.data.comparisons import pad_completion_lists
from mlx_align.errors import ModelError
from mlx_align.inference.reward_model import RewardModel
from mlx_align.models.adapters import AdapterLayout, install_adapters, save_adapter
from mlx_align.models.backbone import split_backbone
from mlx_align.models.heads import (
    REWARD_HEAD,
    add_reward_head,
    completion_scores,
    hidden_width,
    read_reward_head,
    split_head,
)
from mlx_align.models.loading import load_language_model, open_model
from mlx_align.models.verification import verify_forward
from mlx_align.types import TokenizedGroup

KINDS = ("llama", "qwen2", "gemma2", "qwen3", "mamba2", "gpt2")
FLAT_KINDS = ("mamba", "internlm2-dynamic")


def groups_of(seed=0, prompts=(4, 11, 7), completions=((9, 5), (1, 8), (6, 3)), vocab=VOCAB):
    random = np.random.default_rng(seed)

    def ids(length):
        return random.integers(1, vocab, length).astype(np.int32)

    return [
        TokenizedGroup(ids(p), tuple(ids(c) for c in lengths), f"x:{i}")
        for i, (p, lengths) in enumerate(zip(prompts, completions, strict=True))
    ]


def batch_of(groups, pad=0):
    prompt = max(len(g.prompt) for g in groups)
    completion = max(len(c) for g in groups for c in g.completions)
    return collate_groups(groups, Shape(prompt + pad, completion + pad, len(groups)))


def plain_scores(backbone, groups):
    """One row at a time, nothing padded, the last state through the head: (N, members)."""
    weight = backbone.model[REWARD_HEAD].weight
    rows = [np.concatenate([g.prompt, c]) for g in groups for c in g.completions]
    last = [backbone.hidden(mx.array(row)[None])[0, -1].astype(mx.float32) for row in rows]
    return mx.stack([(state[None] * weight).sum(axis=1) for state in last])


def with_head(family, dtype=mx.float32, members=2):
    """A model with adapters away from the identity and a head; whether it shares its prompts."""
    model = make_model(family, dtype)
    backbone, shared, _ = verify_forward(split_backbone(model), VOCAB)
    install_adapters(model, AdapterLayout(rank=4))
    mx.random.seed(3)
    model.update(
        tree_map(
            lambda p: p + 0.1 * mx.random.normal(p.shape).astype(p.dtype),
            model.trainable_parameters(),
        )
    )
    add_reward_head(backbone, members=members)
    return backbone, shared


@pytest.mark.parametrize("family", KINDS)
def test_scores_do_not_depend_on_padding_batch_mates_and_shared_prompts(family):
    backbone, shared = with_head(family)
    assert shared
    groups = groups_of()
    alone = np.array(plain_scores(backbone, groups))
    for pad in (0, 5):
        for way in (True, False):
            found = np.array(completion_scores(backbone, batch_of(groups, pad), shared=way))
            assert np.abs(found - alone).max() < 1e-5, (pad, way)
    one = np.array(completion_scores(backbone, batch_of(groups[1:2])))
    assert np.abs(one - alone[2:4]).max() < 1e-5


@pytest.mark.parametrize("family", FLAT_KINDS)
def test_families_that_run_whole_rows(family):
    backbone, shared = with_head(family)
    assert not shared
    groups = groups_of()
    found = np.array(completion_scores(backbone, batch_of(groups, 3), shared=False))
    assert np.abs(found - np.array(plain_scores(backbone, groups))).max() < 1e-5
    alone = np.array(completion_scores(backbone, batch_of(groups[:1]), shared=False))
    assert np.abs(found[:2] - alone).max() < 1e-5


def gradient_of(function, tree, *, compiled=False):
    both = mx.value_and_grad(function)
    value, grads = (mx.compile(both) if compiled else both)(tree)
    mx.eval(value, grads)
    return value.item(), dict(tree_flatten(grads))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients(family, checkpoint, compiled):
    """By adapters and head, of a sum with another weight for every score."""
    backbone, _ = with_head(family)
    groups, model = groups_of(), backbone.model
    weights = mx.random.normal((6, 2), key=mx.random.key(5))

    def ours(tree):
        model.update(tree)
        batch = batch_of(groups, 3)
        return (completion_scores(backbone, batch, grad_checkpoint=checkpoint) * weights).sum()

    def plain(tree):
        model.update(tree)
        return (plain_scores(backbone, groups) * weights).sum()

    tree = model.trainable_parameters()
    value, found = gradient_of(ours, tree, compiled=compiled)
    expected, wanted = gradient_of(plain, tree)
    assert value == pytest.approx(expected, abs=1e-4)
    assert difference(found, wanted) < 1e-5
    assert f"{REWARD_HEAD}.weight" in found


@pytest.mark.parametrize("dtype", ["bfloat16", "4-bit"])
def test_gradients_of_narrow_models(dtype):
    """No further from float32's than one row at a time is; 4-bit weights compute in float32."""
    results = {}
    for kind in ("float32", dtype) if dtype == "bfloat16" else (dtype,):
        backbone, _ = with_head("llama")
        model = backbone.model
        if kind == "bfloat16":
            weights = model.trainable_parameters()
            model.set_dtype(mx.bfloat16)
            model.update(weights)
        if kind == "4-bit":
            nn.quantize(model, group_size=32, class_predicate=_plain_linear)
        groups = groups_of()
        tree = model.trainable_parameters()
        assert model[REWARD_HEAD].weight.dtype == mx.float32

        def ours(tree, backbone=backbone, groups=groups):
            backbone.model.update(tree)
            return completion_scores(backbone, batch_of(groups, 3), grad_checkpoint=True).sum()

        def plain(tree, backbone=backbone, groups=groups):
            backbone.model.update(tree)
            return plain_scores(backbone, groups).sum()

        results[kind] = gradient_of(ours, tree, compiled=True)[1], gradient_of(plain, tree)[1]
    ours, plain = results[dtype]
    if dtype == "4-bit":
        assert difference(ours, plain) < 1e-5
    else:
        assert difference(ours, plain) < 3 * difference(plain, results["float32"][1])


def _plain_linear(name, module):
    return hasattr(module, "to_quantized") and name.endswith("linear")


# ---------------------------------------------------------------- TRL's numbers


def trl_groups():
    """The oracle's pairs, cut at their common prefix, as groups."""
    rows = json.loads((ORACLE / "batches.json").read_text())["reward_text"]["rows"]
    groups = []
    for row in rows:
        chosen, rejected = row["chosen_ids"], row["rejected_ids"]
        same = next(i for i, (c, r) in enumerate(zip(chosen, rejected, strict=False)) if c != r)
        ids = (np.array(part, np.int32) for part in (chosen[:same], chosen[same:], rejected[same:]))
        prompt, *completions = ids
        groups.append(TokenizedGroup(prompt, tuple(completions), "oracle"))
    return groups


def every_gradient(model, groups, config, micros):
    """Loss and gradient of one update, accumulated over `micros`, as training computes it."""
    objective = RewardObjective(model, groups, config)
    batches = [objective.collate(micro) for micro in micros]
    tree = model.module.trainable_parameters()
    model.module.train()
    gradient = compiled_gradient(objective.loss)
    micro = collate_microbatches(objective, batches, micros)
    loss, sums, grads = accumulate(gradient, tree, micro, objective.totals(batches))
    return loss, sums, dict(tree_flatten(grads))


@pytest.mark.parametrize(
    ("name", "center", "margins"),
    [
        ("reward_bt", 0.0, None),
        ("reward_bt_center0.01", 0.01, None),
        ("reward_bt_margin", 0.0, (0.1, 0.5, 0.0, 1.0)),
    ],
)
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_objective_equals_trls_loss_and_gradient(name, center, margins, size, checkpoint):
    """Loss to 1e-5 and every gradient's norm to 1e-4 (reward_bt: every entry), all weights free."""
    wanted = json.loads((ORACLE / "cases" / f"{name}.json").read_text())
    groups = trl_groups()
    if margins is not None:
        groups = [replace(g, margin=m) for g, m in zip(groups, margins, strict=True)]
    model = load_language_model(open_model(str(ORACLE / "models" / "reward")))
    model.module.unfreeze()
    config = RewardConfig(
        batch_size=size, center_rewards_coefficient=center, grad_checkpoint=checkpoint
    )
    shape = Shape(16, 24, size)
    micros = [Microbatch(tuple(range(i, i + size)), shape) for i in range(0, 4, size)]
    loss, sums, grads = every_gradient(model, groups, config, micros)
    assert loss == pytest.approx(wanted["loss"], rel=1e-5)
    assert sums["rewards/accuracies"] / sums["weight"] == wanted["metrics"]["accuracy"]
    margin = sums["rewards/margins"] / sums["weight"]
    assert margin == pytest.approx(wanted["metrics"]["margin"], abs=1e-5)
    grads["score.weight"] = grads.pop(f"{REWARD_HEAD}.weight")
    for weight, norm in wanted["grad_norms"].items():
        assert mx.linalg.norm(grads[weight]).item() == pytest.approx(norm, rel=1e-4), weight
    if name == "reward_bt":
        whole = mx.load(str(ORACLE / "grads" / "reward_bt.safetensors"))
        assert difference({k: grads[k] for k in whole}, whole) < 1e-4


def test_scores_equal_trls():
    wanted = json.loads((ORACLE / "cases" / "reward_bt.json").read_text())["rewards"]
    model = RewardModel.load(str(ORACLE / "models" / "reward"))
    found = np.concatenate(model.score_tokens(trl_groups()))[:, 0].reshape(4, 2)
    gaps = np.abs(found.T.reshape(-1) - wanted)
    assert min(gaps.max(), np.abs(found.reshape(-1) - wanted).max()) < 1e-5


def test_accumulating_is_one_batch():
    """8 × 1 and 1 × 8, with ranked lists, fillers, folds, margins, soft labels, and a last gap."""
    lengths = [(9, 5), (1, 8), (6, 3, 4), (2, 2), (5, 1, 7), (3, 9), (4, 4)]
    groups = groups_of(prompts=(4, 11, 7, 3, 9, 5, 6), completions=lengths, vocab=300)
    groups = [
        replace(g, scores=tuple(float(s) for s in range(len(g.completions), 0, -1))) for g in groups
    ]
    groups[0] = replace(groups[0], soft_label=0.7)
    groups[3] = replace(groups[3], margin=0.4)
    groups = pad_completion_lists(groups)
    model = load_language_model(open_model(str(ORACLE / "models" / "policy")))
    install_adapters(model.module, AdapterLayout(rank=4))
    add_reward_head(model.backbone, members=3)
    found = {}
    for size in (1, 8):
        shape = Shape(16, 16, size)
        config = RewardConfig(batch_size=size, members=3, label_smoothing=0.1, rating_margin=0.2)
        micros = [Microbatch(tuple(range(i, min(i + size, 7))), shape) for i in range(0, 7, size)]
        found[size] = every_gradient(model, groups, config, micros)
    assert found[1][0] == pytest.approx(found[8][0], rel=1e-5)
    assert difference(found[1][2], found[8][2]) < 1e-5
    assert found[1][1]["weight"] == 7


def test_a_member_learns_nothing_from_its_own_fold():
    groups = pad_completion_lists(groups_of(vocab=300))
    model = load_language_model(open_model(str(ORACLE / "models" / "policy")))
    install_adapters(model.module, AdapterLayout(rank=4))
    add_reward_head(model.backbone, members=3)
    config = RewardConfig(batch_size=1, members=3)
    objective = RewardObjective(model, groups, config)
    for index in range(3):  # three prompts, three folds: each is left out by one member
        micro = Microbatch((index,), Shape(16, 16, 1))
        out = int(np.argmin(np.array(objective.collate(micro).member_mask)[0]))
        grads = every_gradient(model, groups, config, [micro])[2]
        moved = mx.abs(grads[f"{REWARD_HEAD}.weight"]).max(axis=1)
        assert moved[out].item() == 0
        assert min(moved[m].item() for m in range(3) if m != out) > 0


# ---------------------------------------------------------------- the head itself


def test_a_fresh_head_is_normal_and_float32():
    model = make_model("llama", mx.bfloat16)
    backbone = split_backbone(model)
    width = hidden_width(backbone)
    mx.random.seed(0)
    weight = add_reward_head(backbone, members=400).weight
    assert weight.shape == (400, width)
    assert weight.dtype == mx.float32
    assert mx.std(weight).item() == pytest.approx((width + 1) ** -0.5, rel=0.03)
    assert abs(weight.mean().item()) < 0.01


def test_head_file(tmp_path):
    backbone, _ = with_head("llama")
    tree = backbone.model.trainable_parameters()
    save_adapter(tmp_path, tree, AdapterLayout(rank=4), "base")
    stored = mx.load(str(tmp_path / "adapters.safetensors"))
    adapter, head = split_head(dict(tree_flatten(tree)))
    assert set(stored) == set(adapter)
    assert mx.array_equal(read_reward_head(tmp_path), head[f"{REWARD_HEAD}.weight"])
    file = str(tmp_path / "reward_head.safetensors")
    mx.save_safetensors(file, {**head, "other": mx.zeros(2)})
    with pytest.raises(ModelError, match="expected the tensor reward_head"):
        read_reward_head(tmp_path)
    mx.save_safetensors(file, {"score": mx.zeros((1, 2))})
    with pytest.raises(ModelError, match="found score"):
        read_reward_head(tmp_path)
    Path(file).write_bytes(b"torn")
    with pytest.raises(ModelError, match="damaged"):
        read_reward_head(tmp_path)
    Path(file).unlink()
    with pytest.raises(
        ModelError, match=r"not a reward model \(it has no reward_head\.safetensors\)"
    ):
        read_reward_head(tmp_path)
    with pytest.raises(ModelError, match="hidden states are"):
        add_reward_head(backbone, mx.zeros((1, 3)))
