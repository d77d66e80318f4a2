r"""The built-in rewards, and the extraction and comparison of final answers.

Each function takes the options of `--reward "length(target=200)"` and returns a reward: a pure
function of one completion's text, its facts and the other columns of its row. None means that a
completion has no reward. Those with a pattern run in
the process of the reward functions, under its timeout; the others take linear time.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mlx_align.errors import ConfigError

# Reasoning, then an answer: the template of DeepSeek-R1-Zero (DeepSeek-AI 2025, table 1).
THINK_ANSWER = r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*"
# DAPO's buffer: 4,096 of 20,480 tokens.
_BUFFER_FRACTION = 0.2

_MARK = "####"
_BOXED = "\\boxed"
# No real answer has more digits, and Python refuses to parse thousands of them.
_MAX_DIGITS = 40
# A minus is a sign if the number follows directly and nothing precedes it from which the number
# could be subtracted.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)}\]])[-−])?\$?(?P<inner>(?<=\$)[-−])?"
    r"(?P<top>\d{1,3}(?:,\d{3}){1,13}(?!,?\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:[eE](?P<power>[-+−]?\d{1,3})(?!\w|\.\d))?"
    r"(?:\s?/\s?(?P<bottom>\d+(?:\.\d+)?))?",
    re.ASCII,
)
# Bounded, because in a long run of digits each would be tried as the first one: quadratic time.
_FRACTION = re.compile(
    r"(?P<whole>\d{1,40})?\s?\\[dt]?frac\s?"
    r"\{\s?(?P<top>\d{1,40})\s?\}\s?\{\s?(?P<bottom>\d{1,40})\s?\}",
    re.ASCII,
)
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3})", re.ASCII)
_WORDS = re.compile(r"\\(?:text|mathrm|mathbf)\s?\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class CompletionFacts:
    """Facts about a completion that are not in its text.

    Attributes:
        tokens: Tokens sampled, end token included.
        finished: Whether the end token was sampled; False if the completion was truncated.
        max_tokens: The longest completion allowed.
        token_ids: The tokens sampled, end token included.
        opened: `<think>` if the prompt ends with it, so that the completion doesn't; else "".
    """

    tokens: int
    finished: bool
    max_tokens: int
    token_ids: tuple[int, ...] = ()
    opened: str = ""


Columns = Mapping[str, Any]
Reward = Callable[[str, CompletionFacts, Columns], float | None]


def exact_answer(*, column: str = "answer") -> Reward:
    r"""1 for the right final answer, 0 for a wrong one or none; None without a gold answer.

    A completion's final answer is the text after its last `####`, else the content of its last
    `\boxed{}`, else its last number. The gold answer is the column `column`, or the answer marked
    in it. Numbers are compared as numbers: 1,200 equals $1200.00 and 1.2e3, and 0.5 equals 1/2; %
    is ignored. A gold answer that is not a number is compared as text, ignoring whitespace and
    case, with the marked answer or, without one, with the whole completion.

    Source: GSM8K (Cobbe et al. 2021), whose solutions end with `#### 72`.
    """
    _check(isinstance(column, str), "column: expected a name")

    def reward(text: str, facts: CompletionFacts, columns: Columns) -> float | None:
        gold = columns.get(column)
        if gold is None or gold == "":
            return None
        if not isinstance(gold, str | int | float):
            kind = type(gold).__name__
            raise ConfigError(
                f"column {column!r} has a value of type {kind}; expected text or a number"
            )
        marked = marked_answer(text)
        expected = _gold(gold)
        if isinstance(expected, str):
            return float(normalize(text if marked is None else marked) == expected)
        found = last_number(text) if marked is None else first_number(marked)
        return float(found is not None and found == expected)

    return reward


def _gold(gold: str | int | float) -> Fraction | str:
    if isinstance(gold, int | float) and not isinstance(gold, bool):
        return Fraction(str(gold))
    marked = marked_answer(str(gold))
    text = str(gold) if marked is None else marked
    number = parse_number(text)
    return normalize(text) if number is None else number


def format(*, pattern: str = THINK_ANSWER) -> Reward:
    r"""1 if the whole completion matches a regular expression, else 0; `.` matches newlines.

    The default pattern is `<think>…</think>` followed by `<answer>…</answer>`, once each, and
    nothing else. If the prompt ends with `<think>` (some chat templates write it), it counts as
    part of the completion.
    """
    compiled = _compile(pattern, re.DOTALL)
    return lambda text, facts, columns: float(compiled.fullmatch(facts.opened + text) is not None)


def regex(*, pattern: str) -> Reward:
    """1 if the completion contains a match of a regular expression, else 0."""
    compiled = _compile(pattern)
    return lambda text, facts, columns: float(compiled.search(text) is not None)


def length(*, target: float | None = None, unit: str = "tokens") -> Reward:
    """Closeness of the length n to a target, in tokens or words: max(0, 1 − |n − target|/target).

    Without a target, shorter is better: 1 − n / (the longest completion allowed).
    """
    _check(unit in ("tokens", "words"), f"unit {unit!r}: expected 'tokens' or 'words'")
    _check(target is None or (_is_number(target) and target > 0), "target: expected more than 0")
    _check(target is not None or unit == "tokens", "unit 'words' needs a target")

    def reward(text: str, facts: CompletionFacts, columns: Columns) -> float:
        count = facts.tokens if unit == "tokens" else len(text.split())
        if target is None:
            return max(0.0, 1 - count / facts.max_tokens)
        return max(0.0, 1 - abs(count - target) / target)

    return reward


def repetition(*, n: int = 4) -> Reward:
    """A penalty of 0 to −1: minus the fraction of word n-grams that repeat an earlier one.

    −(1 − distinct / all), ignoring case; 0 for fewer than n words.

    Source: the repetition penalty of Yeo et al. 2025, "Demystifying Long Chain-of-Thought
    Reasoning in LLMs", as a fraction of all n-grams.
    """
    _check(isinstance(n, int) and n >= 1, "n: expected a whole number of at least 1")

    def reward(text: str, facts: CompletionFacts, columns: Columns) -> float:
        words = text.lower().split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0

    return reward


def overlong(*, max_tokens: int | None = None, buffer: int | None = None) -> Reward:
    """DAPO's soft penalty of over-long completions: 0 to −1, for n tokens.

    0 up to max_tokens − buffer, then (max_tokens − buffer − n) / buffer, −1 above max_tokens.

    Args:
        max_tokens: Tokens; by default, the longest completion allowed.
        buffer: Tokens; by default a fifth of max_tokens, as in the paper.

    Source: Yu et al. 2025, "DAPO", equation 13.
    """
    for name, value in (("max_tokens", max_tokens), ("buffer", buffer)):
        valid = value is None or (isinstance(value, int) and value >= 1)
        _check(valid, f"{name}: expected a whole number of at least 1")
    _check(
        max_tokens is None or buffer is None or buffer <= max_tokens,
        "buffer: expected at most max_tokens",
    )

    def reward(text: str, facts: CompletionFacts, columns: Columns) -> float:
        limit = max_tokens or facts.max_tokens
        width = min(buffer, limit) if buffer else max(1, round(_BUFFER_FRACTION * limit))
        return min(0.0, max(-1.0, (limit - width - facts.tokens) / width))

    return reward


BUILTIN_REWARDS: Mapping[str, Callable[..., Reward]] = {
    maker.__name__: maker for maker in (exact_answer, format, regex, length, repetition, overlong)
}


def _check(valid: bool, message: str) -> None:
    if not valid:
        raise ConfigError(message)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _compile(pattern: str, flags: int = 0) -> re.Pattern[str]:
    _check(isinstance(pattern, str), "pattern: expected text")
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ConfigError(f"pattern: not a regular expression ({error})") from None


# --- final answers ---


def marked_answer(text: str) -> str | None:
    r"""The text after the last `####` on its line, else in the last `\boxed{}`; None if neither.

    If it contains equals signs, only the part after the last one.
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
    r"""The first number in a text; None without one, or if it can't be read.

    Thousands separators, $ and % are ignored; 3/4 and \frac{3}{4} are one number. Divisions by
    zero and numbers of more than 40 digits can't be read.
    """
    match = _NUMBER.search(_simplified(text))
    return None if match is None else _value(match)


def last_number(text: str) -> Fraction | None:
    """The last number in a text, as `first_number` reads it."""
    last = deque(_NUMBER.finditer(_simplified(text)), maxlen=1)
    return _value(last[0]) if last else None


def parse_number(text: str) -> Fraction | None:
    """The text as a number, ignoring a trailing dot, $ or %; None if it is not a number."""
    simple = _simplified(text).strip().rstrip(".$%").strip()
    match = _NUMBER.fullmatch(simple)
    return None if match is None else _value(match)


def normalize(text: str) -> str:
    """A text for comparison: without whitespace, case and trailing dots."""
    return "".join(_WORDS.sub(r"\1", text).split()).casefold().rstrip(".")


def _simplified(text: str) -> str:
    if "\\" not in text and "{" not in text:  # most texts
        return text
    text = _THOUSANDS.sub(",", text.replace("\\$", "$").replace("\\%", "%"))
    return _FRACTION.sub(_rewrite_fraction, text)


def _rewrite_fraction(match: re.Match[str]) -> str:
    whole, top, bottom = match["whole"], match["top"], match["bottom"]
    if whole is None:
        return f"{top}/{bottom}"
    return f"{int(whole) * int(bottom) + int(top)}/{bottom}"


def _value(match: re.Match[str]) -> Fraction | None:
    top, bottom = match["top"].replace(",", ""), match["bottom"] or "1"
    if max(len(top), len(bottom)) > _MAX_DIGITS or not Fraction(bottom):
        return None
    value = Fraction(top) / Fraction(bottom)
    power = int((match["power"] or "0").replace("−", "-"))
    if abs(power) > _MAX_DIGITS:
        return None
    value *= Fraction(10) ** power
    return -value if match["sign"] or match["inner"] else value
