"""The check at load: is the shared prompt, and the chunked head, exact for this very model?

On random tokens, the log-probs of completions that share a prompt are compared with those of
whole rows, and the chunked head with the model's own logits. What two paddings of the same rows
differ by is the measure, and by how much attention in float32 changes the model's own: rounding in
the model's dtype, not an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_align.errors import ModelError
from mlx_align.models.attention import float32_attention
from mlx_align.models.compat import Anatomy
from mlx_align.models.logps import batch_token_logps
from mlx_align.models.trunk import flat_rows
from mlx_align.types import GroupBatch, Packing

# Shared may differ from flat by so many times what two flat paddings, or two precisions of
# attention, differ by …
TOLERANCE = 3.0
# … and always by this share of the largest log-prob: below it float32 itself is not better. In
# 16 bits it is half a unit in the last place of a logit; wrong paths were 0.3 to 17 nats off.
FLOOR = 1e-5
FLOOR_16_BIT = 2e-3

_PROMPT_LENGTHS = (5, 9)
_COMPLETION_LENGTHS = (7, 3, 4, 6)


def check_paths(anatomy: Anatomy, vocab_size: int) -> tuple[Anatomy, bool, str]:
    """The anatomy to use, whether completions may share their prompt, and what was found.

    Raises:
        ModelError: Even whole rows through the chunked head disagree with the model's own logits.
    """
    narrow, wide = random_batch(vocab_size, pad=0), random_batch(vocab_size, pad=6)
    try:
        own, dtype = _own_logps(anatomy, narrow)
        with float32_attention():
            rounding = _gap(_own_logps(anatomy, narrow)[0], own)
        floor = (FLOOR if dtype == mx.float32 else FLOOR_16_BIT) * max(1.0, _largest(own))
        least = max(TOLERANCE * rounding, floor)
        flat, allowed = _whole_rows(anatomy, narrow, wide, least)
        if not _gap(flat, own) <= allowed:
            anatomy = replace(anatomy, flat_caches=True)
            flat, allowed = _whole_rows(anatomy, narrow, wide, least)
    except (ModelError, *_FAILURES) as error:
        raise ModelError(f"this model can't be run here: {_words(error)}") from error
    own_gap = _gap(flat, own)
    if not own_gap <= allowed:
        raise ModelError(
            f"whole rows through the chunked vocabulary head differ from the model's own logits "
            f"by {own_gap:.2g} nats (allowed {allowed:.2g}); this family is not supported"
        )
    reason = ""
    for mask_axes in (0, 1, 2):
        candidate = replace(anatomy, mask_axes=mask_axes)
        try:
            gaps = [
                _gap(batch_token_logps(candidate, narrow, shared=True, grad_checkpoint=way), flat)
                for way in (False, True)
            ]
        except ModelError as error:
            reason = reason or str(error)
            continue
        except _FAILURES as error:
            reason = reason or f"its code can't run them together ({_words(error)})"
            continue
        gap = max(gaps)
        if gap <= allowed:
            note = f"prompts are shared (checked against whole rows: at most {gap:.1e} nats apart)"
            why_not = _refuses_packing(candidate, narrow, flat, allowed)
            note += f"; rows are padded, not packed: {why_not}" if why_not else ""
            return replace(candidate, packs=not why_not), True, note
        reason = f"sharing changes log-probs by {gap:.2g} nats, {allowed:.2g} allowed"
    return anatomy, False, f"prompts are run once per completion: {reason}"


def _refuses_packing(anatomy: Anatomy, narrow: GroupBatch, flat: mx.array, allowed: float) -> str:
    """Why the groups of a batch can't run in one row; nothing where they can.

    Every token of one group that another's saw would change its log-probs.
    """
    batch = packed_batch(narrow, pad=3)
    try:
        gap = max(
            _gap(batch_token_logps(anatomy, batch, grad_checkpoint=way), flat)
            for way in (False, True)
        )
    except ModelError as error:
        return str(error)
    except _FAILURES as error:
        return f"its code can't run them in one row ({_words(error)})"
    if not gap <= allowed:
        return f"packing changes log-probs by {gap:.2g} nats, {allowed:.2g} allowed"
    return ""


def packed_batch(batch: GroupBatch, pad: int) -> GroupBatch:
    """The same groups packed, each row with `pad` tokens of padding."""
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


def check_adapted(model: Anatomy, vocab_size: int) -> None:
    """Run a few tokens through a model that has adapters in it now.

    Raises:
        ModelError: Its code reads weights where an adapter stands.
    """
    try:
        mx.eval(batch_token_logps(model, random_batch(vocab_size, pad=0), shared=False))
    except _FAILURES as error:
        raise ModelError(
            f"this model does not run with these adapters ({_words(error)}); name the layers to "
            "adapt with --lora-keys, self_attn.q_proj,self_attn.v_proj for example"
        ) from error


# What mlx-lm's code raises when it is called in a way a family was not written for.
_FAILURES = (TypeError, AttributeError, ValueError, RuntimeError, IndexError, KeyError)


def _words(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def random_batch(vocab_size: int, pad: int) -> GroupBatch:
    """Two ragged prompts with two ragged completions each, the same tokens whatever the padding."""
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


def _whole_rows(
    anatomy: Anatomy, narrow: GroupBatch, wide: GroupBatch, least: float
) -> tuple[mx.array, float]:
    """Log-probs (N, C) of whole rows, and by how much, `least` or more, others may differ."""
    flat = batch_token_logps(anatomy, narrow, shared=False)
    padded = batch_token_logps(anatomy, wide, shared=False)[:, : flat.shape[1]]
    return flat, max(TOLERANCE * _gap(flat, padded), least)


def _own_logps(anatomy: Anatomy, batch: GroupBatch) -> tuple[mx.array, mx.Dtype]:
    """Log-probs (N, C) from the full logits of the model as it generates; the logits' dtype."""
    rows, starts = flat_rows(batch)
    raw = anatomy.generation_logits(rows)
    logits = raw.astype(mx.float32)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    positions = starts[:, None] - 1 + mx.arange(batch.completion_tokens.shape[1])[None]
    of_token = mx.take_along_axis(logps, positions[..., None], axis=1)
    of_token = mx.take_along_axis(of_token, batch.completion_tokens[..., None], axis=-1)[..., 0]
    return mx.where(batch.completion_mask, of_token, 0), raw.dtype


def _gap(a: mx.array, b: mx.array) -> float:
    return float(np.abs(np.array(a) - np.array(b)).max())


def _largest(a: mx.array) -> float:
    return float(np.abs(np.array(a)).max())
