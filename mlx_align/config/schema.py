"""Declare, read and check options. Each option is declared once, as a dataclass field.

A command's config class is a frozen dataclass whose fields are made by `option`; pydantic checks
its values. From these declarations come the command-line options (`cli/options.py`), the keys of
YAML files, the signatures and docstrings of the Python functions (`signatures.py`), the keyword
types for editors (`keywords.py`) and the reference page (`docs/reference/options.md`).

Precedence: keyword arguments or the command line > the YAML file > defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from mlx_align.config.other_names import LOSS_COMMANDS, advice_on
from mlx_align.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel

Source = Literal["python", "command line"]

# Counters and array indices are 32 bits wide.
MAX_INT = 2**31 - 1
# Pairs of options that set the same thing.
EXCLUSIVE = (("iters", "epochs"), ("batch_size", "batch_tokens"))
# The sections of --help and of the reference page, in this order.
MODEL = "Model and data"
LORA = "LoRA"
REWARD = "Reward"
ROLLOUT = "Rollouts"
OPTIMISATION = "Optimisation"
LOSS = "Loss"
CRITIC = "Critic"
JUDGE = "Judge"
LABELS = "Labels"
SCORING = "Scoring"
SAMPLING = "Sampling"
EVALUATION = "Evaluation"
ADVANCED = "Advanced"
OTHER = "Other options"
GROUPS = (
    MODEL,
    LORA,
    REWARD,
    ROLLOUT,
    OPTIMISATION,
    LOSS,
    CRITIC,
    JUDGE,
    LABELS,
    SCORING,
    SAMPLING,
    EVALUATION,
    ADVANCED,
    OTHER,
)
REQUIRED: Any = dataclasses.MISSING
RESUME_HELP = "Continue an --output that was interrupted, after its finished rows."


@dataclass(frozen=True, slots=True)
class RemovedOption:
    """An option that an earlier version had.

    Attributes:
        version: The first version without it.
        default: Its default. A run that had this value can be resumed without the option.
        instead: What to do instead, as the end of a sentence: "use --beta".
    """

    version: str
    default: Any
    instead: str


# Options that earlier versions had, by name. An option that is removed or renamed is added here.
REMOVED_OPTIONS: dict[str, RemovedOption] = {}
_UNCHANGED: Any = object()


@dataclass(frozen=True, slots=True)
class Option:
    """One declared option.

    Attributes:
        name: Field name, YAML key and Python keyword.
        kind: int, float, str, bool, tuple (of names) or dict (name to value).
        default: Its default; `REQUIRED` if it must be given.
        help: One sentence.
        group: The section of --help, one of `GROUPS`.
        default_text: The meaning of a default of None, in words.
        choices: All values it takes; empty if it takes others too.
        names: Names to show and complete if a value can combine them (`sigmoid=1,sft=0.2`).
        at_least: Inclusive lower bound.
        at_most: Inclusive upper bound.
        above: Exclusive lower bound.
        below: Exclusive upper bound.
        metavar: Placeholder for the value in --help.
        change_on_resume: Whether a resumed run may change it. Others determine what is trained.
        multiple: Whether it may be given more than once, each time with one value.
        off: The flag that turns it off, if that is not --no-NAME.
        positional: Whether the command line takes it without a flag.
        python_type: Annotation for Python callers, if they may pass more types than the config has.
        aliases: Other spellings of its name that are accepted everywhere, with underscores: those
            of mlx-lm, TRL and axolotl.
        evidence: The page and section of docs/verified that supports the default.
    """

    name: str
    kind: type
    default: Any
    help: str
    group: str
    default_text: str | None = None
    choices: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    metavar: str | None = None
    change_on_resume: bool = False
    multiple: bool = False
    off: str | None = None
    positional: bool = False
    python_type: str | None = None
    aliases: tuple[str, ...] = ()
    evidence: str | None = None

    @property
    def flag(self) -> str:
        """The command-line spelling."""
        return flag_of(self.name)

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is REQUIRED

    @property
    def range(self) -> str:
        """The allowed range in words; empty if any value is allowed."""
        bounds = (
            ("at least", self.at_least),
            ("at most", self.at_most),
            ("above", self.above),
            ("below", self.below),
        )
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)

    @property
    def shown_default(self) -> str | None:
        """The default as text for --help and the reference; None if there is nothing to show."""
        if self.default_text is not None or self.default is None or self.required:
            return self.default_text
        if self.kind is bool:
            return "on" if self.default else None
        return str(self.default) if self.default != {} else None


def option(
    default: Any,
    help: str,  # click's name for it
    group: str,
    *,
    default_text: str | None = None,
    names: tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
    change_on_resume: bool = False,
    multiple: bool = False,
    off: str | None = None,
    positional: bool = False,
    python_type: str | None = None,
    aliases: tuple[str, ...] = (),
    evidence: str | None = None,
) -> Any:
    """Declare an option as a field of a config class. The arguments are those of `Option`.

    Name, type and choices come from the field's name and annotation (`Literal` for choices).
    """
    return _field(
        Option(
            name="",
            kind=str,
            default=default,
            help=help,
            group=group,
            default_text=default_text,
            names=names,
            at_least=at_least,
            at_most=at_most,
            above=above,
            below=below,
            metavar=metavar,
            change_on_resume=change_on_resume,
            multiple=multiple,
            off=off,
            positional=positional,
            python_type=python_type,
            aliases=aliases,
            evidence=evidence,
        )
    )


def override(config_class: type[Any], name: str, default: Any = _UNCHANGED, **changes: Any) -> Any:
    """Declare an option of another config class again, with another default, help or group.

    Args:
        config_class: The class that declares the option.
        name: Its name there.
        default: The new default; the declared one if left out.
        **changes: Further arguments of `option` to replace.
    """
    (declared,) = (f.metadata["option"] for f in dataclasses.fields(config_class) if f.name == name)
    if default is not _UNCHANGED:
        changes["default"] = default
    changes["name"] = name
    return _field(dataclasses.replace(declared, **changes))


def _field(declared: Option) -> Any:
    metadata = {"option": declared}
    if isinstance(declared.default, dict):
        return dataclasses.field(default_factory=lambda: dict(declared.default), metadata=metadata)
    return dataclasses.field(default=declared.default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of every config class. Values are converted and checked whenever one is made.

    Raises:
        ConfigError: A value has the wrong type or is out of range; the message names the option,
            the value and what was expected.
    """

    def __post_init__(self) -> None:
        given = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        for name, value in _check_values(type(self), given, _Origin("python")).items():
            object.__setattr__(self, name, value)


Config = TypeVar("Config", bound=Options)
# Made once per config class.
_declared: dict[Any, dict[str, Option]] = {}
_validators: dict[Any, type[BaseModel]] = {}


def declared_options(config_class: type[Options]) -> dict[str, Option]:
    """The options of a config class by name, in the order of `GROUPS`."""
    if config_class in _declared:
        return _declared[config_class]
    hints = typing.get_type_hints(config_class)
    found = []
    for entry in dataclasses.fields(config_class):
        kind, choices = _kind(hints[entry.name])
        declared = entry.metadata["option"]
        if declared.name not in ("", entry.name):  # the other option's aliases are not its own
            declared = dataclasses.replace(declared, aliases=())
        found.append(dataclasses.replace(declared, name=entry.name, kind=kind, choices=choices))
    found.sort(key=lambda declared: GROUPS.index(declared.group))
    _declared[config_class] = {declared.name: declared for declared in found}
    return _declared[config_class]


def without_aliases(
    config_class: type[Options], given: Mapping[str, Any], origin: _Origin | None = None
) -> dict[str, Any]:
    """`given` with the names under which options are declared, in place of their aliases.

    Raises:
        ConfigError: An option is given under two names.
    """
    names = {
        alias: name
        for name, declared in declared_options(config_class).items()
        for alias in declared.aliases
    }
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = names.get(key, key)
        if name in found:
            prefix = ""
            spell: Callable[[str], str] = str
            if origin is not None:
                prefix = origin.prefix(key)
                spell = flag_of if origin.source == "command line" else str
            also = key if key != name else next(k for k in given if names.get(k) == name)
            raise ConfigError(
                f"{prefix}{spell(name)} and {spell(also)} are the same option; give one"
            )
        found[name] = value
    return found


def _kind(hint: Any) -> tuple[type, tuple[str, ...]]:
    """The plain type of an annotation, and the choices of a Literal."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (one for one in typing.get_args(hint) if one is not type(None))
    if typing.get_origin(hint) is Literal:
        return str, typing.get_args(hint)
    return typing.get_origin(hint) or hint, ()


def flag_of(name: str) -> str:
    """The command-line spelling of an option: --batch-size, -n."""
    return "-" * min(len(name), 2) + name.replace("_", "-")


def make_config(
    config_class: type[Config],
    keywords: Mapping[str, Any],
    file: Path | None = None,
    source: Source = "python",
) -> Config:
    """Make a checked config. `keywords` take precedence over the YAML file, that over the defaults.

    Args:
        config_class: The command's config class.
        keywords: The options that were given, by name.
        file: A YAML file with options.
        source: Where `keywords` come from: messages have `beta=-1` for a Python caller, and
            `--beta -1` on the command line.

    Raises:
        ConfigError: An option is unknown, has the wrong type or is out of range, or two options
            exclude each other; one line that names it.
    """
    keywords = without_aliases(config_class, keywords, _Origin(source))
    values = {} if file is None else read_yaml(file, config_class)
    values.update(_check_values(config_class, keywords, _Origin(source)))
    for name, declared in declared_options(config_class).items():
        if declared.required and values.get(name) is None:
            raise ConfigError(f"{spell_option(name, source)} is missing")
    for one, other in EXCLUSIVE:
        # The caller's choice between the two replaces the file's.
        if one in keywords and other not in keywords:
            values.pop(other, None)
        if other in keywords and one not in keywords:
            values.pop(one, None)
        if values.get(one) is not None and values.get(other) is not None:
            pair = f"{spell_option(one, source)} and {spell_option(other, source)}"
            raise ConfigError(f"{pair} exclude each other; give one")
    return config_class(**values)


def spell_option(name: str, source: Source) -> str:
    """An option's name as the user writes it: --batch-size or batch_size."""
    return flag_of(name) if source == "command line" else name


def require(config: Options, *names: str, source: Source = "command line") -> None:
    """Check that the options `names` were given.

    Raises:
        ConfigError: One is None.
    """
    for name in names:
        if getattr(config, name) is None:
            expected = {"model": "a model folder or a hub name", "adapter_path": "a run folder"}
            hint = expected.get(name, "a folder, a file or a hub name")
            raise ConfigError(f"{spell_option(name, source)} is missing; give {hint}")


def fixed_options(config: Options) -> dict[str, Any]:
    """The options that determine what is trained; a resumed run can't change them."""
    declared = declared_options(type(config))
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)  # in the order of declaration
        if not declared[field.name].change_on_resume
    }


def read_yaml(file: Path, config_class: type[Options], *, of_run: bool = False) -> dict[str, Any]:
    """Read and check the options in a YAML file.

    Args:
        file: The file.
        config_class: The class of the options.
        of_run: Whether the file is the config.yaml of a run. It may have removed options, if they
            were at their defaults.

    Raises:
        ConfigError: It can't be read or parsed, or has a wrong key or value.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        lines = _key_lines(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{file}: can't be read ({reason})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0][:120]
        raise ConfigError(f"{file}{line}: not YAML ({problem})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{file}: expected lines of `option: value`, found {type(content).__name__}"
        )
    given = {_format_value(key, str).replace("-", "_"): value for key, value in content.items()}
    given = without_aliases(config_class, given, _Origin("file", file, lines))
    lines = without_aliases(config_class, lines)
    if of_run:
        given = {
            name: value
            for name, value in given.items()
            if name not in REMOVED_OPTIONS or value != REMOVED_OPTIONS[name].default
        }
    return _check_values(config_class, given, _Origin("file", file, lines))


def _key_lines(text: str) -> dict[str, int]:
    """The line of each top-level key, from 1."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {
        str(key.value).replace("-", "_"): key.start_mark.line + 1
        for key, _ in node.value
        if isinstance(key, yaml.ScalarNode)
    }


def to_yaml(config: Options, *, with_unset: bool = False) -> str:
    """The config as a YAML file that `-c` takes.

    Args:
        config: The options.
        with_unset: Whether options that are off are written too, as null; not those that another
            option replaces, as iters does epochs.
    """
    given = dataclasses.asdict(config)
    replaced = {
        name
        for pair in EXCLUSIVE
        for name, other in (pair, pair[::-1])
        if given.get(name) is None and given.get(other) is not None
    }
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in given.items()
        if (with_unset and name not in replaced) or (value is not None and value != {})
    }
    return yaml.safe_dump(values, sort_keys=False)


@dataclass(frozen=True, slots=True)
class _Origin:
    """The source of values, for messages."""

    source: Source | Literal["file"]
    file: Path | None = None
    lines: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def prefix(self, name: str) -> str:
        if self.source != "file":
            return ""
        line = self.lines.get(name)
        return f"{self.file}: " if line is None else f"{self.file}:{line}: "

    def option(self, name: str, value: Any) -> str:
        """The option with its value, as the user wrote it."""
        if self.source == "command line":
            return f"{flag_of(name)} {_format_value(value, str)}"
        if self.source == "file":
            return f"{self.prefix(name)}{name}: {_format_value(value, str)}"
        return f"{name}={_format_value(value)}"


def _check_values(
    config_class: type[Options], given: Mapping[str, Any], origin: _Origin
) -> dict[str, Any]:
    """Check the values of `given` and convert them to their types; other options are not added."""
    from pydantic import ValidationError

    declared = declared_options(config_class)
    for name in given:
        if name not in declared:
            show = flag_of if origin.source == "command line" else str
            if name in REMOVED_OPTIONS:
                removed = REMOVED_OPTIONS[name]
                raise ConfigError(
                    f"{origin.prefix(name)}{show(name)} was removed in mlx-align "
                    f"{removed.version}; {removed.instead}"
                )
            advice = advice_on(name, declared, flags=origin.source == "command line")
            names = {alias: one.name for one in declared.values() for alias in one.aliases}
            names |= {one: one for one in declared}
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {show(names[close[0]])}?" if close else ""
            if advice is not None:
                hint = f"; {advice}"
            raise ConfigError(f"{origin.prefix(name)}unknown option {show(name)}{hint}")
    try:
        checked = _validator(config_class).model_validate(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        problem = _describe_problem(declared[name], first)
        raise ConfigError(f"{origin.option(name, given[name])}: {problem}") from None
    return {name: getattr(checked, name) for name in given}


def _validator(config_class: type[Options]) -> type[BaseModel]:
    """The pydantic model that checks a config's values, made at its first use.

    Importing pydantic and making the models takes 0.2 s, which --help should not wait for.
    """
    from pydantic import ConfigDict, Field, ValidationInfo, create_model, field_validator

    if config_class in _validators:
        return _validators[config_class]
    declared = declared_options(config_class)
    hints = typing.get_type_hints(config_class)

    def convert(value: Any, info: ValidationInfo) -> Any:
        return _convert(value, declared[str(info.field_name)])

    fields: dict[str, Any] = {
        name: (
            hints[name],
            Field(None, ge=one.at_least, le=one.at_most, gt=one.above, lt=one.below),
        )
        for name, one in declared.items()
    }
    _validators[config_class] = create_model(
        config_class.__name__,
        __config__=ConfigDict(extra="forbid", allow_inf_nan=False),
        __validators__={"convert": field_validator("*", mode="before")(convert)},
        **fields,
    )
    return _validators[config_class]


def _convert(value: Any, declared: Option) -> Any:
    """Convert a value before pydantic checks it.

    Refuses conversions that pydantic would make (True to 1) and adds others (1e3 in YAML, "a,b").
    """
    if value is None:
        return None
    if declared.kind is bool and not isinstance(value, bool):
        raise ValueError("expected true or false")
    if declared.kind in (int, float):
        return _parse_number(value, declared.kind)
    if declared.kind is str:
        if value == "":
            raise ValueError("expected text")
        return os.fspath(value) if isinstance(value, os.PathLike) else value
    if declared.kind is tuple:
        return _parse_names(value, multiple=declared.multiple)
    if declared.kind is dict:
        return _parse_mapping(value)
    return value


def _describe_problem(declared: Option, error: Any) -> str:
    kind = error["type"]
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "literal_error":
        if declared.name == "loss" and (command := LOSS_COMMANDS.get(str(error["input"]))):
            return f"is a loss of another command; use {command}"
        close = difflib.get_close_matches(_format_value(error["input"], str), declared.choices, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"unknown; {hint}choose from {', '.join(declared.choices)}"
    if kind.startswith(("greater_than", "less_than")):
        return f"out of range; must be {declared.range}"
    return f"expected {_EXPECTED[declared.kind]}"


_EXPECTED: dict[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list of names",
    dict: "a list of name: value",
}


def _format_value(value: Any, to_text: Callable[[Any], str] = repr) -> str:
    """The value for a message: short, and without the contents of a list or mapping.

    A few lines of YAML can expand to more items than fit in memory.
    """
    if isinstance(value, list | tuple | dict):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    try:
        text = to_text(value)
    except ValueError:  # an integer with more digits than Python converts
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:79] + "…"


def _parse_number(value: Any, kind: type) -> int | float:
    """`value` as an int or float. Accepts text that spells a number: YAML reads 1e-5 as text."""
    wrong = ValueError(f"expected {_EXPECTED[kind]}")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if not number - number == 0:  # inf or nan
        raise wrong
    if kind is float:
        return number
    if number != int(number):
        raise wrong
    whole = value if isinstance(value, int) else int(number)
    if abs(whole) > MAX_INT:
        raise ValueError(f"out of range; must be at most {MAX_INT}")
    return whole


def _parse_names(value: Any, *, multiple: bool) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value] if multiple else value.split(",")
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"expected {_EXPECTED[tuple]}")
    found = tuple(item.strip() for item in value if item.strip())
    if not found:
        raise ValueError("expected at least one name; leave the option out for none")
    return found


def _is_names(value: Any) -> bool:
    """Whether this is a short list of names, such as columns."""
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def _parse_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected {_EXPECTED[dict]}")
    value = {name: ",".join(item) if _is_names(item) else item for name, item in value.items()}
    for name, item in value.items():
        if not isinstance(item, str | int | float):
            raise ValueError(
                f"{_format_value(name, str)}: {_format_value(item)} is not a single value"
            )
    return {str(name): item for name, item in value.items()}


def fingerprint_options(config: Options, hashes: Mapping[str, str]) -> dict[str, str]:
    """What the content of an output depends on, by flag: a hash, or else the option's value.

    Args:
        config: The options of the command.
        hashes: Hashes of the content that options name, by the name of the option.
    """
    return {
        declared.flag: hashes.get(name, repr(getattr(config, name)))
        for name, declared in declared_options(type(config)).items()
        if name not in ("output", "resume", "reward_timeout")
    }
