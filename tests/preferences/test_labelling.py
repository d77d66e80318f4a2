"""`mlx-align label` in the terminal and over HTTP: order, undo, skips, notes, and nothing lost."""

import http.client
import json
import os
import signal
import subprocess
import sys

import pytest
from helpers.data import read_rows, user, write_rows

from mlx_align.cli.main import run as run_command
from mlx_align.data.formats import read_preferences
from mlx_align.data.judgements import pair_answers
from mlx_align.preferences.label_web import LabelServer, safe_markdown
from mlx_align.preferences.labelling import LabelSession
from mlx_align.preferences.records import JudgementLog
from mlx_align.types import Message

CRITERIA = {"helpful": "does what is wanted", "honest": ""}


def answers(count=3):
    return [
        {"prompt": user(f"{n} + 1?"), "completions": [f"good {n + 1}", f"bad {n}"]}
        for n in range(count)
    ]


@pytest.fixture
def pairs():
    prompt = (Message("user", "Which?"),)
    return [
        pair_answers(prompt, tuple((Message("assistant", f"{w} {n}"),) for w in ("good", "bad")))
        for n in range(6)
    ]


@pytest.fixture
def session(pairs, tmp_path):
    return LabelSession(pairs, JudgementLog(tmp_path / "labels.jsonl"), CRITERIA)


def good_first(task):
    return task.answers[0][0].content.startswith("good")


def label_all(session, rater):
    while (task := session.next(rater)) is not None:
        session.judge(rater, task.pair.id, "1" if good_first(task) else "2")


# The session


def test_what_is_chosen_is_written_in_whichever_order_it_was_shown(session, tmp_path):
    label_all(session, "ana")
    label_all(session, "ben")
    rows = read_rows(tmp_path / "labels.jsonl")
    for row in rows:
        (winner,) = row[f"response_{row['winner']}"]
        assert winner["content"].startswith("good")
        assert row["seconds"] >= 0
        assert row["time"].endswith("Z")
        assert row["criteria"] == {"helpful": None, "honest": None}
    assert {row["shown_first"] for row in rows} == {"a", "b"}
    assert session.progress("ana").done == 6
    # Both raters have the same pairs in the same order, but see the answers in other orders.
    first, second = rows[:6], rows[6:]
    assert [row["pair"] for row in first] == [row["pair"] for row in second]
    assert [row["shown_first"] for row in first] != [row["shown_first"] for row in second]


def test_the_order_is_the_same_after_a_restart_and_half_are_swapped(pairs, tmp_path):
    many = [
        pair_answers(
            (Message("user", str(n)),), ((Message("assistant", "x"),), (Message("assistant", "y"),))
        )
        for n in range(400)
    ]
    log = JudgementLog(tmp_path / "labels.jsonl")
    orders = [
        [LabelSession(many, log, {}, seed=seed).task("ana", one.id).shown_first for one in many]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert 160 < orders[0].count("a") < 240


def test_skipped_pairs_come_last_and_once_more(session, pairs):
    first = session.next("ana").pair
    session.judge("ana", first.id, "s")
    assert session.next("ana").pair != first
    for _ in range(5):
        session.judge("ana", session.next("ana").pair.id, "=")
    assert session.next("ana").pair == first
    session.judge("ana", first.id, "s")
    assert session.next("ana") is None
    assert session.progress("ana").skipped == 1
    again = LabelSession(pairs, JudgementLog(session._log.file), CRITERIA)
    assert again.next("ana").pair == first


def test_undo_takes_back_one_verdict_after_the_other(session, tmp_path):
    given = [session.next("ana").pair]
    session.judge("ana", given[0].id, "1")
    given.append(session.next("ana").pair)
    session.judge("ana", given[1].id, "?")
    session.judge("ben", given[0].id, "1")
    assert session.undo("ana") == given[1]
    assert session.next("ana").pair == given[1]
    assert session.undo("ana") == given[0]
    assert session.undo("ana") is None
    assert session.progress("ana").done == 0
    assert session.progress("ben").done == 1
    rows = read_rows(tmp_path / "labels.jsonl")
    assert [row["winner"] for row in rows if row["rater"] == "ana"][2:] == ["undone", "undone"]


# The terminal


def in_terminal(monkeypatch, keys, *arguments):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(keys))
    return run_command(["label", *map(str, arguments)])


def test_keys_in_the_terminal(tmp_path, monkeypatch, capsys):
    file = write_rows(tmp_path / "answers.jsonl", answers(5))
    output = tmp_path / "labels.jsonl"
    keys = "x 1 nbecause\nc12s 2 = u ? q"
    assert in_terminal(monkeypatch, keys, file, "--output", output, "--rater", "ana") == 0
    rows = read_rows(output)
    assert [row["winner"] in ("a", "b") for row in rows] == [True, True, False, False, False]
    assert [row["winner"] for row in rows[2:]] == ["tie", "undone", "unsure"]
    assert rows[2]["pair"] == rows[4]["pair"]
    assert rows[1]["note"] == "because"
    first = rows[1]["shown_first"]
    assert rows[1]["criteria"]["helpful"] == first
    assert rows[1]["criteria"]["honest"] == {"a": "b", "b": "a"}[first]
    assert rows[1]["criteria"]["harmless"] is None
    shown = capsys.readouterr().out
    assert "2 verdicts in" in shown
    # The same command goes to the pairs that are left.
    assert in_terminal(monkeypatch, "11", file, "--output", output, "--rater", "ana") == 0
    rows = read_rows(output)
    assert len({row["pair"] for row in rows}) == 5
    assert "All pairs are judged" in capsys.readouterr().out
    groups, report = read_preferences(output)
    assert len(groups) == 4
    assert sum(report.dropped.values()) == 1


def test_by_criterion_asks_first_and_quits_in_between(tmp_path, monkeypatch):
    file = write_rows(tmp_path / "answers.jsonl", answers(2))
    rubric = tmp_path / "rubric.yaml"
    rubric.write_text("criteria:\n  correct: the sum is right\n  brief:\n")
    output = tmp_path / "labels.jsonl"
    keys = "1=2 1 q"
    arguments = (file, "--output", output, "--by-criterion", "--rubric", rubric)
    assert in_terminal(monkeypatch, keys, *arguments) == 0
    (row,) = read_rows(output)
    assert set(row["criteria"]) == {"correct", "brief"}
    assert row["criteria"]["brief"] == "tie"
    assert row["winner"] != row["shown_first"]


def test_text_of_the_data_does_not_reach_the_terminal_as_codes(tmp_path, monkeypatch, capsys):
    row = {"prompt": "hi \x1b[2J", "completions": ["one \x1b]0;x\x07", "two\u202e"]}
    file = write_rows(tmp_path / "answers.jsonl", [row])
    assert in_terminal(monkeypatch, "1", file, "--output", tmp_path / "labels.jsonl") == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\u202e" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", "80000"), "--port 80000: out of range"),
        (("--open",), "--open: has no effect without --web"),
        (("--n", "2"), "-n: has no effect"),
        (("--rater", " "), "rater: expected a name"),
        (("--rubric", "missing.yaml"), "--rubric missing.yaml: can't be read"),
    ],
)
def test_wrong_options_are_named(tmp_path, monkeypatch, capsys, arguments, message):
    file = write_rows(tmp_path / "answers.jsonl", answers(1))
    arguments = tuple("-n" if one == "--n" else one for one in arguments)
    output = tmp_path / "labels.jsonl"
    assert in_terminal(monkeypatch, "", file, "--output", output, *arguments) == 1
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_prompts_need_a_model(tmp_path, monkeypatch, capsys):
    file = write_rows(tmp_path / "prompts.jsonl", [{"prompt": user("hi")}])
    assert in_terminal(monkeypatch, "", file, "--output", tmp_path / "l.jsonl") == 1
    assert "give --model to sample answers" in capsys.readouterr().err


# The browser


class Browser:
    """Requests as the page makes them."""

    def __init__(self, server):
        self.server = server

    def request(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=10)
        sent = {"X-Token": self.server.token, "Content-Type": "application/json", **headers}
        sent = {name: value for name, value in sent.items() if value is not None}
        content = body if body is None or isinstance(body, str) else json.dumps(body)
        connection.request(method, path, content, sent)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text, answer.headers

    def json(self, method, path, body=None):
        status, text, _ = self.request(method, path, body)
        return status, json.loads(text)


@pytest.fixture
def browser(session):
    with LabelServer(session) as server:
        yield Browser(server)


def test_a_verdict_over_http(browser, session, tmp_path):
    status, state = browser.json("GET", "/api/state?rater=ana")
    assert (status, state["done"], state["total"]) == (200, 0, 6)
    assert "good" in "".join(state["pair"]["answers"])
    assert not {"source", "model", "authors"} & set(json.dumps(state).split('"'))
    body = {"rater": "ana", "pair": state["pair"]["id"], "choice": "2", "note": "n"}
    status, after = browser.json("POST", "/api/judge", {**body, "criteria": {"honest": "1"}})
    assert (status, after["done"]) == (200, 1)
    (row,) = read_rows(tmp_path / "labels.jsonl")
    other = {"a": "b", "b": "a"}[row["shown_first"]]
    assert (row["winner"], row["criteria"]["honest"]) == (other, row["shown_first"])
    assert row["note"] == "n"
    status, back = browser.json("POST", "/api/undo", {"rater": "ana"})
    assert (back["done"], back["pair"]["id"]) == (0, state["pair"]["id"])
    # Another rater has all pairs yet.
    assert browser.json("GET", "/api/state?rater=ben")[1]["done"] == 0


def test_without_token_or_with_another_host_nothing_is_shown(browser):
    for headers in (
        {"X-Token": None},
        {"X-Token": "wrong"},
        {"X-Token": "ü".encode().decode("latin-1")},
        {"Host": "evil.example"},
        {"Host": f"evil.example:{browser.server.port}"},
    ):
        for path in ("/", "/api/state?rater=ana"):
            assert browser.request("GET", path, **headers)[0] == 403
        for path in ("/api/judge", "/api/undo", "/api/quit"):
            assert browser.request("POST", path, {"rater": "ana"}, **headers)[0] == 403
    # A form of another site could only send the token in the address, which isn't enough.
    path = f"/api/undo?token={browser.server.token}"
    assert browser.request("POST", path, {"rater": "ana"}, **{"X-Token": None})[0] == 403


def test_the_page_and_its_policy(browser):
    status, page, headers = browser.request(
        "GET", f"/?token={browser.server.token}", **{"X-Token": None}
    )
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert page.count(f'nonce="{nonce}"') == 2
    assert "NONCE" not in page
    facts = page.split("const PAGE = ")[1].split(";\n")[0]
    assert list(json.loads(facts)["choices"]) == ["1", "2", "=", "?", "s"]
    assert "@FACTS@" not in page
    assert browser.server.token not in page
    assert browser.server._server.server_address[0] == "127.0.0.1"
    again = browser.request("GET", f"/?token={browser.server.token}")[2]
    assert nonce not in again["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"pair": "nothing"}, "unknown; reload the page"),
        ({"choice": "3"}, "expected one of 1 2 = ? s"),
        ({"criteria": {"funny": "1"}}, "criterion 'funny'"),
        ({"criteria": {"honest": "?"}}, "expected 1 2 ="),
        ({"criteria": [1]}, "criteria: expected"),
        ({"rater": ""}, "rater: expected a name"),
        ({"rater": 5}, "rater: expected a name"),
    ],
)
def test_a_wrong_request_is_refused_and_nothing_written(browser, tmp_path, body, message):
    pair = browser.json("GET", "/api/state?rater=ana")[1]["pair"]["id"]
    status, found = browser.json(
        "POST", "/api/judge", {"rater": "ana", "pair": pair, "choice": "1", **body}
    )
    assert status == 400
    assert message in found["error"]
    assert not (tmp_path / "labels.jsonl").exists()


def test_requests_that_are_not_json_or_too_large(browser):
    assert browser.request("POST", "/api/judge", "{")[0] == 400
    assert browser.request("POST", "/api/judge", "[1]")[0] == 400
    assert browser.request("POST", "/api/judge", "", **{"Content-Length": "9999999"})[0] == 413
    assert browser.request("POST", "/api/nothing", {})[0] == 404
    assert browser.request("GET", "/../etc/passwd")[0] == 404


@pytest.mark.parametrize(
    ("markdown", "absent", "present"),
    [
        ("<script>alert(1)</script>", "<script", "&lt;script&gt;"),
        ("<img src=x onerror=alert(1)>", "<img", "&lt;img"),
        ("![x](https://evil.example/a.png)", "<img", "!"),
        ("[x](javascript:alert(1))", "href", "javascript"),
        ("[x](data:text/html,hi)", "href", "data"),
        ("[x](https://a.example 'q\" onclick=1')", '" onclick', "noopener"),
        ("`<b>`\n\n| a |\n|---|\n| <i> |", "<b>", "<table>"),
    ],
)
def test_markdown_is_safe(markdown, absent, present):
    found = safe_markdown().render(markdown)
    assert absent not in found
    assert present in found


def test_ctrl_c_loses_nothing_and_the_same_command_continues(tmp_path):
    """The whole command, in the browser's mode: a verdict over HTTP, then SIGINT."""
    file = write_rows(tmp_path / "answers.jsonl", answers(3))
    output = tmp_path / "labels.jsonl"
    command = [sys.executable, "-m", "mlx_align", "label", str(file), "--output", str(output)]
    process = subprocess.Popen(
        [*command, "--web"], stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    try:
        line = ""
        while "token=" not in line:
            line = process.stdout.readline()
            assert line, "the server didn't start"
        port, token = line.split(":")[2].split("/")[0], line.split("token=")[1].strip()

        class Server:
            pass

        server = Server()
        server.port, server.token = int(port), token
        page = Browser(server)
        pair = page.json("GET", "/api/state?rater=ana")[1]["pair"]["id"]
        body = {"rater": "ana", "pair": pair, "choice": "="}
        assert page.json("POST", "/api/judge", body)[0] == 200
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.stdout.close()
    assert "1 verdicts in" in rest
    assert [row["winner"] for row in read_rows(output)] == ["tie"]
