"""The package's prose is plain English and its names are the field's: no banned word comes back."""

import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mlx_align"

# Not in comments, docstrings, messages and help texts.
BANNED_PROSE = (
    r"aparts?",
    r"beside",
    r"whatever",
    r"whoever",
    r"wherever",
    r"stands",
    r"so many",
    r"looked at",
    r"goes on",
    r"mend(s|ed)?",
    r"nobody",
    r"(?-i:(is|are) none)",
    r"(has|have) not (?!been)",
    r"of (no )?use",
    r"heed(s|ed)?",
    r"wish(es|ed)?",
    r"asked",
    r"trunk",
    r"dissect(s|ed)?",
    r"anatomy",
    r"lessons?",
    r"learners?",
    r"workplace",
    r"judging",
    r"courses?",
    r"terms",
    r"trees?",
    r"said",
    r"heard",
    r"lets one",
    r"at hand",
    r"by itself",
    r"by themselves",
    r"of (its|their|his) own",
    r"now and then",
    r"in all",
    r"as a rule",
)
_PROSE = re.compile(r"\b(" + "|".join(BANNED_PROSE) + r")\b", re.IGNORECASE)
# Text that has one of these words for a reason: keys of files, other projects' names, idioms.
ALLOWED_TEXT = (
    '"learner"',  # key in checkpoints and in summary.json
    '"said"',  # key in checkpoints
    "told apart",
    "trees of messages",
    "message-tree",
    "in all blocks",
    "in all layers",
    "in all sections",
)
# Not as a name, or as a part of one between underscores.
BANNED_NAMES = {
    "anatomy",
    "apart",
    "asked",
    "beside",
    "course",
    "cut",
    "dissect",
    "ended",
    "experience",
    "heed",
    "learned",
    "learner",
    "lesson",
    "lessons",
    "mend",
    "opening",
    "refer",
    "said",
    "terms",
    "trees",
    "trunk",
    "whatever",
    "wish",
    "workplace",
}
# A key of the statistics in summary.json, and trees of messages.
ALLOWED_NAMES = {"cut_completions", "expand_trees", "is_message_tree", "message_tree"}


def sources():
    return sorted(path for path in PACKAGE.rglob("*.py") if "_shipped" not in path.parts)


def tokens(path):
    text = path.read_text(encoding="utf-8")
    return list(tokenize.generate_tokens(io.StringIO(text).readline))


def banned_words(text):
    text = re.sub(r"[\s#]+", " ", text)
    for allowed in ALLOWED_TEXT:
        text = text.replace(allowed, "")
    return [match[0] for match in _PROSE.finditer(text)]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_prose_and_names(path):
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    between = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    found, text, start = [], "", 0
    for token in tokens(path):
        if token.type in kinds:
            # Sentences go over several comments and strings.
            start = start if text else token.start[0]
            text += " " + token.string
        elif token.type not in between:
            found += [f"{start}: {word!r} in prose" for word in banned_words(text)]
            text = ""
        if token.type == tokenize.NAME and token.string not in ALLOWED_NAMES:
            parts = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", token.string).lower().split("_")
            found += [f"{token.start[0]}: name {token.string}" for p in parts if p in BANNED_NAMES]
    assert not found, "\n".join(found)


def test_words_are_found_across_lines():
    assert banned_words("# a file of its\n# own") == ["of its own"]
    assert banned_words('"learner" # can\'t be told apart') == []
