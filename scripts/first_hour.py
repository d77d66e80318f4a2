"""Play the first hour with the program in a terminal, and write down what a newcomer sees.

    python scripts/first_hour.py [--folder FOLDER] [--output docs/first-hour.md]

Clones this repository into FOLDER, runs `scripts/quickstart` there, and then goes on with thirty
pairs of one's own: as JSONL, as CSV and as a list in Python, with typing errors, a broken line,
Ctrl-C, --resume, a comparison, `eval`, `chat`, and the page on a phone. Every command runs in a
pseudo-terminal 100 columns wide. The screens become a page, the pages pictures, if Chromium is
there. FOLDER is kept, so that a second call doesn't install again. Takes about ten minutes on two
CPU cores.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
from browser import find_browser

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 100, 40
CTRL_C, CTRL_D = "\x03", "\x04"
# A screen of more lines is cut in the middle.
MOST_LINES = 70

CAPITALS = {
    "Australia": "Canberra", "Brazil": "Brasília", "Canada": "Ottawa", "Turkey": "Ankara",
    "Kenya": "Nairobi", "India": "New Delhi", "Japan": "Tokyo", "Peru": "Lima", "Chile": "Santiago",
    "Egypt": "Cairo", "Ghana": "Accra", "Spain": "Madrid", "France": "Paris", "Italy": "Rome",
    "Poland": "Warsaw", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Greece": "Athens", "Austria": "Vienna", "Hungary": "Budapest", "Ireland": "Dublin",
    "Portugal": "Lisbon", "Ukraine": "Kyiv", "Vietnam": "Hanoi", "Thailand": "Bangkok",
    "Nigeria": "Abuja", "Morocco": "Rabat", "Mexico": "Mexico City", "Cuba": "Havana",
}  # fmt: skip
QUESTION = "What is the capital of {}?"
CHOSEN = "{}."
REJECTED = "Hmm, let me think about that. There are so many places. I believe that it is {}."


@dataclass(frozen=True)
class Step:
    """A command of the hour.

    Attributes:
        text: What a reader is told before it.
        command: A line for the shell.
        where: The folder, relative to the user's.
        typed: What is typed, in this order: each when its pattern has appeared in the output.
        code: The exit code that is expected.
        limit: Longest time, seconds.
        before: Called before the command.
    """

    text: str
    command: str
    where: str = "capitals"
    typed: Sequence[tuple[str, str]] = ()
    code: int = 0
    limit: float = 600.0
    before: Callable[[Path], None] | None = None


@dataclass
class Screen:
    """A terminal's screen with its history: the text that is left after all that was written.

    Understands what the program and its libraries write: colours, returns, erased lines, and
    movements of the cursor.
    """

    width: int = WIDTH
    lines: list[list[str]] = field(default_factory=lambda: [[]])
    row: int = 0
    column: int = 0

    _SEQUENCE = re.compile(r"\x1b(?:\[([?\d;]*)([A-Za-z])|\][^\x07\x1b]*(?:\x07|\x1b\\)|[=>()].?)")

    def write(self, text: str) -> None:
        """Write text as the program sent it."""
        place = 0
        while place < len(text):
            if found := self._SEQUENCE.match(text, place):
                self._control(found[1] or "", found[2] or "")
                place = found.end()
                continue
            self._put(text[place])
            place += 1

    def _put(self, character: str) -> None:
        if character == "\n":
            self.row += 1
            self.column = 0
        elif character == "\r":
            self.column = 0
        elif character == "\b":
            self.column = max(0, self.column - 1)
        elif character >= " ":
            if self.column == self.width:
                self.row += 1
                self.column = 0
            line = self._line()
            line += [" "] * (self.column + 1 - len(line))
            line[self.column] = character
            self.column += 1
        self._line()

    def _line(self) -> list[str]:
        while len(self.lines) <= self.row:
            self.lines.append([])
        return self.lines[self.row]

    def _control(self, arguments: str, name: str) -> None:
        count = int(arguments) if arguments.isdigit() else 0
        if name == "A":
            self.row = max(0, self.row - max(count, 1))
        elif name == "G":
            self.column = max(count, 1) - 1
        elif name == "C":
            self.column += max(count, 1)
        elif name == "D":
            self.column = max(0, self.column - max(count, 1))
        elif name == "K" and count == 2:
            self._line().clear()
        elif name == "K" and count == 0:
            del self._line()[self.column :]

    def text(self) -> str:
        """The lines, without spaces at their ends and empty lines at the end."""
        return "\n".join("".join(line).rstrip() for line in self.lines).rstrip()


def play(
    command: str,
    where: Path,
    environment: dict[str, str],
    typed: Sequence[tuple[str, str]] = (),
    limit: float = 600.0,
) -> tuple[str, int]:
    """Run a command in a pseudo-terminal; returns what is left on its screen, and the exit code.

    Args:
        command: A line for bash.
        where: The folder to run it in.
        environment: The environment variables.
        typed: (pattern, keys): the keys are sent once the pattern has appeared in what was written
            since the last keys.
        limit: The command is killed after this time, seconds.

    Raises:
        TimeoutError: It took longer.
    """
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(where)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # jobs in the background ignore it
        os.execvpe("bash", ["bash", "--norc", "-c", command], environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    waiting, output, since = list(typed), bytearray(), 0
    end = time.monotonic() + limit
    while True:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"{command}: no end after {limit:.0f} s:\n{output.decode()}")
        if not select.select([terminal], [], [], 0.2)[0]:
            continue
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # Linux: the other side is closed
            part = b""
        if not part:
            break
        output += part
        if waiting and re.search(waiting[0][0], output[since:].decode(errors="replace")):
            time.sleep(0.2)  # as a person would, after the program has asked
            os.write(terminal, waiting.pop(0)[1].encode())
            since = len(output)
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    screen = Screen()
    screen.write(output.decode(errors="replace"))
    return screen.text(), os.waitstatus_to_exitcode(status)


def scrub(text: str, home: Path) -> str:
    """The text without what is of this machine alone: paths, times of day, sizes of memory."""
    for path in {str(home), str(home.resolve())}:
        text = text.replace(path, "~")
    # Names of runs; a long line may be wrapped in one.
    text = re.sub(r"-\d{8}(\n?)-\d{6}\b", r"-20260101\1-090000", text)
    # Of pip, where it is configured with folders.
    lines = [line for line in text.splitlines() if not line.startswith("WARNING: Location ")]
    date = r"\b\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?"
    return re.sub(date, "2026-01-01 09:00", "\n".join(lines))


def shorten(text: str, most: int = MOST_LINES) -> str:
    """The text, without the middle of a screen that is too long."""
    lines = text.splitlines()
    if len(lines) <= most:
        return text
    head = most * 2 // 5
    left_out = f"[… {len(lines) - most + 1} lines]"
    return "\n".join([*lines[:head], left_out, *lines[len(lines) - (most - head - 1) :]])


def make_pairs() -> list[dict[str, object]]:
    """Thirty pairs: a short answer is better than a long one. Both name the capital."""
    return [
        {
            "prompt": [{"role": "user", "content": QUESTION.format(country)}],
            "chosen": [{"role": "assistant", "content": CHOSEN.format(city)}],
            "rejected": [{"role": "assistant", "content": REJECTED.format(city)}],
        }
        for country, city in CAPITALS.items()
    ]


PROGRAM = """\
import csv

import mlx_align as ma

with open("pairs.csv", newline="") as file:
    pairs = list(csv.DictReader(file))
for row in pairs:
    row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    for name in ("chosen", "rejected"):
        row[name] = [{"role": "assistant", "content": row[name]}]

run = ma.dpo(model="starter", data=pairs, output="runs/python")
print(run.verdict.kind, run.metrics["eval/rewards/accuracies"])
print(run.generate("What is the capital of Kenya?"))
"""


def write_files(folder: Path) -> None:
    """The newcomer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    rows = make_pairs()
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    broken = [*lines[:6], lines[6].replace('"chosen"', '"chosen', 1), *lines[7:]]
    (folder / "broken.jsonl").write_text("".join(broken), encoding="utf-8")
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("prompt", "chosen", "rejected"))
        for country, city in CAPITALS.items():
            row = (QUESTION.format(country), CHOSEN.format(city), REJECTED.format(city))
            table.writerow(row)
    (folder / "first.py").write_text(PROGRAM, encoding="utf-8")


TRAIN = "mlx-align dpo --model starter --data pairs.jsonl"
STEPS = (
    Step(
        "One command installs the package into `.venv` and trains the small model that comes "
        "along.",
        "scripts/quickstart",
        "mlx-align",
        limit=1500,
    ),
    Step(
        "It printed what comes next. The environment is activated once per terminal; then the "
        "program without arguments lists its commands.",
        "source ~/mlx-align/.venv/bin/activate && mlx-align",
    ),
    Step(
        "Thirty own pairs, one per line of a file. What does the program make of them?",
        "mlx-align data check pairs.jsonl --model starter",
    ),
    Step("The same from a spreadsheet, as CSV.", "mlx-align data check pairs.csv --model starter"),
    Step(
        "Plain text does not go through the chat template of a chat model, so it is converted.",
        "mlx-align data convert pairs.csv --as-messages --output converted.jsonl",
        before=lambda folder: (folder / "converted.jsonl").unlink(missing_ok=True),
    ),
    Step("A typing error in an option …", f"{TRAIN} --learning-rat 1e-4", code=1),
    Step("… a name that other programs use …", f"{TRAIN} --optim adamw_torch", code=1),
    Step("… in a value …", f"{TRAIN} --loss simpoo", code=1),
    Step("… in a number …", f"{TRAIN} --epochs two", code=1),
    Step("… in a path …", "mlx-align dpo --model starter --data pair.jsonl", code=1),
    Step("… in a command …", "mlx-align orpo --data pairs.jsonl", code=1),
    Step("… and a broken line.", "mlx-align data check broken.jsonl", code=1),
    Step(
        "Now it trains, with all defaults. The verdict comes first; 6 held-out pairs say little, "
        "and the chosen completions are all shorter.",
        f"{TRAIN} --output runs/first",
    ),
    Step(
        "Would twice the rate do better? Ctrl-C stops it …",
        f"{TRAIN} --learning-rate 4.6e-4 --output runs/second",
        typed=(("update 10/", CTRL_C),),
        code=130,
    ),
    Step("… and goes on.", "mlx-align dpo --resume runs/second"),
    Step("Which one is better?", "mlx-align report runs/first runs/second"),
    Step(
        "How much did the second one change the model?",
        "mlx-align eval runs/second --samples 6 -n 2 --max-tokens 40",
    ),
    Step(
        "A talk with it, and with the model it started from. Ctrl-D ends.",
        "mlx-align chat runs/second --compare --max-tokens 40",
        typed=(
            ("> ", "What is the capital of Kenya?\n"),
            ("after[^>]*> ", "What is the capital of Portugal?\n"),
            ("after[^>]*> ", CTRL_D),
        ),
    ),
    Step("The same thirty pairs as a list in Python (`first.py` below).", "python first.py"),
)

INTRODUCTION = """\
# The first hour

What a newcomer sees, recorded by `scripts/first_hour.py` in a terminal 100 columns wide: the
program from a fresh clone, then thirty own pairs. The model is the starter, so that everything runs
in minutes on any machine; with your model only the names and the times differ. Progress bars and
what they overwrite are left out.
"""
PICTURES = """\
## The page

Every run writes `report.html`. This is the one of `runs/second`, on a phone and on a desktop.

![The page of runs/second on a phone](images/first-hour-phone.png)

![The page of runs/second on a desktop](images/first-hour-page.png)
"""


def section(step: Step, screen: str) -> str:
    """A step of the page: its text, the command and the screen."""
    prompt = f"{step.where}$ {step.command}"
    return f"{step.text}\n\n```text\n{prompt}\n{shorten(screen)}\n```\n"


def picture(page: Path, target: Path, width: int, height: int) -> bool:
    """A picture of the top of a page; False without a browser."""
    browser = find_browser()
    if browser is None:
        return False
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        command += ["--virtual-time-budget=4000", f"--screenshot={target}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    return True


def environment_of(home: Path, activated: bool) -> dict[str, str]:
    """The environment of a newcomer's terminal."""
    path = os.environ["PATH"].split(os.pathsep)
    # Without the environment that this script runs in.
    path = [p for p in path if not (Path(p) / "mlx-align").exists()]
    venv = home / "mlx-align" / ".venv"
    found = {
        "HOME": str(home),
        "PATH": os.pathsep.join([str(venv / "bin"), *path] if activated else path),
        "TERM": "xterm-256color",
        "COLUMNS": str(WIDTH),
        "LINES": str(HEIGHT),
        "LANG": "C.UTF-8",
        "PS1": "$ ",
    }
    kept = ("LD_PRELOAD", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PIP_INDEX_URL", "TMPDIR")
    kept += ("HTTPS_PROXY", "https_proxy", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT")
    return {**found, **{name: os.environ[name] for name in kept if name in os.environ}}


def clone(home: Path) -> None:
    """A clone of this repository as it is committed, in the user's folder."""
    target = home / "mlx-align"
    if target.is_dir():
        subprocess.run(["git", "fetch", "-q", str(ROOT), "HEAD"], cwd=target, check=True)
        subprocess.run(["git", "checkout", "-q", "FETCH_HEAD"], cwd=target, check=True)
        shutil.rmtree(target / "runs", ignore_errors=True)
        for stamp in (target / ".venv").glob(".installed-*"):
            stamp.unlink()  # so that it is set up again; most is there
        return
    subprocess.run(["git", "clone", "-q", str(ROOT), str(target)], check=True)


@click.command(help=__doc__)
@click.option("--folder", type=Path, help="The user's folder.  [default: a temporary one]")
@click.option("--output", type=Path, default=ROOT / "docs" / "first-hour.md", show_default=True)
@click.option("--only", multiple=True, help="Play only steps whose command has this text.")
def main(folder: Path | None, output: Path, only: tuple[str, ...]) -> None:
    """Play all steps and write the page."""
    temporary = folder is None
    home = (folder or Path(tempfile.mkdtemp())).resolve()
    home.mkdir(parents=True, exist_ok=True)
    clone(home)
    if not only:
        write_files(home / "capitals")
    parts = [INTRODUCTION]
    for number, step in enumerate(STEPS):
        if only and not any(text in step.command for text in only):
            continue
        if step.before is not None:
            step.before(home / step.where)
        began = time.monotonic()
        environment = environment_of(home, activated=number > 0)
        screen, code = play(
            step.command, home / step.where, environment, step.typed, limit=step.limit
        )
        screen = scrub(screen, home)
        click.echo(
            f"\n--- {step.command} ({time.monotonic() - began:.0f} s, exit {code})\n{screen}"
        )
        if code != step.code:
            raise click.ClickException(f"{step.command}: exit {code}, expected {step.code}")
        parts.append(section(step, screen))
        if step.command == "python first.py":
            parts.append(f"<!-- not run: part of the recording -->\n```python\n{PROGRAM}```\n")
    if only:
        return
    images = output.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    page = home / "capitals" / "runs" / "second" / "report.html"
    made = picture(page, images / "first-hour-phone.png", 390, 1500)
    made = made and picture(page, images / "first-hour-page.png", 1100, 900)
    if made:
        parts.append(PICTURES)
    output.write_text("\n".join(parts), encoding="utf-8")
    click.echo(f"\nWrote {output}")
    if temporary:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
