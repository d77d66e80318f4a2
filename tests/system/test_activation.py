"""How the shell finds the commands that are printed."""

import sys

from mlx_align.system.activation import PROGRAM, activation_command


def environment(folder):
    (folder / "bin").mkdir(parents=True)
    for name in ("activate", PROGRAM):
        (folder / "bin" / name).write_text("#!/bin/sh\n")
        (folder / "bin" / name).chmod(0o755)
    return folder


def test_it_is_said_only_where_the_shell_does_not_find_this_program(tmp_path, monkeypatch):
    own, other = environment(tmp_path / "my env"), environment(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(own))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    for path in ("", str(other / "bin")):
        monkeypatch.setenv("PATH", path)
        assert activation_command() == "source 'my env/bin/activate'"
    monkeypatch.chdir(other)
    assert activation_command() == f"source '{own}/bin/activate'"
    monkeypatch.setenv("PATH", f"{own / 'bin'}:{other / 'bin'}")
    assert activation_command() is None
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "base_prefix", str(own))
    assert activation_command() is None
