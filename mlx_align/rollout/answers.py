r"""Final answers: found in what a model wrote, and read as numbers where they are numbers."""

from __future__ import annotations

import re
from collections import deque
from fractions import Fraction

_MARK = "####"
_BOXED = "\\boxed"
# Digits beyond these are no answer anybody marks; Python refuses to read thousands of them.
_MAX_DIGITS = 40
# The sign is one where nothing that it could be subtracted from stands before it, and the number
# right behind it.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)}\]])[-−])?\$?(?P<inner>(?<=\$)[-−])?"
    r"(?P<top>\d{1,3}(?:,\d{3}){1,13}(?!,?\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:\s?/\s?(?P<bottom>\d+(?:\.\d+)?))?",
    re.ASCII,
)
# Bounded: of a model's endless digits, each would else be tried as the first of the number.
_FRACTION = re.compile(
    r"(?P<whole>\d{1,40})?\s?\\[dt]?frac\s?"
    r"\{\s?(?P<top>\d{1,40})\s?\}\s?\{\s?(?P<bottom>\d{1,40})\s?\}",
    re.ASCII,
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


def first_number(text: str) -> Fraction | None:
    r"""The first number in a text; None where there is none, or none that can be read.

    Commas between thousands, $ and % don't count; 3/4 and \frac{3}{4} are one number. What divides
    by zero and what has more digits than an answer has can't be read.
    """
    match = _NUMBER.search(_simplified(text))
    return None if match is None else _value(match)


def last_number(text: str) -> Fraction | None:
    """The last number in a text, as `first_number` reads it."""
    last = deque(_NUMBER.finditer(_simplified(text)), maxlen=1)
    return _value(last[0]) if last else None


def whole_number(text: str) -> Fraction | None:
    """The number that a text is, a trailing dot, $ or % apart; None where it is something else."""
    simple = _simplified(text).strip().rstrip(".$%").strip()
    match = _NUMBER.fullmatch(simple)
    return None if match is None else _value(match)


def plain(text: str) -> str:
    """A text as it is compared: without blanks, case and a trailing dot."""
    return "".join(_WORDS.sub(r"\1", text).split()).casefold().rstrip(".")


def _simplified(text: str) -> str:
    if "\\" not in text and "{" not in text:  # most texts
        return text
    text = _THOUSANDS.sub(",", text.replace("\\$", "$").replace("\\%", "%"))
    return _FRACTION.sub(_one_fraction, text)


def _one_fraction(match: re.Match[str]) -> str:
    whole, top, bottom = match["whole"], match["top"], match["bottom"]
    if whole is None:
        return f"{top}/{bottom}"
    return f"{int(whole) * int(bottom) + int(top)}/{bottom}"


def _value(match: re.Match[str]) -> Fraction | None:
    top, bottom = match["top"].replace(",", ""), match["bottom"] or "1"
    if max(len(top), len(bottom)) > _MAX_DIGITS or not Fraction(bottom):
        return None
    value = Fraction(top) / Fraction(bottom)
    return -value if match["sign"] or match["inner"] else value
