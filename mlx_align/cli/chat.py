"""`mlx-align chat`: a conversation with a run in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from mlx_align.cli.options import (
    Command,
    config_options,
    echo_json,
    json_option,
    options_of_run,
    run_argument,
)
from mlx_align.config import ChatConfig, make_config
from mlx_align.config.schema import require
from mlx_align.errors import DataError
from mlx_align.system.starter import resolve_starter

if TYPE_CHECKING:
    from mlx_align.inference.chat import Chat, Speaker

_PROMPT = "> "
_HELP = "/reset begins a new conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer."


@click.command(cls=Command, short_help="Talk to a run, and to the model it started from.")
@run_argument
@config_options(ChatConfig)
@json_option("Print a JSON object per question; all else goes to stderr.")
def chat(json: bool, **options: Any) -> None:
    """Talk to a run in the terminal, through the model's chat template.

    With --compare, the model that the run started from answers each question first, in its
    own conversation. Both share one copy of the weights. Without RUN, --model alone is what
    you talk to.

    /reset begins a new conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer. Questions can be
    piped in, one per line.
    """
    from mlx_align.inference.chat import Chat
    from mlx_align.system.console import Console

    config = make_config(ChatConfig, options_of_run(options), None, "command line")
    require(config, "model")
    assert config.model is not None
    console = Console(json)
    talk = Chat.load(
        resolve_starter(config.model, "model"),
        config.adapter_path,
        compare=config.compare,
        thinking=config.thinking,
        system=config.system,
        max_tokens=config.max_completion_length,
        max_seq_length=config.max_seq_length,
        temperature=config.temperature,
        seed=config.seed,
    )
    for note in talk.style.notes_on(chats=True, text=False):
        console.note(f"! {note}")
    interactive = sys.stdin.isatty()
    if interactive:
        console.note(_HELP)
    for line in _questions(interactive, console.note):
        if line in ("/quit", "/exit"):
            break
        if line == "/reset":
            talk.reset()
            console.note("New conversation.")
        elif line == "/help":
            console.note(_HELP)
        elif line.startswith("/") and line[1:].isalpha():
            console.note(f"There is no {line}. {_HELP}")
        elif json:
            echo_json(_answers(talk, line), ascii=False)
        else:
            if not interactive:
                console.note(f"{_PROMPT}{line}")
            for speaker in talk.speakers:
                _show_answer(talk, speaker, line)


def _questions(interactive: bool, note: Any) -> Iterator[str]:
    """Lines that are typed or piped in, without empty ones."""
    if not interactive:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (input() then edits lines and has a history)
    while True:
        try:
            line = _read_line()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            note(_HELP)
            continue
        if line.strip():
            yield line.strip()


def _read_line() -> str:
    """A typed line; Ctrl-C raises KeyboardInterrupt here, and does not end the program."""
    import signal

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return input(_PROMPT)
    finally:
        signal.signal(signal.SIGINT, before)


def _pieces(talk: Chat, speaker: Speaker, line: str) -> Iterator[str]:
    """An answer in pieces; Ctrl-C ends it."""
    from mlx_align.system.interrupts import stop_on_interrupt

    with stop_on_interrupt() as stopped:
        answer = talk.answer(speaker, line)
        for piece in answer:
            yield piece
            if stopped:
                answer.close()
                yield " (stopped)"
                return
    if speaker.truncated:
        yield f" … (stopped after {talk.max_tokens} tokens; --max-completion-length)"


def _show_answer(talk: Chat, speaker: Speaker, line: str) -> None:
    """Print an answer while it is generated."""
    from mlx_align.system.terminal import escape_controls

    several = len(talk.speakers) > 1
    try:
        started = False
        for piece in _pieces(talk, speaker, line):
            if not started and several:
                sys.stdout.write(f"{speaker.name:>6}  ")
            text = piece if started else piece.lstrip()
            started = True
            # Newlines pass; a return or an escape sequence of the model is shown as text.
            sys.stdout.write(escape_controls(text))
            sys.stdout.flush()
        if not started:
            sys.stdout.write(f"{speaker.name:>6}  (nothing)" if several else "(nothing)")
        sys.stdout.write("\n")
        sys.stdout.flush()
    except DataError as error:
        click.echo(f"error: {error}", err=True)


def _answers(talk: Chat, line: str) -> dict[str, Any]:
    """A question and the answers, by who gave them."""
    found: dict[str, Any] = {"prompt": line}
    for speaker in talk.speakers:
        try:
            for _ in talk.answer(speaker, line):
                pass
        except DataError as error:
            return {**found, "error": str(error)}
        text = speaker.turns[-1].content
        found[speaker.name] = {"text": text, "truncated": speaker.truncated}
    return found
