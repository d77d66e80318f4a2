"""Files and folders are written whole or not at all."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.runs import disk_full_after

from mlx_align.errors import WriteError
from mlx_align.system import atomic_io


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    file = tmp_path / "file.txt"
    atomic_io.write_text(file, "old")
    disk_full_after(monkeypatch, 0, OSError(28, "No space left on device"))
    with pytest.raises(WriteError, match="no space left on the disk; make room"):
        atomic_io.write_text(file, "new")
    with pytest.raises(WriteError), atomic_io.open_atomic(file) as stream:
        stream.write("new")
    assert file.read_text() == "old"
    with pytest.raises(ZeroDivisionError), atomic_io.open_atomic(file):
        1 / 0  # noqa: B018
    with pytest.raises(WriteError), atomic_io.atomic_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("half")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    monkeypatch.undo()
    with atomic_io.atomic_folder(tmp_path / "a" / "folder") as partial:
        (partial / "file").write_text("whole")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["folder"]
    assert (tmp_path / "a" / "folder" / "file").read_text() == "whole"


def test_two_writers_of_one_file_take_turns(tmp_path):
    file, texts = tmp_path / "page.html", [letter * 100_000 for letter in "abcd"]

    def write(text):
        for _ in range(10):
            atomic_io.write_text(file, text)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, texts))
    assert file.read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("open_output", [atomic_io.open_atomic, atomic_io.atomic_folder])
def test_a_second_command_on_one_output_is_refused(tmp_path, monkeypatch, open_output):
    monkeypatch.setattr(atomic_io, "LOCK_SECONDS", 0.1)
    output = tmp_path / "output"
    with open_output(output) as first:
        second = open_output(output)
        with pytest.raises(WriteError, match="output: another command is writing it"):
            second.__enter__()
        if open_output is atomic_io.open_atomic:
            first.write("first")
        else:
            (first / "file").write_text("first")
    written = output / "file" if output.is_dir() else output
    assert written.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_what_a_killed_process_left_is_replaced(tmp_path):
    (tmp_path / ".a.partial").write_text("half")
    (tmp_path / ".b.partial").mkdir()
    (tmp_path / ".b.partial" / "old").write_text("half")
    atomic_io.write_text(tmp_path / "a", "whole")
    with atomic_io.atomic_folder(tmp_path / "b") as partial:
        (partial / "new").write_text("whole")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["a", "b", "b/new"]
