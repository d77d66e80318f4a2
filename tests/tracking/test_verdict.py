"""The verdict on a run: what it says, with which interval, and of how many examples."""

import json

import pytest

from mlx_align.system.intervals import (
    Estimate,
    mean_difference,
    rate_difference,
    wilson_interval,
)
from mlx_align.tracking.diagnostics import diagnose
from mlx_align.tracking.run_dir import held_out_examples, read_run_record
from mlx_align.tracking.verdict import compare_runs, verdict


def record(folder, rows=(), config=None, **files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(json.dumps({"val_batches": -1, **(config or {})}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return read_run_record(folder)


def pairs(accuracy, n=25, training=None, start=0.0, margin=0.0):
    """Rows and status of a DPO run whose last held-out accuracy is `accuracy` on `n` pairs."""
    begin = {"eval/rewards/accuracies": start, "eval/rewards/margins": margin}
    end = {"eval/rewards/accuracies": accuracy, "eval/rewards/margins": 0.5}
    training = accuracy if training is None else training
    rows = [{"step": 0, **begin}]
    rows += [{"step": i, "loss": 1.0, "rewards/accuracies": training} for i in range(1, 6)]
    status = {"command": "dpo", "state": "running", "step": 5, "eval_examples": n}
    return [*rows, {"step": 5, **end}], status


@pytest.mark.parametrize(
    ("accuracy", "n", "kind", "sentence"),
    [
        (
            0.6,
            25,
            "no difference",
            "On 25 held-out pairs the policy's reward prefers the chosen completion in 60% "
            "(95% interval 41% to 77%): can't be told apart from 50%.",
        ),
        (
            0.6,
            250,
            "better",
            "On 250 held-out pairs the policy's reward prefers the chosen completion in 60.0% "
            "(95% interval 53.8% to 65.9%): better than 50%.",
        ),
        (
            0.2,
            30,
            "worse",
            "On 30 held-out pairs the policy's reward prefers the chosen completion in 20% "
            "(95% interval 10% to 37%): worse than 50%.",
        ),
        (
            1.0,
            120,
            "better",
            "On 120 held-out pairs the policy's reward prefers the chosen completion in 100% "
            "(95% interval 96.9% to 100%): better than 50%.",
        ),
    ],
)
def test_pairs(tmp_path, accuracy, n, kind, sentence):
    rows, status = pairs(accuracy, n)
    found = verdict(record(tmp_path / "run", rows, status=status))
    assert (found.kind, found.sentence, found.n) == (kind, sentence, n)
    assert found.estimate == wilson_interval(accuracy, n)


def test_without_a_reference_training_has_to_beat_the_start(tmp_path):
    rows, status = pairs(0.7, 100, start=0.65, margin=0.3)
    found = verdict(record(tmp_path / "run", rows, status=status))
    assert found.kind == "no difference"
    assert found.sentence.endswith("can't be told apart from 65% before training.")


def test_overfitting_is_part_of_the_verdict(tmp_path):
    rows, status = pairs(0.6, 250, training=0.99)
    found = verdict(record(tmp_path / "run", rows, status=status))
    assert found.kind == "overfitted"
    assert found.sentence == (
        "Overfitted: accuracy is 99% on training pairs and 60% on held-out ones. On 250 held-out "
        "pairs the policy's reward prefers the chosen completion in 60.0% (95% interval 53.8% to "
        "65.9%): better than 50%."
    )


def finished(folder, rows, **summary):
    kept = {"command": "dpo", "eval_examples": 120, "steps": 200, **summary}
    samples = kept.pop("samples", ())
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in samples)
    (folder / "samples.jsonl").write_text(lines)
    return record(folder, rows, status={"command": "dpo", "state": "finished"}, summary=kept)


def evaluations(*losses):
    """A DPO run of 200 updates, evaluated at equal distances, with 80% accuracy."""
    start = {"step": 0, "eval/rewards/accuracies": 0.0, "eval/rewards/margins": 0.0}
    rows = [{**start, "eval/loss": 0.6931}]
    for i, loss in enumerate(losses, 1):
        step = 200 * i // len(losses)
        rows.append({"step": step, "loss": 1 / i})
        rows.append({**start, "step": step, "eval/rewards/accuracies": 0.8, "eval/loss": loss})
    return rows


def test_the_adapter_that_is_kept_decides(tmp_path):
    rows = evaluations(0.5, 0.6)
    rows[-1]["eval/rewards/accuracies"] = 0.5
    found = verdict(finished(tmp_path / "run", rows, kept_step=100))
    assert found.estimate.value == 0.8
    assert found.kind == "overfitted"
    assert found.sentence.startswith(
        "Overfitted: the result is best after update 100 of 200, and that adapter is kept. On 120"
    )
    assert found.sentence.endswith("better than 50%.")
    # A loss that rose by less than 2% is no overfitting.
    rows[-1]["eval/loss"] = 0.505
    assert verdict(finished(tmp_path / "other", rows, kept_step=100)).kind == "better"


SAME = [{"prompt": "Q", "before": "A", "after": "A"}] * 8


def test_answers_as_before_are_no_training(tmp_path):
    kl = {"mean": 0.01, "standard_error": 0.02, "samples": 8}
    found = verdict(finished(tmp_path / "run", evaluations(0.6), samples=SAME, kl=kl))
    assert found.kind == "not trained"
    assert found.sentence.startswith(
        "Not trained: after 200 updates the policy answers all 8 held-out prompts as before, and "
        "its KL from the start (0.010 nats) is within its error of 0. Train for more updates, or "
        "raise --learning-rate. On 120 held-out pairs"
    )
    # Sampled completions may differ where greedy ones do not; one different answer is enough.
    moved = {"mean": 0.9, "standard_error": 0.2, "samples": 8}
    other = [*SAME[:7], {"prompt": "Q", "before": "A", "after": "B"}]
    for i, (samples, distance) in enumerate([(SAME, moved), (other, kl)]):
        run = finished(tmp_path / str(i), evaluations(0.6), samples=samples, kl=distance)
        assert verdict(run).kind == "better"


@pytest.mark.parametrize(
    ("mean", "length", "kind"),
    [(695.0, 100, "broken"), (31.0, 100, "broken"), (29.0, 100, "better"), (50.0, 256, "better")],
)
def test_a_policy_far_from_its_start_is_broken(tmp_path, mean, length, kind):
    kl = {"mean": mean, "standard_error": 1.0, "samples": 8}
    answers = {"before": {"mean_length": 20.0}, "after": {"mean_length": float(length)}}
    found = verdict(finished(tmp_path / "run", evaluations(0.6), kl=kl, answers=answers))
    assert found.kind == kind
    if kind == "broken":
        assert found.sentence.startswith(
            f"Broken: the policy's own samples are {mean:.0f} nats from the start (above 15). On"
        )


def test_answers_that_repeat_themselves_are_broken(tmp_path):
    key = "text/repeated_4grams"
    answers = {"before": {key: 0.02}, "after": {key: 0.9}}
    found = verdict(finished(tmp_path / "run", evaluations(0.6), answers=answers))
    assert found.kind == "broken"
    assert "repeat 90% of their 4-grams, before it 2%" in found.sentence


@pytest.mark.parametrize(("rate", "kind"), [(0.79, "at risk"), (0.6, "better")])
def test_length_may_explain_an_accuracy(tmp_path, rate, kind):
    # 80% of 120 pairs: 72% to 86%.
    facts = {"chosen_longer": rate, "rejected_longer": 1 - rate}
    found = verdict(finished(tmp_path / "run", evaluations(0.6), data_facts=facts))
    assert found.kind == kind
    begins = (
        "At risk: length alone may explain the result, because the longer completion is chosen "
    )
    assert found.sentence.startswith(begins) == (kind == "at risk")


def test_a_falling_chosen_logprob_is_a_risk(tmp_path):
    rows = evaluations(0.6)
    for row, chosen in zip((rows[0], rows[-1]), (-50.0, -60.0), strict=True):
        row.update({"eval/logps/chosen": chosen, "eval/logps/rejected": chosen - 20})
    found = verdict(finished(tmp_path / "run", rows))
    assert found.kind == "at risk"
    assert found.sentence.startswith(
        "At risk: the log-probs of chosen completions fell; read the answers. On 120 held-out pairs"
    )


def test_five_examples_are_too_few(tmp_path):
    # Wilson's interval of 5 of 5 begins at 57%, but five tosses of a coin agree in 6% of cases.
    rows, status = pairs(1.0, 5)
    found = verdict(record(tmp_path / "run", rows, status=status))
    assert found.kind == "no difference"
    assert found.sentence.endswith("too few to tell it from 50%.")


def test_one_example_is_singular(tmp_path):
    rows, status = pairs(1.0, 1)
    assert (
        "On 1 held-out pair the" in verdict(record(tmp_path / "run", rows, status=status)).sentence
    )


def test_a_run_that_is_not_trained(tmp_path):
    start, status = pairs(0.6)
    found = verdict(record(tmp_path / "run", start[:1], status={**status, "step": 0}))
    assert (found.kind, found.sentence) == (
        "not trained",
        "Not trained yet: no update has been made.",
    )
    rows = [*start, {"step": 5, "loss": 1.0, "skipped": 5}]
    found = verdict(record(tmp_path / "skipped", rows, status=status))
    assert (found.kind, found.sentence) == (
        "not trained",
        "Not trained: all 5 updates were skipped.",
    )


def test_without_held_out_data_there_is_no_verdict(tmp_path):
    found = verdict(record(tmp_path / "run", [{"step": 5, "loss": 1.0}]))
    assert (found.kind, found.estimate, found.n) == ("unknown", None, None)
    assert "no held-out" in found.sentence


def test_the_number_of_held_out_examples(tmp_path):
    def count(command="dpo", config=None, **files):
        status = {"command": command, "state": "finished", "data_facts": {"valid_groups": 40}}
        return held_out_examples(record(tmp_path / "run", [], config, status=status, **files))

    assert count() == 40
    assert count(config={"val_batches": 3, "batch_size": 8}) == 24
    assert count(config={"val_batches": 25, "batch_size": 8}) == 40
    assert count(config={"val_batches": 3, "batch_tokens": 512}) is None
    assert count(summary={"command": "dpo", "eval_examples": 17}) == 17
    assert count("ppo", summary={"command": "ppo", "kl": {"samples": 12}}) == 12
    rows, status = pairs(0.6)
    del status["eval_examples"]
    found = verdict(record(tmp_path / "old", rows, {"val_batches": 3}, status=status))
    assert (found.kind, found.estimate) == ("unknown", None)
    assert "60%; their number is not recorded, so there is no interval." in found.sentence


def test_unpaired_examples(tmp_path):
    rows, status = pairs(0.5, 50)
    # The sign of the rewards is right for half; all the same, good ones are above bad ones.
    rows[-1] |= {"eval/rewards/auc": 0.8, "eval/count/chosen": 30.0, "eval/count/rejected": 20.0}
    found = verdict(record(tmp_path / "run", rows, status={**status, "command": "kto"}))
    assert (found.kind, found.estimate) == ("better", wilson_interval(0.8, 20))
    assert found.sentence == (
        "On 50 held-out completions a good one has a higher reward than a bad one in 80% (95% "
        "interval 58% to 92%): better than 50%."
    )


def report(low, high, longer):
    report = {"accuracy": 0.64, "accuracy_low": low, "accuracy_high": high, "comparisons": 271}
    return {"command": "reward", "steps": 5, "held_out": {**report, "longer_accuracy": longer}}


@pytest.mark.parametrize(
    ("low", "high", "longer", "kind", "ending"),
    [
        (0.58, 0.69, 0.5, "better", "better than 50% and than choosing the longer one (50.0%)."),
        (
            0.58,
            0.69,
            0.61,
            "no difference",
            "better than 50%, but can't be told apart from choosing the longer one (61.0%).",
        ),
        (
            0.58,
            0.69,
            0.9,
            "worse",
            "better than 50%, but worse than choosing the longer one (90.0%).",
        ),
        (0.48, 0.79, 0.5, "no difference", "can't be told apart from 50%."),
    ],
)
def test_reward_models(tmp_path, low, high, longer, kind, ending):
    found = verdict(record(tmp_path / "run", [], summary=report(low, high, longer)))
    assert (found.kind, found.n, found.estimate) == (kind, 271, Estimate(0.64, low, high))
    assert found.sentence.endswith(ending)


def rollouts(reward, n=32, std=0.5, name="reward"):
    rows = [
        {"step": step, f"eval/{name}": value, f"eval/{name}_std": std}
        for step, value in ((0, 0.2), (10, reward))
    ]
    status = {"command": "grpo", "state": "running", "step": 10, "eval_examples": n}
    return [*rows, {"step": 10, "loss": 1.0, "reward": 5.0}], status


def test_rewards_on_held_out_prompts(tmp_path):
    rows, status = rollouts(0.85)
    found = verdict(record(tmp_path / "run", rows, status=status))
    assert (found.kind, found.n) == ("better", 32)
    assert found.sentence == (
        "On 32 held-out prompts the mean reward went from 0.200 to 0.850 (change +0.650, 95% "
        "interval +0.395 to +0.905): better than the start."
    )
    rows, status = rollouts(0.3)
    assert verdict(record(tmp_path / "little", rows, status=status)).kind == "no difference"
    rows, status = rollouts(-0.3, name="held_out")
    found = verdict(record(tmp_path / "worse", rows, status=status))
    assert found.kind == "worse"
    assert "the mean held-out reward went from 0.200 to −0.300 (change −0.500" in found.sentence


@pytest.mark.parametrize(
    ("reward", "kind", "start"),
    [(0.85, "at risk", "At risk: entropy is 20% of"), (0.2, "broken", "Broken: entropy is 20% of")],
)
def test_a_policy_that_is_sure_is_broken_unless_its_answers_got_better(
    tmp_path, reward, kind, start
):
    rows, status = rollouts(reward)
    rows = [rows[0], {"step": 1, "reward": 0.2, "objective/entropy": 2.0}, *rows[1:]]
    rows[-1] |= {"objective/entropy": 0.4}
    found = verdict(record(tmp_path / "run", rows, status=status))
    assert found.kind == kind
    assert found.sentence.startswith(start)


def test_perplexity(tmp_path):
    def sft(last):
        rows = [{"step": 0, "eval/perplexity": 10.0}, {"step": 5, "eval/perplexity": last}]
        return verdict(record(tmp_path / "run", rows, status={"command": "sft", "step": 5}))

    found = sft(8.0)
    assert (found.kind, found.estimate) == ("better", None)
    assert "perplexity went from 10.0 to 8.00 (−20.0%): better." in found.sentence
    assert sft(9.95).kind == "no difference"
    assert sft(12.0).kind == "worse"


@pytest.mark.parametrize(
    ("high", "n", "kind", "ending"),
    [
        (0.9, 60, "better", "better than the start"),
        (1.1, 60, "no difference", "can't be told apart from the start"),
        (0.9, 3, "no difference", "too few to tell it from the start"),
    ],
)
def test_a_perplexity_with_an_interval(tmp_path, high, n, kind, ending):
    rows = [{"step": 0, "eval/perplexity": 10.0}, {"step": 5, "eval/perplexity": 8.0}]
    ratio = {"value": 0.8, "low": 0.7, "high": high}
    summary = {"command": "sft", "eval_examples": n, "held_out": {"perplexity": {"ratio": ratio}}}
    status = {"command": "sft", "step": 5, "eval_examples": n}
    found = verdict(record(tmp_path / "run", rows, status=status, summary=summary))
    assert found.kind == kind
    assert f"(× 0.80, 95% interval 0.70 to {high:.2f}): {ending}." in found.sentence


def test_comparisons(tmp_path):
    def run(name, accuracy, n=25):
        rows, status = pairs(accuracy, n)
        return record(tmp_path / name, rows, status=status)

    few = [run("a", 0.8), run("b", 0.84), run("c", 0.5)]
    found = compare_runs(few, ["a", "b", "c"])
    assert found.kind == "no difference"
    assert found.sentence == (
        "On 25 held-out pairs the policy's reward prefers the chosen completion in 84% (b) and 80% "
        "(a); the difference is 4 points (95% interval −18 to +25): they can't be told apart."
    )
    many = [run("d", 0.8, 400), run("e", 0.6, 400)]
    found = compare_runs(many, ["d", "e"])
    assert (found.kind, found.sentence[-14:]) == ("better", ": d is better.")
    broken = finished(
        tmp_path / "broken",
        pairs(0.9, 400)[0],
        eval_examples=400,
        kl={"mean": 300.0, "standard_error": 5.0, "samples": 8},
    )
    found = compare_runs([broken, many[1]], ["broken", "e"])
    assert (found.kind, found.sentence[-23:]) == ("no difference", ": but broken is broken.")
    rows, status = rollouts(0.85)
    other = record(tmp_path / "other", rows, status=status)
    assert compare_runs([many[0], other], ["d", "other"]).kind == "unknown"


def test_a_comparison_has_no_winner_that_is_not_one(tmp_path):
    def run(name, accuracy, n=400, chosen=1.0, **config):
        rows, status = pairs(accuracy, n)
        start, end = ({"eval/logps/chosen": x, "eval/logps/rejected": -9.0} for x in (0.0, chosen))
        rows[0] |= start
        rows[-1] |= end
        return record(tmp_path / name, rows, config, status=status)

    good, poor = run("good", 0.9), run("poor", 0.5)
    assert compare_runs([good, poor], ["good", "poor"]).kind == "better"
    # Too few examples, and a run that did not move.
    found = compare_runs([run("c", 1.0, 2), run("d", 0.0, 2)], ["c", "d"])
    assert found.kind == "no difference"
    assert found.sentence.endswith(": too few to tell which is better.")
    for other, sentence in (
        (run("e", 0.99, chosen=0.01), ": but e is not trained."),
        (run("f", 0.5, chosen=0.01), ": but f is not trained."),
    ):
        names = [other.name, "good"]
        found = compare_runs([other, good], names)
        assert (found.kind, found.sentence[-23:]) == ("no difference", sentence)


def test_losses_with_and_without_a_reference_are_not_compared(tmp_path):
    def run(name, accuracy, **training):
        rows, status = pairs(accuracy, 400)
        for row in rows[1:-1]:
            del row["rewards/accuracies"]
            row |= training
        return record(tmp_path / name, rows, {"loss": name}, status=status)

    with_reference = {"logps/chosen": -9.0, "rewards/chosen": 0.1}
    simpo = run("simpo", 0.9, **{"logps/chosen": -9.0})
    runs = [run("sigmoid", 0.5, **with_reference), run("ipo", 0.8, **with_reference), simpo]
    # All losses with a reference are measured by what they are trained on.
    assert compare_runs(runs, ["a", "b", "c"]).sentence.endswith(": b is better.")
    found = compare_runs([runs[0], simpo], ["a", "c"])
    assert found.kind == "unknown"
    assert "losses with and without a reference" in found.sentence
    assert "--reward-model" in found.sentence


def moves(by, command="dpo", state="finished", **summary):
    """A run of two updates whose held-out log-probs moved by this many nats, without answers."""
    rows, status = pairs(1.0, 25)
    rows = [rows[0], rows[-1]]
    for row, moved in zip(rows, (0.0, by), strict=True):
        row |= {"eval/logps/chosen": -40.0 + moved, "eval/logps/rejected": -40.0 - moved / 2}
        row |= {"eval/loss": 0.6931 - moved / 100, "eval/perplexity": 9 * 2.718 ** -(moved / 100)}
        row["eval/rewards/margins"] = moved / 10
    rows[1]["step"] = 2
    status |= {"command": command, "step": 2, "state": state}
    summary = {"command": command, "eval_examples": 25, **summary}
    return rows, {"status": status} | ({"summary": summary} if state == "finished" else {})


@pytest.mark.parametrize("command", ["dpo", "kto", "sft", "reward"])
@pytest.mark.parametrize("state", ["finished", "interrupted", "running"])
def test_without_answers_held_out_data_shows_whether_a_run_is_trained(tmp_path, command, state):
    rows, files = moves(0.05, command, state)
    run = record(tmp_path / "little", rows, **files)
    found = verdict(run)
    assert found.kind == "not trained"
    listed = [finding.text for finding in diagnose(run) if finding.signal == "samples"]
    if state == "running":
        assert found.sentence.startswith("Not trained yet: after 2 updates ")
        assert not listed
    else:
        assert found.sentence.startswith("Not trained: after 2 updates ")
        assert "Train for more updates, or raise --learning-rate." in found.sentence
        assert len(listed) == 1
    rows, files = moves(1.0, command, state)
    assert verdict(record(tmp_path / "much", rows, **files)).kind != "not trained"


def test_a_kl_above_its_error_shows_that_a_run_moved(tmp_path):
    for kl, kind in (((0.9, 0.2), "better"), ((0.1, 0.2), "not trained")):
        rows, files = moves(0.05, kl={"mean": kl[0], "standard_error": kl[1], "samples": 8})
        assert verdict(record(tmp_path / kind, rows, **files)).kind == kind


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_number_of_answers_in_words(tmp_path, n):
    words = ["the held-out prompt as", "both held-out prompts as", "all 3 held-out prompts as"]
    found = verdict(finished(tmp_path / "run", evaluations(0.6), samples=SAME[:n]))
    assert words[n - 1] in found.sentence


def test_a_run_with_equal_rewards_is_not_advised_a_higher_rate(tmp_path):
    row = {"loss": 0.0, "reward": 0.0, "reward_std": 0.0, "frac_reward_zero_std": 1.0}
    rows = [{"step": step, "grad_norm": 0.0, **row} for step in range(1, 6)]
    summary = {"command": "grpo", "steps": 5}
    (tmp_path / "run").mkdir()
    lines = "".join(json.dumps(sample) + "\n" for sample in SAME)
    (tmp_path / "run" / "samples.jsonl").write_text(lines)
    status = {"command": "grpo", "state": "finished", "step": 5}
    run = record(tmp_path / "run", rows, status=status, summary=summary)
    found = verdict(run)
    assert (found.kind, found.sentence) == (
        "not trained",
        "Not trained: the completions of every prompt had equal rewards. Use harder or easier "
        "prompts, a finer reward, or a larger --group-size.",
    )
    assert [finding.untrained for finding in diagnose(run)] == [True]


def test_a_reward_model_may_be_overfitted_or_not_trained(tmp_path):
    held_out = report(0.58, 0.69, 0.5)
    last = {"eval/rewards/margins": 0.9, "eval/loss": 0.5}
    start = {"step": 0, "eval/rewards/margins": 0.25, "eval/loss": 0.69}
    rows = [start, {"step": 5, "loss": 0.6, **last}, {"step": 10, "loss": 0.1, **last}]
    rows[-1]["eval/loss"] = 0.7
    summary = {**held_out, "kept_step": 5}
    status = {"command": "reward", "state": "finished"}
    found = verdict(record(tmp_path / "over", rows, status=status, summary=summary))
    assert (found.kind, found.n) == ("overfitted", 271)
    assert found.sentence.startswith("Overfitted: the result is best after update 5 of 10, and")
    rows = [start, {**start, "step": 10, "eval/loss": 0.689}]
    found = verdict(record(tmp_path / "not", rows, status=status, summary=held_out))
    assert found.kind == "not trained"
    skipped = {**held_out, "skipped": 5}
    found = verdict(record(tmp_path / "skipped", [], status=status, summary=skipped))
    assert found.sentence == "Not trained: all 5 updates were skipped."


def test_the_length_rule_is_one_of_the_findings(tmp_path):
    facts = {"chosen_longer": 0.79, "rejected_longer": 0.21}
    run = finished(tmp_path / "run", evaluations(0.6), data_facts=facts)
    (found,) = diagnose(run)
    assert (found.level, found.signal) == ("warn", "chosen_longer")
    few = finished(tmp_path / "few", evaluations(0.6), data_facts=facts, eval_examples=5)
    assert diagnose(few) == []


def test_intervals_against_closed_forms():
    # Wilson's ends solve (p - rate)^2 = z^2 p (1 - p) / n.
    found = wilson_interval(0.6, 25)
    for end in (found.low, found.high):
        assert (end - 0.6) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / 25)
    # Newcombe 1998, table II, (a): 56/70 against 48/80.
    found = rate_difference(wilson_interval(56 / 70, 70), wilson_interval(48 / 80, 80))
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    # Student's t of 24 degrees of freedom is 2.0639.
    found = mean_difference(1.0, 3.0, 0.0, 4.0, 25)
    assert (found.low, found.high) == pytest.approx((1 - 2.0639, 1 + 2.0639), abs=1e-4)
