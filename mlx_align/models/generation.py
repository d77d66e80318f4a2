"""Sampling completions from the model in memory, through mlx-lm's generators.

Each prompt runs once for all its completions. This relies on mlx-lm's `BatchGenerator` and on how
its caches are merged, which may change with a release.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from mlx_align.models.patches import random_key, restore_random_key

# Sequences decoded together, and prompt tokens run together; the same as in mlx-lm.
ROWS_AT_ONCE = 32
TOKENS_AT_ONCE = 2048
# Rows that have to be free before waiting completions start. Each time, their first token is
# another step and all caches are copied: 64 completions of 2 to 16 tokens take 43 steps if
# every free row is filled at once, 12 of them for one or two rows.
JOINING_ROWS = ROWS_AT_ONCE // 4


class Generated(NamedTuple):
    """One sampled completion.

    Attributes:
        tokens: Its tokens, including the end token if it was sampled.
        logps: Log-prob of each token under the distribution it was sampled from (after division by
            the temperature), nats; 0 for greedy decoding.
        finished: Whether it ends with an end token. Otherwise it was truncated at `max_tokens`.
    """

    tokens: list[int]
    logps: list[float]
    finished: bool


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
    """Tokens of one completion for each of `prompts`. Arguments: `generate_groups`."""
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
    """Sample several independent completions for each of `prompts`.

    Each prompt, except its last token, runs once and in a separate row: mlx-lm pads prompts that it
    runs together, and recurrent families (mamba, jamba, nemotron_h, rwkv7) read that padding as
    tokens. Its completions start from copies of its cache. They are decoded together with those of
    the other prompts, or one by one in families that can't do that (llama4, gemma2).

    Top-p and top-k are not supported. Samples depend on the seed and on all prompts of the call.

    Args:
        model: The model, with the adapter weights it holds now, in evaluation mode.
        prompts: Token ids, at least one each; lengths may differ.
        completions_per_prompt: Number of completions of each prompt.
        stop_tokens: The end tokens.
        max_tokens: Maximum number of tokens of a completion, at least 1.
        temperature: Logits are divided by it; 0 is greedy decoding.
        seed: Random seed for sampling. The global generator's state is restored afterwards.
        on_token: Called after every token of every completion.

    Returns:
        For each prompt its completions, in arbitrary order.
    """
    high, low = random_key()
    request = _Request(
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
        if all(_can_merge(cache) for cache in make_prompt_cache(model)):
            try:
                return _generate_batched(request)
            except _BatchingUnsupportedError:
                mx.random.seed(seed)
        return _generate_sequentially(request)
    finally:
        # Training must draw the same numbers with and without sampling in between.
        restore_random_key(high, low)


class _Request(NamedTuple):
    """Arguments of `generate_groups`."""

    model: nn.Module
    prompts: list[list[int]]
    completions_per_prompt: int
    stop_tokens: list[int]
    max_tokens: int
    temperature: float
    on_token: Callable[[], None]


class _BatchingUnsupportedError(Exception):
    """The model's code can't decode several sequences in one call."""


def _can_merge(cache: Any) -> bool:
    # Merging would drop the first tokens that a rotating cache has to keep.
    return hasattr(cache, "merge") and not (type(cache) is RotatingKVCache and cache.keep)


def _prompt_cache(model: nn.Module, prompt: list[int]) -> list[Any] | None:
    """mlx-lm's caches after all tokens of a prompt but the last; None if it has only one."""
    if len(prompt) == 1:
        return None
    caches: list[Any] = make_prompt_cache(model)
    for start in range(0, len(prompt) - 1, TOKENS_AT_ONCE):
        piece = prompt[start : min(start + TOKENS_AT_ONCE, len(prompt) - 1)]
        model(mx.array([piece]), cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches


def _waiting_completions(request: _Request) -> Iterator[tuple[int, list[int], list[Any] | None]]:
    """For every completion the index of its prompt, the prompt's last token, and its caches.

    A prompt runs when its first completion is taken. The batch copies what it merges, so all
    completions of a prompt can be given the same caches.
    """
    for index, prompt in enumerate(request.prompts):
        caches = _prompt_cache(request.model, prompt)
        for _ in range(request.completions_per_prompt):
            yield index, prompt[-1:], caches


def _generate_batched(request: _Request) -> list[list[Generated]]:
    generator = BatchGenerator(
        request.model,
        max_tokens=request.max_tokens,
        stop_tokens=[[token] for token in request.stop_tokens],
        sampler=make_sampler(temp=request.temperature),
        completion_batch_size=ROWS_AT_ONCE,
        # The prompts have run already, so completions of several can start in one step.
        prefill_batch_size=ROWS_AT_ONCE,
    )
    waiting = _waiting_completions(request)
    # By sequence id of the generator.
    prompt_of: dict[int, int] = {}
    tokens: dict[int, list[int]] = {}
    finished: dict[int, bool] = {}
    steps: list[tuple[list[int], mx.array]] = []  # sequence ids, and the logps of their tokens
    try:
        while True:
            free = ROWS_AT_ONCE - (len(prompt_of) - len(finished))
            new = list(islice(waiting, free)) if free >= JOINING_ROWS else []
            if new:
                indices, last_tokens, caches = zip(*new, strict=True)
                uids = generator.insert(list(last_tokens), caches=list(caches))
                prompt_of |= dict(zip(uids, indices, strict=True))
            try:
                responses = generator.next_generated()
            except (ValueError, TypeError) as error:
                # The model's code assumes masks or offsets of a single row (gemma2, dynamic rope).
                if steps:
                    raise
                raise _BatchingUnsupportedError from error
            if not responses:
                break
            for response in responses:
                tokens.setdefault(response.uid, []).append(response.token)
                if response.finish_reason is not None:
                    finished[response.uid] = response.finish_reason == "stop"
                request.on_token()
            sampled = mx.array([response.token for response in responses])
            rows = mx.stack([response.logprobs for response in responses])
            logps = _sampler_logps(rows, sampled, request.temperature)
            steps.append(([response.uid for response in responses], logps))
            # The response of a finished completion refers to all caches, which are copied next.
            del response, responses, rows
    finally:
        generator.close()
    logps_of: dict[int, list[float]] = {uid: [] for uid in prompt_of}
    for uids, values in steps:
        for uid, value in zip(uids, np.array(values), strict=True):
            logps_of[uid].append(float(value))
    groups: list[list[Generated]] = [[] for _ in request.prompts]
    for uid, index in prompt_of.items():
        groups[index].append(Generated(tokens[uid], logps_of[uid], finished[uid]))
    return groups


def _generate_sequentially(request: _Request) -> list[list[Generated]]:
    sampler = make_sampler(temp=request.temperature)
    groups = []
    for prompt in request.prompts:
        shared = _prompt_cache(request.model, prompt)
        group = []
        for _ in range(request.completions_per_prompt):
            tokens: list[int] = []
            logps: list[mx.array] = []
            for token, row in generate_step(
                mx.array(prompt[-1:]),
                request.model,
                max_tokens=request.max_tokens,
                sampler=sampler,
                prompt_cache=copy.deepcopy(shared),
            ):
                tokens.append(int(token))
                logps.append(_sampler_logps(row[None], mx.array(tokens[-1:]), request.temperature))
                request.on_token()
                if tokens[-1] in request.stop_tokens:
                    break
            values = [float(value) for value in np.array(mx.concatenate(logps))]
            group.append(Generated(tokens, values, tokens[-1] in request.stop_tokens))
        groups.append(group)
    return groups


def _sampler_logps(rows: mx.array, sampled: mx.array, temperature: float) -> mx.array:
    """Log-probs (N,) float32 of tokens `sampled` (N,) from untempered log-probs `rows` (N, V)."""
    if temperature == 0:
        return mx.zeros(sampled.shape)
    # Tempered in their own dtype, as the sampler does, and normalised: bf16 rows may not sum to 1.
    rows = (rows * (1.0 / temperature)).astype(mx.float32)
    logps = mx.take_along_axis(rows, sampled[:, None], axis=-1)[:, 0] - mx.logsumexp(rows, axis=-1)
    # Read at the end: waiting here would mean waiting for the next step, which is already running.
    mx.async_eval(logps)  # type: ignore[no-untyped-call]
    return logps
