"""Reward models of the hub: scored as transformers scores them, and exported so that it does."""

import json
import shutil
import warnings
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.data import read_rows, write_rows
from helpers.paths import CLASSIFIERS, TINY_MODEL
from helpers.tokenizers import CHATML, hf_tokenizer
from mlx.utils import tree_map
from mlx_lm.convert import convert

from mlx_align import RewardModel
from mlx_align.cli.main import run
from mlx_align.errors import ModelError
from mlx_align.models.adapters import AdapterLayout, install_adapters, save_adapter
from mlx_align.models.heads import REWARD_HEAD, add_reward_head
from mlx_align.models.loading import load_language_model, open_model
from mlx_align.types import TokenizedGroup

SCORES = json.loads((CLASSIFIERS / "scores.json").read_text())
FAMILIES = ("llama", "qwen2")
EOS = 2


def groups_of(content, unread=None):
    rows = [np.array(row, np.int32) for row in content["rows"]]
    rows = [row[:-1] if row[-1] == unread else row for row in rows]
    cut = content["prompt"]
    return [TokenizedGroup(row[:cut], (row[cut:],), "row") for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers(family):
    content = SCORES[family]
    model = RewardModel.load(str(CLASSIFIERS / family))
    found = np.concatenate(model.score_tokens(groups_of(content)))[:, 0]
    assert np.abs(found - content["scores"]).max() < 1e-5
    assert np.std(content["scores"]) > 0.1  # so that a wrong one would show


def test_score_takes_a_classifier(tmp_path, capsys):
    rows = [{"prompt": "Say", "chosen": " yes, please", "rejected": " no"}] * 2
    data, output = tmp_path / "pairs.jsonl", tmp_path / "scores.jsonl"
    write_rows(data, rows)
    where = ["--model", str(CLASSIFIERS / "qwen2"), "--data", str(data), "--output", str(output)]
    assert run(["score", *where]) == 0
    assert "Wrote 4 scores to" in capsys.readouterr().out
    wanted = RewardModel.load(str(CLASSIFIERS / "qwen2")).score("Say", [" yes, please", " no"])
    for row in read_rows(output):
        assert row["model_scores"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_with_the_end_token(family, tmp_path):
    """transformers then reads the token before the end, as rows are scored by text here too."""
    folder = tmp_path / family
    shutil.copytree(CLASSIFIERS / family, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": EOS}))
    model, other = RewardModel.load(str(folder)), RewardModel.load(str(CLASSIFIERS / family))
    assert (model.padding, other.padding) == (EOS, 0)
    content = SCORES[family]
    found = np.concatenate(model.score_tokens(groups_of(content, EOS)))[:, 0]
    assert np.abs(found - content["scores_where_pad_is_eos"]).max() < 1e-5
    assert np.abs(found - content["scores"]).max() > 0.1
    # By text: the end token that was appended is passed over again.
    ids = [model.style.tokenizer.encode(text) for text in ("Say yes", "Say yes. Now")]
    prompt, whole = (np.array(row, np.int32) for row in ids)
    (wanted,) = model.score_tokens([TokenizedGroup(prompt, (whole[len(prompt) :],), "row")])
    assert model.score("Say yes", [". Now"])[0] == pytest.approx(wanted[0, 0], abs=1e-6)
    assert other.score("Say yes", [". Now"])[0] != pytest.approx(wanted[0, 0], abs=1e-3)


def test_a_chat_is_scored_at_the_end_of_its_rendered_text(tmp_path):
    """Of the hub's classifiers; what was trained or exported here is read at the end token."""
    folder = tmp_path / "chat"
    shutil.copytree(CLASSIFIERS / "llama", folder)
    hf_tokenizer(CHATML, eos="<|im_end|>").save_pretrained(folder)
    model = RewardModel.load(str(folder))
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    whole = np.array(model.style.tokenizer.apply_chat_template(turns, tokenize=True), np.int32)
    (wanted,) = model.score_tokens([TokenizedGroup(whole[:4], (whole[4:],), "row")])
    assert model.score(turns[:1], ["there"])[0] == pytest.approx(wanted[0, 0], abs=1e-6)
    at_end = replace(model, suffix=())
    (wanted,) = model.score_tokens([TokenizedGroup(whole[:4], (whole[4:-1],), "row")])
    assert at_end.score(turns[:1], ["there"])[0] == pytest.approx(wanted[0, 0], abs=1e-6)


def changed(folder, tmp_path, config=None, **weights):
    """A copy with other entries and tensors; None takes a tensor away."""
    copy = tmp_path / "changed"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    stored = dict(mx.load(str(file)))
    for name, value in weights.items():
        stored[name.replace("__", ".")] = value
    mx.save_safetensors(str(file), {k: v for k, v in stored.items() if v is not None})
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, **(config or {})}))
    return str(copy)


def test_incompatible_weights_are_refused(tmp_path):
    folder = CLASSIFIERS / "llama"
    two = {"id2label": {"0": "bad", "1": "good"}}
    with pytest.raises(ModelError, match="a classifier with 2 labels"):
        RewardModel.load(changed(folder, tmp_path, two))
    with pytest.raises(ModelError, match=r"score\.weight: no such tensor"):
        RewardModel.load(changed(folder, tmp_path, score__weight=None))
    with pytest.raises(ModelError, match=r"score\.weight: shape \(2, 32\)"):
        RewardModel.load(changed(folder, tmp_path, score__weight=mx.zeros((2, 32))))
    with pytest.raises(ModelError, match=r"(?i)missing"):
        RewardModel.load(changed(folder, tmp_path, model__norm__weight=None))
    with pytest.raises(ModelError, match=r"score\.bias: its head has a bias, which is not read"):
        RewardModel.load(changed(folder, tmp_path, score__bias=mx.zeros(1)))
    layers = {"score__0__weight": mx.zeros((8, 32)), "score__2__weight": mx.zeros((1, 8))}
    with pytest.raises(ModelError, match=r"no single linear layer \(score\.0\.weight, score\.2"):
        RewardModel.load(changed(folder, tmp_path, score__weight=None, **layers))
    with pytest.raises(ModelError, match=r"not in model: other\.weight"):
        RewardModel.load(changed(folder, tmp_path, other__weight=mx.zeros(1)))
    with pytest.raises(ModelError, match="not a reward model"):
        RewardModel.load(str(TINY_MODEL))


def test_value_heads_and_nan_weights_are_refused(tmp_path):
    value = {"v_head__summary__weight": mx.zeros((1, 64)), "v_head__summary__bias": mx.zeros(1)}
    with pytest.raises(ModelError, match=r"a value head \(v_head\.summary\.bias, v_head.*remove"):
        load_language_model(open_model(changed(TINY_MODEL, tmp_path, **value)))
    nan = {"model__norm__weight": mx.full((64,), float("nan"))}
    with pytest.raises(ModelError, match=r"the model's own logits are NaN \(in float32\)"):
        load_language_model(open_model(changed(TINY_MODEL, tmp_path, **nan)))


@pytest.fixture
def trained(tmp_path):
    """Makes a run folder of `members` heads on a base, adapters away from the identity."""

    def make(base, members=1):
        model = load_language_model(open_model(str(base)))
        layout = AdapterLayout(rank=4)
        mx.random.seed(members)
        tree = install_adapters(model.module, layout)
        tree = tree_map(lambda w: w + 0.05 * mx.random.normal(w.shape), tree)
        head = add_reward_head(model.backbone, members=members).parameters()
        folder = tmp_path / f"run-{members}"
        folder.mkdir()
        save_adapter(folder, {**tree, REWARD_HEAD: head}, layout, str(base))
        return folder

    return make


def export(base, run_folder, output):
    arguments = ("--model", base, "--adapter-path", run_folder, "--output", output)
    return run(["reward", "export", *map(str, arguments)])


ASKED = [{"role": "user", "content": "Is the sun good?"}]
ANSWERS = ["yes, very", "no", "the quick brown fox jumps over it all"]


@pytest.mark.parametrize("quantised", [False, True])
def test_an_exported_model_scores_the_same(trained, tmp_path, quantised, capsys):
    base = TINY_MODEL
    if quantised:
        base = tmp_path / "4-bit"
        convert(str(TINY_MODEL), str(base), quantize=True, q_bits=4, q_group_size=32)
    run_folder = trained(base, members=3)
    assert export(base, run_folder, tmp_path / "hf") == 0
    assert "Wrote LlamaForSequenceClassification to" in capsys.readouterr().out
    wanted = RewardModel.load(str(base), run_folder).score(ASKED, ANSWERS)
    again = RewardModel.load(str(tmp_path / "hf"))
    assert again.score(ASKED, ANSWERS) == pytest.approx(wanted, abs=1e-4 if quantised else 1e-5)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert "quantization" not in config
    names = set(mx.load(str(tmp_path / "hf" / "model.safetensors")))
    assert "score.weight" in names
    assert not any("lm_head" in name or "reward_head" in name for name in names)


@pytest.mark.parametrize("base", [TINY_MODEL, CLASSIFIERS / "qwen2"])
def test_transformers_scores_an_exported_model_the_same(trained, tmp_path, base):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
        import transformers

    run_folder = trained(base)
    assert export(base, run_folder, tmp_path / "hf") == 0
    content = SCORES["llama"]
    found = RewardModel.load(str(base), run_folder).score_tokens(groups_of(content))
    auto = transformers.AutoModelForSequenceClassification
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = auto.from_pretrained(
            tmp_path / "hf", output_loading_info=True, dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    pad = model.config.pad_token_id
    assert tokenizer.pad_token_id == pad != EOS
    rows = content["rows"]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        theirs = model.eval()(input_ids=ids, attention_mask=mask).logits[:, 0].numpy()
    assert np.abs(np.concatenate(found)[:, 0] - theirs).max() < 1e-4


def test_models_that_cannot_be_exported_are_refused(trained, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    run_folder = trained(TINY_MODEL)
    assert export(TINY_MODEL, run_folder, tmp_path / "full") == 1
    assert "is not empty" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(TINY_MODEL, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}))
    assert export(other, run_folder, tmp_path / "out") == 1
    assert "gemma models can't be exported (supported: llama" in capsys.readouterr().err
    (run_folder / "reward_head.safetensors").unlink()
    assert export(TINY_MODEL, run_folder, tmp_path / "out") == 1
    assert "no reward_head.safetensors" in capsys.readouterr().err


def test_a_classifier_is_refused_as_a_policy(tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {i}", "chosen": " yes", "rejected": " no"} for i in range(8)]
    write_rows(data, rows)
    arguments = ["--model", str(CLASSIFIERS / "llama"), "--data", str(data), "--iters", "1"]
    assert run(["sft", *arguments, "--output", str(tmp_path / "run")]) == 1
    assert "is a sequence classifier, which generates no text" in capsys.readouterr().err
