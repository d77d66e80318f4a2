"""Label pairs in the terminal: one key per verdict."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Protocol, TextIO

import click
from rich.console import Console, Group
from rich.markdown import Markdown
from rich.panel import Panel
from rich.table import Table
from rich.text import Text as Line

from mlx_align.preferences.labelling import CHOICES, CRITERION_CHOICES, LabelSession, Task
from mlx_align.system.terminal import escape_controls
from mlx_align.types import Text

# With fewer columns, the answers are shown one below the other.
SIDE_BY_SIDE = 110
HELP = """\
1  the first is better      2  the second is better     =  both are equally good
?  can't tell               s  skip; it comes again at the end
c  verdict by criterion     n  note                     u  undo the last verdict
q  quit; the same command continues later               h  this help"""


class Keys(Protocol):
    """Where keys come from."""

    def key(self) -> str:
        """The next key; "q" at the end of the input."""

    def line(self, prompt: str) -> str:
        """A line of text."""


class TerminalKeys:
    """Keys of a terminal, read one by one."""

    def key(self) -> str:
        """The next key."""
        return click.getchar()

    def line(self, prompt: str) -> str:
        """A line that the rater writes."""
        found: str = click.prompt(prompt, default="", show_default=False, err=True)
        return found


class StreamKeys:
    """Keys from a file or pipe: one character each, line ends left out.

    Args:
        stream: The file.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def key(self) -> str:
        """The next character; "q" at the end of the file."""
        while (one := self._stream.read(1)) in ("\n", "\r", " "):
            pass
        return one or "q"

    def line(self, prompt: str) -> str:
        """The rest of the line."""
        return self._stream.readline().rstrip("\n")


class _Quit(Exception):
    """The rater quits in the middle of a pair."""


def open_keys() -> Keys:
    """Keys of the terminal, or of standard input if that is a file or pipe."""
    return TerminalKeys() if sys.stdin.isatty() else StreamKeys(sys.stdin)


def label_in_terminal(session: LabelSession, rater: str, console: Console, keys: Keys) -> None:
    """Show pairs and take verdicts until the rater is through or quits.

    Every verdict is in the file before the next pair is shown.

    Raises:
        WriteError: The file can't be written.
    """
    console.print(Line(HELP, "dim"))
    while (task := session.next(rater)) is not None:
        progress = session.progress(rater)
        console.rule(f"{progress.done + 1} of {progress.total}")
        _show(task, console)
        try:
            _judge(session, rater, task, console, keys)
        except _Quit:
            return
    console.print("All pairs are judged.")


def _judge(session: LabelSession, rater: str, task: Task, console: Console, keys: Keys) -> None:
    """Take keys until the pair has a verdict, or the last one was undone."""
    criteria: dict[str, str] = {}
    note = ""
    if session.by_criterion:
        criteria = _ask_criteria(session, console, keys)
    actions: dict[str, Callable[[], object]] = {
        "h": lambda: console.print(Line(HELP, "dim")),
        "c": lambda: criteria.update(_ask_criteria(session, console, keys)),
    }
    while True:
        console.print(Line("1 2 = ? s  c n u q h: ", "bold"), end="")
        key = _read_key(console, keys)
        if key == "n":
            note = keys.line("note")
        elif key == "u":
            if session.undo(rater) is not None:
                return
            console.print("Nothing to undo.")
        elif key in CHOICES:
            if session.by_criterion and key in CRITERION_CHOICES:
                while set(criteria) < set(session.criteria):
                    criteria |= _ask_criteria(session, console, keys)
            session.judge(rater, task.pair.id, key, criteria, note)
            return
        else:
            actions.get(key, actions["h"])()


def _read_key(console: Console, keys: Keys) -> str:
    """Read and show a key.

    Raises:
        _Quit: It is q.
        KeyboardInterrupt: It is Ctrl-C or Ctrl-D, which a terminal in raw mode passes on.
    """
    key = keys.key()
    console.print(Line(escape_controls(key)))
    if key == "q":
        raise _Quit
    if key in ("\x03", "\x04"):
        raise KeyboardInterrupt
    return key


def _ask_criteria(session: LabelSession, console: Console, keys: Keys) -> dict[str, str]:
    """A verdict on each criterion; any other key leaves it out."""
    found = {}
    for name, text in session.criteria.items():
        about = f"  {name} ({text})" if text else f"  {name}"
        console.print(Line(escape_controls(f"{about}: 1 2 = or s: ")), end="")
        key = _read_key(console, keys)
        if key in CRITERION_CHOICES:
            found[name] = key
    return found


def _show(task: Task, console: Console) -> None:
    prompt = Panel(_render(task.pair.prompt), title="prompt", title_align="left")
    # The package's console leaves long lines to the terminal, which would break the panels.
    console.print(prompt, soft_wrap=False)
    panels = [
        Panel(_render(answer), title=number, title_align="left", border_style="cyan")
        for number, answer in zip(("1", "2"), task.answers, strict=True)
    ]
    if console.width < SIDE_BY_SIDE:
        console.print(Group(*panels), soft_wrap=False)
        return
    table = Table.grid(expand=True)
    for _ in panels:
        table.add_column(ratio=1)
    table.add_row(*panels)
    console.print(table, soft_wrap=False)


def _render(text: Text) -> Group:
    """Markdown of a text or of the turns of a conversation; links are shown, not made."""
    turns = [("", text)] if isinstance(text, str) else [(one.role, one.content) for one in text]
    parts: list[Line | Markdown] = []
    for role, content in turns:
        if role and len(turns) > 1:
            parts.append(Line(escape_controls(f"{role}:"), "bold"))
        parts.append(Markdown(escape_controls(content), hyperlinks=False))
    return Group(*parts)
