"""Verification at load: are shared prompts and the chunked head exact for this model?

On random tokens, the log-probs of full rows through the chunked head are compared with the model's
own logits, and those of completions that share a prompt, or are packed, with full rows. The
tolerance comes from rounding in the model's dtype, measured in two ways: as the difference between
two paddings of the same rows, and between the model's attention in its dtype and in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from mlx_align.errors import ModelError
from mlx_align.models.backbone import Backbone
from mlx_align.models.device import on_gpu
from mlx_align.models.forward import full_rows, token_logprobs
from mlx_align.models.patches import (
    float32_attention,
    random_key,
    restore_random_key,
)
from mlx_align.models.weights import use_adapter
from mlx_align.types import GroupBatch, Packing

# Log-probs may differ by at most this multiple of the measured rounding error …
TOLERANCE = 3.0
# … or by this fraction of the largest log-prob, if that is more: float32 is not more exact than
# that. In 16 bits it is half a unit in the last place of a logit. Errors in a forward pass changed
# log-probs by 0.3 to 17 nats.
FLOOR = 1e-5
FLOOR_16_BIT = 2e-3
# Two ways to compute attention may change a gradient by this fraction. In bf16 and 4-bit they
# differ by some percent (float32: 1e-6); a wrong gradient differs by its whole size.
GRADIENT_TOLERANCE = 0.2

# Exceptions of mlx-lm's code when it is called in a way that a family does not support.
_FAILURES = (TypeError, AttributeError, ValueError, RuntimeError, IndexError, KeyError)

_PROMPT_LENGTHS = (5, 9)
_COMPLETION_LENGTHS = (7, 3, 4, 6)


def verify_forward(backbone: Backbone, vocab_size: int) -> tuple[Backbone, bool, str]:
    """Find the settings with which the forward pass is exact for this model.

    Returns:
        The backbone with its settings (mask axes, caches, packing), whether completions may share
        their prompt, and the findings as a sentence for the user.

    Raises:
        ModelError: Even full rows through the chunked head disagree with the model's own logits.
    """
    narrow, wide = random_batch(vocab_size, pad=0), random_batch(vocab_size, pad=6)
    try:
        own, dtype = _model_logprobs(backbone, narrow)
        if np.isnan(np.array(own)).any():
            raise ModelError(
                f"the model's own logits are NaN (in {str(dtype).removeprefix('mlx.core.')}): its "
                "weights are damaged, or too large for their type"
            )
        with float32_attention():
            rounding = _max_difference(_model_logprobs(backbone, narrow)[0], own)
        floor = (FLOOR if dtype == mx.float32 else FLOOR_16_BIT) * max(1.0, _max_magnitude(own))
        min_tolerance = max(TOLERANCE * rounding, floor)
        full, allowed = _full_row_logprobs(backbone, narrow, wide, min_tolerance)
        if not _max_difference(full, own) <= allowed:
            backbone = replace(backbone, flat_caches=True)
            full, allowed = _full_row_logprobs(backbone, narrow, wide, min_tolerance)
    except (ModelError, *_FAILURES) as error:
        raise ModelError(f"this model is not supported: {_first_line(error)}") from error
    own_gap = _max_difference(full, own)
    if not own_gap <= allowed:
        raise ModelError(
            f"this model family is not supported: log-probs of the chunked vocabulary head differ "
            f"from the model's own by {own_gap:.2g} nats ({allowed:.2g} allowed)"
        )
    reason = ""
    for mask_axes in (0, 1, 2):
        candidate = replace(backbone, mask_axes=mask_axes)
        try:
            gaps = [
                _max_difference(
                    token_logprobs(candidate, narrow, shared=True, grad_checkpoint=checkpoint), full
                )
                for checkpoint in (False, True)
            ]
        except ModelError as error:
            reason = reason or str(error)
            continue
        except _FAILURES as error:
            reason = reason or f"its code can't run them together ({_first_line(error)})"
            continue
        gap = max(gaps)
        if gap <= allowed:
            note = f"prompts are shared (verified against full rows: within {gap:.1e} nats)"
            failure = _packing_failure(candidate, narrow, full, allowed)
            note += f"; rows are padded, not packed: {failure}" if failure else ""
            return replace(candidate, packs=not failure), True, note
        reason = f"sharing changes log-probs by {gap:.2g} nats, {allowed:.2g} allowed"
    return backbone, False, f"prompts are run once per completion: {reason}"


def _packing_failure(backbone: Backbone, narrow: GroupBatch, full: mx.array, allowed: float) -> str:
    """The reason why the groups of a batch can't run in one row; "" if they can.

    If a token attended to one of another group, its log-prob would change.
    """
    batch = packed_batch(narrow, pad=3)
    try:
        gap = max(
            _max_difference(token_logprobs(backbone, batch, grad_checkpoint=checkpoint), full)
            for checkpoint in (False, True)
        )
    except ModelError as error:
        return str(error)
    except _FAILURES as error:
        return f"its code can't run them in one row ({_first_line(error)})"
    if not gap <= allowed:
        return f"packing changes log-probs by {gap:.2g} nats, {allowed:.2g} allowed"
    return ""


def packed_batch(batch: GroupBatch, pad: int) -> GroupBatch:
    """Pack the groups of a padded batch, with `pad` tokens of padding at the end of each row."""
    prompts = np.array(batch.prompt_lengths)
    lengths = np.array(batch.completion_mask).sum(axis=1)
    tokens, place = np.array(batch.completion_tokens), np.zeros(batch.completion_mask.shape)
    for n, length in enumerate(lengths):
        place[n, :length] = lengths[:n].sum() + np.arange(length)
    row = [np.array(batch.prompt_tokens)[b, :length] for b, length in enumerate(prompts)]
    number = np.repeat(np.arange(len(lengths)), lengths)
    packing = Packing(
        tokens=_row([tokens[n, :length] for n, length in enumerate(lengths)], pad),
        completion=_row([number, np.full(pad, -1)], 0),
        step=_row([np.arange(length) for length in lengths], pad),
        place=mx.array(place.astype(np.int32)),
    )
    return batch._replace(prompt_tokens=_row(row, pad)[None], packing=packing)


def _row(parts: Sequence[npt.NDArray[Any]], pad: int) -> mx.array:
    return mx.array(np.pad(np.concatenate(parts), (0, pad)).astype(np.int32))


def verify_adapters(backbone: Backbone, vocab_size: int) -> None:
    """Run a few tokens through a model with adapters installed.

    Raises:
        ModelError: The model's code fails: it reads the weights of an adapted layer directly.
    """
    try:
        mx.eval(token_logprobs(backbone, random_batch(vocab_size, pad=0), shared=False))
    except _FAILURES as error:
        raise ModelError(
            f"this model does not run with these adapters ({_first_line(error)}); choose the "
            "layers to adapt with --lora-keys, for example self_attn.q_proj,self_attn.v_proj"
        ) from error


def verify_gradient(backbone: Backbone, vocab_size: int) -> Backbone:
    """On a GPU, compute one small gradient with mlx's attention kernel and one without it.

    Returns:
        The backbone; without the kernel if it fails on this device or its gradient is different.

    Raises:
        ModelError: The model's code has no gradient on a GPU: it calls a kernel without one.
    """
    if not on_gpu():
        return backbone
    in_blocks = replace(backbone, fused=False)
    training = backbone.model.training
    backbone.model.train()
    try:
        expected = _gradient(in_blocks, vocab_size)
        try:
            gap = _relative_difference(_gradient(backbone, vocab_size), expected)
        except _FAILURES:
            return in_blocks
    except _FAILURES as error:
        raise ModelError(
            f"this model can't be trained on a GPU: its code has no gradient there "
            f"({_first_line(error)})"
        ) from error
    finally:
        backbone.model.train(training)
    return backbone if gap <= GRADIENT_TOLERANCE else in_blocks


def _gradient(backbone: Backbone, vocab_size: int) -> list[npt.NDArray[np.float32]]:
    """Gradient of the first trained block, through all later ones, with the same dropout always."""
    batch = random_batch(vocab_size, pad=0)
    trained = [layer for layer in backbone.model.layers if tree_flatten(_trainable(layer))]
    if not trained:
        return []

    def total(weights: Any) -> mx.array:
        with use_adapter(trained[0], weights):
            return token_logprobs(backbone, batch, shared=False).sum()

    key = random_key()
    gradient = mx.grad(total)(_trainable(trained[0]))
    arrays = [np.array(array.astype(mx.float32)) for _, array in tree_flatten(gradient)]
    restore_random_key(*key)
    return arrays


def _trainable(layer: Any) -> Any:
    return layer.trainable_parameters()


def _relative_difference(
    a: Sequence[npt.NDArray[np.float32]], b: Sequence[npt.NDArray[np.float32]]
) -> float:
    square = sum(float(((x - y) ** 2).sum()) for x, y in zip(a, b, strict=True))
    norm = sum(float((y**2).sum()) for y in b)
    return (square / norm) ** 0.5 if norm else 0.0


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def random_batch(vocab_size: int, pad: int) -> GroupBatch:
    """Two prompts of different lengths with two completions each; the same tokens for any `pad`."""
    key = mx.random.key(0)
    high = max(2, min(vocab_size, 32_000))
    width = max(_COMPLETION_LENGTHS) + pad
    tokens = mx.random.randint(1, high, (6, 16), key=key)
    lengths = mx.array(_COMPLETION_LENGTHS)
    return GroupBatch(
        prompt_tokens=mx.pad(tokens[:2, : max(_PROMPT_LENGTHS)], [(0, 0), (0, pad)]),
        prompt_lengths=mx.array(_PROMPT_LENGTHS),
        completion_tokens=mx.pad(tokens[2:, : max(_COMPLETION_LENGTHS)], [(0, 0), (0, pad)]),
        completion_mask=mx.arange(width)[None] < lengths[:, None],
    )


def _full_row_logprobs(
    backbone: Backbone, narrow: GroupBatch, wide: GroupBatch, min_tolerance: float
) -> tuple[mx.array, float]:
    """Log-probs (N, C) of full rows, and the tolerance in nats, `min_tolerance` or more."""
    full = token_logprobs(backbone, narrow, shared=False)
    padded = token_logprobs(backbone, wide, shared=False)[:, : full.shape[1]]
    return full, max(TOLERANCE * _max_difference(full, padded), min_tolerance)


def _model_logprobs(backbone: Backbone, batch: GroupBatch) -> tuple[mx.array, mx.Dtype]:
    """Log-probs (N, C) from the model's own logits when it generates, and the logits' dtype."""
    rows, starts = full_rows(batch)
    raw = backbone.generation_logits(rows)
    logits = raw.astype(mx.float32)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    positions = starts[:, None] - 1 + mx.arange(batch.completion_tokens.shape[1])[None]
    token_logps = mx.take_along_axis(logps, positions[..., None], axis=1)
    token_logps = mx.take_along_axis(token_logps, batch.completion_tokens[..., None], axis=-1)[
        ..., 0
    ]
    return mx.where(batch.completion_mask, token_logps, 0), raw.dtype


def _max_difference(a: mx.array, b: mx.array) -> float:
    return float(np.abs(np.array(a) - np.array(b)).max())


def _max_magnitude(a: mx.array) -> float:
    return float(np.abs(np.array(a)).max())
