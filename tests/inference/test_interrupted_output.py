"""Commands that write rows keep what is finished when they end early, and --resume continues."""

import errno
import os

import pytest
from helpers.data import assistant, read_rows, user, write_rows
from helpers.paths import TINY_MODEL
from helpers.runs import before_call, interrupt, mlx_align

from mlx_align.cli import data as data_command
from mlx_align.cli import score
from mlx_align.inference import rerank
from mlx_align.rollout import rejection_sampling
from mlx_align.system import row_file
from mlx_align.system.row_file import RowFile, open_rows, progress_file

COUNT = 21
PAIRS = [
    {
        "prompt": user(f"{i}?"),
        "chosen": assistant("yes" + "!" * (i % 3)),
        "rejected": assistant("n"),
    }
    for i in range(COUNT)
]
PROMPTS = [{"prompt": user(f"{i}?"), "number": i} for i in range(COUNT)]
GIVEN = [{"prompt": f"{i}?", "completions": [" yes", " no" + "!" * (i % 4)]} for i in range(COUNT)]
MODEL = ("--model", TINY_MODEL)
COMMANDS = {
    "score": ("score", "--logps", *MODEL, "--data", "pairs.jsonl", "--json"),
    "rerank": ("rerank", *MODEL, "--reward-model", "reward", "--input", "given.jsonl", "--json"),
    "sample": (
        *("data", "sample", *MODEL, "--data", "prompts.jsonl", "-n", 2, "--max-tokens", 4),
        *("--reward", "length(target=4)", "--threshold", -99, "--json"),
    ),
    "convert": ("data", "convert", "pairs.jsonl", "--json"),
}
CHANGED = {
    "score": ("--batch-size", 3),
    "rerank": ("--batch-size", 3),
    "sample": ("--seed", 7),
    "convert": ("--ties", "half"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch, reward_run):
    """The inputs, in the working folder, and batches that are smaller than they are."""
    monkeypatch.chdir(tmp_path)
    write_rows("pairs.jsonl", PAIRS)
    write_rows("prompts.jsonl", PROMPTS)
    write_rows("given.jsonl", GIVEN)
    (tmp_path / "reward").symlink_to(reward_run)
    monkeypatch.setattr(score, "WINDOW", 4)
    monkeypatch.setattr(rerank, "PROMPTS_AT_ONCE", 4)
    monkeypatch.setattr(rejection_sampling, "PROMPTS_PER_BATCH", 4)
    monkeypatch.setattr(data_command, "ROWS_PER_COMMIT", 4)
    return tmp_path


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", COMMANDS)
def test_rows_stay_and_resume_writes_the_rest(folder, monkeypatch, capsys, name):
    """The same bytes, and the same summary, as a command that was never stopped."""
    whole, file = folder / "whole.jsonl", folder / "out.jsonl"
    assert mlx_align(*COMMANDS[name], "--output", whole) == 0
    expected = capsys.readouterr().out
    command = (*COMMANDS[name], "--output", file)

    with monkeypatch.context() as patched:
        before_call(patched, RowFile, "write", 11, interrupt)
        assert mlx_align(*command) == 130
    error = capsys.readouterr().err
    assert f"stopped after 8 of {COUNT}; {file} keeps its rows: continue" in error
    kept = read_rows(file)
    assert kept == read_rows(whole)[: len(kept)]
    assert len(kept) == 10

    # Not without --resume, and not with other options.
    assert mlx_align(*command) == 1
    assert "exists already; it is not complete: add --resume" in capsys.readouterr().err
    assert mlx_align(*command, *CHANGED[name], "--resume") == 1
    assert f"{CHANGED[name][0]} changed since {file} was begun" in capsys.readouterr().err

    # Then the disk is full, in the middle of a line.
    with monkeypatch.context() as patched:
        original, lines = os.write, []

        def write(descriptor, data):
            if bytes(data[-1:]) != b"\n":
                full_disk()
            lines.append(data)
            if len(lines) == 6:
                return original(descriptor, data[: len(data) // 2])
            return original(descriptor, data) if len(lines) < 6 else full_disk()

        patched.setattr(row_file.os, "write", write)
        assert mlx_align(*command, "--resume") == 1
    error = capsys.readouterr().err
    assert "Resuming after 8 of 21" in error
    assert f"error: {file}: can't be written (no space left on the disk; make room)" in error
    kept = read_rows(file)
    assert kept == read_rows(whole)[: len(kept)]
    assert len(kept) == 13

    assert mlx_align(*command, "--resume") == 0
    assert file.read_bytes() == whole.read_bytes()
    assert capsys.readouterr().out == expected.replace(str(whole), str(file))
    assert not progress_file(file).exists()
    assert mlx_align(*command, "--resume") == 1
    assert "is complete, or is not a file that this command began" in capsys.readouterr().err


@pytest.mark.parametrize("resume", [(), ("--resume",)])
@pytest.mark.parametrize("name", COMMANDS)
def test_two_commands_on_one_output(folder, capsys, name, resume):
    file = folder / "out.jsonl"
    with open_rows(file, {}, total=9, note=print) as rows:
        rows.write({"a": 1})
        assert mlx_align(*COMMANDS[name], "--output", file, *resume) == 1
    error = capsys.readouterr().err
    assert f"error: --output {file}: another command is writing it" in error
    assert error.count("\n") == 1
    assert read_rows(file) == [{"a": 1}]


def test_a_file_that_is_created_while_the_model_loads(folder, monkeypatch, capsys):
    file = folder / "out.jsonl"
    with monkeypatch.context() as patched:
        before_call(patched, score, "open_rows", 1, lambda: file.write_text("other\n"))
        assert mlx_align(*COMMANDS["score"], "--output", file) == 1
    assert "another command has just created it" in capsys.readouterr().err
    assert file.read_text() == "other\n"


def test_outputs_that_are_not_files(folder, capsys):
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    for output in ("pipe", "folder", "/dev/null"):
        for resume in ((), ("--resume",)):
            assert mlx_align(*COMMANDS["convert"], "--output", output, *resume) == 1
            assert "is not a regular file; name a new file" in capsys.readouterr().err
    assert mlx_align(*COMMANDS["convert"], "--output", "pairs.jsonl/out") == 1
    assert "pairs.jsonl is not a folder that can be written to" in capsys.readouterr().err


def test_resume_needs_files_of_prompts(folder, capsys):
    where = ("rerank", *MODEL, "--reward-model", "reward", "--resume")
    assert mlx_align(*where, "--prompt", "a") == 1
    assert "--resume needs --input and --output" in capsys.readouterr().err
