"""Completions sampled from the live model, prompts run once, through mlx-lm's generators.

With `compat.py` and `caches.py`, what touches mlx-lm's internals: a release that moves its
generators, or the merging of their caches, breaks this file.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from mlx_align.models.compat import random_key, restore_random_key

# Sequences that are decoded together, and prompt tokens that are run together: as in mlx-lm.
ROWS_AT_ONCE = 32
TOKENS_AT_ONCE = 2048


class Generated(NamedTuple):
    """One sampled completion.

    Attributes:
        tokens: Its tokens, the end token included if it was sampled.
        logps: Of each token, the log-probability (nats) with which the sampler drew it: of the
            tempered distribution, 0 for greedy choice.
        ended: Whether it ends with an end token; False: it was cut at the most tokens allowed.
    """

    tokens: list[int]
    logps: list[float]
    ended: bool


def generate_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    stop_tokens: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    on_token: Callable[[], None] | None = None,
) -> list[list[int]]:
    """One completion of each of `prompts`: the tokens of `generate_groups`."""
    groups = generate_groups(
        model,
        prompts,
        1,
        stop_tokens,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        on_token=on_token,
    )
    return [group[0].tokens for group in groups]


def generate_groups(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions_per_prompt: int,
    stop_tokens: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    on_token: Callable[[], None] | None = None,
) -> list[list[Generated]]:
    """Several independent completions of each of `prompts` by the live model, prompts run once.

    Each prompt but its last token runs once and by itself: mlx-lm pads prompts that it runs
    together, which recurrent families (mamba, jamba, nemotron_h, rwkv7) take for tokens. Its
    completions start from copies of its cache and are decoded together with those of the other
    prompts, or one by one in families that can't (llama4, gemma2).

    Temperature 0 is greedy. Sampling is untruncated: no top-p, no top-k. The same seed with other
    prompts, or another number of them, gives other samples.

    Args:
        model: The model, with whatever adapters it holds now, in evaluation mode.
        prompts: Token ids, at least one each; lengths may differ.
        completions_per_prompt: How many of each.
        stop_tokens: The end tokens.
        max_tokens: The most tokens of a completion, at least 1.
        temperature: Logits are divided by it.
        seed: Of the draws; the global generator is put back where it was.
        on_token: Called after every token of every completion.

    Returns:
        For each prompt its completions, in no order that means anything.
    """
    high, low = random_key()
    work = _Work(
        model,
        [list(prompt) for prompt in prompts],
        completions_per_prompt,
        list(stop_tokens),
        max_tokens,
        temperature,
        on_token or (lambda: None),
    )
    try:
        mx.random.seed(seed)
        if all(_merges(cache) for cache in make_prompt_cache(model)):
            try:
                return _together(work)
            except _NotTogetherError:
                mx.random.seed(seed)
        return _one_by_one(work)
    finally:
        # Training goes on with the draws it would have had.
        restore_random_key(high, low)


class _Work(NamedTuple):
    """What is to be generated."""

    model: nn.Module
    prompts: list[list[int]]
    each: int
    stop: list[int]
    max_tokens: int
    temperature: float
    on_token: Callable[[], None]


class _NotTogetherError(Exception):
    """The family's code can't decode several sequences in one call."""


def _merges(cache: Any) -> bool:
    # Merging forgets the first tokens that a rotating cache was told to keep.
    return hasattr(cache, "merge") and not (type(cache) is RotatingKVCache and cache.keep)


def _prompt_cache(model: nn.Module, prompt: list[int]) -> list[Any] | None:
    """mlx-lm's caches after all but the last token of a prompt; None if that is all of it."""
    if len(prompt) == 1:
        return None
    caches: list[Any] = make_prompt_cache(model)
    for start in range(0, len(prompt) - 1, TOKENS_AT_ONCE):
        piece = prompt[start : min(start + TOKENS_AT_ONCE, len(prompt) - 1)]
        model(mx.array([piece]), cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches


def _together(work: _Work) -> list[list[Generated]]:
    generator = BatchGenerator(
        work.model,
        max_tokens=work.max_tokens,
        stop_tokens=[[token] for token in work.stop],
        sampler=make_sampler(temp=work.temperature),
        completion_batch_size=ROWS_AT_ONCE,
        # With the prompts behind them, the completions of several can start in one step.
        prefill_batch_size=ROWS_AT_ONCE,
    )
    waiting = deque(enumerate(work.prompts))
    prompt_of: dict[int, int] = {}  # by sequence, as are the next two
    tokens: dict[int, list[int]] = {}
    ended: dict[int, bool] = {}
    steps: list[tuple[list[int], mx.array]] = []  # sequences, and the logps of their tokens
    try:
        while True:
            # No further ahead than fills the batch: what waits to start holds its prompt's cache.
            while waiting and len(prompt_of) - len(tokens) < ROWS_AT_ONCE:
                index, prompt = waiting.popleft()
                cache = _prompt_cache(work.model, prompt)
                # The batch copies what it merges, so all sequences may be given one cache.
                uids = generator.insert(
                    [prompt[-1:] for _ in range(work.each)], caches=[cache] * work.each
                )
                prompt_of |= dict.fromkeys(uids, index)
            try:
                responses = generator.next_generated()
            except (ValueError, TypeError) as error:
                # Masks or offsets of one row are taken for granted (gemma2, dynamic rope).
                if steps:
                    raise
                raise _NotTogetherError from error
            if not responses:
                break
            for response in responses:
                tokens.setdefault(response.uid, []).append(response.token)
                if response.finish_reason is not None:
                    ended[response.uid] = response.finish_reason == "stop"
                work.on_token()
            drawn = mx.array([response.token for response in responses])
            rows = mx.stack([response.logprobs for response in responses])
            logps = _sampler_logps(rows, drawn, work.temperature)
            steps.append(([response.uid for response in responses], logps))
    finally:
        generator.close()
    logps_of: dict[int, list[float]] = {uid: [] for uid in prompt_of}
    for uids, values in steps:
        for uid, value in zip(uids, np.array(values), strict=True):
            logps_of[uid].append(float(value))
    groups: list[list[Generated]] = [[] for _ in work.prompts]
    for uid, index in prompt_of.items():
        groups[index].append(Generated(tokens[uid], logps_of[uid], ended[uid]))
    return groups


def _one_by_one(work: _Work) -> list[list[Generated]]:
    sampler = make_sampler(temp=work.temperature)
    groups = []
    for prompt in work.prompts:
        shared = _prompt_cache(work.model, prompt)
        group = []
        for _ in range(work.each):
            tokens: list[int] = []
            logps: list[mx.array] = []
            for token, row in generate_step(
                mx.array(prompt[-1:]),
                work.model,
                max_tokens=work.max_tokens,
                sampler=sampler,
                prompt_cache=copy.deepcopy(shared),
            ):
                tokens.append(int(token))
                logps.append(_sampler_logps(row[None], mx.array(tokens[-1:]), work.temperature))
                work.on_token()
                if tokens[-1] in work.stop:
                    break
            values = [float(value) for value in np.array(mx.concatenate(logps))]
            group.append(Generated(tokens, values, tokens[-1] in work.stop))
        groups.append(group)
    return groups


def _sampler_logps(rows: mx.array, drawn: mx.array, temperature: float) -> mx.array:
    """Log-probabilities (N,) float32 with which tokens (N,) were drawn from log-probs (N, V)."""
    if temperature == 0:
        return mx.zeros(drawn.shape)
    # What the draw was made from, tempered in its own dtype: bf16 rows need not sum to one.
    rows = (rows * (1.0 / temperature)).astype(mx.float32)
    logps = mx.take_along_axis(rows, drawn[:, None], axis=-1)[:, 0] - mx.logsumexp(rows, axis=-1)
    # Read at the end: to wait here is to wait for the next step, which is under way.
    mx.async_eval(logps)  # type: ignore[no-untyped-call]
    return logps
