"""`mlx-align sft`: what counts, the mean per token, and an adapter that dpo starts from."""

import re

import mlx.core as mx
import numpy as np
import pytest
from helpers.data import assistant, user, write_rows
from helpers.oracle import (
    assert_accumulation_is_exact,
    random_groups,
)
from helpers.paths import TINY_MODEL
from helpers.runs import metric_rows, summary_of
from mlx_lm import load as mlx_lm_load

from mlx_align.algorithms.sft import SupervisedObjective, evaluate_demonstrations
from mlx_align.data.transforms import keep_last_completion
from mlx_align.losses.registry import TOKEN_LOSSES
from mlx_align.types import Message, PromptGroup, TokenizedGroup


def conversation(*roles):
    return tuple(Message(role, f"{role} {i}") for i, role in enumerate(roles))


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_rows_accumulate_exactly(loss, tiny_policy):
    """A mean per token of the update: rows are of unequal length, and one is masked in part."""
    groups = random_groups(7, 1)
    mask = np.arange(len(groups[2].completions[0])) % 2 == 0
    groups[2] = TokenizedGroup(groups[2].prompt, groups[2].completions, "", loss_masks=(mask,))
    assert_accumulation_is_exact(
        tiny_policy, SupervisedObjective(tiny_policy, loss, groups, grad_checkpoint=False)
    )


def test_held_out_means_are_over_scored_tokens():
    logps = [(np.log([0.5, 0.25]).astype(np.float32),), (np.array([-1.0, -9.0], np.float32),)]
    ids = np.array([1, 2], np.int32)
    groups = [
        TokenizedGroup(ids, (ids,), ""),
        TokenizedGroup(ids, (ids,), "", loss_masks=(np.array([True, False]),)),
    ]
    nll = (np.log(2) + np.log(4) + 1) / 3
    got = evaluate_demonstrations(logps, groups, "nll")
    # The row is the unit of the deviation: two rows, of two tokens and of one.
    rest = np.array([np.log(8) - 2 * nll, 1 - nll])
    spread = np.exp(nll) * 2 / 3 * np.sqrt((rest**2).sum())
    expected = {"loss": nll, "perplexity": np.exp(nll), "perplexity_std": spread}
    assert got == pytest.approx(expected)
    dft = (0.5 * np.log(2) + 0.25 * np.log(4) + np.exp(-1)) / 3
    got = evaluate_demonstrations(logps, groups, "dft")
    assert got == pytest.approx({**expected, "loss": dft})


def test_keep_last_completion():
    group = PromptGroup(
        conversation("system", "user"),
        (conversation("assistant", "user", "assistant", "tool", "assistant"),),
        "row",
    )
    (got,) = keep_last_completion([group])
    roles = [turn.role for turn in got.prompt]
    assert roles == ["system", "user", "assistant", "user", "assistant", "tool"]
    assert got.completions == (group.completions[0][4:],)
    single = PromptGroup(conversation("user"), (conversation("assistant"),), "row")
    text = PromptGroup("question", ("answer",), "row")
    assert keep_last_completion([single, text]) == [single, text]


# ---------------------------------------------------------------- runs


ANSWERS = [{"prompt": f"{i}: is it so?", "completion": f" yes {'a' * (i % 5)}"} for i in range(24)]


@pytest.fixture
def sft(train):
    """Runs `mlx-align sft`, by default on prompts with completions."""

    def call(*options, rows=ANSWERS, output="run"):
        data = write_rows("rows.jsonl", rows)
        small = ("--samples", 1, "--sample-tokens", 4, "--valid-fraction", 0.25, "--warmup", 0)
        return train("sft", *small, *options, data=data, output=output)

    return call


HOT = ("--learning-rate", "3e-3", "--batch-size", 4, "--grad-accumulation-steps", 2)


CHATS = [
    {"messages": user(f"{i}?") + assistant("yes") + user("sure?") + assistant("very sure")}
    for i in range(24)
]


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_a_run_learns_loads_in_stock_mlx_lm_and_starts_dpo(sft, train, loss, capsys):
    code, folder = sft(*HOT, "--iters", 12, "--steps-per-report", 1, "--loss", loss)
    assert code == 0
    out = capsys.readouterr().out
    assert "Reference" not in out
    assert "KL" not in out
    # The end has the table and an answer before and after.
    end = out[out.index("better than the start") :]
    assert re.search(r"^perplexity +[\d.]+ +[\d.]+ +[\d.]+ to [\d.]+$", end, re.M)
    assert re.search(r"^  prompt  .*\n  before  .*\n   after  ", end, re.M)
    held_out = metric_rows(folder, "eval/loss")
    assert [row["step"] for row in held_out] == [0, 12]
    assert held_out[-1]["eval/perplexity"] < 0.7 * held_out[0]["eval/perplexity"]
    training = metric_rows(folder, "loss")
    if loss == "nll":
        assert training[0]["perplexity"] == pytest.approx(np.exp(training[0]["loss"]))
    else:
        assert training[0]["loss"] < 0.1  # weighed by the tokens' own probability
    summary = summary_of(folder)
    assert summary["kl"] is None
    # Paired by row, and the same change as that of the two evaluations.
    ratio = summary["held_out"]["perplexity"]["ratio"]
    change = held_out[-1]["eval/perplexity"] / held_out[0]["eval/perplexity"]
    assert ratio["value"] == pytest.approx(change, rel=1e-4)
    assert 0 < ratio["low"] < ratio["value"] < ratio["high"] < 1
    assert "better than the start" in summary["verdict"]["sentence"]
    model, _ = mlx_lm_load(str(TINY_MODEL), adapter_path=str(folder))
    assert mx.abs(model.layers[0].self_attn.q_proj.lora_b).max().item() > 0

    pairs = [
        {"prompt": f"{i}: is it so?", "chosen": f" no {i}", "rejected": " yes"} for i in range(16)
    ]
    start = ("--init-adapter", folder, "--iters", 1, "--samples", 0)
    assert train("dpo", *start, data=write_rows("pairs.jsonl", pairs), output="dpo")[0] == 0
    first = metric_rows("dpo", "loss")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_loss_on_selects_the_turns_that_are_trained_on(sft, capsys):
    scored = {}
    for choice in ("completion", "assistant"):
        options = ("--iters", 1, "--batch-size", 4, "--loss-on", choice)
        code, folder = sft(*options, rows=CHATS, output=choice)
        assert code == 0
        turns = {"completion": "the last assistant turn", "assistant": "every assistant turn"}
        assert f"trained on {turns[choice]}" in capsys.readouterr().out
        facts = summary_of(folder)["data_facts"]
        scored[choice] = facts["scored_tokens"] / facts["groups"]
    # Also "yes" and its end token.
    assert scored["assistant"] > scored["completion"] + 1


@pytest.mark.parametrize(
    ("epochs", "accumulation", "updates"),
    [(1, 4, [4, 1]), (1, 5, [5]), (1, 8, [5]), (2, 4, [4, 4, 2])],
)
def test_an_epoch_visits_every_row_once(sft, epochs, accumulation, updates):
    """The last update is smaller; five rows are never six."""
    rows = [{"prompt": f"{i}?", "completion": " yes"} for i in range(5)]
    options = ["--epochs", epochs, "--grad-accumulation-steps", accumulation]
    options += ["--valid-fraction", 0, "--steps-per-report", 1]
    code, folder = sft(*options, rows=rows)
    assert code == 0
    summary = summary_of(folder)
    assert summary["steps"] == len(updates)
    assert summary["rows"] == sum(updates)


def test_errors_are_one_line(sft, capsys):
    def error(*options, **named):
        code, _ = sft("--iters", 1, *options, **named)
        assert code == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "leave it out" in error("--loss-on", "assistant")
    assert "choose from nll, dft" in error("--loss", "huber")
    assert "use mlx-align kto" in error("--loss", "kto")
    assert "--beta" in error("--beta", "0.1")
    assert "not recognised as supervised data" in error(rows=[{"question_text": "what"}])
