"""JSON Lines files keep whole rows when writing stops, and continue after them."""

import errno
import fcntl
import gc
import json
import os
import subprocess
import sys

import pytest
from helpers.data import read_rows
from helpers.paths import ROOT

from mlx_align.errors import ConfigError, WriteError
from mlx_align.system import row_file
from mlx_align.system.row_file import (
    OutputLock,
    append_rows,
    open_rows,
    progress_file,
    remove_partial_line,
)

INPUTS = {"--model": "a", "--seed": "0"}


def write(file, count, *, stop=None, resume=False, inputs=INPUTS, lines=None, every=2):
    """Write rows {"i": 0}, {"i": 1}, …; raise KeyboardInterrupt before row `stop`."""
    note = (lines if lines is not None else []).append
    with open_rows(file, inputs, resume=resume, total=count, note=note) as rows:
        for i in range(rows.done, count):
            if i == stop:
                raise KeyboardInterrupt
            rows.write({"i": i, "text": "é"})
            if (i + 1) % every == 0:
                rows.commit(i + 1)
        return list(rows.read())


def test_finished_rows_stay_and_the_rest_follows(tmp_path):
    whole, file, lines = tmp_path / "whole.jsonl", tmp_path / "rows.jsonl", []
    assert [row["i"] for row in write(whole, 7)] == list(range(7))
    with pytest.raises(KeyboardInterrupt):
        write(file, 7, stop=5, lines=lines)
    assert [row["i"] for row in read_rows(file)] == list(range(5))
    assert f"stopped after 4 of 7; {file} keeps its rows" in lines[0]
    assert len(write(file, 7, resume=True, lines=lines)) == 7
    assert "Resuming after 4 of 7" in lines[1]
    assert file.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "whole.jsonl"]


def test_an_unfinished_line_is_removed(tmp_path):
    file = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write(file, 7, stop=5)
    with file.open("a") as stream:
        stream.write('{"i": 5, "te')
    assert len(write(file, 7, resume=True)) == 7
    assert [row["i"] for row in read_rows(file)] == list(range(7))


def test_nothing_is_left_without_a_row(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "rows.jsonl", 7, stop=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch, fraction):
    """The system writes a part of the line before it reports that there is no more space."""
    file, original, left = tmp_path / "rows.jsonl", os.write, 100

    def full(descriptor, data):
        nonlocal left
        if len(data) > left:
            if (part := int(fraction * left)) > 0:
                left -= part
                return original(descriptor, data[:part])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= len(data)
        return original(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr(row_file.os, "write", full)
        with pytest.raises(WriteError, match="no space left on the disk; make room"):
            write(file, 20)
    assert file.read_bytes().endswith(b"\n")
    kept = read_rows(file)
    assert 0 < len(kept) < 20
    assert kept == [{"i": i, "text": "é"} for i in range(len(kept))]
    assert len(write(file, 20, resume=True)) == 20


def test_a_killed_process_leaves_whole_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    program = (
        "import os, sys\nfrom pathlib import Path\n"
        "from mlx_align.system.row_file import open_rows\n"
        "with open_rows(Path(sys.argv[1]), {}, total=9, note=print) as rows:\n"
        "    for i in range(9):\n"
        "        rows.write({'i': i, 'text': 'x' * 100000})\n"
        "        if i == 4: rows.commit(5)\n"
        "        if i == 6: os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, file], env=environment, check=False)
    assert done.returncode == -9
    assert [row["i"] for row in read_rows(file)] == list(range(7))
    assert json.loads(progress_file(file).read_text())["done"] == 5


def test_other_inputs_and_complete_files_are_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write(file, 7, stop=5)
    before = file.read_bytes()
    other = {"--model": "b", "--seed": "0", "--beta": "1"}
    with pytest.raises(ConfigError, match=r"--resume: --model, --beta changed since .* was begun"):
        write(file, 7, resume=True, inputs=other)
    progress = progress_file(file)
    text = progress.read_text()
    progress.write_text(text[:20])
    with pytest.raises(ConfigError, match="is damaged"):
        write(file, 7, resume=True)
    progress.write_text(text)
    file.write_bytes(before[:10])
    with pytest.raises(ConfigError, match="is shorter than when it was stopped"):
        write(file, 7, resume=True)
    file.write_bytes(before)
    with (
        open_rows(file, INPUTS, resume=True, total=7, note=print),
        pytest.raises(ConfigError, match="another command is writing it"),
    ):
        write(file, 7, resume=True)
    with pytest.raises(ConfigError, match="is complete, or is not a file that"):
        write(file, 7, resume=True)
    # Without anything to continue, it begins.
    assert len(write(tmp_path / "new.jsonl", 3, resume=True)) == 3


def almost_full(monkeypatch, left):
    """The disk takes a part of what is written, as it does before it reports that it is full."""
    original = os.write

    def write(descriptor, data):
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = original(descriptor, data[:left])
        left -= taken
        return taken

    monkeypatch.setattr(row_file.os, "write", write)


def test_rows_are_appended_all_or_none(tmp_path, monkeypatch):
    file = tmp_path / "log.jsonl"
    append_rows(file, [{"a": 1}])
    with monkeypatch.context() as patched:
        almost_full(patched, 12)
        with pytest.raises(WriteError, match="no space left"):
            append_rows(file, [{"a": 2}, {"a": 3}])
    assert read_rows(file) == [{"a": 1}]
    append_rows(file, [{"a": 2}, {"a": "\ud800é"}], shared=True)
    assert read_rows(file) == [{"a": 1}, {"a": 2}, {"a": "\ud800é"}]
    with file.open("a") as stream:
        stream.write('{"a": 4')
    remove_partial_line(file)
    assert len(read_rows(file)) == 3
    assert file.read_bytes().endswith(b"}\n")


def test_only_one_process_has_a_lock(tmp_path):
    file = tmp_path / "log.jsonl"
    file.touch()
    with file.open() as other:  # a second open file conflicts as another process does
        first = OutputLock.take(file)
        assert OutputLock.take(tmp_path / "." / "log.jsonl") is first
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        del first
        gc.collect()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ConfigError, match="another command is writing it; wait for it"):
            OutputLock.take(file)
    OutputLock.take(file)


def test_half_of_a_surrogate_pair_is_escaped(tmp_path):
    file = tmp_path / "rows.jsonl"
    with open_rows(file, {}, total=1, note=print) as rows:
        rows.write({"text": "\ud800é"})
    assert read_rows(file) == [{"text": "\ud800é"}]
