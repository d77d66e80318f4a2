"""`mlx-align chat`: answers, turns, comparison, commands and interruptions."""

import io
import json
import signal

import pytest
from helpers.inference import dpo_config, write_adapter
from helpers.paths import TINY_MODEL
from helpers.runs import mlx_align

from mlx_align.inference.chat import Chat
from mlx_align.inference.generate import TextGenerator
from mlx_align.models.adapters import AdapterLayout
from mlx_align.types import Message

ASKED = ("Is the sun good?", "And rain?")
SHORT = ("--max-completion-length", 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "run"
    return write_adapter(folder, AdapterLayout(rank=4), dpo_config(), size=0.3)


def piped(monkeypatch, *lines):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_answers_are_those_of_separate_models_on_the_whole_conversation(run):
    talk = Chat.load(str(TINY_MODEL), run, compare=True, max_tokens=8)
    said = {}
    for question in ASKED:
        for speaker in talk.speakers:
            said[speaker.name, question] = "".join(talk.answer(speaker, question))
    # Of the cache of the first turn, what both turns share is used again.
    assert all(speaker.cache[0].offset > 20 for speaker in talk.speakers)
    for name, adapter in (("before", None), ("after", run)):
        alone = TextGenerator.load(str(TINY_MODEL), adapter)
        turns = []
        for question in ASKED:
            turns.append({"role": "user", "content": question})
            wanted = alone.generate(turns, max_tokens=8)
            assert said[name, question].strip() == wanted.strip()
            turns.append({"role": "assistant", "content": wanted.strip()})
    assert said["before", ASKED[0]] != said["after", ASKED[0]]


def test_a_long_conversation_is_refused_and_kept_as_it_was(run):
    talk = Chat.load(str(TINY_MODEL), run, max_tokens=8, max_seq_length=40, system="Be brief.")
    (speaker,) = talk.speakers
    list(talk.answer(speaker, "Hi?"))
    before = speaker.turns
    with pytest.raises(Exception, match="/reset it"):
        list(talk.answer(speaker, "word " * 40))
    assert speaker.turns == before
    talk.reset()
    assert speaker.turns == (Message("system", "Be brief."),)


def test_piped_questions_commands_and_json(run, monkeypatch, capsys):
    piped(monkeypatch, ASKED[0], "", "/reset", "/unknown", ASKED[0], "/quit", "never asked")
    assert mlx_align("chat", run, "--compare", *SHORT) == 0
    lines = capsys.readouterr().out.splitlines()
    asked = [i for i, line in enumerate(lines) if line == f"> {ASKED[0]}"]
    assert len(asked) == 2
    assert lines[asked[0] + 1].startswith("before  ")
    # After /reset the answers are the same again.
    answers = lines[asked[0] + 1 : lines.index("New conversation.")]
    assert lines[asked[1] + 1 :] == answers
    assert any(line.startswith("There is no /unknown.") for line in lines)
    piped(monkeypatch, ASKED[0])
    assert mlx_align("chat", "--model", TINY_MODEL, "--json", *SHORT) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["prompt"] == ASKED[0]
    wanted = TextGenerator.load(str(TINY_MODEL)).generate(ASKED[0], max_tokens=8)
    assert row["answer"] == {"text": wanted.strip(), "truncated": False}
    piped(monkeypatch, ASKED[0])
    assert mlx_align("chat", "--model", TINY_MODEL, "--max-tokens", 2) == 0
    assert "(stopped after 2 tokens" in capsys.readouterr().out


def test_interrupt_stops_the_answer_not_the_program(run, monkeypatch, capsys):
    answer, calls = Chat.answer, []

    def interrupted(self, speaker, question):
        for piece in answer(self, speaker, question):
            calls.append(piece)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            yield piece

    monkeypatch.setattr(Chat, "answer", interrupted)
    piped(monkeypatch, *ASKED)
    assert mlx_align("chat", run, *SHORT) == 0
    out = capsys.readouterr().out
    first, second = out.split(f"> {ASKED[1]}")
    assert first.count("(stopped)") == 1
    assert "(stopped)" not in second
    assert len(calls) > 3


def test_at_the_prompt_ctrl_c_is_no_end_and_ctrl_d_is(run, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    typed = iter([KeyboardInterrupt, "/help", EOFError])

    def read(_):
        event = next(typed)
        if isinstance(event, str):
            return event
        raise event

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    assert mlx_align("chat", run) == 0
    assert capsys.readouterr().out.count("/quit or Ctrl-D ends") == 3


def test_control_characters_of_an_answer_are_shown(run, monkeypatch, capsys):
    pieces = ("\rA", "\x1b[A", "\nB\x1b[2J")
    monkeypatch.setattr(Chat, "answer", lambda *_: (piece for piece in pieces))
    piped(monkeypatch, "?")
    assert mlx_align("chat", run) == 0
    out = capsys.readouterr().out
    assert "A\\x1b[A\nB\\x1b[2J" in out
    assert "\x1b" not in out


def test_what_can_not_be_talked_to_is_named(tmp_path, capsys):
    for arguments, said in (
        (("--model", TINY_MODEL, "--compare"), "--compare needs a run"),
        ((), "give a run (a folder that mlx-align wrote), as in mlx-align chat runs/first"),
        ((tmp_path,), "has no adapter_config.json"),
    ):
        assert mlx_align("chat", *arguments) == 1
        assert said in capsys.readouterr().err
