"""How commands end: an unexpected exception, signals at any moment, odd terminals."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.data import write_rows
from helpers.paths import ROOT, TINY_MODEL
from helpers.runs import mlx_align

from mlx_align.cli import report
from mlx_align.system import interrupts


def fails_with(monkeypatch, error):
    def make_config(*_):
        raise error

    monkeypatch.setattr(report, "make_config", make_config)


class PanicException(BaseException):
    """As a library in Rust raises; not an Exception."""


@pytest.mark.parametrize("kind", [ZeroDivisionError, RecursionError, PanicException, SystemExit])
def test_an_unexpected_exception_is_one_line_and_a_report_without_data(monkeypatch, capsys, kind):
    fails_with(monkeypatch, kind("of the row 'Rosebud'"))
    assert mlx_align("report", "runs/a b") == 70
    error = capsys.readouterr().err
    assert error.startswith("error: this is a bug in mlx-align; details (no data) are in /")
    assert error.count("\n") == 1
    file = Path(error.split(" are in ")[1].split(";")[0])
    text = file.read_text()
    assert "command: mlx-align report 'runs/a b'\n" in text
    assert "\nmlx-align: " in text
    assert "\nmlx: 0." in text
    assert "line " in text and "in make_config" in text  # noqa: PT018
    assert kind.__name__ in text
    assert "Rosebud" not in text


def test_a_crash_report_has_no_prompt(monkeypatch, capsys, tmp_path):
    from mlx_align.cli import rerank

    def make_config(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(rerank, "make_config", make_config)
    assert mlx_align("rerank", "--prompt", "Rosebud", "--model", "m", "--prompt=Rosebud") == 70
    (file,) = (tmp_path / "home" / ".cache" / "mlx-align" / "crashes").iterdir()
    assert "mlx-align rerank --prompt … --model m --prompt=…" in file.read_text().replace("'", "")


@pytest.mark.parametrize("home", ["/dev/null", None])
def test_a_crash_without_a_usable_home_is_reported_elsewhere(monkeypatch, capsys, tmp_path, home):
    fails_with(monkeypatch, ZeroDivisionError())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    if home is None:

        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv("HOME", home)
    assert mlx_align("report", "a") == 70
    assert list(tmp_path.rglob("*crash-*.txt"))


def test_out_of_memory_and_no_home_are_said(monkeypatch, capsys):
    fails_with(monkeypatch, MemoryError())
    assert mlx_align("report", "a") == 1
    assert capsys.readouterr().err.startswith("error: out of memory")
    fails_with(monkeypatch, RuntimeError("Could not determine home directory."))
    assert mlx_align("report", "~/a") == 1
    assert "set HOME" in capsys.readouterr().err


def test_a_reader_that_ends_and_a_closed_stdout_are_no_bugs(monkeypatch, capsys):
    """As by `| head -1` and `>&-`."""
    with monkeypatch.context() as patched:
        patched.setattr("os.dup2", lambda *_: None)
        fails_with(patched, BrokenPipeError())
        assert mlx_align("report", "a") == 1
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stdout", None)
    assert mlx_align("report", "--help") == 0


def test_a_deleted_working_folder(monkeypatch, capsys, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        assert mlx_align("data", "convert", "a.jsonl", "--output", "b.jsonl") == 1
    finally:
        os.chdir(tmp_path)
    assert capsys.readouterr().err == (
        "error: the working folder was deleted; change to another folder\n"
    )


@pytest.mark.parametrize(
    "command",
    [
        ("fuse", "--model", TINY_MODEL, "--adapter-path", "a"),
        ("export", "--model", TINY_MODEL, "--adapter-path", "a"),
        ("eval", "--model", TINY_MODEL, "--adapter-path", "a"),
        ("report", "run"),
        ("dpo", "--model", TINY_MODEL, "--data", "pairs.jsonl"),
        ("data", "convert", "pairs.jsonl"),
    ],
    ids=lambda command: command[0],
)
def test_outputs_that_cannot_be_written(tmp_path, monkeypatch, capsys, command):
    """Said before any work, and nothing is touched."""
    monkeypatch.chdir(tmp_path)
    write_rows("pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    os.mkfifo("pipe")
    Path("link").symlink_to("nowhere/x")
    write_rows("run/metrics.jsonl", [{"step": 1, "loss": 0.5}])
    for output, reason in (
        ("pairs.jsonl/x", "pairs.jsonl is not a folder that can be written to"),
        ("link", "is a link to nowhere/x, which doesn't exist"),
        ("pipe", ""),
    ):
        assert mlx_align(*command, "--output", output) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert reason in error
    assert Path("pipe").is_fifo()
    assert Path("link").is_symlink()


# Ctrl-C when a module is imported; the library around it may also catch everything.
IMPORTS = """
import signal, sys
from importlib.abc import MetaPathFinder
class Interrupt(MetaPathFinder):
    done = False
    def find_spec(self, name, path, target=None):
        if name == {module!r} and not self.done:
            self.done = True
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException:
                if not {swallow}:
                    raise
                import mlx_align.system.interrupts, time
                time.sleep(100)
sys.meta_path.insert(0, Interrupt())
if {swallow}:
    import mlx_align.system.interrupts
    mlx_align.system.interrupts.REDELIVER_SECONDS = 0.2
from mlx_align.cli.main import main
main(["report", "nowhere"])
"""


@pytest.mark.parametrize("swallow", [False, True])
@pytest.mark.parametrize("module", ["mlx_align.system.terminal", "click", "mlx_align.report.page"])
def test_ctrl_c_during_imports(module, swallow):
    code = IMPORTS.format(module=module, swallow=swallow)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_ctrl_c_in_a_callback_is_not_ignored(monkeypatch, capsys):
    """Python ignores exceptions in `__del__`, and prints a traceback."""
    monkeypatch.setattr(interrupts, "REDELIVER_SECONDS", 20.0)

    class Interrupting:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def make_config(*_):
        Interrupting()
        signal.pause()  # until it comes again
        raise AssertionError

    monkeypatch.setattr(report, "make_config", make_config)
    assert mlx_align("report", "a") == 143
    assert capsys.readouterr().err == "stopped\n"


def test_ctrl_c_that_a_library_turns_into_its_own_error(monkeypatch, capsys):
    def make_config(*_):
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            raise ValueError("arrow: a callback failed") from None

    monkeypatch.setattr(report, "make_config", make_config)
    assert mlx_align("report", "a") == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_terminal_without_unicode(train, tmp_path, monkeypatch):
    rows = [{"prompt": f"{i}? what", "chosen": f" yes {i}", "rejected": " no"} for i in range(24)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    raw = io.BytesIO()
    with monkeypatch.context() as patched:
        for name in ("stdout", "stderr"):
            stream = io.TextIOWrapper(raw, encoding="latin-1", write_through=True)
            patched.setattr(sys, name, stream)
        code, run = train("dpo", "--iters", 1, "--samples", 1, "--sample-tokens", 4, data=data)
        assert code == 0
        where = ("--model", TINY_MODEL, "--adapter-path", run, "--sample-tokens", 4)
        assert mlx_align("eval", *where) == 0
        assert mlx_align("eval", *where, "--json") == 0
    shown = raw.getvalue().decode("latin-1")
    assert "run folder: " in shown.lower()
    assert "?" in shown


def test_escape_sequences_in_completions_and_names_are_shown(train, tmp_path, capsys):
    rows = [{"prompt": f"{i}? what", "chosen": f" yes {i}", "rejected": " no"} for i in range(24)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    _, run = train("dpo", "--iters", 1, "--samples", 0, data=data)
    evil = "\x1b]0;PWNED\x1b\\\x1b[2Ja"
    given = write_rows(tmp_path / "e.jsonl", [{"prompt": "x", "completions": [evil, "b"]}])
    where = ("--model", TINY_MODEL, "--adapter-path", run)
    assert mlx_align("rerank", *where, "--input", given) == 0
    assert mlx_align("rerank", *where, "--input", given, "--json") == 0
    assert mlx_align("rerank", *where, "--input", f"{evil[4:]}.jsonl") == 1
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert r"\x1b]0;PWNED\x1b\\x1b[2Ja" in captured.out
    assert r"\u001b]0;PWNED" in captured.out
    assert r"PWNED\x1b\\x1b[2Ja.jsonl" in captured.err


@pytest.mark.parametrize("files", [8, 20])
def test_few_open_files(tmp_path, files):
    """mlx-lm can't be imported where 4,096 open files are not allowed; this package can."""
    rows = [{"prompt": f"{i}? what", "chosen": f" yes {i}", "rejected": " no"} for i in range(9)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}));"
        "from mlx_align.cli.main import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "data", "check", "--model", str(TINY_MODEL)]
    done = subprocess.run(
        [*command, "--data", str(data)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "Traceback" not in done.stderr
    if files == 20:
        assert done.returncode == 0
    else:
        assert done.returncode in (0, 1)
        assert done.stderr.count("error: ") == done.returncode
