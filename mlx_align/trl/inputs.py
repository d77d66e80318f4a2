"""Arguments of TRL's trainers: models, datasets and reward functions."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_align.errors import ConfigError
from mlx_align.trl.callbacks import TrainerState


def model_and_adapter(owner: str, model: Any) -> tuple[str, str | None]:
    """The base model, and the adapter to start from if a run folder was given.

    Args:
        owner: Name of the trainer, for messages.
        model: A path, a hub name, or a loaded transformers model.

    Raises:
        ConfigError: It has no name by which it can be opened.
    """
    name = model_name(owner, model)
    folder = Path(name).expanduser()
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter or (folder / "config.json").is_file():
        return name, None
    return _base_model(folder), name


def _base_model(folder: Path) -> str:
    try:
        content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return str(content["model"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"model: {folder}/adapter_config.json names no base model") from None


def model_name(owner: str, model: Any) -> str:
    """The path or hub name of a model. Arguments and errors as in `model_and_adapter`."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    if hasattr(model, "peft_config"):
        raise ConfigError(
            f"{owner}(model=…): a PeftModel; pass the base model and peft_config, or the run "
            "folder whose adapter to start from"
        )
    config = getattr(model, "config", None)
    name = getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None)
    if not name:
        raise ConfigError(
            f"{owner}(model=…): {type(model).__name__} has no name_or_path; pass the model's "
            "folder or hub name. Weights in memory are not used"
        )
    return str(name)


def check_reference(owner: str, model: Any, ref_model: Any) -> None:
    """Accept the model itself as its reference.

    Raises:
        ConfigError: The reference is another model.
    """
    if ref_model is None:
        return
    if model_name(owner, ref_model) != model_name(owner, model):
        raise ConfigError(
            f"{owner}(ref_model=…): another model than `model`; the reference is the model as it "
            "starts. Leave it out, and pass the model or run folder that training starts from"
        )


def check_dataset(owner: str, name: str, dataset: Any) -> None:
    """Accept one dataset: a `datasets.Dataset` or a list of dicts.

    Raises:
        ConfigError: The argument `name` is something else.
    """
    if isinstance(dataset, Mapping) and not hasattr(dataset, "column_names"):
        raise ConfigError(f"{owner}({name}=…): a dict; give one dataset")
    if isinstance(dataset, Mapping):
        raise ConfigError(f"{owner}({name}=…): has several splits; give one, as dataset['train']")
    if isinstance(dataset, str | os.PathLike) or not isinstance(dataset, Iterable):
        raise ConfigError(
            f"{owner}({name}=…): {type(dataset).__name__}; expected a datasets.Dataset or a list "
            "of dicts"
        )


def as_text(dataset: Any, field: str, formatting_func: Callable[[Any], str] | None) -> Any:
    """The data with its text in the column `text`."""
    if dataset is None or (formatting_func is None and field == "text"):
        return dataset
    if formatting_func is not None:
        return [{"text": formatting_func(row)} for row in dataset]
    if not any(field in row for row in list(dataset)[:1]):
        return dataset
    return [{**row, "text": row[field]} for row in dataset]


def with_messages(function: Callable[..., Any], state: TrainerState) -> Callable[..., Any]:
    """A reward function with TRL's arguments: completions are messages if prompts are."""
    name = getattr(function, "__name__", type(function).__name__)
    accepted = inspect.signature(function).parameters
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in accepted.values())

    def call(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> Any:
        arguments: dict[str, Any] = {
            **columns,
            "prompts": prompts,
            "completions": [
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in zip(prompts, completions, strict=True)
            ],
            "completion_ids": completion_ids,
            "trainer_state": state,
            "log_extra": _log_nothing,
            "log_metric": _log_nothing,
        }
        if not takes_any:
            arguments = {key: value for key, value in arguments.items() if key in accepted}
        return function(**arguments)

    # Metrics and messages call it by its own name; a resumed run compares its source.
    call.__name__ = name
    call.__wrapped__ = function  # type: ignore[attr-defined]
    call.__signature__ = _signature(accepted)  # type: ignore[attr-defined]
    return call


def _log_nothing(name: str, value: Any) -> None:
    """Ignore values logged by reward functions: metrics.jsonl has means, samples.jsonl values."""


def _signature(accepted: Mapping[str, inspect.Parameter]) -> inspect.Signature:
    """The wrapper's signature: the standard arguments, and the columns that it needs."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    always = ("prompts", "completions", "completion_ids")
    passed = (*always, "trainer_state", "log_extra", "log_metric")
    needed = [
        inspect.Parameter(one.name, keyword)
        for one in accepted.values()
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        and one.default is one.empty
        and one.name not in passed
    ]
    return inspect.Signature(
        [
            *(inspect.Parameter(name, keyword) for name in always),
            *needed,
            inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD),
        ]
    )
