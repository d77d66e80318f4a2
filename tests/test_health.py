"""The signals of an on-policy run: each threshold, on its two sides."""

import json

import pytest

from mlx_align.train.health import Health, text_metrics

WELL = {
    "policy/approx_kl": 0.01,
    "policy/clip_ratio": 0.1,
    "objective/entropy": 2.0,
    "objective/kl": 3.0,
    "completions/mean_length": 100.0,
    "completions/ended": 0.97,
    "frac_reward_zero_std": 0.2,
    "value/explained_variance": 0.4,
    "text/repeated_4grams": 0.02,
    "text/distinct_2": 0.9,
}


def looked(changes, step=2):
    """Findings after a batch like `WELL` with changes, the run having begun well."""
    health = Health()
    assert health.look(WELL, 1) == []
    return health.look({**WELL, **changes}, step)


@pytest.mark.parametrize(
    ("signal", "well", "warns", "stops"),
    [
        ("policy/clip_ratio", 0.3, 0.31, None),
        ("objective/kl", 15.0, 15.1, 30.1),
        ("objective/entropy", 0.61, None, 0.59),
        ("completions/mean_length", 149.0, 151.0, 251.0),
        ("completions/ended", 0.8, 0.79, None),
        ("frac_reward_zero_std", 0.8, 0.81, None),
        ("text/repeated_4grams", 0.06, 0.08, 0.18),
        ("text/distinct_2", 0.73, 0.71, 0.53),
    ],
)
def test_thresholds(signal, well, warns, stops):
    assert looked({signal: well}) == []
    for value, level in ((warns, "warn"), (stops, "stop")):
        if value is not None:
            (finding,) = looked({signal: value})
            assert (finding.level, finding.signal) == (level, signal)


def test_longer_completions_may_move_further():
    """A KL is a sum over tokens: 15 nats are meant for 128 of them."""
    assert looked({"objective/kl": 16.0, "completions/mean_length": 140.0}) == []
    assert looked({"objective/kl": 16.0, "completions/mean_length": 120.0})


def test_a_critic_has_thirty_batches():
    assert looked({"value/explained_variance": -0.1}, step=30) == []
    (finding,) = looked({"value/explained_variance": -0.1}, step=31)
    assert finding.level == "warn"


def test_three_long_moves_in_a_row_halve_the_rate():
    health = Health()
    far = {**WELL, "policy/approx_kl": 0.11}
    for row in (far, far, WELL, far, far):
        assert health.look(row, 1) == []
        assert health.rate_scale == 1
    (finding,) = health.look(far, 2)
    assert (finding.level, health.rate_scale) == ("halve", 0.5)
    assert health.look(far, 3) == []  # it counts anew


def test_a_warning_is_given_once_and_a_stop_always():
    health = Health()
    health.look(WELL, 1)
    assert len(health.look({**WELL, "policy/clip_ratio": 0.5}, 2)) == 1
    assert health.look({**WELL, "policy/clip_ratio": 0.5}, 3) == []
    for step in (4, 5):
        (finding,) = health.look({**WELL, "objective/kl": 40.0}, step)
        assert finding.level == "stop"


def test_a_held_out_reward_that_falls_while_the_other_rises_stops():
    looks = [(0.0, 0.0), (0.5, 0.4), (1.0, 0.3), (1.5, 0.2), (1.8, 0.1)]
    health = Health()
    findings = [health.look_at_evaluation(*look) for look in looks]
    assert [bool(found) for found in findings] == [False, False, False, False, True]
    # Not where it recovers in between, nor where both stay close.
    health = Health()
    assert not any(health.look_at_evaluation(*look) for look in [*looks[:3], (1.5, 0.35), looks[4]])
    health = Health()
    assert not any(health.look_at_evaluation(r / 3, h) for r, h in looks)


def test_state_goes_through_json():
    health = Health()
    health.look(WELL, 1)
    health.look({**WELL, "policy/approx_kl": 0.2, "policy/clip_ratio": 0.9}, 2)
    health.look_at_evaluation(0.1, 0.2)
    again = Health.restored(json.loads(json.dumps(health.state())))
    assert again == health


def test_how_much_completions_repeat_themselves():
    # Seven runs of four tokens, of which three were there before; nine pairs, six different.
    found = text_metrics([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2]])
    assert found["text/repeated_4grams"] == pytest.approx(3 / 7)
    assert found["text/distinct_2"] == pytest.approx(4 / 9)
    assert text_metrics([[1], []]) == {}
    assert text_metrics([[1, 2], [5, 5, 5]]) == {"text/distinct_2": pytest.approx(0.75)}
