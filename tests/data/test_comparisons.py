"""Comparisons of completions: pairs, ratings, ties, margins, folds, batches."""

import json

import numpy as np
import pytest

from mlx_align.data.buckets import Shape
from mlx_align.data.comparisons import (
    assign_folds,
    collate_rewards,
    compare_completions,
    ensemble_mask,
    pad_completion_lists,
)
from mlx_align.data.formats import read_preferences, read_scorable
from mlx_align.errors import ConfigError, DataError
from mlx_align.types import Message, TokenizedGroup


def group(*completions, prompt=(7, 8), **more):
    ids = tuple(np.array(c, np.int32) for c in completions)
    return TokenizedGroup(np.array(prompt, np.int32), ids, "x:1", **more)


def test_pairs_as_comparisons():
    assert compare_completions(group([1], [2])) == ([1], [0], [1])
    assert compare_completions(group([1], [2], soft_label=0.25)).probability == [0.25]
    rated = group([1], [2], scores=(4.0, 1.5))
    assert compare_completions(rated, rating_margin=0.2).margin == pytest.approx([0.5])
    named = group([1], [2], scores=(4.0, 1.5), margin=3.0)
    assert compare_completions(named, rating_margin=0.2).margin == [3.0]
    # The order of a pair is its label, even if the ratings disagree.
    assert compare_completions(group([1], [2], scores=(1.0, 2.0))).probability == [1.0]


def test_ranked_lists_with_ties_padding_and_identical_completions():
    ranked = group([1], [2], [3], [3], scores=(3.0, 2.0, 2.0, 1.0))
    found = compare_completions(ranked, rating_margin=0.1)
    # (0,1) (0,2) (0,3) (1,2) tied (1,3) (2,3) equal
    assert found.weight.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 0, 1 / 6, 0])
    assert found.margin.tolist() == pytest.approx([0.1, 0.1, 0.2, 0, 0.1, 0.1])
    half = compare_completions(ranked, ties="half")
    assert half.weight[3] == pytest.approx(1 / 6)
    assert half.probability.tolist() == [1, 1, 1, 0.5, 1, 1]
    pair, ranked = pad_completion_lists([group([1], [2]), group([1], [2], [3], scores=(3, 2, 1))])
    assert [len(c) for c in pair.completions] == [1, 1, 0]
    assert compare_completions(pair).weight.tolist() == [1, 0, 0]
    assert compare_completions(ranked).weight.tolist() == pytest.approx([1 / 3] * 3)


def test_each_member_is_not_trained_on_its_own_fold():
    groups = [group([1], [2], prompt=(i // 2, 5)) for i in range(40)]
    fold = assign_folds(groups, 4, seed=0)
    assert (fold[0::2] == fold[1::2]).all()  # one prompt, one fold
    assert np.bincount(fold).tolist() == [10] * 4
    assert (assign_folds(groups, 4, seed=0) == fold).all()
    assert (assign_folds(groups, 4, seed=1) != fold).any()
    member_mask = ensemble_mask(groups, 4, seed=0)
    assert member_mask.sum(axis=1).tolist() == [3] * 40
    assert (member_mask[np.arange(40), fold] == 0).all()
    assert ensemble_mask(groups, 1, seed=0).tolist() == [[1]] * 40


def test_filler_groups_have_no_weight():
    groups = pad_completion_lists([group([1, 2], [3], [4], scores=(3, 2, 1)), group([5], [6])])
    member_mask = np.ones((2, 2), np.float32)
    batch = collate_rewards(
        groups, [compare_completions(g) for g in groups], member_mask, Shape(8, 8, 3)
    )
    assert batch.weight.tolist() == [1, 1, 0]
    assert batch.member_mask.tolist() == [[1, 1], [1, 1], [0, 0]]
    assert batch.comparisons.weight.shape == (3, 3)
    assert batch.comparisons.weight[2].tolist() == [0, 0, 0]
    mask = np.array(batch.groups.completion_mask).sum(axis=1)
    assert mask.tolist() == [2, 1, 1, 1, 1, 0, 0, 0, 0]


@pytest.fixture
def write(tmp_path):
    def call(*rows):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return call


PAIR = {"prompt": "Q", "chosen": " a", "rejected": " b"}


def test_margins_are_read(write):
    (group,), _ = read_preferences(write({**PAIR, "margin": 0.5}))
    assert group.margin == 0.5
    with pytest.raises(DataError, match=r"rows.jsonl:1: 'margin' is -1; expected 0 or more"):
        read_preferences(write({**PAIR, "margin": -1}))
    with pytest.raises(DataError, match="'margin' is text 'big'"):
        read_preferences(write({**PAIR, "margin": "big"}))


def test_rows_to_score_keep_their_order(write):
    def read(*rows, format=None):
        found = read_scorable(write(*rows), format=format)
        return found, list(found)

    pairs, (one, same) = read(PAIR, {**PAIR, "rejected": " a"})
    assert pairs.is_pairs
    assert one.group.completions == (" a", " b")
    assert (same.group, same.reason) == (None, "identical completions")
    lists, (one, other) = read(
        {"prompt": "Q", "completions": [" low", " high", " low"], "scores": [1, 5, 1]},
        {"prompt": "Q", "completions": [" a", " a"]},
    )
    assert not lists.is_pairs
    assert one.group.completions == (" low", " high", " low")
    assert one.group.scores is None
    assert other.group.completions == (" a", " a")
    objects = {"prompt": "Q", "completions": [{"text": " a", "score": 1}, {"text": " b"}]}
    assert read(objects)[1][0].group.completions == (" a", " b")
    bad = {"prompt": "Q", "completion": " b", "label": False}
    assert read(bad)[1][0].group.completions == (" b",)
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    (entry,) = read({"messages": turns})[1]
    assert entry.group.prompt == (Message("user", "Q"),)
    assert entry.group.completions == ((Message("assistant", "A"),),)
    with pytest.raises(DataError, match="not recognised as scorable data"):
        read({"question_text": "Q"})
    with pytest.raises(ConfigError, match="--format ranked: not a format of data to score"):
        read(PAIR, format="ranked")
    with pytest.raises(DataError, match="has only one turn"):
        read({"messages": turns[1:]})
