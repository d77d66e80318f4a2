"""Lines of answers and judgements: one name for a pair in every file, and nothing is lost."""

import json

import numpy as np
import pytest
from helpers.data import assistant, read_rows, user, write_rows

from mlx_align.config import LabelOptions
from mlx_align.data.agreement import fit_preferences
from mlx_align.data.columns import configure_data
from mlx_align.data.formats import read_preferences, read_scorable
from mlx_align.data.judgements import Judgement, latest_judgements, pair_answers, read_judgement
from mlx_align.data.readers import Row
from mlx_align.errors import ConfigError, DataError
from mlx_align.preferences.records import Answers, JsonLog, JudgementLog
from mlx_align.types import Message

PROMPT = (Message("user", "Capital of Australia?"),)
CANBERRA, SYDNEY = (Message("assistant", text) for text in ("Canberra.", "Sydney."))


def pair_of(text="Capital of Australia?", answers=("Canberra.", "Sydney.")):
    first, second = ((Message("assistant", answer),) for answer in answers)
    return pair_answers((Message("user", text),), (first, second), "data.jsonl:1", ("x", "y"))


def judged(pair, winner, rater="ana", **fields):
    return Judgement(pair, winner, rater, **{"time": "2026-01-01T00:00:00Z", **fields})


def test_a_pair_has_one_name_in_whichever_order_its_answers_are():
    one = pair_answers(PROMPT, ((CANBERRA,), (SYDNEY,)), authors=("x", "y"))
    other = pair_answers(PROMPT, ((SYDNEY,), (CANBERRA,)), authors=("y", "x"))
    assert (one.id, one.a, one.b, one.authors) == (other.id, other.a, other.b, other.authors)
    assert one.id != pair_answers(PROMPT, ((CANBERRA,), (CANBERRA,))).id
    assert one.id != pair_answers("Capital of Australia?", ("Canberra.", "Sydney.")).id


def test_a_judgement_is_read_as_it_was_written():
    pair = pair_of()
    given = judged(
        pair,
        "b",
        seconds=3.5,
        shown_first="b",
        criteria={"helpful": "a", "honest": None},
        note="ö\n",
        probability=0.25,
    )
    row = Row("f:1", json.loads(json.dumps(given.to_dict())))
    assert read_judgement(row) == Judgement(**{**_fields(given), "source": "f:1"})


def _fields(judgement):
    return {name: getattr(judgement, name) for name in Judgement.__slots__}


def row_of(fields):
    """A row as files are read: without fields that are null."""
    return Row("f:1", {key: value for key, value in fields.items() if value is not None})


def test_other_programs_may_name_the_answers_as_they_like():
    row = judged(pair_of(), "a", shown_first="b", criteria={"x": "b"}, probability=0.75).to_dict()
    swap = {"a": "b", "b": "a"}
    other = {
        **row,
        "response_a": row["response_b"],
        "response_b": row["response_a"],
        "model_a": row["model_b"],
        "model_b": row["model_a"],
        "winner": "b",
        "shown_first": "a",
        "criteria": {"x": "a"},
        "probability": 0.25,
    }
    assert swap[other["winner"]] == row["winner"]
    assert read_judgement(row_of(other)) == read_judgement(row_of(row))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"winner": "first"}, "'winner' is text 'first'; expected a, b, tie"),
        ({"rater": " "}, "'rater' is empty"),
        ({"shown_first": "left"}, "expected a or b"),
        ({"criteria": ["helpful"]}, "'criteria' is list; expected an object"),
        ({"seconds": "3"}, "'seconds' is text '3'"),
    ],
)
def test_a_wrong_field_is_named(change, message):
    row = {**judged(pair_of(), "a").to_dict(), **change}
    with pytest.raises(DataError, match=message):
        read_judgement(row_of(row))


def test_the_last_judgement_of_a_rater_counts():
    pair, other = pair_of(), pair_of("Capital of France?", ("Paris.", "Lyon."))
    lines = [
        judged(pair, "a", time="2026-01-01T00:00:00Z"),
        judged(other, "tie", time="2026-01-01T00:00:01Z"),
        judged(pair, "b", "ben", time="2026-01-01T00:00:02Z"),
        judged(pair, "b", time="2026-01-01T00:00:03Z"),
        judged(other, "undone", time="2026-01-01T00:00:04Z"),
    ]
    # Files of several raters may be joined in any order.
    for order in (lines, lines[::-1]):
        kept = {(one.rater, one.pair.id): one.winner for one in latest_judgements(order)}
        assert kept == {("ana", pair.id): "b", ("ben", pair.id): "b"}


def test_half_a_line_is_removed_and_the_rest_kept(tmp_path):
    file = tmp_path / "labels.jsonl"
    log = JudgementLog(file)
    log.add(judged(pair_of(), "a"))
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: len(whole) // 2])
    log = JudgementLog(file)
    assert file.read_bytes() == whole
    log.add(judged(pair_of(), "b"))
    assert [row["winner"] for row in read_rows(file)] == ["a", "b"]
    assert [one.winner for one in JudgementLog(file).by("ana").values()] == ["b"]
    assert JudgementLog(file).by("ben") == {}


def test_another_file_is_not_taken_for_judgements(tmp_path):
    file = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "x", "chosen": "y", "rejected": "z"}])
    with pytest.raises(DataError, match="not a judgement of mlx-align label"):
        JudgementLog(file)


def test_one_log_for_several_writers(tmp_path):
    first, second = JsonLog(tmp_path / "log.jsonl"), JsonLog(tmp_path / "log.jsonl")
    for number in range(3):
        first.add({"n": number})
        second.add({"n": number})
    assert [row.fields["n"] for row in first.rows()] == [0, 0, 1, 1, 2, 2]


def test_answers_are_read_as_lists_of_completions(tmp_path):
    answers = Answers(
        PROMPT, ("Canberra.", "Sydney."), ("m", "m + run"), ("t=0.5", "t=1"), {"k": 1}
    )
    file = write_rows(tmp_path / "answers.jsonl", [answers.to_dict()])
    (row,) = read_scorable(file)
    assert row.group.completions == ((CANBERRA,), (SYDNEY,))
    assert row.group.columns == {"models": ["m", "m + run"], "arms": ["t=0.5", "t=1"], "k": 1}


def test_one_rater_gives_plain_pairs(tmp_path):
    pair, other = pair_of(), pair_of("Capital of France?", ("Paris.", "Lyon."))
    rows = [judged(pair, "b").to_dict(), judged(other, "tie").to_dict()]
    rows.append(judged(pair_of("2 + 2?", ("4", "5")), "unsure").to_dict())
    groups, report = read_preferences(write_rows(tmp_path / "labels.jsonl", rows))
    assert [group.completions for group in groups] == [(pair.b, pair.a)]
    assert groups[0].soft_label is None
    assert groups[0].columns["chosen_model"] == pair.authors[1]
    assert report.dropped == {"tied": 1, "without a verdict (unsure or skipped)": 1}


def raters_rows(verdicts):
    """Judgements by (rater, pair number, winner)."""
    pairs = [pair_of(f"{n} + 1?", (str(n + 1), str(n))) for n in range(8)]
    return pairs, [judged(pairs[n], winner, rater).to_dict() for rater, n, winner in verdicts]


def test_several_raters_give_soft_labels_by_dawid_skene(tmp_path):
    verdicts = [(rater, n, "a") for rater in ("ana", "ben", "eva") for n in range(8)]
    verdicts[8] = ("ben", 0, "b")
    verdicts[16] = ("eva", 0, "b")
    pairs, rows = raters_rows(verdicts)
    groups, _ = read_preferences(write_rows(tmp_path / "labels.jsonl", rows))
    labels = np.array(
        [
            [0 if w == "a" else 2 for r, _, w in verdicts if r == name]
            for name in ("ana", "ben", "eva")
        ]
    )
    expected = fit_preferences(labels).soft_labels
    assert groups[0].completions == (pairs[0].b, pairs[0].a)
    assert groups[0].votes == (2, 1)
    assert groups[0].soft_label == pytest.approx(1 - expected[0])
    assert [group.soft_label for group in groups[1:]] == pytest.approx(expected[1:].tolist())


def test_min_agreement_reads_what_data_agreement_writes(tmp_path):
    row = {"chosen": assistant("yes"), "rejected": assistant("no"), "soft_label": 0.9}
    rows = [
        {**row, "prompt": user(str(n)), "agreement": share}
        for n, share in enumerate((1.0, 0.75, 0.6, "high", 7))
    ]
    data = configure_data(write_rows(tmp_path / "p.jsonl", rows), LabelOptions(min_agreement=0.7))
    groups, report = read_preferences(data)
    # What isn't a share of raters says nothing about them.
    assert [group.columns["agreement"] for group in groups] == [1.0, 0.75, "high", 7]
    assert report.dropped == {"with less agreement of the raters than --min-agreement": 1}


def test_min_agreement_leaves_out_pairs_that_raters_disagree_on(tmp_path):
    verdicts = [(rater, n, "a") for rater in ("ana", "ben", "eva") for n in range(8)]
    verdicts[8] = ("ben", 0, "b")
    _, rows = raters_rows(verdicts)
    file = write_rows(tmp_path / "labels.jsonl", rows)

    def read(share):
        return read_preferences(configure_data(file, LabelOptions(min_agreement=share)))

    assert len(read(0.6)[0]) == 8
    groups, report = read(0.7)
    assert len(groups) == 7
    assert report.dropped == {"with less agreement of the raters than --min-agreement": 1}
    rows = [{"prompt": "x", "chosen": "y", "rejected": "z"}]
    plain = configure_data(write_rows(tmp_path / "p.jsonl", rows), LabelOptions(min_agreement=0.7))
    with pytest.raises(ConfigError, match="has no votes of several raters"):
        read_preferences(plain)
    with pytest.raises(ConfigError, match="at most 1"):
        LabelOptions(min_agreement=1.5)


def test_votes_of_other_formats_have_an_agreement_too(tmp_path):
    row = {"prompt": "x", "chosen": "y", "rejected": "z", "votes_chosen": 3, "votes_rejected": 2}
    rows = [row, {**row, "prompt": "w", "votes_chosen": 5}]
    data = configure_data(write_rows(tmp_path / "p.jsonl", rows), LabelOptions(min_agreement=0.7))
    assert [group.prompt for group in read_preferences(data)[0]] == ["w"]


def test_equal_raters_who_contradict_each_other_tie(tmp_path):
    _, rows = raters_rows([("ana", 0, "a"), ("ben", 0, "b"), ("ana", 1, "a"), ("ben", 1, "a")])
    groups, report = read_preferences(write_rows(tmp_path / "labels.jsonl", rows))
    assert len(groups) == 1
    assert report.dropped == {"tied": 1}
    _, rows = raters_rows([("ana", 0, "a"), ("ana", 0, "undone")])
    undone = write_rows(tmp_path / "undone.jsonl", rows)
    with pytest.raises(DataError, match="nothing is left"):
        read_preferences(undone)
