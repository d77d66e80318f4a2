"""Declare and check TRL's arguments: each is used, ignored with a reason, or fixed."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from typing import Any, ClassVar, Literal, TypeVar, cast, dataclass_transform

from mlx_align.errors import ConfigError

# Arguments that earlier versions of TRL and transformers had.
_REMOVED = {
    "max_prompt_length": "prompts are not truncated; leave it out",
    "max_target_length": "use max_length",
    "reference_free": 'use mlx_align.dpo(loss="simpo") or another loss without a reference',
    "model_adapter_name": "pass init_adapter to mlx_align.dpo",
    "ref_adapter_name": "pass init_adapter to mlx_align.dpo",
    "force_use_ref_model": "the reference is the model as it starts; leave it out",
    "overwrite_output_dir": "a run folder is never overwritten; name a new output_dir",
    "evaluation_strategy": "it is called eval_strategy",
    "no_cuda": "leave it out",
    "group_by_length": "batches are formed by length already; leave it out",
    "rpo_alpha": 'use loss_type=["sigmoid", "sft"] with loss_weights=[1.0, rpo_alpha]',
    "generate_during_eval": "samples.jsonl and the run page have samples; leave it out",
    "max_seq_length": "it is called max_length",
    "use_logits_to_keep": "leave it out",
    "tokenizer": "it is called processing_class, an argument of the trainer",
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """The treatment of an argument.

    Attributes:
        kind: used (it has an effect), ignored (any value is accepted, without effect), or fixed
            (only some values are accepted).
        text: Its effect; the reason why it has none; or what to do instead of another value.
        accepted: Accepted values of a fixed argument, in addition to its default.
    """

    kind: Literal["used", "ignored", "fixed"]
    text: str
    accepted: tuple[Any, ...] = ()


def used(text: str, *, default: Any) -> Any:
    """Declare an argument that is used."""
    return _field(default, Rule("used", text))


def ignored(text: str, *, default: Any) -> Any:
    """Declare an argument that has no effect."""
    return _field(default, Rule("ignored", text))


def fixed(text: str, *, default: Any, accepted: tuple[Any, ...] = ()) -> Any:
    """Declare an argument that accepts only its default and the values `accepted`."""
    return _field(default, Rule("fixed", text, accepted))


def _field(default: Any, rule: Rule) -> Any:
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata={"rule": rule})
    return dataclasses.field(default=default, metadata={"rule": rule})


Class = TypeVar("Class", bound="type[Arguments]")


@dataclass_transform(field_specifiers=(used, ignored, fixed))
def arguments(cls: Class) -> Class:
    """A dataclass of arguments; unknown ones raise a `ConfigError` that suggests another name."""
    made = dataclasses.dataclass(cls)
    init = made.__init__
    known = [field.name for field in dataclasses.fields(made)]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        for name in given:
            if name not in known:
                raise ConfigError(f"{cls.__name__}({name}=…): {_unknown(name, known)}")
        init(self, *args, **given)

    setattr(made, "__init__", checked)  # noqa: B010 - mypy refuses the assignment
    return cast(Class, made)


def _unknown(name: str, known: list[str]) -> str:
    if name in _REMOVED:
        return f"not an argument; {_REMOVED[name]}"
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown argument; did you mean {close[0]}?" if close else "unknown argument"


class Arguments:
    """Base of the config classes. Fixed arguments are checked when one is made.

    Raises:
        ConfigError: An argument is unknown, or has a value that is not possible here.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            rule: Rule = field.metadata["rule"]
            value = getattr(self, field.name)
            if rule.kind != "fixed" or _is_one_of(value, (_default(field), *rule.accepted)):
                continue
            raise ConfigError(f"{type(self).__name__}({field.name}={value!r}): {rule.text}")

    def to_dict(self) -> dict[str, Any]:
        """All arguments by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def rules(cls: type[Arguments]) -> dict[str, tuple[Any, Rule]]:
    """The default and the rule of every argument of a config class."""
    return {
        field.name: (_default(field), field.metadata["rule"]) for field in dataclasses.fields(cls)
    }


def refuse(owner: str, name: str, value: Any, instead: str) -> None:
    """Refuse an argument of a trainer that has no meaning here.

    Raises:
        ConfigError: It was given.
    """
    if value is not None:
        raise ConfigError(f"{owner}({name}=…): {instead}")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING
    return field.default_factory()


def _is_one_of(value: Any, accepted: tuple[Any, ...]) -> bool:
    kinds = isinstance(value, bool)
    return any(isinstance(one, bool) == kinds and value == one for one in accepted)
