"""Options: precedence, types and ranges, messages, signatures and the generated files."""

import dataclasses
import inspect
import typing
from pathlib import Path

import pytest
from helpers.scripts import load_script

from mlx_align import config as configs
from mlx_align.config import DPOConfig, GRPOConfig, SampleConfig, ScoreConfig, keywords
from mlx_align.config.other_names import OTHER_NAMES, advice_on, options_in
from mlx_align.config.schema import (
    declared_options,
    fixed_options,
    make_config,
    read_yaml,
    to_yaml,
)
from mlx_align.config.signatures import document, signature_of
from mlx_align.data.buckets import BatchLimit, batch_limit
from mlx_align.errors import ConfigError


def test_command_line_over_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning-rate: 2e-4\nbatch_size: 3\niters: 50\n")
    config = make_config(DPOConfig, {"batch_size": 5}, file)
    assert config.batch_size == 5
    assert config.learning_rate == 2e-4  # YAML 1.1 reads 2e-4 as text
    assert config.seed == DPOConfig().seed
    assert config.iters == 50
    # The command line's choice between the two replaces the file's.
    assert make_config(DPOConfig, {"epochs": 2.0}, file).iters is None
    tokens = make_config(DPOConfig, {"batch_tokens": 2048}, file)
    assert batch_limit(tokens) == BatchLimit(tokens=2048)
    assert batch_limit(config) == BatchLimit(5)
    assert batch_limit(DPOConfig()) == BatchLimit(1)
    # A finished run's file, with all that was left to defaults in it, takes either, too.
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(tokens))
    assert make_config(DPOConfig, {}, written) == tokens


def test_aliases_are_the_same_option_everywhere(tmp_path):
    file = tmp_path / "axolotl.yaml"
    file.write_text("base_model: m\nmicro_batch_size: 3\nlr_scheduler: cosine\n")
    config = make_config(DPOConfig, {"lr": 2e-4, "num_train_epochs": 2, "loss_type": "dpo"}, file)
    assert (config.model, config.batch_size, config.lr_schedule) == ("m", 3, "cosine")
    assert (config.learning_rate, config.epochs, config.loss) == (2e-4, 2.0, "sigmoid")
    assert make_config(DPOConfig, {"max_steps": 5}, file).iters == 5
    with pytest.raises(ConfigError, match="learning_rate and lr are the same option; give one"):
        make_config(DPOConfig, {"lr": 1.0, "learning_rate": 2.0})
    file.write_text("lr: 1\nlearning_rate: 2\n")
    with pytest.raises(ConfigError, match="yaml:2: learning_rate and lr are the same option"):
        read_yaml(file, DPOConfig)
    file.write_text("seed: 1\nlr: fast\n")
    with pytest.raises(ConfigError, match="yaml:2: learning_rate: fast: expected a number"):
        read_yaml(file, DPOConfig)


def test_an_alias_names_one_option_of_a_command():
    for config_class in [getattr(configs, name) for name in configs.__all__ if "Config" in name]:
        declared = declared_options(config_class)
        aliases = [alias for one in declared.values() for alias in one.aliases]
        assert len(aliases) == len(set(aliases)), config_class
        assert not set(aliases) & declared.keys(), config_class


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_advice_on_other_names_names_options_that_exist(name):
    """And no command has an option of that name where the advice would be shown."""
    classes = [getattr(configs, one) for one in configs.__all__ if "Config" in one]
    for advice in OTHER_NAMES[name]:
        named = [one for one in options_in(advice) if one != "resume"]
        fitting = [c for c in classes if all(one in declared_options(c) for one in named)]
        assert fitting, advice
    for config_class in configs.TRAINING_CONFIGS.values():
        declared = declared_options(config_class)
        if name in declared or name in {a for one in declared.values() for a in one.aliases}:
            continue
        advice = advice_on(name, declared, flags=False)
        with pytest.raises(ConfigError) as error:
            make_config(config_class, {name: 1})
        assert str(error.value).startswith(f"unknown option {name}")
        assert advice is None or str(error.value).endswith(f"; {advice}")
        assert "--" not in str(error.value)


def test_written_options_read_back(tmp_path):
    config = make_config(
        DPOConfig,
        {"model": "m", "lora_keys": "a,b", "loss_option": {"beta": "0.3"}, "warmup": 0.5},
    )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert make_config(DPOConfig, {}, file) == config


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"learning_rte": 1}, "unknown option --learning-rte; did you mean --learning-rate?"),
        ({"batch_size": 0}, "--batch-size 0: out of range; must be at least 1"),
        ({"batch_size": 1.5}, "--batch-size 1.5: expected a whole number"),
        ({"batch_size": True}, "--batch-size True: expected a whole number"),
        ({"learning_rate": "fast"}, "--learning-rate fast: expected a number"),
        ({"learning_rate": float("nan")}, "--learning-rate nan: expected a number"),
        ({"lora_dropout": 1.0}, "--lora-dropout 1.0: out of range; must be at least 0 and below 1"),
        (
            {"lr_schedule": "cosin"},
            "--lr-schedule cosin: unknown; did you mean cosine? choose",
        ),
        ({"grad_checkpoint": "yes"}, "--grad-checkpoint yes: expected true or false"),
        ({"iters": 3, "epochs": 1.0}, "--iters and --epochs exclude each other"),
        ({"batch_size": 1, "batch_tokens": 99}, "--batch-size and --batch-tokens exclude each"),
        ({"loss_option": "beta=1"}, "--loss-option beta=1: expected a list of name: value"),
    ],
)
def test_wrong_options_are_named(given, words):
    with pytest.raises(ConfigError) as error:
        make_config(DPOConfig, given, source="command line")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_size: [1\n", "run.yaml:2: not YAML"),
        ("- 1\n- 2\n", "expected lines of `option: value`, found list"),
        ("lora_parameters:\n  rank: 8\n", "run.yaml:1: unknown option lora_parameters"),
        ("!!python/object:os.system {}\n", "not YAML"),
        ("batch_size: none\n", "run.yaml:1: batch_size: none: expected a whole number"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_yaml(file, DPOConfig)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_double_beta(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        read_yaml(tmp_path / "none.yaml", DPOConfig)
    with pytest.raises(ConfigError, match="the same hyperparameter twice"):
        DPOConfig(beta=0.1, loss_option={"beta": "0.2"}).loss_options()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"beta": -1}, "beta=-1: out of range; must be above 0"),
        ({"fine_tune_type": "lorra"}, "fine_tune_type='lorra': unknown; did you mean lora?"),
        ({"learning_rte": 1}, "unknown option learning_rte; did you mean learning_rate?"),
        ({"iters": 3, "epochs": 1}, "iters and epochs exclude each other"),
        ({"lora_keys": 3}, "lora_keys=3: expected a list of names"),
    ],
)
def test_python_callers_see_python_names(given, words):
    with pytest.raises(ConfigError) as error:
        make_config(DPOConfig, given)
    assert str(error.value).startswith(words)
    assert "--" not in str(error.value)


def test_values_are_checked_however_a_config_is_made():
    with pytest.raises(ConfigError, match="beta=-1"):
        DPOConfig(beta=-1)
    with pytest.raises(ConfigError, match="group_size=0"):
        dataclasses.replace(GRPOConfig(), group_size=0)
    with pytest.raises(ConfigError, match="data is missing"):
        make_config(SampleConfig, {"model": "m"})
    with pytest.raises(ConfigError, match="--data is missing"):
        make_config(SampleConfig, {"model": "m"}, source="command line")
    assert DPOConfig(output=Path("runs/a")).output == "runs/a"
    with pytest.raises(dataclasses.FrozenInstanceError):
        DPOConfig().seed = 1


def test_a_file_error_names_the_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("# a comment\nmodel: m\nlearning-rate: -1\n")
    with pytest.raises(ConfigError) as error:
        make_config(DPOConfig, {"beta": 0.1}, file)
    assert str(error.value) == f"{file}:3: learning_rate: -1: out of range; must be above 0"


def test_what_may_change_on_resume():
    fixed = fixed_options(GRPOConfig())
    assert {"seed", "learning_rate", "loss", "group_size", "reward"} <= set(fixed)
    for name in ("model", "output", "steps_per_report", "save_every", "reward_model", "force"):
        assert name not in fixed


def test_a_signature_has_every_option():
    extra = inspect.Parameter("callbacks", inspect.Parameter.KEYWORD_ONLY, default=())
    signature = signature_of(DPOConfig, extra=[extra], leave_out=["force"], returns="Run")
    names = set(declared_options(DPOConfig)) - {"force"} | {"callbacks"}
    assert set(signature.parameters) == names
    assert "learning_rate: float | None = None" in str(signature)
    assert "max_grad_norm: float = 1.0" in str(signature)
    assert "Literal['lora', 'dora', 'full'] | None = None" in str(signature)
    assert signature_of(ScoreConfig).parameters["model"].default is inspect.Parameter.empty


def test_a_docstring_describes_every_option():
    text = document(DPOConfig, "Train.", returns="The run.", raises=[("ConfigError", "Wrong.")])
    assert text.startswith("Train.\n\nArgs (Model and data):\n    model: ")
    for name in declared_options(DPOConfig):
        assert f"\n    {name}: " in text
    assert "--" not in text
    assert max(map(len, text.splitlines())) <= 88


def test_generated_files_are_up_to_date():
    make = load_script("make_reference")
    said = "is out of date; run scripts/make_reference.py"
    assert make.KEYWORDS.read_text() == make.keywords_module(), f"{make.KEYWORDS} {said}"
    assert make.PAGE.read_text() == make.options_page(), f"{make.PAGE} {said}"
    assert make.TRL_PAGE.read_text() == make.trl_page(), f"{make.TRL_PAGE} {said}"
    for name, config_class in make.config_classes().items():
        typed = getattr(keywords, f"{name.removesuffix('Config')}Options")
        assert set(typing.get_type_hints(typed)) == set(declared_options(config_class))


def test_every_option_is_declared_once_with_help():
    for name in configs.__all__:
        config_class = getattr(configs, name)
        if not (isinstance(config_class, type) and issubclass(config_class, configs.Options)):
            continue
        for declared in declared_options(config_class).values():
            assert declared.help.endswith(".")
            assert len(declared.help) <= 110, declared.help


def test_a_complete_file_has_what_is_off_and_not_what_is_replaced(tmp_path):
    config = make_config(DPOConfig, {"model": "m", "data": "d", "iters": 5})
    text = to_yaml(config, with_unset=True)
    assert "max_completion_length: null\n" in text
    assert "epochs" not in text
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert make_config(DPOConfig, {}, file) == config
    assert make_config(DPOConfig, {"epochs": 2}, file).iters is None
