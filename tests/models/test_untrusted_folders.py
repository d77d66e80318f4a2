"""Model and adapter folders of strangers: every number has a type and a bound."""

import json
import os
import shutil

import mlx.core as mx
import pytest
from helpers.paths import ORACLE, TINY_MODEL
from helpers.runs import mlx_align

from mlx_align.errors import ModelError
from mlx_align.models.adapters import AdapterLayout, read_layout, save_adapter
from mlx_align.models.loading import load_module, open_model, read_model_config
from mlx_align.models.peft import read_peft_config
from mlx_align.models.weights import read_tensors


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    layer = {"lora_a": mx.zeros((64, 16)), "lora_b": mx.zeros((16, 64))}
    weights = {"model": {"layers": [{"self_attn": {"q_proj": layer}}]}}
    save_adapter(folder, weights, AdapterLayout(keys=("self_attn.q_proj",)), "m")
    return folder


def change(file, **values):
    content = json.loads(file.read_text())
    for name, value in values.items():
        place = content
        *path, last = name.split("__")
        for key in path:
            place = place[key]
        place[last] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("rank", [10**9, 2**31, float("inf"), 8, 0, -1, True, "16", 1.5, None])
def test_the_rank_is_that_of_the_tensors(adapter, tmp_path, capsys, rank):
    assert read_layout(adapter).rank == 16
    change(adapter / "adapter_config.json", lora_parameters__rank=rank)
    with pytest.raises(ModelError, match=r"adapter_config.json: .*rank is"):
        read_layout(adapter)
    out = ("--output", tmp_path / "fused")
    assert mlx_align("fuse", "--model", TINY_MODEL, "--adapter-path", adapter, *out) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "values",
    [
        {"lora_parameters__scale": "2"},
        {"lora_parameters__scale": float("nan")},
        {"lora_parameters__scale": 1e300},
        {"lora_parameters__dropout": 2},
        {"lora_parameters__keys": "self_attn.q_proj"},
        {"lora_parameters__keys": [1]},
        {"num_layers": 10**12},
        {"num_layers": "all"},
        {"num_layers": [1]},
        {"lora_parameters": 3},
        {"fine_tune_type": ["lora"]},
    ],
)
def test_fields_of_an_adapter_have_types_and_bounds(adapter, values):
    change(adapter / "adapter_config.json", **values)
    with pytest.raises(ModelError, match="not mlx-lm's adapter format"):
        read_layout(adapter)


@pytest.mark.parametrize(
    "values",
    [
        {"r": 10**9},
        {"r": "8"},
        {"lora_alpha": float("inf")},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"q_proj": "x"}},
        {"target_modules": 3},
        {"layers_to_transform": ["0"]},
        {"lora_dropout": -1},
    ],
)
def test_fields_of_a_peft_adapter_have_types_and_bounds(tmp_path, values):
    folder = next(p.parent for p in (ORACLE / "peft").rglob("adapter_config.json"))
    shutil.copytree(folder, tmp_path / "peft")
    read_peft_config(tmp_path / "peft")
    change(tmp_path / "peft" / "adapter_config.json", **values)
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        read_peft_config(tmp_path / "peft")


@pytest.fixture
def model(tmp_path):
    shutil.copytree(TINY_MODEL, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_layers": 10**9}, "whole number from 0 to 4096"),
        ({"num_hidden_layers": 3}, "has 3 layers, but the weights have 2"),
        ({"num_hidden_layers": "2"}, "whole number"),
        ({"hidden_size": 10**12}, "whole number"),
        ({"hidden_size": 2**30}, "mlx-lm can't load this model"),
        ({"vocab_size": True}, "whole number"),
        ({"num_attention_heads": 1.5}, "whole number"),
        ({"quantization": [4]}, "have to be objects"),
        ({"rope_theta": float("nan")}, "is nan"),
        ({"anything": 10**200}, "digits"),
        ({"model_type": 3}, "model_type"),
    ],
)
def test_sizes_of_a_model_have_types_and_bounds(model, values, said):
    change(model / "config.json", **values)
    with pytest.raises(ModelError, match=said) as found:
        load_module(model)
    assert "\n" not in str(found.value)


def test_infinity_is_a_limit_of_some_models(model):
    change(model / "config.json", time_step_limit=[0.0, float("inf")])
    read_model_config(model)


@pytest.mark.parametrize("name", ["chat_template.jinja", "config.json", "tokenizer.json", "x"])
def test_a_pipe_in_a_model_folder_is_refused(model, name):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(ModelError, match=r"pipe|no config\.json"):
        open_model(str(model))


def test_a_device_in_an_adapter_folder_is_refused(adapter):
    (adapter / "adapters.safetensors").unlink()
    (adapter / "adapters.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="is a device"):
        read_layout(adapter)


@pytest.mark.parametrize(
    "change_entry",
    [
        {"shape": [10**9, 10**9]},
        {"shape": [64, 17]},
        {"data_offsets": [0, 1 << 40]},
        {"data_offsets": [8, 4]},
        {"dtype": "F3"},
        {"shape": [-1]},
    ],
)
def test_a_header_that_contradicts_its_tensors_is_refused(adapter, change_entry):
    file = adapter / "adapters.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    next(e for name, e in header.items() if name != "__metadata__").update(change_entry)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(ModelError, match="damaged"):
        read_tensors(file)
