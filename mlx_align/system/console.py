"""Terminal and notebook: progress bars, notes, and the table at the end of a run."""

from __future__ import annotations

import html
import os
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from mlx_align.system.formatting import format_count, format_duration
from mlx_align.system.intervals import Estimate, kl_interval, metric_interval
from mlx_align.system.progress import ProgressBar
from mlx_align.system.terminal import encodable, escape_controls

# What a line with a command to copy begins with.
_COMMANDS = ("mlx-align ", "mlx_lm.", "python ", "source ")


class Console:
    """Shows progress in a terminal or notebook; implements the protocol in `system/progress.py`.

    With `json`, everything goes to standard error, so that standard output has only the result.
    Control characters in texts are escaped. A run outlives its terminal: if the terminal was
    closed, or `tee` ended at the same Ctrl-C, the console becomes silent.
    """

    def __init__(self, json: bool = False) -> None:
        # Plain text in a notebook: rich would show every line as a separate HTML output.
        self.console = _UnbrokenConsole(
            stderr=json, highlight=False, soft_wrap=True, force_jupyter=False
        )

    def note(self, text: str) -> None:
        """Print text without markup, control characters escaped.

        On a terminal, long lines are wrapped between words, except those of commands to copy.
        """
        if self.console.is_terminal:
            text = "\n".join(_wrapped(line, self.console.width) for line in text.split("\n"))
        try:
            self.console.print(Text(escape_controls(text)))
        except OSError:
            _silence(self.console)

    @contextmanager
    def bar(self, label: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
        """A progress bar with the time left. Without a terminal or notebook, a line per minute."""
        if in_notebook():
            with _NotebookBar(label, total, done) as notebook_bar:
                yield notebook_bar
            return
        if not self.console.is_terminal:
            yield _LogProgress(self.console, label, total, done)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield _RichBar(progress, progress.add_task(label, total=total, completed=done))

    def outcome(self, summary: Mapping[str, Any]) -> None:
        """Print metrics before and after training, and a few samples.

        Args:
            summary: The run's summary.json, and its samples. A reward model's has its own report,
                shown earlier.
        """
        self.note(f"\n{summary['verdict']['sentence']}")
        if summary["command"] == "reward":
            return
        before, after = summary["eval_before"], summary["eval"]
        if after:
            self.console.print(
                _metric_table(before, after, summary["eval_examples"], summary["kl"])
            )
        for row in summary["samples"][:4]:
            prompt = row.get("messages", row["prompt"])
            self.sample(prompt, {name: row[name] for name in ("before", "after")})

    def sample(self, prompt: str | list[dict[str, Any]], completions: Mapping[str, str]) -> None:
        """Print a prompt, turn by turn if it is a conversation, and completions by name.

        Args:
            prompt: Text, or messages.
            completions: The completions, each by a name; long ones are cut.
        """
        self.console.print()
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = str(prompt[0]["content"])
        turns = [("prompt", prompt)] if isinstance(prompt, str) else []
        turns += [] if isinstance(prompt, str) else [(t["role"], t["content"]) for t in prompt]
        turns += completions.items()
        width = max(len(name) for name, _ in turns)
        for name, text in turns:
            lines = [_one_line(text)]
            if self.console.is_terminal:
                lines = textwrap.wrap(lines[0], max(self.console.width - width - 4, 20))
            shown = Text(f"\n{'':{width + 4}}".join(lines))
            self.console.print(Text(f"  {name:>{width}}  ", "dim") + shown)


def _wrapped(line: str, width: int) -> str:
    """A line of a message in lines of at most `width` characters; commands stay on one line."""
    if len(line) <= width or line.lstrip().startswith(_COMMANDS):
        return line
    indent = line[: len(line) - len(line.lstrip())]
    if indent or line.startswith("!"):
        indent += "    "
    wrapped = textwrap.wrap(
        line.replace("n = ", "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"),
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(wrapped).replace("\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}", " = ")


class _UnbrokenConsole(RichConsole):
    @property
    def file(self) -> IO[str]:
        """The stream behind all that stand in front of it.

        While a bar is shown, rich puts one in front of the one that escapes (`SafeStream`); if only
        one were removed, the bar's own sequences would be escaped.
        """
        file = super().file
        while (behind := getattr(file, "rich_proxied_file", None)) is not None:
            file = behind
        return file

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def on_broken_pipe(self) -> None:
        """Continue silently; rich would end the process."""
        _silence(self)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Escape the text of everything that is printed; rich's own sequences pass."""
        encoding = getattr(self.file, "encoding", None) or "utf-8"
        for segment in super().render(renderable, options):
            if segment.control or (segment.text.isascii() and segment.text.isprintable()):
                yield segment
            else:
                text = encodable(escape_controls(segment.text), encoding)
                yield Segment(text, segment.style)


def _silence(console: RichConsole) -> None:
    """Discard further output of the console, and of Python at exit."""
    console.quiet = True
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, console.file.fileno())
        os.close(nowhere)


class _RichBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook (Jupyter, VS Code, Colab)."""
    ipython = sys.modules.get("IPython")
    return hasattr(getattr(ipython, "get_ipython", lambda: None)(), "kernel")


class _NotebookBar:
    """A progress bar in one output of a notebook, removed at the end. Needs no ipywidgets."""

    EVERY_SECONDS = 0.2

    def __init__(self, label: str, total: int, done: int) -> None:
        self._label, self._total = label, total
        self._done = self._first = done
        self._started = self._shown = time.monotonic()

    def __enter__(self) -> _NotebookBar:
        from IPython.display import display

        self._output = display(self._html(), display_id=True)
        return self

    def __exit__(self, *error: object) -> None:
        from IPython.display import HTML

        self._output.update(HTML(""))

    def advance(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._shown >= self.EVERY_SECONDS:
            self._shown = now
            self._output.update(self._html())

    def _html(self) -> Any:
        from IPython.display import HTML

        left = ""
        if self._done > self._first:
            seconds = (time.monotonic() - self._started) / (self._done - self._first)
            left = f", {format_duration(seconds * (self._total - self._done))} left"
        return HTML(
            f"<div>{html.escape(self._label)} "
            f'<progress max="{self._total}" value="{self._done}"></progress> '
            f"{self._done}/{self._total}{left}</div>"
        )


class _LogProgress:
    """Progress in a log file: a line per minute instead of a bar."""

    EVERY_SECONDS = 60.0

    def __init__(self, console: RichConsole, label: str, total: int, done: int) -> None:
        self._console, self._label, self._total = console, label, total
        self._done = self._first = done
        self._started = self._printed = time.monotonic()

    def advance(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._printed < self.EVERY_SECONDS or self._done == self._first:
            return
        self._printed = now
        seconds = (now - self._started) / (self._done - self._first)
        left = format_duration(seconds * (self._total - self._done))
        try:
            self._console.print(Text(f"  {self._label}: {self._done}/{self._total}, {left} left"))
        except OSError:
            _silence(self._console)


_ROWS = (
    ("reward", "reward", "{:+z.3f}"),
    ("held-out reward", "held_out", "{:+z.3f}"),
    ("finished completions", "completions/ended", "{:.0%}"),
    ("tokens per completion", "completions/mean_length", "{:.0f}"),
    ("prefers the chosen (own log-prob)", "logps/accuracies", "{:.1%}"),
    ("log-prob margin, nats", "logps/margins", "{:+z.2f}"),
    ("log-prob of chosen, nats", "logps/chosen", "{:z.2f}"),
    ("log-prob of rejected, nats", "logps/rejected", "{:z.2f}"),
    ("prefers the chosen (implicit reward)", "rewards/accuracies", "{:.1%}"),
    ("reward margin", "rewards/margins", "{:+z.3f}"),
    ("reward AUC, desirable over undesirable", "rewards/auc", "{:.1%}"),
    ("KL estimate from mismatched pairs, nats", "kl", "{:z.2f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
)


def _metric_table(
    before: Mapping[str, float],
    after: Mapping[str, float],
    examples: int,
    kl: Mapping[str, Any] | None,
) -> Table:
    title = f"Held-out data, {format_count(after, examples)}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("95% interval", justify="right")
    for label, key, pattern in _ROWS:
        if after.get(key) is not None:
            first = before.get(key)
            # Implicit rewards are all 0 before training, so an accuracy would be meaningless.
            shown = "–" if first is None or key == "rewards/accuracies" else pattern.format(first)
            found = metric_interval(after, key, examples)
            ends = "" if found is None else _ends(found, pattern)
            table.add_row(label, shown, pattern.format(after[key]), ends)
    if kl is not None:
        label = f"KL from the reference, nats (n = {kl['samples']})"
        found = kl_interval(kl)
        ends = "" if found is None else _ends(found, "{:z.2f}")
        table.add_row(label, "0.00", f"{kl['mean']:z.2f}", ends)
    return table


def _ends(found: Estimate, pattern: str) -> str:
    return f"{pattern.format(found.low)} to {pattern.format(found.high)}"


def _one_line(text: str, limit: int = 160) -> str:
    flat = " ".join(text.split()) or "(nothing)"
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
