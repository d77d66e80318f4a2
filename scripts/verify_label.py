"""Label pairs in a browser as a person does: keys, criteria, undo, hostile text, nothing cut off.

    python scripts/verify_label.py [--output FOLDER]

Starts the server of `mlx-align label --web` and opens its page in headless Chromium, 1200 and 390
pixels wide, light and dark. A script in a copy of the page presses the keys; then the file of
judgements is compared with what was pressed. Leaves pictures of a plain and of a hostile pair in
FOLDER. Takes about two minutes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
from browser import BROWSERS, find_browser
from verify_page import WIDTHS

from mlx_align.data.judgements import AnswerPair, pair_answers
from mlx_align.preferences import label_web
from mlx_align.preferences.label_web import LabelServer
from mlx_align.preferences.labelling import LabelSession
from mlx_align.preferences.records import JudgementLog
from mlx_align.preferences.rubric import DEFAULT_CRITERIA
from mlx_align.types import Message

# Pixels.
PICTURE_HEIGHT = 1100
HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\n\n"
    "[link](javascript:document.title='owned') ![p](https://evil.invalid/p.png)\n\n"
    "| a | b |\n|---|---|\n| 1 | `<b>` |\n\n```\n" + "long " * 80 + "\n```\n" + "x" * 500
)
# Keys that the page gets, in order: a name and Enter, a verdict, a criterion and a verdict, undo,
# can't tell, a tie, skip. Then what the page shows is read.
PROBE = """<script nonce="NONCE">
(async () => {
  const rest = (ms) => new Promise((done) => setTimeout(done, ms));
  const settle = async () => { await rest(30); while (busy) await rest(20); await rest(30); };
  const press = async (key) => {
    document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    await settle();
  };
  const wide = () => [...document.querySelectorAll("main > *, section > *, .card, button")].filter(
    (e) => e.getBoundingClientRect().right > innerWidth + 1).length;
  at("name").value = "RATER";
  at("who").requestSubmit();
  await settle();
  const seen = {overflow: document.documentElement.scrollWidth - innerWidth, wide: wide(),
    focus: document.activeElement.id, scripts: document.querySelectorAll(".card script").length,
    images: document.querySelectorAll(".card img").length,
    links: [...document.querySelectorAll(".card a")].map((a) => a.href),
    tables: document.querySelectorAll(".card table").length};
  for (const key of ["1", "c", "2", "Escape", "=", "u", "?", "2", "s"]) await press(key);
  await press("n");
  seen.note = document.activeElement.id;
  at("note").value = "noted"; at("note").blur();
  await press("1");
  seen.count = at("count").textContent; seen.error = at("error").textContent;
  seen.title = document.title;
  document.body.setAttribute("data-probe", JSON.stringify(seen));
})();
</script>"""
# For the pictures: enter a name, and stay at the first pair.
ENTER = """<script nonce="NONCE">at("name").value = "RATER"; at("who").requestSubmit();</script>"""
PLAIN = (
    "Sydney is the largest city, but the capital is **Canberra**:\n\n"
    "1. Melbourne was the seat of government until 1927.\n"
    "2. Canberra was built for the purpose.\n\n"
    '```python\ncapitals = {"Australia": "Canberra"}\n```'
)
# The verdicts that these keys write, in the order of the lines.
EXPECTED = ["first", "tie", "undone", "unsure", "second", "skip", "first"]


def plain_pair() -> AnswerPair:
    """A pair as people see it."""
    answers = ((Message("assistant", PLAIN),), (Message("assistant", "Sydney, I think."),))
    return pair_answers((Message("user", "What is the capital of Australia, and why?"),), answers)


def hostile_pairs() -> list[AnswerPair]:
    """Pairs whose text tries to leave its place."""
    return [
        pair_answers(
            (Message("user", f"{HOSTILE} {n}"),),
            (
                (Message("assistant", f"**one** {HOSTILE} {n}"),),
                (Message("assistant", f"two {n}"),),
            ),
        )
        for n in range(8)
    ]


def serve(folder: Path, name: str, pairs: Sequence[AnswerPair]) -> LabelServer:
    """A server of pairs, and their file."""
    log = JudgementLog(folder / f"{name}.jsonl")
    return LabelServer(LabelSession(pairs, log, DEFAULT_CRITERIA))


def browse(browser: str, url: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Open an address; returns what the browser prints."""
    command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu"]
    command += ["--enable-logging=stderr", *options, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def verdict(row: dict) -> str:
    """A line's verdict in words of the screen."""
    if row["winner"] in ("a", "b"):
        return "first" if row["winner"] == row["shown_first"] else "second"
    return row["winner"]


@contextmanager
def page_with(script: str, folder: Path, name: str) -> Iterator[None]:
    """Serve the page with a script at its end within the block."""
    page = label_web._PAGE
    changed = folder / f".{name}.html"
    content = page.read_text(encoding="utf-8")
    script = script.replace("RATER", name)
    changed.write_text(content.replace("</body>", script + "</body>"), encoding="utf-8")
    label_web._PAGE = changed
    try:
        yield
    finally:
        label_web._PAGE = page
        changed.unlink()


def check(browser: str, folder: Path, width: int, height: int, scheme: int) -> list[str]:
    """Label at one width and in one scheme; returns what is wrong."""
    name = f"{'light' if scheme else 'dark'}-{width}"
    window = [f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={scheme}"]
    window.append("--virtual-time-budget=20000")
    with page_with(PROBE, folder, name), serve(folder, name, hostile_pairs()) as server:
        done = browse(browser, server.url, *window, "--dump-dom")
    for kind, pairs in (("plain", [plain_pair()]), ("hostile", hostile_pairs()[:1])):
        picture = f"--screenshot={folder / f'{name}-{kind}.png'}"
        window[0] = f"--window-size={width},{PICTURE_HEIGHT}"
        with page_with(ENTER, folder, name), serve(folder, f"{name}-{kind}", pairs) as server:
            browse(browser, server.url, *window, picture)
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    seen = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&")) if found else {}
    print(f"{name}: {seen}")
    log = folder / f"{name}.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    rows = rows[: len(EXPECTED)]
    wrong = [f"{name}: {line}" for line in done.stderr.splitlines() if "CONSOLE" in line]
    if [verdict(row) for row in rows] != EXPECTED:
        wrong.append(f"{name}: judgements are {[verdict(row) for row in rows]}")
    else:
        tie = rows[1]
        if tie["criteria"]["helpful"] in (None, "tie", tie["shown_first"]):
            wrong.append(f"{name}: the verdict on a criterion is {tie['criteria']}")
        if rows[-1]["note"] != "noted":
            wrong.append(f"{name}: the note is {rows[-1]['note']!r}")
    expected = {"overflow": 0, "wide": 0, "scripts": 0, "images": 0, "tables": 2, "error": ""}
    expected |= {"note": "note", "title": "Which answer is better?"}
    # An image is a link, which nothing is loaded from until it is followed.
    expected["links"] = ["https://evil.invalid/p.png"] * 2
    for key, value in expected.items():
        if seen.get(key) != value:
            wrong.append(f"{name}: {key} is {seen.get(key)!r}, expected {value!r}")
    return wrong


@click.command(help=__doc__)
@click.option("--output", default="label-check", show_default=True, metavar="FOLDER")
def main(output: str) -> None:
    browser = find_browser()
    if browser is None:
        raise click.ClickException(f"no browser: none of {', '.join(BROWSERS)} is installed")
    folder = Path(output)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wrong = [
        line
        for width, height in WIDTHS.items()
        for scheme in (0, 1)
        for line in check(browser, folder, width, height, scheme)
    ]
    print("\n".join(wrong) or f"nothing wrong; pictures in {folder}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
