"""`mlx-align data agreement`: planted raters are found out, and their files joined."""

import json

import numpy as np
import pytest
from helpers.data import read_rows, write_rows
from helpers.paths import STARTER

from mlx_align.cli.main import run as run_command
from mlx_align.data.agreement import cohen_kappa, fit_preferences, krippendorff_alpha
from mlx_align.data.formats import read_preferences
from mlx_align.data.judgements import Judgement, pair_answers
from mlx_align.preferences.raters import report_agreement, warnings_of
from mlx_align.types import Message

# Right in 90%, 90%, half; the last prefers what is shown first, and is fast.
RELIABILITY = {"ana": 0.9, "ben": 0.9, "eve": 0.5}


def planted(count=200, seed=0):
    draw = np.random.default_rng(seed)
    found = []
    for n in range(count):
        answers = tuple((Message("assistant", f"{w} {n}"),) for w in ("good", "very long bad"))
        pair = pair_answers((Message("user", f"{n}?"),), answers)
        good = "a" if pair.a[0].content.startswith("good") else "b"
        bad = {"a": "b", "b": "a"}[good]
        for rater, right in RELIABILITY.items():
            first = "a" if draw.random() < 0.5 else "b"
            winner = good if draw.random() < right else bad
            if rater == "eve":
                winner = first
            elif draw.random() < 0.1:
                winner = "tie"
            seconds = 1.0 if rater == "eve" else 20.0
            found.append(
                Judgement(
                    pair,
                    winner,
                    rater,
                    time=f"2026-01-01T00:00:{len(found):06d}Z",
                    seconds=seconds,
                    shown_first=first,
                    criteria={"helpful": winner, "honest": None},
                )
            )
    return found


def test_planted_raters_are_found_out():
    judgements = planted()
    report = report_agreement(judgements)
    ana, _, eve = report.raters
    assert (report.pairs, report.several) == (200, 200)
    assert ana.reliability == pytest.approx(0.9, abs=0.05)
    assert eve.reliability == pytest.approx(0.5, abs=0.08)
    assert eve.first.value == 1
    assert ana.first.low < 0.5 < ana.first.high
    assert ana.longer.high < 0.25
    assert (ana.seconds, eve.seconds) == (20, 1)
    assert ana.agreement.low > eve.agreement.value
    assert ana.ties > 5
    found = " ".join(warnings_of(report))
    for text in (
        "eve prefers the answer shown first in 100%",
        "eve is right in",
        "eve takes 1.0 s per pair",
    ):
        assert text in found
    assert "ana" not in found
    assert "ben" not in found
    label = {"a": 0, "tie": 1, "b": 2}
    table = np.array([[label[j.winner] for j in judgements if j.rater == r] for r in RELIABILITY])
    assert report.alpha_nominal.value == krippendorff_alpha(table)
    assert report.alpha_ordinal.value == krippendorff_alpha(table, "ordinal")
    assert report.cohen["ana, ben"] == cohen_kappa(table[0], table[1])
    assert report.criteria["helpful"].value == report.alpha_nominal.value
    assert "honest" not in report.criteria


def test_files_are_joined_into_pairs_with_soft_labels(tmp_path, capsys):
    judgements = planted(40)
    files = [
        str(
            write_rows(
                tmp_path / f"{name}.jsonl",
                [one.to_dict() for one in judgements if one.rater == name],
            )
        )
        for name in RELIABILITY
    ]
    output = tmp_path / "pairs.jsonl"
    assert run_command(["data", "agreement", *files, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "40 pairs, 3 raters" in shown
    assert "Krippendorff's alpha" in shown
    assert "! eve prefers" in shown
    rows = read_rows(output)
    assert f"Wrote {len(rows)} pairs" in shown
    label = {"a": 0, "tie": 1, "b": 2}
    table = np.array([[label[j.winner] for j in judgements if j.rater == r] for r in RELIABILITY])
    soft = fit_preferences(table).soft_labels
    ids = [one.pair for one in judgements if one.rater == "ana"]
    expected = {
        (pair.a if p > 0.5 else pair.b)[0].content: max(p, 1 - p)
        for pair, p in zip(ids, soft, strict=True)
    }
    for row in rows:
        assert row["soft_label"] == pytest.approx(expected[row["chosen"][0]["content"]])
    # The pairs are read as they were written, and so are the files joined end to end.
    groups, _ = read_preferences(output)
    both = write_rows(tmp_path / "all.jsonl", [row for file in files for row in read_rows(file)])
    joined, _ = read_preferences(both)
    assert [(g.completions, g.soft_label) for g in groups] == [
        (g.completions, pytest.approx(g.soft_label)) for g in joined
    ]
    again = ["data", "agreement", *files, "--output", str(tmp_path / "sure.jsonl"), "--json"]
    assert run_command([*again, "--min-agreement", "0.9"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["written"] < len(rows)
    assert any("--min-agreement" in reason for reason in report["dropped"])
    assert len(report["raters"]) == 3


def test_one_rater_has_no_agreement_but_biases():
    report = report_agreement([one for one in planted(30) if one.rater == "ana"])
    assert report.alpha_nominal is None
    assert report.fleiss is None
    assert report.raters[0].reliability is None
    assert report.raters[0].first is not None


def test_raters_without_a_pair_in_common_are_told():
    judgements = planted(40)
    half = judgements[len(judgements) // 2].pair.id
    index = next(i for i, one in enumerate(judgements) if one.pair.id == half)
    earlier = [one for one in judgements[:index] if one.rater == "ana"]
    others = [one for one in judgements[index:] if one.rater == "ben"]
    report = report_agreement([*earlier, *others])
    assert report.alpha_nominal is None
    assert report.raters[0].agreement is None
    assert "no pair has verdicts of two raters" in warnings_of(report)[0]


def test_other_files_are_refused(tmp_path, capsys):
    file = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "x", "chosen": "y", "rejected": "z"}])
    assert run_command(["data", "agreement", str(file)]) == 1
    assert "pairs.jsonl:1: not a judgement" in capsys.readouterr().err


def test_data_check_shows_how_far_raters_agree(tmp_path, capsys):
    rows = [one.to_dict() for one in planted(30)]
    file = write_rows(tmp_path / "labels.jsonl", rows)
    command = ["data", "check", "--model", str(STARTER / "model"), "--data", str(file)]
    assert run_command(command) == 0
    shown = capsys.readouterr().out
    assert "30 pairs, 3 raters" in shown
    assert "Krippendorff's alpha" in shown
    assert run_command([*command, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["raters"]["raters"]) == 3
