"""Folders saved by transformers 5 and 4 give the log-probs that transformers computes."""

import json

import pytest
from mlx_lm.utils import load_model
from transformers_oracle import (
    CASES,
    EXACT_UP_TO,
    FOLDERS,
    REFUSED,
    ROWS,
    differences,
    make_folder,
    open_folder,
)

from mlx_align.errors import ModelError
from mlx_align.models.adapters import AdapterLayout, install_adapters, save_adapter
from mlx_align.models.backbone import split_backbone
from mlx_align.models.fuse import fuse_adapter
from mlx_align.models.loading import LanguageModel, load_language_model, open_model
from mlx_align.models.model_config import length_limits, normalize_config


@pytest.mark.parametrize(("name", "major"), FOLDERS)
def test_log_probs_are_those_of_transformers(name, major, tmp_path):
    folder = open_folder(make_folder(name, major, tmp_path))
    if name in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[name]):
            load_language_model(folder)
        return
    gaps = differences(load_language_model(folder), name, major)
    exact = EXACT_UP_TO.get(name, max(map(len, ROWS)))
    for row, gap in zip(ROWS, gaps, strict=True):
        if len(row) <= exact:
            assert gap < 1e-4
    # What is not exact is known before anything runs, and would show.
    limits = [limit.tokens for limit in length_limits(folder.config)]
    assert min(limits, default=len(ROWS[-1])) >= min(exact, len(ROWS[-1]))
    if name in EXACT_UP_TO:
        assert exact in limits
        assert gaps[-1] > 0.1


def test_the_oracle_shows_what_mlx_lm_alone_gets_wrong(tmp_path):
    """Otherwise the test above would say nothing about rotary embeddings."""
    module, _ = load_model(make_folder("llama-theta", "5", tmp_path))
    folder = open_folder(tmp_path)
    model = LanguageModel(folder, split_backbone(module), shared=False, check="")
    assert max(differences(model, "llama-theta", "5")) > 1


@pytest.mark.parametrize("name", ["llama-llama3", "gemma3_text", "qwen3_moe", "cohere2", "granite"])
def test_a_written_configuration_reads_right_in_stock_mlx_lm(name, tmp_path):
    """As fused and exported folders have it."""
    folder = make_folder(name, "5", tmp_path)
    config = normalize_config(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    module, _ = load_model(folder)
    model = LanguageModel(open_folder(folder), split_backbone(module), shared=False, check="")
    assert max(differences(model, name, "5")) < 1e-4


@pytest.mark.parametrize("major", ["4", "5"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_translating_twice_changes_nothing(name, major, tmp_path):
    if major not in CASES[name]:
        pytest.skip("not in this version")
    stored = json.loads((make_folder(name, major, tmp_path) / "config.json").read_text())
    once = normalize_config(stored)
    assert normalize_config(once) == once
    # Nothing is taken away, and nothing that transformers reads is changed.
    assert {key: once[key] for key in stored if key not in ("rope_scaling",)} == {
        key: value for key, value in stored.items() if key != "rope_scaling"
    }


def test_text_part_of_a_multimodal_configuration():
    rope = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    text = {
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "rope_parameters": rope,
    }
    config = normalize_config({"model_type": "gemma3", "text_config": text})["text_config"]
    assert config["rope_theta"] == 1e6
    assert config["rope_local_base_freq"] == 1e4
    assert config["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 8.0}
    assert config["sliding_window_pattern"] == 6


def test_what_mlx_lm_can_not_express_is_refused(tmp_path):
    def refuses(name, words, **changes):
        folder = make_folder(name, "5", tmp_path)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ModelError, match=words):
            load_language_model(open_folder(folder))

    kinds = ["full_attention", "sliding_attention"]
    refuses("gemma3_text", "follows no regular pattern", layer_types=kinds)
    refuses("qwen2_moe", "norm_topk_prob True, .* computes False only", norm_topk_prob=True)
    llama3 = json.loads((make_folder("llama-llama3", "5", tmp_path) / "config.json").read_text())
    refuses("gemma2", "of type llama3", rope_parameters=llama3["rope_parameters"])
    refuses("qwen3_moe", "remove the scaling", rope_parameters=llama3["rope_parameters"])
    refuses("llama", "hidden_act gelu, mlx-lm's llama computes silu only", hidden_act="gelu")
    refuses("nemotron", "hidden_act silu, mlx-lm's nemotron computes relu2", hidden_act="silu")
    refuses("gpt_neox", "activation laplace, which is not known", hidden_act="laplace")


def test_activations_are_those_that_the_configuration_names(tmp_path):
    def largest(name, **changes):
        folder = make_folder(name, "5", tmp_path)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return max(differences(load_language_model(open_folder(folder)), name, "5"))

    # Google's first configurations say gelu and mean its tanh form.
    assert largest("gemma", hidden_act="gelu") < 1e-4
    assert largest("gemma2", hidden_activation="gelu") > 1e-4
    assert largest("phi", hidden_act="gelu") > 1e-4
    assert largest("gpt2", activation_function="relu") > 1e-2


@pytest.mark.parametrize(
    ("name", "tokens", "words", "refused"),
    [
        ("mistral-window", 8, "a sliding window of 8 tokens", False),
        ("qwen2-window", 8, "mlx-lm's qwen2 does not compute", False),
        ("gemma2-window", 8, "later tokens see everything", False),
        ("llama-longrope", 32, "(longrope)", False),
        ("llama-dynamic", 64, "(dynamic)", True),
        ("gpt2", 64, "no embeddings for later positions", True),
        ("llama", 64, "max_position_embeddings", False),
    ],
)
def test_lengths_up_to_which_a_model_is_exact(name, tokens, words, refused, tmp_path):
    limits = length_limits(open_folder(make_folder(name, "5", tmp_path)).config)
    assert [limit.refused for limit in limits if limit.tokens == tokens and words in limit.reason]
    assert (tokens, refused) in [(limit.tokens, limit.refused) for limit in limits]


def test_windows_that_mlx_lm_computes_are_no_limit(tmp_path):
    for name in ("gemma3_text", "olmo3", "cohere2", "exaone4"):
        limits = length_limits(open_folder(make_folder(name, "5", tmp_path)).config)
        assert [limit.tokens for limit in limits] == [64]


@pytest.mark.parametrize("name", ["llama-llama3", "gemma3_text", "qwen3_moe", "stablelm"])
def test_fused_folders_are_right_in_stock_mlx_lm(name, tmp_path):
    base = make_folder(name, "5", tmp_path / "base", tokenizer=True)
    model = load_language_model(open_model(str(base)))
    layout = AdapterLayout(rank=2, keys=("self_attn.q_proj", "self_attn.v_proj"))
    (tmp_path / "run").mkdir()
    # Fresh adapters change nothing, so the log-probs stay those of transformers.
    save_adapter(tmp_path / "run", install_adapters(model.module, layout), layout, str(base))
    fuse_adapter(open_model(str(base)), tmp_path / "run", tmp_path / "fused")
    module, _ = load_model(tmp_path / "fused")
    folder = open_folder(tmp_path / "fused")
    fused = LanguageModel(folder, split_backbone(module), shared=False, check="")
    assert max(differences(fused, name, "5")) < 1e-4
    stored = json.loads((base / "config.json").read_text())
    assert folder.config["rope_parameters"] == stored["rope_parameters"]
