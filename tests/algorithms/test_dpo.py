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
from helpers.paths import TINY_MODEL
from mlx.utils import tree_flatten
from mlx_lm import generate as mlx_lm_generate
from mlx_lm import load as mlx_lm_load
from mlx_lm.convert import convert

from mlx_align.cli.main import run
from mlx_align.models.adapters import AdapterLayout, install_adapters, save_adapter
from mlx_align.models.loading import load_module
from mlx_align.training import reference
from mlx_align.training.callbacks import Callbacks

LN2 = 0.6931471805599453


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The tiny model in float32, bfloat16 and 4 bits."""
    folder = tmp_path_factory.mktemp("models")
    convert(str(TINY_MODEL), str(folder / "bfloat16"), dtype="bfloat16")
    convert(str(TINY_MODEL), str(folder / "4-bit"), quantize=True, q_bits=4, q_group_size=32)
    return {"float32": TINY_MODEL, "bfloat16": folder / "bfloat16", "4-bit": folder / "4-bit"}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Pairs whose chosen answers say yes and whose rejected ones say no, of many lengths."""
    folder = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    for name, n in (("train", 40), ("valid", 8)):
        rows = []
        for i in range(n):
            words = " ".join(random.choice(["sun", "rain", "wind"], random.integers(1, 6)))
            tail = "a" * int(random.integers(0, 9))
            rows.append(
                {
                    "prompt": [{"role": "user", "content": f"{name} {i}: is {words} good?"}],
                    "chosen": [{"role": "assistant", "content": f"yes {tail}"}],
                    "rejected": [{"role": "assistant", "content": f"no {tail[1:]} never"}],
                }
            )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def train(tmp_path, pairs, monkeypatch):
    """Runs `mlx-align dpo` in this process; the exit code and the run folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(reference, "default_cache_folder", lambda: tmp_path / "cache")

    def call(model, *options, output="run", data=pairs):
        code = run(
            ["dpo", "--model", str(model), "--data", str(data), "--output", output]
            + ["--reference-cache", str(tmp_path / "cache")]
            + [str(option) for option in (*SMALL, *options)]
        )
        return code, tmp_path / output

    return call


SMALL = ("--batch-size", 4, "--grad-accumulation-steps", 2, "--samples", 2, "--sample-tokens", 6)
HOT = ("--learning-rate", "3e-3", "--warmup", 0)


def rows_of(run_folder):
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def adapter_of(run_folder):
    return mx.load(str(run_folder / "adapters.safetensors"))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-3), ("4-bit", 1e-3)]
)
@pytest.mark.parametrize("checkpoint", ["--grad-checkpoint", "--no-grad-checkpoint"])
def test_a_run_starts_at_ln2_learns_and_loads_in_stock_mlx_lm(
    train, models, dtype, tolerance, checkpoint
):
    options = (*HOT, "--iters", 12, "--steps-per-report", 1, checkpoint)
    code, folder = train(models[dtype], *options)
    assert code == 0
    rows = [row for row in rows_of(folder) if "loss" in row]
    assert rows[0]["step"] == 1
    assert rows[0]["loss"] == pytest.approx(LN2, abs=tolerance)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < 0.5
    held_out = [row for row in rows_of(folder) if "eval/loss" in row]
    assert [row["step"] for row in held_out] == [0, 12]
    assert held_out[0]["eval/loss"] == pytest.approx(LN2, abs=1e-6)
    assert held_out[-1]["eval/rewards/accuracies"] == 1
    assert held_out[-1]["eval/logps/margins"] > held_out[0]["eval/logps/margins"]
    moved = [mx.abs(w).max().item() for n, w in adapter_of(folder).items() if "lora_b" in n]
    assert min(moved) > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["pairs"] == 96
    assert summary["prompts_shared"] is True
    assert summary["kl"]["mean"] > 0
    assert summary["eval"]["loss"] == held_out[-1]["eval/loss"]
    samples = (folder / "samples.jsonl").read_text().splitlines()
    assert {"prompt", "before", "after"} <= json.loads(samples[0]).keys()

    model, tokenizer = mlx_lm_load(str(models[dtype]), adapter_path=str(folder))
    assert mlx_lm_generate(model, tokenizer, "is sun good?", max_tokens=4)


def test_the_reference_is_where_the_policy_starts(train, models, tmp_path, pairs):
    """With an SFT adapter: ln 2 at step 1, and the reference is the model with that adapter."""
    other = AdapterLayout(rank=3, scale=10.0, keys=("self_attn.q_proj", "mlp.down_proj"))
    sft = load_module(models["float32"])
    mx.random.seed(3)
    install_adapters(sft, other)
    for name, weight in tree_flatten(sft.trainable_parameters()):
        if name.endswith("lora_b"):
            weight[:] = 0.05 * mx.random.normal(weight.shape)
    (tmp_path / "sft").mkdir()
    save_adapter(tmp_path / "sft", sft.trainable_parameters(), other, "base")

    options = (*HOT, "--iters", 6, "--steps-per-report", 1, "--init-adapter", tmp_path / "sft")
    wider = ("--lora-rank", 6, "--lora-alpha", 12, "--num-layers", -1)
    code, folder = train(models["float32"], *options, *wider, "--val-batches", -1)
    assert code == 0
    rows = rows_of(folder)
    assert next(r for r in rows if r["step"] == 1)["loss"] == pytest.approx(LN2, abs=1e-6)

    # The same loss from two whole models, rows one by one.
    policy, tokenizer = mlx_lm_load(str(models["float32"]), adapter_path=str(folder))
    start, _ = mlx_lm_load(str(models["float32"]), adapter_path=str(tmp_path / "sft"))
    base, _ = mlx_lm_load(str(models["float32"]))

    def loss(reference_model):
        losses = []
        for line in (pairs / "valid.jsonl").read_text().splitlines():
            row = json.loads(line)
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


def test_reference_log_probs_are_computed_once(train, models, pairs, tmp_path, monkeypatch):
    """Counted where they run: each pair's once, whatever the epochs; none on the same again."""
    from mlx_align.inference import scoring

    rows = []
    original = scoring.compile_forward

    def counting(model, run):
        scorer = original(model, run)

        def counted(tree, batch):
            rows.append(int(batch.completion_mask.any(axis=1).sum().item()))
            return scorer(tree, batch)

        return counted

    monkeypatch.setattr(scoring, "compile_forward", counting)

    def passes(output, *options, **named):
        rows.clear()
        model = named.pop("model", "float32")
        # One evaluation, after the last update: 8 held-out pairs.
        options = ("--samples", 0, "--steps-per-eval", 0, *options)
        assert train(models[model], *options, output=output, **named)[0] == 0
        assert rows.count(0) == 0
        return sum(rows) - 16

    every = 2 * (40 + 8)
    assert passes("a", "--epochs", 3) == every
    assert passes("b", "--epochs", 3) == 0
    assert passes("c", "--epochs", 1, "--loss", "ipo") == 0
    assert passes("d", "--init-adapter", tmp_path / "a") == every
    assert passes("e", "--init-adapter", tmp_path / "a") == 0
    # Another adapter in the same folder; another model; two answers that changed.
    weights = tmp_path / "a" / "adapters.safetensors"
    mx.save_safetensors(str(weights), {k: 2 * v for k, v in mx.load(str(weights)).items()})
    assert passes("f", "--init-adapter", tmp_path / "a") == every
    assert passes("g", model="bfloat16") == every
    assert passes("h", "--adapter-dtype", "bfloat16", model="bfloat16") == every
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "valid.jsonl").write_text((pairs / "valid.jsonl").read_text())
    lines = (pairs / "train.jsonl").read_text().splitlines()
    lines[3:5] = [line.replace("never", "not now") for line in lines[3:5]]
    (changed / "train.jsonl").write_text("\n".join(lines) + "\n")
    assert passes("i", data=changed) == 4
    # A run that sees a part of the data computes that part.
    other = ("--reference-cache", tmp_path / "other")
    assert passes("j", "--iters", 1, *other) == 2 * (8 + 8)


@pytest.mark.parametrize("kind", [("--fine-tune-type", "dora"), ("--fine-tune-type", "full")])
def test_dora_and_full_fine_tuning(train, models, kind):
    rate = ("--learning-rate", "3e-4" if "full" in kind else "3e-3")
    options = (*kind, *rate, "--warmup", 0, "--iters", 8, "--steps-per-report", 1)
    code, folder = train(models["float32"], *options)
    assert code == 0
    rows = [row for row in rows_of(folder) if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.02
    model, tokenizer = mlx_lm_load(str(models["float32"]), adapter_path=str(folder))
    assert mlx_lm_generate(model, tokenizer, "is sun good?", max_tokens=4)

    fused = folder.parent / "fused"
    where = ["--adapter-path", str(folder), "--output", str(fused)]
    assert run(["fuse", "--model", str(models["float32"]), *where]) == 0
    merged, _ = mlx_lm_load(str(fused))
    tokens = mx.array([tokenizer.encode("is the sun good?")])
    assert mx.allclose(merged(tokens), model(tokens), atol=1e-4)


def stop_after(monkeypatch, step, stop=lambda: signal.raise_signal(signal.SIGINT)):
    """Call `stop` as soon as this step is done."""
    original = Callbacks.on_step_end

    def on_step_end(self, at, metrics):
        result = original(self, at, metrics)
        if at == step:
            stop()
        return result

    monkeypatch.setattr(Callbacks, "on_step_end", on_step_end)


def test_resumed_run_ends_with_the_same_bytes(train, models, tmp_path, capsys, monkeypatch):
    options = (*HOT, "--iters", 8, "--lora-dropout", 0.1, "--steps-per-report", 2)
    assert train(models["float32"], *options, output="whole")[0] == 0

    # Stop after update 4, as a signal would, and go on.
    with monkeypatch.context() as patched:
        stop_after(patched, 4)
        assert train(models["float32"], *options, output="parts")[0] == 130
    assert "resume with: mlx-align dpo --resume" in capsys.readouterr().out
    assert train(models["float32"], *options, output="parts")[0] == 1
    assert "holds another run" in capsys.readouterr().err
    parts = str(tmp_path / "parts")
    assert run(["dpo", "--resume", parts, "--beta", "0.7"]) == 1
    assert "--beta 0.7: the run has None" in capsys.readouterr().err
    assert run(["dpo", "--resume", parts]) == 0
    whole, both = ((tmp_path / n / "adapters.safetensors").read_bytes() for n in ("whole", "parts"))
    assert whole == both
    for name in ("whole", "parts"):
        steps = [row["step"] for row in rows_of(tmp_path / name) if "loss" in row]
        assert steps == [1, 2, 4, 6, 8]
    # Nothing is left to do: the same adapter, and a summary as full as before.
    before = json.loads((tmp_path / "parts" / "summary.json").read_text())
    assert run(["dpo", "--resume", parts]) == 0
    after = json.loads((tmp_path / "parts" / "summary.json").read_text())
    assert (tmp_path / "parts" / "adapters.safetensors").read_bytes() == whole
    assert after["train"] == before["train"]
    assert after["eval_before"] == before["eval_before"]
    losses = [[r.get("loss") for r in rows_of(tmp_path / n)] for n in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_token_budget_from_options_to_summary_and_resumed(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def train(output, *options):
        command = ["dpo", "--model", str(TINY_MODEL), "--data", str(pairs), "--output", output]
        command += ["--batch-tokens", "300", "--grad-accumulation-steps", "2", "--samples", "0"]
        command += ["--reference-cache", "cache", "--epochs", "2", "--steps-per-report", "1"]
        return run([*command, *map(str, (*HOT, *options))])

    assert train("whole") == 0
    summary = json.loads(Path("whole/summary.json").read_text())
    assert all(prompt + completion <= 300 for prompt, completion, _, _ in summary["shapes"])
    assert all(groups > 1 for _, _, groups, _ in summary["shapes"])
    assert summary["pairs"] == pytest.approx(80, abs=8)
    rows = [row for row in rows_of(Path("whole")) if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert rows[-1]["loss"] < 0.5

    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        assert train("parts") == 130
    assert run(["dpo", "--resume", "parts"]) == 0
    adapters = [Path(name, "adapters.safetensors").read_bytes() for name in ("whole", "parts")]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_its_exit_code(models, pairs, tmp_path, signum, code):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "mlx_align.cli.main", "dpo", "--model", str(models["float32"])]
    command += ["--data", str(pairs), "--output", str(folder), "--iters", "100000"]
    command += ["--reference-cache", str(tmp_path / "cache"), "--steps-per-report", "1"]
    command += [str(option) for option in SMALL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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


def test_json_is_the_only_thing_on_standard_output(train, models, capsys):
    assert train(models["float32"], "--iters", 1, "--json")[0] == 0
    out = capsys.readouterr().out
    assert json.loads(out)["command"] == "dpo"


def test_fuse_keeps_what_was_learned(train, models, tmp_path, capsys):
    for dtype in ("float32", "4-bit"):
        _, folder = train(models[dtype], *HOT, "--iters", 6, output=f"run-{dtype}")
        capsys.readouterr()
        fused = tmp_path / f"fused-{dtype}"
        options = ["--adapter-path", str(folder), "--output", str(fused), "--json"]
        assert run(["fuse", "--model", str(models[dtype]), *options]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["logps_change"] > 0.01
        assert report["logps_gap"] < 0.1 * report["logps_change"]
        merged, tokenizer = mlx_lm_load(str(fused))
        adapted, _ = mlx_lm_load(str(models[dtype]), adapter_path=str(folder))
        tokens = mx.array([tokenizer.encode("is the sun good?")])
        assert mx.allclose(merged(tokens), adapted(tokens), atol=0.1 * report["logps_change"])
        # Not empty, so not overwritten.
        assert run(["fuse", "--model", str(models[dtype]), *options]) == 1
        assert "is not empty" in capsys.readouterr().err


def test_cache_command_shows_and_purges(train, models, tmp_path, capsys):
    assert train(models["float32"], "--iters", 1)[0] == 0
    capsys.readouterr()
    where = ["--reference-cache", str(tmp_path / "cache")]
    assert run(["cache", "--json", *where]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["stores"]) == 1
    assert shown["bytes"] > 0
    assert run(["cache", "--purge", *where]) == 0
    assert not list((tmp_path / "cache").glob("*.sqlite"))


def test_data_check_prints_the_screen(models, pairs, capsys):
    assert run(["data", "check", "--model", str(models["float32"]), "--data", str(pairs)]) == 0
    out = capsys.readouterr().out
    assert "40 pairs kept of 40" in out
    assert "prompt" in out
    assert "⟧" in out


def test_a_loss_that_is_not_finite_stops_names_rows_and_keeps_what_was_good(
    train, models, tmp_path, capsys
):
    from mlx_align.algorithms import dpo

    original = dpo.collate_pairs
    calls = []

    def poisoned(*arguments):
        calls.append(arguments)
        batch = original(*arguments)
        # The second microbatch of the third update.
        return batch if len(calls) != 6 else batch._replace(weight=batch.weight * mx.nan)

    dpo.collate_pairs = poisoned
    try:
        code, folder = train(models["float32"], *HOT, "--iters", 40, "--save-every", 0)
    finally:
        dpo.collate_pairs = original
    assert code == 1
    message = capsys.readouterr().err
    assert "the loss is not finite on rows train.jsonl:" in message
    [kept] = (folder / "checkpoints").glob("*/adapters.safetensors")
    assert kept.parent.name == "0000002"
    for weight in mx.load(str(kept)).values():
        assert np.isfinite(np.array(weight)).all()
