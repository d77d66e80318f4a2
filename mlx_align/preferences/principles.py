"""A constitution: principles in a YAML file, each with how to criticise, revise and compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlx_align.errors import ConfigError
from mlx_align.system.starter import shipped_file

DEFAULT_FILE = "constitution.yaml"
_KEYS = ("name", "principle", "critique", "revision", "comparison")


@dataclass(frozen=True, slots=True)
class Principle:
    """One principle.

    Attributes:
        name: Its name in files.
        critique: The request for a critique of an answer.
        revision: The request for a better answer, after the critique.
        comparison: What to compare two answers by.
    """

    name: str
    critique: str
    revision: str
    comparison: str


def read_constitution(file: str | Path | None) -> tuple[Principle, ...]:
    """The principles of a file; of the one that comes with the package if `file` is None.

    Raises:
        ConfigError: The file can't be read, or a principle is incomplete; the message says which.
    """
    path = shipped_file(DEFAULT_FILE) if file is None else Path(file).expanduser()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"--constitution {path}: can't be read ({reason})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"--constitution {path}{line}: not YAML") from error
    entries = content.get("principles") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise ConfigError(
            f"--constitution {path}: expected `principles:` with a list of sentences or mappings"
        )
    found = [_principle(f"{path}, principle {k}", k, one) for k, one in enumerate(entries, 1)]
    names = [principle.name for principle in found]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(f"--constitution {path}: two principles are named {repeated!r}")
    return tuple(found)


def _principle(where: str, number: int, entry: Any) -> Principle:
    if isinstance(entry, str) and entry.strip():
        entry = {"principle": entry}
    if not isinstance(entry, dict):
        raise ConfigError(f"--constitution {where}: expected a sentence or a mapping")
    unknown = next((key for key in entry if key not in _KEYS), None)
    if unknown is not None:
        raise ConfigError(
            f"--constitution {where}: unknown key {unknown!r}; expected {', '.join(_KEYS)}"
        )
    texts = {key: " ".join(str(entry[key]).split()) for key in _KEYS if entry.get(key)}
    rule = texts.get("principle")
    if rule is None:
        missing = next((key for key in _KEYS[2:] if key not in texts), None)
        if missing is not None:
            raise ConfigError(
                f"--constitution {where}: has no {missing!r}; add it, or a `principle`, from which "
                "it is made"
            )
    return Principle(
        texts.get("name", f"principle {number}"),
        texts.get(
            "critique",
            f"Say where your last answer falls short of this principle, and why: {rule}",
        ),
        texts.get("revision", f"Rewrite your answer so that it follows the principle: {rule}"),
        texts.get("comparison", str(rule)),
    )
