"""Health checks: each threshold on both sides, what is shown again, and the state."""

import json
import math

import pytest

from mlx_align.tracking.diagnostics import CHECKS, HealthMonitor, run_checks, text_metrics

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


def observed(changes, step=2):
    """Findings after a rollout batch like `WELL` with changes, which follows a healthy one."""
    monitor = HealthMonitor("ppo")
    assert monitor.observe(WELL, 1) == []
    return monitor.observe({**WELL, **changes}, step)


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
    assert observed({signal: well}) == []
    for value, level in ((warns, "warn"), (stops, "stop")):
        if value is not None:
            (finding,) = observed({signal: value})
            assert (finding.level, finding.signal) == (level, signal)


def test_longer_completions_may_be_further_from_the_reference():
    """A KL is a sum over tokens: 15 nats are meant for 128 of them."""
    assert observed({"objective/kl": 16.0, "completions/mean_length": 140.0}) == []
    assert observed({"objective/kl": 16.0, "completions/mean_length": 120.0})


def test_a_critic_is_checked_after_30_batches():
    assert observed({"value/explained_variance": -0.1}, step=30) == []
    (finding,) = observed({"value/explained_variance": -0.1}, step=31)
    assert finding.level == "warn"


def test_three_large_updates_in_a_row_halve_the_learning_rate():
    monitor = HealthMonitor("ppo")
    far = {**WELL, "policy/approx_kl": 0.11}
    for row in (far, far, WELL, far, far):
        assert monitor.observe(row, 1) == []
        assert monitor.lr_scale == 1
    (finding,) = monitor.observe(far, 2)
    assert (finding.level, monitor.lr_scale) == ("halve", 0.5)
    assert monitor.observe(far, 3) == []  # the count starts again
    assert monitor.observe(far, 4) == []
    (finding,) = monitor.observe(far, 5)
    assert (finding.level, monitor.lr_scale) == ("halve", 0.25)
    assert [(one["step"], one["level"]) for one in monitor.recorded] == [(2, "halve"), (5, "halve")]


def test_a_batch_without_an_update_interrupts_the_count():
    monitor = HealthMonitor("grpo")
    far = {**WELL, "policy/approx_kl": 0.11}
    skipped = {name: value for name, value in WELL.items() if name != "policy/approx_kl"}
    for row in (far, far, skipped, far, far):
        assert monitor.observe(row, 1) == []
    assert monitor.lr_scale == 1


def test_a_finding_is_shown_once_and_again_only_if_it_got_worse():
    monitor = HealthMonitor("ppo")
    monitor.observe(WELL, 1)
    assert len(monitor.observe({**WELL, "policy/clip_ratio": 0.4}, 2)) == 1
    assert monitor.observe({**WELL, "policy/clip_ratio": 0.4}, 3) == []
    assert monitor.observe({**WELL, "policy/clip_ratio": 0.79}, 3) == []
    assert len(monitor.observe({**WELL, "policy/clip_ratio": 0.81}, 3)) == 1
    assert monitor.stop is None
    (finding,) = monitor.observe({**WELL, "objective/kl": 20.0}, 4)
    assert finding.level == "warn"
    assert monitor.observe({**WELL, "objective/kl": 29.0}, 5) == []
    (finding,) = monitor.observe({**WELL, "objective/kl": 40.0}, 6)
    assert finding.level == "stop"
    # The guard sees it every time, however often it was shown.
    assert monitor.observe({**WELL, "objective/kl": 40.0}, 7) == []
    assert monitor.stop.level == "stop"
    assert monitor.observe(WELL, 8) == []
    assert monitor.stop is None


def evaluations(*looks):
    """Whether there are findings at each evaluation of (trained on, held-out) deviations."""
    monitor = HealthMonitor("ppo")
    metrics = [{"reward": trained, "held_out": held_out} for trained, held_out in looks]
    return [
        bool(monitor.observe_evaluation(row, step, look))
        for step, (row, look) in enumerate(zip(metrics, looks, strict=True))
    ], monitor.stop


def test_a_held_out_reward_that_falls_while_the_other_rises_stops():
    looks = [(0.0, 0.0), (0.5, 0.4), (1.0, 0.3), (1.5, 0.2), (1.8, 0.1)]
    found, stop = evaluations(*looks)
    assert found == [False, False, False, False, True]
    assert stop.signal == "eval/held_out"
    # Not if it recovers in between, nor if both stay close.
    assert evaluations(*looks[:3], (1.5, 0.35), looks[4]) == ([False] * 5, None)
    assert evaluations(*((r / 3, h) for r, h in looks)) == ([False] * 5, None)


def test_state_goes_through_json():
    monitor = HealthMonitor("ppo")
    monitor.observe(WELL, 1)
    monitor.observe({**WELL, "policy/approx_kl": 0.2, "policy/clip_ratio": 0.9}, 2)
    monitor.observe_evaluation({"reward": 1.0, "held_out": 0.5}, 2, (0.1, 0.2))
    again = HealthMonitor("ppo")
    again.restore(json.loads(json.dumps(monitor.state())))
    assert again.state() == monitor.state()
    assert again.history == monitor.history
    for one in (monitor, again):
        assert one.observe({**WELL, "policy/approx_kl": 0.2}, 3) == []
    (finding,) = again.observe({**WELL, "policy/approx_kl": 0.2}, 4)
    assert finding.level == "halve"


def test_a_state_of_the_first_version_is_read():
    old = {
        "start": {"objective/entropy": 2.0, "completions/mean_length": 100.0},
        "far_updates": 2,
        "rate_scale": 0.5,
        "said": ["policy/clip_ratio"],
        "evaluations": [[0.0, 0.0], [0.5, 0.4], [1.0, 0.3], [1.5, 0.2]],
    }
    monitor = HealthMonitor("ppo")
    monitor.restore(json.loads(json.dumps(old)))
    assert monitor.lr_scale == 0.5
    row = {**WELL, "policy/approx_kl": 0.2, "policy/clip_ratio": 0.31, "objective/entropy": 0.59}
    assert [one.level for one in monitor.observe(row, 9)] == ["stop", "halve"]
    assert monitor.lr_scale == 0.25
    metrics = {"reward": 1.0, "held_out": 0.1}
    assert [one.level for one in monitor.observe_evaluation(metrics, 9, (1.8, 0.1))] == ["stop"]


@pytest.mark.parametrize("state", [{}, [], {"evaluations": [1], "said": [], "rate_scale": 1}])
def test_another_state_is_refused(state):
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        HealthMonitor("ppo").restore(state)


def pair_rows(n=20, chosen=0.0, accuracy=0.8):
    return [
        {
            "loss": 0.7 - 0.01 * i,
            "rewards/accuracies": accuracy,
            "logps/chosen": -30 + chosen * i / n,
            "logps/rejected": -40.0,
        }
        for i in range(n)
    ]


def observe_all(monitor, rows):
    return [finding for step, row in enumerate(rows, 1) for finding in monitor.observe(row, step)]


@pytest.mark.parametrize("command", ["dpo", "kto"])
def test_a_falling_chosen_logprob_is_shown_during_training(command):
    (finding,) = observe_all(HealthMonitor(command), pair_rows(chosen=-5.0))
    assert (finding.level, finding.signal) == ("warn", "logps/chosen")
    assert ("sft=0.2" in finding.advice) == (command == "dpo")
    assert observe_all(HealthMonitor(command), pair_rows(chosen=-3.0)) == []
    # By a tenth, by twice that, and by more than a nat per token.
    found = observe_all(HealthMonitor(command, completion_tokens=8), pair_rows(chosen=-15.0))
    assert [one.level for one in found] == ["warn", "warn", "stop"]
    assert observe_all(HealthMonitor("sft"), pair_rows(chosen=-15.0)) == []


def test_overfitting_is_shown_during_training():
    monitor = HealthMonitor("reward")
    monitor.observe_evaluation({"rewards/accuracies": 0.5}, 0)
    observe_all(monitor, pair_rows(accuracy=0.95))
    (finding,) = monitor.observe_evaluation({"rewards/accuracies": 0.79}, 20)
    assert "95% on training pairs and 79% on held-out ones" in finding.text
    assert monitor.observe_evaluation({"rewards/accuracies": 0.78}, 30) == []


@pytest.mark.parametrize("command", ["dpo", "kto", "sft", "reward"])
def test_a_rising_held_out_loss_is_shown_during_training(command):
    def findings(*losses):
        monitor = HealthMonitor(command)
        observe_all(monitor, [{"loss": 1.0 - 0.01 * i} for i in range(20)])
        return [one for loss in losses for one in monitor.observe_evaluation({"loss": loss}, 20)]

    (finding,) = findings(1.0, 0.9, 0.95, 1.0, 1.1)
    assert finding.signal == "eval/loss"
    assert "from 0.900 to 1.10" in finding.text
    assert findings(1.0, 0.9, 0.95, 0.94, 1.1) == []
    assert findings(1.0, 0.9, 0.901, 0.902, 0.903) == []


def test_an_accuracy_that_does_not_move_is_shown_during_training():
    def findings(*accuracies):
        monitor = HealthMonitor("dpo")
        observe_all(monitor, pair_rows(accuracy=0.51))
        looks = [{"rewards/accuracies": accuracy} for accuracy in (0.0, *accuracies)]
        return [one for look in looks for one in monitor.observe_evaluation(look, 20)]

    (finding,) = findings(0.5, 0.48, 0.52, 0.5)
    assert "does not learn the preference" in finding.text
    assert findings(0.5, 0.48, 0.6, 0.5) == []
    assert findings(0.5, 0.48, 0.52) == []


def test_every_check_applies_to_some_command_and_reads_something():
    for check in CHECKS:
        assert check.commands
        assert check.reads or check.held_out or check.answers
        assert check.find(HealthMonitor("dpo").history) is None
    monitor = HealthMonitor("dpo")
    monitor.observe({**WELL, "objective/kl": 99.0, "loss": math.nan}, 1)
    assert run_checks(monitor.history) == []  # a check of ppo and grpo


def test_how_much_completions_repeat_themselves():
    # Seven runs of four tokens, of which three were there before; nine pairs, six different.
    found = text_metrics([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2]])
    assert found["text/repeated_4grams"] == pytest.approx(3 / 7)
    assert found["text/distinct_2"] == pytest.approx(4 / 9)
    assert text_metrics([[1], []]) == {}
    assert text_metrics([[1, 2], [5, 5, 5]]) == {"text/distinct_2": pytest.approx(0.75)}
