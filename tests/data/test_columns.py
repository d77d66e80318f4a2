"""--columns: any data set's columns, the errors of a mapping, and the mapping that is proposed."""

import json

import pytest

from mlx_align.cli.main import run as run_command
from mlx_align.config import DPOConfig, make_config
from mlx_align.data.columns import ConfiguredSource, configure_data
from mlx_align.data.formats import read_preferences, read_prompts, read_unpaired
from mlx_align.data.readers import open_data
from mlx_align.errors import ConfigError, DataError

ROW = {"meta": {"q": "Name a colour."}, "good": "Red.", "bad": "Dunno.", "id": 7}


def read(rows, columns, reader=read_preferences):
    return reader(ConfiguredSource(open_data(rows), columns))[0]


def test_columns_and_paths_are_mapped_and_others_kept():
    (group,) = read([ROW], {"prompt": "meta.q", "chosen": "good", "rejected": "bad"})
    assert (group.prompt, group.completions) == ("Name a colour.", ("Red.", "Dunno."))
    assert group.columns == {"id": 7}


def test_completions_of_several_columns_with_a_label_scores_or_votes():
    row = {"q": "Name a colour.", "left": "Dunno.", "right": "Red.", "s": [1, 2], "v": [0, 3]}
    base = {"prompt": "q", "completions": "left,right"}
    for extra in ({"label": "best"}, {"scores": "s"}, {"votes": "v"}, {"strength": "much"}):
        (group,) = read([{**row, "best": "right", "much": 1}], {**base, **extra})
        texts = [t if isinstance(t, str) else t[0].content for t in group.completions]
        assert texts == ["Red.", "Dunno."]
        assert group.soft_label == (3.5 / 4 if "votes" in extra else None)


def test_scores_and_votes_of_a_pair():
    row = {**ROW, "sg": 4, "sb": 1, "up": 3, "down": 0}
    pair = {"prompt": "meta.q", "chosen": "good", "rejected": "bad"}
    (group,) = read([row], {**pair, "scores": "sg,sb", "votes": "up,down"})
    assert (group.scores, group.soft_label) == ((4, 1), 3.5 / 4)


def test_the_index_of_a_list_is_a_path():
    row = {"turns": [{"t": "Name a colour."}], "good": "Red.", "bad": "Dunno."}
    (group,) = read([row], {"prompt": "turns.0.t", "chosen": "good", "rejected": "bad"})
    assert group.prompt == "Name a colour."


def test_a_label_alone_replaces_the_verdict_of_the_format():
    row = {"prompt": "Hi", "response_0": "safe", "response_1": "better"}
    row |= {"better_response_id": 1, "safer_response_id": 0}
    (group,) = read([row], {})
    assert group.completions[0][0].content == "better"
    (group,) = read([row], {"label": "safer_response_id"})
    assert group.completions[0][0].content == "safe"


def test_labelled_completions_and_prompts():
    rows = [{"prompt": "Hi", "response": "x", "is_safe": True}]
    mapping = {"prompt": "prompt", "completion": "response", "label": "is_safe"}
    (group,) = read(rows, mapping, read_unpaired)
    assert (group.completions, group.label) == (("x",), True)
    (group,) = read([ROW], {"prompt": "meta.q"}, read_prompts)
    assert group.prompt == "Name a colour."


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"promt": "q"}, ConfigError, "unknown field 'promt'; did you mean prompt"),
        ({"prompt": "a,,b"}, ConfigError, "expected a column, or columns a,b"),
        ({"prompt": "q", "chosen": "a"}, ConfigError, "needs chosen and rejected; add rejected="),
        (
            {"prompt": "meta.p", "chosen": "good", "rejected": "bad"},
            DataError,
            r"data\[0\]: --columns prompt=meta.p: no such column; did you mean meta.q\?",
        ),
    ],
)
def test_errors_of_a_mapping(columns, error, message):
    with pytest.raises(error, match=message) as caught:
        read([ROW], columns)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        (
            {"query": "Hi", "accepted": "x", "rejected_answer": "y"},
            "--columns prompt=query chosen=accepted rejected=rejected_answer",
        ),
        (
            {"task": {"question": "Hi"}, "reply_a": "x", "reply_b": "y", "winner": "a"},
            "--columns prompt=task.question label=winner completions=reply_a,reply_b",
        ),
        ({"user_query": "Hi", "reply": "x", "thumbs_up": True}, "completion=reply label=thumbs_up"),
    ],
)
def test_the_error_of_unknown_columns_proposes_a_mapping(row, mapping):
    with pytest.raises(DataError, match="not recognised as preference data") as caught:
        read_preferences(open_data([row]))
    assert mapping in str(caught.value)
    if "completion=" not in mapping:
        fields = dict(part.split("=") for part in mapping.split()[1:])
        assert len(read([row], fields)) == 1


def test_the_mapping_in_yaml_and_python(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("columns:\n  prompt: meta.q\n  completions: [good, bad]\n  label: best\n")
    columns = make_config(DPOConfig, {}, file).columns
    assert columns == {"prompt": "meta.q", "completions": "good,bad", "label": "best"}
    config = make_config(
        DPOConfig, {"columns": {"prompt": "meta.q", "completions": ["good", "bad"]}}
    )
    source = configure_data([{**ROW, "label": "good"}], config)
    assert list(source.rows("train")[0].fields) == ["prompt", "completions"]


def test_one_flag_takes_several_columns(tmp_path, capsys):
    data, output = tmp_path / "rows.jsonl", tmp_path / "plain.jsonl"
    data.write_text((json.dumps(ROW) + "\n") * 3)
    columns = ["--columns", "prompt=meta.q", "chosen=good", "rejected=bad"]
    command = ["data", "convert", str(data), *columns, "--dedup", "--output", str(output)]
    assert run_command(command) == 0
    assert "Wrote 1 rows" in capsys.readouterr().out
    assert json.loads(output.read_text()) == {
        "prompt": "Name a colour.",
        "chosen": "Red.",
        "rejected": "Dunno.",
    }
    repeated = ["--columns", "prompt=meta.q", "--columns", "chosen=good", "--columns"]
    command = ["data", "convert", str(data), *repeated, "rejected=bad", "--max-rows", "2"]
    assert run_command([*command, "--json", "--output", str(tmp_path / "two.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 2
    assert run_command(["data", "convert", str(data), "--columns", "prompt", "--output", "x"]) != 0
