r"""Final answers: found in what a model wrote, and read as numbers where they are numbers."""

from __future__ import annotations

import re
from fractions import Fraction

_MARK = "####"
_BOXED = "\\boxed"
# Digits beyond these are no answer anybody marks; Python refuses to read thousands of them.
_MAX_DIGITS = 40
# The sign is one where nothing that it could be subtracted from stands before it, and the number
# right behind it.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)}\]])[-−])?\$?(?P<inner>(?<=\$)[-−])?"
    r"(?P<top>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:\s?/\s?(?P<bottom>\d+(?:\.\d+)?))?",
    re.ASCII,
)
_FRACTION = re.compile(
    r"(?P<whole>\d+)?\s?\\[dt]?frac\s?\{\s*(?P<top>\d+)\s*\}\s?\{\s*(?P<bottom>\d+)\s*\}", re.ASCII
)
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3})", re.ASCII)
_WORDS = re.compile(r"\\(?:text|mathrm|mathbf)\s?\{([^{}]*)\}")


def marked_answer(text: str) -> str | None:
    r"""What the last `####` marks up to the line's end, else the last `\boxed{}`; None if neither.

    Behind a sign of equality within it, only what follows the last one.
    """
    _, mark, rest = text.rpartition(_MARK)
    if mark:
        return rest.strip().partition("\n")[0].rpartition("=")[2].strip()
    _, mark, rest = text.rpartition(_BOXED)
    opened = rest.lstrip()
    if not mark or not opened.startswith("{"):
        return None
    depth = 0
    for place, letter in enumerate(opened):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return opened[1:place].rpartition("=")[2].strip()
    return opened[1:].strip()


def numbers(text: str) -> list[Fraction | None]:
    r"""The numbers in a text, in order; None stands for one too long, or divided by zero.

    Commas between thousands, $ and % don't count; 3/4 and \frac{3}{4} are one number.
    """
    return [_value(match) for match in _NUMBER.finditer(_simplified(text))]


def whole_number(text: str) -> Fraction | None:
    """The number that a text is, a trailing dot, $ or % apart; None where it is something else."""
    simple = _simplified(text).strip().rstrip(".$%").strip()
    match = _NUMBER.fullmatch(simple)
    return None if match is None else _value(match)


def plain(text: str) -> str:
    """A text as it is compared: without blanks, case and a trailing dot."""
    return "".join(_WORDS.sub(r"\1", text).split()).casefold().rstrip(".")


def _simplified(text: str) -> str:
    text = _THOUSANDS.sub(",", text.replace("\\$", "$").replace("\\%", "%"))
    return _FRACTION.sub(_one_fraction, text)


def _one_fraction(match: re.Match[str]) -> str:
    whole, top, bottom = (match[key] or "0" for key in ("whole", "top", "bottom"))
    if match["whole"] is None or max(map(len, (whole, top, bottom))) > _MAX_DIGITS:
        return f"{top}/{bottom}"
    return f"{int(whole) * int(bottom) + int(top)}/{bottom}"


def _value(match: re.Match[str]) -> Fraction | None:
    top, bottom = match["top"].replace(",", ""), match["bottom"] or "1"
    if max(len(top), len(bottom)) > _MAX_DIGITS or not Fraction(bottom):
        return None
    value = Fraction(top) / Fraction(bottom)
    return -value if match["sign"] or match["inner"] else value
