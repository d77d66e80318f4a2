"""Problems in the text of a dataset, for `mlx-align data check`.

Duplicates that differ in a few words, prompts that valid shares with train almost word for word,
conflicting labels, HTML and template tokens in the text, outliers of language and length, and how
far two rules without understanding explain the labels: "pick the longer", "pick the more
formatted".
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_align.data.messages import plain_text
from mlx_align.types import PromptGroup, Text

# Texts are near duplicates if this share of their three-word sequences is the same (Jaccard).
NEAR_DUPLICATE = 0.8
# A completion is an outlier if it has this many times the median's characters, or a fraction.
LENGTH_FACTOR = 20
# A language is an outlier if fewer rows have it than this share.
RARE_LANGUAGE = 0.05
# A rule that is right in more of the pairs than this deserves a warning.
_TELLING = 0.6

_WORDS = 3
_BANDS, _ROWS_PER_BAND = 12, 5  # finds 99% of the pairs with Jaccard 0.8, 3% of those with 0.3
_PRIME = (1 << 31) - 1
_SHOWN = 3

_HTML = re.compile(
    r"</?(p|div|span|br|a|li|ul|ol|b|i|strong|em|h[1-6]|table|td|tr|img|pre|code|blockquote)"
    r"(\s[^<>]*)?/?>|&(amp|lt|gt|quot|nbsp|#\d+);",
    re.IGNORECASE,
)
_TEMPLATE_TOKENS = re.compile(
    r"<\|[a-z_]+\|>|<｜[^｜<>]{1,40}｜>|\[/?INST\]|<<SYS>>|</?s>|<(start|end)_of_turn>|<eos>|<bos>"
    r"|^### (Instruction|Response|Human|Assistant):",
    re.MULTILINE,
)
_FORMAT = re.compile(
    r"^#{1,6} |^\s*[-*+] |^\s*\d+[.)] |^```|^\|.*\|\s*$|\*\*[^*\n]+\*\*", re.MULTILINE
)
# Function words; a text is of the language that has most of them.
_FUNCTION_WORDS = {
    "English": "the of and to is that it for with are this you as be on not",
    "German": "der die das und ist nicht ein eine zu den von mit für auf sich auch",
    "French": "le la les des et est une dans que pour qui pas sur avec du ce",
    "Spanish": "el los las y es una que por con para del se como más está en",
    "Italian": "il di che è la per un una sono con non del della gli più anche",
    "Portuguese": "o os as e é uma que por com para do da não em mais como",
    "Dutch": "de het een en van is dat niet op te zijn voor met ook aan er",
}
_LANGUAGE_OF = {language: frozenset(words.split()) for language, words in _FUNCTION_WORDS.items()}


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem of some rows.

    Attributes:
        what: What is wrong.
        count: Number of rows.
        rows: Where the first ones are.
    """

    what: str
    count: int
    rows: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DataQuality:
    """What was found in the text of a dataset.

    Attributes:
        findings: Problems with at least one row.
        pairs: Number of pairs.
        longer_right: Share of pairs whose longer completion, in characters, is chosen; equal
            lengths count half. None without pairs.
        formatted_right: The same for the completion with more Markdown.
        formatted_differs: Share of the pairs whose completions differ in that.
        languages: Share of the rows by language or script of their completions, largest first.
    """

    findings: tuple[Finding, ...]
    pairs: int
    longer_right: float | None
    formatted_right: float | None
    formatted_differs: float | None
    languages: dict[str, float]


def check_quality(
    groups: Sequence[PromptGroup], valid: Sequence[PromptGroup] = (), tokenizer: Any = None
) -> DataQuality:
    """Look for problems in the text of a dataset.

    Args:
        groups: The training split, as read.
        valid: The valid split.
        tokenizer: Its special tokens are looked for in the text.
    """
    prompts = [plain_text(group.prompt) for group in groups]
    completions = [[plain_text(text) for text in group.completions] for group in groups]
    whole = [
        "\n".join([prompt, *texts]) for prompt, texts in zip(prompts, completions, strict=True)
    ]
    tokens = _special_tokens(tokenizer)
    lengths = np.array([len(text) for texts in completions for text in texts] or [0])
    median = max(float(np.median(lengths)), 1.0)
    languages = [language_of("\n".join(texts)) for texts in completions]
    shares = {name: count / len(groups) for name, count in Counter(languages).most_common() if name}
    rare = {name for name, share in shares.items() if share < RARE_LANGUAGE}

    def where(name: str, holds: Callable[[int], bool]) -> Finding:
        return _finding(name, (g.source for i, g in enumerate(groups) if holds(i)))

    repeated = _repeats(whole)
    findings = (
        where("near duplicates of an earlier row", lambda i: repeated[i]),
        _finding(
            "validation rows with a prompt nearly equal to one in train",
            near_overlap(groups, valid),
        ),
        _finding("completions chosen in one row and rejected in another", _conflicts(groups)),
        where("rows with HTML in the text", lambda i: bool(_HTML.search(whole[i]))),
        where(
            "rows with tokens of a chat template in the text",
            lambda i: bool(_TEMPLATE_TOKENS.search(whole[i])) or any(t in whole[i] for t in tokens),
        ),
        where(
            f"rows in a language that under {RARE_LANGUAGE:.0%} have ({', '.join(sorted(rare))})",
            lambda i: languages[i] in rare,
        ),
        where(
            f"rows with a completion {LENGTH_FACTOR} times as long as the median, or as short",
            lambda i: any(
                not median / LENGTH_FACTOR <= len(text) <= median * LENGTH_FACTOR
                for text in completions[i]
            ),
        ),
    )
    pairs = [texts for texts in completions if len(texts) == 2]
    formats = [[len(_FORMAT.findall(text)) for text in pair] for pair in pairs]
    return DataQuality(
        findings=tuple(finding for finding in findings if finding.count),
        pairs=len(pairs),
        longer_right=_picked([[len(text) for text in pair] for pair in pairs]),
        formatted_right=_picked(formats),
        formatted_differs=(
            sum(one != other for one, other in formats) / len(pairs) if pairs else None
        ),
        languages=shares,
    )


def render_quality(quality: DataQuality) -> str:
    """The findings as lines; warnings start with "!"."""
    lines = [
        f"! {one.what}: {one.count:,} ({', '.join(one.rows)}{', …' * (one.count > len(one.rows))})"
        for one in quality.findings
    ]
    if quality.longer_right is not None and quality.formatted_right is not None:
        told = max(quality.longer_right, 1 - quality.longer_right) > _TELLING
        lines.append(
            f"{'! ' * told}picking the longer completion agrees with {quality.longer_right:.0%} of "
            "the labels"
        )
        told = max(quality.formatted_right, 1 - quality.formatted_right) > _TELLING
        lines.append(
            f"{'! ' * told}picking the more formatted one agrees with "
            f"{quality.formatted_right:.0%} ({quality.formatted_differs:.0%} of the pairs differ "
            "in that)"
            if quality.formatted_differs
            else "the two completions of a pair never differ in Markdown"
        )
    if len(quality.languages) > 1:
        shown = ", ".join(f"{name} {share:.0%}" for name, share in quality.languages.items())
        lines.append(f"languages: {shown}")
    return "\n".join(lines)


def language_of(text: str) -> str:
    """The language of a text by its function words, or its script; "" if there is no telling."""
    letters = [c for c in text[:2000] if c.isalpha()]
    if len(letters) < 8:
        return ""
    scripts = Counter(unicodedata.name(c, "?").split(" ", 1)[0].title() for c in letters[:400])
    script, count = scripts.most_common(1)[0]
    if script in ("Cjk", "Hiragana", "Katakana"):
        return "Japanese" if scripts["Hiragana"] + scripts["Katakana"] else "Chinese"
    if script != "Latin":
        return script if 2 * count > min(len(letters), 400) else ""
    words = Counter(re.findall(r"\w+", text[:2000].lower()))
    found = {
        language: sum(words[word] for word in function_words)
        for language, function_words in _LANGUAGE_OF.items()
    }
    best, second = sorted(found.values())[-1:-3:-1]
    return max(found, key=lambda name: found[name]) if best >= 3 and best > second else ""


def _picked(measures: Sequence[Sequence[int]]) -> float | None:
    """How often the first of two has the higher measure; equal ones count half."""
    if not measures:
        return None
    return sum((a > b) + (a == b) / 2 for a, b in measures) / len(measures)


def _finding(what: str, sources: Iterable[str]) -> Finding:
    rows = list(dict.fromkeys(sources))  # a ranked list is several pairs of one row
    return Finding(what, len(rows), tuple(rows[:_SHOWN]))


def _special_tokens(tokenizer: Any) -> list[str]:
    names = getattr(tokenizer, "all_special_tokens", None) or ()
    return [name for name in names if isinstance(name, str) and len(name) > 3]


def _conflicts(groups: Sequence[PromptGroup]) -> list[str]:
    """Rows whose chosen completion another row of the prompt rejects, or labels otherwise."""
    good: dict[tuple[Text, Text], str] = {}
    bad: dict[tuple[Text, Text], str] = {}
    for group in groups:
        if group.label is not None:
            sides = [(good if group.label else bad, group.completions[0])]
        elif len(group.completions) == 2:
            sides = [(good, group.completions[0]), (bad, group.completions[1])]
        else:
            continue
        for side, completion in sides:
            side.setdefault((group.prompt, completion), group.source)
    # The middle of a ranked list is better than one and worse than another.
    return [source for key, source in good.items() if bad.get(key, source) != source]


def near_overlap(groups: Sequence[PromptGroup], valid: Sequence[PromptGroup]) -> list[str]:
    """The sources of validation rows whose prompt is that of a training row, or nearly so."""
    if not valid:
        return []
    texts = [plain_text(group.prompt) for group in (*groups, *valid)]
    repeated = _repeats(texts, until=len(groups))
    return [
        group.source for group, near in zip(valid, repeated[len(groups) :], strict=True) if near
    ]


def _repeats(texts: Sequence[str], until: int | None = None) -> list[bool]:
    """For each text, whether it is nearly equal to an earlier one (of the first `until`).

    Candidates share a band of their MinHash signature (Broder 1997, "On the resemblance and
    containment of documents"); their Jaccard index is then computed.
    """
    random = np.random.default_rng(0)
    count = _BANDS * _ROWS_PER_BAND
    factor = random.integers(1, _PRIME, count, dtype=np.int64)
    offset = random.integers(0, _PRIME, count, dtype=np.int64)
    shingles = [_shingles(text) for text in texts]
    seen: list[dict[bytes, list[int]]] = [{} for _ in range(_BANDS)]
    found = []
    for index, hashes in enumerate(shingles):
        signature = _signature(hashes, factor, offset)
        keys = [band.tobytes() for band in signature.reshape(_BANDS, -1)]
        candidates = {
            i for bucket, key in zip(seen, keys, strict=True) for i in bucket.get(key, ())
        }
        found.append(any(_jaccard(hashes, shingles[i]) >= NEAR_DUPLICATE for i in candidates))
        if until is None or index < until:
            for bucket, key in zip(seen, keys, strict=True):
                # Of many equal texts a few are enough to compare with.
                if len(same := bucket.setdefault(key, [])) < 8:
                    same.append(index)
    return found


def _shingles(text: str) -> npt.NDArray[np.int64]:
    """Hashes of the text's three-word sequences, sorted, each once; case is ignored."""
    words = re.findall(r"\w+", text.lower()) or [text]
    parts = [" ".join(words[i : i + _WORDS]) for i in range(max(1, len(words) - _WORDS + 1))]
    return np.unique(np.array([zlib.crc32(p.encode()) % _PRIME for p in parts], np.int64))


def _signature(
    hashes: npt.NDArray[np.int64], factor: npt.NDArray[np.int64], offset: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    # Below 2^62: no overflow.
    mixed = (hashes[:, None] * factor[None] + offset[None]) % _PRIME
    smallest: npt.NDArray[np.int64] = mixed.min(axis=0)
    return smallest


def _jaccard(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
