"""Completions of shared prompts against mlx-lm's own generation, one whole prompt at a time."""

import weakref

import mlx.core as mx
import numpy as np
import pytest
from helpers.families import make_model
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

import mlx_align.models.generation as generation
from mlx_align.models.generation import generate_batch, generate_groups
from mlx_align.models.patches import random_key

PROMPTS = [np.random.default_rng(0).integers(1, 150, n).tolist() for n in (13, 1, 3, 9, 2)]
END = 7
# Plain, windows, both kinds of recurrence with attention and without (mlx-lm's padded prompts are
# wrong in the last three), keys that layers lend, cache lists; then those that decode one by one.
FAMILIES = [
    "llama",
    "gemma3_text",
    "qwen3_5",
    "mamba2",
    "jamba",
    "nemotron_h",
    "rwkv7",
    "gemma3n",
    "deepseek_v32",
    "gemma2",
    "llama4",
    "internlm2-dynamic",
]


def log_softmax(logits: mx.array, temperature: float) -> np.ndarray:
    logits = np.array(logits.astype(mx.float32), np.float64) / temperature
    peak = logits.max(-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))


def stock_greedy(model, prompt, max_tokens):
    tokens = []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=max_tokens):
        tokens.append(int(token))
        if tokens[-1] == END:
            break
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_sampling_equals_sampling_each_prompt(family):
    model = make_model(family)
    greedy = generate_groups(model, PROMPTS, 2, [END], max_tokens=9, temperature=0, seed=0)
    for prompt, group in zip(PROMPTS, greedy, strict=True):
        expected = stock_greedy(model, prompt, 9)
        assert [one.tokens for one in group] == [expected, expected]
        assert [one.logps for one in group] == [[0.0] * len(expected)] * 2
        assert [one.finished for one in group] == [expected[-1] == END] * 2
    sampled = generate_groups(model, PROMPTS, 3, [END], max_tokens=9, temperature=0.7, seed=5)
    for prompt, group in zip(PROMPTS, sampled, strict=True):
        for one in group:
            row = mx.array([prompt + one.tokens])
            logits = model(row, cache=make_prompt_cache(model))[0, len(prompt) - 1 : -1]
            logps = log_softmax(logits, 0.7)[np.arange(len(one.tokens)), one.tokens]
            # float32, and the ramp of yarn's attention scaling: 2e-5 on two of fifty families.
            np.testing.assert_allclose(one.logps, logps, atol=1e-4)


def test_a_prompt_is_computed_once_and_large_groups_are_complete():
    model = make_model("llama")
    lengths = []

    class Counting:
        def __call__(self, tokens, cache=None):
            lengths.append(tokens.shape)
            return model(tokens, cache=cache)

        def __getattr__(self, name):
            return getattr(model, name)

    ticks = []
    groups = generate_groups(
        Counting(),
        PROMPTS * 3,
        7,
        [END],
        max_tokens=4,
        temperature=1,
        seed=0,
        on_token=lambda: ticks.append(1),
    )
    prefills = [shape for shape in lengths if shape[1] > 1]
    assert sorted(length for _, length in prefills) == sorted([12, 2, 8] * 3)
    assert max(rows for rows, _ in lengths) == 32
    assert [len(group) for group in groups] == [7] * 15
    assert len(ticks) == sum(len(one.tokens) for group in groups for one in group)
    for one in (one for group in groups for one in group):
        assert len(one.tokens) == len(one.logps)
        assert one.finished == (one.tokens[-1] == END)
        assert len(one.tokens) == 4 or one.finished


def test_waiting_completions_join_several_at_a_time():
    model, steps = make_model("llama"), []

    class Counting:
        def __call__(self, tokens, cache=None):
            steps.append(tokens.shape[1] == 1)
            return model(tokens, cache=cache)

        def __getattr__(self, name):
            return getattr(model, name)

    stop = list(range(0, model.args.vocab_size, 10))
    groups = generate_groups(Counting(), PROMPTS * 3, 7, stop, max_tokens=30, temperature=1, seed=0)
    sampled = sum(len(one.tokens) for group in groups for one in group)
    # 60 steps for 852 tokens, 32 at a time; 78 steps for 918 if every free row is filled at once.
    assert sum(steps) < 2.4 * sampled / generation.ROWS_AT_ONCE


def test_long_prompts_are_computed_in_chunks(monkeypatch):
    model = make_model("gemma3_text")
    whole = generate_groups(model, PROMPTS, 2, [END], max_tokens=6, temperature=0, seed=0)
    monkeypatch.setattr(generation, "TOKENS_AT_ONCE", 4)
    assert generate_groups(model, PROMPTS, 2, [END], max_tokens=6, temperature=0, seed=0) == whole


@pytest.mark.parametrize("family", ["llama", "llama4"])
def test_samples_follow_the_distribution_and_are_independent(family):
    model = make_model(family)
    prompt, many, temperature = PROMPTS[0], 1500 if family == "llama" else 300, 1.7
    before = random_key()
    groups = generate_groups(model, [prompt], many, [END], max_tokens=1, temperature=1.7, seed=1)
    assert random_key() == before
    again = generate_groups(model, [prompt], many, [END], max_tokens=1, temperature=1.7, seed=1)
    assert again == groups
    logits = model(mx.array([prompt]), cache=make_prompt_cache(model))[0, -1]
    logps = log_softmax(logits, temperature)
    drawn = np.array([one.tokens[0] for one in groups[0]])
    np.testing.assert_allclose([one.logps[0] for one in groups[0]], logps[drawn], atol=1e-5)
    # Pearson's statistic over the tokens that are expected five times, the rest as one.
    expected = np.exp(logps) * many
    often = expected >= 5
    counts = np.bincount(drawn, minlength=len(logps))
    cells = np.append(counts[often], counts[~often].sum())
    means = np.append(expected[often], expected[~often].sum())
    freedom = len(cells) - 1
    statistic = ((cells - means) ** 2 / means).sum()
    assert freedom > 5
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


def test_sampling_works_after_an_error_in_a_callback():
    model = make_model("llama")
    with pytest.raises(RuntimeError, match="stop"):
        generate_batch(model, PROMPTS, [END], max_tokens=4, temperature=1, seed=0, on_token=_fail)
    assert [
        len(tokens)
        for tokens in generate_batch(model, PROMPTS, [END], max_tokens=1, temperature=1, seed=0)
    ] == [1] * 5


def _fail():
    raise RuntimeError("stop")


def test_ended_completions_do_not_keep_a_second_copy_of_all_caches(monkeypatch):
    """Their responses refer to all caches, so none may live when the next step copies them."""
    model, ended, refs = make_model("llama"), [], []

    class Watching(generation.BatchGenerator):
        def next_generated(self):
            assert not any(ref() for ref in refs)
            responses = super().next_generated()
            refs[:] = [weakref.ref(one) for one in responses if one.finish_reason is not None]
            ended.extend(refs)
            return responses

    monkeypatch.setattr(generation, "BatchGenerator", Watching)
    stop = list(range(0, model.args.vocab_size, 10))
    generate_groups(model, PROMPTS, 8, stop, max_tokens=30, temperature=1.0, seed=0)
    assert len(ended) == 8 * len(PROMPTS)
