"""`scripts/real/`: a model folder out of a GGUF file, and pairs made of real conversations."""

import datetime
import json
from itertools import combinations
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers.scripts import load_script
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.models.llama import Model, ModelArgs

HEADS, KV_HEADS, SIZE, WIDTH = 4, 2, 8, 32


@pytest.fixture(scope="module")
def models():
    return load_script("real/models")


def gguf_of(model, models, file):
    """The model as llama.cpp stores it: other names, and rotated pairs next to each other."""
    names = {ours: theirs for theirs, ours in models.LAYERS.items()}
    tensors = {}
    for name, array in tree_flatten(model.parameters()):
        base = name.removesuffix(".weight")
        if base.startswith("model.layers."):
            _, _, block, layer = base.split(".", 3)
            target = f"blk.{block}.{names[layer]}.weight"
            if names[layer] in ("attn_q", "attn_k"):
                heads = HEADS if names[layer] == "attn_q" else KV_HEADS
                pairs = array.reshape(heads, 2, SIZE // 2, WIDTH)
                array = mx.contiguous(pairs.swapaxes(1, 2).reshape(heads * SIZE, WIDTH))
        else:
            known = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
            target = f"{known[base]}.weight"
        tensors[target] = array
    sizes = {
        "embedding_length": WIDTH,
        "feed_forward_length": 48,
        "block_count": 2,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": SIZE,
        "context_length": 64,
        "vocab_size": 12,
    }
    metadata = {f"llama.{name}": mx.array(value, mx.uint32) for name, value in sizes.items()}
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abc12", "Ġ", "ab", "Ġa", "abc"]
    metadata |= {
        "llama.rope.freq_base": mx.array(100_000.0),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": mx.array([3] * 3 + [1] * 9, mx.int32),
        "tokenizer.ggml.merges": ["a b", "Ġ a", "ab c"],
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    mx.save_gguf(str(file), tensors, metadata)


def test_a_gguf_file_becomes_a_folder_that_mlx_lm_loads(models, tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "vocab_size": 12,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
    }
    mx.random.seed(1)
    model = Model(ModelArgs.from_dict(config))
    gguf_of(model, models, tmp_path / "tiny.gguf")
    tensors, metadata = mx.load(str(tmp_path / "tiny.gguf"), return_metadata=True)
    (tmp_path / "out").mkdir()
    models.write_llama(tmp_path / "out", tensors, metadata, "float32")
    loaded, tokenizer = load(str(tmp_path / "out"))
    ids = mx.array([[1, 3, 4, 5, 8, 2]])
    assert np.allclose(model(ids), loaded(ids), atol=1e-6)
    # Numbers are split into digits; special tokens are single ones.
    assert tokenizer.encode("abc12 a<|im_end|>") == [11, 6, 7, 10, 2]
    assert tokenizer.decode([11, 6, 7, 10]) == "abc12 a"
    assert tokenizer.eos_token_id == 2
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}]) == [9]


def test_pairs_prefer_the_first_sentence():
    brevity = load_script("real/make_brevity")
    prompt = [{"role": "user", "content": "Why?"}]

    def answered(text):
        return {"prompt": prompt, "completions": [text]}

    long = "This is the answer you want. It goes on!  And it is cut o"
    rows = brevity.pairs([answered(long), answered("One sentence only here. And cut")])
    assert [row["chosen"][0]["content"] for row in rows] == ["This is the answer you want."]
    assert rows[0]["rejected"][0]["content"] == "This is the answer you want. It goes on!"
    assert rows[0]["prompt"] == prompt


def test_data_of_the_defaults_study(tmp_path):
    defaults = load_script("real/defaults")
    data = defaults.write_data(tmp_path, 30)
    train, valid = (
        [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "valid")
    )
    assert (len(train), len(valid)) == (30, defaults.HELD_OUT)
    for row in train:
        assert row["rejected"][0]["content"].startswith(row["chosen"][0]["content"])
    asked = {row["prompt"][0]["content"] for row in train}
    assert not asked & {row["prompt"][0]["content"] for row in valid}
    assert len({run.name for run in defaults.RUNS}) == len(defaults.RUNS)
    assert len(defaults.pairs("train")) >= max(run.rows for run in defaults.RUNS)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_best_of_n_is_the_mean_over_all_subsets(count):
    helpful = load_script("real/helpful")
    random = np.random.default_rng(0)
    ranking, judged = random.normal(size=(2, 3, 5))
    expected = [
        np.mean([j[max(chosen, key=lambda i: r[i])] for chosen in combinations(range(5), count)])
        for r, j in zip(ranking, judged, strict=True)
    ]
    assert np.allclose(helpful.best_of(ranking, judged, count), expected)


def test_facts_are_right_as_whole_words():
    style = load_script("real/style")
    assert style.is_right("There are 7 days.", ("7", "seven"))
    assert not style.is_right("There are 70 days.", ("7", "seven"))
    assert style.is_right("H₂O, of course", ("h2o", "h₂o"))
    assert len(style.facts()) == 40
    assert len(style.questions()) == 40


def test_sums_are_held_out(tmp_path):
    sums = load_script("real/sums")
    data = sums.write_data(tmp_path)
    train, valid = (
        [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "valid")
    )
    assert len(valid) == sums.HELD_OUT
    asked = [row["prompt"][0]["content"] for row in (*train, *valid)]
    assert len(set(asked)) == len(asked)


def test_pages_show_intervals(tmp_path, monkeypatch):
    studies = load_script("real/studies")
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    (tmp_path / "docs" / "verified").mkdir(parents=True)
    cell = studies.shown({"value": 0.5, "low": 0.25, "high": 0.75})
    assert cell == "50% (25% to 75%)"
    studies.write_page("one", "# One", studies.table(["a", "b"], [["x", cell]]))
    text = (tmp_path / "docs" / "verified" / "one.md").read_text()
    assert "| a | b |\n|---|---:|\n| x | 50% (25% to 75%) |" in text


def test_rows_of_other_machines_and_days_stay_on_the_page(tmp_path, monkeypatch):
    studies = load_script("real/studies")
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    monkeypatch.setattr(studies, "MEASURED", tmp_path / "measured")
    (tmp_path / "docs" / "verified").mkdir(parents=True)
    for day, place, cells in (
        (1, "a Mac", ["DPO", "65%"]),
        (2, "Linux", ["SFT", "49%"]),
        (3, "a Mac", ["KTO", "62%"]),
        (4, "Linux", ["DPO", "65%"]),  # the same again: nothing was measured
    ):
        monkeypatch.setattr(studies, "machine", lambda place=place: place)
        today = datetime.date(2026, 11, day)
        clock = SimpleNamespace(date=SimpleNamespace(today=lambda today=today: today))
        monkeypatch.setattr(studies, "datetime", clock)
        studies.record("study", cells[0].lower(), cells)
    assert studies.recorded("study")["kto"] == ["KTO", "62%"]
    studies.write_page("study", "# Title", studies.table(["", "right"], [["DPO", "65%"]]))
    assert (tmp_path / "docs" / "verified" / "study.md").read_text().splitlines() == [
        "# Title",
        "",
        "|  | right |",
        "|---|---:|",
        "| DPO | 65% |",
        "",
        "Measured from 2026-11-01 to 2026-11-03: a Mac; on 2026-11-02: Linux. "
        "This page is written by the script.",
    ]


def test_a_higher_rate_is_better_unless_it_ranks_clearly_worse(monkeypatch, tmp_path):
    losses = load_script("real/losses")
    found = {("2e-4", "0.1"): 0.6, ("5e-4", "0.1"): 0.56, ("5e-5", "0.1"): 0.5}
    found |= {("5e-4", "0.03"): 0.56, ("2e-4", "0.03"): 0.61, ("5e-5", "0.03"): 0.7}

    def accuracy(folder, setting):
        return losses.Accuracy.of(found[setting.rate, setting.beta], 63)

    monkeypatch.setattr(losses, "accuracy", accuracy)
    assert losses.best(tmp_path, "dpo") == ("dpo", "5e-4", "0.1")  # 4% less is within 6%
    found["5e-4", "0.1"] = 0.5
    assert losses.best(tmp_path, "dpo") == ("dpo", "2e-4", "0.03")
    found["5e-5", "0.1"] = 0.8
    assert losses.best(tmp_path, "dpo") == ("dpo", "5e-5", "0.1")
