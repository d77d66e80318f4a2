"""What reaches the terminal: escaped control characters, known characters, JSON without NaN."""

import io
import json
import math
import sys
from functools import partial

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from mlx_align.system.console import Console
from mlx_align.system.json_text import to_json
from mlx_align.system.terminal import escape_controls, safe_output

# Clears the screen, renames the window, and in C1 form; hides text; turns its direction around.
EVIL = "a\x1b[2J\x1b]0;PWNED\x07\x9b31mb\rc\x08\x7f\u202ed\udcff"
SHOWN = r"a\x1b[2J\x1b]0;PWNED\x07\x9b31mb\x0dc\x08\x7f\u202ed\udcff"


def test_control_characters_are_escaped():
    assert escape_controls(EVIL) == SHOWN
    assert escape_controls("plain\ttext\nnächste → 日本") == "plain\ttext\nnächste → 日本"


@pytest.mark.parametrize(
    "write",
    [print, partial(click.echo, color=True), lambda text: print(text, file=sys.stderr)],
)
def test_everything_that_a_command_prints_is_escaped(capsys, write):
    with safe_output():
        write(EVIL)
    found = "".join(capsys.readouterr())
    assert found == SHOWN + "\n"


def test_progress_bars_of_libraries_still_move_the_cursor(capsys):
    with safe_output():
        for _ in tqdm(range(3), desc="Fetching \x1b[2J", position=1, mininterval=0):
            pass
    error = capsys.readouterr().err
    assert "\rFetching \\x1b[2J" in error
    assert "\x1b[A" in error
    assert "\x1b[2J" not in error


def test_notes_bars_and_samples_are_escaped(capsys, monkeypatch):
    console = Console()
    with safe_output():
        console.note(EVIL)
        monkeypatch.setattr(type(console.console), "is_terminal", True)
        with console.bar(f"Reading {EVIL}", 2) as bar:
            bar.advance()
            print("from a library", EVIL)
        sample = {"prompt": EVIL, "before": EVIL, "after": EVIL}
        summary = {
            "command": "dpo",
            "verdict": {"sentence": EVIL},
            "eval_before": {},
            "eval": {},
            "samples": [sample],
        }
        console.outcome(summary)
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out
    assert "\x1b]0" not in out
    assert "\x9b" not in out
    assert out.count(r"a\x1b[2J\x1b]0;PWNED") >= 5


def test_the_sequences_of_a_bar_reach_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console()
    monkeypatch.setattr(type(console.console), "is_terminal", True)
    console.console.is_interactive = True
    with safe_output(), console.bar("Reading", 2) as bar:
        bar.advance()
        print("from a library \x1b]0;PWNED")
    out = capsys.readouterr().out
    assert "\x1b[2K" in out
    assert r"\x1b" not in out.replace(r"\x1b]0;PWNED", "")
    assert "\x1b]0" not in out


def test_long_notes_are_wrapped_on_a_terminal_and_commands_are_not(capsys, monkeypatch):
    console = Console()
    words, command = "word " * 40, "  mlx-align dpo --data " + "p" * 100
    console.note(words)
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setattr(type(console.console), "is_terminal", True)
    monkeypatch.setattr(type(console.console), "width", 100)
    console.note(f"{words}\n{command}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines[:-1])) <= 100
    assert " ".join(lines[:-1]).split() == words.split()
    assert lines[-1] == command


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_characters_that_the_terminal_lacks_are_replaced(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with safe_output():
        print("β → é")
        click.echo("β → é")
        Console().note("β → é")
        sys.stdout.flush()
    shown = "? ? é" if encoding == "latin-1" else "? ? ?"
    assert raw.getvalue().decode(encoding).splitlines() == [shown] * 3


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(values, st.booleans())
def test_json_has_no_nan_and_no_control_characters(value, ascii):
    text = to_json(value, ascii=ascii)
    assert text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass") == text
    assert escape_controls(text.replace("\ud800", "")) == text or any(
        0xD800 <= ord(c) < 0xE000 for c in text
    )

    def expected(item):
        if isinstance(item, float):
            return item if math.isfinite(item) else None
        if isinstance(item, list):
            return [expected(one) for one in item]
        if isinstance(item, dict):
            return {key: expected(one) for key, one in item.items()}
        return item

    def no_constant(name):
        raise AssertionError(name)

    assert json.loads(text, parse_constant=no_constant) == expected(value)
