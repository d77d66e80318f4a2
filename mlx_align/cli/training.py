"""What the training commands share: their configuration, resuming, and being interrupted."""

from __future__ import annotations

import json as json_module
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlx_align.cli.options import config_options, given
from mlx_align.config import TrainConfig
from mlx_align.errors import ConfigError, WriteError
from mlx_align.settings import flag_of, resolve, to_yaml
from mlx_align.shipped import shipped_file, shipped_or_given

if TYPE_CHECKING:
    from mlx_align.cli.display import Terminal
    from mlx_align.train.task import Task

Config = TypeVar("Config", bound=TrainConfig)
Command = Callable[..., Any]
Run = Callable[..., dict[str, Any]]


def training_options(kind: type[TrainConfig]) -> Callable[[Command], Command]:
    """All options of a training command: those of its dataclass, and -c, --resume, --json."""

    def decorate(function: Command) -> Command:
        function = click.option(
            "--json", is_flag=True, help="Print the summary as JSON; all else goes to stderr."
        )(function)
        function = click.option(
            "--resume",
            is_flag=False,
            flag_value="",
            metavar="[RUN]",
            help="Go on with an interrupted run; as a bare flag, with that of --output.",
        )(function)
        function = click.option(
            "-c", "--config", "config_file", metavar="FILE", help="YAML file with options."
        )(function)
        return config_options(kind)(function)

    return decorate


def offline(make_task: Callable[[Config], Task]) -> Callable[[Config], Run]:
    """How the commands that train on given completions run: by their task."""

    def make_run(config: Config) -> Run:
        from mlx_align.train.offline import run_offline

        return partial(run_offline, make_task(config))

    return make_run


def run_training(
    kind: type[Config],
    command: str,
    make_run: Callable[[Config], Run],
    options: Mapping[str, Any],
    *,
    config_file: str | None,
    resume: str | None,
    json: bool,
    starter: str | None = None,
    invitation: str = "Talk to the result with stock mlx-lm",
) -> Path:
    """Resolve the options, train, and print what came out; the run folder.

    Args:
        kind: The command's dataclass.
        command: Its name, for the run folder.
        make_run: Checks what options can be checked by themselves, before anything is read or
            made; what it gives runs: (options, run folder, display, resume=…) -> summary.
        options: What click parsed.
        config_file: The `-c` file.
        resume: The run to go on with, "" for that of --output, None for a new one.
        json: Whether to print the summary as JSON.
        starter: The shipped configuration to use when neither model nor data is named.
        invitation: What stands above the command with which to try the result.
    """
    # Imported late: `--help` should not wait for mlx-lm.
    from mlx_align.cli.display import Terminal
    from mlx_align.report.page import PAGE_FILE
    from mlx_align.train.runlog import new_run_folder

    terminal = Terminal(json)
    asked = given(dict(options))
    if resume is not None:
        config, run = _resumed(kind, command, resume, asked, config_file)
        train = make_run(config)
    else:
        config = _configured(kind, asked, config_file, starter, terminal)
        train = make_run(config)
        run = new_run_folder(config.output, command)
    config = replace(config, output=str(run))
    with _saying_how_to_go_on(run, command, terminal):
        summary = train(config, run, terminal, resume=resume is not None)
    if json:
        click.echo(json_module.dumps(summary, indent=2))
        return run
    terminal.outcome(summary)
    terminal.note(
        f"\nRun folder: {run}\nRun page: {run / PAGE_FILE}\n{invitation}:\n  {summary['talk']}"
    )
    return run


def _configured(
    kind: type[Config],
    asked: dict[str, Any],
    config_file: str | None,
    starter: str | None,
    terminal: Terminal,
) -> Config:
    if config_file is not None:
        config = resolve(kind, asked, Path(config_file))
    elif starter is not None and "model" not in asked and "data" not in asked:
        config = resolve(kind, asked, shipped_file(starter))
        terminal.note(f"No --model and no --data: training the starter.\n\n{to_yaml(config)}")
    else:
        config = resolve(kind, asked)
    for name in ("model", "data"):
        if getattr(config, name) is None:
            raise ConfigError(f"{flag_of(name)} is missing; name a folder, a file or a hub name")
    assert config.model is not None
    assert config.data is not None
    return replace(
        config,
        model=shipped_or_given(config.model, "model"),
        data=shipped_or_given(config.data, "data"),
    )


def _resumed(
    kind: type[Config],
    command: str,
    resume: str,
    asked: dict[str, Any],
    config_file: str | None,
) -> tuple[Config, Path]:
    """The configuration of an earlier run, which must not be asked to change."""
    from mlx_align.train.fingerprints import check_command, read_fingerprints
    from mlx_align.train.runlog import CONFIG_FILE

    if config_file is not None:
        raise ConfigError("-c and --resume: a resumed run has its own config.yaml; leave -c out")
    output = asked.pop("output", None)
    if resume and output is not None and Path(resume) != Path(output):
        raise ConfigError(f"--resume {resume} and --output {output}: a run goes on where it is")
    folder = resume or output
    if not folder:
        raise ConfigError("--resume: say which run, --resume RUN or --output RUN --resume")
    run = Path(folder).expanduser()
    if not (run / CONFIG_FILE).is_file():
        raise ConfigError(f"--resume {folder}: no {CONFIG_FILE} in it; is it a run folder?")
    check_command(run, command, read_fingerprints(run))
    config = resolve(kind, {}, run / CONFIG_FILE)
    if config.model is None or config.data is None:
        raise ConfigError(f"--resume {folder}: its {CONFIG_FILE} names no model or no data")
    wanted = resolve(kind, {k: v for k, v in asked.items() if v is not None})
    changed = {}
    for entry in fields(kind):
        if entry.name not in asked:
            continue
        value = getattr(wanted, entry.name)
        if not entry.metadata["training"]:
            changed[entry.name] = value
        elif value != getattr(config, entry.name):
            raise ConfigError(
                f"{flag_of(entry.name)} {value}: the run has {getattr(config, entry.name)}, and a "
                "resumed run can't change it; leave it out, or start a new run"
            )
    return replace(config, **changed), run


@contextmanager
def _saying_how_to_go_on(run: Path, command: str, terminal: Terminal) -> Iterator[None]:
    from mlx_align.train.checkpoint import has_checkpoint
    from mlx_align.train.runlog import CONFIG_FILE
    from mlx_align.train.signals import Interrupted

    go_on = f"mlx-align {command} --resume {shlex.quote(str(run))}"
    try:
        yield
    except Interrupted:
        if has_checkpoint(run):
            terminal.note(f"stopped; go on with: {go_on}")
        elif (run / CONFIG_FILE).is_file():
            terminal.note(f"stopped before the first checkpoint; start again with: {go_on}")
        else:
            terminal.note("stopped before anything was written; nothing is lost")
        raise
    except WriteError:
        if (run / CONFIG_FILE).is_file():
            terminal.note(f"what is there is whole; with room to write, go on with: {go_on}")
        raise
