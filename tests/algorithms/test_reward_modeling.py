"""`mlx-align reward` and `mlx-align score` from options to files, on tiny models."""

import json
import random
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.data import assistant, read_rows, user, write_rows, write_splits
from helpers.paths import ORACLE, TINY_MODEL
from helpers.runs import metric_rows, mlx_align, stop_after, summary_of
from mlx_lm import generate as mlx_lm_generate
from mlx_lm import load as mlx_lm_load

from mlx_align import RewardModel
from mlx_align.errors import ConfigError, DataError, ModelError
from mlx_align.inference.scoring import make_group
from mlx_align.system.starter import shipped_file

SMALL = ("--batch-size", 4, "--grad-accumulation-steps", 2, "--samples", 2)
HOT = ("--learning-rate", "3e-3", "--warmup", 0)
HEAD, ADAPTER = "reward_head.safetensors", "adapters.safetensors"


@pytest.fixture
def train_reward(train, pairs):
    """Runs `mlx-align reward` on the pairs; the exit code and the run folder."""

    def call(*options, **where):
        return train("reward", *SMALL, *options, **{"data": pairs, **where})

    return call


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "4-bit"])
def test_a_run_learns_reports_and_loads_in_stock_mlx_lm(train_reward, tiny_models, dtype, capsys):
    code, folder = train_reward(
        *HOT, "--iters", 12, "--steps-per-report", 1, model=tiny_models[dtype]
    )
    assert code == 0
    out = capsys.readouterr().out
    assert "on 12 held-out comparisons" in out
    assert "\n  mlx-align score run\n" in out
    rows = metric_rows(folder, "loss")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < 0.5 < rows[0]["loss"]
    held_out = metric_rows(folder, "eval/loss")
    assert [row["step"] for row in held_out] == [0, 12]
    assert held_out[-1]["eval/rewards/accuracies"] == 1
    summary = summary_of(folder)
    report = summary["held_out"]
    assert (summary["command"], summary["groups"], summary["kl"]) == ("reward", 96, None)
    assert report["comparisons"] == 12
    assert report["accuracy"] == 1
    # The verdict rests on all held-out comparisons, in the terminal as on the page.
    said = summary["verdict"]["sentence"]
    assert said.startswith("On 12 held-out comparisons the reward model ranks")
    assert said in out
    assert said in (folder / "report.html").read_text()
    assert any("above 90%" in warning for warning in report["warnings"])
    samples = read_rows(folder / "samples.jsonl")
    assert len(samples) == 2
    texts = [answer["text"] for answer in samples[0]["completions"]]
    assert texts[0].startswith("yes")
    scores = [answer["score"] for answer in samples[0]["completions"]]
    assert scores[0] > scores[1]

    head = mx.load(str(folder / HEAD))
    assert list(head) == ["reward_head.weight"]
    assert head["reward_head.weight"].dtype == mx.float32
    model, tokenizer = mlx_lm_load(str(tiny_models[dtype]), adapter_path=str(folder))
    assert mlx_lm_generate(model, tokenizer, "is sun good?", max_tokens=4)


def test_a_resumed_run_ends_with_the_same_bytes(train_reward, tmp_path, capsys, monkeypatch):
    options = (*HOT, "--iters", 6, "--lora-dropout", 0.1, "--members", 2)
    assert train_reward(*options, output="whole")[0] == 0
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        assert train_reward(*options, output="parts")[0] == 130
    assert "resume with: mlx-align reward --resume parts" in capsys.readouterr().out
    parts = tmp_path / "parts"
    checkpoint = parts / "checkpoints" / "0000003"
    head = (checkpoint / HEAD).read_bytes()
    (checkpoint / HEAD).unlink()
    assert mlx_align("reward", "--resume", parts) == 1
    assert "damaged, and the only checkpoint" in capsys.readouterr().err
    (checkpoint / HEAD).write_bytes(head)
    assert mlx_align("reward", "--resume", parts) == 0
    for name in (HEAD, ADAPTER):
        assert (parts / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert summary_of(parts)["held_out"] == summary_of(tmp_path / "whole")["held_out"]


def test_full_fine_tuning_and_a_start_from_a_reward_model(train_reward, tmp_path, capsys):
    options = ("--fine-tune-type", "full", "--learning-rate", "3e-4", "--iters", 6)
    code, folder = train_reward(*options, "--steps-per-report", 1, output="full")
    assert code == 0
    rows = [row["loss"] for row in metric_rows(folder, "loss")]
    assert rows[-1] < rows[0]
    scores = RewardModel.load(str(TINY_MODEL), folder).score(user("is sun good?"), ["yes"])
    start = ("--init-adapter", folder, "--iters", 1, "--learning-rate", "1e-9")
    assert train_reward(*start, output="again")[0] == 0
    again = RewardModel.load(str(TINY_MODEL), tmp_path / "again")
    assert again.score(user("is sun good?"), ["yes"]) == pytest.approx(scores, abs=1e-5)
    capsys.readouterr()
    assert train_reward(*start, "--members", 2, output="more")[0] == 1
    assert "--members 2: --init-adapter" in capsys.readouterr().err


def test_a_start_from_a_classifier(train_reward, tmp_path):
    base = ORACLE / "models" / "reward"
    options = ("--iters", 1, "--learning-rate", "1e-9", "--batch-size", 2)
    assert train_reward(*options, model=base)[0] == 0
    start = RewardModel.load(str(base), tmp_path / "run")
    # The same head on the same weights, but read at the end token, not behind it.
    same = RewardModel.load(str(base))
    (own,), (hub,) = (m.score("Is it", [" good?"]) for m in (start, same))
    assert own == pytest.approx(hub, abs=1e-5)


RANKED = [
    {
        "prompt": f"List {i}:",
        "completions": [f" yes yes{i}", f" yes{i}", f" hm{i}", f" no{i}"][: 4 - i % 2],
        "scores": [4, 3, 3, 1][: 4 - i % 2],
    }
    for i in range(24)
]


@pytest.mark.parametrize("ties", ["skip", "half"])
def test_ranked_lists_with_ties_and_margins(train_reward, tmp_path, ties, capsys):
    data = write_splits(tmp_path / "ranked", train=RANKED[:18], valid=RANKED[18:])
    options = (*HOT, "--iters", 10, "--rating-margin", 0.5, "--ties", ties)
    code, folder = train_reward(*options, data=data)
    assert code == 0
    assert "18 ranked lists of up to 4 completions" in capsys.readouterr().out
    report = summary_of(folder)["held_out"]
    # Of 4: six pairs without the tie; of 3: three without it.
    assert report["comparisons"] == 3 * 5 + 3 * 2
    assert report["accuracy"] > 0.9
    sample = read_rows(folder / "samples.jsonl")[1]
    assert len(sample["completions"]) == 3  # no filler among them


def test_soft_labels_and_margins_are_reported(train_reward, tmp_path, pairs, capsys):
    rows = read_rows(pairs / "train.jsonl")
    for row in rows[:7]:
        row.update(votes_chosen=3, votes_rejected=1)
    for row in rows[:5]:
        row["margin"] = 0.5
    data = write_splits(tmp_path / "voted", train=rows[:20], valid=rows[20:26])
    assert train_reward("--iters", 1, data=data)[0] == 0
    out = capsys.readouterr().out
    assert "7 pairs have a soft label" in out
    assert "5 pairs name their margin (0.5 on average)" in out


def test_a_length_bias_is_reported(train_reward, tmp_path, capsys):
    rows = [
        {"prompt": f"Go {i}", "chosen": " on" * (6 + i % 5), "rejected": " on" * (1 + i % 4)}
        for i in range(160)
    ]
    data = write_splits(tmp_path / "longer", train=rows[:40], valid=rows[40:])
    assert train_reward(*HOT, "--iters", 10, data=data)[0] == 0
    out = capsys.readouterr().out
    assert '"pick the longer" gets 100.0% of them' in out
    assert '! "pick the longer" alone gains 50.0% over chance' in out
    report = summary_of(tmp_path / "run")["held_out"]
    assert report["longer_accuracy"] == 1
    assert report["accuracy"] > 0.9
    assert report["length_correlation_within"] > 0
    assert (report["accuracy_shorter_chosen"], report["shorter_chosen"]) == (None, 0)


def polite_pairs(countries, count, draw):
    """Answers with or without a polite sentence among others; lengths know nothing of it."""
    polite = ("Thank you for asking!", "Please, I am happy to help.")
    plain = ("That is a city.", "It is a big one, I say.")
    others = ("It is {}.", "The capital is {}.", "Many people love {}.", "I would say {}.")

    def answer(markers):
        city = draw.choice(countries)["capital"]
        parts = [draw.choice(others).format(city) for _ in range(draw.randint(1, 3))]
        parts.insert(draw.randint(0, len(parts)), draw.choice(markers))
        return assistant(" ".join(parts))

    return [
        {
            "prompt": user(f"What is the capital of {draw.choice(countries)['name']}?"),
            "chosen": answer(polite),
            "rejected": answer(plain),
        }
        for _ in range(count)
    ]


def test_a_planted_rule_is_learned(train_reward, tmp_path):
    """On the starter: polite answers win, independent of length; on held-out countries."""
    countries = json.loads(shipped_file("starter/world.json").read_text())["countries"]
    draw = random.Random(0)
    data = write_splits(
        tmp_path / "polite",
        train=polite_pairs(countries[:16], 160, draw),
        valid=polite_pairs(countries[16:], 100, draw),
    )
    options = ("--batch-size", 8, "--grad-accumulation-steps", 1, "--no-grad-checkpoint")
    fast = ("--learning-rate", "1e-3", "--epochs", 1, "--val-batches", 1)
    code, folder = train_reward(*options, *fast, model=shipped_file("starter/model"), data=data)
    assert code == 0
    report = summary_of(folder)["held_out"]
    assert report["accuracy"] > 0.95
    assert report["accuracy_shorter_chosen"] > 0.95
    assert 0.4 < report["longer_accuracy"] < 0.6
    assert abs(report["length_correlation"]) < 0.3


# ---------------------------------------------------------------- scoring


@pytest.fixture
def ensemble(train_reward):
    assert train_reward(*HOT, "--iters", 4, "--members", 3, output="three")[0] == 0
    return TINY_MODEL, Path("three").absolute()


def test_score_adds_scores_to_every_row(ensemble, pairs, tmp_path, capsys):
    base, folder = ensemble
    where = ("--model", base, "--adapter-path", folder)
    held_out = ("--data", pairs, "--split", "valid")
    assert mlx_align("score", *where, *held_out, "--output", "out.jsonl") == 0
    out = capsys.readouterr().out
    assert "accuracy" in out
    assert "Wrote 24 scores to out.jsonl" in out
    lines = read_rows("out.jsonl")
    rows = read_rows(pairs / "valid.jsonl")
    assert [{k: line[k] for k in row} for line, row in zip(lines, rows, strict=True)] == rows
    model = RewardModel.load(str(base), folder)
    for line in lines[:4]:
        wanted = model.score(line["prompt"], [line["chosen"], line["rejected"]])
        assert line["model_scores"] == pytest.approx(wanted, abs=1e-5)
        members = np.array(line["model_scores_members"])
        assert members.shape == (2, 3)
        assert members.mean(axis=1).tolist() == pytest.approx(wanted, abs=1e-5)
    # The run's own report is of the same held-out pairs, which are what it scores by itself.
    assert mlx_align("score", folder, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["output"] == str(folder / "scores.jsonl")
    assert read_rows(folder / "scores.jsonl") == lines
    found = summary["pairs"]
    report = summary_of(folder)["held_out"]
    assert found["accuracy"] == report["accuracy"]
    assert found["ece"] == pytest.approx(report["ece"], abs=1e-5)
    assert mlx_align("score", *where, "--data", "out.jsonl", "--output", "x.jsonl") == 1
    assert "has scores already" in capsys.readouterr().err
    assert mlx_align("score", *where, "--data", pairs, "--output", "out.jsonl") == 1
    assert "exists already" in capsys.readouterr().err


def test_combining_members(ensemble):
    base, folder = ensemble
    conversation = user("valid 3: is rain good?"), ["yes aaa", "no", "yes"]

    def load(**how):
        return RewardModel.load(str(base), folder, **how)

    (scored,) = load().score_groups([make_group("score()", *conversation)])
    members = scored.members.astype(np.float64)
    assert load().score(*conversation) == pytest.approx(members.mean(axis=1).tolist(), abs=1e-6)
    assert load(combine="min").score(*conversation) == pytest.approx(members.min(axis=1).tolist())
    penalised = members.mean(axis=1) - 0.5 * members.var(axis=1)
    found = load(combine="mean-variance", variance_penalty=0.5).score(*conversation)
    assert found == pytest.approx(penalised.tolist(), abs=1e-5)
    assert members.std(axis=1).min() > 1e-3
    for how, message in (
        ({"combine": "median"}, "--combine median: unknown"),
        ({"combine": "mean-variance"}, "needs --variance-penalty, the weight of the variance"),
        ({"variance_penalty": 1.0}, "has no effect on --combine mean"),
        ({"combine": "mean-variance", "variance_penalty": -1.0}, "must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(**how)
    with pytest.raises(ConfigError, match="has no effect on a model of one member"):
        RewardModel.load(str(ORACLE / "models" / "reward"), combine="min")


def test_scores_do_not_depend_on_batch_mates(ensemble, monkeypatch):
    base, folder = ensemble
    model = RewardModel.load(str(base), folder, batch_size=5)
    rows = [(user(f"is {'very ' * i}good?"), ["yes", "no" * (i + 1)]) for i in range(7)]
    rows.append((user("one?"), ["only this", "this", "or that one"]))
    together = model.score_groups([make_group("score()", *row) for row in rows])
    for row, scored in zip(rows, together, strict=True):
        alone = [model.score(row[0], [completion])[0] for completion in row[1]]
        assert scored.scores.tolist() == pytest.approx(alone, abs=1e-5)


def test_rows_that_cannot_be_scored_keep_their_place(ensemble, tmp_path):
    base, folder = ensemble
    rows = [
        {"prompt": "Say", "completions": [" yes", " yes"]},
        {"prompt": "Say", "completions": [" x" * 400]},
        {"prompt": "Say", "completions": []},
        {"prompt": "Say", "completions": [" no", " yes", " well"], "id": 7},
    ]
    data = write_splits(tmp_path / "lists", train=rows) / "train.jsonl"
    options = ("--data", data, "--output", "out.jsonl", "--max-seq-length", 64)
    assert mlx_align("score", "--model", base, "--adapter-path", folder, *options) == 0
    lines = read_rows("out.jsonl")
    same, long, none, three = lines
    assert same["model_scores"][0] == pytest.approx(same["model_scores"][1], abs=1e-6)
    assert long["model_scores"] is None
    assert "too long" in long["model_scores_note"]
    assert none["model_scores_note"] == "no completions"
    assert len(three["model_scores"]) == 3
    assert three["id"] == 7


def test_adapters_with_missing_or_extra_tensors_are_refused(ensemble, tmp_path):
    base, folder = ensemble
    weights = dict(mx.load(str(folder / ADAPTER)))
    first = sorted(weights)[0]
    for name, changed, message in (
        ("less", {k: v for k, v in weights.items() if k != first}, f"{first} is missing"),
        ("more", {**weights, "other": mx.zeros(2)}, "it adapts other"),
    ):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        mx.save_safetensors(str(copy / ADAPTER), changed)
        with pytest.raises(ModelError, match=message):
            RewardModel.load(str(base), copy)
    with pytest.raises(DataError, match="too long"):
        RewardModel.load(str(base), folder, max_seq_length=16).score("Say", [" x" * 99])
    with pytest.raises(DataError, match="a list with at least one"):
        RewardModel.load(str(base), folder).score("Say", "yes")


def test_a_reward_model_is_refused_as_a_policy(ensemble, pairs, capsys):
    base, folder = ensemble
    where = ("--model", str(base), "--adapter-path", str(folder), "--output", "fused")
    assert mlx_align("fuse", *where) == 1
    assert "use mlx-align reward export" in capsys.readouterr().err
    start = ("--model", str(base), "--data", str(pairs), "--init-adapter", str(folder))
    assert mlx_align("dpo", *start, "--output", "dpo") == 1
    assert "is a reward model, which generates no text" in capsys.readouterr().err


# ---------------------------------------------------------------- mistakes, plan


def test_a_run_without_held_out_data(train_reward, capsys):
    rows = [{"prompt": f"Say {i}", "chosen": " yes", "rejected": " no"} for i in range(8)]
    single = write_rows("one.jsonl", rows)
    options = ("--iters", 1, "--valid-fraction", 0)
    code, folder = train_reward(*options, data=single)
    assert code == 0
    assert "! nothing is held out" in capsys.readouterr().out
    assert "held_out" not in summary_of(folder)
    assert (folder / "samples.jsonl").read_text() == ""


def test_errors_are_one_line(train_reward, tmp_path, pairs, capsys):
    def fails(*options, data=pairs):
        assert train_reward(*options, data=data)[0] == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert not (tmp_path / "run").exists()
        return error

    assert "a score is read at the end token" in fails("--max-completion-length", 5)
    assert "the data has no ratings" in fails("--rating-margin", 1)
    assert "no list with equal ratings" in fails("--ties", "half")
    assert "there are only 40; give at most 40" in fails("--members", 99)
    assert "--label-smoothing 0.7: out of range" in fails("--label-smoothing", 0.7)
    assert "No such option" in fails("--beta", 0.1)
    single = write_splits(tmp_path / "single", train=[{"prompt": "Q", "completion": "A"}])
    assert "prompt and completion, but no pair" in fails(data=single)
    assert mlx_align("reward", "--members", "2", "export", "--model", "x") == 1
    assert "--members before export: is an option of training" in capsys.readouterr().err
    assert mlx_align("reward", "--help") == 0
    text = capsys.readouterr().out
    assert "--center-rewards-coefficient" in text
    assert "export" in text
    assert mlx_align("reward", "export", "--help") == 0
    assert "ForSequenceClassification" in capsys.readouterr().out
    output = ("--output", tmp_path / "nowhere" / "s.jsonl")
    assert mlx_align("score", "--model", TINY_MODEL, "--data", pairs, *output) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert mlx_align("score", "--model", TINY_MODEL, "--data", pairs, "--output", "s.jsonl") == 1
    assert "not a reward model" in capsys.readouterr().err


def test_plan_covers_reward_models(pairs, capsys):
    def plan(command):
        arguments = ["--model", str(TINY_MODEL), "--command", command, "--json"]
        assert mlx_align("plan", *arguments, "--data", pairs, "--batch-size", "8") == 0
        return json.loads(capsys.readouterr().out)

    reward, dpo = plan("reward"), plan("dpo")
    assert reward["parts"]["vocabulary head"] == 0
    assert dpo["parts"]["vocabulary head"] > 0
    assert reward["moment"] != "vocabulary head"
