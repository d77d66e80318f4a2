"""The pieces of scripts/first_hour.py: a screen, a pseudo-terminal, and what is taken out."""

import json
import os
import re
import sys

import pytest
from helpers.scripts import load_script

hour = load_script("first_hour")


def screen_of(text, width=100):
    screen = hour.Screen(width)
    screen.write(text)
    return screen.text()


@pytest.mark.parametrize(
    ("written", "left"),
    [
        ("one\r\ntwo\r\n", "one\ntwo"),
        ("10%\r20%\r30%\r\ndone", "30%\ndone"),
        ("bar 1/2\r\x1b[2Kbar 2/2\r\x1b[2Kdone", "done"),
        # As rich writes a bar above which lines appear, and removes it at the end.
        ("\x1b[?25l\x1b[32mbar\x1b[0m\n\x1b[1A\x1b[2Knote\nbar\r\x1b[2K\x1b[?25h", "note"),
        ("abc\b\bX\x1b[K", "aX"),
        ("\x1b]0;title\x07text   ", "text"),
    ],
)
def test_what_is_overwritten_is_gone(written, left):
    assert screen_of(written) == left


def test_lines_are_as_wide_as_the_terminal():
    assert screen_of("a" * 25, width=10) == "\n".join(["a" * 10, "a" * 10, "a" * 5])


def test_a_command_is_typed_to_and_its_exit_code_known(tmp_path):
    program = (
        "import os, sys, time\n"
        "print(os.get_terminal_size().columns, sys.stdout.isatty())\n"
        "name = input('name? ')\n"
        "print('hello', name)\n"
        "try:\n"
        "    print('waiting', flush=True)\n"
        "    time.sleep(30)\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(3)\n"
    )
    (tmp_path / "program.py").write_text(program)
    typed = [("name\\? ", "Ada\n"), ("waiting", hour.CTRL_C)]
    screen, code = hour.play(
        f"{sys.executable} program.py", tmp_path, dict(os.environ), typed, limit=20
    )
    assert code == 3
    assert screen.splitlines()[0] == f"{hour.WIDTH} True"
    assert "name? Ada\nhello Ada\nwaiting" in screen


def test_nothing_of_this_machine_is_left(tmp_path):
    text = f"Wrote {tmp_path}/runs/dpo-20261128\n-123456\nWARNING: Location 'x' is ignored\n"
    text += "2026-11-28 12:42 log\n"
    found = hour.scrub(text, tmp_path)
    assert found == "Wrote ~/runs/dpo-20260101\n-090000\n2026-01-01 09:00 log"


def test_long_screens_are_cut_in_the_middle():
    lines = [f"line {i}" for i in range(100)]
    found = hour.shorten("\n".join(lines), most=20).splitlines()
    assert len(found) == 20
    (gap,) = (line for line in found if line.startswith("[…"))
    assert int(re.search(r"\d+", gap)[0]) == 100 - 19
    assert found[0] == lines[0]
    assert found[-1] == lines[-1]


def test_the_files_of_the_newcomer_hold_the_same_thirty_pairs(tmp_path):
    hour.write_files(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 30
    assert len((tmp_path / "pairs.csv").read_text().splitlines()) == 31
    broken = (tmp_path / "broken.jsonl").read_text().splitlines()
    with pytest.raises(json.JSONDecodeError):
        json.loads(broken[6])
    compile(hour.PROGRAM, "first.py", "exec")
