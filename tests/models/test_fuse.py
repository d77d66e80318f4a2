"""Fusing: the change is kept for every way in which a base model stores its weights."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.paths import STARTER_MODEL
from mlx.utils import tree_flatten
from mlx_lm import convert, load
from mlx_lm.tuner.lora import LoRALinear

from mlx_align.cli.main import run as run_cli
from mlx_align.models import fuse
from mlx_align.models.adapters import AdapterLayout, install_adapters, load_adapter, save_adapter
from mlx_align.models.fuse import MAX_LOST_CHANGE, fuse_adapter
from mlx_align.models.loading import load_language_model, open_model

WAYS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "4-bit": {"dtype": "bfloat16", "quantize": True, "q_bits": 4, "q_group_size": 32},
    "mxfp4": {"dtype": "bfloat16", "quantize": True, "q_mode": "mxfp4"},
    "mixed": {"dtype": "bfloat16", "quantize": True, "quant_predicate": "mixed_3_6"},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    made = {}

    def base(name):
        if name not in made:
            made[name] = folder / name
            convert(str(STARTER_MODEL), str(made[name]), **WAYS[name])
        return made[name]

    return base


def adapter(base, folder, size, layout=None):
    layout = layout or AdapterLayout(rank=4)
    model = load_language_model(open_model(str(base)))
    mx.random.seed(3)
    weights = install_adapters(model.module, layout)
    for name, array in tree_flatten(weights):
        if name.endswith("lora_b"):
            array[:] = mx.random.normal(array.shape) * size
    folder.mkdir()
    save_adapter(folder, weights, layout, str(base))
    return folder


def float32_sums(base, adapter_folder, layout=None):
    """The weights of base + scale·B·A, summed in float64."""
    layout = layout or AdapterLayout(rank=4)
    model = load_language_model(open_model(str(base)))
    start = install_adapters(model.module, layout)
    model.module.update(load_adapter(adapter_folder, start, layout))
    found = {}
    for name, module in model.module.named_modules():
        if "lora_a" in module:
            before = plain(module.linear)
            a, b = (np.array(module[key], np.float64) for key in ("lora_a", "lora_b"))
            found[name] = before, before + module.scale * (a @ b).T
    return found


def plain(layer):
    if not hasattr(layer, "bits"):
        return np.array(layer.weight.astype(mx.float32), np.float64)
    biases = layer.get("biases")
    weight = mx.dequantize(
        layer.weight,
        layer.scales if layer.mode != "affine" else layer.scales.astype(mx.float32),
        biases if biases is None else biases.astype(mx.float32),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=mx.float32,
    )
    return np.array(weight, np.float64)


@pytest.mark.parametrize("size", [3e-1, 1e-2, 3e-4])
@pytest.mark.parametrize("way", list(WAYS))
def test_what_is_written_keeps_the_change(bases, tmp_path, way, size):
    base = bases(way)
    run = adapter(base, tmp_path / "run", size)
    report = fuse_adapter(open_model(str(base)), run, tmp_path / "fused")
    # Read by stock mlx-lm, which knows from config.json how each layer is stored.
    fused, _ = load(str(tmp_path / "fused"))
    modules = dict(fused.named_modules())
    assert all(layer.lost_stored <= MAX_LOST_CHANGE for layer in report.layers)
    for name, (before, wanted) in float32_sums(base, run).items():
        lost = np.linalg.norm(plain(modules[name]) - wanted) / np.linalg.norm(wanted - before)
        assert lost <= MAX_LOST_CHANGE + 1e-3
    size_on_disk = sum(f.stat().st_size for f in (tmp_path / "fused").glob("*.safetensors"))
    assert report.bytes_after == pytest.approx(size_on_disk, abs=60_000)
    # What is left of the log-probs' change, with float32 activations on both sides.
    assert report.logps_lost <= 0.05
    if way == "float32":
        assert report.logps_gap < 1e-4
        assert report.bytes_after == report.bytes_before
    if size == 3e-4 and way != "float32":
        # A small change needs float32, and the report says what 16 or 4 bits would lose.
        assert all(
            layer.stored == "float32" and layer.lost > MAX_LOST_CHANGE for layer in report.layers
        )
        assert report.bytes_after > report.bytes_before
    if size == 3e-1:
        assert {layer.stored for layer in report.layers} != {"float32"} or way == "float32"


def test_8_bits_where_4_lose_too_much(bases, tmp_path):
    base = bases("4-bit")
    run = adapter(base, tmp_path / "run", 1e-1)
    report = fuse_adapter(open_model(str(base)), run, tmp_path / "fused")
    assert {layer.stored for layer in report.layers} == {"8 bits"}
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    name = report.layers[0].name
    assert config["quantization"][name] == {"group_size": 32, "bits": 8, "mode": "affine"}


@pytest.mark.parametrize("size", [3e-1, 1e-3])
def test_dequantize_leaves_nothing_quantised(bases, tmp_path, size):
    base = bases("4-bit")
    run = adapter(base, tmp_path / "run", size)
    fuse_adapter(open_model(str(base)), run, tmp_path / "fused", dequantize=True)
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert not [key for key in config if key.startswith("quantization")]
    assert config.get("dtype") == ("float32" if size < 1e-2 else None)
    model, _ = load(str(tmp_path / "fused"))
    assert not any(hasattr(module, "bits") for module in model.modules())
    # transformers casts all of them to that dtype, so none may be rounded before.
    for name, wanted in float32_sums(base, run).items():
        got = plain(dict(model.named_modules())[name])
        assert np.linalg.norm(got - wanted[1]) <= MAX_LOST_CHANGE * np.linalg.norm(
            np.subtract(*wanted)
        )


def test_a_base_quantised_by_another_library_is_written_in_mlxs_format(bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases("mxfp4"), base)
    config = json.loads((base / "config.json").read_text())
    del config["quantization"]
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (base / "config.json").write_text(json.dumps(config))
    run = adapter(base, tmp_path / "run", 1e-2)
    report = fuse_adapter(open_model(str(base)), run, tmp_path / "fused")
    assert report.logps_lost <= 0.05
    model, _, config = load(str(tmp_path / "fused"), return_config=True)
    assert config["quantization"]["mode"] == "mxfp4"
    assert hasattr(model.model.embed_tokens, "bits")


def test_full_fine_tuning_keeps_its_change(bases, tmp_path):
    base = bases("bfloat16")
    layout = AdapterLayout("full")
    model = load_language_model(open_model(str(base)))
    weights = dict(tree_flatten(install_adapters(model.module, layout)))
    change = {k: v.astype(mx.float32) * (1 + 1e-4) for k, v in weights.items()}
    (tmp_path / "run").mkdir()
    save_adapter(tmp_path / "run", change, layout, str(base))
    report = fuse_adapter(open_model(str(base)), tmp_path / "run", tmp_path / "fused")
    assert report.fine_tune_type == "full"
    assert {layer.stored for layer in report.layers} == {"float32"}
    fused = dict(tree_flatten(load(str(tmp_path / "fused"))[0].parameters()))
    for name, wanted in change.items():
        assert mx.array_equal(fused[name], wanted)


def test_the_command_says_sizes_and_what_was_kept(bases, tmp_path, capsys):
    base = bases("bfloat16")
    run = adapter(base, tmp_path / "run", 3e-4)
    where = ["--model", str(base), "--adapter-path", str(run), "--output", str(tmp_path / "out")]
    assert run_cli(["fuse", *where]) == 0
    said = capsys.readouterr()
    text = " ".join((said.out + said.err).split())
    assert "MB before" in text
    assert "Stored: 28 in float32" in text
    assert "would have lost up to" in text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("torch_dtype", config.get("dtype")) in ("float32", None)


def test_quantisation_without_group_sizes_trains_and_is_planned(bases, tmp_path, capsys):
    base = bases("mixed")
    assert "null" in (base / "config.json").read_text()
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no no"} for n in range(12)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--model", str(base), "--data", str(tmp_path / "p.jsonl"), "--iters", "1"]
    assert run_cli(["plan", *options]) == 0
    run = ["--samples", "0", "--output", str(tmp_path / "run")]
    assert run_cli(["dpo", *options, *run]) == 0
    where = ["--model", str(base), "--adapter-path", str(tmp_path / "run")]
    assert run_cli(["fuse", *where, "--output", str(tmp_path / "fused")]) == 0
    load(str(tmp_path / "fused"))


@pytest.mark.parametrize(
    ("name", "coarse"),
    [("mlp.gate_proj", True), ("mlp.gate", False), ("mlp.router", False), ("mlp.up_proj", True)],
)
def test_routers_are_not_quantised_anew(name, coarse):
    """A layer that may lose everything stays in 4 bits, unless it chooses experts."""
    layer = LoRALinear.from_base(nn.QuantizedLinear(64, 64, bias=False, bits=4), r=4)
    layer.lora_b = 0.01 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(0))
    _, report = fuse._fuse_layer(f"model.layers.0.{name}", layer, mx.bfloat16, False, 1e9)
    assert report.quantized
    assert report.kept_quantized == coarse
