"""Options: precedence, ranges, and what is refused by name."""

import pytest

from mlx_align.config import DpoConfig
from mlx_align.data.shapes import BatchLimit, batch_limit
from mlx_align.errors import ConfigError
from mlx_align.settings import read_yaml, resolve, to_yaml


def test_command_line_over_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning-rate: 2e-4\nbatch_size: 3\niters: 50\n")
    config = resolve(DpoConfig, {"batch_size": 5}, file)
    assert config.batch_size == 5
    assert config.learning_rate == 2e-4  # YAML 1.1 reads 2e-4 as text
    assert config.seed == DpoConfig().seed
    assert config.iters == 50
    # The command line's choice between the two replaces the file's.
    assert resolve(DpoConfig, {"epochs": 2.0}, file).iters is None
    tokens = resolve(DpoConfig, {"batch_tokens": 2048}, file)
    assert batch_limit(tokens) == BatchLimit(tokens=2048)
    assert batch_limit(config) == BatchLimit(5)
    assert batch_limit(DpoConfig()) == BatchLimit(1)
    # A finished run's file, with all that was left to defaults in it, takes either, too.
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(tokens))
    assert resolve(DpoConfig, {}, written) == tokens


def test_written_options_read_back(tmp_path):
    config = resolve(
        DpoConfig,
        {"model": "m", "lora_keys": "a,b", "loss_option": {"beta": "0.3"}, "warmup": 0.5},
    )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert resolve(DpoConfig, {}, file) == config


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"learning_rte": 1}, "unknown option learning_rte; did you mean learning_rate?"),
        ({"batch_size": 0}, "--batch-size: 0 is out of range; it must be at least 1"),
        ({"batch_size": 1.5}, "--batch-size: 1.5 is not a whole number"),
        ({"batch_size": True}, "--batch-size: True is not a whole number"),
        ({"learning_rate": "fast"}, "--learning-rate: 'fast' is not a number"),
        ({"learning_rate": float("nan")}, "--learning-rate: nan is not a number"),
        ({"lora_dropout": 1.0}, "--lora-dropout: 1.0 is out of range; it must be below 1"),
        ({"lr_schedule": "cosin"}, "--lr-schedule: cosin is unknown; choose from constant"),
        ({"grad_checkpoint": "yes"}, "--grad-checkpoint: 'yes' is not true or false"),
        ({"iters": 3, "epochs": 1.0}, "--iters and --epochs exclude each other"),
        ({"batch_size": 1, "batch_tokens": 99}, "--batch-size and --batch-tokens exclude each"),
        ({"loss_option": "beta=1"}, "--loss-option: 'beta=1' is not a list of name: value"),
    ],
)
def test_wrong_options_are_named(given, words):
    with pytest.raises(ConfigError) as error:
        resolve(DpoConfig, given)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_size: [1\n", "run.yaml:2: not YAML"),
        ("- 1\n- 2\n", "expected option: value lines, found list"),
        ("lora_parameters:\n  rank: 8\n", "run.yaml: unknown option lora_parameters"),
        ("!!python/object:os.system {}\n", "not YAML"),
        ("batch_size: none\n", "run.yaml: batch_size: 'none' is not a whole number"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_yaml(file, DpoConfig)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_double_beta(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        read_yaml(tmp_path / "none.yaml", DpoConfig)
    with pytest.raises(ConfigError, match="the same twice"):
        DpoConfig(beta=0.1, loss_option={"beta": "0.2"}).loss_options()
