"""Circular runs: a judge that is the policy, or was trained from it, is refused or shown."""

import pytest
from helpers.data import assistant, user, write_rows
from helpers.paths import TINY_MODEL
from helpers.runs import mlx_align

from mlx_align.data.provenance import check_circularity, judges_of
from mlx_align.errors import ConfigError
from mlx_align.preferences.lineage import model_lineage
from mlx_align.tracking.run_dir import read_run_record
from mlx_align.types import PromptGroup

SHORT = ("--iters", 1, "--samples", 0, "--val-batches", 1)


def judged_by(lineage, name="the judge", count=12):
    """Pairs that a judge of this lineage labelled."""
    about = {"judge": name, "judge_lineage": list(lineage)}
    return write_rows(
        "judged.jsonl",
        [
            {"prompt": user(f"{i}?"), "chosen": assistant("yes"), "rejected": assistant("no")}
            | {"provenance": about}
            for i in range(count)
        ],
    )


def test_lineage_of_runs(train, pairs):
    base = model_lineage(TINY_MODEL)
    assert len(base) == 1
    _, first = train("sft", *SHORT, data=pairs, output="first")
    _, second = train("dpo", *SHORT, "--init-adapter", first, data=pairs, output="second")
    one, two = model_lineage(TINY_MODEL, first), model_lineage(TINY_MODEL, second)
    assert one[1:] == base
    assert two[1:] == one
    assert len(set(two)) == 3
    # A checkpoint belongs to its run.
    checkpoint = next((second / "checkpoints").iterdir())
    assert model_lineage(TINY_MODEL, checkpoint)[-2:] == one


@pytest.mark.parametrize(
    ("policy", "judge", "relation"),
    [
        (("a",), ("a",), "is the model"),
        (("a",), ("b", "a"), "was trained from the model"),
        (("b",), ("c", "b", "a"), "was trained from the model"),
        (("b",), ("a",), ""),  # the judge is what the policy started from
        (("b",), ("c", "a"), ""),  # another run on the same base
        (("a",), (), ""),
    ],
)
def test_what_is_circular(policy, judge, relation):
    assert relation in check_circularity(policy, {"J": judge}, allow=True)
    if relation:
        with pytest.raises(ConfigError, match=r"by J, which .*--allow-circular"):
            check_circularity(policy, {"J": judge}, allow=False)
    else:
        assert check_circularity(policy, {"J": judge}, allow=False) == ""


def test_rows_without_a_judge_are_nobodys():
    group = PromptGroup("p", ("a", "b"), "x:1")
    assert judges_of([group]) == {}
    found = [PromptGroup("p", (), "x", columns={"provenance": one}) for one in ("text", {}, [1])]
    assert judges_of(found) == {}


def test_a_circular_run_is_refused_or_shown_on_its_page(train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = judged_by(model_lineage(TINY_MODEL))
    for command in ("dpo", "kto", "reward"):
        code, run = train(command, *SHORT, data=data)
        assert code == 1
        assert "the labels are by the judge, which is the model to train" in capsys.readouterr().err
        assert not run.exists()
    code, run = train("dpo", *SHORT, "--allow-circular", data=data)
    assert code == 0
    assert "! Circular: the labels are by the judge" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert "Circular: the labels are by the judge, which is the model to train." in page
    assert list(read_run_record(run).data_statistics["judges"]) == ["the judge"]


def test_another_judge_is_not_circular(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, run = train("dpo", *SHORT, data=judged_by(["0123"]))
    assert code == 0
    assert "Circular" not in (run / "report.html").read_text()


def test_a_reward_model_passes_its_judges_on(train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = judged_by(model_lineage(TINY_MODEL))
    assert train("reward", *SHORT, "--allow-circular", data=data, output="rm")[0] == 0
    prompts = write_rows("prompts.jsonl", [{"prompt": user(f"{i}?")} for i in range(8)])
    grpo = (
        "grpo", "--model", TINY_MODEL, "--data", prompts, "--reward-model", "rm",
        "--max-completion-length", 4, "--group-size", 2, *SHORT,
    )  # fmt: skip
    capsys.readouterr()
    assert mlx_align(*grpo, "--output", "refused") == 1
    assert "which is the model to train" in capsys.readouterr().err
    assert mlx_align(*grpo, "--output", "allowed", "--allow-circular") == 0
    assert "Circular" in (tmp_path / "allowed" / "report.html").read_text()
