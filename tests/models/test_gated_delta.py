"""The chunkwise gated delta rule against mlx-lm's loop over tokens: values, gradients, memory."""

import mlx.core as mx
import mlx_lm.models.gated_delta as mlx_lm_rule
import numpy as np
import pytest
from helpers.families import make_model
from helpers.forward import difference, gradient, plain_logps, ragged_batch, scramble
from mlx.utils import tree_map

from mlx_align.models import gated_delta
from mlx_align.models.adapters import AdapterLayout, install_adapters
from mlx_align.models.backbone import split_backbone
from mlx_align.models.forward import token_logprobs
from mlx_align.models.gated_delta import gated_delta_rule
from mlx_align.models.patches import replace_gated_delta
from mlx_align.models.weights import use_adapter

# The loop of mlx-lm, which a patch replaces while a forward pass runs.
LOOP = mlx_lm_rule.gated_delta_ops
ARGUMENTS = ("q", "k", "v", "g", "beta", "state")


def random_inputs(rows, length, groups, heads, size, value_size=None, *, by_key=False, seed=0):
    """Queries, keys, values, gates, rates and a state, distributed as in a hybrid model."""
    keys = iter(mx.random.split(mx.random.key(seed), 6))
    value_size = value_size or size

    def unit(*shape):
        array = mx.random.normal(shape, key=next(keys))
        return array / mx.linalg.norm(array, axis=-1, keepdims=True)

    gate_shape = (rows, length, heads, size) if by_key else (rows, length, heads)
    return [
        unit(rows, length, groups, size) * size**-0.5,
        unit(rows, length, groups, size),
        mx.random.normal((rows, length, heads, value_size), key=next(keys)),
        mx.sigmoid(2 + 2 * mx.random.normal(gate_shape, key=next(keys))),
        mx.sigmoid(mx.random.normal((rows, length, heads), key=next(keys))),
        0.3 * mx.random.normal((rows, heads, value_size, size), key=next(keys)),
    ]


def results_and_gradients(rule, inputs, mask=None):
    """Outputs where the mask is true, the last state, and the gradients of all inputs."""
    keep = 1 if mask is None else mask[..., None, None]

    def scalar(*arrays):
        y, state = rule(*arrays, mask)
        y = y.astype(mx.float32) * keep
        weights = (
            mx.random.normal(a.shape, key=mx.random.key(i)) for i, a in enumerate((y, state))
        )
        return sum((a * w).sum() for a, w in zip((y, state), weights, strict=True)), (y, state)

    (_, results), grads = mx.value_and_grad(scalar, argnums=list(range(6)))(*inputs)
    mx.eval(results, grads)
    return results, grads


def off(got, expected):
    """‖got − expected‖ / ‖expected‖."""
    got, expected = (np.array(a.astype(mx.float32), np.float64) for a in (got, expected))
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)


def assert_equals_loop(inputs, mask=None, tolerance=5e-6):
    (y, state), grads = results_and_gradients(gated_delta_rule, inputs, mask)
    (expected_y, expected_state), expected = results_and_gradients(LOOP, inputs, mask)
    assert off(y, expected_y) < tolerance
    assert off(state, expected_state) < tolerance
    for name, got, wanted in zip(ARGUMENTS, grads, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert off(got, wanted) < tolerance, name


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 32, 33, 64, 77])
def test_equals_the_loop_at_every_length(length, by_key):
    assert_equals_loop(random_inputs(2, length, 2, 2, 8, 6, by_key=by_key))


@pytest.mark.parametrize("by_key", [False, True])
def test_heads_of_values_share_keys(by_key):
    assert_equals_loop(random_inputs(1, 40, 2, 6, 8, by_key=by_key))


@pytest.mark.parametrize("by_key", [False, True])
def test_ragged_rows_stop_at_their_length(by_key):
    inputs = random_inputs(3, 50, 2, 4, 8, by_key=by_key)
    mask = mx.arange(50) < mx.array([50, 3, 33])[:, None]
    assert_equals_loop(inputs, mask)
    (y, state), _ = results_and_gradients(gated_delta_rule, inputs, mask)
    short = [array[1:2, :3] for array in inputs[:5]]
    expected_y, expected_state = gated_delta_rule(*short, inputs[5][1:2])
    assert off(y[1:2, :3], expected_y) < 1e-6
    assert off(state[1:2], expected_state) < 1e-6


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("strength", ["closed gates", "strong decay", "repeated keys", "no decay"])
def test_extreme_gates_and_keys(strength, by_key):
    inputs = random_inputs(1, 70, 2, 2, 16, by_key=by_key)
    g = inputs[3]
    if strength == "closed gates":
        inputs[3] = mx.where(mx.random.uniform(shape=g.shape, key=mx.random.key(5)) < 0.1, 0, g)
    elif strength == "strong decay":
        inputs[3] = g**30  # down to e^-80 within a few tokens
    else:
        inputs[1] = mx.broadcast_to(inputs[1][:, :1], inputs[1].shape)
        inputs[4] = mx.full(inputs[4].shape, 0.99 if strength == "repeated keys" else 0.5)
        inputs[3] = mx.ones_like(g) if strength == "no decay" else mx.full(g.shape, 0.999)
    assert_equals_loop(inputs, tolerance=2e-5)


@pytest.mark.parametrize("by_key", [False, True])
def test_is_as_exact_as_the_loop(by_key):
    """Both against float64, at the size of a real head."""
    inputs = random_inputs(1, 80, 1, 1, 128, by_key=by_key)

    def exact(q, k, v, g, beta, state, _mask=None):
        outputs = []
        for t in range(q.shape[1]):
            state = state * (g[:, t][..., None, :] if g.ndim == 4 else g[:, t][..., None, None])
            update = beta[:, t][..., None] * (v[:, t] - (state @ k[:, t][..., None])[..., 0])
            state = state + update[..., None] * k[:, t][..., None, :]
            outputs.append((state @ q[:, t][..., None])[..., 0])
        return np.stack(outputs, axis=1), state

    truth = exact(*(np.array(array, np.float64) for array in inputs))
    ours, theirs = gated_delta_rule(*inputs), LOOP(*inputs)
    for got, loop, wanted in zip(ours, theirs, truth, strict=True):
        errors = [np.linalg.norm(np.array(a, np.float64) - wanted) for a in (got, loop)]
        assert errors[0] < 2 * errors[1]


def test_continuing_from_a_state_equals_one_row():
    """Values, and the gradient through the state into the first part."""
    inputs = random_inputs(1, 60, 2, 2, 8)

    def in_two_parts(q, k, v, g, beta, state, mask=None):
        arrays = (q, k, v, g, beta)
        first, state = gated_delta_rule(*(array[:, :23] for array in arrays), state)
        second, state = gated_delta_rule(*(array[:, 23:] for array in arrays), state)
        return mx.concatenate([first, second], axis=1), state

    (y, state), grads = results_and_gradients(in_two_parts, inputs)
    (expected_y, expected_state), expected = results_and_gradients(gated_delta_rule, inputs)
    for got, wanted in zip(
        (y, state, *grads), (expected_y, expected_state, *expected), strict=True
    ):
        assert off(got, wanted) < 3e-6


def test_bf16_inputs_are_computed_in_float32():
    inputs = random_inputs(1, 40, 2, 4, 16)
    narrow = [array.astype(mx.bfloat16) for array in inputs[:3]] + inputs[3:]
    y, state = gated_delta_rule(*narrow)
    expected_y, expected_state = LOOP(*narrow)
    assert (y.dtype, state.dtype) == (mx.bfloat16, mx.float32)
    assert off(y, expected_y) < 1e-3  # a few outputs round to the other of two neighbours
    assert off(state, expected_state) < 1e-6
    grads = results_and_gradients(gated_delta_rule, narrow)[1]
    assert [grad.dtype for grad in grads] == [array.dtype for array in narrow]


def test_compiled_and_without_a_first_state():
    inputs = random_inputs(2, 7, 2, 2, 8)[:5]  # one chunk: every kernel is compiled here

    def loss(rule):
        return lambda *arrays: (rule(*arrays)[0] ** 2).sum()

    got = mx.compile(mx.grad(loss(gated_delta_rule), argnums=[0, 1, 2, 3, 4]))(*inputs)
    expected = mx.grad(loss(LOOP), argnums=[0, 1, 2, 3, 4])(*inputs)
    assert all(off(a, b) < 3e-6 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("by_key", [False, True])
def test_memory_per_token(by_key):
    """At most 0.5 MB per token and layer at the sizes of Qwen3.5-9B and Kimi-Linear."""
    length = 96
    inputs = random_inputs(1, length, 32 if by_key else 16, 32, 128, by_key=by_key)
    mx.eval(inputs)
    gradients = mx.grad(lambda *arrays: (gated_delta_rule(*arrays)[0] ** 2).sum(), argnums=range(6))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradients(*inputs))
    assert (mx.get_peak_memory() - before) / length < 0.5e6


# The patch


def test_the_patch_replaces_mlx_lms_functions_and_puts_them_back():
    kernel = mlx_lm_rule.gated_delta_kernel
    with replace_gated_delta(training=True):
        assert mlx_lm_rule.gated_delta_ops is gated_delta_rule
        assert mlx_lm_rule.gated_delta_kernel is gated_delta_rule
    with replace_gated_delta(training=False):
        assert mlx_lm_rule.gated_delta_ops is gated_delta_rule
        assert mlx_lm_rule.gated_delta_kernel is kernel
    assert mlx_lm_rule.gated_delta_ops is LOOP
    assert mlx_lm_rule.gated_delta_kernel is kernel


@pytest.mark.parametrize("family", ["qwen3_5", "kimi_linear"])
def test_a_training_step_runs_no_loop_over_tokens(family, monkeypatch):
    """Shared prompts longer than a chunk: values and gradients are those of plain rows."""
    model = make_model(family)
    install_adapters(model, AdapterLayout(rank=4))
    scramble(model, 0.2)
    batch = ragged_batch(prompts=(5, 37), completions=((9, 35), (3, 12)))
    model.train()
    value, expected = gradient(model, lambda batch: plain_logps(model, batch), batch)

    def fail(*_arguments, **_options):
        raise AssertionError("a loop over tokens")

    monkeypatch.setattr(mlx_lm_rule, "_gated_delta_step_ops", fail)
    backbone = split_backbone(model)
    for checkpoint in (False, True):
        got_value, got = gradient(
            model, lambda b, c=checkpoint: token_logprobs(backbone, b, grad_checkpoint=c), batch
        )
        assert got_value == pytest.approx(value, rel=2e-5)
        assert difference(got, expected) < 2e-5


def test_a_training_step_of_several_chunks_compiles():
    """It is traced, not run: compiling its kernels would take most of a minute."""
    model = make_model("qwen3_5")
    install_adapters(model, AdapterLayout(rank=4))
    model.train()
    backbone, batch = split_backbone(model), ragged_batch(prompts=(5,), completions=((40, 35),))

    def loss(tree, batch):
        with use_adapter(model, tree):
            return token_logprobs(backbone, batch, grad_checkpoint=True).sum()

    weights = model.trainable_parameters()
    value, grads = mx.compile(mx.value_and_grad(loss))(weights, batch)
    assert value.shape == ()
    assert tree_map(lambda array: array.shape, grads) == tree_map(lambda a: a.shape, weights)


# mlx's kernel


@pytest.fixture
def recorded_kernel(monkeypatch):
    """mlx's kernel on a GPU, as it would be called: here mlx computes it as a loop."""
    calls = []
    loop = mx.fast.gated_delta_update

    def record(*arrays):
        calls.append(arrays)
        return loop(*arrays)

    monkeypatch.setattr(mx.fast, "gated_delta_update", record)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    return calls


def test_metal_uses_mlxs_kernel_where_it_is_built(recorded_kernel):
    inputs = random_inputs(1, 9, 16, 32, 128)
    narrow = [array.astype(mx.bfloat16) for array in inputs[:3]] + inputs[3:]
    y, state = gated_delta_rule(*narrow)
    assert len(recorded_kernel) == 1
    # A mask would make mlx run its loop, and 16 bits would round the gates.
    assert [array.dtype for array in recorded_kernel[0]] == [mx.float32] * 6
    expected_y, expected_state = LOOP(*narrow)
    assert y.dtype == mx.bfloat16
    assert off(y, expected_y) < 1e-3
    assert off(state, expected_state) < 1e-6
    mask = mx.arange(9)[None] < 5
    y, state = gated_delta_rule(*inputs, mask)
    assert len(recorded_kernel) == 2
    assert len(recorded_kernel[1]) == 6
    expected_y, expected_state = LOOP(*inputs, mask)
    assert off(y[:, :5], expected_y[:, :5]) < 1e-6
    assert off(state, expected_state) < 1e-6


def test_other_shapes_and_devices_run_in_chunks(recorded_kernel, monkeypatch):
    gated_delta_rule(*random_inputs(1, 9, 16, 32, 64))  # size of a head
    gated_delta_rule(*random_inputs(1, 9, 8, 32, 128))  # heads
    gated_delta_rule(*random_inputs(1, 9, 32, 32, 128, by_key=True))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)  # CUDA
    gated_delta_rule(*random_inputs(1, 9, 16, 32, 128))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.delattr(mx.fast, "gated_delta_update")
    gated_delta_rule(*random_inputs(1, 9, 16, 32, 128))
    assert recorded_kernel == []


def test_chunks_of_any_power_of_two_agree(monkeypatch):
    inputs = random_inputs(1, 50, 2, 2, 8, by_key=True)
    (expected, _), expected_grads = results_and_gradients(gated_delta_rule, inputs)
    monkeypatch.setattr(gated_delta, "CHUNK", 8)
    (y, _), grads = results_and_gradients(gated_delta_rule, inputs)
    assert off(y, expected) < 1e-6
    assert all(off(a, b) < 3e-6 for a, b in zip(grads, expected_grads, strict=True))
