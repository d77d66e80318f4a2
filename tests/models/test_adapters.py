"""Adapters: one layout for every role, and folders that stock mlx-lm reads and writes."""

import json
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.families import make_model
from helpers.forward import difference, gradient, plain_logps, ragged_batch, scramble
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from mlx_align.errors import ConfigError, ModelError
from mlx_align.models.adapters import (
    AdapterLayout,
    fingerprint_folder,
    install_adapters,
    load_adapter,
    read_layout,
    save_adapter,
)
from mlx_align.models.backbone import split_backbone
from mlx_align.models.forward import token_logprobs
from mlx_align.models.weights import use_adapter


def saved_adapter(folder, layout, family="llama", size=0.3):
    """A trained-looking adapter on disk, and the log-probs of the model that holds it."""
    model = make_model(family)
    install_adapters(model, layout)
    scramble(model, size)
    folder.mkdir()
    save_adapter(folder, model.trainable_parameters(), layout, "base")
    return plain_logps(model, ragged_batch())


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_stock_mlx_lm_loads_what_we_save(tmp_path, kind, family):
    if (kind, family) == ("dora", "mixtral"):
        with pytest.raises(ModelError, match="doesn't support DoRA"):
            saved_adapter(tmp_path / "a", AdapterLayout(kind, rank=4), family)
        return
    expected = saved_adapter(tmp_path / "a", AdapterLayout(kind, rank=4, scale=3.0), family)
    model = make_model(family)
    assert not mx.allclose(plain_logps(model, ragged_batch()), expected, atol=0.1)
    load_adapters(model, str(tmp_path / "a"))
    model.eval()
    assert mx.allclose(plain_logps(model, ragged_batch()), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        # same layout; other scale; smaller rank; fewer layers; fewer targets; all at once
        ({}, {}),
        ({"scale": 20.0}, {"scale": 2.0}),
        ({"rank": 2}, {"rank": 6}),
        ({"num_layers": 1}, {"num_layers": -1}),
        ({"keys": ("self_attn.q_proj", "self_attn.o_proj")}, {"keys": None}),
        (
            {"scale": 7.0, "rank": 1, "num_layers": 1, "keys": ("self_attn.v_proj",)},
            {"scale": 0.5, "rank": 8},
        ),
    ],
)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_any_adapter_maps_into_the_runs_layout(tmp_path, family, theirs, ours):
    expected = saved_adapter(tmp_path / "a", AdapterLayout(**{"rank": 4, **theirs}), family)
    model = make_model(family)
    layout = AdapterLayout(**{"rank": 4, **ours})
    fresh = install_adapters(model, layout)
    tree = load_adapter(tmp_path / "a", fresh, layout)
    backbone = split_backbone(model)
    with use_adapter(model, tree):
        got = token_logprobs(backbone, ragged_batch())
    assert mx.allclose(got, expected, rtol=1e-5, atol=2e-5)
    # The additional rank can learn: its lora_a is not zero.
    if "rank" in theirs and theirs["rank"] < layout.rank:
        for name, array in tree_flatten(tree):
            if name.endswith("lora_a"):
                assert mx.abs(array).sum(axis=-2).min() > 0
    # Outside the block the model is what it was.
    assert mx.allclose(
        plain_logps(model, ragged_batch()), plain_logps(make_model(family), ragged_batch())
    )


def test_dora_maps_with_its_magnitudes(tmp_path):
    small = AdapterLayout("dora", rank=2, scale=5.0, keys=("self_attn.q_proj",))
    expected = saved_adapter(tmp_path / "a", small)
    model = make_model("llama")
    layout = AdapterLayout("dora", rank=4, scale=2.0)
    tree = load_adapter(tmp_path / "a", install_adapters(model, layout), layout)
    with use_adapter(model, tree):
        assert mx.allclose(plain_logps(model, ragged_batch()), expected, atol=2e-5)


def test_what_cannot_be_mapped_is_refused(tmp_path):
    saved_adapter(tmp_path / "wide", AdapterLayout(rank=8))

    def load(layout):
        return load_adapter(
            tmp_path / "wide", install_adapters(make_model("llama"), layout), layout
        )

    with pytest.raises(ModelError, match=r"lora_a has shape .*; this model and --lora-rank need"):
        load(AdapterLayout(rank=4))
    with pytest.raises(ModelError, match="which this run does not"):
        load(AdapterLayout(rank=8, keys=("self_attn.q_proj",)))
    with pytest.raises(ModelError, match="a lora adapter can't start a dora run"):
        load(AdapterLayout("dora", rank=8))


def test_only_the_rank_may_be_padded(tmp_path):
    # An adapter of a smaller base: its missing rows would be filled with random numbers.
    layout = AdapterLayout(rank=4)
    saved_adapter(tmp_path / "a", layout)
    file = tmp_path / "a" / "adapters.safetensors"
    whole = dict(mx.load(str(file)))
    name = "model.layers.0.self_attn.q_proj.lora_a"

    def load(weights, wanted=layout, **options):
        mx.save_safetensors(str(file), weights)
        fresh = install_adapters(make_model("llama"), wanted)
        return load_adapter(tmp_path / "a", fresh, wanted, **options)

    for keep in (False, True):
        with pytest.raises(
            ModelError, match=rf"{name} has shape .*; check that --model is its base"
        ):
            load({**whole, name: whole[name][:-1]}, keep_rank=keep)
        narrow = name.replace("lora_a", "lora_b")
        with pytest.raises(ModelError, match=rf"{narrow} has shape"):
            load({**whole, narrow: whole[narrow][:, :-1]}, keep_rank=keep)
    for wanted in (layout, AdapterLayout(rank=8)):
        with pytest.raises(ModelError, match=rf"{name} is missing \(1 such tensors\)"):
            load({k: v for k, v in whole.items() if k != name}, wanted)
    with pytest.raises(ModelError, match=r"it adapts model\.layers\.7\.x\.lora_a"):
        load({**whole, "model.layers.7.x.lora_a": mx.zeros((2, 2))})
    # In the model, but not in what its configuration says that it adapts.
    config = {**layout.to_mlx_lm(), "num_layers": 1}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"is not in the layers that its adapter_config\.json names"
    ):
        load(whole)


def test_no_layers_is_not_all_layers(tmp_path):
    with pytest.raises(ConfigError, match="--num-layers 0: the model has 2 blocks; give 1 to 2"):
        install_adapters(make_model("llama"), AdapterLayout(num_layers=0))
    # mlx-lm reads 0 as all blocks, and so do adapters that it wrote.
    saved_adapter(tmp_path / "a", AdapterLayout(rank=4))
    config = {**AdapterLayout(rank=4).to_mlx_lm(), "num_layers": 0}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    assert read_layout(tmp_path / "a").num_layers == -1


def test_wrong_layouts_are_named():
    with pytest.raises(ConfigError, match="--num-layers 9: the model has 2 blocks"):
        install_adapters(make_model("llama"), AdapterLayout(num_layers=9))
    with pytest.raises(ConfigError, match=r"--lora-keys q_proj: no such layer.*self_attn.q_proj"):
        install_adapters(make_model("llama"), AdapterLayout(keys=("q_proj",)))
    quantized = make_model("llama")
    nn.quantize(quantized, group_size=32, bits=4)
    with pytest.raises(ConfigError, match="quantised and its weights can't be trained"):
        install_adapters(quantized, AdapterLayout("full"))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"fine_tune_type": "lora", "num_layers": 2}',
        '{"fine_tune_type": "magic", "num_layers": 2}',
        '{"num_layers": 2, "lora_parameters": {"rank": 0, "scale": 1}}',
        '{"num_layers": 2, "lora_parameters": {"rank": 4, "scale": "NaN"}}',
        "[" * 100_000,
    ],
)
def test_broken_adapter_folders_are_one_line(tmp_path, content):
    with pytest.raises(ModelError, match="not an adapter folder"):
        read_layout(tmp_path)
    (tmp_path / "adapters.safetensors").write_bytes(b"no")
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError) as error:
        read_layout(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_weights_are_one_line(tmp_path):
    layout = AdapterLayout(rank=4)
    (tmp_path / "adapters.safetensors").write_bytes(b"\x10" + b"\0" * 30)
    (tmp_path / "adapter_config.json").write_text(json.dumps(layout.to_mlx_lm()))
    with pytest.raises(ModelError, match="damaged"):
        load_adapter(tmp_path, install_adapters(make_model("llama"), layout), layout)


def test_saved_bytes_repeat_and_fingerprints_follow_content(tmp_path):
    layout = AdapterLayout(rank=4)
    for name in ("a", "b"):
        saved_adapter(tmp_path / name, layout)
    read = [(tmp_path / n / "adapters.safetensors").read_bytes() for n in ("a", "b")]
    assert read[0] == read[1]
    assert fingerprint_folder(tmp_path / "a") == fingerprint_folder(tmp_path / "b")
    saved_adapter(tmp_path / "c", layout, size=0.2)
    assert fingerprint_folder(tmp_path / "a") != fingerprint_folder(tmp_path / "c")


def test_adapters_on_head_and_embeddings_get_exact_gradients():
    # The vocabulary head learns here: its parameters are inputs of the chunked function.
    for family, key in (("llama", "lm_head"), ("qwen2", "model.embed_tokens")):
        model = make_model(family)
        layout = AdapterLayout(rank=4, keys=("self_attn.q_proj", key))
        install_adapters(model, layout)
        scramble(model)
        model.train()
        backbone = split_backbone(model)
        assert backbone.trainable_head()
        batch = ragged_batch()
        value, grads = gradient(model, partial(plain_logps, model), batch)
        for compiled in (False, True):
            for checkpoint in (False, True):
                way = partial(token_logprobs, backbone, grad_checkpoint=checkpoint)
                got_value, got = gradient(model, way, batch, compiled=compiled)
                assert got_value == pytest.approx(value, rel=1e-5)
                assert difference(got, grads) < 1e-5
