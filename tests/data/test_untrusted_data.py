"""Data of strangers: pipes, devices, links out of the folder, rows without end."""

import json
import os
import socket

import pytest
from helpers.data import write_rows
from helpers.paths import TINY_MODEL
from helpers.runs import mlx_align

from mlx_align.data import readers, tokenization
from mlx_align.data.readers import read_rows
from mlx_align.errors import DataError

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


def make_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_pipe, make_socket, make_device])
def test_files_that_never_end_are_refused(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    (tmp_path / "d").mkdir()
    make(type(tmp_path)("d/train.jsonl"))
    for data in ("d", "d/train.jsonl"):
        with pytest.raises(DataError, match=r"regular file|leaves the data folder"):
            read_rows(data)


def test_links_out_of_a_data_folder_are_refused(tmp_path):
    secret = write_rows(tmp_path / "secret.jsonl", [PAIR])
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").symlink_to(secret)
    with pytest.raises(DataError, match=r"train.jsonl: is a link that leaves the data folder"):
        read_rows(folder)
    # Named as the data itself, it is what the user wants.
    assert len(read_rows(folder / "train.jsonl")) == 1
    (folder / "train.jsonl").unlink()
    write_rows(folder / "rows.jsonl", [PAIR])
    (folder / "train.jsonl").symlink_to("rows.jsonl")
    assert len(read_rows(folder)) == 1


def test_links_of_a_hub_download_are_followed(tmp_path):
    repository = tmp_path / "datasets--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "123").mkdir(parents=True)
    write_rows(repository / "blobs" / "f00", [PAIR])
    (repository / "snapshots" / "123" / "train.jsonl").symlink_to("../../blobs/f00")
    assert len(read_rows(repository / "snapshots" / "123")) == 1
    (repository / "snapshots" / "123" / "valid.jsonl").symlink_to("../../../secret.jsonl")
    write_rows(tmp_path / "secret.jsonl", [PAIR])
    with pytest.raises(DataError, match="leaves the data folder"):
        read_rows(repository / "snapshots" / "123", "valid")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", {"_data_files": [{"filename": "../secret.arrow"}]}),
        ("dataset_dict.json", {"splits": ["train", "/etc"]}),
        ("README.md", {"configs": [{"data_files": [{"split": "train", "path": "../x.jsonl"}]}]}),
        ("README.md", {"configs": [{"data_files": "https://example.org/x.jsonl"}]}),
    ],
)
def test_descriptions_of_a_dataset_name_no_files_outside(tmp_path, file, content):
    (tmp_path / "train-00000-of-00001.jsonl").write_text(json.dumps(PAIR) + "\n")
    text = json.dumps(content)
    (tmp_path / file).write_text(f"---\n{text}\n---\n" if file == "README.md" else text)
    with pytest.raises(DataError, match="outside the folder"):
        read_rows(tmp_path)


def test_a_row_over_the_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1000)
    big = {**PAIR, "chosen": "word " * 300}
    for name, content in (
        ("a.jsonl", f"{json.dumps(PAIR)}\n{json.dumps(big)}\n"),
        ("a.json", json.dumps([PAIR, big])),
        ("a.csv", f"prompt,chosen,rejected\na,b,c\na,{'word ' * 300},c\n"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=r"a row of .* MB; rows of more than 0.0 MB"):
            read_rows(tmp_path / name)
    with pytest.raises(DataError, match=r"data\[1\]: a row of"):
        read_rows([PAIR, big])


@pytest.mark.parametrize("command", ["data check", "dpo", "score"])
def test_a_text_over_the_length_is_refused_before_it_is_tokenised(
    tmp_path, monkeypatch, capsys, command
):
    monkeypatch.setattr(tokenization, "MAX_TEXT", 1000)
    rows = [{**PAIR, "prompt": str(i)} for i in range(9)]
    rows[4]["chosen"] = "word " * 300
    data = write_rows(tmp_path / "p.jsonl", rows)
    if command == "score":
        options = ("--logps", "--output", tmp_path / "s.jsonl")
    else:
        options = ("--output", tmp_path / "run") if command == "dpo" else ()
    words = command.split(" ")
    assert mlx_align(*words, "--model", TINY_MODEL, "--data", data, *options) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "p.jsonl:5: a text of 1,500 characters; more than 1,000 are refused" in error
