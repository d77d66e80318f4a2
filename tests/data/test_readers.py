"""Rows from Python objects and CSV files, with the location of each row."""

import datasets
import numpy as np
import pytest

from mlx_align.config import DPOConfig
from mlx_align.data.formats import read_preferences, read_prompts, read_unpaired
from mlx_align.data.readers import MAX_DEPTH, container_of, has_split, open_data, read_rows
from mlx_align.data.splits import read_splits
from mlx_align.errors import DataError
from mlx_align.types import Message

PAIR = {"prompt": "Hi", "chosen": " Yes", "rejected": " No"}
OTHER = PAIR | {"prompt": "Other"}


def read(data, split="train", **options):
    return read_preferences(open_data(data), split, **options)


@pytest.mark.parametrize(
    "data",
    [
        [PAIR, OTHER],
        (PAIR, OTHER),
        datasets.Dataset.from_list([PAIR, OTHER]),
        datasets.Dataset.from_list([PAIR, OTHER]).to_iterable_dataset(),
    ],
    ids=["list", "tuple", "Dataset", "IterableDataset"],
)
def test_rows_in_memory_are_the_train_split(data):
    groups, report = read(data)
    assert [group.prompt for group in groups] == ["Hi", "Other"]
    assert [group.source for group in groups] == ["data[0]", "data[1]"]
    assert report.format == "pairs"
    assert has_split(open_data(data), "train")
    assert not has_split(open_data(data), "valid")
    # A second read gives the same rows.
    assert read(data)[0] == groups


@pytest.mark.parametrize(
    "data",
    [
        {"train": [PAIR], "validation": [OTHER]},
        datasets.DatasetDict(
            train=datasets.Dataset.from_list([PAIR]),
            validation=datasets.Dataset.from_list([OTHER]),
        ),
    ],
    ids=["dict", "DatasetDict"],
)
def test_splits_in_memory(data):
    source = open_data(data)
    assert has_split(source, "valid")
    assert not has_split(source, "test")
    (group,), _ = read(data, "valid")
    assert (group.prompt, group.source) == ("Other", "data['validation'][0]")
    with pytest.raises(DataError, match=r"^data: has no test split \(found: train, validation\)$"):
        read_rows(source, "test")


def test_the_same_groups_as_from_a_file(tmp_path):
    datasets.Dataset.from_list([PAIR, OTHER]).to_json(tmp_path / "train.jsonl")
    from_file, _ = read_preferences(tmp_path)
    from_memory, _ = read([PAIR, OTHER])
    for one, other in zip(from_file, from_memory, strict=True):
        assert (one.prompt, one.completions, dict(one.columns)) == (
            other.prompt,
            other.completions,
            dict(other.columns),
        )


def test_python_values_are_read_as_json_would_be():
    row = {
        "prompt": ({"role": "user", "content": "Hi"},),
        "chosen": [{"role": "assistant", "content": "Yes"}],
        "rejected": [{"role": "assistant", "content": "No"}],
        "margin": np.float32(0.5),
        "system": None,
        "ids": np.array([1, 2]),
    }
    (group,), _ = read([row])
    assert group.prompt == (Message("user", "Hi"),)
    assert group.margin == 0.5
    assert group.columns == {"ids": [1, 2]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([PAIR] * 17 + [PAIR | {"chosen": 7}], r"^data\[17\]: 'chosen' is int 7; expected text"),
        ([PAIR, {"prompt": "Hi", "chosen": "a"}], r"^data\[1\]: no 'rejected'"),
        ([PAIR, "text"], r"^data\[1\]: expected a dict of fields, found str"),
        (
            [PAIR, PAIR | {"chosen": "\ud800"}],
            r"^data\[1\]: a string contains half a surrogate pair",
        ),
        ([], "^data: has no rows"),
        ({"train": []}, r"^data\['train'\]: has no rows"),
        ({"train": [PAIR], "valid": [OTHER, 5]}, r"^data\['valid'\]\[1\]: expected a dict"),
        ({"train": PAIR}, r"^data\['train'\] is of type dict; expected a list of dicts"),
        (PAIR, r"^data is a dict with the keys 'prompt', 'chosen', 'rejected'; expected split na"),
        (5, "^data is of type int; expected a path, a hub name, a list of dicts"),
        (None, "^data is of type NoneType; expected a path"),
        ([PAIR | {"rejected": " Yes"}], r"^data: none of the 1 rows can be used \(1 identical"),
    ],
)
def test_errors_name_the_row(data, message):
    def read_all():
        source = open_data(data)
        for split in ("train", "valid"):
            if has_split(source, split):
                read_preferences(source, split)

    with pytest.raises(DataError, match=message) as caught:
        read_all()
    assert "\n" not in str(caught.value)


def test_a_list_that_contains_itself_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(DataError, match=rf"data\[0\]: nested deeper than {MAX_DEPTH} levels"):
        read([PAIR | {"extra": loop}])


def test_a_column_that_can_not_be_decoded_is_one_line():
    class Broken(list):
        def __iter__(self):
            raise OSError("no such image\nfile")

    with pytest.raises(DataError, match=r"^data: can't be read \(no such image file\)$"):
        read(Broken([PAIR]))


def test_an_opened_source_is_opened_only_once():
    source = open_data([PAIR])
    assert open_data(source) is source


def test_runs_read_and_split_python_objects():
    config = DPOConfig(valid_fraction=0.5)
    source = open_data([PAIR, OTHER])
    splits = read_splits(config, read_preferences, source)
    assert sorted(group.prompt for group in splits.train + splits.valid) == ["Hi", "Other"]
    source = open_data({"train": [PAIR], "valid": [OTHER]})
    splits = read_splits(config, read_preferences, source)
    assert [group.source for group in splits.valid] == ["data['valid'][0]"]
    assert splits.report.rows == 1


def test_the_container_of_a_row():
    for source in ("a.jsonl:17", "a.jsonl:row 17", "a.jsonl"):
        assert container_of(source) == "a.jsonl"
    assert container_of("data['valid'][3]") == "data['valid']"
    assert container_of("owner/name/train:row 2") == "owner/name/train"


def csv_file(folder, text):
    path = folder / "train.csv"
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_csv(tmp_path):
    text = 'prompt,chosen,rejected,margin\r\n42,"Yes,\nplease",No,0.5\r\n\r\nB,C,"say ""D""",\r\n'
    one, other = read_preferences(csv_file(tmp_path, text))[0]
    assert (one.prompt, one.completions, one.margin) == ("42", ("Yes,\nplease", "No"), 0.5)
    assert (other.completions, other.margin) == (("C", 'say "D"'), None)
    assert [one.source, other.source] == ["train.csv:3", "train.csv:5"]
    assert read_preferences(tmp_path)[0] == [one, other]


def test_csv_labels_and_lists(tmp_path):
    path = csv_file(tmp_path, "prompt,completion,label\na,b,TRUE\nc,d,false\n")
    assert [group.label for group in read_unpaired(path)[0]] == [True, False]
    path = csv_file(tmp_path, 'prompt,completions,scores\na,"[""x"",""y""]","[1, 2]"\n')
    assert read_preferences(path)[0][0].completions == ("y", "x")
    path = csv_file(tmp_path, "prompt,completion,label\na,b,good\n")
    with pytest.raises(DataError, match=r"train\.csv:2: 'label' is text 'good'; expected true"):
        read_unpaired(path)
    path = csv_file(tmp_path, "question,answer\n1+1?,2\n")
    assert read_prompts(path)[0][0].columns == {"answer": "2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "train.csv: has no rows"),
        ("prompt,chosen,rejected\n", "train.csv: has no rows"),
        ("prompt,prompt\na,b\n", "train.csv:1: expected a header row of unique column names"),
        ("prompt,,x\na,b\n", "train.csv:1: expected a header row"),
        ("prompt,chosen\na,b,c\n", "train.csv:2: 3 cells, but 2 columns"),
        ('prompt,chosen\na,"b\n', "train.csv:2: not CSV"),
        ("prompt,chosen,rejected\na,b\n", "train.csv:2: no 'rejected'"),
    ],
)
def test_csv_errors(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_preferences(csv_file(tmp_path, text))
