"""What the pages of the studies on the stories model share: sentences, points, tables."""

import math
import platform
import textwrap
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
WIDTH = 125  # characters of a line of a page
SEEDS = 3  # of a study
SHOWN = (1, 2, 4, 16, 64, 256)
LEAST_KL = 0.05  # nats; below, the estimate of KL may be negative
MEASURED = """
The model is stories260K (`data/real/stories260K`, MIT), a Llama of 260,000 parameters that
continues stories for children. SmolLM2-135M trains at some hundred tokens a second on a CPU, too
slow for curves with this many points. The gold reward is a fixed rule
(`scripts/real/story_rule.py`): happy words minus sad ones, direct speech, the name of the hero, and
how many of the words are different. Prompts are first sentences of stories, completions have
{tokens} tokens, and rewards are given in standard deviations of the model's own completions, above
their mean. All weights are trained. The {held_out} held-out prompts have other heroes' names than
the training prompts.
"""


def half_width(std: float, n: int) -> float:
    """Half of the 95% interval of a mean of n values."""
    return 1.96 * std / math.sqrt(n)


def when_and_where() -> dict[str, str]:
    """Date and machine, for the page."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


class Point(NamedTuple):
    """A policy: its KL from the start (nats), gold gain with half its interval, and proxy gain."""

    kl: float
    gold: float
    half: float
    proxy: float


def best_of_points(proxies: Sequence[dict[str, Any]]) -> dict[int, Point]:
    """Best-of-n by proxies of one size: means over their seeds, intervals over prompts."""
    found = {}
    for rows in zip(*(one["best_of"] for one in proxies), strict=True):
        gold = np.mean([row["gold"] for row in rows], axis=0)
        half = half_width(float(gold.std(ddof=1)), len(gold))
        proxy = float(np.mean([row["proxy"] for row in rows]))
        found[rows[0]["n"]] = Point(rows[0]["kl"], float(gold.mean()), half, proxy)
    return found


def write(docs: Path, name: str, page: str, drawings: dict[str, str]) -> list[Path]:
    """Write a page and its drawings, by file name; returns the files."""
    files = {docs / "verified" / name: page}
    files |= {docs / "images" / drawing: text for drawing, text in drawings.items()}
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return list(files)


def value(number: float, half: float | None = None) -> str:
    """A number with its sign, and half of its interval."""
    shown = f"{number:+z.2f}".replace("-", "−")
    return shown if half is None else f"{shown} ± {half:.2f}"


def table(head: str, ruler: str, rows: Sequence[str]) -> str:
    return "\n".join([head, ruler, *rows])


def quoted(text: str) -> str:
    return f'"… {" ".join(text.split())}"'


def seeds(count: int) -> str:
    return "One seed" if count == 1 else f"Means of {count} seeds"


def what_is_measured(results: dict[str, Any]) -> str:
    return MEASURED.format(tokens=results["tokens"], held_out=results["held_out"])


def repeated_by(name: str, results: dict[str, Any]) -> str:
    given = "" if results["seeds"] == SEEDS else f" --seeds {results['seeds']}"
    more = f"; without `--seeds` it has {SEEDS}" if given else ""
    return (
        f"`python scripts/real/{name}.py{given}` repeats the study and writes this page{more}. "
        f"{results['date']}, {results['machine']}, mlx's CPU backend with OpenBLAS."
    )


def listed(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {wrap(one, '  ')}" for one in sentences)


def wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def filled(template: str, **values: Any) -> str:
    """A page from its template: placeholders filled, paragraphs wrapped."""
    parts = template.format(**values).strip().split("\n\n")
    kept = ("|", "#", "- ", "!")
    lines = [part if part.startswith(kept) else wrap(" ".join(part.split())) for part in parts]
    return "\n\n".join(part.strip() for part in lines) + "\n"
