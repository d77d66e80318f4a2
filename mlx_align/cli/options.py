"""Command-line options made from the config classes, grouped --help, and completion of values."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from mlx_align.config.other_names import advice_on
from mlx_align.config.schema import GROUPS, OTHER, Option, Options, declared_options, flag_of
from mlx_align.errors import ConfigError
from mlx_align.system.interrupts import ReaderGone
from mlx_align.system.json_text import to_json

# Width of the first column of --help, the same in all sections.
FLAG_COLUMN = 28
COLUMNS_FLAG = "--columns"
ADAPTER_CONFIG = "adapter_config.json"
# Longest alias in --help, characters; the reference of options has all.
SHORT_ALIAS = 6


class SchemaValue(click.ParamType[str]):
    """A parameter type that keeps values as text: the schema converts and checks them."""

    def __init__(self, declared: Option) -> None:
        self.name = "value"
        self._declared = declared

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """[lora|dora|full] for choices; else the declared metavar, or N or X for numbers."""
        if self._declared.choices:
            return f"[{'|'.join(self._declared.choices)}]"
        return self._declared.metavar or {int: "N", float: "X"}.get(self._declared.kind, "TEXT")

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete choices, names (also the last one in sigmoid=1,sft), or paths."""
        if self._declared.choices:
            return [CompletionItem(c) for c in self._declared.choices if c.startswith(incomplete)]
        if self._declared.names:
            before, comma, last = incomplete.rpartition(",")
            names = [name for name in self._declared.names if name.startswith(last)]
            return [CompletionItem(f"{before}{comma}{name}") for name in names]
        return click.Path().shell_complete(ctx, param, incomplete) if self._is_path else []

    @property
    def _is_path(self) -> bool:
        metavar = self._declared.metavar or ""
        return any(word in metavar for word in ("PATH", "FILE", "RUN"))


class SchemaOption(click.Option):
    """A command-line option made from a declared one."""

    def __init__(self, declared: Option) -> None:
        self.declared = declared
        settings: dict[str, Any] = {"default": None, "help": declared.help}
        flags = [declared.flag, *map(flag_of, declared.aliases)]
        if declared.kind is bool:
            off = [flag.replace("--", "--no-", 1) for flag in flags]
            off[0] = declared.off or off[0]
            flags = [f"{flag}/{no}" for flag, no in zip(flags, off, strict=True)]
        else:
            settings["type"] = SchemaValue(declared)
            settings["multiple"] = declared.multiple
        # Named explicitly, because click would rename some, such as `input`.
        super().__init__([*flags, declared.name], **settings)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """The two columns of --help: flag and value; sentence, names and default."""
        declared = self.declared
        if declared.kind is bool:
            left = declared.flag
            if declared.off is not None:
                left = f"{left} / {declared.off}"
            elif declared.default is not False:
                left = left.replace("--", "--[no-]", 1)
        else:
            left = f"{declared.flag} {self.make_metavar(ctx)}"
        right = declared.help
        if declared.names:
            right += f" Names: {', '.join(declared.names)}."
        if short := [alias for alias in declared.aliases if len(alias) <= SHORT_ALIAS]:
            right += f" Also {', '.join(map(flag_of, short))}."
        if declared.required:
            right += " [required]"
        elif declared.shown_default is not None:
            right += f" [default: {declared.shown_default}]"
        return left, right


def schema_options(config_class: type[Options]) -> list[click.Parameter]:
    """One command-line option per option of a config class.

    The options have no defaults here. The config class has them, and `given_options` has to
    distinguish options that were given from others.
    """
    return [
        click.Argument(
            [declared.name],
            nargs=-1,
            required=True,
            type=SchemaValue(declared),
            metavar=declared.metavar,
        )
        if declared.positional
        else SchemaOption(declared)
        for declared in declared_options(config_class).values()
    ]


def config_options(
    config_class: type[Options],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for `@click.command` functions: adds the options of a config class."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for parameter in reversed(schema_options(config_class)):
            # click reads this list when it makes the command.
            function.__dict__.setdefault("__click_params__", []).append(parameter)
        return function

    return decorate


def run_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that adds the argument RUN; `options_of_run` turns it into options."""
    return click.argument("run", required=False, type=click.Path())(function)


def options_of_run(options: Mapping[str, Any], *, needs_run: bool = False) -> dict[str, Any]:
    """The options that were given; RUN is the `--adapter-path`, and names the base model.

    Args:
        options: The options of a command with the argument RUN.
        needs_run: Whether the command can't do with a model alone.

    Raises:
        ConfigError: There is no run and no model, RUN is not a folder with an adapter, or
            --adapter-path is given too.
    """
    found = given_options({name: value for name, value in options.items() if name != "run"})
    run = options["run"]
    if run is not None:
        if "adapter_path" in found:
            raise ConfigError(f"{run} and --adapter-path {found['adapter_path']}: give one of them")
        file = Path(run).expanduser() / ADAPTER_CONFIG
        if not file.is_file():
            raise ConfigError(f"{run}: has no {file.name}; expected the --output folder of a run")
        found["adapter_path"] = run
    if "adapter_path" not in found:
        if needs_run or "model" not in found:
            command = click.get_current_context().command_path
            other = "" if needs_run else ", or --model (a model folder or a hub name)"
            raise ConfigError(
                f"give a run (a folder that mlx-align wrote), as in {command} runs/first{other}"
            )
    elif "model" not in found:
        folder = Path(found["adapter_path"]).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"--adapter-path {found['adapter_path']}: no such folder")
        model = _base_model(folder / ADAPTER_CONFIG)
        if model is None:
            raise ConfigError(
                f"--model is missing, and {found['adapter_path']} doesn't name its base model; "
                "give a model folder or a hub name"
            )
        found["model"] = model
    return found


def _base_model(file: Path) -> str | None:
    """The base model that an adapter_config.json names, as mlx-lm or PEFT does."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = (content.get(name) for name in ("model", "base_model_name_or_path"))
        return next((name for name in names if isinstance(name, str)), None)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def json_option(help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The --json flag."""
    return click.option("--json", is_flag=True, help=help)


def echo_json(value: Any, *, indent: int | None = None, ascii: bool = True) -> None:
    """Print a value as JSON on standard output.

    Args:
        value: JSON-serialisable; NaN and infinity become null.
        indent: As for `to_json`.
        ascii: As for `to_json`; always so on a terminal that isn't UTF-8.
    """
    utf8 = "utf" in str(getattr(sys.stdout, "encoding", "")).lower()
    click.echo(to_json(value, indent=indent, ascii=ascii or not utf8))


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were on the command line, by name.

    Raises:
        ConfigError: A --loss-option is not name=value, or a --columns not field=column.
    """
    found = {name: value for name, value in options.items() if value not in (None, ())}
    if "loss_option" in found:
        found["loss_option"] = dict(_name_and_value(text) for text in found["loss_option"])
    if "columns" in found:
        found["columns"] = dict(_field_and_column(text) for text in found["columns"])
    return found


def _field_and_column(text: str) -> tuple[str, str]:
    field, equals, column = text.partition("=")
    if not equals or not field.strip() or not column.strip():
        raise ConfigError(f"--columns {text}: expected FIELD=COLUMN, such as prompt=question")
    return field.strip().replace("-", "_"), column.strip()


def _name_and_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--loss-option {text}: expected name=value, such as gamma=0.5")
    return name.strip().replace("-", "_"), value.strip()


class Command(click.Command):
    """A command whose --help shows its options in the groups of the schema."""

    def __init__(self, *args: Any, shown: Sequence[str] | None = None, **settings: Any) -> None:
        """Make a command. All schema options are accepted; --help lists those in `shown`."""
        super().__init__(*args, **settings)
        self.shown = shown

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Accept underscores in option names, and several values of one --columns.

        As in `--learning_rate 1e-5` and `--columns prompt=q chosen=a rejected=b`.
        """
        try:
            return super().parse_args(ctx, _spread(args))
        except click.NoSuchOption as error:
            ctx.fail(_unknown_option(error.option_name, self.get_params(ctx)))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per group; options without a group come last."""
        write_groups(self, ctx, formatter, self.shown)


def _spread(args: Sequence[str]) -> list[str]:
    """Arguments with hyphens in the names of options, and one value after each --columns."""
    spread: list[str] = []
    inside = False
    for arg in map(_with_hyphens, args):
        if arg == COLUMNS_FLAG:
            inside = True
            continue
        inside = inside and not arg.startswith("-") and "=" in arg
        spread += [COLUMNS_FLAG, arg] if inside else [arg]
    if args and args[-1] == COLUMNS_FLAG:
        spread.append(COLUMNS_FLAG)
    return spread


def _unknown_option(flag: str, parameters: Sequence[click.Parameter]) -> str:
    """The message for an option that a command lacks: what to do, or the nearest by its name."""
    own: dict[str, str] = {}
    for parameter in parameters:
        if isinstance(parameter, click.Option):
            for spellings in (parameter.opts, parameter.secondary_opts):
                own |= dict.fromkeys(spellings, next(iter(spellings), ""))
    known = {one.lstrip("-").replace("-", "_") for one in own.values()}
    advice = advice_on(flag.lstrip("-").replace("-", "_"), known, flags=True)
    if advice is not None:
        return f"No such option: {flag}. {advice[0].upper()}{advice[1:]}"
    close = dict.fromkeys(own[one] for one in difflib.get_close_matches(flag, own))
    return f"No such option: {flag}." + (f" Did you mean {' or '.join(close)}?" if close else "")


def _with_hyphens(arg: str) -> str:
    """An argument `--learning_rate` or `--learning_rate=1` as --learning-rate; others as they are.

    TRL's options have underscores.
    """
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else arg


class Group(click.Group):
    """A group of commands. Its --help shows them in sections; unknown ones get a suggestion.

    Attributes:
        elsewhere: Names that are no commands, such as losses, and the command that has them.
    """

    command_class = Command

    def __init__(
        self,
        *args: Any,
        sections: Mapping[str, Sequence[str]] | None = None,
        elsewhere: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self._sections = sections or {}
        self.elsewhere = elsewhere or {}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Accept the spellings that a `Command` does, in a group that trains."""
        if any(isinstance(parameter, SchemaOption) for parameter in self.params):
            args = _spread(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            ctx.fail(_unknown_option(error.option_name, self.get_params(ctx)))

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command.

        Raises:
            ReaderGone: In place of a BrokenPipeError, which click turns into a SystemExit like any.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ReaderGone from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by group; the commands come first if they are in sections."""
        if self._sections:
            self.format_commands(ctx, formatter)
        write_groups(self, ctx, formatter)
        if not self._sections:
            self.format_commands(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands in the sections given, or all in one."""
        for title, names in (self._sections or {"Commands": list(self.commands)}).items():
            with formatter.section(title):
                formatter.write_dl(
                    [(name, self.commands[name].get_short_help_str(limit=150)) for name in names]
                )

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is named, or suggest the nearest one."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            if other := self.elsewhere.get(args[0].replace("-", "_").lower()):
                ctx.fail(f"No such command: {args[0]}. Use {other}")
            close = difflib.get_close_matches(args[0], self.commands, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            known = ", ".join(self.commands)
            ctx.fail(f"No such command: {args[0]}.{hint} Commands: {known}")
        return super().resolve_command(ctx, args)


def write_groups(
    command: click.Command,
    ctx: click.Context,
    formatter: click.HelpFormatter,
    shown: Sequence[str] | None = None,
) -> None:
    """Write the options of a command, one section per group."""
    sections: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
    for parameter in command.get_params(ctx):
        if isinstance(parameter, click.Argument):
            continue  # the usage line shows it
        group = OTHER
        if isinstance(parameter, SchemaOption):
            group = parameter.declared.group
            if shown is not None and parameter.name not in shown:
                continue
        record = parameter.get_help_record(ctx)
        if record is not None:
            sections[group].append(record)
    for group, records in sections.items():
        if records:
            with formatter.section(group):
                padded = [(flag.ljust(FLAG_COLUMN), text) for flag, text in records]
                formatter.write_dl(padded, col_max=FLAG_COLUMN)
