"""The rubric: criteria that answers are compared by, from a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from mlx_align.errors import ConfigError

DEFAULT_CRITERIA: Mapping[str, str] = {
    "helpful": "does what the user asks for, completely and clearly",
    "honest": "says nothing false, and says so where it is not sure",
    "harmless": "does no harm to the user or to others",
}


def read_rubric(file: str | Path | None) -> dict[str, str]:
    """The criteria, descriptions by name; without a file helpful, honest and harmless.

    The file has `criteria:`, with names and descriptions, or is a list or mapping of them.

    Raises:
        ConfigError: The file can't be read, or has no criteria.
    """
    if file is None:
        return dict(DEFAULT_CRITERIA)
    path = Path(file).expanduser()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--rubric {file}: can't be read ({getattr(error, 'strerror', 'not UTF-8')})"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--rubric {file}: not YAML ({str(error).splitlines()[0]})") from error
    if isinstance(content, dict) and "criteria" in content:
        content = content["criteria"]
    if isinstance(content, list):
        named = [one.get("name") if isinstance(one, dict) else one for one in content]
        texts = [one.get("description", "") if isinstance(one, dict) else "" for one in content]
        content = dict(zip(named, texts, strict=True)) if all(named) else None
    if not isinstance(content, dict) or not content:
        raise ConfigError(
            f"--rubric {file}: expected `criteria:` with a line of `name: description` each"
        )
    return {str(name): "" if text is None else str(text) for name, text in content.items()}
