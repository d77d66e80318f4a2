"""The gated delta rule of hybrid models (Qwen3.5, Qwen3-Next, Kimi-Linear …), with a gradient.

For each head, a state S (V, K) is decayed, corrected and read at every token (Yang et al. 2024,
"Gated Delta Networks", eq. 10; Kimi Linear's gates differ between key elements):

    S_t = S_{t−1}·diag(g_t) + u_t·k_tᵀ,   u_t = β_t·(v_t − S_{t−1}·diag(g_t)·k_t),   y_t = S_t·q_t

mlx-lm trains this as a loop over tokens, and keeps every S_t for the backward pass. Here a row is
cut into chunks of `CHUNK` tokens. With Γ_t = g_1⋯g_t since the start of the chunk, and the matrices
A_ts = β_t·Σ_d k_td·k_sd·Γ_td/Γ_sd (s < t) and P_ts = Σ_d q_td·k_sd·Γ_td/Γ_sd (s ≤ t), all tokens of
a chunk follow from its first state S_0 in a few matrix products (their section 3.3):

    U = (I + A)⁻¹·β(V − (Γ∘K)·S_0ᵀ),   Y = (Γ∘Q)·S_0ᵀ + P·U,   S_L = S_0·diag(Γ_L) + Uᵀ·(Γ_L/Γ∘K)

The backward pass is written by hand. It keeps the inputs and the first state of each chunk, and
recomputes one chunk at a time, from the last to the first.

A decay over several tokens is always computed from the gates of those tokens, so it lies in [0, 1]:
a quotient of two products from the start of the chunk would overflow, or lose its digits.

Shape letters: B rows, T tokens, L tokens of a chunk, G heads of queries and keys, H heads of values
(a multiple of G), K and V sizes of their heads; E is 1 if a head has one gate, and K if each key
element has its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_align.models.device import has_metal, on_gpu

# Tokens of a chunk, a power of two. Kept for the backward pass are H·V·K / CHUNK elements of states
# per token; work on the L × L matrices grows with L.
CHUNK = 32

# Gates are at least this, so that their logarithm is finite. No float32 result depends on it: the
# decay over two such gates is 0 or nearly so.
MIN_GATE = 1e-20

# Heads (G, H) and size of a head for which mlx's Metal kernel is built. For others, and with a
# mask, mlx runs the loop over tokens.
KERNEL_HEADS = frozenset({(16, 16), (16, 32), (16, 48), (16, 64), (24, 24), (32, 32)})
KERNEL_SIZE = 128

_custom_function: Any = mx.custom_function  # the stubs lose the signature of what it wraps


def gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """As mlx-lm's `gated_delta_ops`, with a backward pass that needs little memory.

    Computes in float32. On Metal, mlx's kernel does it for the sizes that it is built for.

    Args:
        q: Queries (B, T, G, K), normalised and scaled.
        k: Keys (B, T, G, K), normalised.
        v: Values (B, T, H, V).
        g: Gates (B, T, H) or (B, T, H, K), in [0, 1].
        beta: Rates of correction (B, T, H).
        state: First state (B, H, V, K); None for zeros.
        mask: (B, T); tokens where it is false leave the state as it is.

    Returns:
        The outputs (B, T, H, V) in the dtype of `q`, and the last state (B, H, V, K) in float32.
        Outputs where the mask is false have no meaning.
    """
    batch, _, heads, size = v.shape
    if state is None:
        state = mx.zeros((batch, heads, size, k.shape[-1]), mx.float32)
    if mask is not None:
        kept = mask[..., None]
        beta = mx.where(kept, beta, 0)
        g = mx.where(kept if g.ndim == 3 else kept[..., None], g, 1)
    if _has_kernel(k, v, g):
        # Given bf16, the kernel would round the gates too: 0.998 to 1, at every token.
        arrays = [array.astype(mx.float32) for array in (q, k, v, g, beta, state)]
        y, state = mx.fast.gated_delta_update(*arrays)
        return y.astype(q.dtype), state
    gates = g if g.ndim == 4 else g[..., None]
    y, state, *_ = _chunkwise(q, k, v, gates, beta[..., None], state)
    return y, state


def _has_kernel(k: mx.array, v: mx.array, g: mx.array) -> bool:
    """Whether mlx has a kernel with a backward pass for these shapes on the default device."""
    return (
        g.ndim == 3
        and on_gpu()
        and has_metal()
        and hasattr(mx.fast, "gated_delta_update")
        and (k.shape[2], v.shape[2]) in KERNEL_HEADS
        and k.shape[3] == v.shape[3] == KERNEL_SIZE
    )


# All chunks of a row


@_custom_function
def _chunkwise(
    q: mx.array, k: mx.array, v: mx.array, gates: mx.array, rates: mx.array, state: mx.array
) -> tuple[mx.array, ...]:
    """Outputs, last state, and the first state of every chunk but the first.

    Gates (B, T, H, E) and rates (B, T, H, 1); other shapes are those of `gated_delta_rule`.
    """
    outputs, states = [], [state.astype(mx.float32)]
    for arrays in _split((q, k, v, gates, rates)):
        # Without `depends`, here and in the backward pass, mlx may compute one part of all chunks
        # before the next, and keeps what they have in common: 600 kB per token with 32 heads of
        # size 128 and gates per key element, instead of 141.
        chunk = _Chunk.of(*mx.depends(arrays, [states[-1]]))
        y, after = _forward(chunk, states[-1])
        outputs.append(_tokens_first(y, like=arrays[2]).astype(q.dtype))
        states += mx.depends([after], [outputs[-1]])
    return mx.concatenate(outputs, axis=1), states[-1], *states[1:-1]


@_chunkwise.vjp
def _chunkwise_backward(
    primals: tuple[mx.array, ...],
    cotangents: tuple[mx.array, ...],
    outputs: tuple[mx.array, ...],
) -> tuple[mx.array, ...]:
    *inputs, state = primals
    states = [state.astype(mx.float32), *outputs[2:]]
    grad_state = cotangents[1].astype(mx.float32)
    gradients = []
    for arrays in reversed(_split((*inputs, cotangents[0]))):
        *own, grad_y = mx.depends(arrays, [grad_state])
        grad_y = _heads_first(grad_y, grad_y.shape[2])
        grad_chunk, grad_state = _backward(_Chunk.of(*own), states.pop(), grad_y, grad_state)
        pairs = zip(grad_chunk, own, strict=True)
        gradients.append([_tokens_first(grad, like=array) for grad, array in pairs])
        (grad_state,) = mx.depends([grad_state], gradients[-1])
    parts = zip(*reversed(gradients), strict=True)
    return *(mx.concatenate(list(part), axis=1) for part in parts), grad_state.astype(state.dtype)


def _split(arrays: Sequence[mx.array]) -> list[list[mx.array]]:
    """The chunks of arrays (B, T, …); the last may be shorter."""
    # With mx.split, mlx 0.32.4 can't compile a training step: IndexError, _Map_base::at.
    starts = range(0, arrays[0].shape[1], CHUNK)
    return [[array[:, start : start + CHUNK] for array in arrays] for start in starts]


def _heads_first(array: mx.array, heads: int, padding: float = 0.0) -> mx.array:
    """(B, l, G, X) as (B, `heads`, L, X) in float32; L is the next power of two."""
    length = array.shape[1]
    missing = (1 << (length - 1).bit_length()) - length
    array = mx.repeat(array.astype(mx.float32), heads // array.shape[2], axis=2)
    widths = [(0, 0), (0, 0), (0, missing), (0, 0)]
    return mx.pad(array.swapaxes(1, 2), widths, constant_values=padding)


def _tokens_first(array: mx.array, like: mx.array) -> mx.array:
    """(B, H, L, X) as (B, l, G, X), the shape and dtype of `like`, summed over repeated heads."""
    batch, length, heads, size = like.shape
    array = array[:, :, :length].reshape(batch, heads, -1, length, size).sum(axis=2)
    return array.swapaxes(1, 2).astype(like.dtype)


# One chunk


class _Chunk(NamedTuple):
    """A chunk's arrays in float32, (B, H, L, …). Padding leaves the state as it is.

    Also their gradients.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    gates: mx.array  # (B, H, L, E), at least MIN_GATE
    rates: mx.array  # β (B, H, L, 1)

    @classmethod
    def of(
        cls, queries: mx.array, keys: mx.array, values: mx.array, gates: mx.array, rates: mx.array
    ) -> _Chunk:
        """From arrays (B, l, …) of any dtype."""
        heads = values.shape[2]
        return cls(
            _heads_first(queries, heads),
            _heads_first(keys, heads),
            _heads_first(values, heads),
            _heads_first(mx.maximum(gates, MIN_GATE), heads, padding=1.0),
            _heads_first(rates, heads),
        )


class _Decayed(NamedTuple):
    """The parts of a chunk that follow from its queries, keys and gates alone."""

    queries: mx.array  # Γ∘Q (B, H, L, K)
    keys: mx.array  # Γ∘K
    keys_at_end: mx.array  # Γ_L/Γ∘K
    whole: mx.array  # Γ_L (B, H, 1, E)
    to_queries: mx.array  # P (B, H, L, L)
    to_keys: mx.array  # the same for keys instead of queries, and 0 on the diagonal: A without β


def _forward(chunk: _Chunk, state: mx.array) -> tuple[mx.array, mx.array]:
    """Outputs (B, H, L, V) and the state (B, H, V, K) after the chunk."""
    decayed = _Decayed(*_decay(chunk.queries, chunk.keys, mx.log(chunk.gates)))
    error = chunk.values - decayed.keys @ _transposed(state)
    updates = _inverse(chunk.rates * decayed.to_keys) @ (chunk.rates * error)
    y = decayed.queries @ _transposed(state) + decayed.to_queries @ updates
    return y, state * decayed.whole + _transposed(updates) @ decayed.keys_at_end


def _backward(
    chunk: _Chunk, state: mx.array, grad_y: mx.array, grad_after: mx.array
) -> tuple[_Chunk, mx.array]:
    """Gradients of a chunk's arrays and of its first state, from those of `_forward`'s results."""
    primals = [chunk.queries, chunk.keys, mx.log(chunk.gates)]
    decayed = _Decayed(*_decay(*primals))
    error = chunk.values - decayed.keys @ _transposed(state)
    inverse = _inverse(chunk.rates * decayed.to_keys)
    updates = inverse @ (chunk.rates * error)

    grad_updates = _transposed(decayed.to_queries) @ grad_y
    grad_updates = grad_updates + decayed.keys_at_end @ _transposed(grad_after)
    # updates = (I + A)⁻¹·w gives ∂w = (I + A)⁻ᵀ·∂updates and ∂A = −∂w·updatesᵀ.
    grad_weighted = _transposed(inverse) @ grad_updates
    grad_matrix = -grad_weighted @ _transposed(updates)
    grad_error = chunk.rates * grad_weighted
    grad_whole = (grad_after * state).sum(axis=-2, keepdims=True)
    if decayed.whole.shape[-1] == 1:
        grad_whole = grad_whole.sum(axis=-1, keepdims=True)
    grad_decayed = _Decayed(
        queries=grad_y @ state,
        keys=-grad_error @ state,
        keys_at_end=updates @ grad_after,
        whole=grad_whole,
        to_queries=grad_y @ _transposed(updates),
        to_keys=chunk.rates * grad_matrix,
    )
    _, (grad_queries, grad_keys, grad_log_gates) = mx.vjp(_decay, primals, list(grad_decayed))
    grad_rates = (grad_weighted * error).sum(axis=-1, keepdims=True)
    grad_rates = grad_rates + (grad_matrix * decayed.to_keys).sum(axis=-1, keepdims=True)
    grad_state = grad_after * decayed.whole + _transposed(grad_y) @ decayed.queries
    grad_state = grad_state - _transposed(grad_error) @ decayed.keys
    grad_gates = grad_log_gates / chunk.gates
    return _Chunk(grad_queries, grad_keys, grad_error, grad_gates, grad_rates), grad_state


def _decay(queries: mx.array, keys: mx.array, log_gates: mx.array) -> list[mx.array]:
    """The fields of `_Decayed`."""
    since_start = mx.exp(mx.cumsum(log_gates, axis=-2))
    to_end = mx.exp(mx.cumsum(log_gates, axis=-2, reverse=True, inclusive=False))
    products = _products_by_head if log_gates.shape[-1] == 1 else _products_by_key
    to_queries, to_keys = products(queries, keys, log_gates)
    return [
        since_start * queries,
        since_start * keys,
        to_end * keys,
        since_start[..., -1:, :],
        to_queries,
        to_keys,
    ]


def _products_by_head(
    queries: mx.array, keys: mx.array, log_gates: mx.array
) -> tuple[mx.array, mx.array]:
    """`_Decayed.to_queries` and `to_keys` with one gate per head."""
    position = mx.arange(keys.shape[-2])
    before = position[:, None] > position[None]
    # Row t, column s: the sum of the logarithms from s + 1 to t.
    decay = mx.exp(mx.cumsum(mx.where(before, log_gates, 0), axis=-2))
    to_queries = mx.where(position[:, None] >= position[None], queries @ _transposed(keys), 0)
    to_keys = mx.where(before, keys @ _transposed(keys), 0)
    return to_queries * decay, to_keys * decay


def _products_by_key(
    queries: mx.array, keys: mx.array, log_gates: mx.array
) -> tuple[mx.array, mx.array]:
    """`_Decayed.to_queries` and `to_keys` with a gate per key element.

    The decay from s to t is the one from s to the middle between two halves, times the one from
    there to t: both are at most 1, and the product over key elements stays a matrix product.
    """
    both = mx.stack([queries, keys])
    same = (queries * keys).sum(axis=-1, keepdims=True) * mx.eye(keys.shape[-2])
    products = mx.stack([same, mx.zeros_like(same)])
    for half, across in _halves(keys.shape[-2]):
        by_half = log_gates.reshape(*log_gates.shape[:-2], -1, half, log_gates.shape[-1])
        from_middle = mx.exp(mx.cumsum(by_half, axis=-2)).reshape(keys.shape)
        to_middle = mx.cumsum(by_half, axis=-2, reverse=True, inclusive=False)
        decayed = keys * mx.exp(to_middle).reshape(keys.shape)
        products = products + mx.where(across, (both * from_middle) @ _transposed(decayed), 0)
    return products[0], products[1]


def _inverse(matrix: mx.array) -> mx.array:
    """(I + matrix)⁻¹ of matrices (…, L, L) that are 0 on and above the diagonal.

    Built from the inverses of the diagonal's blocks, which double in size. A series of powers
    would need fewer products, but the powers grow up to 10⁸ where keys repeat, and cancel.
    """
    inverse = mx.broadcast_to(mx.eye(matrix.shape[-1]), matrix.shape)
    for _, across in _halves(matrix.shape[-1]):
        inverse = inverse - inverse @ mx.where(across, matrix, 0) @ inverse
    return inverse


def _halves(length: int) -> Iterator[tuple[int, mx.array]]:
    """Half the size of blocks, and the mask (L, L) of rows in a second half, columns in its first.

    For blocks of 2, 4, … `length`: together, the masks cover all that is below the diagonal.
    """
    half = 1
    while half < length:
        number = mx.arange(length) // half
        yield half, (number[:, None] % 2 == 1) & (number[:, None] == number[None] + 1)
        half *= 2


def _transposed(matrix: mx.array) -> mx.array:
    return matrix.swapaxes(-1, -2)
