"""JSON that every program can read: null instead of NaN, no control characters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

# json.dumps escapes C0 only. These would reach a terminal, or split a line; half of a surrogate
# pair can't be written in UTF-8.
_CONTROLS = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def finite(value: Any) -> Any:
    """The value with None for NaN and infinity, which JSON doesn't have."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(value: Any, *, indent: int | None = None, ascii: bool = True) -> str:
    r"""A value as JSON; NaN and infinity become null.

    Args:
        value: JSON-serialisable.
        indent: Spaces of indentation; None for one line.
        ascii: Whether other characters are written as `\uXXXX`. Control characters always are.
    """
    text = json.dumps(finite(value), indent=indent, ensure_ascii=ascii, allow_nan=False)
    return text if ascii else _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
