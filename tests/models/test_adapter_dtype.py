"""`--adapter-dtype bfloat16`: the same run in less memory, trained and saved in float32."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.data import write_rows
from helpers.forward import difference
from helpers.oracle import language_model, microbatches
from helpers.paths import TINY_MODEL
from helpers.runs import LN2, metric_rows, mlx_align
from mlx.utils import tree_flatten, tree_map
from mlx_lm import load as mlx_lm_load
from mlx_lm.models.llama import Model, ModelArgs

from mlx_align.algorithms.dpo import PreferenceObjective
from mlx_align.algorithms.update import accumulate, collate_microbatches, compiled_gradient
from mlx_align.data.buckets import Shape
from mlx_align.inference.scoring import make_logprob_scorer, score_groups
from mlx_align.losses.registry import combine, parse_losses
from mlx_align.models.adapters import AdapterLayout, install_adapters, save_adapter
from mlx_align.models.loading import load_module
from mlx_align.training import reference
from mlx_align.training.reference import reference_key
from mlx_align.types import TokenizedGroup

VOCABULARY = 64


@pytest.fixture(scope="session")
def bf16(tiny_models):
    """The tiny model in bfloat16."""
    return tiny_models["bfloat16"]


@pytest.fixture(scope="module")
def start(tmp_path_factory, bf16):
    """An adapter of it that is far from the identity, so that its rounding shows."""
    layout = AdapterLayout(rank=4, scale=2.0)
    model = load_module(bf16)
    mx.random.seed(3)
    install_adapters(model, layout)
    tree = tree_map(lambda w: w + 0.1 * mx.random.normal(w.shape), model.trainable_parameters())
    folder = tmp_path_factory.mktemp("start")
    save_adapter(folder, tree, layout, "base")
    return folder


@pytest.fixture
def dpo(train, bf16):
    """Runs `mlx-align dpo` on pairs of yes and no; the exit code."""
    rows = [
        {"prompt": f"{i} {'sun ' * (i % 5)}?", "chosen": " yes" + "a" * (i % 4), "rejected": " no"}
        for i in range(24)
    ]
    data = write_rows("pairs.jsonl", rows)

    def call(*options, model=bf16):
        small = ("--reference-cache", "cache", "--samples", 2, "--sample-tokens", 4)
        small += ("--batch-size", 2, "--grad-accumulation-steps", 3, "--warmup", 0)
        small += ("--learning-rate", "3e-3", "--steps-per-report", 1, "--iters", 8)
        return train("dpo", *small, *options, data=data, model=model)[0]

    return call


@pytest.mark.parametrize("checkpoint", ["--grad-checkpoint", "--no-grad-checkpoint"])
def test_a_run_starts_at_ln2_learns_and_saves_float32(dpo, bf16, start, checkpoint):
    assert dpo("--adapter-dtype", "bfloat16", "--init-adapter", start, checkpoint) == 0
    losses = [row["loss"] for row in metric_rows("run", "loss")]
    assert losses[0] == pytest.approx(LN2, abs=1e-3)
    assert losses[-1] < 0.5
    for file in (
        "run/adapters.safetensors",
        "run/checkpoints/0000008/policy.optimizer.safetensors",
    ):
        arrays = mx.load(file)
        floats = {a.dtype for a in arrays.values() if mx.issubdtype(a.dtype, mx.floating)}
        assert floats == {mx.float32}
    model, _ = mlx_lm_load(str(bf16), adapter_path="run")
    assert model.layers[0].self_attn.q_proj.lora_b.dtype == mx.float32


def test_models_and_options_without_bfloat16_adapters_are_refused(dpo, capsys):
    narrow = ("--adapter-dtype", "bfloat16")
    for options, model, said in (
        (("--fine-tune-type", "full"), None, "--fine-tune-type full trains no adapters"),
        (("--fine-tune-type", "dora"), None, "--fine-tune-type dora needs float32 norms"),
        ((), TINY_MODEL, "the model does not compute in it"),
    ):
        assert dpo(*narrow, *options, **({"model": model} if model else {})) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: --adapter-dtype bfloat16: ")
        assert said in error
        assert not Path("run").exists()
    assert mlx_align("plan", "--model", TINY_MODEL, *narrow) == 1
    assert "the model does not compute in it" in capsys.readouterr().err


def test_the_reference_cache_depends_on_the_adapter_dtype(bf16, start):
    keys = [reference_key(bf16, start, name) for name in ("float32", "bfloat16")]
    assert keys[0] != keys[1]


def test_a_reference_computed_otherwise_is_another_one(bf16, monkeypatch):
    def key(computed="shared True"):
        return reference_key(bf16, None, "float32", computed)

    before = key()
    assert key() == before
    assert key("shared False") != before
    versions = reference.package_versions()
    for name in ("mlx", "mlx-lm"):
        changed = {**versions, name: "99.9"}
        monkeypatch.setattr(reference, "package_versions", lambda changed=changed: changed)
        assert key() != before


def random_pairs(count, prompt, completion, seed=0):
    random = np.random.default_rng(seed)

    def ids(longest):
        length = random.integers(longest // 2, longest + 1)
        return random.integers(1, VOCABULARY, length).astype(np.int32)

    return [
        TokenizedGroup(ids(prompt), (ids(completion), ids(completion)), f"row {i}")
        for i in range(count)
    ]


def make_llama(dtype, **sizes):
    """A random model with adapters away from their start, and their tree."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, **sizes}
    arguments = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    arguments |= {"rms_norm_eps": 1e-5, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict({**arguments, **shape}))
    # Both dtypes have the same weights.
    model.update(tree_map(lambda w: w.astype(mx.bfloat16).astype(dtype), model.parameters()))
    tree = install_adapters(model, AdapterLayout(rank=4))
    mx.random.seed(1)
    tree = tree_map(lambda w: w + 0.05 * mx.random.normal(w.shape), tree)
    model.update(tree)
    mx.eval(model.parameters())
    return language_model(model), tree


def gradient(model, tree, groups, reference, shape, *, checkpoint):
    """Loss and gradient of an update, compiled and accumulated one pair after the other."""
    objective = PreferenceObjective(
        model,
        combine(parse_losses("sigmoid"), {}),
        groups,
        reference,
        make_logprob_scorer(model),
        grad_checkpoint=checkpoint,
    )
    micro = microbatches((1,) * len(groups), shape)
    batches = [objective.collate(one) for one in micro]
    totals = objective.totals(batches)
    compiled = compiled_gradient(objective.loss)
    model.module.train()
    loss, _, grads = accumulate(
        compiled, tree, collate_microbatches(objective, batches, micro), totals
    )
    model.module.eval()
    return loss, dict(tree_flatten(grads))


@pytest.mark.parametrize("checkpoint", [True, False])
def test_gradients_are_float32_and_within_bf16_error(checkpoint):
    groups, shape = random_pairs(4, 12, 16), Shape(16, 16, 1)
    exact_model, tree = make_llama(mx.float32)
    wide, _ = make_llama(mx.bfloat16)
    narrow = replace(wide, adapter_dtype=mx.bfloat16)
    # Far from the policy, so that the loss is no flat ln 2.
    reference = [(a - 0.2, b + 0.1) for a, b in logps_of(exact_model, tree, groups, shape)]
    found = [
        gradient(model, tree, groups, reference, shape, checkpoint=checkpoint)
        for model in (exact_model, wide, narrow)
    ]
    (exact_loss, exact), (wide_loss, by_wide), (narrow_loss, by_narrow) = found
    assert {grad.dtype for grad in by_narrow.values()} == {mx.float32}
    own_error = difference(by_wide, exact)
    assert 1e-3 < own_error < 0.2
    assert 0 < difference(by_narrow, by_wide) < 2 * own_error
    assert difference(by_narrow, exact) < 2 * own_error
    assert narrow_loss == pytest.approx(exact_loss, abs=0.02)
    assert wide_loss == pytest.approx(exact_loss, abs=0.02)
    assert {weight.dtype for _, weight in tree_flatten(tree)} == {mx.float32}


def logps_of(model, tree, groups, shape):
    return score_groups(make_logprob_scorer(model), tree, groups, [shape])


@pytest.mark.parametrize("checkpoint", [True, False])
def test_reference_and_policy_are_the_same_function(checkpoint):
    """From an adapter whose rounding shows: ln 2 if both are cast, another loss if one is."""
    groups, shape = random_pairs(4, 12, 16), Shape(16, 16, 1)
    wide, tree = make_llama(mx.bfloat16)
    narrow = replace(wide, adapter_dtype=mx.bfloat16)
    same = logps_of(narrow, tree, groups, shape)
    loss, _ = gradient(narrow, tree, groups, same, shape, checkpoint=checkpoint)
    assert loss == pytest.approx(LN2, abs=1e-3)
    other = logps_of(wide, tree, groups, shape)
    pairs = [pair for p, q in zip(same, other, strict=True) for pair in zip(p, q, strict=True)]
    assert max(np.abs(a - b).max() for a, b in pairs) > 1e-3


def test_a_step_without_checkpointing_needs_less_memory():
    """Peak bytes of a step without checkpointing: bf16 adapters leave activations at 2 bytes."""
    groups, shape = random_pairs(1, 128, 128), Shape(128, 128, 1)
    peaks = []
    for adapter_dtype in (None, mx.bfloat16):
        sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
        model, tree = make_llama(mx.bfloat16, **sizes)
        model = replace(model, adapter_dtype=adapter_dtype)
        zeros = [tuple(np.zeros(len(c), np.float32) for c in g.completions) for g in groups]
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        gradient(model, tree, groups, zeros, shape, checkpoint=False)
        peaks.append(mx.get_peak_memory() - before)
        del model, tree
    assert peaks[1] < 0.9 * peaks[0]
