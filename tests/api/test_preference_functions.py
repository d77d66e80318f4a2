"""`sample`, `judge`, `agreement`, `constitution` and `improve` without the command line."""

import inspect
import pydoc
from pathlib import Path

import pytest
from helpers.data import assistant, read_rows, user, write_rows
from helpers.paths import STARTER, STARTER_MODEL

import mlx_align as ma
from mlx_align import api, config
from mlx_align.config.schema import declared_options
from mlx_align.data.judgements import Judgement, pair_answers
from mlx_align.types import Message

FUNCTIONS = {
    "sample": "SampleConfig",
    "judge": "JudgeConfig",
    "agreement": "AgreementConfig",
    "constitution": "ConstitutionConfig",
    "improve": "ImproveConfig",
}


def brief(completions, **columns):
    """The shorter answer is better."""
    return [-len(text) for text in completions]


@pytest.fixture
def starter_prompts():
    """Prompts that the starter model answers with an end."""
    return [{"prompt": row["prompt"]} for row in read_rows(STARTER / "train.jsonl")[:6]]


def labelled(count):
    return [
        {
            "prompt": user(f"question {n}"),
            "chosen": assistant("short"),
            "rejected": assistant(f"long, long answer {n}"),
        }
        for n in range(count)
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_describes_every_option(name):
    function = getattr(ma, name)
    assert function is getattr(api, name)
    signature = inspect.signature(function)
    text = pydoc.render_doc(function, renderer=pydoc.plaintext)
    for option, declared in declared_options(getattr(config, FUNCTIONS[name])).items():
        assert option in signature.parameters
        assert f"{option}: " in text
        if not declared.required:
            assert signature.parameters[option].default == declared.default
    assert "--" not in function.__doc__.replace("--json", "")
    assert "Returns:" in text
    assert "Raises:" in text


def test_a_python_function_judges_rows(capsys):
    rows = [{"prompt": user(f"q {n}"), "completions": ["a" * 9, "b" * (n + 1)]} for n in range(5)]
    found = ma.judge(data=rows, human=labelled(30), reward=brief, output="judged.jsonl")
    assert found["judge"]["agreement"]["value"] == 1
    assert (found["pairs"], found["written"]) == (5, 5)
    assert "Agreement with people: 100.0%" in capsys.readouterr().out
    assert {row["chosen"][0]["content"][0] for row in read_rows("judged.jsonl")} == {"b"}
    with pytest.raises(ma.ConfigError, match="no judge; give model"):
        ma.judge(data=rows, output="other.jsonl", progress=False)
    with pytest.raises(ma.ConfigError, match="allow_unproven"):
        ma.judge(data=rows, reward=brief, output="other.jsonl", progress=False)
    with pytest.raises(ma.ConfigError, match="exists already"):
        ma.judge(data=rows, reward=brief, output="judged.jsonl", progress=False)
    assert not Path("other.jsonl").exists()


def test_another_function_of_the_same_name_is_another_judge():
    rows = [{"prompt": user("q"), "completions": ["a" * 9, "bb"]}]

    def rule(completions, **columns):
        return [-len(text) for text in completions]

    options = {"data": rows, "allow_unproven": True, "output": "judged.jsonl", "progress": False}
    ma.judge(reward=rule, **options)
    Path("judged.jsonl").unlink()

    def rule(completions, **columns):
        return [len(text) for text in completions]

    ma.judge(reward=rule, **options)
    (row,) = read_rows("judged.jsonl")
    assert row["chosen"][0]["content"] == "a" * 9


def test_agreement_of_files():
    pairs = [
        pair_answers((Message("user", str(n)),), tuple((Message("assistant", x),) for x in "xy"))
        for n in range(4)
    ]
    for rater in ("ana", "ben"):
        judgements = [Judgement(pair, "a", rater) for pair in pairs[:3]]
        judgements.append(Judgement(pairs[3], "b", rater))
        write_rows(f"{rater}.jsonl", [one.to_dict() for one in judgements])
    found = ma.agreement(["ana.jsonl", Path("ben.jsonl")], output="pairs.jsonl", progress=False)
    assert found["alpha_nominal"]["value"] == 1
    assert (found["pairs"], found["written"]) == (4, 4)
    assert len(read_rows("pairs.jsonl")) == 4
    assert len(ma.agreement("ana.jsonl", progress=False)["raters"]) == 1
    with pytest.raises(ma.ConfigError, match="min_agreement"):
        ma.agreement("ana.jsonl", min_agreement=0.2)


def test_sampled_answers_are_revised_and_compared(starter_prompts, capsys):
    short = {"model": STARTER_MODEL, "data": starter_prompts[:3], "max_completion_length": 30}
    found = ma.sample(**short, n=2, output="answers.jsonl")
    assert found["lines"] <= 3
    assert "Wrote" in capsys.readouterr().out
    best = ma.sample(**short, n=2, reward=brief, output="best.jsonl", progress=False)
    assert best["rows"] == len(read_rows("best.jsonl"))
    assert capsys.readouterr().out == ""
    made = ma.constitution(
        **short,
        output="constitution",
        rounds=0,
        min_verdict_mass=0.0,
        allow_unproven=True,
        progress=False,
    )
    assert Path("constitution", "steps.jsonl").is_file()
    assert set(made) == {"output", "revisions", "judge", "pairs"}


def test_rounds_with_python_functions(starter_prompts):
    def letters(completions, **columns):
        return [sum(map(str.isalpha, text)) for text in completions]

    Path("dpo.yaml").write_text("batch_size: 2\nvalid_fraction: 0\nsamples: 0\nval_batches: 1\n")
    options = {
        "model": STARTER_MODEL,
        "data": {"train": starter_prompts[:4], "valid": starter_prompts[4:]},
        "train_config": "dpo.yaml",
        "iters": 1,
        "max_completion_length": 30,
        "output": "improved",
        "rounds": 1,
    }
    waiting = ma.improve(**options, labels_by="people", eval_reward=letters)
    assert "waits for labels" in waiting["waiting"]
    with pytest.raises(ma.ConfigError, match="reward: has no effect with labels_by='people'"):
        ma.improve(**options, labels_by="people", eval_reward=letters, reward=brief)
    with pytest.raises(ma.ConfigError, match="is the one that labels"):
        ma.improve(**options, reward=brief, eval_reward=brief)
    options["output"] = "judged"
    found = ma.improve(
        **options, reward=brief, eval_reward=letters, allow_unproven=True, progress=False
    )
    assert found["stopped"] == "all 1 rounds are done"
    assert len(found["rounds"]) == 1
