"""Every patch of mlx and mlx-lm, and every workaround for one of their functions.

Written against mlx 0.32 and mlx-lm 0.32, to which pyproject.toml pins this package: check this file
first when either is upgraded. No patch is made on import. All but the last are context managers
that are active while a forward pass runs or is traced; `apply_patches` combines those of a normal
one.

Patched:

- `mx.fast.scaled_dot_product_attention`, by `replace_attention`: mlx keeps the whole score matrix
  for the backward pass and needs the prompt's keys copied for every completion. `attention.py`
  does neither. `float32_attention` patches it too, for the check at load. On a GPU,
  `replace_attention_on_gpu` passes all calls to `gpu_attention.py`.
- `create_attention_mask` in mlx-lm's model files, by `describe_masks` on a GPU: an array for a
  sliding window has an entry for every query and key. So have the scores that the attention of
  gemma2, deepseek_v3, glm4_moe_lite and kimi_linear computes itself: its `__call__` is replaced
  there too.
- `mx.default_device` and `mx.metal.is_available`, by `without_custom_kernels` while training on a
  GPU: mlx-lm chooses Metal kernels that have no gradient (rwkv7; mamba2 for a single token).
- `mx.fast.rope`, by `rope_per_token`: mlx accepts one offset per row, a packed row needs one per
  token.
- `gated_delta_ops` of mlx-lm, by `replace_gated_delta`: a loop over tokens, which keeps every
  token's state for the backward pass. `gated_delta.py` keeps one in 32. While training, the kernel
  of mlx-lm too: it has no backward pass.
- `swiglu` in mlx-lm's model files, by `replace_swiglu`: mlx's gradient keeps one more array of the
  MLP's width per block.
- `__call__` of the block classes, by `wrap_blocks`: mlx-lm's own gradient checkpointing loses the
  gradient through a shared prompt.
- the backbone of one model object, by `replace_backbone`: to run the vocabulary head alone, with
  the model's own code.
- the class of the MLPs of one model object, by `use_activation` when it is loaded: gemma,
  starcoder2, gpt_neox and gpt_bigcode compute another form of GELU than their configuration names.

Worked around without a patch:

- `mx.exp`, `mx.sigmoid` and `mx.logsumexp` on CPUs other than Apple's (`exp` and others).
- assignment to `mx.random.state`, which is silently wrong (`restore_random_key`).
- the tiles of mlx's attention gradient on Metal (`limit_attention_tiles`).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import (
    activations,
    base,
    deepseek_v3,
    gated_delta,
    gemma,
    gemma2,
    gemma3_text,
    glm4_moe_lite,
    gpt2,
    gpt_bigcode,
    gpt_neox,
    gptj,
    kimi_linear,
    llama4,
    phi,
    starcoder2,
)

from mlx_align.models.device import on_gpu
from mlx_align.models.gated_delta import gated_delta_rule

_custom_function: Any = mx.custom_function  # the stubs lose the signature of what it wraps

# Queries and keys of a tile of mlx's attention gradient on Metal, at most.
ATTENTION_TILE = 512

# (queries, keys, values, scale) -> attention output, or None to let mlx compute it.
Attention = Callable[[mx.array, mx.array, mx.array, float], mx.array | None]
# (queries, keys, values, scale, mask, sinks, softcap, mlx's own function) -> attention output.
GpuAttention = Callable[..., mx.array]


@contextmanager
def apply_patches(
    model: nn.Module, attention: Attention, *, packed: bool = False
) -> Iterator[None]:
    """Within the block, `model` runs with this package's replacements, on a CPU.

    Args:
        model: The mlx-lm model, any of the supported families.
        attention: Computes causal attention (see `replace_attention`).
        packed: Whether rows hold several prompts or completions, each with its own positions.
    """
    rope = rope_per_token() if packed else nullcontext()
    recurrence = replace_gated_delta(training=model.training)
    with rope, replace_attention(attention), replace_swiglu(model), recurrence:
        yield


@contextmanager
def apply_gpu_patches(
    model: nn.Module, attention: GpuAttention, *, packed: bool = False
) -> Iterator[None]:
    """As `apply_patches`, on a GPU; `attention` gets every call of mlx's attention."""
    limit_attention_tiles()
    rope = rope_per_token() if packed else nullcontext()
    kernels = without_custom_kernels() if model.training else nullcontext()
    calls, masks = replace_attention_on_gpu(attention), describe_masks(model)
    recurrence = replace_gated_delta(training=model.training)
    with rope, kernels, masks, calls, replace_swiglu(model), recurrence:
        yield


# Attention


@contextmanager
def replace_attention(attention: Attention) -> Iterator[None]:
    """Within the block, `attention` replaces mlx's attention for calls with a causal mask.

    Other calls (with an array as mask, or with attention sinks) use mlx's attention.
    """
    original = mx.fast.scaled_dot_product_attention

    def dispatch(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **others: Any
    ) -> mx.array:
        if isinstance(mask, str) and all(value is None for value in others.values()):
            out = attention(q, k, v, scale)
            if out is not None:
                return out
        return original(q, k, v, scale=scale, mask=mask, **others)

    with _scaled_dot_product_attention(dispatch):
        yield


@contextmanager
def replace_attention_on_gpu(attention: GpuAttention) -> Iterator[None]:
    """Within the block, `attention` replaces mlx's attention, whose own function it is given."""
    original = mx.fast.scaled_dot_product_attention

    def dispatch(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        mask: Any = None,
        sinks: mx.array | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> mx.array:
        return attention(q, k, v, scale, mask, sinks, softcap, partial(original, **others))

    with _scaled_dot_product_attention(dispatch):
        yield


class CausalMask(str):
    """The mask "causal" with what else mlx would need an array for.

    Attributes:
        window: Number of keys that a query sees, its own included; None for all.
        prompt_lengths: For completions behind their prompts, (B,): the first keys are the
            prompt's, and padding from its length on.
        chunk: A query sees only keys of the same chunk of this many tokens (llama4); None for all.
    """

    window: int | None
    prompt_lengths: mx.array | None
    chunk: int | None

    def __new__(
        cls,
        window: int | None,
        prompt_lengths: mx.array | None = None,
        chunk: int | None = None,
    ) -> CausalMask:
        """A string that equals "causal"."""
        mask = super().__new__(cls, "causal")
        mask.window, mask.prompt_lengths, mask.chunk = window, prompt_lengths, chunk
        return mask


@contextmanager
def describe_masks(model: nn.Module) -> Iterator[None]:
    """Within the block, the model files of `model` get a `CausalMask` for rows without a cache."""
    original = base.create_attention_mask

    def create(
        h: mx.array,
        cache: Any = None,
        window_size: int | None = None,
        return_array: bool = False,
    ) -> Any:
        # The replaced classes need no array, although their own code does.
        return_array = return_array and not replaced
        if cache is not None or return_array or h.shape[1] == 1:
            return original(h, cache, window_size=window_size, return_array=return_array)
        return CausalMask(window_size)

    replaced = [kind for kind in {type(module) for module in model.modules()} if kind in _REPLACED]
    calls: Any = {kind: kind.__call__ for kind in replaced}
    for kind in replaced:
        kind.__call__ = _REPLACED[kind]
    try:
        with _in_model_files(model, "create_attention_mask", original, create):
            yield
    finally:
        for kind, call in calls.items():
            kind.__call__ = call


def _gemma2_attention(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """gemma2's attention, with its soft cap passed on instead of applied to all scores."""
    rows, length, _ = x.shape
    queries = self.q_proj(x).reshape(rows, length, self.n_heads, -1).transpose(0, 2, 1, 3)
    keys = self.k_proj(x).reshape(rows, length, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
    values = self.v_proj(x).reshape(rows, length, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
    offset = 0 if cache is None else cache.offset
    queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
    if cache is not None:
        keys, values = cache.update_and_fetch(keys, values)
    attention: Any = mx.fast.scaled_dot_product_attention
    out = attention(
        queries, keys, values, scale=self.scale, mask=mask, softcap=self.attn_logit_softcapping
    )
    return self.o_proj(out.transpose(0, 2, 1, 3).reshape(rows, length, -1))


def _latent_attention(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """Latent attention of the deepseek_v3 kind, without the scores of the rotated part as a mask.

    The rotated parts are appended to queries and keys instead: one product gives both scores.
    """
    rows, length, _ = x.shape
    if getattr(self, "q_lora_rank", None) is None:
        queries = self.q_proj(x)
    else:
        queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
    queries = queries.reshape(rows, length, self.num_heads, self.q_head_dim).transpose(0, 2, 1, 3)
    plain, rotated = mx.split(queries, [self.qk_nope_head_dim], axis=-1)
    compressed, rotated_keys = mx.split(self.kv_a_proj_with_mqa(x), [self.kv_lora_rank], axis=-1)
    latent = mx.expand_dims(self.kv_a_layernorm(compressed), axis=1)
    rotated_keys = mx.expand_dims(rotated_keys, axis=1)
    if hasattr(self, "rope"):  # kimi_linear rotates nothing
        offset = 0 if cache is None else cache.offset
        rotated, rotated_keys = self.rope(rotated, offset), self.rope(rotated_keys, offset)
    if cache is not None:
        latent, rotated_keys = cache.update_and_fetch(latent, rotated_keys)
    keys, values = self.embed_q(latent, transpose=False), self.unembed_out(latent)
    rotated_keys = mx.broadcast_to(rotated_keys, (*keys.shape[:3], rotated_keys.shape[-1]))
    out = mx.fast.scaled_dot_product_attention(
        mx.concatenate([plain, rotated], axis=-1),
        mx.concatenate([keys, rotated_keys], axis=-1),
        values,
        scale=self.scale,
        mask=mask,
    )
    return self.o_proj(out.transpose(0, 2, 1, 3).reshape(rows, length, -1))


def _llama4_blocks(self: Any, inputs: mx.array, cache: Any = None) -> mx.array:
    """llama4's blocks on rows without a cache; three of four attend within chunks of tokens."""
    if cache is not None:
        original: Callable[..., mx.array] = _LLAMA4_BLOCKS
        return original(self, inputs, cache)
    h = self.embed_tokens(inputs)
    chunked = CausalMask(None, chunk=self.attention_chunk_size)
    for number, layer in enumerate(self.layers, start=1):
        h = layer(h, chunked if number % 4 else CausalMask(None), cache=None)
    return self.norm(h)


_LLAMA4_BLOCKS: Any = llama4.LlamaModel.__call__
# Classes of mlx-lm that compute a score, or a mask, for every query and key themselves.
_REPLACED: dict[Any, Callable[..., mx.array]] = {
    gemma2.Attention: _gemma2_attention,
    deepseek_v3.DeepseekV3Attention: _latent_attention,
    glm4_moe_lite.Glm4MoeLiteAttention: _latent_attention,
    kimi_linear.KimiMLAAttention: _latent_attention,
    llama4.LlamaModel: _llama4_blocks,
}


def limit_attention_tiles() -> None:
    """Let mlx's attention gradient hold 512 × 512 scores per head at a time on Metal.

    By default it holds three tiles of 1,024 × 1,024: 350 MB for a pair and 28 heads in 16 bits,
    a quarter of that with this setting, which mlx 0.32.4 reads from the environment.
    """
    os.environ.setdefault("MLX_SDPA_VJP_BLOCK", str(ATTENTION_TILE))


@contextmanager
def without_custom_kernels() -> Iterator[None]:
    """Within the block, mlx-lm's code takes operations that have a gradient, not Metal kernels."""
    available: Any = mx.metal.is_available
    device: Any = mx.default_device
    no_metal: Any = lambda: False  # noqa: E731
    cpu: Any = lambda: mx.Device(mx.cpu)  # noqa: E731
    # Where `device.py` finds the real ones.
    no_metal.hidden, cpu.hidden = (getattr(f, "hidden", f) for f in (available, device))
    mx.metal.is_available, mx.default_device = no_metal, cpu
    try:
        yield
    finally:
        mx.metal.is_available, mx.default_device = available, device


@contextmanager
def float32_attention() -> Iterator[None]:
    """Within the block, mlx's attention computes in float32 for inputs of any dtype."""
    original = mx.fast.scaled_dot_product_attention

    def attention(q: mx.array, k: mx.array, v: mx.array, **others: Any) -> mx.array:
        wide = (array.astype(mx.float32) for array in (q, k, v))
        return original(*wide, **others).astype(q.dtype)

    with _scaled_dot_product_attention(attention):
        yield


@contextmanager
def _scaled_dot_product_attention(replacement: Any) -> Iterator[None]:
    original = mx.fast.scaled_dot_product_attention
    mx.fast.scaled_dot_product_attention = replacement
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = original


# Rotary embeddings


@contextmanager
def rope_per_token() -> Iterator[None]:
    """Within the block, `mx.fast.rope` accepts one offset per token (T,) for a single row."""
    original = mx.fast.rope

    def rope(a: mx.array, *args: Any, offset: Any, **others: Any) -> mx.array:
        if not (isinstance(offset, mx.array) and offset.ndim == 1 and a.shape[0] == 1):
            return original(a, *args, offset=offset, **others)
        # mlx accepts one offset per row, so each token becomes a row.
        by_token = a.transpose(2, 1, 0, 3)
        return original(by_token, *args, offset=offset, **others).transpose(2, 1, 0, 3)

    mx.fast.rope = rope
    try:
        yield
    finally:
        mx.fast.rope = original


# SwiGLU


@_custom_function
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) · x, elementwise, with a gradient that keeps its two inputs only.

    mlx's own gradient also keeps silu(gate), one of the five arrays of the MLP's width that a block
    keeps for its backward pass. Here the backward pass recomputes it. (mlx's compiler recognises
    that both passes compute the same sigmoid, and still keeps that one.)
    """
    return gate * sigmoid(gate) * x


@swiglu.vjp
def _swiglu_backward(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _output: mx.array
) -> tuple[mx.array, mx.array]:
    gate, x = primals
    gated = sigmoid(gate)
    silu = gate * gated
    return cotangent * x * (gated + silu * (1 - gated)), cotangent * silu


@contextmanager
def replace_swiglu(model: nn.Module) -> Iterator[None]:
    """Within the block, the model files of `model` that call mlx-lm's `swiglu` call this one."""
    with _in_model_files(model, "swiglu", activations.swiglu, swiglu):
        yield


@contextmanager
def _in_model_files(model: nn.Module, name: str, original: Any, replacement: Any) -> Iterator[None]:
    """Within the block, the files of `model`'s modules that import `original` use `replacement`."""
    files: set[Any] = {sys.modules[type(module).__module__] for module in model.modules()}
    callers = [file for file in files if getattr(file, name, None) is original]
    for file in callers:
        setattr(file, name, replacement)
    try:
        yield
    finally:
        for file in callers:
            setattr(file, name, original)


# Activations

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    **dict.fromkeys(("gelu", "gelu_python"), nn.gelu),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"), nn.gelu_approx),
    **dict.fromkeys(("gelu_fast", "gelu_accurate"), nn.gelu_approx),
    "quick_gelu": nn.gelu_fast_approx,
    **dict.fromkeys(("silu", "swish"), nn.silu),
    "relu": nn.relu,
    "relu2": nn.relu2,
}
# MLPs whose activation can be replaced, with what mlx-lm computes there, and their projections:
# the gate, the one behind the activation, and the one that the gate is multiplied by, if any.
_MLPS: dict[Any, tuple[Callable[[mx.array], mx.array], str, str, str | None]] = {
    gemma.MLP: (nn.gelu, "gate_proj", "down_proj", "up_proj"),
    gemma2.MLP: (nn.gelu_approx, "gate_proj", "down_proj", "up_proj"),
    gemma3_text.MLP: (nn.gelu_approx, "gate_proj", "down_proj", "up_proj"),
    gpt2.MLP: (nn.gelu_approx, "c_fc", "c_proj", None),
    gpt_bigcode.MLP: (nn.gelu, "c_fc", "c_proj", None),
    gpt_neox.MLP: (nn.gelu_approx, "dense_h_to_4h", "dense_4h_to_h", None),
    gptj.GPTJMLP: (nn.gelu_approx, "fc_in", "fc_out", None),
    phi.PhiMLP: (nn.gelu_approx, "fc1", "fc2", None),
    starcoder2.MLP: (nn.gelu, "c_fc", "c_proj", None),
}


def use_activation(model: nn.Module, name: str) -> None:
    """Let the MLPs of `model` compute the activation that its configuration names.

    Those of `_MLPS` only. An MLP that computes it already keeps its class.
    """
    activation = ACTIVATIONS[name]
    for module in model.modules():
        found = _MLPS.get(type(module))
        if found is not None and found[0] is not activation:
            kind: Any = type(module)
            module.__class__ = _mlp_class(kind, name)


@cache
def _mlp_class(kind: Any, name: str) -> Any:
    activation = ACTIVATIONS[name]
    _, first, last, other = _MLPS[kind]

    def call(self: Any, x: mx.array) -> mx.array:
        hidden = activation(self[first](x))
        if other is not None:
            hidden = hidden * self[other](x)
        out: mx.array = self[last](hidden)
        return out

    # The same module: patches of a model's files find them by its modules' classes.
    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


# Gated delta rule


@contextmanager
def replace_gated_delta(*, training: bool) -> Iterator[None]:
    """Within the block, mlx-lm's hybrid models compute the gated delta rule chunk by chunk.

    Args:
        training: Whether there will be a backward pass. Without one, GPUs use mlx-lm's kernel.
    """
    names = ["gated_delta_ops", "gated_delta_kernel"] if training else ["gated_delta_ops"]
    originals = {name: getattr(gated_delta, name) for name in names}
    for name in names:
        setattr(gated_delta, name, gated_delta_rule)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gated_delta, name, original)


# Parts of a model


@contextmanager
def wrap_blocks(model: nn.Module, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block, the `__call__` of every layer of `model` is `wrap(__call__)`."""
    kinds = {type(layer) for layer in model.layers}
    originals = {kind: kind.__call__ for kind in kinds}
    for kind, call in originals.items():
        kind.__call__ = wrap(call)
    try:
        yield
    finally:
        for kind, call in originals.items():
            kind.__call__ = call


@contextmanager
def replace_backbone(owner: nn.Module, name: str, hidden: mx.array) -> Iterator[None]:
    """Within the block, the submodule `name` of `owner` returns `hidden` instead of running."""
    # An instance attribute shadows the submodule without changing the module's dictionary, so
    # the order of its parameters, and with it the inputs of compiled functions, stays the same.
    owner.__dict__[name] = _FixedOutput(owner[name], hidden)
    try:
        yield
    finally:
        del owner.__dict__[name]


class _FixedOutput:
    """Returns `output` when called; has all other attributes of `module`."""

    def __init__(self, module: nn.Module, output: mx.array) -> None:
        self._module = module
        self._output = output

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


# Exponentials
#
# mlx's CPU kernels for processors other than Apple's compute e^x from a polynomial whose
# multiply-adds are calls into the C library: 15 to 22 ns per element, where the C library's own
# power takes 6 (x86-64, mlx 0.32.4, one core). In a DPO step of 34M parameters with a vocabulary
# of 32,000 that was two fifths of the time. GPUs and Apple's processors use mlx's own functions.

# False to use mlx's functions on all processors, as `scripts/bench.py` does: nothing else depends
# on it.
EXPONENTIAL_BY_POWER = True


def exp(x: mx.array) -> mx.array:
    """e^x, elementwise, of float32. As a power, exact to 3e-8·|x| + 1e-7 of its value."""
    # The float32 nearest to e is 3e-8 too small; 2^(x·log₂e) would have twice that rounding error.
    return mx.power(mx.array(math.e), x) if _by_power() else mx.exp(x)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^−x), elementwise."""
    if not _by_power():
        return mx.sigmoid(x)
    return (1 / (1 + exp(-x.astype(mx.float32)))).astype(x.dtype)


def logsumexp(x: mx.array) -> mx.array:
    """Logarithm of Σ e^x over the last axis, of float32."""
    if not _by_power():
        return mx.logsumexp(x, axis=-1)
    top = mx.stop_gradient(x.max(axis=-1, keepdims=True))
    return top[..., 0] + mx.log(exp(x - top).sum(axis=-1))


def _by_power() -> bool:
    return EXPONENTIAL_BY_POWER and sys.platform != "darwin" and not on_gpu()


# Random state


def random_key() -> tuple[int, int]:
    """The two words of the global generator's state, for `restore_random_key`."""
    state: Any = mx.random.state  # a list of one key, which the stubs call an object
    high, low = state[0].tolist()
    return high, low


def restore_random_key(high: int, low: int) -> None:
    """Set the global generator's state: assigning to `mx.random.state` is silently wrong."""
    mx.random.seed((high << 32) | low)
