"""Signatures, docstrings and keyword types of the Python functions, made from the schema.

dpo.__signature__ = signature_of(DPOConfig, returns="Run")
dpo.__doc__ = document(DPOConfig, "Train a model on preference pairs.")
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence

from mlx_align.config.schema import GROUPS, Option, Options, declared_options

_NAMES: dict[type, str] = {
    int: "int",
    float: "float",
    str: "str",
    bool: "bool",
    tuple: "str | Sequence[str]",
    dict: "Mapping[str, float | str]",
}


class _Annotation(str):
    """An annotation that `help()` shows without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def annotation_of(declared: Option) -> str:
    """The type annotation of an option for Python callers, as source text."""
    if declared.python_type is not None:
        text = declared.python_type
    elif declared.choices:
        text = f"Literal[{', '.join(repr(choice) for choice in declared.choices)}]"
    else:
        text = _NAMES[declared.kind]
    return f"{text} | None" if declared.default is None else text


def signature_of(
    config_class: type[Options],
    *,
    extra: Sequence[inspect.Parameter] = (),
    leave_out: Sequence[str] = (),
    returns: str = "None",
) -> inspect.Signature:
    """The signature of a function that takes a config's options as keywords.

    Args:
        config_class: The class that declares the options.
        extra: Further parameters of the function. Positional ones come first, keyword-only ones
            last.
        leave_out: Options that the function doesn't take, or that `extra` replaces.
        returns: The return annotation, as source text.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [
        inspect.Parameter(
            declared.name,
            keyword,
            default=inspect.Parameter.empty if declared.required else declared.default,
            annotation=_Annotation(annotation_of(declared)),
        )
        for declared in declared_options(config_class).values()
        if declared.name not in leave_out
    ]
    first = [parameter for parameter in extra if parameter.kind is not keyword]
    last = [parameter for parameter in extra if parameter.kind is keyword]
    return inspect.Signature([*first, *own, *last], return_annotation=_Annotation(returns))


def document(
    config_class: type[Options],
    summary: str,
    *,
    extra: Sequence[tuple[str, str]] = (),
    leave_out: Sequence[str] = (),
    returns: str = "",
    raises: Sequence[tuple[str, str]] = (),
) -> str:
    """A Google-style docstring for a function that takes a config's options as keywords.

    Args:
        config_class: The class that declares the options.
        summary: First line, and further paragraphs.
        extra: (name, description) of further arguments; they come first.
        leave_out: Options that the function doesn't take.
        returns: Description of the return value; no section if empty.
        raises: (exception, description); no section if empty.
    """
    lines = [textwrap.dedent(summary).strip(), ""]
    if extra:
        lines += ["Args:", *(_entry(name, text) for name, text in extra), ""]
    by_group = _by_group(config_class, leave_out)
    for group, options in by_group.items():
        title = f"Args ({group}):" if len(by_group) > 1 or extra else "Args:"
        lines += [title, *(_entry(one.name, describe(one)) for one in options), ""]
    if returns:
        lines += ["Returns:", textwrap.indent(textwrap.fill(returns, 88), "    "), ""]
    if raises:
        lines += ["Raises:", *(_entry(name, text) for name, text in raises), ""]
    return "\n".join(lines).rstrip() + "\n"


def describe(declared: Option) -> str:
    """An option's help with its choices, range and default, for Python: no dashes."""
    text = _python_names(declared.help)
    if declared.choices:
        text += f" One of {', '.join(declared.choices)}."
    if declared.names:
        text += f" Names: {', '.join(declared.names)}."
    if declared.range:
        text += f" Must be {declared.range}."
    if declared.required:
        return f"{text} Required."
    if declared.default_text is not None:
        return f"{text} Default: {_python_names(declared.default_text)}."
    if declared.default is not None and declared.default != {}:
        return f"{text} Default: {declared.default!r}."
    return text


def _by_group(config_class: type[Options], leave_out: Sequence[str]) -> dict[str, list[Option]]:
    options = [o for o in declared_options(config_class).values() if o.name not in leave_out]
    found = {group: [o for o in options if o.group == group] for group in GROUPS}
    return {group: entries for group, entries in found.items() if entries}


def _python_names(text: str) -> str:
    """Option names as Python has them: `--batch-size` becomes `batch_size`."""
    return re.sub(r"--([a-z][a-z-]*)", lambda match: match[1].replace("-", "_"), text)


def _entry(name: str, text: str) -> str:
    return textwrap.fill(
        f"{name}: {text}",
        88,
        initial_indent="    ",
        subsequent_indent="        ",
        break_on_hyphens=False,
        break_long_words=False,
    )
