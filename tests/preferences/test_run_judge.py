"""`mlx-align judge`: a judge is measured on people's labels, labels pairs, and continues."""

import json
import math
import random

import pytest
from helpers.data import assistant, read_rows, user, write_rows
from helpers.endpoints import Reply, serve
from helpers.paths import TINY_MODEL
from helpers.runs import mlx_align

from mlx_align.data.formats import read_preferences
from mlx_align.data.readers import read_rows as read_data
from mlx_align.preferences.ai_feedback import read_human_sample

RULE = """
def better(prompts, completions):
    return [None if "skip" in text else text.count("good") for text in completions]
"""


def pair(i, chosen="good", rejected="bad", **columns):
    return {
        "prompt": user(f"question {i}"),
        "chosen": assistant(f"{chosen} {i}"),
        "rejected": assistant(f"{rejected} {i}"),
        **columns,
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rule.py").write_text(RULE)
    write_rows("human.jsonl", [pair(i) for i in range(30)])
    return tmp_path


def judge(*options, data="pairs.jsonl", output="out.jsonl"):
    return mlx_align("judge", "--data", data, "--output", output, *options)


def rule(*options, **settings):
    return judge("--reward", "rule.py:better", *options, **settings)


def text(messages):
    return messages[0]["content"]


def test_a_rule_labels_exactly(folder):
    rows = [pair(0), pair(1, "bad", "good"), pair(2, "bad", "worse"), pair(3, "skip", "good")]
    write_rows("pairs.jsonl", [{**row, "topic": "x", "score_chosen": 1} for row in rows])
    assert rule("--human", "human.jsonl") == 0
    found = read_rows("out.jsonl")
    assert [text(row["chosen"]) for row in found] == ["good 0", "good 1"]
    # 30 of 30 right: the label is 31/32, not 1.
    assert [row["soft_label"] for row in found] == pytest.approx([31 / 32] * 2, abs=1e-5)
    assert found[0]["topic"] == "x"
    assert "score_chosen" not in found[0]
    report = json.loads((folder / "out.report.json").read_text())
    assert (report["pairs"], report["written"], report["ties"]) == (4, 2, 1)
    assert report["invalid"] == {"an answer has no reward": 1}
    assert report["judge"]["agreement"]["value"] == 1
    groups, read = read_preferences("out.jsonl")
    assert read.format == "pairs"
    assert [group.soft_label for group in groups] == pytest.approx([31 / 32] * 2, abs=1e-5)
    assert rule("--human", "human.jsonl", "--ties", "half", output="ties.jsonl") == 0
    assert [row["soft_label"] for row in read_rows("ties.jsonl")][2] == 0.5
    assert rule("--human", "human.jsonl", "--labels", "hard", output="hard.jsonl") == 0
    assert "soft_label" not in read_rows("hard.jsonl")[0]


def test_lists_of_answers_become_all_pairs_and_keep_their_authors(folder):
    answers = [{"text": "good good", "model": "m1"}, {"text": "good", "model": "m2"}, {"text": "x"}]
    write_rows("answers.jsonl", [{"prompt": "q", "completions": answers}])
    assert rule("--human", "human.jsonl", data="answers.jsonl") == 0
    found = read_rows("out.jsonl")
    assert {(row["chosen"], row["rejected"]) for row in found} == {
        ("good good", "good"), ("good good", "x"), ("good", "x"),
    }  # fmt: skip
    first = next(row for row in found if row["rejected"] == "good")
    assert (first["chosen_model"], first["rejected_model"]) == ("m1", "m2")
    assert "rejected_model" not in next(row for row in found if row["rejected"] == "x")
    one = ("--pairs-per-prompt", 1)
    assert rule("--human", "human.jsonl", *one, data="answers.jsonl", output="one.jsonl") == 0
    assert len(read_rows("one.jsonl")) == 1


def test_a_judge_that_cannot_beat_a_coin_labels_nothing(folder, capsys):
    write_rows("pairs.jsonl", [pair(0)])
    sides = [("good", "bad"), ("bad", "good")]
    write_rows("coin.jsonl", [pair(i, *sides[i % 2]) for i in range(40)])
    assert rule("--human", "coin.jsonl") == 1
    error = capsys.readouterr().err
    assert "the judge agrees with people on 50.0% (35.2% to 64.8%) of 40 pairs" in error
    assert "--allow-unproven" in error
    assert not (folder / "out.jsonl").exists()
    assert rule() == 1
    assert "--human is missing" in capsys.readouterr().err
    assert rule("--allow-unproven") == 0
    # Without people's labels the rule's own verdict is the label.
    assert read_rows("out.jsonl")[0]["soft_label"] == pytest.approx(0.9999)


def test_options_without_effect_are_errors(folder, capsys):
    write_rows("pairs.jsonl", [pair(0)])
    for options, message in [
        ((), "no judge; give --model"),
        (("--model", "m", "--reward-model", "r"), "--model and --reward-model name several judges"),
        (("--url", "http://127.0.0.1/v1"), "needs --model"),
        (("--reward", "rule.py:better", "--batch-size", 2), "--batch-size: has no effect on"),
        (("--reward", "rule.py:better", "--by-criterion"), "--by-criterion: has no effect"),
        (("--reward", "rule.py:better", "--own-name", "x"), "--own-name: self-preference is"),
    ]:
        assert judge(*options) == 1
        assert message in capsys.readouterr().err


def planted(position, error, own="", own_shift=0.0, invalid=()):
    """An endpoint whose log-odds for the first answer are position + quality (+ own)."""

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    def logit(p):
        return math.log(p / (1 - p))

    def answer(request):
        content = request["messages"][0]["content"]
        if any(word in content for word in invalid):
            return Reply("I would rather not say.", {"I": 0.9, "A": 0.1})
        shown = [content.split(f"[Answer {x}]\n")[1].split("\n[End")[0] for x in "AB"]
        odds = logit(position) + logit(1 - error) * (1 if "good" in shown[0] else -1)
        odds += own_shift * ((own in shown[0]) - (own in shown[1])) if own else 0
        p = sigmoid(odds)
        # 20% noise: whether this verdict is right is drawn once for this text.
        drawn = random.Random(content).random() < p
        return Reply("A" if drawn else "B")

    return answer


def test_a_planted_judge_is_found_out_and_corrected_through_the_command(folder):
    """Position bias .7, 20% noise, 300 labelled pairs: within .06; wrong labels fall to 6%."""
    write_rows("human.jsonl", [pair(i) for i in range(300)])
    write_rows("pairs.jsonl", [pair(i) for i in range(1000, 1200)])
    with serve(planted(0.7, 0.2)) as (url, requests):
        settings = ("--url", url, "--model", "planted", "--concurrency", 8)
        assert judge(*settings, "--human", "human.jsonl") == 0
    assert len(requests) == 2 * 500
    report = json.loads((folder / "out.report.json").read_text())
    assert report["judge"]["position_bias"]["value"] == pytest.approx(0.7, abs=0.06)
    assert report["judge"]["noise"]["value"] == pytest.approx(0.2, abs=0.06)
    rows = read_rows("out.jsonl")
    wrong = sum("bad" in text(row["chosen"]) for row in rows) / len(rows)
    assert wrong == pytest.approx(0.06, abs=0.04)
    assert rows[0]["soft_label"] == pytest.approx(0.94, abs=0.04)
    # Verdicts that depend on the order are ties, not preferences.
    assert len(rows) + report["ties"] == 200
    assert report["ties"] == pytest.approx(0.39 * 200, abs=20)


def test_invalid_outputs_are_counted_and_never_become_a_preference(folder):
    write_rows("pairs.jsonl", [pair(0), pair(1, "good secret"), pair(2, "bad", "good")])
    with serve(planted(0.5, 1e-9, invalid=["secret"])) as (url, _):
        assert judge("--url", url, "--model", "m", "--human", "human.jsonl") == 0
    assert [text(row["chosen"]) for row in read_rows("out.jsonl")] == ["good 0", "good 2"]
    report = json.loads((folder / "out.report.json").read_text())
    assert report["invalid"] == {"too little probability on a verdict": 1}
    verdicts = read_rows("out.verdicts.jsonl")
    assert sum(bool(verdict["invalid"]) for verdict in verdicts) == 2  # in both orders


def test_self_preference_is_measured_by_author(folder, capsys):
    rows = [
        pair(i, "good own" if i % 2 else "good", "bad" if i % 2 else "bad own") for i in range(240)
    ]
    authors = [("m", "other"), ("other", "m")]
    for i, row in enumerate(rows):
        row["chosen_model"], row["rejected_model"] = authors[0] if i % 2 else authors[1]
    write_rows("human.jsonl", rows)
    write_rows("pairs.jsonl", [pair(0)])
    with serve(planted(0.5, 0.3, own="own", own_shift=1.0)) as (url, _):
        settings = ("--url", url, "--model", "m", "--human", "human.jsonl", "--concurrency", 8)
        assert judge(*settings) == 0
        report = json.loads((folder / "out.report.json").read_text())["judge"]
        found = report["self_preference"]
        # Both orders agree more often on its own answer than one order says: above σ(1) = .73.
        assert 0.65 < found["value"] < 0.9
        assert report["calibration"]["own_shift"] < -0.3
        assert "self-preference: chooses its own" in capsys.readouterr().out
        assert judge(*settings, "--own-name", "somebody", output="other.jsonl") == 0
    report = json.loads((folder / "other.report.json").read_text())["judge"]
    assert report["self_preference"] is None


def test_an_interrupted_command_continues(folder, capsys):
    write_rows("pairs.jsonl", [pair(i) for i in range(100, 140)])
    count = 0

    def dies(request):
        nonlocal count
        count += 1
        return Reply("no", code=401) if count > 100 else planted(0.5, 1e-9)(request)

    with serve(dies) as (url, _):
        settings = ("--url", url, "--model", "m", "--human", "human.jsonl")
        assert judge(*settings) == 1
        kept = len(read_rows("out.verdicts.jsonl"))
        assert 60 <= kept <= 100
        # A line that was cut off is judged again.
        with (folder / "out.verdicts.jsonl").open("a") as stream:
            stream.write('{"key": "12')
        assert not (folder / "out.jsonl").exists()
        count = -10_000
        assert judge(*settings) == 0
    assert f"continuing: {kept} verdicts" in capsys.readouterr().out
    assert count + 10_000 == 2 * 70 - kept
    assert len(read_rows("out.verdicts.jsonl")) == 2 * 70
    assert len(read_rows("out.jsonl")) == 40


def test_a_damaged_log_is_named(folder, capsys):
    write_rows("pairs.jsonl", [pair(0)])
    (folder / "out.verdicts.jsonl").write_text("{}\n")
    assert rule("--human", "human.jsonl") == 1
    assert "out.verdicts.jsonl:1: damaged (no 'key')" in capsys.readouterr().err


def test_several_raters_count_by_their_votes(folder):
    rows = [
        {"prompt": f"q{i}", "response_a": f"good {i}", "response_b": f"bad {i}", "rater": rater,
         "winner": "b" if (i, rater) == (0, "cy") else "a"}
        for i in range(30) for rater in ("ana", "bo", "cy")
    ]  # fmt: skip
    write_rows("raters.jsonl", rows)
    pairs, _ = read_human_sample("raters.jsonl")
    assert sorted(pair.human for pair in pairs)[:2] == pytest.approx([2 / 3, 1.0])
    write_rows("pairs.jsonl", [pair(0)])
    assert rule("--human", "raters.jsonl") == 0
    # 30 of 30 pairs right, with one vote of 90 against: (30 - 1/3 + 1)/32.
    label = read_rows("out.jsonl")[0]["soft_label"]
    assert label == pytest.approx((30 - 1 / 3 + 1) / 32, abs=1e-3)


def test_criteria_of_a_rubric_are_shown_and_can_be_judged_one_by_one(folder):
    write_rows("pairs.jsonl", [pair(0)])
    write_rows("human.jsonl", [pair(i) for i in range(8)])
    (folder / "rubric.yaml").write_text("criteria:\n  brief: short answers\n  polite:\n")
    with serve(planted(0.5, 1e-9)) as (url, requests):
        settings = ("--url", url, "--model", "m", "--rubric", "rubric.yaml")
        assert judge(*settings, "--human", "human.jsonl") == 0
        assert "- brief: short answers\n- polite\n" in requests[0]["messages"][0]["content"]
        before = len(requests)
        one_by_one = (*settings, "--by-criterion", "--human", "human.jsonl")
        assert judge(*one_by_one, output="each.jsonl") == 0
    assert len(requests) - before == 2 * before
    names = {row["criterion"] for row in read_rows("each.verdicts.jsonl")}
    assert names == {"brief", "polite"}
    assert len(read_rows("each.jsonl")) == 1


def test_a_language_model_judges(folder, capsys):
    """The tiny model knows nothing: it is refused, and labels only when told to."""
    write_rows("pairs.jsonl", [pair(0), pair(1)])
    mixed = [pair(i, *[("good", "bad"), ("bad", "good")][i % 2]) for i in range(6)]
    write_rows("human.jsonl", mixed)
    model = ("--model", TINY_MODEL, "--min-verdict-mass", 0, "--ties", "half")
    assert judge(*model, "--human", "human.jsonl") == 1
    assert "can't be told apart from a coin" in capsys.readouterr().err
    assert judge(*model, "--human", "human.jsonl", "--allow-unproven") == 0
    out = capsys.readouterr().out
    assert "position bias: chooses the first of two equal answers" in out
    row = read_data("out.jsonl")[0].fields
    assert 0.5 <= row["soft_label"] < 1
    assert len(row["provenance"]["judge_lineage"]) == 1
    assert judge("--model", TINY_MODEL, "--human", "human.jsonl", output="none.jsonl") == 1
    assert "no valid verdict on a pair" in capsys.readouterr().err
