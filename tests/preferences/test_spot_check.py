"""`mlx-align label --spot-check` and `--ask-by`: which pairs people see, and what is reported."""

import io
import json

import numpy as np
import pytest
from helpers.data import assistant, read_rows, user, write_rows
from helpers.runs import mlx_align

from mlx_align.config import LabelConfig
from mlx_align.data.formats import read_preferences
from mlx_align.data.provenance import PROVENANCE, judges_of
from mlx_align.preferences import disagreement
from mlx_align.preferences.ai_feedback import read_human_sample
from mlx_align.preferences.label_web import LabelServer
from mlx_align.preferences.labelling import LabelSession
from mlx_align.preferences.records import JudgementLog
from mlx_align.preferences.run_label import read_pairs
from mlx_align.system.console import Console
from mlx_align.system.intervals import wilson_interval

JUDGE = {"judge": "qwen", "judge_lineage": ["aa", "bb"], "agreement": [0.99, 0.9, 1.0]}


def judged(n, right, soft_label=0.9, **fields):
    """A row of `mlx-align judge`, whose judge prefers the good answer if it is right."""
    sides = ["good", "bad"] if right else ["bad", "good"]
    return {
        "prompt": user(f"question {n}"),
        "chosen": assistant(f"{sides[0]} {n}"),
        "rejected": assistant(f"{sides[1]} {n}"),
        "chosen_model": "m1",
        "rejected_model": "m2",
        "soft_label": soft_label,
        "topic": "x",
        PROVENANCE: JUDGE,
        **fields,
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows("judged.jsonl", [judged(n, n % 4 != 0) for n in range(80)])
    return tmp_path


def spot_check(output, share=0.5, seed=0, data="judged.jsonl", **options):
    config = LabelConfig(
        input=(str(data),), output=str(output), spot_check=share, seed=seed, **options
    )
    return read_pairs(config, output, Console(True))


def label_well(pairs, output, rater="ana"):
    """A person who prefers the good answer of every pair."""
    session = LabelSession(pairs, JudgementLog(output), {})
    while (task := session.next(rater)) is not None:
        good = task.answers[0][0].content.startswith("good")
        session.judge(rater, task.pair.id, "1" if good else "2")
    return session


def test_a_share_is_drawn_and_the_agreement_has_an_interval(folder, capsys):
    output = folder / "check.jsonl"
    pairs = spot_check(output)
    assert len(pairs) == 40
    assert [one.id for one in pairs] == [one.id for one in spot_check(output)]
    assert {one.id for one in pairs} != {one.id for one in spot_check(output, seed=1)}
    label_well(pairs, output)
    # What the judge got right among those drawn, from the data itself.
    drawn = {int(one.prompt[0].content.split()[1]) for one in pairs}
    right = np.mean([n % 4 != 0 for n in drawn])
    expected = wilson_interval(float(right), 40)
    capsys.readouterr()
    assert mlx_align("data", "agreement", output, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    (check,) = found["spot_checks"]
    assert (check["judge"], check["pairs"], check["before"]) == ("qwen", 40, 0.99)
    assert check["claimed"] == pytest.approx(0.9)
    assert check["agreement"]["value"] == pytest.approx(right)
    assert check["agreement"]["low"] == pytest.approx(expected.low)
    assert check["agreement"]["high"] == pytest.approx(expected.high)
    assert "its soft labels claim 90%, more than the spot check shows" in found["warnings"][-1]
    assert mlx_align("data", "agreement", output) == 0
    assert f"people agree with {right:.0%}" in " ".join(capsys.readouterr().out.split())


def test_the_judge_is_in_the_file_and_not_on_the_screen(folder):
    output = folder / "check.jsonl"
    pairs = spot_check(output, share=0.1)
    session = LabelSession(pairs, JudgementLog(output), {})
    with LabelServer(session) as server:
        shown = server.state("ana")
    for hidden in ("qwen", "m1", "spot_check", "winner", "0.9"):
        assert hidden not in json.dumps(shown)
    label_well(pairs, output)
    # The labels are people's: nothing of the judge's is in them.
    groups, _ = read_preferences(str(output))
    assert judges_of(groups) == {}
    assert {group.completions[0][0].content[:4] for group in groups} == {"good"}
    assert {group.columns["topic"] for group in groups} == {"x"}
    sample, _ = read_human_sample(str(output))
    assert {pair.human for pair in sample} == {1.0}
    for group in groups:
        n = int(group.prompt[0].content.split()[1])
        assert group.columns["chosen_model"] == ("m1" if n % 4 else "m2")


def test_ties_and_hard_labels_of_a_judge(folder, capsys):
    rows = [judged(0, True, 0.5), judged(1, True), judged(2, False)]
    del rows[1]["soft_label"], rows[2]["soft_label"]
    write_rows("judged.jsonl", rows)
    output = folder / "check.jsonl"
    label_well(spot_check(output, share=1.0), output)
    assert mlx_align("data", "agreement", output, "--json") == 0
    (check,) = json.loads(capsys.readouterr().out)["spot_checks"]
    assert check["agreement"]["value"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert check["claimed"] is None


def test_the_command_says_how_far_you_agree(folder, capsys, monkeypatch):
    write_rows("judged.jsonl", [judged(n, True) for n in range(30)])
    monkeypatch.setattr("sys.stdin", io.StringIO("1" * 6))
    options = ("--spot-check", 0.2, "--output", "check.jsonl", "--rater", "ana")
    assert mlx_align("label", "judged.jsonl", *options) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "30 pairs); 6 of them to check" in out
    assert "Spot check of qwen: people agree with" in out
    assert len(read_rows("check.jsonl")) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--spot-check", 1.5), "--spot-check 1.5: out of range"),
        (("--spot-check", 0.1, "--model", "m"), "--model: has no effect with --spot-check"),
        (("--ask-by", "disagreement"), "--ask-by disagreement needs --reward-model"),
        (("--reward-model", "rm"), "--ask-by disagreement needs --reward-model"),
        (
            ("--spot-check", 0.1, "--ask-by", "disagreement", "--reward-model", "rm"),
            "--spot-check draws at random",
        ),
    ],
)
def test_wrong_options_are_named(folder, capsys, options, message):
    assert mlx_align("label", "judged.jsonl", "--output", "check.jsonl", *options) == 1
    assert message in capsys.readouterr().err


def test_labels_of_people_have_no_judge_to_check(folder, capsys):
    row = judged(0, True)
    del row[PROVENANCE]
    write_rows("pairs.jsonl", [row])
    options = ("--output", "check.jsonl", "--spot-check", 0.5)
    assert mlx_align("label", "pairs.jsonl", *options) == 1
    assert "doesn't say which judge labelled it" in capsys.readouterr().err


def test_pairs_with_the_most_disagreement_are_shown_first(folder, monkeypatch):
    """Scores by two planted heads, which disagree more the higher a pair's number is."""
    monkeypatch.setattr(disagreement, "open_reward_model", lambda name: name)

    def scores(model, pairs):
        assert model == "heads"
        numbers = [int(prompt[0].content.split()[1]) for prompt, _, _ in pairs]
        return np.array([np.nan if n == 79 else float(n) for n in numbers])

    monkeypatch.setattr(disagreement, "score_disagreement", scores)
    config = LabelConfig(
        input=("judged.jsonl",),
        output="labels.jsonl",
        ask_by="disagreement",
        reward_model="heads",
        max_pairs=10,
    )
    pairs = read_pairs(config, folder / "labels.jsonl", Console(True))
    numbers = [int(pair.prompt[0].content.split()[1]) for pair in pairs]
    assert numbers == list(range(78, 68, -1))
    assert all(PROVENANCE not in pair.columns for pair in pairs)
