"""Which pairs to label: those on which reward heads disagree, or a random sample."""

import numpy as np
import pytest
from helpers.data import assistant, read_rows, user, write_rows
from helpers.runs import mlx_align
from helpers.scripts import load_script

from mlx_align.inference.reward_model import open_reward_model
from mlx_align.preferences.disagreement import most_disagreement_first, preference_disagreement


def test_disagreement_by_hand():
    first = np.array([[2.0, 2.0], [3.0, -3.0], [0.0, 0.1]])
    found = preference_disagreement(first, np.zeros((3, 2)))
    p = 1 / (1 + np.exp(-3.0))
    assert found[0] == 0
    assert found[1] == pytest.approx((p - (1 - p)) / 2)
    assert most_disagreement_first(found) == [1, 2, 0]
    assert most_disagreement_first(np.array([np.nan, 0.1, 0.3])) == [2, 1, 0]


def test_pairs_with_the_most_disagreement_are_selected(train, pairs, tmp_path, capsys):
    options = ("--iters", 3, "--learning-rate", 0.01, "--val-batches", 1)
    code, run = train("reward", *options, "--members", 3, data=pairs, output="rm")
    assert code == 0
    rows = [
        {"prompt": user(f"{i}?"), "chosen": assistant("a" * i), "rejected": assistant(f"b {i}")}
        for i in range(1, 12)
    ]
    write_rows("pairs.jsonl", rows)
    command = ("data", "select", "--data", "pairs.jsonl", "--output")
    by = ("--by", "disagreement", "--reward-model", run)
    assert mlx_align(*command, "ask.jsonl", *by, "--count", 4) == 0
    found = read_rows("ask.jsonl")
    model = open_reward_model(run)

    def spread(prompt, answers):
        """Each answer scored alone by each head, without the package's own function."""
        from mlx_align.inference.scoring import make_group

        (scored,) = model.score_groups([make_group("test", prompt, answers)])
        difference = scored.members[0] - scored.members[1]
        return np.std(1 / (1 + np.exp(-difference.astype(float))))

    every = sorted((spread(r["prompt"], [r["chosen"], r["rejected"]]) for r in rows), reverse=True)
    shown = [spread(row["prompt"], row["completions"]) for row in found]
    np.testing.assert_allclose(shown, every[:4], atol=1e-5)
    assert [row["disagreement"] for row in found] == pytest.approx(every[:4], abs=1e-5)
    # A spot check: at random, reproducible, without the label.
    assert mlx_align(*command, "spot.jsonl", "--share", 0.3) == 0
    spot = read_rows("spot.jsonl")
    assert len(spot) == 3
    assert set(spot[0]) == {"prompt", "completions", "models"}
    capsys.readouterr()
    assert train("reward", *options, data=pairs, output="one")[0] == 0
    by = ("--by", "disagreement", "--reward-model", tmp_path / "one")
    assert mlx_align(*command, "no.jsonl", *by, "--count", 4) == 1
    assert "needs an ensemble" in capsys.readouterr().err
    for wrong in (("--count", 1, "--share", 0.1), (), ("--by", "disagreement", "--count", 1)):
        assert mlx_align(*command, "no.jsonl", *wrong) == 1


def test_asking_by_disagreement_needs_fewer_labels_of_a_simulated_rater():
    """One seed of scripts/verify_asking.py, to 85% held-out accuracy."""
    script = load_script("verify_asking")
    script.LAST = 300
    needed = {
        way: script.labels_needed(script.accuracies(way, seed=1), 0.85) for way in (False, True)
    }
    assert needed[True] < needed[False]
