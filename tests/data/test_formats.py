"""Formats of data: which one is detected, what is read, and what is refused."""

import json
import random

import pytest

from mlx_align.data.formats import (
    FORMAT_NAMES,
    read_preferences,
    read_prompts,
    read_supervised,
    read_unpaired,
)
from mlx_align.data.readers import check_data, has_split, read_rows
from mlx_align.data.transforms import split_validation, to_pairs
from mlx_align.errors import ConfigError, DataError
from mlx_align.types import Message, PromptGroup


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write(folder, *rows, name="train.jsonl"):
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


ASKED = (Message("user", "Hi"),)
YES, NO = (Message("assistant", "Yes"),), (Message("assistant", "No"),)
PAIR = {"prompt": "Hi", "chosen": " Yes", "rejected": " No"}
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sure?\n\nAssistant: "

# name of the format, a row of it, the prompt and the completions it stands for
PREFERENCES = [
    ("pairs", PAIR, "Hi", (" Yes", " No")),
    (
        "pairs",
        {"prompt": [user("Hi")], "chosen": [assistant("Yes")], "rejected": [assistant("No")]},
        ASKED,
        (YES, NO),
    ),
    ("pairs", {"prompt": "Hi", "chosen": [assistant("Yes")], "rejected": "No"}, ASKED, (YES, NO)),
    (
        "pairs",
        {"prompt": "Hi", "system": "Be brief", "chosen": "Yes", "rejected": "No"},
        (Message("system", "Be brief"), *ASKED),
        (YES, NO),
    ),
    (
        "implicit",
        {
            "chosen": [{"role": "system", "content": "S"}, user("Hi"), assistant("Yes")],
            "rejected": [{"role": "system", "content": "S"}, user("Hi"), assistant("No")],
        },
        (Message("system", "S"), *ASKED),
        (YES, NO),
    ),
    (
        "implicit",
        {"chosen": "The sky is blue.", "rejected": "The sky is blueish."},
        "The sky is",
        (" blue.", " blueish."),
    ),
    (
        "hh-rlhf",
        {"chosen": HH + "Yes", "rejected": HH + "No"},
        (*ASKED, Message("assistant", "Hello"), Message("user", "Sure?")),
        (YES, NO),
    ),
    (
        "hh-rlhf",
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Yes", "rejected": " No"},
        ASKED,
        (YES, NO),
    ),
    (
        "ultrafeedback",
        {
            "prompt": "Hi",
            "prompt_id": "7",
            "chosen": [user("Hi"), assistant("Yes")],
            "rejected": [user("Hi"), assistant("No")],
            "messages": [user("Hi"), assistant("Yes")],
            "score_chosen": 8.5,
            "score_rejected": 3,
        },
        ASKED,
        (YES, NO),
    ),
    (
        "openai",
        {
            "input": {
                "messages": [user("Hi")],
                "tools": [],
                "parallel_tool_calls": True,
            },
            "preferred_output": [assistant("Yes")],
            "non_preferred_output": [assistant("No")],
        },
        ASKED,
        (YES, NO),
    ),
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Yes"},
            "rejected": {"from": "gpt", "value": "No"},
        },
        ASKED,
        (YES, NO),
    ),
    (
        "instruction",
        {"instruction": "Add", "input": "1 and 2", "chosen": "Yes", "rejected": "No"},
        (Message("user", "Add\n1 and 2"),),
        (YES, NO),
    ),
    (
        "instruction",
        {"system": "S", "question": "Hi", "chosen": "Yes", "rejected": "No"},
        (Message("system", "S"), *ASKED),
        (YES, NO),
    ),
    (
        "ranked",
        {"prompt": "Hi", "completions": ["a", "b", "c"], "scores": [1, 3, 2]},
        "Hi",
        ("b", "c", "a"),
    ),
    (
        "ranked",
        {"prompt": [user("Hi")], "responses": ["No", "Yes"], "rank": [2, 1]},
        ASKED,
        (YES, NO),
    ),
    (
        "ranked",
        {
            "instruction": "Hi",
            "completions": [
                {"response": "a", "overall_score": 1.5},
                {"response": "b", "overall_score": 4},
            ],
        },
        "Hi",
        ("b", "a"),
    ),
]


@pytest.mark.parametrize(("name", "row", "prompt", "completions"), PREFERENCES)
def test_preference_formats_are_detected(tmp_path, name, row, prompt, completions):
    (group,), report = read_preferences(write(tmp_path, row))
    assert report.format == name
    assert (group.prompt, group.completions) == (prompt, completions)
    assert group.source == "train.jsonl:1"
    forced, _ = read_preferences(tmp_path / "train.jsonl", format=name)
    assert forced == [group]


def test_description_and_columns_and_scores(tmp_path):
    (group,), report = read_preferences(write(tmp_path, PREFERENCES[8][1]))
    assert str(report) == "read as: UltraFeedback pairs (whole conversations)"
    assert group.scores == (8.5, 3.0)
    assert set(group.columns) == {"prompt_id", "messages"}
    _, report = read_preferences(write(tmp_path, PREFERENCES[6][1]))
    assert str(report) == "read as: HH-RLHF text"


def test_format_names_are_unique():
    assert len(set(FORMAT_NAMES)) == len(FORMAT_NAMES)


def test_conversations_that_differ_before_the_last_turn(tmp_path):
    row = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant: C",
        "rejected": "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: X\n\nAssistant: Y",
    }
    (group,), _ = read_preferences(write(tmp_path, row))
    assert group.prompt == ASKED
    assert [[turn.content for turn in turns] for turns in group.completions] == [
        ["A", "B", "C"],
        ["A", "X", "Y"],
    ]


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({}, None),
        ({"votes_chosen": 3, "votes_rejected": 1}, 3.5 / 5),
        ({"votes_chosen": 3, "votes_rejected": 0}, 3.5 / 4),
        ({"soft_label": 0.6}, 0.6),
        ({"chosen_prob": 1}, 1.0),
    ],
)
def test_soft_labels(tmp_path, fields, label):
    (group,), _ = read_preferences(write(tmp_path, PAIR | fields))
    assert group.soft_label == label
    assert not group.columns


@pytest.mark.parametrize("probability", [0.8, 0.3])
def test_soft_labels_of_a_pair_are_those_of_its_completions(tmp_path, probability):
    groups, _ = read_unpaired(write(tmp_path, PAIR | {"soft_label": probability}))
    chosen = probability > 0.5
    assert [group.label for group in groups] == [chosen, not chosen]
    assert [group.soft_label for group in groups] == pytest.approx([probability, 1 - probability])
    (best,), report = read_supervised(write(tmp_path, PAIR | {"soft_label": probability}))
    (pair,), _ = read_preferences(write(tmp_path, PAIR))
    assert best.completions == (pair.completions[0 if chosen else 1],)
    assert "soft labels don't weigh in sft" in report.title


def test_the_label_of_a_completion_can_be_a_probability(tmp_path):
    row = {"prompt": "Hi", "completion": "Yes"}
    for fields, label, soft in (
        ({"label": 0.7}, True, 0.7),
        ({"label": False, "soft_label": 0.1}, False, 0.1),
        ({"label": 1}, True, None),
    ):
        (group,), _ = read_unpaired(write(tmp_path, row | fields))
        assert (group.label, group.soft_label) == (label, soft)
        assert not group.columns
    with pytest.raises(DataError, match="'label' contradicts 'soft_label'"):
        read_unpaired(write(tmp_path, row | {"label": True, "soft_label": 0.1}))


def test_unpaired(tmp_path):
    row = {"prompt": "Hi", "completion": "Yes", "label": False, "topic": "x"}
    (group,), report = read_unpaired(write(tmp_path, row))
    assert (group.completions, group.label, group.columns) == (("Yes",), False, {"topic": "x"})
    assert report.format == "unpaired"
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}
    (group,), _ = read_unpaired(write(tmp_path, row | {"kto_tag": True}))
    assert (group.prompt, group.completions, group.label) == (ASKED, (YES,), True)


def test_pairs_are_split_for_unpaired_training(tmp_path):
    groups, report = read_unpaired(write(tmp_path, PAIR))
    assert [(group.completions, group.label) for group in groups] == [
        ((" Yes",), True),
        ((" No",), False),
    ]
    assert "split into desirable and undesirable completions" in str(report)


def test_supervised(tmp_path):
    turns = [user("Hi"), assistant("A"), user("B"), assistant("C"), user("unanswered")]
    (group,), report = read_supervised(write(tmp_path, {"messages": turns}))
    assert report.format == "conversation"
    assert group.prompt == ASKED
    assert [turn.content for turn in group.completions[0]] == ["A", "B", "C"]
    (group,), _ = read_supervised(write(tmp_path, {"prompt": "Hi", "completion": " Yes"}))
    assert (group.prompt, group.completions) == ("Hi", (" Yes",))
    (group,), _ = read_supervised(write(tmp_path, {"text": "Once upon a time"}))
    assert (group.prompt, group.completions) == ("", ("Once upon a time",))
    (group,), _ = read_supervised(write(tmp_path, {"instruction": "Hi", "output": "Yes"}))
    assert (group.prompt, group.completions) == (ASKED, (YES,))
    (group,), report = read_supervised(write(tmp_path, PAIR))
    assert group.completions == (" Yes",)
    assert "best" in str(report)


def test_prompts_keep_the_other_fields(tmp_path):
    row = {"prompt": [user("1+1?")], "answer": "2", "scores": [1, 2]}
    (group,), _ = read_prompts(write(tmp_path, row))
    assert group.completions == ()
    assert group.columns == {"answer": "2", "scores": [1, 2]}
    (group,), _ = read_prompts(write(tmp_path, PAIR))
    assert (group.prompt, group.completions) == ("Hi", ())


def test_unusable_rows_are_dropped_and_counted(tmp_path):
    same = PAIR | {"rejected": " Yes"}
    path = write(tmp_path, PAIR, same, PAIR | {"rejected": " "}, PAIR | {"prompt": ""}, "", PAIR)
    groups, report = read_preferences(path)
    assert [group.source for group in groups] == ["train.jsonl:1", "train.jsonl:6"]
    assert report.dropped == {
        "identical completions": 1,
        "empty completion": 1,
        "empty prompt": 1,
    }
    assert "3 of 5 rows dropped: 1 identical completions" in str(report)
    with pytest.raises(DataError, match=r"train\.jsonl: none of the 2 rows can be used"):
        read_preferences(write(tmp_path, same, same))


ERRORS = [
    ([PAIR, '{"prompt": "Hi", '], r"train\.jsonl:2: not JSON \(.*column 18\)"),
    ([PAIR, '{"prompt": NaN}'], r"train\.jsonl:2: not JSON \(NaN is not"),
    ([PAIR, '{"prompt": 1e999}'], r"train\.jsonl:2: not JSON \(the number 1e999 is too large"),
    ([PAIR, '{"x": ' + "1" * 5000 + "}"], r"train\.jsonl:2: not JSON"),
    ([PAIR, "[" * 100_000], r"train\.jsonl:2: nested deeper"),
    ([PAIR, '{"x": ' + "[" * 70 + "]" * 70 + "}"], r"train\.jsonl:2: nested deeper"),
    ([PAIR, '"text"'], r"train\.jsonl:2: expected a JSON object \{…\}, found str"),
    ([PAIR, '{"prompt": "\\ud800"}'], r"train\.jsonl:2: a string contains half a surrogate pair"),
    ([{"prompt": "Hi", "chosen": "Yes"}], r"train\.jsonl:1: no 'rejected'; a pair needs"),
    ([PAIR, {"prompt": "Hi", "rejected": "Yes"}], r"train\.jsonl:2: no 'chosen'"),
    ([PAIR, {"chosen": "a b", "rejected": "a c"}], r"train\.jsonl:2: no 'prompt'; found"),
    ([PAIR | {"chosen": 7}], r"train\.jsonl:1: 'chosen' is int 7; expected text or a list"),
    ([PAIR | {"prompt": 10**4000}], r"'prompt' is a number"),
    ([PAIR | {"soft_label": 1.5}], r"'soft_label' is 1.5; expected 0 to 1"),
    ([PAIR | {"soft_label": 10**400}], r"'soft_label' is .*expected a finite number"),
    ([PAIR | {"votes_chosen": 1}], r"no 'votes_rejected'"),
    (
        [PAIR | {"votes_chosen": 0, "votes_rejected": 0}],
        r"'votes_chosen' is 0 and 'votes_rejected' 0",
    ),
    ([PAIR, PREFERENCES[1][1]], r"train\.jsonl:2: the prompt is messages, but .* has text"),
    ([PREFERENCES[6][1], {"chosen": "a b", "rejected": "a c"}], r"train\.jsonl:2: 'chosen' is"),
    (
        [PAIR | {"instruction": "Hi"}],
        r"matches the formats pairs and instruction; choose one with --format",
    ),
    ([PAIR | {"completions": ["a"], "scores": [1]}], r"matches the formats pairs and ranked"),
    ([{"question": "x"}], r"not recognised as preference data; found 'question', expected prompt"),
    ([{"prompt": "a", "completion": "b"}], r"but no pair; expected chosen and rejected"),
    ([PAIR | {"prompt": [{"role": "wizard", "content": "x"}]}], r"prompt\[0\] has role text 'wiz"),
    ([PAIR | {"prompt": [{"role": "user"}]}], r"prompt\[0\] has content null"),
    ([PAIR | {"prompt": [user("a"), assistant("b")]}], r"ends with role 'assistant'"),
    ([PAIR | {"prompt": []}], r"'prompt' is list; expected a list of"),
    ([PAIR | {"prompt": [[]]}], r"prompt\[0\] is list; expected a message"),
    (
        [{"prompt": [user("a")], "chosen": [assistant("b"), user("c")], "rejected": "d"}],
        r"starts or ends with role 'user'",
    ),
    (
        [PAIR | {"prompt": [{**user("a"), "tool_calls": [{}]}]}],
        r"prompt\[0\].tool_calls\[0\] is object; expected",
    ),
    (
        [PAIR | {"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}],
        r"has a part of type 'image_url'; expected text only \(images",
    ),
    ([{"prompt": "a", "completions": ["x", "y"], "scores": [1]}], r"one number for each of the 2"),
    ([{"prompt": "a", "completions": ["x", "y"]}], r"completions\[0\] has no rating"),
]


@pytest.mark.parametrize(("rows", "message"), ERRORS)
def test_errors_are_one_line_and_name_the_row(tmp_path, rows, message):
    with pytest.raises(DataError, match=message) as caught:
        read_preferences(write(tmp_path, *rows))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_label_has_to_be_true_or_false(tmp_path):
    path = write(tmp_path, {"prompt": "a", "completion": "b", "label": "good"})
    with pytest.raises(DataError, match="'label' is text 'good'; expected true or false"):
        read_unpaired(path)


def test_format_option(tmp_path):
    path = write(tmp_path, PAIR | {"instruction": "Other"})
    assert read_preferences(path, format="pairs")[0][0].prompt == "Hi"
    assert read_preferences(path, format="instruction")[0][0].prompt[0].content == "Other"
    with pytest.raises(ConfigError, match="not a format of preference data"):
        read_preferences(path, format="text")


def test_files_as_json_array_parquet_and_with_a_byte_order_mark(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [PAIR, PAIR | {"prompt": "Other"}]
    (tmp_path / "train.json").write_text(json.dumps(rows, indent=1))
    groups, _ = read_preferences(tmp_path)
    assert [group.source for group in groups] == ["train.json:row 1", "train.json:row 2"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "valid.parquet")
    groups, _ = read_preferences(tmp_path, "valid")
    assert [group.source for group in groups] == ["valid.parquet:row 1", "valid.parquet:row 2"]
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode())
    assert len(read_preferences(tmp_path)[0]) == 1
    (tmp_path / "train.json").write_text('[{"a": 1},\n {"a": }]')
    with pytest.raises(DataError, match=r"train\.json:2: not JSON"):
        read_rows(tmp_path / "train.json")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DataError, match="not a readable parquet file"):
        read_rows(tmp_path / "broken.parquet")


def test_invalid_utf8_names_line_and_column(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:2: not UTF-8 \(byte 0xff at column 11\)"):
        read_rows(tmp_path)


def test_empty_files_and_missing_splits(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"train\.jsonl: has no rows"):
        read_rows(tmp_path)
    assert has_split(tmp_path, "train")
    assert not has_split(tmp_path, "valid")
    with pytest.raises(DataError, match=r"no valid split \(found: train\.jsonl\)"):
        read_rows(tmp_path, "valid")
    with pytest.raises(DataError, match="split 'trian'"):
        read_rows(tmp_path, "trian")
    assert not has_split(write(tmp_path, PAIR, name="mine.jsonl"), "valid")


def test_a_wrong_path_is_refused_without_a_hub_request(tmp_path):
    for wrong in ("nowhere", "./owner/name", "owner/name.jsonl", "a/b/c", "~/x", "", "a\0b"):
        with pytest.raises(DataError, match="no such file or folder"):
            check_data(wrong)
    check_data("owner/name")
    check_data("owner/name:config")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="expected a file ending in"):
        check_data(tmp_path / "notes.txt")


def test_a_hub_failure_is_one_line(monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match=r"can't be loaded from the hub.*\(Couldn't reach the hub\)"
    ):
        read_preferences("owner/unreachable")


def test_datasets_saved_to_disk(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([PAIR, PAIR | {"prompt": "Other"}])
    saved = datasets.DatasetDict(train_prefs=rows, test_prefs=rows)
    saved.save_to_disk(tmp_path / "uf")
    groups, _ = read_preferences(tmp_path / "uf")
    assert [group.source for group in groups] == ["uf/train_prefs:row 1", "uf/train_prefs:row 2"]
    assert has_split(tmp_path / "uf", "test")
    assert not has_split(tmp_path / "uf", "valid")
    rows.save_to_disk(tmp_path / "single")
    assert len(read_preferences(tmp_path / "single")[0]) == 2


def test_sharded_folders_are_read_by_the_library(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "hub" / "data").mkdir(parents=True)
    rows = datasets.Dataset.from_list([PAIR])
    rows.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    groups, _ = read_preferences(tmp_path / "hub")
    assert groups[0].source == "hub/train:row 1"


def test_ranked_groups_become_all_strictly_ordered_pairs():
    group = PromptGroup("p", ("a", "b", "c", "d"), "x:1", scores=(3, 2, 2, 1))
    pairs = to_pairs([group])
    assert [pair.completions for pair in pairs] == [
        ("a", "b"),
        ("a", "c"),
        ("a", "d"),
        ("b", "d"),
        ("c", "d"),
    ]
    assert pairs[0].scores == (3, 2)
    assert len(to_pairs([group], best_only=True)) == 3
    pair = PromptGroup("p", ("a", "b"), "x:1", scores=(1, 2))
    assert to_pairs([pair]) == [pair]


def test_split_keeps_prompts_together_and_is_deterministic():
    groups = [PromptGroup(f"p{i % 40}", (f"a{i}", "b"), f"x:{i}") for i in range(100)]
    train, valid = split_validation(groups, 0.1, seed=3)
    assert len(train) + len(valid) == 100
    assert 8 <= len(valid) <= 12
    assert not {group.prompt for group in train} & {group.prompt for group in valid}
    assert (train, valid) == split_validation(groups, 0.1, seed=3)
    assert valid != split_validation(groups, 0.1, seed=4)[1]
    assert train == sorted(train, key=lambda group: int(group.source[2:]))
    one, other = split_validation(groups[:2], 0.01, seed=0)
    assert len(one) == len(other) == 1
    with pytest.raises(DataError, match="fewer than two different prompts"):
        split_validation(groups[:1], 0.1, seed=0)
    with pytest.raises(ConfigError, match="fraction"):
        split_validation(groups, 1.0, seed=0)


def test_a_split_is_enlarged_to_the_prompts_that_valid_needs():
    groups = [PromptGroup(f"p{i}", ("a",), f"x:{i}", label=True) for i in range(10)]
    assert len(split_validation(groups, 0.05, seed=0)[1]) == 1
    train, valid = split_validation(groups, 0.05, seed=0, min_prompts=2)
    assert (len(train), len(valid)) == (8, 2)
    assert len(split_validation(groups[:3], 0.05, seed=0, min_prompts=2)[1]) == 1


JUNK = [
    None,
    True,
    0,
    -1,
    10**500,
    1.5,
    "",
    " ",
    "x",
    "\n\nHuman: a\n\nAssistant:",
    [],
    {},
    [[]],
    [{}],
    [None],
    {"role": "user"},
    [{"role": 3, "content": 4}],
    [user("a")],
    [assistant("b")],
    {"messages": [user("x")]},
    {"messages": 3},
    ["a", "b"],
    [1, 2],
    [{"text": "a", "score": 1}],
]


def mutate(random, row):
    """A row as corrupted JSON: fields missing, renamed or of other types, bytes changed."""
    row = dict(row)
    for _ in range(random.choice([0, 1, 1, 2])):
        key = random.choice([*row, "prompt", "messages", "label", "scores"])
        if random.random() < 0.3:
            row.pop(key, None)
        else:
            row[key] = random.choice([*JUNK, *row.values()])
    raw = bytearray(json.dumps(row).encode())
    for _ in range(random.choice([0, 0, 0, 1, 3])):
        place = random.randrange(len(raw))
        raw[place : place + random.randint(0, 2)] = random.choice(
            [b"", b"\xff", b"NaN", b"[" * 5000, b'"', b"\\ud800", b"}", b"9" * 5000]
        )
    return bytes(raw[: random.randrange(len(raw) + 1)] if random.random() < 0.1 else raw)


def test_corrupted_files_only_raise_data_errors(tmp_path):
    chance = random.Random(0)
    rows = [row for _, row, _, _ in PREFERENCES]
    rows += [{"prompt": "a", "completion": "b", "label": True}, {"text": "t"}]
    rows += [{"messages": [user("a"), assistant("b")]}]
    path = tmp_path / "train.jsonl"
    read, messages = 0, []
    for _ in range(1000):
        row = chance.choice(rows)
        path.write_bytes(b"\n".join(mutate(chance, row) for _ in range(chance.choice([1, 2]))))
        reader = chance.choice([read_preferences, read_unpaired, read_supervised, read_prompts])
        name = None if chance.random() < 0.8 else chance.choice(FORMAT_NAMES)
        try:
            groups, _ = reader(path, format=name)
        except (DataError, ConfigError) as error:
            messages.append(str(error))
        else:
            read += 1
            assert all(isinstance(group, PromptGroup) for group in groups)
    assert all(message and "\n" not in message for message in messages)
    assert read > 100
