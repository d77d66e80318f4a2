"""Full fine-tuning of 16-bit models: float32 masters are trained, and what can't be is refused."""

import hashlib
import json
import shutil

import mlx.core as mx
import pytest
from helpers.paths import STARTER_MODEL
from mlx.utils import tree_flatten
from mlx_lm import convert

from mlx_align.cli.main import run as run_cli
from mlx_align.models.loading import load_language_model, open_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no no"} for n in range(12)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for dtype in ("bfloat16", "float16"):
        convert(str(STARTER_MODEL), str(folder / dtype), dtype=dtype)
    return folder


def options(data, model, output, *more):
    where = ["--model", str(data / model), "--data", str(data / "pairs.jsonl")]
    rest = ["--fine-tune-type", "full", "--learning-rate", "1e-6", "--warmup", "0"]
    return ["dpo", *where, *rest, "--samples", "0", "--output", str(output), *map(str, more)]


def test_a_bf16_model_is_trained_in_float32(data, tmp_path):
    run = tmp_path / "run"
    assert run_cli(options(data, "bfloat16", run, "--iters", 4)) == 0
    base = dict(
        tree_flatten(load_language_model(open_model(str(data / "bfloat16"))).module.parameters())
    )
    trained = dict(mx.load(str(run / "adapters.safetensors")))
    changed = total = 0
    for name, weight in trained.items():
        assert weight.dtype == mx.float32
        changed += (weight != base[name].astype(mx.float32)).sum().item()
        total += weight.size
    # Four updates of 1e-6 are far below bf16's spacing, and nearly every weight moved.
    assert changed > 0.9 * total
    # The run is read again, scored and fused.
    score = ["--model", str(data / "bfloat16"), "--adapter-path", str(run)]
    rows = ["--data", str(data / "pairs.jsonl"), "--output", str(tmp_path / "scores.jsonl")]
    assert run_cli(["score", *score, *rows]) == 0
    assert run_cli(["fuse", *score, "--output", str(tmp_path / "fused")]) == 0


def test_a_checkpoint_with_16_bit_weights_is_resumed(data, tmp_path):
    # As earlier versions wrote them.
    run = tmp_path / "run"
    first = options(data, "bfloat16", run, "--iters", 4, "--save-every", 2)
    assert run_cli(first) == 0
    checkpoint = run / "checkpoints" / "0000002"
    shutil.rmtree(run / "checkpoints" / "0000004")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in ("adapters.safetensors", "policy.optimizer.safetensors"):
        file = checkpoint / name
        weights = {
            key: one.astype(mx.bfloat16) if one.ndim else one
            for key, one in dict(mx.load(str(file))).items()
        }
        mx.eval(weights)
        mx.save_safetensors(str(file), weights)
        digest = hashlib.blake2b(file.read_bytes()).hexdigest()
        manifest["files"][name] = {"bytes": file.stat().st_size, "blake2b": digest}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert run_cli(["dpo", "--resume", str(run)]) == 0
    assert all(
        one.dtype == mx.float32 for one in dict(mx.load(str(run / "adapters.safetensors"))).values()
    )


def test_float16_is_refused_with_its_reason(data, tmp_path, capsys):
    assert run_cli(options(data, "float16", tmp_path / "run", "--iters", 1)) == 1
    said = capsys.readouterr().err
    assert "float16, in which gradients below 6e-8 vanish" in said
    assert "mlx_lm.convert --dtype bfloat16" in said
