"""`mlx-align kto`: the reference point, the partners it is made from, and whole runs."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.data import write_rows
from helpers.oracle import (
    SMALL,
    assert_accumulation_is_exact,
    microbatches,
    random_groups,
    reference_near,
    trainable_weights,
    update,
)
from helpers.paths import TINY_MODEL
from helpers.runs import change_results, metric_rows, mlx_align, outcome
from mlx_lm import load as mlx_lm_load

from mlx_align.algorithms.kto import (
    KtoLoss,
    UnpairedObjective,
    evaluate_rows,
    means_by_label,
    row_metrics,
)
from mlx_align.data.buckets import LENGTH_MULTIPLE
from mlx_align.data.transforms import add_mismatched
from mlx_align.errors import DataError
from mlx_align.inference.scoring import make_logprob_scorer
from mlx_align.losses.registry import UNPAIRED_LOSSES, resolve_options
from mlx_align.training import reference
from mlx_align.types import TokenizedGroup


def kto_loss(name="kto", **options):
    return KtoLoss(name, UNPAIRED_LOSSES[name], resolve_options(name, options))


# ---------------------------------------------------------------- partners


def row(prompt, answer, label=True):
    ids = [np.array(text, np.int32) for text in (prompt, answer)]
    return TokenizedGroup(ids[0], (ids[1],), "row", label=label)


def test_mismatched_completions_belong_to_other_prompts():
    groups = random_groups(60, 1)
    # Split pairs: the other answer to the same prompt is no mismatched one.
    groups += [row(group.prompt, [1, 2, 3 + i]) for i, group in enumerate(groups)]
    paired = add_mismatched(groups, seed=3)
    own = {(g.prompt.tobytes(), g.completions[0].tobytes()) for g in groups}
    for before, after in zip(groups, paired, strict=True):
        assert after.completions[0] is before.completions[0]
        assert after.prompt is before.prompt
        assert (after.prompt.tobytes(), after.completions[1].tobytes()) not in own
    partners = [g.completions[1].tobytes() for g in paired]
    assert partners == [g.completions[1].tobytes() for g in add_mismatched(groups, seed=3)]
    assert partners != [g.completions[1].tobytes() for g in add_mismatched(groups, seed=4)]
    # Nearly every answer is a partner once: the point is a mean over the data's answers.
    assert max(Counter(partners).values()) <= 3
    # About as long as its own, except where one class of lengths ends.
    classes = [[-(-len(c) // LENGTH_MULTIPLE) for c in g.completions] for g in paired]
    assert sum(abs(a - b) > 1 for a, b in classes) <= 2


def test_an_answer_of_many_prompts_is_avoided_if_possible():
    groups = [row([i], [7, 7]) for i in range(5)] + [row([9], [8, 8])]
    paired = add_mismatched(groups, seed=0)
    assert all(g.completions[1].tolist() == [8, 8] for g in paired[:5])
    same = add_mismatched([row([i], [7, 7]) for i in range(3)], seed=0)
    assert all(g.completions[1].tolist() == [7, 7] for g in same)


def test_a_single_prompt_has_no_reference_point():
    with pytest.raises(DataError, match="the same prompt"):
        add_mismatched([row([1], [i]) for i in range(4)], seed=0)
    assert add_mismatched([], seed=0) == []


# ---------------------------------------------------------------- objective


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_rows_accumulate_exactly(name, tiny_policy):
    groups = add_mismatched(random_groups(7, 1), seed=0)
    groups = groups if UNPAIRED_LOSSES[name].needs_kl else random_groups(7, 1)
    log_probs = reference_near(tiny_policy, groups)
    for rows in log_probs:
        rows[-1][...] -= 0.2  # a KL above 0 is one that a wrong mean would change
    loss = kto_loss(name, undesirable_weight=1.3)
    assert_accumulation_is_exact(
        tiny_policy,
        UnpairedObjective(
            tiny_policy,
            loss,
            groups,
            log_probs,
            make_logprob_scorer(tiny_policy),
            grad_checkpoint=False,
        ),
    )


def test_the_reference_point_has_no_gradient(tiny_policy):
    """The gradient is that of the own completions alone, at a point that is a number."""
    groups = add_mismatched(random_groups(4, 1), seed=0)
    log_probs = reference_near(tiny_policy, groups)
    for rows in log_probs:
        rows[1][...] -= 0.5
    made = [
        UnpairedObjective(
            tiny_policy,
            loss,
            groups,
            log_probs,
            make_logprob_scorer(tiny_policy),
            grad_checkpoint=False,
        )
        for loss in (kto_loss(), kto_loss("apo_zero_unpaired"))
    ]
    tree, micro = trainable_weights(tiny_policy), microbatches((4,), SMALL)
    value, gradient, sums = update(tiny_policy, made[0], tree, micro)
    kl = sums["kl"] / 4
    assert kl > 0.5
    # apo_zero is KTO at the point 0: with references shifted by the point it is the same loss.
    shifted = [(own + kl / len(own), other) for own, other in log_probs]
    again = UnpairedObjective(
        tiny_policy, kto_loss("apo_zero_unpaired"), groups, shifted, None, grad_checkpoint=False
    )
    same_value, same, _ = update(tiny_policy, again, tree, micro)
    assert same_value == pytest.approx(value, rel=1e-5)
    for name, part in gradient.items():
        assert mx.abs(part - same[name]).max().item() < 1e-5


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_a_soft_label_is_the_share_of_copies_that_are_good(tiny_policy, name):
    """A row that is good with probability ¾ trains as three good copies and a bad one."""
    drawn = random_groups(2, 1)
    soft = [
        replace(g, label=p > 0.5, soft_label=p) for g, p in zip(drawn, (0.75, 0.25), strict=True)
    ]
    labels = [[True, True, True, False], [False, False, True, False]]
    loss, tree = kto_loss(name, undesirable_weight=1.3), trainable_weights(tiny_policy)
    found = []
    paired = add_mismatched(soft, seed=0) if loss.loss.needs_kl else soft
    log_probs = reference_near(tiny_policy, paired)
    for rows in log_probs:
        rows[-1][...] -= 0.2
    copies = [
        replace(group, label=label, soft_label=None)
        for group, of_row in zip(paired, labels, strict=True)
        for label in of_row
    ]
    for groups, reference_logps in (
        (paired, log_probs),
        (copies, [one for one in log_probs for _ in range(4)]),
    ):
        objective = UnpairedObjective(
            tiny_policy,
            loss,
            groups,
            reference_logps,
            make_logprob_scorer(tiny_policy),
            grad_checkpoint=False,
        )
        found.append(update(tiny_policy, objective, tree, microbatches((len(groups),), SMALL))[:2])
    (value, gradient), (same_value, same) = found
    assert value == pytest.approx(same_value, rel=1e-6)
    for key, part in gradient.items():
        assert mx.abs(part - same[key]).max().item() < 1e-6
    hard, _, _ = update(
        tiny_policy,
        UnpairedObjective(
            tiny_policy,
            loss,
            [replace(one, soft_label=None) for one in paired],
            log_probs,
            make_logprob_scorer(tiny_policy),
            grad_checkpoint=False,
        ),
        tree,
        microbatches((2,), SMALL),
    )
    assert abs(hard - value) > 1e-3


def test_training_rows_have_means_of_both_kinds():
    logps, ratio = mx.array([-1.0, -2.0, -3.0, -4.0]), mx.array([1.0, 3.0, -1.0, 2.0])
    good = mx.array([True, True, True, False])
    metrics = row_metrics(logps, ratio, good, mx.array(0.5), 0.1)
    means = {name: value.mean().item() for name, value in metrics.items()}
    got = means_by_label({"step": 3, "loss": 0.4, **means})
    assert got["step"] == 3
    assert isinstance(got["step"], int)
    assert got["rewards/chosen"] == pytest.approx(0.1)
    assert got["rewards/rejected"] == pytest.approx(0.2)
    assert got["rewards/margins"] == pytest.approx(-0.1)
    assert got["rewards/accuracies"] == pytest.approx(0.5)
    assert got["logps/chosen"] == pytest.approx(-2)
    assert got["kl"] == 0.5
    only_good = means_by_label(
        {"loss": 0.4, **{k: v[:3].mean().item() for k, v in metrics.items()}}
    )
    assert "rewards/rejected" not in only_good
    assert "rewards/margins" not in only_good


def test_held_out_metrics():
    groups = [row([i], [1], label=i < 2) for i in range(4)]
    policy = [(np.array([p], np.float32), np.array([m], np.float32)) for p, m in _HELD_OUT]
    start = [(np.zeros(1, np.float32), np.zeros(1, np.float32))] * 4
    got = evaluate_rows(policy, start, groups, kto_loss(beta=0.5))
    assert got["kl"] == pytest.approx(0.5)
    assert got["rewards/chosen"] == pytest.approx(1.0)
    assert got["rewards/rejected"] == pytest.approx(-0.25)
    assert got["rewards/margins"] == pytest.approx(1.25)
    assert got["rewards/accuracies"] == pytest.approx(0.75)
    assert got["rewards/auc"] == pytest.approx(7 / 8)
    assert got["count/chosen"] == 2
    sigmoid = 1 / (1 + np.exp(-0.5 * (np.array([3.0, 1.0, -2.0, 1.0]) - 0.5)))
    expected = np.mean([1 - sigmoid[0], 1 - sigmoid[1], sigmoid[2], sigmoid[3]])
    assert got["loss"] == pytest.approx(expected)
    clamped = [(own, -other) for own, other in policy]
    assert evaluate_rows(clamped, start, groups, kto_loss())["kl"] == 0
    alone = evaluate_rows(policy[:2], start[:2], groups[:2], kto_loss())
    assert "rewards/margins" not in alone


# Log-probs of four answers and of their prompts' mismatched ones.
_HELD_OUT = [(3.0, 0.5), (1.0, 1.0), (-2.0, 0.0), (1.0, 0.5)]


# ---------------------------------------------------------------- runs


ANSWERS = [
    {
        "prompt": f"{i}: {'sun ' * (i % 3)}{'rain ' * (i % 4)}?",
        "completion": f"{' yes' if i % 2 else ' no, never'} {'a' * (i % 7)}",
        "label": bool(i % 2),
    }
    for i in range(48)
]


@pytest.fixture
def kto(train):
    """Runs `mlx-align kto` on rows whose good answers say yes and whose bad ones say no."""

    def call(*options, rows=ANSWERS, output="run"):
        data = write_rows("rows.jsonl", rows)
        small = ("--samples", 1, "--sample-tokens", 4, "--valid-fraction", 0.25, "--warmup", 0)
        cache = ("--reference-cache", "cache")
        return train("kto", *cache, *small, *options, data=data, output=output)

    return call


HOT = ("--learning-rate", "3e-3", "--batch-size", 4, "--grad-accumulation-steps", 2)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_a_run_starts_at_one_half_learns_and_loads_in_stock_mlx_lm(kto, loss, capsys):
    code, folder = kto(*HOT, "--iters", 12, "--steps-per-report", 1, "--loss", loss)
    assert code == 0
    assert " good and " in capsys.readouterr().out
    training, held_out = metric_rows(folder, "loss"), metric_rows(folder, "eval/loss")
    assert training[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert held_out[0]["eval/loss"] == pytest.approx(0.5, abs=1e-6)
    assert held_out[0]["eval/rewards/auc"] == 0.5
    assert held_out[-1]["eval/loss"] < 0.48
    assert held_out[-1]["eval/rewards/auc"] > 0.9
    assert held_out[-1]["eval/rewards/margins"] > 0.02
    assert (max(row["kl"] for row in training) > 0) == (loss == "kto")
    model, _ = mlx_lm_load(str(TINY_MODEL), adapter_path=str(folder))
    assert mx.abs(model.layers[0].self_attn.q_proj.lora_b).max().item() > 0


def test_mismatched_log_probs_are_cached_and_runs_repeat(kto, monkeypatch):
    whole = (*HOT, "--iters", 3, "--steps-per-report", 1)
    assert kto(*whole, output="whole")[0] == 0
    computed = []

    def count(logprobs):
        computed.append(len(logprobs))
        return logprobs

    change_results(monkeypatch, reference, "score_groups", count)
    code, again = kto(*whole, output="again")
    assert code == 0
    assert sum(computed) == 0
    assert outcome(again) == outcome("whole")


def test_pairs_are_split_into_desirable_and_undesirable(kto, capsys):
    pairs = [
        {"prompt": f"{i} ok?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(12)
    ]
    assert kto("--iters", 1, "--batch-size", 4, rows=pairs)[0] == 0
    out = capsys.readouterr().out
    assert "split into desirable and undesirable completions" in out
    assert "9 good and 9 bad answers" in out


def test_soft_labels_and_votes_reach_the_loss(kto, capsys):
    def start(*options, **fields):
        rows = [
            {"prompt": f"{i} ok?", "chosen": f" yes {i}", "rejected": f" no {i}", **fields}
            for i in range(12)
        ]
        small = ("--iters", 1, "--batch-size", 4, "--desirable-weight", 2, *options)
        code, folder = kto(*small, rows=rows, output=f"run{len(list(Path().glob('run*')))}")
        if code:
            return capsys.readouterr().err
        return metric_rows(folder, "eval/loss")[0]["eval/loss"]

    # At the start every log-ratio is 0, so a loss is ½ of the weight: 2p + (1 − p) for chosen, and
    # the same the other way round for rejected.
    assert start() == pytest.approx((2 + 1) / 4)
    assert start(soft_label=0.9) == pytest.approx((2 * 0.9 + 0.1 + 2 * 0.1 + 0.9) / 4)
    assert "9 good and 9 bad answers to train on, 18 with soft labels" in capsys.readouterr().out
    votes = {"votes_chosen": 2, "votes_rejected": 1}
    assert "--min-agreement" in start("--min-agreement", 0.7, **votes)
    start("--votes", "ignore", **votes)
    assert "soft labels" not in capsys.readouterr().out
    assert "margins are for reward models" in start("--strength", "margin")


def labelled(labels):
    return [
        {"prompt": f"{i} ok?", "completion": f" answer {i}", "label": label}
        for i, label in enumerate(labels)
    ]


def test_errors_are_one_line(kto, capsys):
    def error(*options, **named):
        code, _ = kto("--iters", 1, *options, **named)
        assert code == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "no bad answers (label false)" in error(rows=labelled([True] * 12))
    assert "no good answers (label true)" in error(rows=labelled([False] * 12))
    assert "choose from kto, apo_zero_unpaired" in error("--loss", "huber")
    assert "use mlx-align dpo --loss sigmoid" in error("--loss", "dpo")
    assert "label_smoothing" in error("--loss-option", "label_smoothing=0.1")
    assert "the same hyperparameter twice" in error("--beta", "0.2", "--loss-option", "beta=0.2")
    one_prompt = [{**row, "prompt": "ok?"} for row in labelled([True, False] * 6)]
    assert "prompt" in error("--valid-fraction", 0, rows=one_prompt)


def test_warnings_about_unbalanced_weights_and_small_updates(kto, capsys):
    few = ("--iters", 1, "--valid-fraction", 0, "--samples", 0)
    rows = labelled([True] * 8 + [False] * 16)
    assert kto(*few, "--batch-size", 2, "--grad-accumulation-steps", 1, rows=rows)[0] == 0
    out = capsys.readouterr().out
    assert "! good answers weigh 0.5 times as much as bad ones" in out
    assert "--desirable-weight 2 to 2.67" in out
    assert "! an update has 2 rows" in out
    assert kto(*few, "--desirable-weight", 2.2, rows=rows, output="balanced")[0] == 0
    out = capsys.readouterr().out
    assert "weigh" not in out
    assert "an update has" not in out


def test_a_resumed_run_equals_an_uninterrupted_one(kto):
    """The same partners, the same points: the last rows are bit for bit those of a whole run."""
    options = (*HOT, "--iters", 6, "--save-every", 3, "--steps-per-report", 1)
    assert kto(*options, output="whole")[0] == 0
    shutil.copytree("whole", "half")
    for later in sorted(Path("half", "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    assert mlx_align("kto", "--resume", "half") == 0
    assert outcome("half") == outcome("whole")
