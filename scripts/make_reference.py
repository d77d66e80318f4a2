"""Generate what is made from declarations of options and arguments, or check that it is current.

    python scripts/make_reference.py [--check]

Writes mlx_align/config/keywords.py (a TypedDict per config class, so that editors and mypy know the
keyword arguments of mlx_align.dpo(...) and the others), docs/reference/options.md, and
docs/reference/trl.md (from the arguments declared in mlx_align/trl/configs.py).
"""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from mlx_align import config
from mlx_align.cli.group import SECTIONS, cli
from mlx_align.cli.options import SchemaOption
from mlx_align.config.schema import GROUPS, Option, Options, declared_options, flag_of
from mlx_align.config.signatures import annotation_of
from mlx_align.trl import arguments, configs

ROOT = Path(__file__).resolve().parent.parent
KEYWORDS = ROOT / "mlx_align" / "config" / "keywords.py"
PAGE = ROOT / "docs" / "reference" / "options.md"
TRL_PAGE = ROOT / "docs" / "reference" / "trl.md"

KEYWORDS_HEAD = '''"""The keyword arguments of the Python functions, as types for editors and mypy.

Generated from the config classes by scripts/make_reference.py; don't edit. Use them as
`def dpo(**options: Unpack[DPOOptions]) -> Run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Required, TypeAlias, TypedDict

if TYPE_CHECKING:
    from datasets import Dataset
else:
    Dataset = Any

# Rows of data: a list of dicts, or a datasets.Dataset.
Rows: TypeAlias = Iterable[Mapping[str, Any]] | Dataset
# A file, folder or hub name; rows; or rows by split name (train, valid).
Data: TypeAlias = str | Path | Rows | Mapping[str, Rows]
# A reward: a spec as on the command line, a function, or a function with its weight.
RewardSource: TypeAlias = str | Callable[..., Any] | tuple[Callable[..., Any], float]
# One or several rewards.
Rewards: TypeAlias = RewardSource | Sequence[RewardSource]
'''

PAGE_HEAD = """# Options

All options of all commands. The command line, YAML files (`-c run.yaml`) and the Python functions
take the same options: `--learning-rate 1e-5`, `learning_rate: 1e-5`, `learning_rate=1e-5`. The
command line takes precedence over the YAML file, and that over the defaults.

An option that is unknown, out of range, or without effect is an error. "Also" lists the names that
mlx-lm, TRL and axolotl have for an option; they are accepted in all three places. On the command
line, names with underscores are accepted too. "measured" leads to what supports a default.

<!-- Generated from the schema by scripts/make_reference.py; don't edit. -->
"""


TRL_HEAD = """# TRL's arguments

What `mlx_align.trl` does with each argument of TRL's configs. An argument is used, or it changes
nothing and is accepted, or it is refused with an error that names it. Unknown arguments are errors
too. [Coming from TRL](../coming-from.md#trl-scripts) has an example.

<!-- Generated from mlx_align/trl/configs.py by scripts/make_reference.py; don't edit. -->
"""


def config_classes() -> dict[str, type[Options]]:
    """The config classes of the commands, by name."""
    shared = {
        "Options",
        "TrainConfig",
        "LossConfig",
        "OnPolicyConfig",
        "ScorerConfig",
        "LabelOptions",
    }
    found = {name: getattr(config, name) for name in config.__all__ if name not in shared}
    return {
        name: one
        for name, one in found.items()
        if isinstance(one, type) and issubclass(one, Options)
    }


def keywords_module() -> str:
    """The text of config/keywords.py."""
    parts = [KEYWORDS_HEAD]
    for name, config_class in config_classes().items():
        parts.append(f"\n\nclass {name.removesuffix('Config')}Options(TypedDict, total=False):")
        parts.append(f'    """Keyword arguments checked by `{name}`."""\n')
        for declared in declared_options(config_class).values():
            hint = annotation_of(declared)
            parts.append(
                f"    {declared.name}: {f'Required[{hint}]' if declared.required else hint}"
            )
    return _formatted("\n".join(parts) + "\n")


def _formatted(text: str) -> str:
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(KEYWORDS), "-"]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def options_page() -> str:
    """The text of docs/reference/options.md."""
    parts = [PAGE_HEAD]
    shared = declared_options(config.TrainConfig)
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        if set(names) == set(config.TRAINING_CONFIGS):
            parts.append("### All training commands\n")
            parts += _tables(list(shared.values()))
        for name in names:
            parts += _command(cli.commands[name], name, shared)
    return "\n".join(parts).rstrip() + "\n"


def _command(
    command: click.Command, name: str, shared: Mapping[str, Option] | None = None
) -> list[str]:
    """A command's usage and options; of a training command, those it doesn't share."""
    shown = getattr(command, "shown", None)
    is_training = name in config.TRAINING_CONFIGS
    options = [
        parameter.declared
        for parameter in command.params
        if isinstance(parameter, SchemaOption) and (shown is None or parameter.name in shown)
    ]
    if is_training and shared is not None:
        options = [option for option in options if shared.get(option.name) != option]
    parts = []
    if options or not isinstance(command, click.Group):
        usage = " ".join(command.collect_usage_pieces(click.Context(command)))
        text = (command.help or "").replace("\b\n", "").strip()
        parts += [f"### {name}\n", f"`mlx-align {name} {usage}`\n", _paragraphs(text) + "\n"]
        if is_training:
            parts.append("All options above, and these:\n")
        elif shown is not None:
            parts.append("All options of the planned command, and these:\n")
        parts += _tables(options)
        parts += _command_line_only(command)
    if isinstance(command, click.Group):
        for sub_name in sorted(command.commands):
            parts += _command(command.commands[sub_name], f"{name} {sub_name}")
    return parts


def _tables(options: Sequence[Option]) -> list[str]:
    """One table per group."""
    parts = []
    groups = [group for group in GROUPS if any(option.group == group for option in options)]
    for group in groups:
        if len(groups) > 1:
            parts.append(f"**{group}**\n")
        parts += ["| Option | Value | Default | Description |", "|---|---|---|---|"]
        parts += [_row(option) for option in options if option.group == group]
        parts.append("")
    return parts


def _command_line_only(command: click.Command) -> list[str]:
    """Options that YAML files and Python functions don't have."""
    context = click.Context(command)
    others = [p for p in command.params if type(p) is click.Option]
    if not others:
        return []
    rows = []
    for option in others:
        flag, help = option.get_help_record(context) or ("", "")
        rows.append(f"| `{_cell(flag)}` | {_cell(help)} |")
    return ["On the command line only:\n", "| Option | Description |", "|---|---|", *rows, ""]


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(one.split()) for one in text.split("\n\n"))


def _row(declared: Option) -> str:
    flag = declared.flag
    if declared.off is not None:
        flag = f"{flag}` `{declared.off}"
    elif declared.kind is bool and declared.default is not False:
        flag = f"{flag}` `{flag.replace('--', '--no-', 1)}"
    if declared.choices:
        value = ", ".join(f"`{choice}`" for choice in declared.choices)
    else:
        words = {int: "whole number", float: "number", str: "text", bool: "flag", dict: ""}
        value = declared.metavar or words.get(declared.kind, "text")
        value = value.replace("_", " ").lower() if value.isupper() or "_" in value else value
        if declared.range:
            value += f", {declared.range}"
    help = declared.help
    if declared.names:
        help += f" Names: {', '.join(f'`{name}`' for name in declared.names)}."
    if declared.multiple:
        help += " May be given several times." if "epeatable" not in help else ""
    if declared.aliases:
        help += f" Also {', '.join(f'`{flag_of(alias)}`' for alias in declared.aliases)}."
    if declared.change_on_resume:
        help += " Can change on resume."
    default = _cell("required" if declared.required else declared.shown_default or "")
    if declared.evidence is not None:
        default += f" ([measured](../verified/{declared.evidence}))"
    return f"| `{flag}` | {_cell(value)} | {default} | {_cell(help)} |"


def trl_page() -> str:
    """The text of docs/reference/trl.md."""
    shared = arguments.rules(configs.TrainingArguments)
    parts = [TRL_HEAD, "## All trainers\n", *_argument_tables(shared)]
    for config_class in (
        configs.SFTConfig,
        configs.DPOConfig,
        configs.KTOConfig,
        configs.RewardConfig,
        configs.GRPOConfig,
        configs.RLOOConfig,
    ):
        own = {
            name: entry
            for name, entry in arguments.rules(config_class).items()
            if shared.get(name) != entry
        }
        parts += [f"## {config_class.__name__}\n", *_argument_tables(own)]
    return "\n".join(parts).rstrip() + "\n"


def _argument_tables(entries: Mapping[str, tuple[object, arguments.Rule]]) -> list[str]:
    """One table for the arguments that are used, and one for each of the other kinds."""
    titles = {
        "used": ("Used", "What it does"),
        "fixed": ("Refused, unless they have these values", "Otherwise"),
        "ignored": ("Accepted without effect", "Why"),
    }
    parts = []
    for kind, (title, column) in titles.items():
        rows = []
        for name, (default, rule) in entries.items():
            if rule.kind == kind:
                values = ", ".join(f"`{value!r}`" for value in (default, *rule.accepted))
                # The text of a choice begins with its value.
                text = rule.text if kind == "used" else rule.text[:1].upper() + rule.text[1:]
                rows.append(f"| `{name}` | {_cell(values)} | {_cell(text).rstrip('.')}. |")
        if rows:
            head = "Values" if kind == "fixed" else "Default"
            parts += [f"**{title}**\n", f"| Argument | {head} | {column} |", "|---|---|---|"]
            parts += [*rows, ""]
    return parts


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Write the files, or with --check say what is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    pages = ((KEYWORDS, keywords_module()), (PAGE, options_page()), (TRL_PAGE, trl_page()))
    for file, text in pages:
        old = file.read_text(encoding="utf-8") if file.exists() else ""
        if check and old != text:
            sys.stdout.writelines(
                difflib.unified_diff(old.splitlines(True), text.splitlines(True), str(file), "new")
            )
            sys.exit(f"{file} is out of date; run scripts/make_reference.py")
        if not check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
