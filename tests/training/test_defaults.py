"""Defaults that depend on the data: what is chosen, what the user gave, and what is written."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import yaml
from helpers.data import write_rows, write_splits
from helpers.paths import TINY_MODEL
from helpers.runs import metric_rows, mlx_align, summary_of

from mlx_align.algorithms.grpo import KL_PLACES, check_grpo_options, resolve_method
from mlx_align.config import DPOConfig, GRPOConfig, KTOConfig, PPOConfig, RewardConfig, SFTConfig
from mlx_align.config.schema import make_config
from mlx_align.data.batching import groups_per_batch
from mlx_align.data.buckets import batch_limit
from mlx_align.data.splits import default_valid_fraction
from mlx_align.losses.registry import resolve_options
from mlx_align.models.adapters import AdapterLayout
from mlx_align.planning import plan
from mlx_align.planning.machine import Machine
from mlx_align.system.intervals import metric_interval, wilson_interval
from mlx_align.tracking.verdict import MIN_EXAMPLES
from mlx_align.training.defaults import (
    EVALUATION_SHARE,
    FORWARD_SHARE,
    MAX_BATCH_TOKENS,
    MIN_EVALUATED,
    MIN_KTO_ROWS,
    describe_evaluated,
    resolve_offline,
    resolve_on_policy,
)
from mlx_align.training.offline import held_out_groups
from mlx_align.types import TokenizedGroup

LORA = AdapterLayout()


def rows(count):
    ids = np.arange(4, dtype=np.int32)
    return [TokenizedGroup(ids, (ids, ids), f"f:{i}") for i in range(count)]


def offline(config, count, valid=50, layout=LORA):
    found, lines = resolve_offline(config, layout, rows(count), valid)
    updates = found.iters or math.ceil(found.epochs * count / rows_per_update(found, count))
    return found, updates, lines


def rows_per_update(config, count, packs=False):
    return config.accumulation * groups_per_batch(rows(count), batch_limit(config, packs=packs))


@pytest.mark.parametrize("config", [DPOConfig(), KTOConfig(), SFTConfig(), RewardConfig()])
@pytest.mark.parametrize("count", [24, 250, 2850, 60_000])
def test_few_rows_get_enough_updates_and_many_one_pass(config, count):
    found, updates, _ = offline(config, count)
    assert updates >= 10
    # 4 updates at 1e-5, the defaults of earlier versions on 30 pairs, changed no answer.
    assert updates * found.rate > 10 * 4 * 1e-5
    assert found.epochs == (1 if count >= 500 else found.epochs)
    assert 1 <= found.epochs <= 8


def test_the_rate_of_preference_losses_falls_with_the_updates():
    rates = [offline(DPOConfig(), count)[0].rate for count in (30, 3_000, 30_000, 300_000)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 5 * rates[-1]
    assert offline(DPOConfig(loss="simpo"), 30)[0].rate < rates[0]
    assert offline(DPOConfig(loss="sigmoid=1,sft=0.2"), 30)[0].rate == rates[0]
    assert offline(DPOConfig(), 30, layout=AdapterLayout("full"))[0].rate <= rates[0] / 10


def test_given_options_are_kept_and_only_chosen_ones_are_explained():
    given = {"epochs": 2.0, "grad_accumulation_steps": 3, "learning_rate": 1e-3}
    found, _, lines = offline(DPOConfig(**given, steps_per_eval=7, val_batches=1), 250)
    assert (found.epochs, found.accumulation, found.rate) == (2.0, 3, 1e-3)
    assert (found.steps_per_eval, found.val_batches, found.iters) == (7, 1, None)
    assert not any(line.startswith("Defaults") for line in lines)
    found, _, lines = offline(DPOConfig(iters=5), 250)
    assert (found.iters, found.epochs) == (5, None)
    assert "5 updates of about 8 rows at learning rate 5e-05" in lines[0]
    # --batch-size counts towards the rows of an update.
    assert offline(DPOConfig(batch_size=4), 250)[0].accumulation == 2
    # As do --batch-tokens, and a row is a microbatch where only the accumulation is given.
    assert offline(DPOConfig(batch_tokens=48), 250)[0].accumulation == 4
    found, _, _ = offline(DPOConfig(grad_accumulation_steps=8), 250)
    assert (found.batch_size, found.batch_tokens) == (1, None)


@pytest.mark.parametrize("config", [DPOConfig(), KTOConfig(), SFTConfig(), RewardConfig()])
@pytest.mark.parametrize(("count", "wanted"), [(30, 4), (250, 8), (2_000, 16)])
@pytest.mark.parametrize("packs", [False, True])
def test_microbatches_hold_the_rows_of_an_update_up_to_a_number_of_tokens(
    config, count, wanted, packs
):
    wanted = max(wanted, MIN_KTO_ROWS) if isinstance(config, KTOConfig) else wanted
    found, _ = resolve_offline(config, LORA, rows(count), 50, packs=packs)
    assert found.batch_size is None
    assert rows_per_update(found, count, packs) == pytest.approx(wanted, rel=0.2)
    assert found.accumulation == 1
    ids = np.arange(80, dtype=np.int32)
    long = [TokenizedGroup(ids, (ids, ids), f"f:{i}") for i in range(count)]
    found, _ = resolve_offline(config, LORA, long, 50, packs=packs)
    assert found.batch_tokens == MAX_BATCH_TOKENS
    per_microbatch = groups_per_batch(long, batch_limit(found, packs=packs))
    assert per_microbatch * found.accumulation == pytest.approx(wanted, rel=0.5)
    longer = [TokenizedGroup(ids, (ids, *[ids] * 3), f"f:{i}") for i in range(count)]
    found, _ = resolve_offline(config, LORA, longer, 50, packs=packs)
    assert (found.batch_size, found.batch_tokens, found.accumulation) == (1, None, wanted)


def test_activations_are_recomputed_if_memory_is_short(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Say yes {i}.", "chosen": " yes", "rejected": " no"} for i in range(10)]
    write_rows("pairs.jsonl", rows)
    options = ("--model", TINY_MODEL, "--data", "pairs.jsonl", "--samples", 0, "--iters", 1)

    def run(output, *more):
        assert mlx_align("dpo", *options, "--output", output, *more) == 0
        written = yaml.safe_load((tmp_path / output / "config.yaml").read_text())
        return written["grad_checkpoint"], "are recomputed" in capsys.readouterr().out

    assert run("much") == (False, False)
    assert run("given", "--grad-checkpoint") == (True, False)
    small = Machine("small", 8_000_000, 8_000_000, metal=False)
    monkeypatch.setattr(plan, "this_machine", lambda: small)
    monkeypatch.setattr(plan, "ALWAYS_FITS_BYTES", 0)
    assert run("little", "--force") == (True, True)
    assert run("kept", "--force", "--no-grad-checkpoint") == (False, False)


@pytest.mark.parametrize("loss", ["ipo", "orpo", "hinge"])
def test_a_resolved_config_serves_losses_without_smoothing(loss):
    found, _, _ = offline(DPOConfig(model="m", data="d"), 30)
    assert found.beta == 0.1
    again = make_config(DPOConfig, {**dataclasses.asdict(found), "loss": loss})
    assert again.loss_options() == {"beta": 0.1}
    smoothed, _, _ = offline(DPOConfig(model="m", data="d", loss="robust"), 30)
    assert smoothed.label_smoothing == resolve_options("robust", {})["label_smoothing"] > 0


def test_resolving_again_changes_nothing():
    found, _, _ = offline(DPOConfig(beta=0.3), 30)
    assert found.beta == 0.3
    assert (found.batch_tokens, found.lora_rank, found.lora_alpha) == (96, 16, 32)
    assert (found.num_layers, found.fine_tune_type) == (-1, "lora")
    again, lines = resolve_offline(found, LORA, rows(30), 50)
    assert again == found
    assert lines == []
    assert offline(DPOConfig(loss="ipo"), 30)[0].beta is not None
    assert offline(DPOConfig(loss="sft"), 30)[0].beta is None
    assert offline(DPOConfig(loss_option={"beta": "0.2"}), 30)[0].beta is None


@pytest.mark.parametrize("count", [30, 300, 3_000, 60_000])
@pytest.mark.parametrize("valid", [6, 50, 400, 20_000])
def test_evaluations_use_all_held_out_rows_unless_they_cost_a_tenth(count, valid):
    found, updates, _ = offline(DPOConfig(), count, valid)
    evaluated = len(held_out_groups(rows(valid), found))
    lines = describe_evaluated(evaluated, valid)
    evaluations = 2 + (updates - 1) // found.steps_per_eval
    cost = evaluations * evaluated * FORWARD_SHARE
    budget = EVALUATION_SHARE * updates * rows_per_update(found, count)
    # Whole microbatches are evaluated, and those of held-out rows may hold more.
    assert evaluated <= 1.1 * MIN_EVALUATED or cost <= 1.05 * budget
    if found.val_batches == -1:
        return
    assert any(f"of {valid:,} held-out rows" in line for line in lines)
    assert evaluations * valid * FORWARD_SHARE > budget


def test_thirty_pairs_hold_out_enough_to_say_something():
    for count in (30, 100, 300, 1_000, 3_000, 100_000):
        held_out = round(default_valid_fraction(count) * count)
        assert held_out >= min(count // 5, 50)
        assert held_out >= 0.05 * count - 1
    assert wilson_interval(1.0, round(30 * default_valid_fraction(30))).low > 0.5
    assert wilson_interval(1.0, MIN_EXAMPLES).low > 0.5
    assert any("too few to tell" in line for line in offline(DPOConfig(), 10, valid=5)[2])
    assert not any("too few" in line for line in offline(DPOConfig(), 30, valid=6)[2])


def test_narrow_models_get_higher_rates():
    def rate(width, config):
        return resolve_offline(config, LORA, rows(30), 6, width=width)[0].learning_rate

    assert [rate(width, DPOConfig()) for width in (0, 4096, 576, 288, 128, 32)] == [
        *[5e-5] * 3,
        *[1e-4, 2.3e-4, 2.5e-4],
    ]
    assert rate(288, SFTConfig()) == 4e-4
    assert rate(128, DPOConfig(learning_rate=1e-6)) == 1e-6
    found = resolve_on_policy(PPOConfig(), LORA, 30, 6, width=288)[0]
    assert found.learning_rate == 6e-5


def test_the_line_on_defaults_names_what_was_not_given():
    line = offline(DPOConfig(iters=4), 30)[2][0]
    assert line.startswith("For 30 rows: 4 updates of about 4 rows at learning rate 5e-05;")
    assert line.endswith("passes. (chosen by default: --grad-accumulation-steps, --learning-rate)")
    assert offline(DPOConfig(), 30)[2][0].endswith(
        "(--epochs, --grad-accumulation-steps, --learning-rate)"
    )
    prompts = resolve_on_policy(GRPOConfig(learning_rate=1e-5), LORA, 40, 20)[1][0]
    assert prompts.startswith("For 40 prompts: ")
    assert prompts.endswith("(chosen by default: --iters, --grad-accumulation-steps)")


@pytest.mark.parametrize(("config", "per_batch"), [(GRPOConfig(), 8), (PPOConfig(), 16)])
def test_few_prompts_get_enough_rollout_batches_and_many_one_pass(config, per_batch):
    few, lines = resolve_on_policy(config, LORA, 30, 6)
    assert 30 <= few.iters <= 60
    assert f"rollout batches of {per_batch}" in lines[0]
    many, _ = resolve_on_policy(config, LORA, 30_000, 200)
    assert many.iters == math.ceil(30_000 / per_batch)
    assert many.rate < few.rate
    tiny, lines = resolve_on_policy(config, LORA, 3, 1)
    assert lines[-1].startswith("! 1 held-out prompt is too few to tell")
    assert "of 9 held-out prompts" in describe_evaluated(2, 9, "prompts")[0]
    assert tiny.accumulation == 3


@pytest.mark.parametrize(
    ("batches", "first", "line"),
    [
        (4, 0, None),
        (6, 1, "The first rollout batch trains only the critic. (--critic-warmup)"),
        (20, 3, "The first 3 rollout batches train only the critic. (--critic-warmup)"),
        (60, 10, "The first 10 rollout batches train only the critic. (--critic-warmup)"),
        (500, 10, "The first 10 rollout batches train only the critic. (--critic-warmup)"),
    ],
)
def test_the_critic_of_a_short_run_trains_alone_for_a_sixth_of_it(batches, first, line):
    found, lines = resolve_on_policy(PPOConfig(iters=batches), LORA, 100, 50)
    assert found.critic_batches == first
    assert [one for one in lines if "only the critic" in one] == ([line] if line else [])
    given, lines = resolve_on_policy(PPOConfig(iters=batches, critic_warmup=2), LORA, 100, 50)
    assert given.critic_batches == 2
    assert not any("only the critic" in one for one in lines)


def test_a_run_writes_every_choice_and_is_resumed_with_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(
        "pairs.jsonl",
        [{"prompt": f"Say yes {i}.", "chosen": " yes", "rejected": " no"} for i in range(10)],
    )
    options = ("--model", TINY_MODEL, "--data", "pairs.jsonl", "--samples", 0)
    assert mlx_align("dpo", *options, "--output", "run", "--lora-keys", "self_attn.q_proj") == 0
    assert "Defaults for 8 rows: 16 updates of about 4 rows" in capsys.readouterr().out
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["epochs"] == 8
    assert written["learning_rate"] == 2.5e-4  # 5 times that of wide models
    assert (written["beta"], written["lora_rank"], written["lora_alpha"]) == (0.1, 16, 32)
    assert written["grad_accumulation_steps"] == 1
    assert "batch_size" not in written
    assert written["batch_tokens"] % 8 == 0
    assert written["valid_fraction"] == 0.2
    assert summary_of("run")["steps"] == 16
    assert [row["step"] for row in metric_rows("run", "eval/loss")] == [0, 16]
    # The file gives the same run again, whatever is chosen for other data.
    assert mlx_align("dpo", "-c", "run/config.yaml", "--output", "again") == 0
    assert "Defaults" not in capsys.readouterr().out
    again = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert {**again, "output": "run"} == written


def test_the_target_margin_is_for_runs_whose_length_is_a_default():
    assert offline(DPOConfig(), 3_000)[0].target_margin == 0.5
    assert "above 0.5" in offline(DPOConfig(), 3_000)[2][1]
    assert offline(DPOConfig(target_margin=3.0), 3_000)[0].target_margin == 3
    assert offline(KTOConfig(), 3_000)[0].target_margin == 0.5
    for given in ({"iters": 10}, {"epochs": 1.0}, {"loss": "simpo"}):
        found, _, lines = offline(DPOConfig(**given), 3_000)
        assert found.target_margin == 0
        assert not any("above 0.5" in line for line in lines)


def test_a_run_of_kto_ends_when_good_completions_rank_above_bad_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"Say yes {i}.", "completion": " yes" if i % 2 else " no", "label": bool(i % 2)}
        for i in range(48)
    ]
    write_splits("data", train=rows[:36], valid=rows[36:])
    options = ("--model", TINY_MODEL, "--data", "data", "--samples", 0, "--learning-rate", 1e-2)
    evaluated = ("--steps-per-eval", 4, "--output", "run")
    assert mlx_align("kto", *options, *evaluated) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "if the held-out completions are learned: 90% ranked right" in shown
    ended = summary_of("run")
    rank = ended["eval"]["rewards/auc"]
    assert f"a good held-out completion ranks above a bad one in {rank:.0%}, and the" in shown
    assert rank >= 0.9
    assert ended["stopped_early"]
    rows = metric_rows("run", "eval/rewards/margins")
    low = [metric_interval(row, "eval/rewards/margins", 12).low for row in rows]
    assert low[-1] > 0.5 >= low[-2]


def test_a_run_ends_when_its_preference_is_learned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"Say yes {i}.", "chosen": " yes", "rejected": " no"} for i in range(48)]
    write_splits("data", train=pairs[:36], valid=pairs[36:])
    options = ("--model", TINY_MODEL, "--data", "data", "--samples", 0, "--learning-rate", 1e-2)
    evaluated = ("--steps-per-eval", 5, "--output", "run")
    assert mlx_align("dpo", *options, *evaluated) == 0
    assert "The preference is learned: 100% of the held-out pairs are" in capsys.readouterr().out
    ended = summary_of("run")
    planned = math.ceil(8 * 36 / 4)
    assert ended["steps"] < planned
    assert ended["stopped_early"]
    rows = metric_rows("run", "eval/rewards/margins")
    assert [row["step"] for row in rows] == [*range(0, ended["steps"] + 1, 5)]

    def low(row):
        return metric_interval(row, "eval/rewards/margins", 12).low

    assert low(rows[-1]) > 0.5 >= low(rows[-2])
    # Resumed as it is, it stays ended. Made longer, it trains on.
    assert mlx_align("dpo", "--resume", "run") == 0
    assert summary_of("run")["steps"] == ended["steps"]
    shutil.copytree("run", "copy")
    assert mlx_align("dpo", "--resume", "run", "--iters", ended["steps"] + 7) == 0
    assert summary_of("run")["steps"] == ended["steps"] + 7
    assert mlx_align("dpo", "--resume", "copy", "--epochs", 8) == 0
    assert summary_of("copy")["steps"] == planned
    assert not summary_of("copy")["stopped_early"]
    again = ("--iters", ended["steps"] + 2, "--output", "again")
    assert mlx_align("dpo", *options, *again, "--steps-per-eval", 5) == 0
    assert summary_of("again")["steps"] == ended["steps"] + 2


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"clip_eps": 0.2, "clip_eps_high": 0.2, "kl": None, "dynamic_sampling": False}),
        ({"loss": "dapo"}, {"clip_eps": 0.2, "clip_eps_high": 0.28, "dynamic_sampling": True}),
        ({"loss": "cispo", "kl_coef": 0.1}, {"clip_eps": None, "clip_eps_high": 5.0}),
        ({"loss": "rloo", "kl_coef": 0.1}, {"clip_eps": None, "clip_eps_high": None}),
        ({"clip_eps": 0.1}, {"clip_eps": 0.1, "clip_eps_high": 0.1}),
        ({"loss": "online_dpo"}, {"overlong": None, "clip_eps": None}),
    ],
)
def test_what_a_method_sets_is_resolved_and_changes_nothing(options, wanted):
    given = GRPOConfig(model="m", data="d", reward=("length",), **options)
    config, _ = resolve_on_policy(given, AdapterLayout(), 30, 6)
    assert {name: getattr(config, name) for name in wanted} == wanted
    if config.loss != "online_dpo":
        assert resolve_method(config) == resolve_method(given)
        check_grpo_options(config)
    if config.kl_coef:
        assert config.kl in KL_PLACES
