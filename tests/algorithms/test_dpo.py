"""`mlx-align dpo` from options to run folder, on a tiny model with a chat template."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.data import assistant, read_rows, write_splits
from helpers.paths import TINY_MODEL
from helpers.runs import (
    LN2,
    adapter_of,
    change_results,
    metric_rows,
    mlx_align,
    stop_after,
    summary_of,
    with_nan,
)
from mlx.utils import tree_flatten
from mlx_lm import generate as mlx_lm_generate
from mlx_lm import load as mlx_lm_load

from mlx_align.models.adapters import AdapterLayout, install_adapters, save_adapter
from mlx_align.models.loading import load_module

SMALL = ("--batch-size", 4, "--grad-accumulation-steps", 2, "--samples", 2, "--sample-tokens", 6)
HOT = ("--learning-rate", "3e-3", "--warmup", 0)


@pytest.fixture
def train_dpo(train, pairs, tmp_path):
    """Runs `mlx-align dpo` on the pairs; the exit code and the run folder."""

    def call(*options, output="run", **where):
        cache = ("--reference-cache", tmp_path / "cache")
        return train("dpo", *SMALL, *cache, *options, output=output, **{"data": pairs, **where})

    return call


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-3), ("4-bit", 1e-3)]
)
@pytest.mark.parametrize("checkpoint", ["--grad-checkpoint", "--no-grad-checkpoint"])
def test_a_run_starts_at_ln2_learns_and_loads_in_stock_mlx_lm(
    train_dpo, tiny_models, dtype, tolerance, checkpoint
):
    options = (*HOT, "--iters", 12, "--steps-per-report", 1, checkpoint)
    code, folder = train_dpo(*options, model=tiny_models[dtype])
    assert code == 0
    rows = metric_rows(folder, "loss")
    assert rows[0]["step"] == 1
    assert rows[0]["loss"] == pytest.approx(LN2, abs=tolerance)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < 0.5
    held_out = metric_rows(folder, "eval/loss")
    assert [row["step"] for row in held_out] == [0, 12]
    assert held_out[0]["eval/loss"] == pytest.approx(LN2, abs=1e-6)
    assert held_out[-1]["eval/rewards/accuracies"] == 1
    assert held_out[-1]["eval/logps/margins"] > held_out[0]["eval/logps/margins"]
    moved = [np.abs(w).max() for n, w in adapter_of(folder).items() if "lora_b" in n]
    assert min(moved) > 0
    summary = summary_of(folder)
    assert summary["steps"] == 12
    assert summary["pairs"] == 96
    assert summary["prompts_shared"] is True
    assert summary["kl"]["mean"] > 0
    assert summary["eval"]["loss"] == held_out[-1]["eval/loss"]
    samples = read_rows(folder / "samples.jsonl")
    assert {"prompt", "before", "after"} <= samples[0].keys()

    model, tokenizer = mlx_lm_load(str(tiny_models[dtype]), adapter_path=str(folder))
    assert mlx_lm_generate(model, tokenizer, "is sun good?", max_tokens=4)


def test_the_reference_is_where_the_policy_starts(train_dpo, tmp_path, pairs):
    """With an SFT adapter: ln 2 at step 1, and the reference is the model with that adapter."""
    other = AdapterLayout(rank=3, scale=10.0, keys=("self_attn.q_proj", "mlp.down_proj"))
    sft = load_module(TINY_MODEL)
    mx.random.seed(3)
    install_adapters(sft, other)
    for name, weight in tree_flatten(sft.trainable_parameters()):
        if name.endswith("lora_b"):
            weight[:] = 0.05 * mx.random.normal(weight.shape)
    (tmp_path / "sft").mkdir()
    save_adapter(tmp_path / "sft", sft.trainable_parameters(), other, "base")

    options = (*HOT, "--iters", 6, "--steps-per-report", 1, "--init-adapter", tmp_path / "sft")
    wider = ("--lora-rank", 6, "--lora-alpha", 12, "--num-layers", -1)
    code, folder = train_dpo(*options, *wider, "--val-batches", -1)
    assert code == 0
    rows = metric_rows(folder)
    assert next(r for r in rows if r["step"] == 1)["loss"] == pytest.approx(LN2, abs=1e-6)

    # The same loss from two whole models, rows one by one.
    policy, tokenizer = mlx_lm_load(str(TINY_MODEL), adapter_path=str(folder))
    start, _ = mlx_lm_load(str(TINY_MODEL), adapter_path=str(tmp_path / "sft"))
    base, _ = mlx_lm_load(str(TINY_MODEL))

    def loss(reference_model):
        losses = []
        for row in read_rows(pairs / "valid.jsonl"):
            ratios = []
            for name in ("chosen", "rejected"):
                ids, n = _token_ids(tokenizer, row["prompt"], row[name])
                pair = [_sequence_logp(m, ids, n) for m in (policy, reference_model)]
                ratios.append(pair[0] - pair[1])
            losses.append(np.log1p(np.exp(-0.1 * (ratios[0] - ratios[1]))))
        return np.mean(losses)

    final = rows[-1]["eval/loss"]
    assert final == pytest.approx(loss(start), abs=1e-5)
    assert abs(final - loss(base)) > 1e-3  # the bare base would be another reference


def _token_ids(tokenizer, prompt, answer):
    head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(prompt + answer)
    assert whole[: len(head)] == head
    end = max(i for i, t in enumerate(whole) if t in tokenizer.eos_token_ids or t == whole[-2])
    return whole[: end + 1] if whole[-1] not in tokenizer.eos_token_ids else whole, len(head)


def _sequence_logp(model, ids, start):
    logits = np.array(model(mx.array([ids]))[0].astype(mx.float32), np.float64)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(logps[t - 1, ids[t]] for t in range(start, len(ids)))


def test_reference_log_probs_are_computed_once(
    train_dpo, tiny_models, pairs, tmp_path, monkeypatch
):
    """Each pair once, independent of the number of epochs; not again for the same pairs."""
    from mlx_align.inference import scoring

    scored = []

    def counting(scorer):
        def counted(weights, batch):
            scored.append(int(batch.completion_mask.any(axis=1).sum().item()))
            return scorer(weights, batch)

        return counted

    change_results(monkeypatch, scoring, "compile_forward", counting)

    def scored_by(output, *options, **named):
        scored.clear()
        model = named.pop("model", "float32")
        # One evaluation, after the last update: 12 held-out pairs.
        passes = () if "--iters" in options else ("--epochs", 1)
        options = ("--samples", 0, "--steps-per-eval", 0, *passes, *options)
        assert train_dpo(*options, output=output, **named, model=tiny_models[model])[0] == 0
        assert scored.count(0) == 0
        return sum(scored) - 24

    every = 2 * (40 + 12)
    assert scored_by("a", "--epochs", 3) == every
    assert scored_by("b", "--epochs", 3) == 0
    assert scored_by("c", "--loss", "ipo") == 0
    assert scored_by("d", "--init-adapter", tmp_path / "a") == every
    assert scored_by("e", "--init-adapter", tmp_path / "a") == 0
    # Another adapter in the same folder; another model; two answers that changed.
    weights = tmp_path / "a" / "adapters.safetensors"
    mx.save_safetensors(str(weights), {k: 2 * v for k, v in mx.load(str(weights)).items()})
    assert scored_by("f", "--init-adapter", tmp_path / "a") == every
    assert scored_by("g", model="bfloat16") == every
    assert scored_by("h", "--adapter-dtype", "bfloat16", model="bfloat16") == every
    rows = {split: read_rows(pairs / f"{split}.jsonl") for split in ("train", "valid")}
    for row in rows["train"][3:5]:
        row["rejected"] = assistant("not now")
    changed = write_splits(tmp_path / "changed", **rows)
    assert scored_by("i", data=changed) == 4
    # A run that sees a part of the data computes that part.
    other = ("--reference-cache", tmp_path / "other")
    assert scored_by("j", "--iters", 1, *other) == 2 * (8 + 12)


@pytest.mark.parametrize("kind", [("--fine-tune-type", "dora"), ("--fine-tune-type", "full")])
def test_dora_and_full_fine_tuning(train_dpo, kind):
    rate = ("--learning-rate", "3e-4" if "full" in kind else "3e-3")
    options = (*kind, *rate, "--warmup", 0, "--iters", 8, "--steps-per-report", 1)
    code, folder = train_dpo(*options)
    assert code == 0
    rows = metric_rows(folder, "loss")
    assert rows[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.02
    model, tokenizer = mlx_lm_load(str(TINY_MODEL), adapter_path=str(folder))
    assert mlx_lm_generate(model, tokenizer, "is sun good?", max_tokens=4)

    fused = folder.parent / "fused"
    where = ["--adapter-path", str(folder), "--output", str(fused)]
    assert mlx_align("fuse", "--model", TINY_MODEL, *where) == 0
    merged, _ = mlx_lm_load(str(fused))
    tokens = mx.array([tokenizer.encode("is the sun good?")])
    assert mx.allclose(merged(tokens), model(tokens), atol=1e-4)


def test_resumed_run_ends_with_the_same_bytes(train_dpo, tmp_path, capsys, monkeypatch):
    options = (*HOT, "--iters", 8, "--lora-dropout", 0.1, "--steps-per-report", 2)
    assert train_dpo(*options, output="whole")[0] == 0

    # Interrupt after update 4, and resume.
    with monkeypatch.context() as patched:
        stop_after(patched, 4)
        assert train_dpo(*options, output="parts")[0] == 130
    assert "resume with: mlx-align dpo --resume" in capsys.readouterr().out
    assert train_dpo(*options, output="parts")[0] == 1
    assert "already contains another run" in capsys.readouterr().err
    assert mlx_align("dpo", "--resume", "parts", "--beta", "0.7") == 1
    assert "--beta 0.7: the run has 0.1" in capsys.readouterr().err
    assert mlx_align("dpo", "--resume", "parts") == 0
    whole, both = ((tmp_path / n / "adapters.safetensors").read_bytes() for n in ("whole", "parts"))
    assert whole == both
    for name in ("whole", "parts"):
        steps = [row["step"] for row in metric_rows(tmp_path / name, "loss")]
        assert steps == [1, 2, 4, 6, 8]
    # Nothing is left to do: the same adapter, and a summary as full as before.
    before = summary_of("parts")
    assert mlx_align("dpo", "--resume", "parts") == 0
    after = summary_of("parts")
    assert (tmp_path / "parts" / "adapters.safetensors").read_bytes() == whole
    assert after["train"] == before["train"]
    assert after["eval_before"] == before["eval_before"]
    losses = [[r.get("loss") for r in metric_rows(tmp_path / n)] for n in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_token_budget_from_options_to_summary_and_resumed(train, pairs, monkeypatch):
    options = ("--batch-tokens", 300, "--grad-accumulation-steps", 2, "--samples", 0)
    options += ("--reference-cache", "cache", "--epochs", 2, "--steps-per-report", 1, *HOT)
    assert train("dpo", *options, data=pairs, output="whole")[0] == 0
    summary = summary_of("whole")
    assert all(prompt + completion <= 300 for prompt, completion, _, _ in summary["shapes"])
    assert all(groups > 1 for _, _, groups, _ in summary["shapes"])
    assert summary["pairs"] == pytest.approx(80, abs=8)
    rows = metric_rows("whole", "loss")
    assert rows[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert rows[-1]["loss"] < 0.5

    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        assert train("dpo", *options, data=pairs, output="parts")[0] == 130
    assert mlx_align("dpo", "--resume", "parts") == 0
    adapters = [Path(name, "adapters.safetensors").read_bytes() for name in ("whole", "parts")]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_its_exit_code(pairs, tmp_path, signum, code):
    folder = tmp_path / "run"
    arguments = ("--model", TINY_MODEL, "--data", pairs, "--output", folder, "--iters", 100000)
    arguments += ("--reference-cache", tmp_path / "cache", "--steps-per-report", 1, *SMALL)
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_align.cli.main", "dpo", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            metrics = folder / "metrics.jsonl"
            if metrics.exists() and '"step": 2,' in metrics.read_text():
                break
            time.sleep(0.1)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, output
    assert "Traceback" not in output
    assert f"mlx-align dpo --resume {folder}" in output
    assert list((folder / "checkpoints").glob("[0-9]*"))


def test_json_is_the_only_thing_on_standard_output(train_dpo, capsys):
    assert train_dpo("--iters", 1, "--json")[0] == 0
    out = capsys.readouterr().out
    assert json.loads(out)["command"] == "dpo"


def test_fuse_keeps_what_was_learned(train_dpo, tiny_models, tmp_path, capsys):
    for dtype in ("float32", "4-bit"):
        _, folder = train_dpo(*HOT, "--iters", 6, output=f"run-{dtype}", model=tiny_models[dtype])
        capsys.readouterr()
        fused = tmp_path / f"fused-{dtype}"
        options = ["--adapter-path", str(folder), "--output", str(fused), "--json"]
        assert mlx_align("fuse", "--model", tiny_models[dtype], *options) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["logps_change"] > 0.01
        assert report["logps_gap"] < 0.1 * report["logps_change"]
        merged, tokenizer = mlx_lm_load(str(fused))
        adapted, _ = mlx_lm_load(str(tiny_models[dtype]), adapter_path=str(folder))
        tokens = mx.array([tokenizer.encode("is the sun good?")])
        assert mx.allclose(merged(tokens), adapted(tokens), atol=0.1 * report["logps_change"])
        # Not empty, so not overwritten.
        assert mlx_align("fuse", "--model", tiny_models[dtype], *options) == 1
        assert "is not empty" in capsys.readouterr().err


def test_cache_command_shows_and_purges(train_dpo, tmp_path, capsys):
    assert train_dpo("--iters", 1)[0] == 0
    capsys.readouterr()
    where = ["--reference-cache", str(tmp_path / "cache")]
    assert mlx_align("cache", "--json", *where) == 0
    shown = json.loads(capsys.readouterr().out)
    (store,) = shown["stores"]
    assert shown["bytes"] == store["bytes"] > 0
    assert store["model"] == str(TINY_MODEL)
    assert store["adapter"] == ""
    assert mlx_align("cache", *where) == 0
    (line, _) = capsys.readouterr().out.splitlines()
    assert line.startswith(store["changed"].replace("T", " ")[:16])
    assert line.endswith(f"{store['completions']} completions  {TINY_MODEL}")
    assert mlx_align("cache", "--purge", *where) == 0
    assert not list((tmp_path / "cache").glob("*.sqlite"))


def test_data_check_shows_a_rendered_pair(pairs, capsys):
    assert mlx_align("data", "check", "--model", TINY_MODEL, "--data", pairs) == 0
    out = capsys.readouterr().out
    assert "40 pairs kept of 40" in out
    assert "prompt" in out
    assert "⟧" in out


def test_a_non_finite_loss_names_its_rows_and_keeps_the_last_good_checkpoint(
    train_dpo, monkeypatch, capsys
):
    from mlx_align.algorithms import dpo

    # The second microbatch of the third update.
    change_results(monkeypatch, dpo, "collate_pairs", with_nan("weight"), lambda n: n == 6)
    code, folder = train_dpo(*HOT, "--iters", 40, "--save-every", 0)
    assert code == 1
    message = capsys.readouterr().err
    assert "the loss is not finite on rows train.jsonl:" in message
    [kept] = (folder / "checkpoints").glob("*/adapters.safetensors")
    assert kept.parent.name == "0000002"
    for weight in mx.load(str(kept)).values():
        assert np.isfinite(np.array(weight)).all()


def test_without_a_reference_training_has_no_rewards(train_dpo, capsys):
    """Rewards are relative to a reference, which only held-out pairs have then."""
    options = ("--loss", "simpo", "--learning-rate", "1e-9", "--iters", 4)
    code, folder = train_dpo(*options, "--steps-per-report", 1, "--steps-per-eval", 1)
    assert code == 0
    rows = metric_rows(folder, "loss")
    assert len(rows) == 4
    assert all("logps/accuracies" in row for row in rows)
    assert not any(key.startswith("rewards/") for row in rows for key in row)
    held_out = metric_rows(folder, "eval/rewards/margins")
    assert len(held_out) == 5
    assert abs(held_out[-1]["eval/rewards/margins"]) < 1e-3
    # Nothing was learned, so nothing overfits, whatever the log-probs of training pairs are.
    summary = summary_of(folder)
    assert "rewards/accuracies" not in [finding["signal"] for finding in summary["findings"]]
    assert summary["verdict"]["kind"] != "overfitted"
    assert "overfit" not in capsys.readouterr().out
