"""Statistics of a dataset: counts, lengths, warnings, and the text that is shown."""

import dataclasses
import json

import numpy as np
import pytest
from helpers.tokenizers import CHATML, tiny_tokenizer

from mlx_align.data.formats import ReadReport
from mlx_align.data.statistics import (
    compute_statistics,
    one_line_preview,
    render_statistics,
    token_overlap,
)
from mlx_align.data.tokenization import tokenize_groups
from mlx_align.types import Message, PromptGroup

PAIRS = [
    ("one", "four hello there", "no"),
    ("two", "the answer is four", "four"),
    ("three", "no", "hello hello hello"),
    ("four", "abc abc abc abc", "no"),
]


def group(prompt, chosen, rejected, **more):
    turns = [(Message("assistant", text),) for text in (chosen, rejected)]
    return PromptGroup((Message("user", prompt),), tuple(turns), "train.jsonl:1", **more)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(CHATML, stops=("<|im_end|>",))


def statistics_of(groups, tokenizer, **more):
    tokenized, report = tokenize_groups(groups, tokenizer, max_seq_length=500)
    return compute_statistics(groups, tokenized, report, tokenizer, **more)


def test_lengths_and_counts(tokenizer):
    groups = [group(*pair) for pair in PAIRS]
    tokenized, report = tokenize_groups(groups, tokenizer, max_seq_length=500)
    statistics = compute_statistics(groups, tokenized, report, tokenizer)
    assert (statistics.rows, statistics.groups, statistics.pairs, statistics.completions) == (
        4,
        4,
        4,
        8,
    )
    scored = sum(len(ids) for one in tokenized for ids in one.completions)
    assert statistics.scored_tokens == scored
    assert statistics.tokens == scored + sum(len(one.prompt) for one in tokenized)
    assert statistics.prompt_lengths["100"] == max(len(one.prompt) for one in tokenized)
    assert statistics.chosen_longer == 0.75
    assert statistics.rejected_longer == 0.25
    assert "! the longer completion is chosen in 75% of the pairs" in render_statistics(statistics)


def test_scored_tokens_of_a_conversation_are_those_in_the_mask(tokenizer):
    turns = (Message("assistant", "abc"), Message("user", "hello"), Message("assistant", "no"))
    one = PromptGroup((Message("user", "one"),), (turns,), "train.jsonl:1")
    tokenized, report = tokenize_groups([one], tokenizer, max_seq_length=500)
    statistics = compute_statistics([one], tokenized, report, tokenizer)
    assert (
        statistics.scored_tokens
        == tokenized[0].loss_masks[0].sum()
        < len(tokenized[0].completions[0])
    )
    assert statistics.pairs == 0
    assert statistics.chosen_longer is None


def test_repetitions_contradictions_and_scores(tokenizer):
    groups = [
        group("one", "abc", "no"),
        group("one", "abc", "no"),
        group("one", "no", "abc"),
        group("two", "hello there", "no", scores=(1.0, 2.0)),
        group("two", "abc " * 30 + "no", "abc " * 30 + "hello"),
    ]
    statistics = statistics_of(
        groups, tokenizer, valid=[group("two", "a", "b"), group("new", "a", "b")]
    )
    assert statistics.duplicates == 1
    assert statistics.contradictions == 3
    assert statistics.scores_disagree == 1
    assert statistics.near_identical == 1
    assert (statistics.valid_overlap, statistics.valid_groups) == (1, 2)
    assert "! validation rows whose prompt is also in train: 1 of 2" in render_statistics(
        statistics
    )


def test_dropped_rows_of_reading_and_tokenising_are_summed(tokenizer):
    groups = [group(str(i), "abc", "no") for i in range(10)] + [group("x", "abc " * 600, "no")]
    report = ReadReport("pairs", "pairs", 12, {"identical completions": 1})
    statistics = statistics_of(groups, tokenizer, read_report=report)
    assert statistics.dropped == {"identical completions": 1, "too long": 1}
    assert statistics.rows == 12
    assert "dropped: 1 identical completions, 1 too long" in render_statistics(statistics)


def test_completions_that_repeat_the_prompt(tokenizer):
    doubled = PromptGroup("the answer is", ("the answer is four", "the answer is no"), "x:1")
    plain = PromptGroup("the answer is", (" four", " no"), "x:2")
    assert statistics_of([doubled, plain], tokenizer).prompt_repeated == 1


def test_statistics_are_json(tokenizer):
    statistics = statistics_of([group(*pair) for pair in PAIRS], tokenizer)
    assert json.loads(json.dumps(dataclasses.asdict(statistics)))["pairs"] == 4


def test_one_screen_shows_the_boundary_and_nothing_raw(tokenizer):
    long = "abc\x1b[31m\n" + "hello there " * 100
    groups = [group(long, long + "a", long + "b")] + [group(*pair) for pair in PAIRS]
    text = render_statistics(statistics_of(groups, tokenizer))
    lines = text.split("\n")
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    joined = "".join(line.strip() for line in lines)
    assert "prompt     ⟦<|im_start|>user\\nabc\\x1b[31m\\n" in text
    assert "<|im_start|>assistant\\n⟧chosen     ⟦abc" in joined
    assert "<|im_end|>⟧" in joined
    assert "\x1b" not in text


def test_visible_shortens_in_the_middle():
    assert one_line_preview("short\t") == "short\\t"
    assert one_line_preview("a" * 50 + "b" * 50, limit=23) == "a" * 10 + " … " + "b" * 10


def test_token_overlap_counts_repeats():
    def ids(*values):
        return np.array(values, np.int32)

    assert token_overlap(ids(1, 2, 3, 4), ids(4, 3, 2, 1)) == 1
    assert token_overlap(ids(1, 1, 1, 1), ids(1, 2)) == 0.25
    assert token_overlap(ids(1), ids(2)) == 0
