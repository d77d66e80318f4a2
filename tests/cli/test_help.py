"""--help, shell completion, and the ways to start the command line."""

import subprocess
import sys

import pytest

from mlx_align.cli.group import cli
from mlx_align.cli.main import run
from mlx_align.config import DPOConfig
from mlx_align.config.schema import declared_options
from mlx_align.losses.registry import PAIRWISE_LOSSES

COMMANDS = [[name] for name in cli.commands] + [
    ["reward", "export"],
    ["data", "check"],
    ["data", "sample"],
]


@pytest.fixture
def help_of(monkeypatch, capsys):
    """The --help of a command at 100 columns."""

    def call(*command, columns=100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert run([*command, "--help"]) == 0
        return capsys.readouterr().out

    return call


def test_help_names_every_command(capsys):
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("dpo", "kto", "sft", "reward", "score", "plan", "fuse", "data", "cache"):
        assert command in text
    assert run(["dpo", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--learning-rate" in text
    assert "5e-5 and less" in text


def test_no_arguments_print_the_help(capsys, help_of):
    text = help_of()
    assert run([]) == 0
    assert capsys.readouterr().out == text
    assert run(["data"]) == 0
    assert "check" in capsys.readouterr().out


def test_dpo_help_fits_two_screens_in_groups(help_of):
    text = help_of("dpo")
    assert text.count("\n") <= 100
    groups = ("Model and data", "LoRA", "Optimisation", "Loss", "Evaluation", "Advanced")
    places = [text.index(f"\n{group}:\n") for group in groups]
    assert places == sorted(places)
    assert "--fine-tune-type [lora|dora|full]" in text
    words = text.replace(",", " ").replace(".", " ").split()
    for name in PAIRWISE_LOSSES:
        assert name in words
    for declared in declared_options(DPOConfig).values():
        assert declared.flag.removeprefix("--") in text


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_fits_the_width(help_of, command, columns):
    assert max(map(len, help_of(*command, columns=columns).splitlines())) <= columns


def test_help_imports_no_slow_package():
    code = (
        "import sys; from mlx_align.cli.main import run; run(['dpo', '--help']);"
        "slow = {'mlx_lm', 'datasets', 'transformers', 'pydantic', 'rich'};"
        "print(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_package_can_be_run_as_a_module():
    command = [sys.executable, "-m", "mlx_align", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mlx-align, version ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell, capsys):
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "mlx-align" in script
    assert f"_MLX_ALIGN_COMPLETE={shell}_complete" in script


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("gr", {"plain,grpo"}),
        ("dpo --fine-tune-type ", {"plain,lora", "plain,dora", "plain,full"}),
        ("dpo --loss sim", {"plain,simpo"}),
        ("dpo --loss sigmoid=1,sim", {"plain,sigmoid=1,simpo"}),
        ("grpo --loss dr", {"plain,dr_grpo"}),
        ("dpo --batch-", {"plain,--batch-size", "plain,--batch-tokens"}),
        ("plan --batch-", {"plain,--batch-size", "plain,--batch-tokens"}),
        ("dpo --model ru", {"file,ru"}),
        ("score --output o", {"file,o"}),
        ("dpo --iters ", set()),
        ("completion f", {"plain,fish"}),
    ],
)
def test_completion_of_values(words, found, monkeypatch, capsys):
    line = f"mlx-align {words}"
    monkeypatch.setenv("_MLX_ALIGN_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    with pytest.raises(SystemExit):
        run([])
    assert set(capsys.readouterr().out.split()) == found
