"""Odd files of every kind: a command says in one line what is wrong, or works."""

import pytest
from helpers.scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("fuzz")


@pytest.fixture(scope="module")
def bench(script, tmp_path_factory):
    with script.loaded_once():
        yield script.Bench(tmp_path_factory.mktemp("fuzz"))


# It would print all strategies with what breaks.
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
@pytest.mark.parametrize(
    ("target", "examples"),
    [
        ("data", 150),
        ("config", 80),
        ("adapter", 10),
        ("run", 10),
        ("model", 20),
        ("tools", 10),
        ("command", 60),
    ],
)
def test_mutated_files(script, bench, monkeypatch, target, examples):
    monkeypatch.chdir(bench.folder)  # outputs that a configuration names are made here
    assert script.fuzz(bench, target, examples, number=1, shrink=False) >= examples // 2


def test_a_failing_example_is_reported(script, bench, monkeypatch):
    """The harness itself sees a traceback, a second line, and a command without end."""
    from mlx_align.cli import data

    def fails(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(data, "make_config", fails)
    with pytest.raises(script.Broken, match="this is a bug in mlx-align"):
        bench.try_data("x.jsonl", "{}", "data check")
    monkeypatch.setattr(script, "LIMIT_SECONDS", 1)
    monkeypatch.setattr(data, "make_config", lambda *_: __import__("time").sleep(30))
    with pytest.raises(script.Broken, match="more than 1 s"):
        bench.try_data("x.jsonl", "{}", "data check")


def test_yaml_aliases_that_grow_exponentially_are_refused(script, bench, capsys):
    """Forty lines of YAML that stand for 2 to the 40 items."""
    file = bench.write("laughs.yaml", script.LAUGHS + "beta: *x39\n")
    assert script.command_line.run(["dpo", "-c", str(file)]) == 1
    assert "a1: a list of 2 is not a single value" in capsys.readouterr().err
    file = bench.write("laughs.yaml", "beta: 0x" + "f" * 5000 + "\n")
    assert script.command_line.run(["dpo", "-c", str(file)]) == 1
    assert "beta: a number of thousands of digits: expected a number" in capsys.readouterr().err
    for option, said in (
        ("--lora-keys=,,", "expected at least one name"),
        ("--iters=2147483648", "out of range; must be at most 2147483647"),
        ("--epochs=1e300", "out of range"),
    ):
        assert script.command_line.run(["dpo", option]) == 1
        assert said in capsys.readouterr().err
