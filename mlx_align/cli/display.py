"""The terminal: progress while something runs, and tables when it is done."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from mlx_align.train.display import Bar
from mlx_align.train.runlog import say_seconds


class Terminal:
    """Shows a run to a person. With `json`, standard output is left to the result.

    A run outlives whoever reads it: where the terminal was closed, or `tee` died of the same
    Ctrl-C, nothing more is shown.
    """

    def __init__(self, json: bool = False) -> None:
        self.console = _Console(stderr=json, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print finished lines, as they are."""
        try:
            self.console.print(Text(text))
        except OSError:
            _silence(self.console)

    @contextmanager
    def bar(self, label: str, total: int, done: int = 0) -> Iterator[Bar]:
        """A progress bar with time left; where there is no terminal, a line every minute."""
        if not self.console.is_terminal:
            yield _Lines(self.console, label, total, done)
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
        """Before and after on held-out data, and what the model says to a few prompts."""
        if "held_out" in summary:
            return  # a reward model's report, which was shown when it was made
        before, after = summary["eval_before"], summary["eval"]
        if after:
            self.console.print(_metric_table(before, after, summary["kl"]))
        for row in summary["samples"][:4]:
            self.console.print()
            for name, text in (
                ("prompt", row["prompt"]),
                ("before", row["before"]),
                ("after", row["after"]),
            ):
                self.console.print(Text(f"  {name:>6}  ", "dim") + Text(_one_line(text)))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on in silence, where rich would end the process."""
        _silence(self)


def _silence(console: Console) -> None:
    """What the console still writes, and Python at exit, goes nowhere."""
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


class _Lines:
    """For a log file: a line now and then instead of a bar."""

    EVERY_SECONDS = 60.0

    def __init__(self, console: Console, label: str, total: int, done: int) -> None:
        self._console, self._label, self._total = console, label, total
        self._done = self._first = done
        self._began = self._said = time.monotonic()

    def advance(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._said < self.EVERY_SECONDS or self._done == self._first:
            return
        self._said = now
        each = (now - self._began) / (self._done - self._first)
        left = say_seconds(each * (self._total - self._done))
        try:
            self._console.print(Text(f"  {self._label}: {self._done}/{self._total}, {left} left"))
        except OSError:
            _silence(self._console)


_ROWS = (
    ("reward", "reward", "{:+.3f}"),
    ("reward only looked at", "held_out", "{:+.3f}"),
    ("answers that end by themselves", "completions/ended", "{:.0%}"),
    ("tokens of an answer", "completions/mean_length", "{:.0f}"),
    ("prefers the chosen (own log-prob)", "logps/accuracies", "{:.1%}"),
    ("log-prob margin, nats", "logps/margins", "{:+.2f}"),
    ("log-prob of chosen, nats", "logps/chosen", "{:.2f}"),
    ("log-prob of rejected, nats", "logps/rejected", "{:.2f}"),
    ("reward accuracy (implicit)", "rewards/accuracies", "{:.1%}"),
    ("reward margin (implicit)", "rewards/margins", "{:+.3f}"),
    ("a good answer's reward beats a bad one's", "rewards/auc", "{:.1%}"),
    ("KL point of mismatched answers, nats", "kl", "{:.2f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
)


def _metric_table(
    before: Mapping[str, float], after: Mapping[str, float], kl: Mapping[str, Any] | None
) -> Table:
    table = Table(title="Held-out data", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for label, key, pattern in _ROWS:
        if after.get(key) is not None:
            first = before.get(key)
            # All implicit rewards are 0 before training: an accuracy would say nothing.
            shown = "–" if first is None or key == "rewards/accuracies" else pattern.format(first)
            table.add_row(label, shown, pattern.format(after[key]))
    if kl is not None:
        error = kl["standard_error"]
        spread = "" if error is None or error != error else f" ± {error:.2f}"
        table.add_row("KL from the reference, nats per answer", "0.00", f"{kl['mean']:.2f}{spread}")
    return table


def _one_line(text: str, limit: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
