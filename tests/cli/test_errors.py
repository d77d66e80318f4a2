"""User errors: one clear line, exit 1, no traceback, and if possible before loading the model."""

import json
from pathlib import Path

import pytest
from helpers.paths import TINY_MODEL

from mlx_align.cli.main import run
from mlx_align.models import loading

GOOD = {"prompt": "Say yes.", "chosen": " yes", "rejected": " no"}


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """Runs `mlx-align`, expects exit 1 and one line, and returns it. Weights are never loaded."""
    monkeypatch.chdir(tmp_path)

    def no_weights(*_):
        raise AssertionError("the model was loaded before the error was found")

    monkeypatch.setattr(loading, "load_module", no_weights)

    def call(*arguments):
        assert run([str(a) for a in arguments]) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert "Traceback" not in captured.err + captured.out
        return captured.err

    return call


@pytest.fixture
def write(tmp_path):
    def call(*rows, name="pairs.jsonl"):
        file = tmp_path / name
        file.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        )
        return file

    return call


def many(n=20, **changes):
    return [{**GOOD, "prompt": f"Say yes {i}.", **changes} for i in range(n)]


def test_wrong_paths(fails, write, tmp_path):
    data = write(*many())
    assert "--model ./nowhere: no such folder" in fails(
        "dpo", "--model", "./nowhere", "--data", data
    )
    assert "no config.json" in fails("dpo", "--model", tmp_path, "--data", data)
    assert "nowhere.jsonl" in fails("dpo", "--model", TINY_MODEL, "--data", "./nowhere.jsonl")
    assert "--data is missing" in fails("dpo", "--model", TINY_MODEL)
    assert "--model is missing" in fails("dpo", "--data", data)
    assert "not an adapter folder" in fails(
        "dpo", "--model", TINY_MODEL, "--data", data, "--init-adapter", tmp_path
    )
    assert "has no config.yaml; expected a run folder" in fails("dpo", "--resume", tmp_path)
    assert "--resume needs a run" in fails("dpo", "--resume")


def test_wrong_rows(fails, write):
    def dpo(file):
        return fails("dpo", "--model", TINY_MODEL, "--data", file)

    broken = many()
    broken[16] = '{"prompt": "Say yes.", "chosen": '
    assert "pairs.jsonl:17: not JSON" in dpo(write(*broken))
    lacking = many()
    del lacking[4]["rejected"]
    message = dpo(write(*lacking))
    assert "pairs.jsonl:5" in message
    assert "rejected" in message
    assert "identical" in dpo(write(*many(chosen="same", rejected="same")))
    assert not Path("runs").exists()  # nothing is created before the data was read
    too_long = dpo(write(*many(chosen="x " * 3000)))
    assert "--max-seq-length" in too_long
    assert "has no rows" in dpo(write())


def test_wrong_options(fails, write, tmp_path):
    data = write(*many())
    given = ("dpo", "--model", TINY_MODEL, "--data", data)
    config = tmp_path / "c.yaml"
    config.write_text("learning_rte: 1\n")
    message = fails(*given, "-c", config)
    assert "c.yaml:1: unknown option learning_rte; did you mean learning_rate?" in message
    message = fails(*given, "--loss", "sigmiod")
    assert "did you mean sigmoid?" in message
    assert "gamma" in fails(*given, "--loss-option", "gamma=1")
    assert "expected name=value" in fails(*given, "--loss-option", "gamma")
    assert "label_smoothing" in fails(*given, "--loss", "hinge", "--label-smoothing", "0.1")
    assert "--iters and --epochs" in fails(*given, "--iters", 3, "--epochs", 1)
    message = fails(*given, "--lerning-rate", 1)
    assert "No such option" in message
    assert "--learning-rate" in message
    message = fails(*given, "--batch-size", 0)
    assert "--batch-size 0: out of range; must be at least 1" in message
    full = ("--fine-tune-type", "full", "--lora-rank", 4)
    assert "--lora-rank: has no effect on --fine-tune-type full" in fails(*given, *full)
    assert "--format" in fails(*given, "--format", "nonsense")
    assert "No such command: dop. Did you mean dpo?" in fails("dop")
    assert "No such command: chek. Did you mean check?" in fails("data", "chek")


def test_names_of_other_libraries(fails, write):
    data = write(*many())
    given = ("dpo", "--model", TINY_MODEL, "--data", data)
    assert "--learning-rate fast: expected a number" in fails(*given, "--lr", "fast")
    assert "--lora-rank x: expected" in fails(*given, "--lora_r=x")
    assert "--batch-size 0: out of" in fails(*given, "--per_device_train_batch_size", 0)
    assert "--save-every x" in fails(*given, "--save_steps", "x")
    assert "use mlx-align kto" in fails(*given, "--loss", "kto")
    assert "use mlx-align grpo --loss gspo" in fails(*given, "--loss", "gspo")
    assert "gamma" in fails(*given, "--loss", "dpo", "--loss-option", "gamma=1")
    online = ("grpo", "--model", TINY_MODEL, "--data", data, "--reward", "length")
    assert "use mlx-align dpo" in fails(*online, "--loss", "ipo")
    assert "Use mlx-align dpo --loss orpo" in fails("orpo")
    assert "Use mlx-align grpo --loss online_dpo" in fails("online-dpo")
    assert "Use mlx-align data check" in fails("check")
    assert "Use mlx-align dpo for preference pairs" in fails("train")
    kto = ("kto", "--model", TINY_MODEL, "--data", data)
    assert "another command; use mlx-align dpo --loss sigmoid" in fails(*kto, "--loss", "dpo")
    assert "--loss ktoo: unknown; did you mean kto? choose" in fails(*kto, "--loss", "ktoo")
    kl = fails("grpo", "--model", TINY_MODEL, "--data", data, "--reward", "length", "--beta", 0.04)
    assert "the KL penalty of --loss grpo is --kl-coef 0.04" in kl
    for option, said in (
        ("--optim=adam", "--optim. AdamW is the only optimizer; leave it out"),
        ("--use_peft", "--use-peft. LoRA is the default; leave it out"),
        ("--adapter-path", "--adapter-path. Use --output for the run folder"),
        ("--max-tokens", "--max-tokens. Use --sample-tokens for samples"),
        ("--outptu", "--outptu. Did you mean --output?"),
    ):
        assert f"No such option: {said}" in fails(*given, option)
    assert "--max-completion-length x: expected" in fails("chat", "--model=m", "--max-new-tokens=x")
    assert "--learning-rate x: expected" in fails("reward", "--learning_rate", "x")
    assert "--wd. Use --weight-decay" in fails("reward", "--wd", 0.1)
    assert "No such option: --optim." in fails("score", "--optim", "adam")  # it doesn't train
    mlx_lm = write("model: m\ntrain: true\n", name="lora.yaml")
    message = fails("sft", "-c", mlx_lm)
    assert "lora.yaml:2: unknown option train; the command trains; leave it out" in message


@pytest.mark.parametrize("command", ["grpo", "ppo", "data sample --output out.jsonl"])
def test_a_misspelt_reward_is_found_before_the_model_is_loaded(fails, write, command):
    Path("mine.py").write_text("def short(completions, **columns):\n    return [1.0]\n")
    given = (*command.split(), "--model", TINY_MODEL, "--data", write(*many()), "--reward")
    assert "mine.py has no function 'shrot' (it has: short)" in fails(*given, "mine.py:shrot")
    assert "no module 'nowhere'" in fails(*given, "nowhere:short")
    assert "did you mean length?" in fails(*given, "lenght")
    several = fails(*given, "exact_answer,lenght=0.2")
    assert "expected one reward; write --reward exact_answer --reward length=0.2" in several
    assert not Path("runs").exists()


def test_errors_are_wrapped_on_a_terminal_only(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    assert run(["dpo", "--loss", "nothing"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert run(["dpo", "--loss", "nothing"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert " ".join(lines) == line
    assert max(map(len, lines)) <= 40 < len(line)


def test_options_are_checked_before_the_starter_is_described(fails, capsys):
    assert "use mlx-align kto" in fails("dpo", "--loss", "kto")
    assert run(["dpo", "--loss", "kto"]) == 1
    assert capsys.readouterr().out == ""


def test_a_file_name_is_suggested_by_its_stem(fails, write):
    write(*many(), name="pairs.jsonl")
    assert "did you mean" not in fails("data", "check", "nothere.jsonl")
    assert "did you mean pairs.jsonl?" in fails("data", "check", "pair.json")


def test_a_run_folder_is_not_overwritten(fails, write, tmp_path):
    data = write(*many())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    message = fails("dpo", "--model", TINY_MODEL, "--data", data, "--output", "run")
    assert "already contains another run" in message
    (tmp_path / "file").write_text("")
    assert "is not a folder that can be written to" in fails(
        "dpo", "--model", TINY_MODEL, "--data", data, "--output", "file/run"
    )
