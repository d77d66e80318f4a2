"""Adapters of PEFT: log-probs equal transformers', and an export is what PEFT reads."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from helpers.paths import ORACLE

from mlx_align.cli.main import run
from mlx_align.errors import ConfigError, ModelError
from mlx_align.inference.export import export_peft_adapter
from mlx_align.models.adapters import (
    AdapterLayout,
    install_adapters,
    load_adapter,
    read_layout,
    read_weights,
    save_adapter,
)
from mlx_align.models.loading import load_adapters, open_model

BASE, PEFT = ORACLE / "models" / "policy", ORACLE / "peft"
NUMBERS = json.loads((PEFT / "logps.json").read_text())
CASES = ("plain", "rslora", "patterns", "dora", "one-block", "head")


def logps(model, weights):
    tokens = mx.array([NUMBERS["tokens"]])
    with model.use_adapter(weights):
        logits = model.module(tokens)[0, :-1]
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return np.array(mx.take_along_axis(found, tokens[0, 1:, None], axis=-1)[:, 0])


def copy(case, folder):
    shutil.copytree(PEFT / case, folder)
    return folder


def change(folder, **options):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


@pytest.mark.parametrize("case", CASES)
def test_log_probs_are_those_of_transformers_with_peft(case):
    model, (base, adapter) = load_adapters(open_model(str(BASE)), [None, PEFT / case])
    expected = np.array(NUMBERS[case])
    assert np.abs(expected - NUMBERS["base"]).max() > 0.05
    np.testing.assert_allclose(logps(model, adapter), expected, atol=1e-4)
    np.testing.assert_allclose(logps(model, base), NUMBERS["base"], atol=1e-4)


def test_an_adapter_maps_into_a_wider_layout():
    model, _ = load_adapters(open_model(str(BASE)), [None])
    layout = AdapterLayout(rank=8, scale=7.0)
    fresh = install_adapters(model.module, layout)
    weights = load_adapter(PEFT / "patterns", fresh, layout)
    np.testing.assert_allclose(logps(model, weights), NUMBERS["patterns"], atol=1e-4)


@pytest.mark.parametrize("case", ["plain", "rslora", "patterns", "dora", "one-block"])
def test_what_is_exported_is_the_same_adapter(case, tmp_path):
    """scripts/make_peft_oracle.py --check: PEFT computes the same of it, to 1e-6."""
    layout = read_layout(PEFT / case)
    (tmp_path / "run").mkdir()
    model, _ = load_adapters(open_model(str(BASE)), [None])
    own = load_adapter(PEFT / case, install_adapters(model.module, layout), layout)
    save_adapter(tmp_path / "run", own, layout, str(BASE))
    count = export_peft_adapter(open_model(str(BASE)), tmp_path / "run", tmp_path / "out")
    assert count == len(read_weights(tmp_path / "run")) // (3 if case == "dora" else 2)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["lora_alpha"] / written["r"] == pytest.approx(layout.scale)
    model, (adapter,) = load_adapters(open_model(str(BASE)), [tmp_path / "out"])
    np.testing.assert_allclose(logps(model, adapter), NUMBERS[case], atol=1e-4)


def test_the_commands_read_and_write_it(tmp_path, capsys):
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no no"} for n in range(12)]
    data = tmp_path / "p.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    options = ("--model", str(BASE), "--data", str(data), "--iters", "1", "--samples", "0")
    start = tmp_path / "run"
    assert (
        run(["dpo", *options, "--init-adapter", str(PEFT / "rslora"), "--output", str(start)]) == 0
    )
    where = ("--model", str(BASE), "--adapter-path", str(PEFT / "plain"))
    scores = ("--data", str(data), "--logps", "--output", str(tmp_path / "s.jsonl"))
    assert run(["score", *where, *scores]) == 0
    assert run(["fuse", *where, "--output", str(tmp_path / "fused")]) == 0
    exported = ("--format", "peft", "--output", str(tmp_path / "peft"))
    assert run(["export", "--model", str(BASE), "--adapter-path", str(start), *exported]) == 0
    assert "Load it: PeftModel.from_pretrained" in capsys.readouterr().out
    assert read_layout(tmp_path / "peft").rank == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3; only LORA"),
        ({"bias": "all"}, "trained biases can't be mapped"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] can't be mapped"),
        ({"init_lora_weights": "pissa"}, "changes the base model's weights"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"r": 0}, "not the configuration of a LoRA adapter"),
        ({"lora_alpha": None}, "not the configuration of a LoRA adapter"),
    ],
)
def test_what_cannot_be_mapped_is_named(tmp_path, options, said):
    folder = copy("plain", tmp_path / "a")
    change(folder, **options)
    with pytest.raises(ModelError, match=said):
        read_layout(folder)


def test_tensors_that_are_missing_or_strange_are_named(tmp_path):
    folder = copy("plain", tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    whole = dict(mx.load(str(file)))
    mx.eval(whole)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(tensors, said):
        mx.save_safetensors(str(file), tensors)
        with pytest.raises(ModelError, match=said):
            load_adapters(open_model(str(BASE)), [folder])

    refused({k: v for k, v in whole.items() if k != first}, f"{first[:-7]} is missing")
    layer = {k: v for k, v in whole.items() if "layers.0.self_attn.q_proj" not in k}
    refused(layer, r"layers\.0\.self_attn\.q_proj\.lora_a is missing \(2 such")
    # A pattern names layers as a list does.
    for targets in ("all-linear", r".*self_attn\.(q_proj|v_proj)"):
        change(folder, target_modules=targets)
        refused(layer, r"layers\.0\.self_attn\.q_proj\.lora_a is missing \(2 such")
    refused({**whole, "base_model.model.lm_head.weight": mx.zeros((2, 2))}, "lm_head.weight is not")
    refused({**whole, first: whole[first][:, :-1]}, "has shape")
    refused({**whole, first: whole[first].T}, "has shape|is missing")
    refused({**whole, first: whole[first] * float("nan")}, "numbers that are not finite")
    embedding = "base_model.model.model.embed_tokens.lora_embedding_A"
    refused({**whole, embedding: mx.zeros((4, 400))}, "adapters of embeddings can't be mapped")


def test_exports_that_are_refused(tmp_path):
    folder = open_model(str(BASE))
    with pytest.raises(ConfigError, match="is in PEFT's format already"):
        export_peft_adapter(folder, PEFT / "plain", tmp_path / "out")
    layout = AdapterLayout(keys=("model.embed_tokens",))
    (tmp_path / "run").mkdir()
    weights = {
        "model": {"embed_tokens": {"lora_a": mx.zeros((400, 16)), "lora_b": mx.zeros((16, 64))}}
    }
    save_adapter(tmp_path / "run", weights, layout, str(BASE))
    with pytest.raises(ModelError, match=r"adapter of model\.embed_tokens can't be exported"):
        export_peft_adapter(folder, tmp_path / "run", tmp_path / "out")
    layout = AdapterLayout(keys=("self_attn.q_proj",))
    weights = {
        "model": {
            "layers": [
                {
                    "self_attn": {
                        "q_proj": {"lora_a": mx.zeros((32, 16)), "lora_b": mx.zeros((16, 64))}
                    }
                }
            ]
        }
    }
    save_adapter(tmp_path / "run", weights, layout, str(BASE))
    with pytest.raises(ModelError, match=r"has 32 inputs and 64 outputs.*check that it is the run"):
        export_peft_adapter(folder, tmp_path / "run", tmp_path / "out")
