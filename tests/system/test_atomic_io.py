"""Files and folders are written whole or not at all."""

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
