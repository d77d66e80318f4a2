"""`mlx-align constitution`: critiques, revisions and comparisons by principles."""

import json
from collections import Counter

import pytest
from helpers.data import read_rows, user, write_rows
from helpers.endpoints import Reply, serve
from helpers.paths import STARTER
from helpers.runs import mlx_align

from mlx_align.data.formats import read_preferences, read_supervised
from mlx_align.errors import ConfigError
from mlx_align.preferences.constitution import (
    RevisedPrompt,
    candidate_pairs,
    render_samples,
    report_revisions,
)
from mlx_align.preferences.lineage import model_lineage
from mlx_align.preferences.principles import Principle, read_constitution
from mlx_align.preferences.writers import Written
from mlx_align.types import PromptGroup

RULES = """
principles:
  - name: short
    critique: What is too long?
    revision: Make it shorter.
    comparison: shorter
  - name: kind
    principle: It is kind.
"""


def writer(request, *, refuse=""):
    """Answers with "long … ID", criticises, and revises by dropping "long"; judges by length."""
    turns = request["messages"]
    last = turns[-1]["content"]
    if "Which answer is better?" in last:
        shown = [last.split(f"[Answer {x}]\n")[1].split("\n[End")[0] for x in "AB"]
        first = 0.8 if len(shown[0]) < len(shown[1]) else 0.2
        return Reply("A", {"A": first, "B": 1 - first})
    if "Reply with the new answer only." in last:
        if refuse and refuse in turns[0]["content"]:
            return Reply("")
        if "kind" in last:
            return Reply(turns[-4]["content"] if len(turns) > 4 else turns[1]["content"])
        return Reply(f"short {turns[0]['content']}")
    if "too long?" in last or "falls short" in last:
        assert turns[-2]["role"] == "assistant"
        return Reply("It could be better.")
    return Reply(f"long long answer {request['seed'] % 7} to {last}")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.yaml").write_text(RULES)
    write_rows("prompts.jsonl", [{"prompt": user(f"p{i}")} for i in range(24)])
    return tmp_path


def constitution(url, *options, output="out"):
    where = ("--url", url, "--model", "w", "--data", "prompts.jsonl", "--output", output)
    return mlx_align("constitution", *where, "--constitution", "rules.yaml", *options)


def test_every_step_is_kept_and_both_files_can_be_trained_on(folder, capsys):
    with serve(writer) as (url, requests):
        assert constitution(url, "--allow-unproven") == 0
    steps = read_rows("out/steps.jsonl")
    assert Counter(step["stage"].split()[0] for step in steps) == {
        "answer": 48, "critique": 24, "revision": 24,
    }  # fmt: skip
    principle = {"short": "Make it shorter.", "kind": "It is kind."}
    for step in steps:
        if step["stage"] == "revision 0":
            assert principle[step["principle"]] in step["request"]
    # A revision is requested with the answer and its critique in the conversation.
    (conversation,) = [
        request["messages"]
        for request in requests
        if request["messages"][0]["content"] == "p3" and len(request["messages"]) == 5
    ]
    assert [turn["role"] for turn in conversation] == ["user", "assistant"] * 2 + ["user"]
    assert conversation[3]["content"] == "It could be better."
    report = json.loads((folder / "out" / "report.json").read_text())["revisions"]
    # "kind" revisions repeat the answer, "short" ones don't: the principle decides.
    kind = sum(s["principle"] == "kind" for s in steps if s["stage"] == "revision 0")
    assert 0 < kind < 24
    assert (report["revised"], report["changed"]) == (24, 24 - kind)
    assert report["share_changed"] == pytest.approx(1 - kind / 24)
    assert report["by_principle"]["kind"] == [kind, 0.0]
    assert f"{24 - kind} of 24 revised answers changed" in capsys.readouterr().out
    groups, read = read_supervised("out/revisions.jsonl")
    assert (len(groups), read.format) == (24, "completion")
    pairs, read = read_preferences("out/pairs.jsonl")
    assert read.format == "pairs"
    # The judge prefers the shorter answer, with 4 to 1 in both orders.
    for pair in pairs:
        assert len(pair.completions[0][0].content) < len(pair.completions[1][0].content)
        assert pair.soft_label == pytest.approx(0.8)
        assert pair.columns["principle"] in ("short", "kind")
    samples = (folder / "out" / "samples.md").read_text()
    assert samples.count("**Critique**") == 12
    assert "> It could be better." in samples


def test_comparisons_are_by_the_principle_of_the_pair(folder):
    with serve(writer) as (url, requests):
        assert constitution(url, "--allow-unproven") == 0
    asked = [r["messages"][0]["content"] for r in requests if "Which answer" in str(r["messages"])]
    named = [("- short: shorter" in text) + ("- kind: It is kind." in text) for text in asked]
    assert set(named) == {1}
    assert len(asked) % 2 == 0


def test_an_interrupted_command_continues_and_ends_the_same(folder, capsys):
    with serve(writer) as (url, requests):
        assert constitution(url, "--allow-unproven", output="whole") == 0
        total = len(requests)
    count = 0

    def dies(request):
        nonlocal count
        count += 1
        return Reply("stop", code=401) if 60 < count < 1000 else writer(request)

    # The address is part of what determines a text, so both calls have the same.
    with serve(dies) as (url, requests):
        assert constitution(url, "--allow-unproven") == 1
        kept = len(read_rows("out/steps.jsonl"))
        assert 0 < kept <= 60
        assert not (folder / "out" / "report.json").exists()
        count = 1000
        assert constitution(url, "--allow-unproven") == 0
        assert f"continuing: {kept} texts" in capsys.readouterr().out
        assert count - 1000 == total - kept
        assert constitution(url, "--allow-unproven") == 1
    assert "is finished; name a new folder" in capsys.readouterr().err
    for name in ("revisions", "pairs"):
        one, other = (
            [[row["prompt"], row.get("completion"), row.get("chosen")] for row in read_rows(file)]
            for file in (f"whole/{name}.jsonl", f"out/{name}.jsonl")
        )
        assert one == other


def test_answers_without_a_revision_are_counted_and_left_out(folder):
    with serve(lambda request: writer(request, refuse="p1")) as (url, _):
        assert constitution(url, "--no-pairs", "--rounds", 2) == 0
    report = json.loads((folder / "out" / "report.json").read_text())["revisions"]
    refused = sum(f"p{i}".startswith("p1") for i in range(24))
    assert report["problems"] == {"revision: empty": refused}
    assert report["written"] == 24 - refused
    assert not (folder / "out" / "pairs.jsonl").exists()
    rows = read_rows("out/revisions.jsonl")
    assert {tuple(sorted(row["principles"])) for row in rows} == {("kind", "short")}


def test_the_judge_is_measured_first(folder, capsys):
    human = [
        {"prompt": f"q{i}", "chosen": "a" * (2 + i % 3), "rejected": "b" * 9} for i in range(20)
    ]
    write_rows("human.jsonl", human)
    with serve(writer) as (url, _):
        assert constitution(url) == 1
        assert "--human is missing" in capsys.readouterr().err
        assert constitution(url, "--human", "human.jsonl") == 0
    assert "Agreement with people: 100.0%" in capsys.readouterr().out
    row = read_rows("out/pairs.jsonl")[0]
    assert row["soft_label"] == pytest.approx(21 / 22, abs=0.01)
    assert row["provenance"]["agreement_pairs"] == 20


def test_options_without_effect_are_errors(folder, capsys):
    for options, message in [
        (("--no-pairs", "--human", "x"), "--human: has no effect with --no-pairs"),
        (("--no-pairs", "--rounds", 0), "leaves nothing to do"),
        (("--answers", 1, "--rounds", 0), "no two answers to compare"),
        (("--judge-url", "http://127.0.0.1/v1"), "--judge-url needs --judge-model"),
        (("--temperature", 0), "makes all answers the same"),
        (("--adapter-path", "run"), "--adapter-path: has no effect with --url"),
    ]:
        assert constitution("http://127.0.0.1:9/v1", *options) == 1
        assert message in capsys.readouterr().err


def test_a_model_in_memory_writes_and_judges(folder):
    """The starter answers any request in a sentence: every step runs, and it is its own judge."""
    write_rows("prompts.jsonl", read_rows(STARTER / "valid.jsonl")[:3])
    options = ("--max-completion-length", 60, "--min-verdict-mass", 0, "--ties", "half")
    where = ("--model", STARTER / "model", "--data", "prompts.jsonl", "--output", "out")
    assert mlx_align("constitution", *where, "--allow-unproven", *options) == 0
    steps = read_rows("out/steps.jsonl")
    assert [step["stage"] for step in steps[:6]] == ["answer 0"] * 3 + ["answer 1"] * 3
    assert len(read_rows("out/revisions.jsonl")) >= 1
    for name in ("revisions", "pairs"):
        about = read_rows(f"out/{name}.jsonl")[0]["provenance"]
        assert about["judge_lineage"] == list(model_lineage(STARTER / "model"))
    # Training the same model on its own revisions is circular.
    sft = ("sft", "--model", STARTER / "model", "--data", "out/revisions.jsonl", "--iters", 1)
    assert mlx_align(*sft, "--output", "run") == 1


def test_constitutions_are_read(tmp_path):
    shipped = read_constitution(None)
    assert "harmless" in [principle.name for principle in shipped]
    file = tmp_path / "c.yaml"
    file.write_text("- Be brief.\n- {name: x, critique: c, revision: r, comparison: k}\n")
    first, second = read_constitution(file)
    assert first.name == "principle 1"
    assert "Be brief." in first.critique
    assert first.comparison == "Be brief."
    assert second == Principle("x", "c", "r", "k")
    for text, message in [
        ("principles: []", "expected `principles:`"),
        ("- {name: x, critique: c}", "principle 1: has no 'revision'"),
        ("- {rule: x}", "unknown key 'rule'"),
        ("- {name: a, principle: b}\n- {name: a, principle: c}", "two principles are named 'a'"),
        ("- [1]", "expected a sentence or a mapping"),
        ("a: [", "not YAML"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
            read_constitution(file)


def test_report_and_pairs_by_hand():
    rule = Principle("r", "c", "v", "k")
    same, other, bad = (
        RevisedPrompt(PromptGroup(f"p{i}", (), f"f:{i}"), [Written("an answer")], [rule])
        for i in range(3)
    )
    same.critiques, same.revisions = ["x"], ["an  answer "]
    other.critiques, other.revisions = ["x"], ["something else here"]
    bad.problem = "revision: empty"
    report = report_revisions([same, other, bad])
    assert (report.prompts, report.revised, report.changed) == (3, 2, 1)
    assert report.words == (2.0, 2.5)
    pairs = candidate_pairs([other, bad], [rule], "w", 0)
    assert len(pairs) == 1
    assert {pairs[0].a[0].content, pairs[0].b[0].content} == {"an answer", "something else here"}
    assert "Not changed." in render_samples([same], 5, 0)
